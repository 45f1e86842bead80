import io
import pickle
from pathlib import Path

import numpy as np
import pytest

from edgekd.config.pipeline import DataConfig
from edgekd.data import load_dataset, source_fingerprint
from edgekd.errors import InputError

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (40, 6, 5), np.uint8)
LABELS = np.arange(40) % 4


def load(folder: Path, **config):
    return load_dataset(DataConfig(source="npz", path="data.npz", **config), folder, seed=0)


def sizes(dataset):
    return {split: len(samples) for split, samples in dataset.splits.items()}


def test_split_first_names(tmp_path):
    np.savez(
        tmp_path / "data.npz",
        train_image=IMAGES, train_label=LABELS,
        val_image=IMAGES[:5], val_label=LABELS[:5],
        test_image=IMAGES[:7], test_label=LABELS[:7],
        classes=np.array(["a", "b", "c", "d"]),
    )  # fmt: skip
    dataset = load(tmp_path)
    assert sizes(dataset) == {"train": 40, "validation": 5, "test": 7}
    assert dataset.labels == ("a", "b", "c", "d")
    assert dataset.inputs[0].shape == ("batch", 1, 6, 5)


def test_keras_names(tmp_path):
    # Keras' own label files: (N, 1), and of another integer type in test than in train.
    np.savez_compressed(
        tmp_path / "data.npz",
        x_train=IMAGES, y_train=LABELS.astype(np.uint8)[:, None], x_test=IMAGES, y_test=LABELS,
    )  # fmt: skip
    dataset = load(tmp_path)
    assert sizes(dataset) == {"train": 36, "validation": 4, "test": 40}
    assert [spec.name for spec in (*dataset.inputs, *dataset.targets)] == ["image", "label"]


def test_unsplit_arrays_with_several_inputs(tmp_path):
    np.savez(
        tmp_path / "data.npz",
        image=IMAGES, state=RANDOM.normal(size=(40, 3)), action=RANDOM.normal(size=(40, 2)),
    )  # fmt: skip
    dataset = load(tmp_path)
    assert sizes(dataset)["test"] == 8
    assert [spec.name for spec in dataset.inputs] == ["image", "state"]
    assert [spec.name for spec in dataset.targets] == ["action"]
    assert sizes(load(tmp_path, test=0.5))["test"] == 20


def test_split_and_unsplit_names_do_not_mix(tmp_path):
    np.savez(tmp_path / "data.npz", train_image=IMAGES, train_label=LABELS, label=LABELS)
    with pytest.raises(InputError, match="these do not: label"):
        load(tmp_path)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def damaged(kind):
    file = io.BytesIO()
    np.savez(file, image=IMAGES, label=LABELS)
    content = file.getvalue()
    if kind == "empty":
        return b""
    if kind == "cut":
        return content[: len(content) // 2]
    if kind == "flipped":
        changed = bytearray(content)
        changed[600] ^= 0xFF
        return bytes(changed)
    if kind == "npy":
        file = io.BytesIO()
        np.save(file, IMAGES)
        return file.getvalue()
    if kind == "pickle":
        return pickle.dumps(Bomb())
    if kind == "no-arrays":
        file = io.BytesIO()
        np.savez(file)
        return file.getvalue()
    file = io.BytesIO()
    np.savez(file, image=IMAGES, label=np.array([Bomb()] * 40, object))
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("empty", "is empty"),
        ("cut", "truncated"),
        ("flipped", "damaged at array 'image'"),
        ("npy", "single array"),
        ("pickle", "not an npz file"),
        ("no-arrays", "no array"),
        ("objects", "'label' cannot be read: it holds pickled objects"),
    ],
)
def test_damaged_files_and_pickles(tmp_path, kind, said):
    (tmp_path / "data.npz").write_bytes(damaged(kind))
    with pytest.raises(InputError, match=said) as caught:
        load(tmp_path)
    assert caught.value.where == str(tmp_path / "data.npz")
    assert caught.value.remedy


def test_path_is_needed_and_must_exist(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load(tmp_path)
    with pytest.raises(InputError, match="needs a path"):
        load_dataset(DataConfig(source="npz"), tmp_path, seed=0)
    (tmp_path / "data.npz").mkdir()
    with pytest.raises(InputError, match="folder"):
        load(tmp_path)
    with pytest.raises(InputError, match="takes no 'download'"):
        load(tmp_path, download=True)


def test_the_fingerprint_changes_with_the_content(tmp_path):
    config = DataConfig(source="npz", path="data.npz")
    found = []
    for label in (LABELS, LABELS[::-1]):
        np.savez(tmp_path / "data.npz", image=IMAGES, label=label)
        found.append(source_fingerprint(config, tmp_path))
    assert found[0] != found[1]


def test_a_single_number_or_a_structure_is_no_array_of_samples(tmp_path):
    for odd, said in (
        (np.float32(3), "'extra' of train is a single number"),
        (np.zeros(40, [("a", "<f4")]), "dtype .*which no model takes"),
        (np.zeros(40, "<c8"), "dtype complex64"),
        (np.zeros(40, "<M8[s]"), "dtype datetime64"),
    ):
        np.savez(tmp_path / "data.npz", image=IMAGES, label=LABELS, extra=odd)
        with pytest.raises(InputError, match=said):
            load(tmp_path)
    np.savez(tmp_path / "data.npz", image=np.float32(3), label=np.int64(1))
    with pytest.raises(InputError, match="single number"):
        load(tmp_path)


def test_arrays_of_another_byte_order_are_trained_on_as_they_are_meant(tmp_path):
    tokens = RANDOM.integers(0, 9, (40, 5))
    np.savez(tmp_path / "data.npz", tokens=tokens.astype(">i4"), label=LABELS.astype(">i8"))
    dataset = load(tmp_path)
    train = dataset.splits["train"].arrays
    assert train["tokens"].dtype.isnative
    assert set(train["label"]) == {0, 1, 2, 3}
