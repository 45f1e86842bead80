"""Intervals: published values, invariances, and coverage on simulated data."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekd.errors import InputError
from edgekd.release.statistics import (
    gap_closed,
    mean,
    mean_score,
    paired_difference,
    samples_to_show,
    tango,
    wilson,
)

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def test_tango_gives_the_published_interval_of_airway_hyperresponsiveness():
    # Fagerland, Lydersen & Laake, Statistics in Medicine 33 (2014) 2850: (1, 1, 7, 12).
    low, high = tango(1, 7, 21).interval
    assert (round(low, 3), round(high, 3)) == (-0.517, -0.026)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 300))
@settings(max_examples=40, deadline=None)
def test_tango_ends_solve_the_score_equation_with_the_numerical_maximum(b, c, agreeing):
    n = b + c + agreeing
    if n == 0:
        return
    estimate = tango(b, c, n)
    for end in estimate.interval:
        # The nuisance share q maximises the multinomial likelihood given the difference.
        grid = np.linspace(max(0.0, -end), (1 - end) / 2, 200_001)[1:-1]
        if len(grid) == 0 or abs(end) > 0.999 or (b == c == 0):
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            rest = np.maximum(1 - 2 * grid - end, 1e-300)
            likelihood = (
                b * np.log(np.maximum(grid + end, 1e-300))
                + c * np.log(grid)
                + agreeing * np.log(rest)
            )
        q = grid[np.argmax(likelihood)]
        variance = n * (2 * q + end * (1 - end))
        score = (b - c - n * end) / math.sqrt(variance)
        # The grid limits how exactly q is known.
        assert abs(abs(score) - 1.959964) < 2e-2


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 500))
def test_tango_mirrors_when_the_models_change_places(b, c, agreeing):
    n = b + c + agreeing
    if n == 0:
        return
    one, other = tango(b, c, n), tango(c, b, n)
    assert one.value == -other.value
    assert one.interval == pytest.approx((-other.interval[1], -other.interval[0]), abs=1e-12)


@given(counts)
def test_wilson_holds_its_value_stays_a_proportion_and_mirrors(count):
    k, n = count
    estimate, mirror = wilson(k, n), wilson(n - k, n)
    low, high = estimate.interval
    assert 0 <= low <= estimate.value <= high <= 1
    assert low < high
    assert mirror.interval == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_identical_models_still_have_an_interval_of_some_width():
    scores = np.ones(50)
    low, high = paired_difference(scores, scores).interval
    assert low < 0 < high


def test_t_interval_of_a_textbook_sample():
    # t(0.975, 4) = 2.776445, s = sqrt(2.5).
    estimate = mean([1, 2, 3, 4, 5])
    half = 2.776445105 * math.sqrt(2.5 / 5)
    assert estimate.interval == pytest.approx((3 - half, 3 + half), rel=1e-8)


def test_one_value_has_no_interval_and_says_so():
    assert mean([0.4]).interval is None
    assert mean([0.4]).note


def coverage(hits):
    return float(np.mean(hits))


def test_coverage_of_paired_correctness_with_few_discordant_samples():
    rng = np.random.default_rng(0)
    shares = [0.93, 0.03, 0.01, 0.03]
    hits = []
    for b, c in rng.multinomial(100, shares, size=1500)[:, 1:3]:
        low, high = tango(int(b), int(c), 100).interval
        hits.append(low <= 0.02 <= high)
    # Three standard errors of the simulation below 95 %; Wald's interval has 0.90 here.
    assert coverage(hits) > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 1500)


def test_coverage_of_one_accuracy_near_one():
    rng = np.random.default_rng(1)
    hits = []
    for k in rng.binomial(60, 0.97, size=2000):
        low, high = wilson(int(k), 60).interval
        hits.append(low <= 0.97 <= high)
    assert coverage(hits) > 0.93


def test_coverage_of_the_gap_closed():
    rng = np.random.default_rng(2)
    hits = []
    for seed in range(150):
        common = rng.random(600)
        noise = rng.normal(0, 0.03, (3, 600))
        teacher, alone, distilled = (
            (common + noise[i] < level).astype(float) for i, level in enumerate((0.9, 0.7, 0.82))
        )
        low, high = gap_closed(teacher, alone, distilled, seed=seed, resamples=400).interval
        hits.append(low <= 0.6 <= high)
    # Noise moves a few samples over each level, so the truth is 0.6 within a hundredth.
    assert coverage(hits) > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 150)


def test_gap_closed_says_when_there_is_no_gap():
    rng = np.random.default_rng(4)
    scores = (rng.random((3, 100)) < 0.9).astype(float)
    estimate = gap_closed(scores[0], scores[0], scores[2])
    assert estimate.value is None
    assert "not shown to be better" in estimate.note


def test_a_worse_teacher_leaves_no_gap_to_close():
    rng = np.random.default_rng(6)
    teacher, alone, distilled = rng.random((3, 1000)) < np.array([[0.35], [0.58], [0.23]])
    estimate = gap_closed(teacher, alone, distilled)
    assert estimate.value is None
    assert estimate.interval is None
    assert "worse than the student alone" in estimate.note


def test_gap_closed_is_repeatable():
    rng = np.random.default_rng(5)
    scores = rng.random((3, 300)) < np.array([[0.95], [0.7], [0.8]])
    assert gap_closed(*scores, seed=7) == gap_closed(*scores, seed=7)


def test_mean_score_takes_wilson_only_for_correctness():
    assert mean_score([1, 0, 1, 1]).interval == wilson(3, 4).interval
    assert mean_score([0.5, 0.2, 0.9]).interval == mean([0.5, 0.2, 0.9]).interval


def test_samples_to_show_would_shrink_the_interval_to_the_budget():
    needed = samples_to_show(100, 0.01, (0.00, 0.02), 0.015)
    assert needed == pytest.approx(400, abs=1)
    assert samples_to_show(100, 0.01, (0.0, 0.02), 0.01) is None


@pytest.mark.parametrize(
    "call",
    [
        lambda: mean([]),
        lambda: mean([1.0, float("nan")]),
        lambda: paired_difference([1, 0], [1]),
        lambda: wilson(3, 2),
        lambda: wilson(1, 2, confidence=1.0),
        lambda: tango(3, 3, 5),
        lambda: gap_closed([1, 0], [1, 0], [1]),
    ],
)
def test_impossible_input_is_an_input_error(call):
    with pytest.raises(InputError):
        call()


def test_a_value_at_its_budget_needs_no_impossible_number_of_samples():
    for budget in (0.0, 4e-189, 1e-9):
        assert samples_to_show(100, 0.0, (-0.1, 0.1), budget) is None
    assert samples_to_show(100, 0.0, (-0.1, 0.1), 0.05) == 400
