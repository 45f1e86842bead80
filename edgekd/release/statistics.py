"""Confidence intervals of the figures that a release rests on.

Scores are per sample, (N,) float64, and their mean is the metric. Scores of 0 and 1 (a correct
prediction or not) get score intervals, which keep their coverage with few samples and with none or
few errors; all others get Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgekd.errors import InputError
from edgekd.measurement import Evidence, Measurement, normal_quantile, wilson_interval

Scores = NDArray[np.float64]
Interval = tuple[float, float]

_BISECTIONS = 60
"""Halvings of an interval of length 2: its end is then exact to 2 / 2⁶⁰, below a double's step."""


@dataclass(frozen=True)
class Estimate:
    """A value with its two-sided interval and the number of samples it rests on."""

    value: float | None
    interval: Interval | None
    n: int
    confidence: float = 0.95
    note: str = ""

    def figure(self, unit: str, evidence: Evidence) -> Measurement:
        """The same as a figure of a result file."""
        return Measurement(
            self.value, unit, self.n, self.interval, self.confidence, evidence, self.note
        )


def wilson(successes: int, n: int, confidence: float = 0.95) -> Estimate:
    """A proportion with its score interval, :func:`~edgekd.measurement.wilson_interval`."""
    interval = wilson_interval(successes, n, confidence)
    return Estimate(successes / n, interval, n, confidence)


def mean(values: ArrayLike, confidence: float = 0.95) -> Estimate:
    """A mean with its Student t interval: of per-sample scores, or of one figure over seeds.

    One value has no interval.

    Raises:
        InputError: there are no values, or one is not finite.
    """
    scores = _scores(values, "values")
    n, value = len(scores), float(scores.mean())
    if n == 1:
        return Estimate(value, None, 1, confidence, "one value has no interval")
    half = t_quantile(confidence, n - 1) * float(scores.std(ddof=1)) / math.sqrt(n)
    return Estimate(value, (value - half, value + half), n, confidence)


def mean_score(scores: ArrayLike, confidence: float = 0.95) -> Estimate:
    """The metric of one model from its per-sample scores: :func:`wilson` or :func:`mean`."""
    checked = _scores(scores, "scores")
    if _is_binary(checked):
        return wilson(int(checked.sum()), len(checked), confidence)
    return mean(checked, confidence)


def paired_difference(first: ArrayLike, second: ArrayLike, confidence: float = 0.95) -> Estimate:
    """mean(first) − mean(second) of two models' scores on the same samples.

    Scores of 0 and 1 get Tango's interval (:func:`tango`), all others the t interval of the
    differences.

    Args:
        first: (N,) scores of one model.
        second: (N,) scores of the other, in the same order of samples.
        confidence: two-sided coverage, in (0, 1).

    Raises:
        InputError: the lengths differ, there are no samples, or a score is not finite.
    """
    one, other = _paired(first, second)
    if _is_binary(one) and _is_binary(other):
        only_first = int(np.sum((one == 1) & (other == 0)))
        only_second = int(np.sum((one == 0) & (other == 1)))
        return tango(only_first, only_second, len(one), confidence)
    return mean(one - other, confidence)


def tango(only_first: int, only_second: int, n: int, confidence: float = 0.95) -> Estimate:
    """A difference of two proportions on the same samples, with its score interval.

    It is valid also where the usual (Wald) interval has no width at all: when the two models
    disagree on few samples or on none.

    Source: Tango, "Equivalence test and confidence interval for the difference in proportions
    for the paired-sample design", Statistics in Medicine 17 (1998) 891.

    Args:
        only_first: samples that only the first model has right.
        only_second: samples that only the second model has right.
        n: all samples.
        confidence: two-sided coverage, in (0, 1).

    Raises:
        InputError: the counts are impossible.
    """
    if n < 1 or min(only_first, only_second) < 0 or only_first + only_second > n:
        raise InputError(
            f"{only_first} and {only_second} discordant samples of {n} is impossible",
            remedy="give counts of the same samples",
        )
    z = normal_quantile(confidence)

    def score(difference: float) -> float:
        """Tango's statistic, standard normal when ``difference`` is the true one."""
        a = 2.0 * n
        b = -only_first - only_second + (2 * n - only_first + only_second) * difference
        c = -only_second * difference * (1 - difference)
        # The most likely share of "only second" if the true difference is this one.
        q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = n * (2 * q + difference * (1 - difference))
        distance = only_first - only_second - n * difference
        if variance <= 0:
            return 0.0 if distance == 0 else math.copysign(math.inf, distance)
        return distance / math.sqrt(variance)

    value = (only_first - only_second) / n
    low = _crossing(score, -1.0, value, z)
    high = _crossing(score, value, 1.0, -z)
    return Estimate(value, (low, high), n, confidence)


