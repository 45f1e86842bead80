from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgerun.percentiles import (
    PERCENTILES,
    interval_ranks,
    median_interval,
    queries_needed,
    summarize,
    t_interval,
)


def binomial_at_most(k: int, n: int, p: float) -> float:
    return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


def test_the_queries_needed_are_the_published_early_stopping_bounds():
    needed = {name: queries_needed(p) for name, p in PERCENTILES.items()}
    assert needed == {"p50": 11, "p90": 64, "p95": 130, "p99": 662, "p99_9": 6636}


@given(st.floats(0.05, 0.97), st.floats(0.5, 0.999))
def test_one_query_fewer_leaves_the_confidence_unmet(p: float, confidence: float):
    n = queries_needed(p, confidence)
    # Two or more slower than the percentile: Binomial(n, 1 - p) >= 2.
    assert binomial_at_most(1, n, 1 - p) <= 1 - confidence + 1e-12
    if n > 2:
        assert binomial_at_most(1, n - 1, 1 - p) > 1 - confidence - 1e-12


@given(st.integers(2, 400), st.floats(0.05, 0.95))
def test_order_statistics_cover_the_percentile_with_minimal_tails(n: int, p: float):
    ranks = interval_ranks(n, p)
    if ranks is None:
        return
    low, high = ranks
    assert 0 <= low < high < n
    # P[X_(low) <= percentile < X_(high)] counts from low + 1 to high below it.
    covered = binomial_at_most(high, n, p) - binomial_at_most(low, n, p)
    assert covered >= 0.95 - 1e-9
    # Moving either end inwards would leave more than 2.5 % outside on that side.
    assert binomial_at_most(low + 1, n, p) > 0.025 - 1e-9
    assert binomial_at_most(high - 1, n, p) < 0.975 + 1e-9


def test_the_interval_covers_the_true_percentile_of_a_skewed_distribution():
    generator = np.random.default_rng(1)
    truth = -math.log(1 - 0.9)
    hits = 0
    for _ in range(400):
        p90 = summarize(generator.exponential(size=300))["p90"]
        hits += p90["interval"][0] <= truth <= p90["interval"][1]
    # 95 % nominal; four standard errors of 400 draws are 4.4 %.
    assert hits / 400 >= 0.95 - 0.044


def test_too_few_queries_give_a_note_and_no_number():
    summary = summarize([1.0] * 100)
    assert summary["p90"]["value"] == 1.0
    for name in ("p95", "p99", "p99_9"):
        assert summary[name]["value"] is None
        assert summary[name]["interval"] is None
        assert "n too small: 100" in summary[name]["note"]


def test_a_percentile_is_a_sample_that_lies_in_its_interval():
    samples = np.random.default_rng(0).permutation(np.arange(1, 7001, dtype=float))
    summary = summarize(samples)
    assert summary["p50"]["value"] == 3500
    assert summary["p99_9"]["value"] == 6993
    for name in PERCENTILES:
        low, high = summary[name]["interval"]
        assert low <= summary[name]["value"] <= high


@pytest.mark.parametrize(("n", "known"), [(5, False), (6, True)])
def test_a_median_needs_six_values_for_an_interval(n: int, known: bool):
    # 2 · 0.5^6 = 3.1 % is the first below 5 %.
    assert (median_interval(list(map(float, range(n)))) is not None) is known


def test_the_quantiles_of_t_are_those_of_the_distribution():
    from scipy.special import stdtrit

    for count in (2, 3, 6, 31, 32, 60, 200):
        # Logarithms 0 and 1 in turn: their mean and deviation are known.
        logs = np.arange(count) % 2
        _, low, high = t_interval(np.exp(logs))
        half = stdtrit(count - 1, 0.975) * logs.std(ddof=1) / math.sqrt(count)
        assert math.log(high / low) / 2 == pytest.approx(half, rel=2e-3)


def test_the_interval_of_processes_covers_the_next_run():
    generator = np.random.default_rng(2)

    def run() -> list[np.ndarray]:
        # Each process has its own level, 4 % apart: far more than the noise within one.
        levels = np.exp(0.04 * generator.normal(size=5))
        return [level * (1 + 0.01 * generator.exponential(size=100)) for level in levels]

    by_process = pooled = 0
    for _ in range(300):
        parts, following = run(), summarize(*run())["p50"]["value"]
        low, high = summarize(*parts)["p50"]["interval"]
        by_process += low <= following <= high
        low, high = summarize(np.concatenate(parts))["p50"]["interval"]
        pooled += low <= following <= high
    # 95 % nominal, less four standard errors of 300 draws.
    assert by_process / 300 >= 0.95 - 0.05
    assert pooled / 300 < 0.5


def test_processes_that_agree_keep_the_interval_of_their_samples():
    samples = np.random.default_rng(3).exponential(size=200)
    several, one = summarize(*[samples] * 5), summarize(np.tile(samples, 5))
    assert several["p50"]["value"] == one["p50"]["value"]
    assert several["p90"]["interval"] == one["p90"]["interval"]
