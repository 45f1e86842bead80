"""Percentiles that are shown only with enough queries, each with its confidence interval.

No distribution is assumed: latencies have long tails and several modes. Both rules count how
many of n independent queries fall below the percentile, which is binomial. Queries that follow
each other are not independent: those of one process share its places in memory and the state of the
machine. So a figure comes from several processes, and its interval also from how these differ.
"""

from __future__ import annotations

import math
from typing import Any, Sequence

import numpy as np

PERCENTILES = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99, "p99_9": 0.999}
ENOUGH_CONFIDENCE = 0.99
INTERVAL_CONFIDENCE = 0.95
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160),
    *(2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056),
    *(2.052, 2.048, 2.045, 2.042),
)
"""The 0.975 quantile of Student's t for 1 to 30 degrees of freedom."""


def queries_needed(probability: float, confidence: float = ENOUGH_CONFIDENCE) -> int:
    """The smallest number of queries with which a percentile may be stated.

    It is the smallest n for which at least two queries are slower than the true percentile with
    the given confidence: P[Binomial(n, 1 - p) <= 1] <= 1 - confidence. This is the bound behind
    the early stopping of MLPerf Inference: 64 queries for p90, 662 for p99.

    Args:
        probability: the percentile as a fraction in (0, 1).
        confidence: in (0, 1).
    """
    tail = 1.0 - probability

    def too_few(n: int) -> bool:
        none = probability**n
        one = n * tail * probability ** (n - 1)
        return none + one > 1.0 - confidence

    enough = 2
    while too_few(enough):
        enough *= 2
    short = enough // 2
    while enough - short > 1:
        middle = (short + enough) // 2
        short, enough = (middle, enough) if too_few(middle) else (short, middle)
    return enough


def interval_ranks(
    n: int, probability: float, confidence: float = INTERVAL_CONFIDENCE
) -> tuple[int, int] | None:
    """The ranks (from 0) of the two order statistics that enclose a percentile.

    At least ``confidence`` of all samples of size n have the true percentile between the two
    (Hahn & Meeker, *Statistical Intervals*, 1991, section 5.2). None when n is too small for
    such a pair.
    """
    side = (1.0 - confidence) / 2.0
    below = _binomial_cumulative(n, probability)
    # lower rank l (from 1): P[X <= l - 1] <= side; upper rank u: P[X <= u - 1] >= 1 - side.
    lower = int(np.searchsorted(below, side, side="right"))
    upper = int(np.searchsorted(below, 1.0 - side, side="left")) + 1
    if lower < 1 or upper > n:
        return None
    return lower - 1, upper - 1


def summarize(*processes: Sequence[float]) -> dict[str, Any]:
    """Mean and percentiles of latencies in ms, given by process.

    Each percentile is ``{"value", "interval", "n", "note"}``, over the queries of all processes;
    with too few its value and interval are None and the note says how many are needed. With
    several processes the interval is where the same measurement, repeated, would find the value:
    Student's prediction interval over the processes' own percentiles (logarithms), never narrower
    than that of the order statistics. With one process it is the latter, which knows nothing of
    the next process.
    """
    parts = [np.sort(np.asarray(samples, dtype=np.float64)) for samples in processes]
    ordered = np.sort(np.concatenate(parts)) if parts else np.empty(0)
    n = int(ordered.size)
    summary: dict[str, Any] = {"n": n, "mean_ms": float(ordered.mean()) if n else None}
    for name, probability in PERCENTILES.items():
        summary[name] = _percentile(ordered, probability)
        if len(parts) > 1 and summary[name]["interval"] is not None:
            own = [float(part[_rank(part.size, probability)]) for part in parts]
            _, low, high = t_interval(own, repeated=True)
            inner = summary[name]["interval"]
            summary[name]["interval"] = [min(low, inner[0]), max(high, inner[1])]
    return summary


def t_interval(values: Sequence[float], repeated: bool = False) -> tuple[float, float, float]:
    """The geometric mean of positive values, and the ends of its 95 % interval of Student's t.

    Args:
        values: one of each process, two at least.
        repeated: the interval of the mean of as many further values, which is √2 times as wide as
            that of the mean of all there could be.
    """
    logs = np.log(np.maximum(np.asarray(values, dtype=np.float64), 1e-9))
    degrees = logs.size - 1
    quantile = _T[degrees - 1] if degrees <= len(_T) else 1.960 + 2.5 / degrees
    half = quantile * float(logs.std(ddof=1)) * math.sqrt((2.0 if repeated else 1.0) / logs.size)
    middle = float(logs.mean())
    low, mean, high = np.exp(np.clip([middle - half, middle, middle + half], -200.0, 200.0))
    return float(mean), float(low), float(high)


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The order-statistic interval of the median; None for fewer than six values."""
    ranks = interval_ranks(len(values), 0.5)
    if ranks is None:
        return None
    ordered = sorted(values)
    return ordered[ranks[0]], ordered[ranks[1]]


def _percentile(ordered: np.ndarray[Any, Any], probability: float) -> dict[str, Any]:
    n = int(ordered.size)
    needed = queries_needed(probability)
    if n < needed:
        note = f"n too small: {n} queries, needs {needed}"
        return {"value": None, "interval": None, "n": n, "note": note}
    rank = _rank(n, probability)
    ranks = interval_ranks(n, probability)
    interval = None if ranks is None else [float(ordered[ranks[0]]), float(ordered[ranks[1]])]
    return {"value": float(ordered[rank]), "interval": interval, "n": n, "note": ""}


def _rank(n: int, probability: float) -> int:
    return max(0, math.ceil(probability * n) - 1)


def _binomial_cumulative(n: int, probability: float) -> np.ndarray[Any, Any]:
    """P[Binomial(n, p) <= k] for k = 0..n, in logarithms because n reaches 10^5."""
    k = np.arange(1, n + 1, dtype=np.float64)
    choose = np.concatenate(([0.0], np.cumsum(np.log(n - k + 1) - np.log(k))))
    successes = np.arange(n + 1, dtype=np.float64)
    log_mass = (
        choose + successes * math.log(probability) + (n - successes) * math.log1p(-probability)
    )
    return np.cumsum(np.exp(log_mass))
