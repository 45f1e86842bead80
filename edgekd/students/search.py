"""The search for a student: which candidates are measured, which may be raced, what is recorded.

Nothing is trained or run here; the stages do that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from edgekd.errors import InputError
from edgekd.measurement import Measurement, number, value_text

if TYPE_CHECKING:
    from edgekd.students.candidates import Candidate
    from edgekd.students.constraints import Limits, Violation
    from edgekd.students.cost_model import CostModel
    from edgekd.students.costs import Figures, GraphCosts, Prediction
    from edgekd.students.race import RaceResult
    from edgekd.students.race_storage import RungScore

Status = Literal[
    "proposed", "predicted-infeasible", "infeasible", "not-measured", "failed", "feasible",
    "dropped", "finalist", "winner",
]  # fmt: skip
Say = Callable[[str], None]

SPREAD = 4
"""So many candidates, far apart in their costs, are measured before the promising ones."""


@dataclass
class Entry:
    """A candidate, and what the search has found out about it so far.

    Attributes:
        costs: counted from its graph; None until it was exported.
        predicted: its figures, predicted before it was itself measured.
        figures: measured; None until then.
        reason: why it is out.
        rungs: its scores in the race.
        agreement: with the teacher on validation samples after the first rung.
    """

    candidate: Candidate
    costs: GraphCosts | None = None
    predicted: Prediction | None = None
    figures: Figures | None = None
    status: Status = "proposed"
    reason: str = ""
    rungs: Sequence[RungScore] = ()
    front: bool = False
    agreement: float | None = None

    @property
    def name(self) -> str:
        """The candidate's name."""
        return self.candidate.name

    def reject(self, status: Status, reason: str) -> None:
        """Drop out for a reason."""
        self.status, self.reason = status, reason

    def to_json(self) -> dict[str, Any]:
        """Its entry in ``search.json``."""
        predicted, costs = self.predicted, self.costs
        return {
            "name": self.name,
            "origin": self.candidate.origin,
            "student": self.candidate.student.model_dump(mode="json", exclude_defaults=True),
            "parameters": costs.parameters if costs else self.candidate.parameters,
            "macs": costs.macs if costs else None,
            "predicted": None if predicted is None else {
                "latency_ms": {name: each.to_json() for name, each in predicted.latency_ms.items()},
                "memory_mb": predicted.memory_mb.to_json(),
                "size_mb": predicted.size_mb.value,
            },
            "measured": None if self.figures is None else self.figures.to_json(),
            "status": self.status,
            "reason": self.reason,
            "rungs": [
                {"epochs": each.epochs, "values": dict(each.values), "seconds": each.seconds}
                for each in self.rungs
            ],
            "front": self.front,
            "agreement": self.agreement,
        }  # fmt: skip


class Outcome(Protocol):
    """What measuring a candidate gives."""

    @property
    def figures(self) -> Figures | None:
        """None where it failed."""
        ...

    @property
    def variants(self) -> Mapping[str, Figures]:
        """The figures of all its files, by variant."""
        ...

    @property
    def violations(self) -> Sequence[Violation]:
        """The limits that it breaks."""
        ...

    @property
    def reason(self) -> str:
        """Why it is not feasible; empty where it is."""
        ...


def predict_all(
    entries: Iterable[Entry], model: CostModel, limits: Limits, teacher: Figures | None
) -> list[Entry]:
    """Predict every candidate that was not measured; those that may be feasible.

    A candidate that an earlier, less certain prediction rejected comes back where a better one
    no longer does.
    """
    possible = []
    for entry in entries:
        if entry.costs is None or entry.figures is not None or entry.status == "failed":
            continue
        entry.predicted = model.predict(entry.costs)
        broken = limits.violations(entry.predicted, teacher)
        if broken:
            entry.reject("predicted-infeasible", "; ".join(each.text for each in broken))
        else:
            entry.reject("proposed", "")
            possible.append(entry)
    return possible


