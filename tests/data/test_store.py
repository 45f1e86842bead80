import numpy as np
import pytest

from edgekd.config.pipeline import DataConfig
from edgekd.data import open_dataset, save_dataset
from edgekd.data.build_dataset import build_dataset
from edgekd.data.source import RawData
from edgekd.errors import InputError, StageError


@pytest.fixture
def dataset():
    random = np.random.default_rng(0)
    arrays = {
        "image": random.integers(0, 256, (30, 3, 4, 5), np.uint8),
        "state": random.normal(size=(30, 2)).astype(np.float32),
        "label": np.arange(30) % 3,
    }
    raw = RawData({"all": arrays}, "here", "größe", ("a", "b", "ü"))
    return build_dataset(raw, DataConfig(source="npz"))


def test_round_trip_is_exact_and_memory_mapped(dataset, tmp_path):
    save_dataset(dataset, tmp_path / "data")
    opened = open_dataset(tmp_path / "data")
    for field in ("inputs", "targets", "labels", "preprocess", "source"):
        assert getattr(opened, field) == getattr(dataset, field)
    assert list(opened.splits) == list(dataset.splits)
    for split, samples in dataset.splits.items():
        for name, array in samples.arrays.items():
            stored = opened.splits[split].arrays[name]
            assert isinstance(stored, np.memmap)
            assert not stored.flags.writeable
            assert stored.dtype == array.dtype
            np.testing.assert_array_equal(stored, array)


@pytest.mark.parametrize("damage", ["index", "array", "schema", "missing"])
def test_damage_is_an_input_error_that_names_the_folder(dataset, tmp_path, damage):
    save_dataset(dataset, tmp_path)
    index, array = tmp_path / "dataset.json", tmp_path / "train" / "image.npy"
    if damage == "index":
        index.write_bytes(index.read_bytes()[:-20])
    elif damage == "array":
        array.write_bytes(array.read_bytes()[:200])
    elif damage == "schema":
        index.write_text(index.read_text().replace("edgekd.dataset/1", "edgekd.dataset/9"))
    else:
        array.unlink()
    with pytest.raises(InputError, match=str(tmp_path)):
        open_dataset(tmp_path)


def test_what_cannot_be_written_is_a_stage_error(dataset, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StageError, match="cannot be written"):
        save_dataset(dataset, tmp_path / "file")
