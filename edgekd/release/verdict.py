"""What the gate says of one rule, and of all of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from edgekd.figure import Figure
from edgekd.release.figure_text import bound_text

Status = Literal["pass", "fail", "not shown"]
Side = Literal["at most", "at least", "more than"]


@dataclass(frozen=True)
class Verdict:
    """What the gate says of one rule."""

    rule: str
    """The budget's key, such as ``latency.p95_ms``."""
    status: Status
    figure: Figure
    budget: float
    reason: str
    side: Side = "at most"
    """On which side of the budget the figure has to be."""
    origin: str = "gate"
    """Who set the budget: ``gate`` (the pipeline or budget file) or ``profile NAME``."""

    @property
    def budget_text(self) -> str:
        """The budget with its side and unit: ``at most 2 ms``."""
        return f"{self.side} {bound_text(self.budget, self.figure.unit)}"

    def to_json(self) -> dict[str, Any]:
        """A plain mapping for a JSON file."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Verdict:
        """The inverse of :meth:`to_json`."""
        return cls(**{**value, "figure": Figure.from_json(value["figure"])})


def passed(verdicts: Sequence[Verdict]) -> bool:
    """Whether there are verdicts and each of them is a pass."""
    return bool(verdicts) and all(verdict.status == "pass" for verdict in verdicts)


def summary_line(verdicts: Sequence[Verdict]) -> str:
    """``PASSED: 5 of 5 rules`` or ``FAILED: 2 of 5 rules fail, 1 is not shown``."""
    failed = sum(verdict.status == "fail" for verdict in verdicts)
    open_ = sum(verdict.status == "not shown" for verdict in verdicts)
    if passed(verdicts):
        return f"PASSED: all {len(verdicts)} rules" if len(verdicts) > 1 else "PASSED: its one rule"
    parts = [f"{failed} fail" + ("s" if failed == 1 else "")] if failed else []
    parts += [f"{open_} {'is' if open_ == 1 else 'are'} not shown"] if open_ else []
    return f"FAILED: of {len(verdicts)} rules, {' and '.join(parts)}"
