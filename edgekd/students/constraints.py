"""The limits that a student must hold, all together, and what breaks them by how much."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from edgekd.config.budgets import Budgets
from edgekd.errors import InputError
from edgekd.measurement import number
from edgekd.students.costs import Figures, Footprint, Prediction, Range

OPERATORS = "operators"
"""The key of a violation by operators that the runtime does not have."""
_SMALLEST = ("size.min_ratio", "latency.min_speedup")
"""Keys whose limit is a lower one."""
_EXACT = ("size.", "parameters.")
"""Figures without noise: they need no margin."""
_UNITS = {"_mb": " MB", "_ms": " ms", "ratio": "×", "speedup": "×", ".max": " parameters"}


@dataclass(frozen=True)
class Violation:
    """A limit that is broken: its key, the limit, what was found, and both as a sentence.

    ``limit`` and ``found`` are None for operators and for figures that could not be measured.
    """

    key: str
    limit: float | None
    found: Range | None
    text: str


def operator_violations(names: Iterable[str]) -> tuple[Violation, ...]:
    """One for each operator that the runtime does not have."""
    return tuple(
        Violation(OPERATORS, None, None, f"the runtime has no operator {name}") for name in names
    )


@dataclass(frozen=True)
class NearestBudget:
    """Limits with which a candidate would be feasible while all others hold."""

    candidate: str
    limits: Mapping[str, float]

    @property
    def text(self) -> str:
        """``memory.peak_mb = 41.3 MB (pruned-0.5)``."""
        changes = " and ".join(f"{key} = {_text(key, value)}" for key, value in self.limits.items())
        return f"{changes} ({self.candidate})"


@dataclass(frozen=True)
class Limits:
    """The limits of a job that a student's network decides: all but those of accuracy.

    Attributes:
        values: by key, such as ``latency.p95_ms``.
        origins: by key, who set it: ``gate`` or ``profile NAME``.
        margin: the share of a limit that measured latency, memory and speed-up must leave, so
            that the limit also holds when they are measured again. Size and parameters have no
            noise and need none.
    """

    values: Mapping[str, float]
    origins: Mapping[str, str]
    margin: float = 0.1

    @classmethod
    def of(cls, budgets: Budgets, margin: float = 0.1) -> Limits:
        """Those of a job."""
        keys = [key for key in budgets.given if not key.startswith("accuracy.")]
        values = {key: budgets.given[key] for key in keys}
        return cls(values, {key: budgets.origin(key) for key in keys}, margin)

    def to_json(self) -> dict[str, dict[str, float | str]]:
        """By key: ``{"limit": …, "origin": …}``."""
        return {
            key: {"limit": limit, "origin": self.origins[key]} for key, limit in self.values.items()
        }

    def check(self, footprint: Footprint) -> None:
        """Refuse limits that no network can hold.

        Raises:
            InputError: memory or latency is below what the runtime itself needs.
        """
        source = "measured here" if footprint.measured else "as measured on x86-64"
        for key, floor in (
            ("memory.peak_mb", footprint.memory_mb),
            *((key, footprint.latency_ms) for key in self.values if key.endswith("_ms")),
        ):
            limit = self.values.get(key)
            if limit is not None and floor is not None and limit <= floor:
                raise InputError(
                    f"{_text(key, limit)} is not above what the runtime itself needs: "
                    f"{_text(key, floor)} with a model that does nothing ({source})",
                    where=f"{key} of {self.origins[key]}",
                    remedy=f"set gate.{key} above {_text(key, floor)}; a network's own share comes "
                    "on top",
                )

    def violations(
        self,
        found: Figures | Prediction,
        teacher: Figures | Prediction | None = None,
    ) -> tuple[Violation, ...]:
        """The limits that a candidate breaks.

        A predicted figure breaks a limit only where its complete band is beyond it. A measured
        one breaks it unless its complete interval holds it with the margin.

        Args:
            found: the candidate's figures.
            teacher: the teacher's, for ratios to it; None leaves them out.
        """
        broken = []
        measured = isinstance(found, Figures)
        for key, limit in self.values.items():
            if key in ("size.min_ratio", "parameters.max_ratio", "latency.min_speedup") and (
                teacher is None and not (key == "latency.min_speedup" and _speedup(found))
            ):
                continue
            figure = _figure(key, found, teacher)
            if figure is None:
                text = f"{key} could not be measured, and its limit is {_text(key, limit)}"
                broken.append(Violation(key, limit, None, text))
                continue
            if self._holds(key, limit, figure, measured):
                continue
            bound = self._bound(key, limit) if measured else limit
            beyond = "below" if key in _SMALLEST else "above"
            exact = figure.low == figure.high
            band = "" if exact else f" ({number(figure.low)} to {number(figure.high)})"
            spare = f" with {100 * self.margin:g} % to spare" if bound != limit else ""
            kind = "measured" if measured else "predicted"
            sign = 1 if key in _SMALLEST else -1
            ends = sorted((sign * figure.low, sign * figure.high))
            if ends[0] >= sign * limit:
                relation = "is too near to"
            elif sign * figure.value >= sign * limit:
                relation = f"may be {beyond}"
            else:
                relation = f"is {beyond}"
            text = (
                f"{key}: {_text(key, figure.value)}{band}, {kind}, {relation} "
                f"the limit of {_text(key, limit)}{spare} ({self.origins[key]})"
            )
            broken.append(Violation(key, limit, figure, text))
        return tuple(broken)

    def nearest(
        self,
        candidates: Mapping[str, Figures | Prediction],
        teacher: Figures | Prediction | None = None,
    ) -> tuple[NearestBudget, ...]:
        """For each broken key the limit nearest to the given one with which some candidate would
        be feasible while all others hold; where no single one is enough, the several of the
        candidate that needs the smallest change.

        Args:
            candidates: by name, without those whose operators are unsupported.
            teacher: as for :meth:`violations`.
        """
        single: dict[str, tuple[float, NearestBudget]] = {}
        several: list[tuple[float, NearestBudget]] = []
        for name, found in candidates.items():
            needed = {}
            for broken in self.violations(found, teacher):
                if broken.found is None:
                    break
                needed[broken.key] = self._needed(broken.key, broken.found, found)
            else:
                changes = [abs(needed[key] / self.values[key] - 1) for key in needed]
                budget = NearestBudget(name, needed)
                if len(needed) > 1:
                    several.append((max(changes), budget))
                elif needed and changes < [single.get(next(iter(needed)), (math.inf,))[0]]:
                    single[next(iter(needed))] = (changes[0], budget)
        if single:
            return tuple(budget for _, budget in single.values())
        return (min(several, key=lambda pair: pair[0])[1],) if several else ()

    def undecided(self, found: Figures, teacher: Figures | None = None) -> bool:
        """Whether measuring more can make a candidate feasible: it breaks limits only by the width
        of its intervals."""
        broken = self.violations(found, teacher)
        return bool(broken) and all(
            each.found is not None
            and each.limit is not None
            and not each.key.startswith(_EXACT)
            and self._holds(each.key, each.limit, _exactly(each.found.value), True)
            for each in broken
        )

    def _bound(self, key: str, limit: float) -> float:
        """The limit with the margin."""
        if key.startswith(_EXACT):
            return limit
        return limit * (1 + self.margin if key in _SMALLEST else 1 - self.margin)

    def _holds(self, key: str, limit: float, figure: Range, measured: bool) -> bool:
        bound = self._bound(key, limit)
        if key in _SMALLEST:
            return figure.low >= bound if measured else figure.high >= limit
        return figure.high <= bound if measured else figure.low <= limit

    def _needed(self, key: str, figure: Range, found: Figures | Prediction) -> float:
        """The limit, rounded to three digits, that a figure holds."""
        exact = key.startswith(_EXACT) or not isinstance(found, Figures)
        if key in _SMALLEST:
            return _rounded(figure.low / (1 if exact else 1 + self.margin), math.floor)
        return _rounded(figure.high / (1 if exact else 1 - self.margin), math.ceil)


def _figure(
    key: str, found: Figures | Prediction, teacher: Figures | Prediction | None
) -> Range | None:
    """What a limit bounds; None where it is not known."""
    if key == "memory.peak_mb":
        return found.memory_mb
    if key == "size.max_mb":
        return _size(found)
    if key == "parameters.max":
        return _exactly(found.parameters)
    if key == "latency.min_speedup":
        measured = _speedup(found)
        if measured is not None or teacher is None:
            return measured
        return _ratio(teacher.latency_ms["p50"], found.latency_ms["p50"])
    if key.startswith("latency."):
        return found.latency_ms.get(key.removeprefix("latency.").removesuffix("_ms"))
    if teacher is None:
        return None
    if key == "size.min_ratio":
        return _ratio(_size(teacher), _size(found))
    assert key == "parameters.max_ratio"
    return _exactly(found.parameters / teacher.parameters)


def _speedup(found: Figures | Prediction) -> Range | None:
    return found.speedup if isinstance(found, Figures) else None


def _size(found: Figures | Prediction) -> Range:
    return found.size_mb if isinstance(found, Prediction) else _exactly(found.size_mb)


def _exactly(value: float) -> Range:
    return Range(value, value, value)


def _ratio(over: Range, under: Range) -> Range:
    return Range(over.value / under.value, over.low / under.high, over.high / under.low)


def _rounded(value: float, direction: Callable[[float], int]) -> float:
    digits = 2 - math.floor(math.log10(value))
    return direction(value * 10.0**digits) / 10.0**digits


def _text(key: str, value: float) -> str:
    unit = next((unit for end, unit in _UNITS.items() if key.endswith(end)), "")
    return f"{number(value)}{unit}"