def measure_in_turn(
    entries: Sequence[Entry],
    model: CostModel,
    limits: Limits,
    measure: Callable[[Entry], Outcome],
    *,
    most: int,
    several: bool = False,
    teacher: Figures | None = None,
    say: Say,
) -> None:
    """Measure up to ``most`` candidates; each measurement corrects the predictions of the others.

    First a few that are far apart, so that the predictions hold for all; then the largest that are
    predicted to be feasible, since a larger network is usually more accurate. With ``several``
    objectives the smaller ones count too, and those farthest from all measured ones come next.
    Where no candidate holds all limits, those nearest to it are measured, although rejected.
    """
    measured: list[Entry] = []
    while True:
        possible = predict_all(entries, model, limits, teacher)
        if len(measured) == most:
            for entry in possible:
                entry.reject("not-measured", f"{most} others were measured (max_candidates)")
            return
        if not possible and not any(entry.status == "feasible" for entry in entries):
            possible = _nearest(entries, limits, teacher)
        if not possible:
            return
        entry = _next(possible, measured, several)
        outcome = measure(entry)
        entry.figures = outcome.figures
        measured.append(entry)
        if entry.figures is None:
            entry.reject("failed", outcome.reason)
        elif outcome.violations:
            entry.reject("infeasible", outcome.reason)
        else:
            entry.reject("feasible", "")
        for figures in outcome.variants.values():
            assert entry.costs is not None
            model.correct(entry.costs, figures)
        say(f"  {entry.name}: {figures_text(entry.figures)}{entry.reason and f'; {entry.reason}'}")


def _next(possible: Sequence[Entry], measured: Sequence[Entry], several: bool) -> Entry:
    def cost(entry: Entry) -> float:
        assert entry.costs is not None
        return math.log(1 + entry.costs.macs + entry.costs.weights_bytes)

    largest = max(possible, key=cost)
    if not measured or (len(measured) >= SPREAD and not several):
        return largest
    known = [cost(entry) for entry in measured if entry.costs is not None]
    return max(possible, key=lambda entry: min(abs(cost(entry) - each) for each in known))


def _nearest(entries: Sequence[Entry], limits: Limits, teacher: Figures | None) -> list[Entry]:
    """Of the candidates nearest to the limits those that were not measured."""
    found = limits.nearest(_known_figures(entries), teacher)
    names = {each.candidate for each in found}
    return [entry for entry in entries if entry.name in names and entry.figures is None]


def _known_figures(entries: Iterable[Entry]) -> dict[str, Figures | Prediction]:
    """The figures of candidates that run, measured or else predicted."""
    return {
        entry.name: figures
        for entry in entries
        if entry.status != "failed" and (figures := entry.figures or entry.predicted)
    }


def figures_text(figures: Figures | None) -> str:
    """``p95 0.31 ms, 9.1 MB, 0.12 MB file (int8-cpu)``."""
    if figures is None:
        return "failed"
    name = "p95" if "p95" in figures.latency_ms else "p50"
    memory = figures.memory_mb
    parts = [
        f"{name} {number(figures.latency_ms[name].value, 3)} ms",
        *([f"memory {number(memory.value, 3)} MB"] if memory is not None else []),
        f"file {number(figures.size_mb, 3)} MB ({figures.variant})",
    ]
    return ", ".join(parts)


def no_candidate(
    entries: Sequence[Entry], limits: Limits, teacher: Figures | None = None
) -> InputError:
    """The error when no candidate is feasible: what each breaks most, and the nearest budget."""
    failed = [entry for entry in entries if entry.status == "failed"]
    found = _known_figures(entries)
    nearest = limits.nearest(found, teacher)
    counts: dict[str, int] = {}
    for figures in found.values():
        for broken in limits.violations(figures, teacher):
            counts[broken.key] = counts.get(broken.key, 0) + 1
    why = ", ".join(f"{count} break {key}" for key, count in counts.items())
    if failed:
        why += f"{', ' if why else ''}{len(failed)} failed ({failed[0].name}: {failed[0].reason})"
    remedy = "add smaller candidates (student.search.candidates)"
    if nearest:
        remedy = f"the nearest budget: {'; or '.join(each.text for each in nearest)}; or {remedy}"
    return InputError(
        f"none of {len(entries)} candidates holds all limits: {why}",
        where="student.search",
        remedy=remedy,
    )


def objective_values(
    names: Sequence[str], metric: float, figures: Figures, percentile: str
) -> dict[str, float]:
    """The value of each objective of a trained candidate: the metric, and its measured costs."""
    memory = figures.memory_mb
    known = {
        "accuracy": metric,
        "latency": figures.latency_ms[percentile].value,
        "memory": math.nan if memory is None else memory.value,
        "size": figures.size_mb,
    }
    return {name: known[name] for name in names}


def take_race(entries: Sequence[Entry], result: RaceResult) -> None:
    """Record a race's scores in the entries of its arms."""
    last = max((each.epochs for rungs in result.rungs.values() for each in rungs), default=0)
    for entry in entries:
        if entry.name not in result.rungs and entry.name not in result.failed:
            continue
        entry.rungs = tuple(result.rungs.get(entry.name, ()))
        entry.front = entry.name in result.front
        if entry.name in result.failed:
            entry.reject("failed", result.failed[entry.name])
        elif entry.rungs and entry.rungs[-1].epochs == last:
            entry.reject("finalist", "")
        else:
            epochs = entry.rungs[-1].epochs if entry.rungs else 0
            entry.reject("dropped", f"better ones were promoted after {epochs} epoch(s)")


