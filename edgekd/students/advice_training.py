"""How a student is advised to be trained: losses, temperature, weights, scheme and course."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from edgekd.measurement import full_text
from edgekd.students.advice_facts import Advice, Facts

LARGE_GAP = 10
"""From so many times the student's parameters on, an assistant between is advised."""


def _ratio(facts: Facts) -> float | None:
    if facts.teacher_parameters is None or facts.student_parameters is None:
        return None
    return facts.teacher_parameters.value / facts.student_parameters.value


def training_advice(facts: Facts, searched: bool) -> Iterator[Advice]:
    """Losses, scheme, epochs, augmentation and cached views.

    Args:
        facts: what is known.
        searched: whether the advised student is chosen by a search.
    """
    scheme = _scheme(facts, searched)
    alone = isinstance(scheme.value, Mapping) and "online" in scheme.value
    yield from _losses(facts, taught=not alone)
    yield scheme
    yield from _course(facts)


def _losses(facts: Facts, taught: bool) -> Iterator[Advice]:
    """The loss terms; ``taught``: whether a teacher's outputs are used at all."""
    key, gain = "distill.losses", facts.figure("baseline_gain")
    written = facts.written(key)
    auto = written == "auto" or (isinstance(written, Mapping) and "auto" in written)
    measured = f"measured: {facts.result_file}"
    interval = gain.interval if gain is not None else None
    if auto and not taught:
        value, reason, evidence = _recipe(facts)
        yield facts.choose(key, value, f"a race needs a teacher that is used; {reason}", evidence)
    elif gain is not None and interval is not None and interval[1] < 0 and taught and not auto:
        shown = f"the file's terms harmed: against the student alone {full_text(gain)}"
        if importlib.util.find_spec("optuna") is None:
            value, reason, evidence = _recipe(facts)
            yield facts.choose(key, value, f"{shown}; {reason}", f"{measured}; {evidence}")
        else:
            text = f"{shown}; recipes are raced on validation data, plain soft labels among them"
            yield facts.choose(key, "auto", text, measured)
            if facts.config.distill.baseline:
                text = "the student alone is shipped where it is the better one"
                yield facts.choose("distill.keep", "better", text, measured)
    elif auto:
        yield facts.keep(key, "yours: recipes are raced on validation data")
    elif written and gain is not None:
        text = f"yours, not shown to harm: against the student alone {full_text(gain)}"
        yield facts.keep(key, text, measured)
    elif written:
        yield facts.keep(key, "yours; nothing measured speaks against them, and auto races others")
    else:
        value, reason, evidence = _recipe(facts)
        yield facts.choose(key, value, f"{reason}; auto would race it against others", evidence)


def _temperature(facts: Facts) -> tuple[float, str]:
    """T, and why: a teacher whose outputs are soft already needs less of it."""
    entropy = facts.teacher_entropy
    published = "DKD and DIST were published with T = 4 on CIFAR-100 and T = 1 on ImageNet"
    if entropy is None:
        return 4.0, f"T = 4, the usual start; {published}"
    temperature = 4.0 if entropy.value < 0.1 else 2.0 if entropy.value < 0.4 else 1.0
    return (
        temperature,
        f"T = {temperature:g}: the teacher's outputs have {entropy.value:.1%} of the largest "
        f"entropy ({entropy.file}); {published}",
    )


