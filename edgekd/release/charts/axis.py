"""An axis: its range, and ticks at numbers that people like to read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_NICE = (1.0, 2.0, 2.5, 5.0, 10.0)
_LOG_RATIO = 6.0
"""From this ratio of largest to smallest on, a linear axis would crowd the small ones."""


@dataclass(frozen=True)
class Axis:
    """A range of data values, linear or logarithmic, with labelled ticks inside it."""

    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    def position(self, value: float) -> float:
        """Where a value lies: 0 at ``low``, 1 at ``high``; values outside are clipped."""
        low, high = self.low, self.high
        if self.log:
            low, high = math.log(low), math.log(high)
            value = math.log(max(value, self.low))
        return min(max((value - low) / (high - low), 0.0), 1.0)


def linear_axis(values: Iterable[float], pad: float = 0.06, count: int = 5) -> Axis:
    """A linear axis around the values.

    Args:
        values: finite data values, at least one.
        pad: share of the range that is added on both sides.
        count: about how many ticks.
    """
    known = list(values)
    low, high = min(known), max(known)
    if low == high:
        low, high = (low - abs(low) * 0.1, low + abs(low) * 0.1) if low else (-1.0, 1.0)
    margin = (high - low) * pad
    # Padding must not suggest that negative times or sizes exist.
    padded = low - margin if low < 0 or low - margin > 0 else 0.0
    low, high = padded, high + margin
    step = _nice_step((high - low) / count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    if places and round(step * 10**places, 6) % 1:
        places += 1
    # Adding zero turns a negative zero into a plain one.
    marks = [round(index * step, 12) + 0.0 for index in range(first, last + 1)]
    return Axis(low, high, False, tuple((mark, f"{mark:,.{places}f}") for mark in marks))


def log_axis(values: Iterable[float], pad: float = 1.15) -> Axis:
    """A logarithmic axis around positive values, with ticks at 1, 2 and 5 of each decade.

    Args:
        values: finite positive data values, at least one.
        pad: the factor that is added on both sides.
    """
    known = list(values)
    low, high = min(known) / pad, max(known) * pad
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
    marks = [step * 10.0**decade for decade in decades for step in steps]
    inside = [mark for mark in marks if low <= mark <= high]
    return Axis(low, high, True, tuple((mark, _plain(mark)) for mark in inside))


def axis_for(values: Iterable[float]) -> Axis:
    """Logarithmic where the values are positive and far apart, else linear."""
    known = list(values)
    spread = min(known) > 0 and max(known) / min(known) >= _LOG_RATIO
    return log_axis(known, 1.3) if spread else linear_axis(known, 0.12)


def _nice_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(nice for nice in _NICE if nice * power >= rough * (1 - 1e-9)) * power


def _plain(value: float) -> str:
    """A tick of a logarithmic axis without an exponent."""
    places = max(0, -math.floor(math.log10(value) + 1e-9))
    return f"{value:,.{places}f}"
