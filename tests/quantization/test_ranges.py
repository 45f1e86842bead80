"""Histograms of magnitudes: independent of batches, and thresholds against direct computation."""

import numpy as np
import pytest

from edgekd.quantization.calibration import BINS, PERCENTILE, MagnitudeHistogram


def histogram(values, limit, parts=1):
    result = MagnitudeHistogram(limit)
    for part in np.array_split(values, parts):
        result.add(part)
    return result


@pytest.fixture
def values():
    return np.random.default_rng(0).standard_normal(200_000).astype(np.float32)


def test_counts_do_not_depend_on_batches_or_order(values):
    limit = float(np.abs(values).max())
    whole = histogram(values, limit)
    shuffled = histogram(np.random.default_rng(1).permutation(values), limit, parts=7)
    assert whole.counts.sum() == values.size
    np.testing.assert_array_equal(whole.counts, shuffled.counts)


def test_percentile_is_that_of_the_values_to_a_bin(values):
    values = np.concatenate([values, np.full(1, 1000.0, np.float32)])
    exact = np.quantile(np.abs(values), PERCENTILE / 100)
    found = histogram(values, 1000.0).percentile()
    assert exact <= found <= exact + 1000.0 / BINS + 1e-3


def test_entropy_drops_one_outlier_and_keeps_a_uniform_distribution(values):
    spiked = np.concatenate([values, np.full(1, 40.0, np.float32)])
    threshold = histogram(spiked, 40.0).entropy(128)
    # All normal values lie below 5; the outlier would spend 7 of 8 steps on nothing.
    assert 2.5 < threshold < 8.0
    uniform = np.random.default_rng(1).uniform(-1, 1, 200_000).astype(np.float32)
    assert histogram(uniform, 1.0).entropy(128) > 0.95


def test_zeros_of_a_relu_do_not_move_the_entropy_threshold(values):
    positive = np.abs(values)
    limit = float(positive.max())
    padded = np.concatenate([positive, np.zeros(10 * positive.size, np.float32)])
    assert histogram(padded, limit).entropy(128) == histogram(positive, limit).entropy(128)


def test_a_tensor_of_zeros_has_no_threshold_to_find():
    zeros = histogram(np.zeros(10, np.float32), 0.0)
    assert zeros.percentile() == zeros.entropy(128) == 0.0


@pytest.mark.parametrize("limit", [1e-44, 1e-38, 3e38])
def test_values_at_the_ends_of_float32_are_counted(limit):
    values = np.array([0, limit / 2, limit], np.float32)
    counts = histogram(values, float(values.max())).counts
    assert (counts.sum(), counts[0], counts[-1]) == (3, 1, 1)
