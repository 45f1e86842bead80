"""Whether the teacher helped: the distilled student against the student alone, on validation data.

Where it is not shown to have helped, likely causes are decided from what is measured on validation
samples and on a part of the training samples, each with what to try.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from numpy.typing import NDArray

from edgekd.config.pipeline import PipelineConfig
from edgekd.config.recipes import default_recipe
from edgekd.config.training import WITHOUT_TEACHER, LossTerm, Schedule
from edgekd.measurement import Measurement, drop_unit, interval_text, value_text
from edgekd.release.statistics import Estimate, paired_difference, samples_to_show
from edgekd.stages.task_data import EVALUATION_BATCH, TaskData, read_json
from edgekd.stages.training import views_of
from edgekd.tasks.classification import Classification

if TYPE_CHECKING:
    from torch import Tensor

    from edgekd.distill.checkpoint import History
    from edgekd.distill.schemes import SchemeContext
    from edgekd.models.dict_model import DictModel

COMPARISON = "comparison.json"

ENOUGH_SAMPLES = 20
"""Number of labelled validation samples below which the two students are not compared."""

_TRAINING_SAMPLES = 2000
"""Number of training samples, spread over the split, that the causes are measured on."""

_LOW_AGREEMENT, _MEMORIZED = 0.9, 0.999
_HARD, _UNIFORM, _SOFT = 0.05, 0.9, 0.4
"""Mean entropy of the teacher's labels as a share of the largest, ln C: below the first the labels
are nearly hard, above the second nearly uniform; another temperature is proposed by the third."""

_SOFTENED = ("soft_labels", "dkd", "wsld", "jsd", "dist")
"""Losses whose temperature divides the teacher's own logits."""

_AUTO = {"distill": {"losses": "auto"}}

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Facts:
    """What the causes are decided from; None where it is not known.

    Attributes:
        gain: the student's validation score minus that of the student alone, higher is better.
        teacher_gap: the teacher's minus that of the student alone; None without a teacher.
        history: the student's training.
        deviation: standard error of the student's validation metric.
        uses_teacher: whether any loss compares with the teacher.
        agreement: share of training samples on which student and teacher give the same class.
        parameter_ratio: the teacher's parameters by the student's.
        assistant: a network between the two, where one is known.
        teacher_training: the teacher's accuracy on its training samples.
        entropy: by temperature, the mean entropy of the teacher's labels, as a share of ln C.
        images: whether an input is images.
        views: number of views of a training sample; None for a new one in each epoch.
    """

    gain: Estimate
    teacher_gap: Estimate | None
    history: History
    deviation: float
    uses_teacher: bool = True
    agreement: float | None = None
    parameter_ratio: float | None = None
    assistant: str | None = None
    teacher_training: float | None = None
    entropy: Mapping[float, float] | None = None
    images: bool = False
    views: int | None = None


