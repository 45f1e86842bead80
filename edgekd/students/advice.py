"""What is advised for a job: each key with its reason and the evidence for it.

The rules are few and fixed, so that the same facts give the same advice. A key that the pipeline
file sets is changed only where a requirement, a measurement or the device speaks against it.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgekd.config.budgets import Budgets
from edgekd.config.host import CPU_PROVIDER
from edgekd.config.networks import HUBS
from edgekd.config.pipeline import PipelineConfig
from edgekd.config.profile import Profile
from edgekd.measurement import Measurement, full_text
from edgekd.release.result import Result

LARGE_GAP = 10
"""From so many times the student's parameters on, an assistant between is advised."""

_NEEDS_SEARCH = ("size", "parameters", "latency", "memory")
"""Sections of the gate that the student's structure decides."""


@dataclass(frozen=True)
class Known:
    """A figure that was measured, and the file that it is in."""

    value: float
    file: str


@dataclass(frozen=True)
class Facts:
    """What the advice depends on. What is not known is None."""

    config: PipelineConfig
    """With the goal and the requirements."""
    content: Mapping[str, Any]
    """The same as written: only keys that are set."""
    original: Mapping[str, Any]
    """As the file has it."""
    profile: Profile
    wished: frozenset[str]
    """Keys that the goal or an option set."""
    objectives: tuple[str, ...] | None
    """Those of the search that the goal asks for, the first deciding; None: it asks for none."""
    providers: tuple[str, ...]
    """ONNX Runtime's execution providers on this machine."""
    saturates: bool
    """Whether this processor adds INT8 products in 16 bits (x86 without VNNI)."""
    rtx_installed: bool
    """Whether engines of TensorRT for RTX can be built here."""
    higher_is_better: bool
    metric: str
    inputs: tuple[tuple[int, ...], ...] | None = None
    """The shape of one sample of each input."""
    classes: int | None = None
    samples: int | None = None
    """Of the training split."""
    teacher_score: Known | None = None
    """On validation samples."""
    teacher_entropy: Known | None = None
    """Mean of its outputs on validation samples as a share of the largest, ln(classes)."""
    teacher_parameters: Known | None = None
    student_parameters: Known | None = None
    result: Result | None = None
    """Of the file as it is, without the goal."""
    result_file: str = ""
    choice: Mapping[str, Any] | None = None
    """Of the engines stage, in the same run."""
    choice_file: str = ""

    @property
    def budgets(self) -> Budgets:
        """Those of the gate, else the profile's."""
        return Budgets.resolve(self.config.gate, self.profile)

    def written(self, key: str) -> Any:
        """The value of a dotted key in the file, or None."""
        return _at(self.content, key)

    def yours(self, key: str, advised: Any) -> Any:
        """What the file sets a key to, where that is not what is advised; else None."""
        before = _at(self.original, key)
        return None if before == advised else before


