"""Labels in every form that people save them in: recognized and reported, or requested by key."""

import numpy as np
import pytest

from edgekd.config.pipeline import DataConfig
from edgekd.data.build_dataset import build_dataset
from edgekd.data.classes import ClassTarget
from edgekd.data.source import RawData
from edgekd.errors import InputError
from edgekd.tasks import Classification

STATE = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
LABELS = np.random.default_rng(1).permutation(np.arange(60) % 5)


def make(label, *, name="label", names=None, count=None, splits=None, **config):
    splits = splits or {"all": {"state": STATE[: len(label)], name: label}}
    raw = RawData(splits, "here", "a test", labels=names)
    dataset = build_dataset(raw, DataConfig(source="npz", **config), ClassTarget("label", count))
    task = Classification(classes=count)
    task.check(dataset)
    return dataset, task.outputs(dataset)[0].shape


def labels_of(dataset):
    """The labels of all splits, in the order of the source."""
    rows = {row.tobytes(): n for n, row in enumerate(STATE)}
    found = np.full(len(STATE), -9)
    for split in dataset.splits.values():
        for row, label in zip(split.arrays["state"], split.arrays["label"], strict=True):
            found[rows[row.tobytes()]] = label
    return found


def error_of(label, **options):
    with pytest.raises(InputError) as caught:
        make(label, **options)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "bool", "float16", "float32"])
@pytest.mark.parametrize("name", ["label", "labels", "y", "Y"])
def test_one_hot_rows_are_the_classes_of_their_columns(dtype, name):
    dataset, logits = make(np.eye(5)[LABELS].astype(dtype), name=name)
    np.testing.assert_array_equal(labels_of(dataset), LABELS)
    assert logits == ("batch", 5)
    assert any("one-hot: 5 classes" in remark for remark in dataset.remarks)


def test_one_hot_columns_without_a_sample_are_classes_too():
    dataset, logits = make(np.eye(7)[LABELS])
    assert logits == ("batch", 7)
    assert any("2 of 7 classes have no" in remark for remark in dataset.remarks)
    assert "12 classes" in error_of(np.eye(7)[LABELS], count=12)


def test_rows_of_minus_one_are_unlabelled_among_one_hot_ones():
    rows = np.where((np.arange(60) % 3 == 0)[:, None], -1, np.eye(5, dtype=int)[LABELS])
    dataset, logits = make(rows)
    np.testing.assert_array_equal(labels_of(dataset), np.where(np.arange(60) % 3 == 0, -1, LABELS))
    assert logits == ("batch", 5)


def test_one_hot_positions_and_columns_of_one():
    positions = np.arange(120).reshape(60, 2) % 3
    assert make(np.eye(3)[positions])[1] == ("batch", 2, 3)
    for dtype in ("int64", "float32"):
        dataset, logits = make(LABELS[:, None].astype(dtype))
        np.testing.assert_array_equal(labels_of(dataset), LABELS)
        assert logits == ("batch", 5)


@pytest.mark.parametrize("dtype", ["int8", "bool", "float32"])
def test_several_classes_per_sample_are_asked_for(dtype):
    several = (np.random.default_rng(0).random((60, 5)) < 0.5).astype(dtype)
    assert "data.label_format: index" in error_of(several)
    assert "not one-hot" in error_of(several, label_format="one-hot")
    assert make(several, label_format="index")[1] == ("batch", 5, 2)


def test_labels_per_position_are_no_matrix_of_classes():
    tokens = np.arange(180).reshape(60, 3) % 4
    assert make(tokens)[1] == ("batch", 3, 4)
    padded = np.where(np.arange(180).reshape(60, 3) % 5 == 0, -1, tokens % 2)
    assert make(padded)[1] == ("batch", 3, 2)


def test_probabilities_are_asked_for():
    soft = np.random.default_rng(0).dirichlet(np.ones(5), 60).astype(np.float32)
    assert "data.label_format: probabilities" in error_of(soft)
    dataset, logits = make(soft, label_format="probabilities")
    np.testing.assert_array_equal(labels_of(dataset), soft.argmax(1))
    assert logits == ("batch", 5)


