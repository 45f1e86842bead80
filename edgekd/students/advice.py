"""What is advised for a job: each key with its reason and the evidence for it.

The rules are few and fixed, so that the same facts give the same advice. A key that the pipeline
file sets is changed only where a requirement, a measurement or the device speaks against it.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgekd.config.host import CPU_PROVIDER
from edgekd.config.networks import HUBS
from edgekd.config.pipeline import PipelineConfig
from edgekd.config.profile import Profile
from edgekd.measurement import Measurement, full_text
from edgekd.students.advice_facts import Advice, Facts
from edgekd.students.advice_training import training_advice

_NEEDS_SEARCH = ("size", "parameters", "latency", "memory")
"""Sections of the gate that the student's structure decides."""


def advise(facts: Facts) -> tuple[Advice, ...]:
    """The advice for a job, in the order of a pipeline file."""
    student = _student(facts)
    return (
        _profile(facts),
        _teacher(facts),
        student,
        *training_advice(facts, searched="search" in (student.value or {})),
        *_precision(facts),
        _engines(facts),
        *_budgets(facts),
    )


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
    return facts.choose(
        "profile", facts.config.profile, text, f"{origin}; device: profile {profile.name}"
    )


def _teacher(facts: Facts) -> Advice:
    known = {
        facts.metric: facts.teacher_score,
        "share of the largest entropy": facts.teacher_entropy,
        "parameters": facts.teacher_parameters,
    }
    texts = [f"{name} {_number(figure.value)}" for name, figure in known.items() if figure]
    if not texts:
        return facts.keep("teacher", "not measured yet: 'edgekd run --until teacher' does")
    files = dict.fromkeys(figure.file for figure in known.values() if figure)
    return facts.keep(
        "teacher", f"on validation samples: {', '.join(texts)}", f"measured: {', '.join(files)}"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


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
            return facts.choose("student", value, "a search among your candidates", "yours")
        if facts.searched is not None and not facts.wished:
            winner, why = facts.searched["winner"], facts.searched["why"]
            return facts.keep(
                "student", f"the search chose {winner}: {why}", f"measured: {facts.searched_file}"
            )
        reason = "a search within the limits"
        return facts.choose("student", _search(facts, objectives), reason, _limits_text(facts))
    missed = list(_missed(facts))
    asked = sorted(
        key for key in facts.wished if key.split(".")[1:2] and key.split(".")[1] in _NEEDS_SEARCH
    )
    if facts.result is not None and not missed and not facts.objectives:
        drop = facts.result.comparison.get("drop")
        shown = f", drop {full_text(drop)}" if drop is not None and drop.value is not None else ""
        return facts.keep(
            "student", f"measured within the limits{shown}", f"measured: {facts.result_file}"
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
        return facts.keep(
            "student", "not measured yet; student: {search: {}} lets the device choose"
        )
    return facts.choose("student", _search(facts, objectives), reason, evidence)


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


# Precision and engine ---------------------------------------------------------------------------


def _precision(facts: Facts) -> Iterator[Advice]:
    profile, key, written = facts.profile, "quantize", facts.written("quantize")
    if any(wish.split(".")[0] == key for wish in facts.wished):
        if written is not None:
            yield facts.keep(key, "as you asked", "asked for")
        return
    on_gpu = profile.runtime.engine == "tensorrt"
    if written is not None:
        chosen = f"; the run shipped {facts.choice['chosen']}" if facts.choice else ""
        precision = "precision" in written if isinstance(written, Mapping) else False
        if on_gpu and not precision and "fp16" in profile.precisions and "profile" in facts.wished:
            yield facts.choose(key, _half(facts), *_half_reason(facts))
            return
        evidence = f"measured: {facts.choice_file}" if facts.choice else "yours"
        yield facts.keep(key, f"yours{chosen}", evidence)
    elif on_gpu and "fp16" in profile.precisions:
        yield facts.choose(key, _half(facts), *_half_reason(facts))
    elif "int8" in profile.precisions and not _no_dot_product(profile):
        seven = (
            ", in 7 bits here, where products are summed in 16"
            if facts.saturates and profile.kind == "host"
            else ""
        )
        yield facts.choose(
            key,
            {"int8": "static", "calibration": "percentile"},
            f"INT8 is tried{seven}, and shipped only where it is measured to be faster and as good",
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
        "published: Ultralytics, YOLO11n in TensorRT, ms in FP32/FP16/INT8: AGX Orin "
        "3.93/2.55/2.18, Orin NX 8.05/4.85/4.37, Thor 1.70/1.20/1.29; INT8 0.472 mAP, before 0.508",
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
        return facts.keep(key, "yours" if evidence == "yours" else "as you asked", evidence)
    if profile.runtime.engine != "tensorrt":
        threads = profile.runtime.threads
        text = f"{', '.join(profile.runtime.providers)}, threads: {threads or 'its choice'}"
        if _no_dot_product(profile) and facts.written("quantize") is None:
            text += "; float32, because INT8 gains little without dot-product instructions"
        return facts.choose(
            key,
            ["onnxruntime"],
            text,
            f"device: profile {profile.name}",
        )
    first: Any = {"kind": "onnxruntime"}
    if not set(profile.runtime.providers) <= set(facts.providers):
        first["providers"] = [CPU_PROVIDER]
        reason = "timed here on the CPU for want of the device's providers"
    else:
        reason = f"timed with {', '.join(profile.runtime.providers)}"
    engines = [first]
    if profile.kind == "jetson":
        engines.append({"kind": "tensorrt"})
        reason += "; TensorRT's engine is built on the device, by the line in the bundle"
    elif facts.rtx_installed and profile.gpu is not None:
        capability = profile.gpu.compute_capability.value
        engines.append({"kind": "tensorrt-rtx", "compute_capabilities": [capability]})
        reason += f"; TensorRT for RTX builds for {capability} without the GPU"
    return facts.choose(key, engines, reason, f"device: profile {profile.name}")


# Budgets ----------------------------------------------------------------------------------------


def _budgets(facts: Facts) -> Iterator[Advice]:
    budgets = facts.budgets
    if (
        facts.written("gate.evidence") is None
        and facts.profile.kind != "host"
        and facts.config.target == "local"
    ):
        yield facts.choose(
            "gate.evidence",
            "measured-on-host",
            f"no {facts.profile.name} is measured from here; run the bundle's 'edgerun bench' "
            "there and gate its bench.json",
            "target: local",
        )
    if not any(key.startswith("accuracy.") for key in budgets.given) and facts.higher_is_better:
        yield facts.choose(
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
                yield facts.keep(
                    f"gate.{section}",
                    "; ".join((text, *missed)),
                    f"measured: {facts.result_file}",
                )
            else:
                yield facts.keep(f"gate.{section}", text, "asked for" if asked else "yours")
        for key in limits:
            name, _, limit = key.partition(".")
            if written is None:
                yield facts.choose(
                    f"gate.{name}",
                    {limit: budgets[key]},
                    f"{facts.profile.device}'s own limit",
                    f"device: {budgets.origin(key)}",
                )


def advised_content(content: Mapping[str, Any], advice: Sequence[Advice]) -> dict[str, Any]:
    """A pipeline file's content with the advice in it."""
    result: dict[str, Any] = copy.deepcopy(dict(content))
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
