from itertools import chain

import numpy as np
import pytest

from edgekd.config.pipeline import DataConfig
from edgekd.data.build_dataset import build_dataset
from edgekd.data.source import RawData
from edgekd.errors import InputError

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 1, 6, 5), np.uint8)
LABELS = np.arange(40) % 4


def make(splits=None, **config):
    if splits is None:
        splits = {"all": {"image": IMAGES, "label": LABELS}}
    raw = RawData(splits=splits, where="here", description="a test")
    return build_dataset(raw, DataConfig(source="npz", **config))


def error_of(splits=None, **config):
    with pytest.raises(InputError) as caught:
        make(splits, **config)
    assert caught.value.remedy
    return str(caught.value)


def test_three_disjoint_stratified_splits():
    marked = IMAGES.copy()
    marked[:, 0, 0, 0] = np.arange(40)
    dataset = make({"all": {"image": marked, "label": LABELS}}, validation=0.25, test=0.5)
    seen = [s.arrays["image"][:, 0, 0, 0].tolist() for s in dataset.splits.values()]
    assert sorted(chain.from_iterable(seen)) == list(range(40))
    assert [len(dataset.splits[s]) for s in ("train", "validation", "test")] == [15, 5, 20]
    assert np.bincount(dataset.splits["test"].arrays["label"]).tolist() == [5] * 4


def test_validation_and_test_samples_do_not_touch_the_constants():
    ordinary = make(validation=0.25)
    test = {"image": IMAGES[:8], "label": LABELS[:8]}
    train = {"image": IMAGES, "label": LABELS}
    one = make({"train": train, "validation": test, "test": test})
    spoiled = {"image": np.full_like(IMAGES[:8], 255), "label": LABELS[:8]}
    two = make({"train": train, "validation": spoiled, "test": spoiled})
    assert one.preprocess == two.preprocess
    train_part = ordinary.splits["train"].arrays["image"] / 255
    assert ordinary.preprocess["image"].mean[0] == pytest.approx(train_part.mean(), rel=1e-9)


def test_a_test_split_that_is_given_stays_untouched():
    test = {"image": IMAGES[::-1][:7], "label": LABELS[::-1][:7]}
    dataset = make({"train": {"image": IMAGES, "label": LABELS}, "test": test})
    for name, array in test.items():
        np.testing.assert_array_equal(dataset.splits["test"].arrays[name], array)


@pytest.mark.parametrize(
    ("given", "renamed"),
    [
        ({"x": IMAGES, "y": LABELS}, ["image", "label"]),
        ({"x": IMAGES[:, 0], "labels": LABELS[:, None]}, ["image", "label"]),
        ({"x": IMAGES.reshape(40, -1) / 255, "y": LABELS / 3}, ["x", "target"]),
        ({"state": np.ones((40, 2)), "action": np.ones((40, 3))}, ["state", "action"]),
    ],
)
def test_names_shapes_and_dtypes_are_cleaned(given, renamed):
    dataset = make({"all": given})
    specs = [*dataset.inputs, *dataset.targets]
    assert [spec.name for spec in specs] == renamed
    for spec in specs:
        array = dataset.splits["train"].arrays[spec.name]
        assert spec.shape == ("batch", *array.shape[1:])
    for spec in dataset.targets:
        array = dataset.splits["train"].arrays[spec.name]
        assert array.dtype == spec.dtype
        assert spec.dtype == ("int64" if spec.name == "label" else "float32")
        assert spec.name != "label" or array.ndim == 1
    if renamed[0] == "image":
        assert dataset.inputs[0].shape == ("batch", 1, 6, 5)
        assert dataset.inputs[0].dtype == "float32"
        assert dataset.splits["train"].arrays["image"].dtype == np.uint8


def test_targets_can_be_named_by_their_old_or_new_name():
    arrays = {"a": np.ones((40, 2)), "b": np.ones((40, 2)), "y": LABELS}
    assert [t.name for t in make({"all": arrays}, targets=["b"]).targets] == ["b"]
    assert [t.name for t in make({"all": arrays}, targets=["y"]).targets] == ["label"]
    assert [t.name for t in make({"all": arrays}, targets=["label", "a"]).targets] == ["a", "label"]


def test_integer_inputs_stay_and_wide_unsigned_ones_become_signed():
    arrays = {"tokens": np.arange(80, dtype=np.uint16).reshape(40, 2), "label": LABELS}
    dataset = make({"all": arrays})
    assert dataset.inputs[0].dtype == "int32"
    assert dataset.preprocess == {}