def compare_students(
    task_data: TaskData,
    config: PipelineConfig,
    scheme_context: SchemeContext,
    alone: DictModel,
    history: History,
) -> dict[str, Any]:
    """Compare the distilled student with the student alone, paired on validation samples.

    Args:
        task_data: the samples; only the labels that the student may use are read.
        config: the pipeline with the losses that were trained with.
        scheme_context: the distilled student and its teacher.
        alone: the same network trained without the teacher.
        history: of the distilled student.

    Returns:
        The record of ``comparison.json``: the metric of both, the difference with its interval,
        ``outcome`` (better, worse, not shown, too few samples), a sentence, likely causes with what
        to try, and which of the two is kept and why.
    """
    task, sign = task_data.task, 1 if task_data.task.higher_is_better else -1
    allowed = task_data.keep_labels(config.distill.labelled)
    student = scheme_context.student
    of_student = _scores(student, allowed)
    of_alone = _scores(alone, allowed)
    gain = paired_difference(sign * of_student, sign * of_alone)
    low, high = gain.interval or (-math.inf, math.inf)
    outcome = "better" if low > 0 else "worse" if high < 0 else "not shown"
    if gain.n < ENOUGH_SAMPLES:
        outcome = "too few samples"
    found = []
    if outcome in ("worse", "not shown"):
        facts = _measure(task_data, config, scheme_context, of_student, of_alone, gain, history)
        found = list(causes(facts, config))
    better = "student"
    if config.distill.keep == "better" and gain.n >= ENOUGH_SAMPLES and (gain.value or 0) < 0:
        better = "baseline"
    figure = gain.figure(drop_unit(task.metric), "measured-on-host")
    values = {"student": float(of_student.mean()), "alone": float(of_alone.mean())}
    return {
        "schema": "edgekd/comparison/1",
        "metric": task.metric,
        "n": gain.n,
        **values,
        "gain": {"value": gain.value, "interval": gain.interval},
        "outcome": outcome,
        "sentence": _sentence(outcome, figure, values, task.metric),
        "causes": found,
        "keep": config.distill.keep,
        "kept": better,
        "kept_why": _kept(config.distill.keep, better, gain.n),
    }


def is_student_alone(distill: Path) -> bool:
    """Whether the student of that artifact is the one trained alone (``distill.keep: better``)."""
    file = distill / COMPARISON
    return file.is_file() and bool(read_json(file)["kept"] == "baseline")


def causes(facts: Facts, config: PipelineConfig) -> Iterator[dict[str, str]]:
    """The likely causes of a distillation that is not shown to help, the most likely first.

    Each is what it is, the measured evidence, and what to try as a line of YAML.
    """

    def cause(what: str, evidence: str, trial: Mapping[str, Any]) -> dict[str, str]:
        flow = yaml.safe_dump(dict(trial), default_flow_style=True, width=math.inf, sort_keys=False)
        return {"cause": what, "evidence": evidence, "try": flow.strip()[1:-1]}

    if not facts.uses_teacher:
        default = default_recipe(config.task, config.task_args)
        yield cause(
            "no loss compares with the teacher",
            "all terms of distill.losses read the labels only",
            {"distill": {"losses": [_as_yaml(term) for term in default]}},
        )
        return
    trial: Mapping[str, Any]
    gap, unit = facts.teacher_gap, drop_unit(facts.history.metric)
    if gap is not None and (gap.interval is None or gap.interval[0] <= 0):
        what = "worse" if gap.interval is not None and gap.interval[1] < 0 else "hardly better"
        train = config.teacher.train
        remedy: dict[str, Any] = {"checkpoint": "a-better-teacher.safetensors"}
        if train is not None:
            remedy = {"train": {"epochs": 2 * train.epochs}}
        difference = Measurement(gap.value, unit, gap.n, gap.interval)
        yield cause(
            f"the teacher is {what} than the student alone",
            f"{value_text(difference, signed=True)} ({interval_text(difference)}) on {gap.n:,} "
            "validation samples",
            {"teacher": remedy},
        )
    ratio, agreement = facts.parameter_ratio, facts.agreement
    if agreement is not None and agreement < _LOW_AGREEMENT:
        same = f"the same class on {agreement:.1%} of the training samples"
        if facts.assistant is not None and ratio is not None:
            yield cause(
                "the student is too small to follow the teacher",
                f"{same}; the teacher has {ratio:.0f} times the parameters",
                {"distill": {"scheme": {"assistant": {"models": [facts.assistant]}}}},
            )
        else:
            yield cause("the student does not follow the teacher", same, _AUTO)
    yield from _temperature(facts, config, cause)
    if (facts.teacher_training or 0) >= _MEMORIZED and facts.views == 1:
        trial = {"data": {"augment": [{"shift": {"pixels": 2}}]}} if facts.images else _AUTO
        if config.distill.augment or (config.distill.augment is None and config.data.augment):
            trial = {"distill": {"cache": {"views": 8}}}
        yield cause(
            "the teacher knows its training samples by heart, so that its answers to them say "
            "little more than the labels",
            f"{facts.teacher_training:.2%} of them right, and one view of each",
            trial,
        )
    rise = _late_rise(facts.history)
    if rise > facts.deviation:
        yield cause(
            "too few epochs",
            f"validation {facts.history.metric} still rose by {rise:.4f} in the last fifth",
            {"distill": {"epochs": 2 * config.distill.epochs}},
        )
    low, high = facts.gain.interval or (0.0, 0.0)
    if low <= 0 <= high and facts.gain.value:
        needed = samples_to_show(facts.gain.n, facts.gain.value, (low, high), 0.0)
        about = "more" if needed is None else f"about {needed:,}"
        share = min(0.5, 2 * config.data.validation)
        yield cause(
            "too few validation samples to tell",
            f"{facts.gain.n:,} were compared; {about} would decide a difference of this size",
            {"data": {"validation": share}},
        )