def test_names_are_classes_in_a_stated_order():
    words = np.array(["cat", "dog", "eel", "fox", "gnu"])[LABELS]
    dataset, _ = make(words, name="y")
    assert dataset.labels == ("cat", "dog", "eel", "fox", "gnu")
    np.testing.assert_array_equal(labels_of(dataset), LABELS)
    assert any("in this order: cat, dog" in remark for remark in dataset.remarks)
    dataset, _ = make(words.astype("S"), classes=["gnu", "fox", "eel", "dog", "cat"])
    np.testing.assert_array_equal(labels_of(dataset), 4 - LABELS)
    dataset, _ = make(words.astype(object), names=("fox", "gnu", "eel", "dog", "cat"))
    np.testing.assert_array_equal(labels_of(dataset), np.array([4, 3, 2, 0, 1])[LABELS])
    assert "holds cat" in error_of(words, names=("a", "b"))
    assert "Python objects: float, str" in error_of(np.array([1.5, "a"] * 30, object))


def test_numbers_in_text_are_sorted_by_their_size():
    dataset, _ = make((LABELS * 5).astype(str))
    assert dataset.labels == ("0", "5", "10", "15", "20")


def test_text_without_a_name_is_unlabelled():
    words = np.array(["cat", "dog", "", "fox", "gnu"])[LABELS]
    dataset, logits = make(words)
    assert (labels_of(dataset) == -1).sum() == 12
    assert logits == ("batch", 4)
    assert any("12 samples whose 'label' is ''" in remark for remark in dataset.remarks)


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float64"])
def test_labels_from_one(dtype):
    dataset, logits = make((LABELS + 1).astype(dtype))
    np.testing.assert_array_equal(labels_of(dataset), LABELS)
    assert logits == ("batch", 5)
    assert dataset.labels == ("1", "2", "3", "4", "5")
    assert any("from 1" in remark for remark in dataset.remarks)


def test_labels_from_one_with_as_many_names_or_classes():
    names = tuple("abcde")
    dataset, _ = make(LABELS + 1, names=names)
    np.testing.assert_array_equal(labels_of(dataset), LABELS)
    assert dataset.labels == names
    np.testing.assert_array_equal(labels_of(make(LABELS + 1, count=5)[0]), LABELS)
    # A network with an output for 0, such as a background, is stated by the number of classes.
    dataset, logits = make(LABELS + 1, count=6)
    np.testing.assert_array_equal(labels_of(dataset), LABELS + 1)
    assert logits == ("batch", 6)
    assert any("no labelled training sample: 0" in remark for remark in dataset.remarks)


@pytest.mark.parametrize(
    ("label", "classes"),
    [
        (LABELS * 3, "[0, 3, 6, 9, 12]"),
        (LABELS + 40, "[40, 41, 42, 43, 44]"),
        (np.where(LABELS == 4, 10**12, LABELS), "[0, 1, 2, 3, 1000000000000]"),
        (LABELS + 10**12, str([10**12 + number for number in range(5)])),
        (LABELS.astype(np.uint8) * 51, "[0, 51, 102, 153, 204]"),
    ],
)
def test_gaps_are_asked_for_with_what_to_write(label, classes):
    assert f"data.classes: {classes}" in error_of(label)
    for given in (tuple(np.unique(label).tolist()), "observed"):
        dataset, logits = make(label, classes=given)
        np.testing.assert_array_equal(labels_of(dataset), LABELS)
        assert logits == ("batch", 5)
        assert dataset.labels == tuple(np.unique(label).astype(str))


def test_many_gaps_are_written_in_one_word():
    assert "data.classes: observed" in error_of(np.arange(60) * 7)


def test_classes_may_be_named_and_ordered():
    dataset, _ = make(LABELS * 3, classes={0: "a", 3: "b", 12: "e", 9: "d", 6: "c"})
    assert dataset.labels == ("a", "b", "e", "d", "c")
    np.testing.assert_array_equal(labels_of(dataset), np.array([0, 1, 4, 3, 2])[LABELS])
    assert "holds 12, outside" in error_of(LABELS * 3, classes=[0, 3, 6, 9])
    assert "twice" in error_of(LABELS, classes=[0, 1, 2, 3, 3])
    assert "lists text" in error_of(LABELS, classes=["a", "b", "c", "d", "e"])
    assert "make them agree" in error_of(LABELS, classes=[0, 1, 2, 3, 4], count=6)