def _at(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content.get(part) if isinstance(content, Mapping) else None
    return content


@dataclass(frozen=True)
class Advice:
    """One key of the advised pipeline."""

    key: str
    value: Any
    """As in YAML; what the file has where that is to stay."""
    reason: str
    evidence: str
    """``measured: FILE``, ``published: …``, ``device: …`` or ``yours``."""
    yours: Any = None
    """What the file has, where the advice is another."""

    @property
    def comment(self) -> str:
        """The text above the key."""
        changed = "" if self.yours is None else f"yours: {short(self.yours)}, advised: as below. "
        source = "" if self.evidence == self.reason else f" [{self.evidence}]"
        return f"{changed}{self.reason}{source}"


def short(value: Any) -> str:
    """A value in one line of YAML's flow style."""
    text = json.dumps(value, ensure_ascii=False).replace('"', "")
    return text if len(text) <= 160 else f"{text[:150]}…"


def advise(facts: Facts) -> tuple[Advice, ...]:
    """The advice for a job, in the order of a pipeline file."""
    student = _student(facts)
    return (
        _profile(facts),
        student,
        *_distillation(facts, searched="search" in (student.value or {})),
        *_precision(facts),
        _engines(facts),
        *_budgets(facts),
    )


def _kept(facts: Facts, key: str, reason: str, evidence: str = "yours") -> Advice:
    value = facts.written(key)
    return Advice(key, value, reason, evidence, facts.yours(key, value))


def _changed(facts: Facts, key: str, value: Any, reason: str, evidence: str) -> Advice:
    return Advice(key, value, reason, evidence, facts.yours(key, value))


def _profile(facts: Facts) -> Advice:
    profile = facts.profile
    memory = profile.memory.usable_mb.value if profile.memory else 0
    threads = profile.runtime.threads
    text = (
        f"{profile.device}: {memory:g} MB usable, {', '.join(profile.precisions)}, "
        f"{profile.runtime.engine}, threads: {threads or 'as the runtime chooses'}"
    )
    origin = (
        "asked for"
        if "profile" in facts.wished
        else "yours"
        if facts.written("profile")
        else "default"
    )
    return _changed(
        facts, "profile", facts.config.profile, text, f"{origin}; device: profile {profile.name}"
    )


# The student ------------------------------------------------------------------------------------


def _missed(facts: Facts) -> Iterator[str]:
    """The limits that the file's student was measured to miss, or not shown to hold."""
    result, budgets = facts.result, facts.budgets.given
    if result is None:
        return
    student = result.student
    figures: dict[str, Measurement | None] = {
        "size.max_mb": student.size_mb,
        "parameters.max": student.parameters,
        "accuracy.max_drop": result.comparison.get(
            "drop" if facts.higher_is_better else "relative_drop"
        ),
    }
    if result.profile == facts.profile.name:
        figures["memory.peak_mb"] = student.peak_memory_mb
        figures |= {f"latency.{name}": figure for name, figure in student.latency.items()}
    for key, figure in figures.items():
        if key not in budgets or figure is None or figure.value is None:
            continue
        high = figure.interval[1] if figure.interval else figure.value
        if high > budgets[key]:
            yield f"{key} {full_text(figure)} is not shown to be at most {budgets[key]:g}"


def _student(facts: Facts) -> Advice:
    objectives = facts.objectives or facts.written("student.search.objectives")
    if facts.config.student.search is not None:
        if (own := facts.written("student.search")) and own.get("candidates") is not None:
            value = {"search": own | ({"objectives": list(objectives)} if objectives else {})}
            return _changed(facts, "student", value, "a search among your candidates", "yours")
        reason = "a search within the limits"
        return _changed(facts, "student", _search(facts, objectives), reason, _limits_text(facts))
    missed = list(_missed(facts))
    asked = sorted(
        key for key in facts.wished if key.split(".")[1:2] and key.split(".")[1] in _NEEDS_SEARCH
    )
    if facts.result is not None and not missed and not facts.objectives:
        drop = facts.result.comparison.get("drop")
        shown = f", drop {full_text(drop)}" if drop is not None and drop.value is not None else ""
        return _kept(
            facts, "student", f"measured within the limits{shown}", f"measured: {facts.result_file}"
        )
    if missed:
        reason, evidence = "; ".join(missed), f"measured: {facts.result_file}"
    elif facts.objectives:
        reason, evidence = f"chosen by {facts.objectives[0]}, as you asked", _limits_text(facts)
    elif asked or "profile" in facts.wished:
        reason = (
            "not measured yet against what you ask for; the search measures candidates, yours too"
        )
        evidence = _limits_text(facts)
    else:
        return _kept(
            facts, "student", "not measured yet; student: {search: {}} lets the device choose"
        )
    return _changed(facts, "student", _search(facts, objectives), reason, evidence)


def _limits_text(facts: Facts) -> str:
    budgets = facts.budgets
    given = {k: v for k, v in budgets.given.items() if k.split(".")[0] in _NEEDS_SEARCH}
    texts = [f"{key} {value:g} ({budgets.origin(key)})" for key, value in given.items()]
    return f"limits: {', '.join(texts) or 'none'}"


def _search(facts: Facts, objectives: Any) -> dict[str, Any]:
    """A search section fitted to the limits: the teacher made smaller, the built-in networks, and
    the file's own student.
    """
    teacher = facts.config.teacher
    candidates: list[dict[str, Any]] = []
    if teacher.onnx is None and importlib.util.find_spec("torch_pruning") is not None:
        candidates.append({"prune": {"ratio": _ratios(facts), "round_to": 4}})
    if (teacher.model or "").startswith(HUBS):
        candidates.append({"drop_layers": {"keep": [0.5, 0.75]}})
    image = facts.inputs is not None and len(facts.inputs) == 1 and len(facts.inputs[0]) == 3
    if image and facts.config.task == "classification":
        widths = [[8, 12, 24], [16, 24, 48], [32, 32, 48]]
        candidates.append({"model": "convnet-s", "grid": {"widths": widths}})
    own = facts.written("student")
    if (
        isinstance(own, Mapping)
        and own.get("model") not in (None, "teacher")
        and set(own) <= {"model", "args", "checkpoint"}
    ):
        candidates.append(dict(own))
    search: dict[str, Any] = {}
    if len(candidates) > 1 or (candidates and "prune" in candidates[0]):
        search["candidates"] = candidates
    if objectives:
        search["objectives"] = list(objectives)
    return {"search": search}


def _ratios(facts: Facts) -> list[float]:
    """Shares of channels to remove, from the least that fits the size or parameter limit on.

    Parameters fall with the square of the width; a parameter has one byte in INT8, else four.
    """
    usual = [0.25, 0.5, 0.75, 0.875]
    budgets, known = facts.budgets, facts.teacher_parameters
    if known is None:
        return usual
    bytes_each = 1 if facts.config.quantize and facts.config.quantize.int8 else 4
    limits = [budgets["parameters.max"], (budgets["size.max_mb"] or math.inf) * 1e6 / bytes_each]
    least = min(limit for limit in limits if limit is not None)
    start = 1 - math.sqrt(min(1.0, least / known.value))
    if start < usual[0]:
        return usual
    if start > 0.94:
        return [0.875, 0.9375]
    return sorted({round(start + (0.9375 - start) * part, 3) for part in (0.05, 0.35, 0.65, 1)})


# Distillation -----------------------------------------------------------------------------------


def _ratio(facts: Facts) -> float | None:
    if facts.teacher_parameters is None or facts.student_parameters is None:
        return None
    return facts.teacher_parameters.value / facts.student_parameters.value


def _distillation(facts: Facts, searched: bool) -> Iterator[Advice]:
    scheme = _scheme(facts, searched)
    yield _losses(facts)
    yield scheme
    yield from _course(facts)


def _figure(facts: Facts, name: str) -> Measurement | None:
    figure = facts.result.comparison.get(name) if facts.result is not None else None
    return figure if figure is not None and figure.value is not None else None


def _losses(facts: Facts) -> Advice:
    key = "distill.losses"
    gain = _figure(facts, "baseline_gain")
    written = facts.written(key)
    measured = f"measured: {facts.result_file}"
    if gain is not None and gain.interval is not None:
        worse = gain.interval[1] < 0 if facts.higher_is_better else gain.interval[0] > 0
        shown = f"against the student alone {full_text(gain)}"
        if written and not worse:
            return _kept(facts, key, f"yours, not shown to harm: {shown}", measured)
        if worse:
            value, reason, evidence = _recipe(facts)
            return _changed(
                facts,
                key,
                value,
                f"the file's terms harmed: {shown}. {reason}",
                f"{measured}; {evidence}",
            )
    if written:
        return _kept(facts, key, "yours; nothing measured speaks against them")
    value, reason, evidence = _recipe(facts)
    return Advice(key, value, reason, evidence)


def _temperature(facts: Facts) -> tuple[float, str]:
    """T, and why: a teacher whose outputs are soft already needs less of it."""
    entropy = facts.teacher_entropy
    published = "papers use T = 4 on CIFAR-100 and T = 1 on ImageNet, where teachers are less sure"
    if entropy is None:
        return 4.0, f"T = 4, the usual start; {published}"
    temperature = 4.0 if entropy.value < 0.1 else 2.0 if entropy.value < 0.4 else 1.0
    return (
        temperature,
        f"T = {temperature:g}: the teacher's outputs have {entropy.value:.1%} of the largest entropy "
        f"({entropy.file}); {published}",
    )


def _recipe(facts: Facts) -> tuple[list[dict[str, Any]], str, str]:
    """Loss terms with their weights, the reason and the evidence."""
    config = facts.config
    if config.task != "classification":
        terms: list[dict[str, Any]] = [
            {term.name: dict(term.args), "weight": float(term.weight)}
            for term in config.loss_terms
            if isinstance(term.weight, float)
        ]
        return (
            terms,
            "continuous outputs: the task's distance to the teacher, a tenth to the targets",
            ("published: imitation of a teacher's actions by L1, L2 or Huber distance"),
        )
    temperature, why = _temperature(facts)
    soft = {"soft_labels": {"temperature": temperature}, "weight": 0.9}
    labelled = min(config.data.labelled, config.distill.labelled)
    here = "measured: docs/distillation.md, Fashion-MNIST, 12 epochs, 3 seeds"
    if labelled < 0.5:
        return (
            [soft | {"weight": 1.0}],
            (
                f"soft labels alone: only {labelled:.0%} of the labels may be used, and the teacher knows "
                f"all; {why}"
            ),
            f"{here}: with 1 % of the labels 92.0 % against 75.6 % alone; published: Hinton et al. 2015",
        )
    mixed = any(
        next(iter(entry), "") in ("mixup", "cutmix")
        if isinstance(entry, Mapping)
        else entry in ("mixup", "cutmix")
        for entry in (*config.data.augment, *(config.distill.augment or ()))
    )
    if mixed or facts.classes == 2:
        reason = (
            "mixed images have no class of their own, which weighted and decoupled losses need"
            if mixed
            else "two classes: there is nothing among the other classes to decouple"
        )
        hard = {"hard_labels": {}, "weight": 0.1}
        return [hard, soft], f"{reason}; {why}", "published: Hinton et al. 2015"
    dkd = {"beta": 2.0, "temperature": temperature}
    return (
        [
            {"hard_labels": {}, "weight": 1.0},
            {"dkd": dkd, "weight": {"start": 0, "end": 1, "over": 0.1}},
        ],
        f"decoupled distillation with labels, after a warm-up; {why}",
        (
            f"{here}: DKD closes 28 % of the gap (14 to 42), soft labels 22 % (7 to 37), so the difference "
            "is not shown; published: Zhao et al. 2022, better than soft labels on six CIFAR-100 pairs "
            "(ResNet-56 to 20: 71.97 against 70.66)"
        ),
    )


def _scheme(facts: Facts, searched: bool) -> Advice:
    key = "distill.scheme"
    written = facts.written(key)
    value, reason, evidence = "offline", "one fixed teacher", "published: Hinton et al. 2015"
    models = facts.result.models if facts.result is not None else {}
    teacher, alone = models.get("teacher"), models.get("baseline")
    if teacher and alone and teacher.metric.value is not None and alone.metric.value is not None:
        better = alone.metric.value - teacher.metric.value
        if (better if facts.higher_is_better else -better) > 0:
            return _changed(
                facts,
                key,
                {"online": {"peers": 2}},
                f"no good teacher: it reaches {full_text(teacher.metric)}, the student alone "
                f"{full_text(alone.metric)}; two students teach each other, without distill.losses",
                f"measured: {facts.result_file}; published: Zhang et al. 2018 (mutual learning)",
            )
    if written:
        return _kept(facts, key, "yours; nothing measured speaks against it")
    ratio, drop = _ratio(facts), _figure(facts, "drop")
    limit = facts.budgets["accuracy.max_drop"]
    if ratio is None:
        return Advice(
            key, value, f"{reason}; the ratio of sizes is not known before a run", evidence
        )
    files = {known.file for known in (facts.teacher_parameters, facts.student_parameters) if known}
    counted = f"measured: {', '.join(sorted(files))}"
    if searched:
        reason = f"{reason}; the search proposes an assistant where it measures that one helps"
        return Advice(key, value, reason, evidence)
    if ratio < LARGE_GAP:
        return Advice(
            key,
            value,
            f"the teacher is {ratio:.1f} times the student, no gap for an assistant",
            counted,
        )
    high = drop.interval[1] if drop is not None and drop.interval else None
    if high is not None and limit is not None and high <= limit:
        return Advice(
            key,
            value,
            f"the teacher is {ratio:.0f} times the student, and yet the drop is within the limit: "
            f"{full_text(drop)}",
            f"measured: {facts.result_file}",
        )
    between = _between(facts)
    if between is None:
        return Advice(
            key,
            value,
            f"the teacher is {ratio:.0f} times the student: a network of your own of about the "
            "geometric mean in size may help as {assistant: {models: […]}}",
            f"{counted}; published: Mirzadeh et al. 2020 (teacher assistants)",
        )
    return Advice(
        key,
        {"assistant": {"models": [between]}},
        f"the teacher is {ratio:.0f} times the student: an assistant between them",
        f"{counted}; published: Mirzadeh et al. 2020 (teacher assistants)",
    )


_CONVNETS = ("convnet-xs", "convnet-s", "convnet-m", "convnet-l")


def _between(facts: Facts) -> str | None:
    """A built-in network between two built-in ones, in the middle of those."""
    above, below = facts.config.teacher.model, facts.config.student.model
    if above not in _CONVNETS or below not in _CONVNETS:
        return None
    names = _CONVNETS[_CONVNETS.index(below) + 1 : _CONVNETS.index(above)]
    return names[len(names) // 2] if names else None


def _course(facts: Facts) -> Iterator[Advice]:
    """Epochs, augmentation and cached views."""
    key, samples = "distill.epochs", facts.samples
    patient = "published: Beyer et al. 2022 (a good teacher is patient and consistent)"
    if facts.written(key) is not None:
        yield _kept(facts, key, "yours")
    else:
        small = samples is not None and samples <= 100_000
        yield Advice(
            key,
            60 if small else 20,
            "distilled students improve for longer than students alone: 70 % of the gap closed after "
            "60 epochs, 57 % after 30"
            + ("" if small else "; a first run, more when it is worth it"),
            f"measured: docs/distillation.md, Fashion-MNIST, 3 seeds; {patient}",
        )
    if facts.written("distill.augment") is not None:
        yield _kept(facts, "distill.augment", "yours")
    augmented = bool(facts.config.data.augment or facts.config.distill.augment)
    key = "distill.cache"
    if facts.written(key) is not None:
        yield _kept(facts, key, "yours")
        return
    layered = any({"student", "teacher"} & term.args.keys() for term in facts.config.loss_terms)
    views = 4 if augmented else 1
    reason = (
        "a term compares layers, so the live teacher is run and nothing is cached"
        if layered
        else f"{views} cached views of each image: the same image for teacher and student"
        if augmented
        else "no augmentation, so one view"
    )
    yield Advice(
        key,
        {"views": views},
        reason,
        "measured: docs/distillation.md, cached 3.5 to 4.4 times the throughput of a live teacher; "
        + patient,
    )


# Precision and engine ---------------------------------------------------------------------------


def _precision(facts: Facts) -> Iterator[Advice]:
    profile, key, written = facts.profile, "quantize", facts.written("quantize")
    if any(wish.split(".")[0] == key for wish in facts.wished):
        if written is not None:
            yield _kept(facts, key, "as you asked", "asked for")
        return
    on_gpu = profile.runtime.engine == "tensorrt"
    if written is not None:
        chosen = f"; the run shipped {facts.choice['chosen']}" if facts.choice else ""
        precision = "precision" in written if isinstance(written, Mapping) else False
        if on_gpu and not precision and "fp16" in profile.precisions and "profile" in facts.wished:
            yield _changed(facts, key, _half(facts), *_half_reason(facts))
            return
        evidence = f"measured: {facts.choice_file}" if facts.choice else "yours"
        yield _kept(facts, key, f"yours{chosen}", evidence)
    elif on_gpu and "fp16" in profile.precisions:
        yield Advice(key, _half(facts), *_half_reason(facts))
    elif "int8" in profile.precisions and not _no_dot_product(profile):
        seven = (
            ", in 7 bits here, where products are summed in 16"
            if facts.saturates and profile.kind == "host"
            else ""
        )
        yield Advice(
            key,
            {"int8": "static", "calibration": "percentile"},
            f"INT8 is tried{seven}, and shipped only where it is measured faster, smaller and as good",
            "measured: docs/engines.md, EfficientNet-Lite0 on an x86 with VNNI: 2.20x, 88.9 % of "
            "the classes unchanged with percentile, 86.7 % with min-max",
        )


def _half(facts: Facts) -> dict[str, str]:
    return {"precision": "fp16"} | ({} if _gpu_here(facts) else {"select": "half"})


def _half_reason(facts: Facts) -> tuple[str, str]:
    here = (
        "" if _gpu_here(facts) else "; selected by name, because this machine's timing says nothing"
    )
    return (
        f"FP16 on {facts.profile.device}: most of INT8's speed without its loss{here}",
        "published: Ultralytics, YOLO11n in TensorRT, ms in FP32/FP16/INT8: AGX Orin 3.93/2.55/2.18, "
        "Orin NX 8.05/4.85/4.37, Thor 1.70/1.20/1.29; INT8 there 0.472 mAP against 0.508",
    )


def _no_dot_product(profile: Profile) -> bool:
    return "Cortex-A72" in (profile.cpu.model.value if profile.cpu else "")


def _gpu_here(facts: Facts) -> bool:
    return facts.profile.runtime.providers[:1] == facts.providers[:1]


def _engines(facts: Facts) -> Advice:
    profile, key = facts.profile, "engines"
    if facts.written(key) is not None and not (
        profile.runtime.engine == "tensorrt" and "profile" in facts.wished
    ):
        evidence = "asked for" if any(w.startswith(key) for w in facts.wished) else "yours"
        return _kept(facts, key, "yours" if evidence == "yours" else "as you asked", evidence)
    if profile.runtime.engine != "tensorrt":
        threads = profile.runtime.threads
        return Advice(
            key,
            ["onnxruntime"],
            f"{', '.join(profile.runtime.providers)}, threads: {threads or 'as the runtime chooses'}",
            f"device: profile {profile.name}",
        )
    first: Any = {"kind": "onnxruntime"}
    if not set(profile.runtime.providers) <= set(facts.providers):
        first["providers"] = [CPU_PROVIDER]
    engines, reason = [first], "timed here on the CPU for want of the device's providers"
    if profile.kind == "jetson":
        engines.append({"kind": "tensorrt"})
        reason += "; TensorRT's engine is built on the device, by the line in the bundle"
    elif facts.rtx_installed and profile.gpu is not None:
        capability = profile.gpu.compute_capability.value
        engines.append({"kind": "tensorrt-rtx", "compute_capabilities": [capability]})
        reason += f"; TensorRT for RTX builds for {capability} without the GPU"
    return _changed(facts, key, engines, reason, f"device: profile {profile.name}")


# Budgets ----------------------------------------------------------------------------------------


def _budgets(facts: Facts) -> Iterator[Advice]:
    budgets = facts.budgets
    if (
        facts.written("gate.evidence") is None
        and facts.profile.kind != "host"
        and facts.config.target == "local"
    ):
        yield Advice(
            "gate.evidence",
            "measured-on-host",
            f"no {facts.profile.name} is measured from here; run the bundle's 'edgerun bench' there "
            "and gate its bench.json",
            "target: local",
        )
    if not any(key.startswith("accuracy.") for key in budgets.given) and facts.higher_is_better:
        yield Advice(
            "gate.accuracy",
            {"max_drop": 0.01},
            "without a bound of the accuracy a student that guesses would pass",
            "convention: one point",
        )
    for section in ("accuracy", "size", "parameters", "latency", "memory"):
        written = facts.written(f"gate.{section}")
        limits = [key for key in budgets.limits if key.startswith(f"{section}.")]
        asked = [key for key in facts.wished if key.startswith(f"gate.{section}.")]
        if written is not None:
            names = ", ".join(key.partition(".")[2] for key in sorted(asked))
            text = f"asked for: {names}" if asked else "yours"
            if missed := [text for text in _missed(facts) if text.startswith(f"{section}.")]:
                yield _kept(
                    facts,
                    f"gate.{section}",
                    "; ".join((text, *missed)),
                    f"measured: {facts.result_file}",
                )
            else:
                yield _kept(facts, f"gate.{section}", text, "asked for" if asked else "yours")
        for key in limits:
            name, _, limit = key.partition(".")
            if written is None:
                yield Advice(
                    f"gate.{name}",
                    {limit: budgets[key]},
                    f"{facts.profile.device}'s own limit",
                    f"device: {budgets.origin(key)}",
                )


def advised_content(content: Mapping[str, Any], advice: Sequence[Advice]) -> dict[str, Any]:
    """A pipeline file's content with the advice in it."""
    result: dict[str, Any] = json.loads(json.dumps(content))
    for one in advice:
        if one.value is None:
            continue
        *parents, last = one.key.split(".")
        node = result
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = one.value
    order = list(PipelineConfig.model_fields)
    return dict(sorted(result.items(), key=lambda pair: order.index(pair[0])))
