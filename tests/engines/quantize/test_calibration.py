"""Ranges on real samples: the same in any chunks and order, in memory that does not grow."""

import tracemalloc

import numpy as np
import onnx
import pytest

from edgekd.engines.quantize.calibration import calibrate
from edgekd.engines.quantize.prepare import prepare_onnx
from edgekd.engines.samples import ArraySamples
from edgekd.errors import InputError
from tests.engines.quantize.graphs import run

TENSORS = ("image", "r1", "pooled", "logits")


class Made:
    """Samples that are made when asked for, each from its own seed."""

    def __init__(self, count):
        self.count = count

    def batches(self, size):
        for start in range(0, self.count, size):
            rows = [
                np.random.default_rng(i).standard_normal((3, 8, 8)).astype(np.float32)
                for i in range(start, min(start + size, self.count))
            ]
            yield {"image": np.stack(rows)}


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


def ranges(prepared, samples, scratch, calibration="minmax", symmetric=False):
    return calibrate(
        prepared,
        TENSORS,
        samples,
        scratch,
        calibration=calibration,
        symmetric=symmetric,
        threads=1,
    )


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
        ranges(prepared, Made(count), tmp_path, calibration)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(128)  # what is loaded once
    # Ten times the samples are 0.9 MB more of inputs alone, and 6 MB of activations.
    assert peak(1280) - peak(128) < 200_000


@pytest.mark.filterwarnings("ignore:All-NaN")  # what the last of these is about
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
    with pytest.raises(InputError, match="input 'image' of the samples has a NaN"):
        ranges(prepared, InChunks({"image": values}, 9), tmp_path)
