from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edgekd.config.pipeline import DataConfig
from edgekd.data import load_dataset
from edgekd.data.splits import choose_split, looks_like_split, split_and_name, split_of
from edgekd.errors import InputError


@given(
    members=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    fraction=st.floats(0.05, 0.95),
    what=st.sampled_from(["test", "validation"]),
)
def test_every_class_gives_its_share_to_within_one(members, fraction, what):
    labels = np.repeat(np.arange(len(members)) * 7 - 3, members)
    count = len(labels)
    if not 0 < round(count * fraction) < count:
        return
    keep, chosen = choose_split(count, fraction, labels, what, "here")
    np.testing.assert_array_equal(np.sort(np.concatenate([keep, chosen])), np.arange(count))
    assert len(chosen) == round(count * fraction)
    taken = np.array([(labels[chosen] == label).sum() for label in np.unique(labels)])
    assert (np.abs(taken - np.array(members) * fraction) <= 1 + 1e-9).all()


def test_the_choice_is_the_same_again_and_differs_for_test_and_validation():
    labels = np.arange(200) % 4
    first, again = (choose_split(200, 0.2, labels, "test", "here")[1] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert set(first) != set(choose_split(200, 0.2, labels, "validation", "here")[1])


def test_sorted_classes_are_cut_at_random_within_each_class():
    labels = np.repeat([0, 1], 500)
    _, chosen = choose_split(1000, 0.1, labels, "validation", "here")
    # Taking the first of each class would be the classic mistake on sorted files.
    assert chosen[labels[chosen] == 0].max() > 250
    assert chosen[labels[chosen] == 1].max() > 750


@pytest.mark.parametrize(("count", "fraction"), [(3, 0.1), (1, 0.5), (3, 0.9), (1, 0.9)])
def test_a_split_without_samples_is_an_error(count, fraction):
    with pytest.raises(InputError, match="sample"):
        choose_split(count, fraction, None, "validation", "here")


LABELS = np.arange(30) % 3
SIZES = {"train": 30, "validation": 12, "test": 9}


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (("train", "Training", "TRAIN", "train_set", "trainset", "train2017"), "train"),
        (("val", "valid", "Validation", "dev", "DEV", "valid_data"), "validation"),
        (("test", "Testing", "Test-Set"), "test"),
        (("trainer", "latest", "valence", "cat", "eval", "contest"), None),
    ],
)
def test_names_of_splits(names, split):
    assert {split_of(name) for name in names} == {split}


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("train_image", ("train", "image")),
        ("X_valid", ("validation", "X")),
        ("y_TEST", ("test", "y")),
        ("trainX", ("train", "X")),
        ("ytest", ("test", "y")),
        ("train_set_x", ("train", "x")),
        ("imagesDev", ("validation", "images")),
        ("dev/label", ("validation", "label")),
        ("contest", None),
        ("latest", None),
        ("valence", None),
        ("restrain_x", None),
        ("image", None),
    ],
)
def test_names_of_arrays(name, read):
    assert split_and_name(name) == read


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train", "x_val", "y_val", "x_test", "y_test"),
        ("trainX", "trainY", "validX", "validY", "testX", "testY"),
        ("Training_x", "Training_y", "Validation_x", "Validation_y", "Testing_x", "Testing_y"),
        ("X_train", "y_train", "X_dev", "y_dev", "X_test", "y_test"),
    ],
)
@pytest.mark.parametrize("source", ["npz", "function"])
def test_arrays_come_into_their_splits(names, source, tmp_path):
    arrays = {}
    for (images, labels), size in zip(
        (names[:2], names[2:4], names[4:]), SIZES.values(), strict=True
    ):
        arrays[images] = np.zeros((size, 5, 4), np.uint8)
        arrays[labels] = LABELS[:size]
    np.savez(tmp_path / "d.npz", **arrays)
    if source == "npz":
        config = DataConfig(source="npz", path="d.npz")
    else:
        module = f"arrays_{tmp_path.name}"
        (tmp_path / f"{module}.py").write_text(
            "import numpy as np\ndef load(path): return dict(np.load(path))\n"
        )
        config = DataConfig(source=f"{module}:load", path="d.npz")
    dataset = load_dataset(config, tmp_path, seed=0)
    assert {split: len(samples) for split, samples in dataset.splits.items()} == SIZES
    assert [s.name for s in (*dataset.inputs, *dataset.targets)] == ["image", "label"]


