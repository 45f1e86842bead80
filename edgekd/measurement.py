"""A measurement: a number with its unit, number of samples and evidence."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Evidence = Literal["measured-on-target", "measured-on-host", "estimated"]
EVIDENCE_STRENGTH: dict[str, int] = {
    "estimated": 0,
    "measured-on-host": 1,
    "measured-on-target": 2,
}


@dataclass(frozen=True)
class Measurement:
    """A number with its unit, sample count, confidence interval and evidence.

    ``value`` is None when there are too few samples to state it (for example a p99 of 50
    queries); ``note`` then says so. ``interval`` is the two-sided ``confidence`` interval,
    None for a figure that has no sampling error, such as a file's size.
    """

    value: float | None
    unit: str
    n: int = 1
    interval: tuple[float, float] | None = None
    confidence: float = 0.95
    evidence: Evidence = "measured-on-host"
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """A plain mapping for a JSON file; :meth:`from_json` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Measurement:
        """The inverse of :meth:`to_json`."""
        interval = value.get("interval")
        return cls(**{**value, "interval": tuple(interval) if interval else None})