def _recipe(facts: Facts) -> tuple[list[dict[str, Any]], str, str]:
    """Loss terms with their weights, the reason and the evidence."""
    config = facts.config
    if config.task != "classification":
        kind = {"kind": config.task_args.get("loss", "mse")}
        return (
            [
                {"target_regression": kind, "weight": 0.1},
                {"output_regression": kind, "weight": 0.9},
            ],
            "continuous outputs: the task's distance, mostly to the teacher",
            "convention: the weights of soft labels",
        )
    temperature, why = _temperature(facts)
    soft = {"soft_labels": {"temperature": temperature}, "weight": 0.9}
    labelled = min(config.data.labelled, config.distill.labelled)
    here = "measured: docs/distillation.md, Fashion-MNIST, 12 epochs, 3 seeds"
    if labelled < 0.5:
        return (
            [soft | {"weight": 1.0}],
            (
                f"soft labels alone: only {labelled:.0%} of the labels may be used, and the "
                f"teacher answers for all samples; {why}"
            ),
            f"{here}: with 1 % of the labels 92.0 % against 75.6 % alone",
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
            f"{here}: DKD closes 28 % of the gap (14 to 42), soft labels 22 % (7 to 37), so a "
            "difference is not shown; published: Zhao et al. 2022, better than soft labels on six "
            "CIFAR-100 pairs (ResNet-56 to 20: 71.97 against 70.66)"
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
            return facts.choose(
                key,
                {"online": {"peers": 2}},
                f"no good teacher: it reaches {full_text(teacher.metric)}, the student alone "
                f"{full_text(alone.metric)}; two students teach each other, without distill.losses",
                f"measured: {facts.result_file}; published: Zhang et al. 2018 (mutual learning)",
            )
    if written:
        return facts.keep(key, "yours; nothing measured speaks against it")
    ratio, drop = _ratio(facts), facts.figure("drop")
    limit = facts.budgets["accuracy.max_drop"]
    if ratio is None:
        return facts.choose(
            key, value, f"{reason}; the ratio of sizes is not known before a run", evidence
        )
    files = {known.file for known in (facts.teacher_parameters, facts.student_parameters) if known}
    counted = f"measured: {', '.join(sorted(files))}"
    if searched:
        reason = f"{reason}; the search proposes an assistant where it measures that one helps"
        return facts.choose(key, value, reason, evidence)
    if ratio < LARGE_GAP:
        return facts.choose(
            key,
            value,
            f"the teacher is {ratio:.1f} times the student, no gap for an assistant",
            counted,
        )
    high = drop.interval[1] if drop is not None and drop.interval else None
    if high is not None and limit is not None and high <= limit:
        return facts.choose(
            key,
            value,
            f"the teacher is {ratio:.0f} times the student, and yet the drop is within the limit: "
            f"{full_text(drop)}",
            f"measured: {facts.result_file}",
        )
    between = _between(facts)
    if between is None:
        return facts.choose(
            key,
            value,
            f"the teacher is {ratio:.0f} times the student: a network of your own of about the "
            "geometric mean in size may help as {assistant: {models: […]}}",
            f"{counted}; published: Mirzadeh et al. 2020 (teacher assistants)",
        )
    return facts.choose(
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
        yield facts.keep(key, "yours")
    else:
        small = samples is not None and samples <= 100_000
        yield facts.choose(
            key,
            60 if small else 20,
            "distilled students improve for longer than students alone: 70 % of the gap closed "
            "after 60 epochs, 57 % after 30"
            + ("" if small else "; a first run, more when it is worth it"),
            f"measured: docs/distillation.md, Fashion-MNIST, 3 seeds; {patient}",
        )
    if facts.written("distill.augment") is not None:
        yield facts.keep("distill.augment", "yours")
    augmented = bool(facts.config.data.augment or facts.config.distill.augment)
    key = "distill.cache"
    if facts.written(key) is not None:
        yield facts.keep(key, "yours")
        return
    layered = any(
        isinstance(arguments, Mapping) and {"student", "teacher"} & arguments.keys()
        for term in facts.written("distill.losses") or ()
        if isinstance(term, Mapping)
        for arguments in term.values()
    )
    views = 4 if augmented else 1
    reason = (
        "a term compares layers, so the live teacher is run and nothing is cached"
        if layered
        else f"{views} cached views of each image: the same image for teacher and student"
        if augmented
        else "no augmentation, so one view"
    )
    yield facts.choose(
        key,
        {"views": views},
        reason,
        "measured: docs/distillation.md, cached 3.5 to 4.4 times the throughput of a live teacher; "
        + patient,
    )