def test_keys_of_a_function_are_splits_by_any_name(tmp_path):
    module = f"keys_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(
        "import numpy as np\n"
        "def part(n): return {'state': np.ones((n, 2)), 'label': np.arange(n) % 3}\n"
        "def load(): return {'Training': part(30), 'valid': part(12), 'TEST': part(9)}\n"
        "def twice(): return {'train': part(30), 'val': part(12), 'dev': part(9)}\n"
        "def loose(): return {'Training': part(30), 'valid': 3}\n"
    )
    dataset = load_dataset(DataConfig(source=f"{module}:load"), tmp_path, seed=0)
    assert {split: len(samples) for split, samples in dataset.splits.items()} == SIZES
    with pytest.raises(InputError, match="'val' and 'dev' both name the same split"):
        load_dataset(DataConfig(source=f"{module}:twice"), tmp_path, seed=0)
    with pytest.raises(InputError, match="the split 'valid'"):
        load_dataset(DataConfig(source=f"{module}:loose"), tmp_path, seed=0)


def folders(root, *names):
    for name, size in zip(names, SIZES.values(), strict=False):
        for number in range(size):
            file = root / name / f"class{number % 3}" / f"{number:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((6, 5, 3), number, np.uint8)).save(file)
    return root


def load(root, **config):
    return load_dataset(DataConfig(source="image-folder", path=str(root), **config), root, seed=0)


@pytest.mark.parametrize(
    "names",
    [
        ("train", "valid", "test"),
        ("Training", "Validation", "Testing"),
        ("TRAIN", "dev", "Test_Set"),
    ],
)
def test_split_folders_by_any_usual_name(tmp_path, names):
    dataset = load(folders(tmp_path, *names))
    assert {split: len(samples) for split, samples in dataset.splits.items()} == SIZES
    assert dataset.labels == ("class0", "class1", "class2")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("train", "eval", "test"), "it is not known which 'eval' is"),
        (("tr", "te"), "look like splits"),
        (("my-eval", "holdout"), "look like splits"),
        (("test", "val"), "none is for training"),
        (("train", "val", "validation"), "both name the same split"),
    ],
)
def test_folders_that_look_like_splits_are_never_taken_for_classes(tmp_path, names, said):
    assert all(map(looks_like_split, names))
    with pytest.raises(InputError, match=said) as caught:
        load(folders(tmp_path, *names))
    assert caught.value.exit_code == 2


def test_the_folders_of_the_splits_can_be_said(tmp_path):
    folders(tmp_path, "tr", "te", "last")
    given = {"test": "last", "train": "tr", "validation": "te"}
    dataset = load(tmp_path, args={"splits": given})
    assert {split: len(samples) for split, samples in dataset.splits.items()} == SIZES
    dataset = load(tmp_path, args={"splits": False})
    assert dataset.labels == ("last", "te", "tr")
    for wrong, said in (
        ({"train": "nowhere"}, "no folder 'nowhere'"),
        ({"trian": "tr"}, "did you mean 'train'"),
        ({"test": "last"}, "names no train"),
        ("tr", "splits is 'tr'"),
    ):
        with pytest.raises(InputError, match=said):
            load(tmp_path, args={"splits": wrong})


def test_folders_beside_the_splits_are_named(tmp_path):
    folders(tmp_path, "train", "valid", "test")
    (tmp_path / "notes").mkdir()
    (remark,) = load(tmp_path).remarks
    assert remark.endswith("not read: notes")
