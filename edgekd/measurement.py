"""A measurement: a number with its unit, number of samples, interval and evidence; its text."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from edgekd.errors import InputError, printable

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
"""A finite number; pydantic refuses a boolean and a text in its place."""
Evidence = Literal["measured-on-target", "measured-on-host", "estimated"]
EVIDENCE_STRENGTH: dict[str, int] = {
    "estimated": 0,
    "measured-on-host": 1,
    "measured-on-target": 2,
}

ABSENT = "–"
MINUS = "−"
OF_CONSTANT = "of the constant's error"
"""The unit of a drop of an error: a share of the error of the best constant prediction."""
_SHOWN_UNIT = {
    "accuracy": "%",
    "agreement": "%",
    "of the gap": "% of the gap",
    OF_CONSTANT: f"% {OF_CONSTANT}",
    "parameters": "",
}
_PERCENT = ("accuracy", "agreement", "points", "of the gap", OF_CONSTANT)
"""Units whose values are fractions of one, and are shown times 100."""


@dataclass(frozen=True)
class Measurement:
    """A number with its unit, sample count, confidence interval and evidence.

    ``value`` is None when there are too few samples to state it (for example a p99 of 50
    queries); ``note`` then says so. ``interval`` is the two-sided ``confidence`` interval,
    None for a figure that has no sampling error, such as a file's size.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    value: Number | None
    unit: str
    n: Annotated[int, Field(strict=True, ge=0)] = 1
    interval: tuple[Number, Number] | None = None
    confidence: Annotated[Number, Field(gt=0, lt=1)] = 0.95
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


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of a proportion.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference",
    JASA 22 (1927) 209.

    Args:
        successes: how many of the ``n`` samples are right, 0 to ``n``.
        n: number of samples, at least 1.
        confidence: two-sided coverage, in (0, 1).

    Raises:
        InputError: the counts or the confidence are impossible.
    """
    if n < 1 or not 0 <= successes <= n:
        raise InputError(
            f"{successes} of {n} samples is not a proportion", remedy="give at least one sample"
        )
    z = normal_quantile(confidence)
    p = successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 and n the bound is exactly 0 and 1; rounding would miss them slightly.
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == n else middle + half
    return low, high


def normal_quantile(confidence: float) -> float:
    """The z with P[−z ≤ Z ≤ z] = ``confidence``, Z standard normal.

    Raises:
        InputError: the confidence is not in (0, 1).
    """
    if not 0 < confidence < 1:
        raise InputError(f"a confidence of {confidence} is not between 0 and 1")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def number(value: float, digits: int = 4) -> str:
    """A number with ``digits`` significant digits, without zeros at its end."""
    if value == 0:
        return "0"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}".replace("-", MINUS)
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    if places > digits + 3:
        return f"{value:.{digits - 1}e}"
    text = f"{value:,.{places}f}"
    return (text.rstrip("0").rstrip(".") if places else text).replace("-", MINUS)


def value_text(figure: Measurement | None, signed: bool = False, unit: str | None = None) -> str:
    """``92.13 %``, ``0.0412 ms``; a dash for a figure that is absent or has no value.

    ``unit`` is shown in place of the figure's own.
    """
    if figure is None or figure.value is None:
        return ABSENT
    sign = "+" if signed and figure.value > 0 else ""
    shown = _spaced(display_unit(figure.unit) if unit is None else unit)
    return f"{sign}{_scaled(figure.value, figure.unit)}{shown}"


def drop_unit(metric: str) -> str:
    """The unit of a difference of two values: points for shares of correct predictions."""
    # "1 %" of an accuracy could mean a ratio.
    return "points" if metric in ("accuracy", "agreement") else metric


def metric_change(worse: float, higher_is_better: bool) -> float:
    """How a metric itself moves when it is worse by ``worse``: an accuracy falls, an error rises.

    The one place where a drop, positive when worse, becomes a signed change.
    """
    return -worse if higher_is_better else worse


def interval_text(figure: Measurement | None) -> str:
    """``91.6 to 92.6``, in the unit of :func:`value_text`; empty when there is none."""
    if figure is None or figure.value is None or figure.interval is None:
        return ""
    low, high = (_scaled(end, figure.unit) for end in figure.interval)
    return f"{low} to {high}"


def full_text(figure: Measurement | None) -> str:
    """Value, unit and interval: ``92.13 % (91.6 to 92.6)``."""
    interval = interval_text(figure)
    return value_text(figure) + (f" ({interval})" if interval else "")


def bound_text(value: float, unit: str) -> str:
    """A budget in the unit of the figure it bounds."""
    return f"{number(value * display_scale(unit))}{_spaced(display_unit(unit))}"


def _scaled(value: float, unit: str) -> str:
    if unit in _PERCENT:
        return f"{100 * value:.2f}".replace("-", MINUS)
    return number(value)


def _spaced(shown: str) -> str:
    # A factor is written 9.8×, as a percentage never is.
    return shown if shown == "×" else f" {shown}" if shown else ""


def display_scale(unit: str) -> float:
    """What a value of this unit is multiplied by for display (100 for a share shown in %)."""
    return 100.0 if unit in _PERCENT else 1.0


def display_unit(unit: str) -> str:
    """The unit as shown: ``%`` for an accuracy, empty for a plain count."""
    return _SHOWN_UNIT.get(unit, unit)


def markdown_text(text: object) -> str:
    """A text such as a class name in Markdown, also in a table: on one line, without markup."""
    line = printable(" ".join(str(text).split()))
    escaped = re.sub(r"([\\`*_\[\]|~])", r"\\\1", line)
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def evidence_of(profile: str, target: str, mismatch: str = "") -> Evidence:
    """How strong a measurement is.

    This machine is the target itself only under the profile ``host``; under any other profile
    it is a substitute for the device.

    Args:
        profile: its name.
        target: where the measurement was made, as the user named it.
        mismatch: why the target is not the profile's device, if it is not
            (:meth:`edgekd.config.profile.Profile.mismatch`).
    """
    on_target = profile == "host" or (target != "local" and not mismatch)
    return "measured-on-target" if on_target else "measured-on-host"
