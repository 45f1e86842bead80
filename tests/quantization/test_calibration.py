"""Ranges on real samples: the same in any chunks and order, in memory that does not grow.

Histograms of magnitudes: independent of batches, and thresholds against direct computation.
"""

import tracemalloc

import numpy as np
import onnx
import pytest

from edgekd.errors import InputError
from edgekd.onnx.samples import ArraySamples
from edgekd.quantization.calibration import BINS, PERCENTILE, MagnitudeHistogram, calibrate
from edgekd.quantization.prepare import prepare_onnx
from tests.onnx_builders import run
from tests.samples import CountedSamples, GeneratedSamples

TENSORS = ("image", "r1", "pooled", "logits")


class InChunks(ArraySamples):
    """Batches of a size of their own."""

    def __init__(self, arrays, size):
        super().__init__(arrays)
        self.size = size

    def batches(self, size):
        return super().batches(self.size)


@pytest.fixture(scope="session")
def prepared(convolutional, tmp_path_factory):
    path = tmp_path_factory.mktemp("prepared") / "model.onnx"
    onnx.save(prepare_onnx(convolutional).model, str(path))
    return path


def ranges(prepared, samples, scratch, calibration="minmax", tensors=TENSORS):
    settings = {"calibration": calibration, "symmetric": False, "threads": 1}
    return calibrate(prepared, tensors, samples, scratch, **settings).ranges


def test_minmax_is_the_extremes_of_what_the_model_computes(prepared, images, tmp_path):
    found = ranges(prepared, ArraySamples(images), tmp_path)
    assert found.keys() == set(TENSORS)
    assert found["image"] == (images["image"].min(), images["image"].max())
    logits = run(prepared, images)["logits"]
    np.testing.assert_allclose(found["logits"], (logits.min(), logits.max()), rtol=1e-5)
    assert found["r1"][0] == 0.0


@pytest.mark.parametrize("calibration", ["minmax", "entropy", "percentile"])
def test_chunks_and_order_change_nothing(prepared, images, tmp_path, calibration):
    """One kernel may round otherwise for another batch: within float32's rounding, and a value on
    the border of a bin moves a threshold by one of 2,048 bins."""
    whole = ranges(prepared, InChunks(images, 70), tmp_path, calibration)
    order = np.random.default_rng(0).permutation(70)
    mixed = {"image": images["image"][order]}
    chunked = ranges(prepared, InChunks(mixed, 9), tmp_path, calibration)
    for name in TENSORS:
        low, high = whole[name]
        bin_width = max(abs(low), abs(high)) / 2048
        # Entropy tries every eighth bin.
        slack = {"minmax": 1e-5 * bin_width, "entropy": 8.01 * bin_width}.get(
            calibration, 1.01 * bin_width
        )
        np.testing.assert_allclose(chunked[name], (low, high), atol=slack, rtol=1e-6)


@pytest.mark.parametrize("calibration", ["entropy", "percentile"])
def test_thresholds_lie_within_the_extremes(prepared, images, tmp_path, calibration):
    widest = ranges(prepared, ArraySamples(images), tmp_path)
    for name, (low, high) in ranges(prepared, ArraySamples(images), tmp_path, calibration).items():
        assert widest[name][0] <= low <= high <= widest[name][1]


@pytest.mark.parametrize("calibration", ["minmax", "entropy"])
def test_memory_does_not_grow_with_the_samples(prepared, tmp_path, calibration):
    def peak(count):
        tracemalloc.start()
        made = GeneratedSamples(
            "image", count, lambda i: np.random.default_rng(i).standard_normal((3, 8, 8))
        )
        ranges(prepared, made, tmp_path, calibration)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(128)  # what is loaded once
    # Ten times the samples are 0.9 MB more of inputs alone, and 6 MB of activations.
    assert peak(1280) - peak(128) < 200_000


def test_too_few_samples_a_missing_input_and_overflow(prepared, images, tmp_path):
    one = {"image": images["image"][:1]}
    with pytest.raises(InputError, match="at least 2 samples, there are 1"):
        ranges(prepared, ArraySamples(one), tmp_path)
    with pytest.raises(InputError, match="no input named 'image'"):
        ranges(prepared, ArraySamples({"picture": images["image"]}), tmp_path)
    huge = {"image": np.full((2, 3, 8, 8), 3e38, np.float32)}
    with pytest.raises(InputError, match="becomes NaN or infinite"):
        ranges(prepared, ArraySamples(huge), tmp_path)


def test_a_nan_in_a_late_sample_is_refused(prepared, images, tmp_path):
    values = images["image"].copy()
    values[69, 2, 7, 7] = np.nan
    with pytest.raises(InputError, match=r"input 'image' of .* a NaN.* samples 63 to 69"):
        ranges(prepared, InChunks({"image": values}, 9), tmp_path)


@pytest.fixture
def logarithm(graph, tmp_path):
    """x → Log → MatMul: a negative value becomes NaN in the middle, 0 becomes −infinity."""

    def build(batch="batch"):
        graph.add("Log", ["x"], "log")
        graph.add("MatMul", ["log", graph.weight("w", 4, 3)], "y")
        path = graph.save(tmp_path / "log.onnx", {"x": [batch, 4]}, {"y": [batch, 3]})
        prepared = tmp_path / "prepared.onnx"
        onnx.save(prepare_onnx(path).model, str(prepared))
        return prepared

    return build


@pytest.mark.parametrize("calibration", ["minmax", "entropy", "percentile"])
@pytest.mark.parametrize(("value", "batch"), [(-1.0, "batch"), (0.0, "batch"), (-1.0, 9)])
def test_a_nan_that_arises_in_the_model_is_refused(logarithm, tmp_path, calibration, value, batch):
    """One value of one sample, among finite ones in the same batch."""
    x = np.random.default_rng(0).uniform(0.5, 2, (70, 4)).astype(np.float32)
    x[66, 1] = value
    said = r"tensor 'log' of the float model becomes NaN or infinite on samples 63 to 69"
    with pytest.raises(InputError, match=said):
        ranges(logarithm(batch), InChunks({"x": x}, 9), tmp_path, calibration, ("log",))


def test_values_whose_sum_leaves_float32_are_no_infinity(logarithm, tmp_path):
    x = np.full((4, 4), 3e38, np.float32)
    found = ranges(logarithm(), ArraySamples({"x": x}), tmp_path, "entropy", ("x", "log"))
    assert found["x"] == (np.float32(3e38), np.float32(3e38))


@pytest.mark.parametrize("calibration", ["minmax", "percentile"])
def test_open_height_and_width_count_as_they_are_in_the_samples(graph, tmp_path, calibration):
    graph.add("Conv", ["image", graph.weight("w", 16, 3, 3, 3)], "y", pads=[1] * 4)
    open_shape = ["batch", 3, "height", "width"]
    path = graph.save(tmp_path / "m.onnx", {"image": open_shape}, {"y": ["batch", 16, "h", "w"]})
    samples = CountedSamples({"image": np.ones((6, 3, 224, 224), np.float32)})
    ranges(path, samples, tmp_path, calibration, ("image", "y"))
    each = 4 * (3 + 16) * 224**2
    assert 1 < max(samples.sizes) * each <= 32 * 2**20


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
