from itertools import chain

import numpy as np
import pytest
import torch

from edgekd.config.pipeline import DataConfig
from edgekd.data import open_dataset, save_dataset
from edgekd.data.assemble import assemble
from edgekd.data.loader import Loader
from edgekd.data.source import RawData
from edgekd.errors import InputError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    random = np.random.default_rng(0)
    arrays = {
        "image": random.integers(0, 256, (100, 3, 6, 5), np.uint8),
        "state": random.normal(5, 3, (100, 4)),
        "speed": random.normal(5, 3, 100),
        "tokens": random.integers(0, 9, (100, 7)),
        "label": np.arange(100),
        "action": random.normal(size=(100, 2)),
    }
    splits = {"train": arrays, "validation": arrays, "test": arrays}
    made = assemble(RawData(splits, "here", "a test"), DataConfig(source="npz"))
    folder = tmp_path_factory.mktemp("data")
    save_dataset(made, folder)
    return open_dataset(folder)


def labels(batches):
    return [batch["label"].tolist() for batch in batches]


def test_ordered_batches_equal_the_numpy_preprocessing(dataset):
    batches = list(Loader("test", dataset, 32).ordered())
    assert [len(b["label"]) for b in batches] == [32, 32, 32, 4]
    inputs = dataset.model_inputs("test", 0, 100)
    assert set(batches[0]) == {*inputs, "label", "action"}
    for name, expected in inputs.items():
        found = torch.cat([b[name] for b in batches]).numpy()
        assert found.dtype == expected.dtype
        # The same three float32 operations in the same order: a unit in the last place at most.
        np.testing.assert_allclose(found, expected, rtol=2e-7, atol=1e-7)
    assert list(chain(*labels(batches))) == list(range(100))


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch(dataset):
    loader = Loader("train", dataset, 10)
    assert sorted(chain(*labels(loader.epoch(1, 2)))) == list(range(100))
    assert labels(loader.epoch(1, 2)) == labels(loader.epoch(1, 2))
    different = [labels(loader.epoch(*at)) for at in ((1, 2), (1, 3), (2, 2), (2, 1))]
    assert all(a != b for i, a in enumerate(different) for b in different[:i])


def test_rows_stay_together(dataset):
    raw = dataset.splits["train"].arrays
    for batch in Loader("train", dataset, 10).epoch(0, 0):
        rows = batch["label"].numpy()
        np.testing.assert_array_equal(batch["tokens"].numpy(), raw["tokens"][rows])
        np.testing.assert_array_equal(batch["action"].numpy(), raw["action"][rows])
        expected = dataset.preprocess["image"].apply(raw["image"][rows])
        np.testing.assert_allclose(batch["image"].numpy(), expected, rtol=2e-7, atol=1e-7)


def test_augmentation_is_deterministic_and_leaves_the_order_alone(dataset):
    plain = Loader("train", dataset, 10)
    augmented = Loader("train", dataset, 10, augment=["flip", {"shift": {"pixels": 1}}, "erase"])
    one, again, other, bare = (
        list(loader.epoch(*at))
        for loader, at in ((augmented, (3, 4)), (augmented, (3, 4)), (augmented, (3, 5)),
                           (plain, (3, 4)))
    )  # fmt: skip
    assert labels(one) == labels(bare)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0]["image"], other[0]["image"])
    assert not torch.equal(one[0]["image"], bare[0]["image"])
    assert torch.equal(one[0]["state"], bare[0]["state"])


def test_what_is_erased_is_the_raw_zero(dataset):
    loader = Loader("train", dataset, 10, augment=[{"erase": {"p": 1.0, "size": 1.0}}])
    constants = dataset.preprocess["image"]
    expected = -np.array(constants.mean) / np.array(constants.std)
    image = next(iter(loader.epoch(0, 0)))["image"]
    np.testing.assert_allclose(image.mean((0, 2, 3)).numpy(), expected, rtol=1e-5)
    for plain, unaugmented in zip(
        loader.ordered(), Loader("train", dataset, 10).ordered(), strict=True
    ):
        assert torch.equal(plain["image"], unaugmented["image"])


def test_length_and_the_last_partial_batch(dataset):
    assert len(Loader("train", dataset, 30)) == 3
    assert [len(b) for b in labels(Loader("train", dataset, 30).epoch(0, 0))] == [30] * 3
    assert len(Loader("train", dataset, 300)) == 1
    assert [len(b) for b in labels(Loader("train", dataset, 300).epoch(0, 0))] == [100]


def test_batches_do_not_alias_the_stored_arrays(dataset):
    loader = Loader("train", dataset, 100)
    for batches in (loader.ordered, lambda: loader.epoch(0, 0)):
        for tensor in next(iter(batches())).values():
            tensor.fill_(0)
    assert dataset.splits["train"].arrays["label"].sum() == 4950
    np.testing.assert_array_equal(next(iter(loader.ordered()))["label"], range(100))


def test_channels_last_changes_the_memory_format_only(dataset):
    one = next(iter(Loader("train", dataset, 10, channels_last=True).ordered()))
    two = next(iter(Loader("train", dataset, 10).ordered()))
    assert one["image"].is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_augmentation_needs_an_image_that_it_fits(dataset):
    with pytest.raises(InputError, match="pixels is 9"):
        Loader("train", dataset, 10, augment=[{"shift": {"pixels": 9}}])
    splits = {"all": {"state": np.random.default_rng(0).normal(size=(20, 2)), "y": np.arange(20)}}
    vectors = assemble(RawData(splits, "here", "a test"), DataConfig(source="npz"))
    with pytest.raises(InputError, match="no input is an image"):
        Loader("train", vectors, 4, augment=["flip"])
