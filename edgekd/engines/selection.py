"""Which of several files of one student is shipped: by the budgets, not by habit.

An INT8 model can be slower than float32 on a processor that it was not made for, and a half
precision one is, where there are no such kernels. Both are measured on the target and reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from edgekd.config.budgets import Budgets
from edgekd.errors import StageError

FLOAT = "float32"
"""The name of the candidate that the others are compared with."""
Select = Literal["measured", "smallest", "int8", "half", "float32"]
_MB = 1e6


@dataclass(frozen=True)
class Candidate:
    """One engine of the student, as it was measured.

    ``drop`` is what the metric on the validation split lost against float32 (positive is worse; of
    an error a share of the best constant prediction's), with its 95 % interval. ``latency_ms`` are
    percentiles by name (``p50``).
    ``speedup`` is float32's p50 over this one's, timed interleaved, with its 95 % interval; None
    for float32 itself. ``notes`` are remarks for the reader, such as layers in float32.
    """

    name: str
    size_bytes: int
    drop: float
    drop_interval: tuple[float, float] | None
    latency_ms: Mapping[str, float | None]
    speedup: float | None = None
    speedup_interval: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    @property
    def shown_faster(self) -> bool | None:
        """Whether the complete interval of the speed-up is above 1; None without one."""
        return None if self.speedup_interval is None else self.speedup_interval[0] > 1


@dataclass(frozen=True)
class Row:
    """A candidate with the reasons against it; an empty ``against`` makes it eligible."""

    candidate: Candidate
    misses: tuple[str, ...]
    """The budgets of the gate that it does not meet."""
    against: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """A plain mapping for a JSON file."""
        entry = self.candidate
        return {
            "name": entry.name,
            "size_bytes": entry.size_bytes,
            "drop": entry.drop,
            "drop_interval": entry.drop_interval and list(entry.drop_interval),
            "latency_ms": dict(entry.latency_ms),
            "speedup": entry.speedup,
            "speedup_interval": entry.speedup_interval and list(entry.speedup_interval),
            "notes": list(entry.notes),
            "misses": list(self.misses),
            "against": list(self.against),
        }


@dataclass(frozen=True)
class Choice:
    """The chosen candidate, the reason in a sentence, and all candidates in the given order."""

    chosen: str
    reason: str
    rows: tuple[Row, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    """The reason why a requested variant is no candidate, by name."""

    def to_json(self) -> dict[str, Any]:
        """A plain mapping for a JSON file."""
        return {
            "chosen": self.chosen,
            "reason": self.reason,
            "candidates": [row.to_json() for row in self.rows],
            "refused": dict(self.refused),
        }


def choose(
    candidates: Sequence[Candidate],
    budgets: Budgets,
    max_drop: float,
    teacher_bytes: int | None = None,
    teacher_speedup: float | None = None,
    refused: Mapping[str, str] | None = None,
    select: Select = "measured",
) -> Choice:
    """Choose the file that is shipped.

    A candidate that drops by more than ``max_drop`` is excluded. Of the others those that miss the
    fewest budgets of size and latency remain. Among these float32 loses only to one that is
    both shown to be faster (the complete interval of its speed-up is above 1) and smaller; the
    fastest such is selected. So a smaller but slower file is selected only where float32 misses a
    budget that it meets.

    Args:
        candidates: one of them is named :data:`FLOAT`.
        budgets: of the job; those of size and latency count here: accuracy is checked on the
            test split, and memory is not measured for a choice.
        max_drop: the largest drop of the metric allowed, in the unit of :class:`Candidate`.
        teacher_bytes: the size of the teacher's file; None when there is none to compare with.
        teacher_speedup: the teacher's p50 over float32's.
        refused: requested variants that could not be candidates, with the reason.
        select: ``measured`` is the above; any other forces a kind, or the smallest file,
            among those within the drop, whatever they cost here. The reason then includes
            what speaks against the selected one.

    Raises:
        StageError: no candidate of the required kind is within the drop.
    """
    left_out = dict(refused or {})
    plain = next(candidate for candidate in candidates if candidate.name == FLOAT)
    rows = tuple(
        Row(
            candidate,
            tuple(_misses(candidate, budgets, teacher_bytes, teacher_speedup)),
            tuple(_against(candidate, plain, max_drop)),
        )
        for candidate in candidates
    )
    allowed = [row for row in rows if row.candidate.drop <= max_drop or row.candidate is plain]
    if select != "measured":
        return _insisted(select, allowed, rows, left_out, max_drop)
    fewest = min(len(row.misses) for row in allowed)
    best = [row for row in allowed if len(row.misses) == fewest]
    float_row = next((row for row in best if row.candidate is plain), None)
    better = [row for row in best if row.candidate is not plain and not row.against]
    if better:
        row = max(better, key=_speed)
        reason = f"{_faster(row.candidate)} than float32, smaller, and within {max_drop:g}"
        return Choice(row.candidate.name, reason, rows, left_out)
    if float_row is not None:
        return Choice(FLOAT, _why_float(rows, left_out, max_drop), rows, left_out)
    row = max(best, key=_speed)
    met = [miss for miss in _row_of(rows, FLOAT).misses if miss not in row.misses]
    return Choice(
        row.candidate.name, f"float32 misses {' and '.join(met)}, which it meets", rows, left_out
    )


def _insisted(
    select: Select,
    allowed: Sequence[Row],
    rows: tuple[Row, ...],
    refused: Mapping[str, str],
    max_drop: float,
) -> Choice:
    fits = [row for row in allowed if select in (_kind(row.candidate.name), "smallest")]
    if not fits:
        reasons = [f"{row.candidate.name} {'; '.join(row.against)}" for row in rows
                   if _kind(row.candidate.name) == select]  # fmt: skip
        reasons += [f"{name}: {reason}" for name, reason in refused.items()]
        raise StageError(
            f"no {select} file is within a drop of {max_drop:g}: {'. '.join(reasons)}",
            where="quantize.select",
            remedy="raise quantize.max_drop, try int8: qat, or set quantize.select: measured",
        )
    if select == "smallest":
        row = min(fits, key=lambda row: (row.candidate.size_bytes, -_speed(row)))
    else:
        fewest = min(len(row.misses) for row in fits)
        row = max((row for row in fits if len(row.misses) == fewest), key=_speed)
    against = [*row.against, *(f"misses {miss}" for miss in row.misses)]
    although = f", although, as measured here, {'; '.join(against)}" if against else ""
    return Choice(row.candidate.name, f"quantize.select: {select} insists{although}", rows, refused)


def _kind(name: str) -> str:
    """``int8``, ``half`` or ``float32`` for a candidate's name."""
    if name in ("fp16", "bf16"):
        return "half"
    return FLOAT if name == FLOAT else "int8"


def _against(candidate: Candidate, plain: Candidate, max_drop: float) -> list[str]:
    if candidate.name == plain.name:
        return []
    found = []
    if candidate.drop > max_drop:
        found.append(f"drops by {candidate.drop:.4f}, more than {max_drop:g}")
    if candidate.size_bytes >= plain.size_bytes:
        found.append(f"not smaller: {candidate.size_bytes:,} of {plain.size_bytes:,} bytes")
    if candidate.speedup is None or candidate.speedup_interval is None:
        found.append("not timed")
    elif not candidate.shown_faster:
        low, high = candidate.speedup_interval
        if high < 1:
            found.append(f"slower than float32: {candidate.speedup:.2f}×")
        else:
            interval = f"{low:.2f} to {high:.2f}"
            found.append(f"not shown to be faster: {candidate.speedup:.2f}× ({interval})")
    return found


def _misses(
    candidate: Candidate,
    budgets: Budgets,
    teacher_bytes: int | None,
    teacher_speedup: float | None,
) -> list[str]:
    ratio = teacher_bytes / candidate.size_bytes if teacher_bytes else None
    over_float = 1.0 if candidate.name == FLOAT else candidate.speedup
    speedup = teacher_speedup * over_float if teacher_speedup and over_float else None
    figures = {
        "size.max_mb": candidate.size_bytes / _MB,
        **{f"latency.{name}_ms": ms for name, ms in candidate.latency_ms.items()},
    }
    ratios = {"size.min_ratio": ratio, "latency.min_speedup": speedup}
    found = []
    for key, budget in budgets.given.items():
        largest, smallest = figures.get(key), ratios.get(key)
        if (largest or 0) > budget or (smallest is not None and smallest < budget):
            found.append(f"{key} = {budget:g}")
    return found


def _speed(row: Row) -> float:
    return row.candidate.speedup or 0.0


def _faster(candidate: Candidate) -> str:
    assert candidate.speedup is not None
    assert candidate.speedup_interval is not None
    low, high = candidate.speedup_interval
    return f"{candidate.speedup:.2f}× faster ({low:.2f} to {high:.2f})"


def _row_of(rows: Sequence[Row], name: str) -> Row:
    return next(row for row in rows if row.candidate.name == name)


def _why_float(rows: Sequence[Row], refused: Mapping[str, str], max_drop: float) -> str:
    others = [row for row in rows if row.candidate.name != FLOAT]
    if not others and not refused:
        return "no other variant was requested"
    found = [
        f"{row.candidate.name} "
        + ("; ".join(row.against) or f"misses {', '.join(row.misses)}, which float32 meets")
        for row in others
    ] + [f"{name}: {reason}" for name, reason in refused.items()]
    return f"no other is faster, smaller and within {max_drop:g}: {'. '.join(found)}"