def _temperature(facts: Facts, config: PipelineConfig, cause: Any) -> Iterator[dict[str, str]]:
    """The cause that the teacher's soft labels are nearly hard or nearly uniform."""
    terms = config.loss_terms
    used = next(((at, t) for at, term in enumerate(terms) if (t := _temperature_of(term))), None)
    if used is None or facts.entropy is None or used[1] not in facts.entropy:
        return
    at, temperature = used
    share = facts.entropy[temperature]
    if _HARD <= share <= _UNIFORM:
        return
    others = {t: abs(value - _SOFT) for t, value in facts.entropy.items()}
    better = min(others, key=lambda t: (others[t], t))
    if better == temperature:
        return
    changed = [
        _as_yaml(term, better if number == at else None) for number, term in enumerate(terms)
    ]
    yield cause(
        f"the temperature is too {'low' if share < _HARD else 'high'}: the teacher's labels are "
        f"nearly {'hard' if share < _HARD else 'uniform'}",
        f"their entropy at T = {temperature:g} is {share:.1%} of the largest, at T = {better:g} "
        f"{facts.entropy[better]:.1%}",
        {"distill": {"losses": changed}},
    )


def _temperature_of(term: LossTerm) -> float | None:
    """The T of a loss that compares softmax(z / T) with the teacher's; None for all others."""
    from edgekd.distill.losses import LOSSES

    if term.name not in _SOFTENED or "teacher" in term.args:
        return None
    default = inspect.signature(LOSSES[term.name]).parameters["temperature"].default
    value = term.args.get("temperature", default)
    return float(value) if isinstance(value, int | float) else None


def _as_yaml(term: LossTerm, temperature: float | None = None) -> dict[str, Any]:
    args = dict(term.args) if temperature is None else {**term.args, "temperature": temperature}
    weight = term.weight
    shown = weight.model_dump(exclude_defaults=True) if isinstance(weight, Schedule) else weight
    return {term.name: args, **({} if shown == 1 else {"weight": shown})}