@pytest.mark.parametrize(("missing", "split"), [(2, "test"), (4, "test"), (4, "validation")])
def test_labels_that_no_training_sample_has_are_asked_for(missing, split):
    few = missing != LABELS
    splits = {
        "train": {"state": STATE[few], "label": LABELS[few]},
        "test": {"state": STATE, "label": LABELS if split == "test" else LABELS % missing},
        "validation": {
            "state": STATE,
            "label": LABELS if split == "validation" else LABELS % missing,
        },
    }
    said = error_of(LABELS, splits=splits)
    assert f"the {split} split has labels that no training sample has: {missing}" in said
    assert "data.classes: [0, 1, 2, 3, 4]" in said
    dataset, logits = make(LABELS, splits=splits, classes=[0, 1, 2, 3, 4])
    assert logits == ("batch", 5)
    assert any(f"no labelled training sample: {missing}" in r for r in dataset.remarks)


def test_negative_labels():
    assert "data.unlabelled: -100" in error_of(np.where(LABELS == 0, -100, LABELS - 1))
    dataset, logits = make(np.where(LABELS == 0, -100, LABELS - 1), unlabelled=-100)
    np.testing.assert_array_equal(labels_of(dataset), LABELS - 1)
    assert logits == ("batch", 4)
    signs = np.where(LABELS < 2, -1, 1)
    assert "data.classes: [-1, 1]" in error_of(signs)
    dataset, logits = make(signs, classes=[-1, 1])
    np.testing.assert_array_equal(labels_of(dataset), LABELS >= 2)
    assert logits == ("batch", 2)


def test_an_unsigned_label_beyond_int64_is_refused():
    assert "no class number" in error_of(np.where(LABELS == 0, 2**64 - 1, LABELS).astype(np.uint64))


def test_one_label_for_all_is_refused():
    assert "every label of 'label' is 7" in error_of(np.full(60, 7))


def test_the_only_sample_of_a_class_is_trained_on():
    label = np.concatenate([np.arange(58) % 3, [3, 4]])
    dataset, logits = make(label)
    assert {3, 4} <= set(dataset.splits["train"].arrays["label"].tolist())
    assert logits == ("batch", 5)


def test_quantities_stay_quantities():
    raw = RawData({"all": {"state": STATE, "y": np.eye(5)[LABELS] * 2.5}}, "here", "a test")
    assert build_dataset(raw, DataConfig(source="npz")).targets[0].shape == ("batch", 5)
    whole = RawData({"all": {"state": STATE, "y": LABELS.astype(float)}}, "here", "a test")
    (target,) = build_dataset(whole, DataConfig(source="npz"), classes=None).targets
    assert (target.name, target.dtype) == ("target", "float32")


def test_keys_for_classes_without_classes_are_refused():
    raw = RawData({"all": {"state": STATE, "y": STATE}}, "here", "a test")
    with pytest.raises(InputError, match=r"data\.classes is given"):
        build_dataset(raw, DataConfig(source="npz", classes=[1, 2]), classes=None)


def test_a_split_without_labels_goes_with_named_ones():
    words = np.array(["a", "b", "c"])[LABELS % 3]
    splits = {"train": {"state": STATE}, "test": {"state": STATE, "label": words}}
    dataset, _ = make(words, splits=splits)
    assert (dataset.splits["train"].arrays["label"] == -1).all()
    np.testing.assert_array_equal(dataset.splits["test"].arrays["label"], LABELS % 3)


def test_names_that_are_not_utf8_are_refused():
    words = np.array(["cat", "dog", "eel", "fox", "gnu\udcff"])[LABELS]
    assert "not valid UTF-8" in error_of(words)
    assert "not valid UTF-8" in error_of(LABELS, names=("a", "b", "c", "d", "e\udcff"))