def test_layout_is_asked_for_and_then_obeyed():
    images = np.random.default_rng(0).integers(0, 256, (40, 6, 5, 3), np.uint8)
    arrays = {"all": {"x": images, "y": LABELS}}
    assert "layout: nhwc" in error_of(arrays)
    dataset = make(arrays, args={"layout": "nhwc"}, test=0.5)
    assert dataset.inputs[0].shape == ("batch", 3, 6, 5)
    assert make(arrays, args={"layout": "nchw"}).inputs[0].shape == ("batch", 6, 5, 3)
    assert "'nwhc'" in error_of(arrays, args={"layout": "nwhc"})


def nan_in(array, index, value=np.nan):
    array = array.astype(np.float32)
    array[index] = value
    return array


STATE = np.ones((40, 3))


@pytest.mark.parametrize(
    ("splits", "config", "said"),
    [
        ({"all": {"state": nan_in(STATE, (17, 1)), "y": LABELS}}, {}, "'state' holds NaN in sampl"),
        ({"all": {"state": nan_in(STATE, (17, 1)), "y": LABELS}}, {}, "sample 17 of train"),
        ({"all": {"s": nan_in(STATE, (3, 0), np.inf), "y": LABELS}}, {}, "infinity in sample 3"),
        ({"all": {"s": STATE, "y": nan_in(LABELS, 5)}}, {}, "'target' holds NaN in sample 5"),
        ({"all": {"state": STATE[:39], "y": LABELS}}, {}, "state: 39, y: 40"),
        ({"all": {"state": STATE[:0], "y": LABELS[:0]}}, {}, "is empty"),
        ({"all": {}}, {}, "has no array"),
        ({"all": {"state": STATE.astype(str), "y": LABELS}}, {}, "dtype <U"),
        ({"all": {"state": STATE.astype(object), "y": LABELS}}, {}, "dtype object"),
        ({"all": {"state": STATE.astype(complex), "y": LABELS}}, {}, "dtype complex128"),
        ({"all": {"my state": STATE, "y": LABELS}}, {}, "no usable name"),
        ({"all": {"s" * 300: STATE, "y": LABELS}}, {}, "no usable name"),
        ({"all": {"x": STATE, "lbl": LABELS}}, {}, "none of the arrays is a target: x, lbl"),
        ({"all": {"x": STATE, "lbl": LABELS[:, None]}}, {}, "none of the arrays is a target"),
        ({"all": {"x": STATE, "y": LABELS}}, {"targets": []}, "'y' is the name of a target"),
        ({"all": {"label": LABELS}}, {}, "none is an input"),
        ({"all": {"state": STATE, "label": LABELS}}, {"targets": ["labell"]}, "mean 'label'"),
        ({"all": {"image": IMAGES.astype(np.int64), "y": LABELS}}, {}, "are int64"),
        (None, {"image_size": (6, 6)}, "are 6x5, but data.image_size is 6x6"),
        ({"all": {"state": STATE, "y": LABELS}}, {"image_size": (6, 6)}, "no input is an image"),
        ({"test": {"state": STATE, "y": LABELS}}, {}, "no training split"),
        ({"train": {"state": STATE, "y": LABELS}}, {}, "no test split"),
        (
            {"train": {"s": STATE, "y": LABELS}, "test": {"s": STATE, "label": LABELS}},
            {},
            "label, y are not in both train and test",
        ),
        (
            {"train": {"s": STATE, "y": LABELS}, "test": {"s": STATE[:, :2], "y": LABELS}},
            {},
            "float32 (2,) in test but float32 (3,) in train",
        ),
        (
            {"train": {"s": STATE, "y": LABELS}, "test": {"s": STATE, "y": LABELS}},
            {"test": 0.1},
            "own test split",
        ),
        ({"all": {"s": STATE[:2], "y": LABELS[:2]}}, {}, "of 2 samples as test"),
        (None, {"args": {"normalize": "no"}}, "not true or false"),
    ],
)
def test_what_is_wrong_is_said(splits, config, said):
    assert said in error_of(splits, **config)


def test_nan_is_counted_beyond_the_first_sample():
    state = nan_in(STATE, slice(30, 35))
    assert "sample 30 of train (5 such samples)" in error_of({"all": {"s": state, "y": LABELS}})