def _measure(
    task_data: TaskData,
    config: PipelineConfig,
    scheme_context: SchemeContext,
    of_student: Scores,
    of_alone: Scores,
    gain: Estimate,
    history: History,
) -> Facts:
    """Measure what the causes are decided from."""
    import torch

    from edgekd.data.loader import Loader
    from edgekd.distill.schemes.offline import assistant_between, capacity_ratio
    from edgekd.distill.trainer import score

    task, teacher, student = task_data.task, scheme_context.teacher, scheme_context.student
    if config.distill.scheme.name in WITHOUT_TEACHER:
        return Facts(gain, None, history, _standard_error(of_student))
    sign = 1 if task.higher_is_better else -1
    allowed = task_data.keep_labels(config.distill.labelled)
    teacher.capture(())
    of_teacher = score(teacher.predict, allowed.validation_loader(), task)
    facts: dict[str, Any] = {}
    if isinstance(task, Classification):
        total = len(task_data.dataset.splits["train"])
        rows = np.unique(np.linspace(0, total - 1, min(total, _TRAINING_SAMPLES)).astype(int))
        loader = Loader("train", task_data.dataset, min(len(rows), EVALUATION_BATCH), rows=rows)
        logits: list[Tensor] = []
        same: list[Tensor] = []
        right: list[Tensor] = []
        student.eval()
        with torch.inference_mode():
            for batch in loader.ordered():
                own = student(batch)[task.output].float().cpu()
                taught = teacher.predict(batch)[task.output].float().cpu()
                logits.append(taught.flatten(0, -2))
                same.append((own.argmax(-1) == taught.argmax(-1)).flatten())
                target = batch[task.target].cpu()
                right.append((taught.argmax(-1) == target)[target >= 0].flatten())
        known = torch.cat(right).double()
        facts = {
            "agreement": float(torch.cat(same).double().mean()),
            "teacher_training": float(known.mean()) if len(known) else None,
            "entropy": _entropies(torch.cat(logits), config),
        }
    return Facts(
        gain,
        paired_difference(sign * of_teacher, sign * of_alone),
        history,
        _standard_error(of_student),
        uses_teacher=scheme_context.new_objective().needs_teacher,
        parameter_ratio=capacity_ratio(scheme_context),
        assistant=assistant_between(scheme_context),
        images=any(len(spec.shape) == 4 for spec in task_data.dataset.inputs),
        views=views_of(config, config.distill),
        **facts,
    )


def _entropies(logits: Tensor, config: PipelineConfig) -> dict[float, float]:
    """The mean entropy of softmax(z / T), as a share of ln C, by T."""
    from torch.nn.functional import log_softmax

    own = [t for term in config.loss_terms if (t := _temperature_of(term)) is not None]
    found = {}
    for temperature in sorted({1.0, 2.0, 4.0, 8.0, 16.0, *own}):
        log_p = log_softmax(logits.double() / temperature, dim=-1)
        entropy = -(log_p.exp() * log_p).sum(dim=-1).mean()
        found[temperature] = float(entropy) / math.log(logits.shape[-1])
    return found


def _scores(model: DictModel, task_data: TaskData) -> Scores:
    from edgekd.distill.trainer import score

    return score(model.eval(), task_data.validation_loader(), task_data.task)


def _standard_error(scores: Scores) -> float:
    return float(scores.std(ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else math.inf


def _late_rise(history: History) -> float:
    """How much better the best epoch of the last fifth is than the best one before; at least 0."""
    sign = 1 if history.higher_is_better else -1
    values = [sign * epoch.validation for epoch in history.epochs]
    late = math.ceil(len(values) / 5)
    return max(0.0, max(values[-late:]) - max(values[:-late])) if len(values) > late else 0.0


def _sentence(outcome: str, gain: Measurement, values: Mapping[str, float], metric: str) -> str:
    both = " against ".join(
        value_text(Measurement(values[name], metric)) for name in ("student", "alone")
    )
    change = f"{value_text(gain, signed=True)} ({interval_text(gain)})"
    figures = f"{metric} {both}, {change} on {gain.n:,} validation samples"
    if outcome == "too few samples":
        return f"{gain.n} labelled validation samples do not show whether the teacher helped"
    what = {
        "better": "the distilled student is better than the student alone",
        "worse": "the distilled student is worse than the student alone",
        "not shown": "the distilled student is not shown to be better than the student alone",
    }[outcome]
    return f"{what}: {figures}"


def _kept(keep: str, better: str, n: int) -> str:
    if keep == "student":
        return "distill.keep: student ships the distilled student; better would ship the better one"
    if n < ENOUGH_SAMPLES:
        return f"distill.keep: better cannot decide on {n} samples; the distilled student is kept"
    if better == "student":
        return "distill.keep: better: the distilled student is not worse on validation data"
    return "distill.keep: better: the student alone is better on validation data, and is shipped"
