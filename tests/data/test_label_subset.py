"""Samples without labels, and labels put aside: which, and that nothing else moves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekd.config.pipeline import DataConfig
from edgekd.data.build_dataset import build_dataset
from edgekd.data.source import RawData
from edgekd.data.sources import load_dataset
from edgekd.data.splits import keep_share
from edgekd.errors import InputError

IMAGES = np.random.default_rng(0).integers(0, 256, (300, 1, 4, 4), np.uint8)
LABELS = np.arange(300) % 3


def make(splits, **config):
    raw = RawData(splits=splits, where="here", description="a test")
    return build_dataset(raw, DataConfig(source="npz", **config))


def labels(dataset, split):
    return dataset.splits[split].arrays["label"]


@given(
    members=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    share=st.floats(0.001, 0.999),
    unlabelled=st.integers(0, 20),
)
def test_every_class_keeps_its_share_and_at_least_one(members, share, unlabelled):
    classes = np.repeat(np.arange(len(members)), members)
    given_labels = np.append(classes, np.full(unlabelled, -1))
    split = {"image": given_labels * 2, "label": given_labels}
    kept = keep_share({"train": split, "test": split}, share, {"label"})
    after = kept["train"]["label"]
    assert set(after[after != given_labels]) <= {-1}
    for label, count in enumerate(members):
        assert (after == label).sum() == max(1, round(share * count))
    assert kept["test"]["label"] is given_labels
    assert kept["train"]["image"] is split["image"]


def test_a_smaller_share_is_a_spread_subset_of_a_larger_one():
    split = {"label": np.repeat([0, 1], 500)}
    small, large = (
        keep_share({"train": split}, s, {"label"})["train"]["label"] for s in (0.1, 0.3)
    )
    assert set(np.flatnonzero(small >= 0)) < set(np.flatnonzero(large >= 0))
    # Keeping the first of each class would be the classic mistake on sorted files.
    assert np.flatnonzero(small == 0).max() > 250


def test_the_labels_kept_are_the_same_for_two_training_seeds(tmp_path):
    np.savez(tmp_path / "d.npz", image=IMAGES, label=LABELS)
    config = DataConfig(source="npz", path="d.npz", labelled=0.1)
    one, two = (load_dataset(config, tmp_path, seed) for seed in (0, 1))
    whole = load_dataset(config.model_copy(update={"labelled": 1.0}), tmp_path, 0)
    for split in ("train", "validation", "test"):
        np.testing.assert_array_equal(labels(one, split), labels(two, split))
        known = labels(one, split) >= 0
        np.testing.assert_array_equal(labels(one, split)[known], labels(whole, split)[known])
        images = (d.splits[split].arrays["image"] for d in (one, whole))
        np.testing.assert_array_equal(*images)
    assert np.bincount(labels(one, "train") + 1).tolist() == [216 - 21, 7, 7, 7]
    assert (labels(one, "validation") >= 0).sum() == 3
    assert (labels(one, "test") >= 0).all()


@pytest.mark.parametrize("targets", [np.zeros((300, 2)), LABELS / 2, LABELS.reshape(150, 2)])
def test_only_one_class_per_sample_can_be_put_aside(targets):
    arrays = {"x": np.ones((len(targets), 5)), "target": targets}
    with pytest.raises(InputError, match="not one class per sample"):
        make({"all": arrays}, labelled=0.5)


@pytest.mark.parametrize("config", [{}, {"targets": []}])
def test_images_alone_are_data_without_labels(config):
    dataset = make({"all": {"image": IMAGES}}, **config)
    assert [spec.name for spec in dataset.inputs] == ["image"]
    assert [(s.name, s.shape, s.dtype) for s in dataset.targets] == [("label", ("batch",), "int64")]
    for split in dataset.splits.values():
        assert (split.arrays["label"] == -1).all()
        assert len(split.arrays["label"]) == len(split.arrays["image"])


def test_single_numbers_are_inputs_when_targets_are_said_to_be_none():
    dataset = make({"all": {"image": IMAGES, "size": LABELS / 3}}, targets=[])
    assert [spec.name for spec in dataset.inputs] == ["image", "size"]


@pytest.mark.parametrize("name", ["label", "y", "labels"])
def test_a_split_may_have_no_labels_beside_one_that_has(name):
    dataset = make({"train": {"x": IMAGES}, "test": {"x": IMAGES[:9], name: LABELS[:9]}})
    assert (labels(dataset, "train") == -1).all()
    assert (labels(dataset, "validation") == -1).all()
    np.testing.assert_array_equal(labels(dataset, "test"), LABELS[:9])


def test_continuous_targets_are_not_made_up():
    with pytest.raises(InputError, match="different arrays: action"):
        make({"train": {"s": IMAGES / 2}, "test": {"s": IMAGES / 2, "action": LABELS / 2}})