def why_selected(winner: Entry, entries: Sequence[Entry], objective: str, metric: str) -> str:
    """The sentence about the selection, with the runner-up."""
    if not winner.rungs:
        return f"{winner.name} is selected: it alone holds all limits"
    last = winner.rungs[-1]

    def shown(entry: Entry) -> str:
        value = entry.rungs[-1].values[objective]
        unit = {"latency": "ms", "memory": "MB", "size": "MB"}.get(objective, metric)
        return value_text(Measurement(value, unit))

    others = [each for each in entries if each.status == "finalist"]
    what = f"validation {metric}" if objective == "accuracy" else objective
    text = f"{winner.name} is selected: {what} {shown(winner)} after {last.epochs} epoch(s)"
    if others:
        text += f", next {others[0].name} with {shown(others[0])}"
    return f"{text}; {figures_text(winner.figures)}"


def propose_assistant(
    winner: Entry, entries: Sequence[Entry], teacher: GraphCosts, higher_is_better: bool
) -> dict[str, Any] | None:
    """A teacher assistant, where the gap is large and larger candidates follow the teacher better.

    Source: Mirzadeh et al., "Improved knowledge distillation via teacher assistant", AAAI 2020;
    the size is the geometric mean of both.

    Args:
        winner: the student.
        entries: all candidates; only those of a network by name can be an assistant.
        teacher: its costs.
        higher_is_better: of the agreement with the teacher.

    Returns:
        ``{"name", "scheme", "text"}``; None where nothing speaks for one.
    """
    from edgekd.distill.schemes.offline import LARGE_GAP

    if winner.costs is None or winner.agreement is None:
        return None
    ratios = [
        teacher.parameters / max(1, winner.costs.parameters),
        teacher.macs / max(1, winner.costs.macs),
    ]
    sign = 1 if higher_is_better else -1
    larger = [
        entry
        for entry in entries
        if entry.costs is not None
        and winner.costs.parameters < entry.costs.parameters < teacher.parameters
    ]
    followed = [entry for entry in larger if entry.agreement is not None]
    best = max(followed, key=lambda entry: sign * _known(entry.agreement), default=None)
    if min(ratios) < LARGE_GAP or best is None:
        return None
    if sign * (_known(best.agreement) - winner.agreement) <= 0:
        return None
    named = [entry for entry in larger if entry.candidate.origin in ("family", "list")]
    named = [entry for entry in named if entry.status != "failed" and not _made(entry)]
    middle = math.sqrt(teacher.parameters * winner.costs.parameters)
    chosen = min(
        named,
        key=lambda entry: abs(math.log(_parameters(entry) / middle)),
        default=None,
    )
    if chosen is None:
        return None
    student = chosen.candidate.student
    model: Any = {"model": student.model, "args": dict(student.args)}
    scheme = {"assistant": {"models": [model if student.args else student.model]}}
    return {
        "name": chosen.name,
        "scheme": scheme,
        "text": (
            f"The teacher has {ratios[0]:.0f} times the parameters and {ratios[1]:.0f} times the "
            f"operations of {winner.name}, and after the first round {best.name}, which is larger, "
            f"followed it better: agreement {number(_known(best.agreement))} against "
            f"{number(winner.agreement)}. An assistant between them may help: {chosen.name} with "
            f"{_parameters(chosen):,} parameters, distill.scheme: {scheme}"
        ),
    }


def _made(entry: Entry) -> bool:
    """Whether it is more than a network and its arguments, which is all that a scheme can name."""
    student = entry.candidate.student
    return any((student.prune, student.drop_layers, student.resolution, student.checkpoint))


def _parameters(entry: Entry) -> int:
    assert entry.costs is not None
    return entry.costs.parameters


def _known(value: float | None) -> float:
    assert value is not None
    return value


def search_record(
    entries: Sequence[Entry], limits: Limits, model: CostModel | None, about: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of ``search.json``; ``about`` are its keys about the choice."""
    from edgekd.release.student_search import SCHEMA

    return {
        "schema": SCHEMA,
        "limits": limits.to_json(),
        "margin": limits.margin,
        "candidates": [entry.to_json() for entry in entries],
        "winner": None,
        "why": "",
        "assistant": None,
        "cost_model": None if model is None else model.error(),
        **about,
    }
