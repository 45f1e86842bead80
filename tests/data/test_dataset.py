from __future__ import annotations

import numpy as np
import pytest

from edgekd.data import dataset
from edgekd.data.dataset import Dataset, Preprocess, Split
from edgekd.spec import TensorSpec


def test_preprocess_follows_its_formula_per_channel():
    images = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    constants = Preprocess(1 / 255, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    expected = images.astype(np.float64) / 255
    for channel, (mean, std) in enumerate(zip(constants.mean, constants.std, strict=True)):
        expected[:, channel] = (expected[:, channel] - mean) / std
    result = constants.apply(images)
    assert result.dtype == np.float32
    assert result.shape == images.shape
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 4, 3)])
def test_preprocess_of_vectors_runs_along_the_last_axis(shape):
    features = shape[-1] if len(shape) > 1 else 1
    constants = Preprocess(1.0, tuple(float(i) for i in range(features)), (2.0,) * features)
    values = np.ones(shape, np.float32)
    expected = (1 - np.arange(features)) / 2
    result = constants.apply(values)
    assert result.shape == shape
    np.testing.assert_array_equal(result, np.broadcast_to(expected.squeeze(), shape))


def test_preprocess_leaves_its_argument_alone_and_survives_json():
    values = np.ones((2, 2), np.float32)
    constants = Preprocess(0.5, (0.25, 0.75), (2.0, 4.0))
    constants.apply(values)
    np.testing.assert_array_equal(values, 1)
    assert Preprocess.from_json(constants.to_json()) == constants


def test_model_inputs_are_preprocessed_and_tokens_are_not():
    arrays = {
        "state": np.arange(8, dtype=np.float32).reshape(4, 2),
        "mission": np.arange(12).reshape(4, 3),
        "action": np.zeros((4, 1), np.float32),
    }
    dataset = Dataset(
        {"test": Split(arrays)},
        (
            TensorSpec("state", ("batch", 2)),
            TensorSpec("mission", ("batch", 3), "int64"),
        ),
        (TensorSpec("action", ("batch", 1)),),
        None,
        {"state": Preprocess(1.0, (1.0, 1.0), (2.0, 2.0))},
        "memory",
    )
    inputs = dataset.model_inputs("test", 1, 3)
    assert list(inputs) == ["state", "mission"]
    np.testing.assert_array_equal(inputs["state"], (arrays["state"][1:3] - 1) / 2)
    np.testing.assert_array_equal(inputs["mission"], arrays["mission"][1:3])
    assert inputs["mission"].dtype == np.int64


def test_large_arrays_live_in_a_file_and_hold_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(dataset, "IN_MEMORY_BYTES", 100)
    monkeypatch.setattr(dataset, "CHUNK_BYTES", 64)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    array = np.arange(400, dtype=np.int32).reshape(100, 4)
    indices = np.array([3, 99, 0, *range(10, 40)])
    result = dataset.take(array, indices)
    assert isinstance(result, np.memmap)
    np.testing.assert_array_equal(result, array[indices])
    assert list(tmp_path.iterdir()) == []


def test_chunks_cover_every_row_once(monkeypatch):
    monkeypatch.setattr(dataset, "CHUNK_BYTES", 50)
    array = np.arange(101)
    pieces = list(dataset.chunks(array))
    assert len(pieces) > 1
    np.testing.assert_array_equal(np.concatenate([piece for _, piece in pieces]), array)
    assert all(piece[0] == start for start, piece in pieces)