def gap_closed(
    teacher: ArrayLike,
    alone: ArrayLike,
    distilled: ArrayLike,
    seed: int = 0,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Estimate:
    """The share of the gap between teacher and student alone that distillation closes.

    (distilled − alone) / (teacher − alone) with the percentile interval of a bootstrap over
    samples (Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13). Scores are
    turned so that higher is better.

    Args:
        teacher: (N,) scores of the teacher.
        alone: (N,) scores of the student trained without it.
        distilled: (N,) scores of the distilled student, all in the same order of samples.
        seed: of the resampling; the same seed gives the same interval.
        resamples: number of bootstrap resamples.
        confidence: two-sided coverage, in (0, 1).

    Returns:
        ``value`` None with a note when the teacher is not shown to be better than the student
        alone (the interval of their difference is not above 0): there is then no gap to close,
        and a student that is pulled down to a worse teacher would have "closed" it.

    Raises:
        InputError: the lengths differ, there are no samples, or a score is not finite.
    """
    with_teacher, with_distilled = _paired(teacher, distilled)
    _, without = _paired(teacher, alone)
    n = len(without)
    difference = paired_difference(with_teacher, without, confidence)
    if difference.interval is None or difference.interval[0] <= 0:
        shown = difference.interval is not None and difference.interval[1] < 0
        state = "is worse than" if shown else "is not shown to be better than"
        note = f"the teacher {state} the student alone, so there is no gap to close"
        return Estimate(None, None, n, confidence, note)
    gap, gained = with_teacher - without, with_distilled - without
    # Resampling counts of the few distinct (gap, gained) pairs is the same as resampling
    # samples, and thousands of times cheaper for scores of 0 and 1.
    pairs, counts = np.unique(np.stack([gap, gained]), axis=1, return_counts=True)
    rng = np.random.default_rng(seed)
    shares = np.empty(resamples)
    step = max(1, 4_000_000 // pairs.shape[1])
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        drawn = rng.multinomial(n, counts / n, size=stop - start)
        below, above = drawn @ pairs[0], drawn @ pairs[1]
        with np.errstate(divide="ignore", invalid="ignore"):
            shares[start:stop] = np.where(below == 0, np.inf, above / below)
    tail = (1 - confidence) / 2
    low, high = np.quantile(shares, [tail, 1 - tail])
    value = float(gained.mean() / gap.mean())
    if not (math.isfinite(low) and math.isfinite(high)):
        return Estimate(value, None, n, confidence, "too few samples for an interval")
    return Estimate(value, (float(low), float(high)), n, confidence)


_MOST_WIDTHS = 1000
"""A budget nearer to the value than a thousandth of the interval: a million times the samples."""


def samples_to_show(n: int, value: float, interval: Interval, budget: float) -> int | None:
    """Approximate number of samples that would decide whether a figure meets a budget.

    The half width shrinks with the square root of the number of samples. None when the value
    is at the budget or so near to it that no number of samples would do, or when ``n`` is not
    known.
    """
    margin = abs(value - budget)
    # The side of the interval that reaches over the budget is the one that has to shrink.
    half = value - interval[0] if value > budget else interval[1] - value
    if n < 1 or not math.isfinite(half) or half > _MOST_WIDTHS * margin:
        return None
    return max(n + 1, math.ceil(n * (half / margin) ** 2))


def _crossing(score: Callable[[float], float], low: float, high: float, level: float) -> float:
    """Where the falling ``score`` reaches ``level`` between ``low`` and ``high``."""
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if score(middle) > level:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def t_quantile(confidence: float, degrees: int) -> float:
    """The t with P[−t ≤ T ≤ t] = ``confidence``, T Student's with so many degrees of freedom.

    Raises:
        InputError: the confidence is not in (0, 1).
    """
    normal_quantile(confidence)
    # Imported here: it takes longer than the rest of the command line's imports.
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + confidence) / 2))


def _scores(values: ArrayLike, name: str) -> Scores:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or len(scores) == 0:
        raise InputError(
            f"{name} of shape {scores.shape} are not one number per sample",
            remedy="give a (N,) array with N at least 1",
        )
    if not np.isfinite(scores).all():
        worst = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise InputError(f"the score of sample {worst} is {scores[worst]}", where=name)
    return scores


def _paired(first: ArrayLike, second: ArrayLike) -> tuple[Scores, Scores]:
    one, other = _scores(first, "first scores"), _scores(second, "second scores")
    if len(one) != len(other):
        raise InputError(
            f"{len(one)} scores cannot be paired with {len(other)}",
            remedy="score both models on the same samples",
        )
    return one, other


def _is_binary(scores: Scores) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())
