import contextlib

import numpy as np
import pytest
from PIL import Image

from edgekd.config.pipeline import DataConfig
from edgekd.data import dataset as memory
from edgekd.data import load_dataset, source_fingerprint
from edgekd.errors import InputError


def put(root, name, count=10, size=(6, 4), value=100, suffix="png"):
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.full((*size, 3), value + number, np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.{suffix}")
    return folder


def load(root, **config):
    return load_dataset(DataConfig(source="image-folder", path=str(root), **config), root, seed=0)


@pytest.fixture
def classes(tmp_path):
    put(tmp_path, "dog", value=10)
    put(tmp_path, "cat", value=200)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def test_unsplit_class_folders(classes):
    dataset = load(classes, test=0.3)
    assert dataset.labels == ("cat", "dog")
    assert dataset.inputs[0].shape == ("batch", 3, 6, 4)
    assert {s: len(v) for s, v in dataset.splits.items()} == {
        "train": 13, "validation": 1, "test": 6
    }  # fmt: skip
    for split in dataset.splits.values():
        for image, label in zip(split.arrays["image"], split.arrays["label"], strict=True):
            assert (image.mean() < 100) == (dataset.labels[label] == "dog")


def test_split_folders_grey_and_resized(tmp_path):
    for split in ("train", "test"):
        put(tmp_path / split, "a", value=10)
        put(tmp_path / split, "b", value=200, size=(9, 9), suffix="jpg")
    dataset = load(tmp_path, image_size=(8, 5), args={"mode": "L"})
    assert dataset.inputs[0].shape == ("batch", 1, 8, 5)
    assert {s: len(v) for s, v in dataset.splits.items()} == {
        "train": 18, "validation": 2, "test": 20
    }  # fmt: skip
    assert dataset.splits["test"].arrays["image"].dtype == np.uint8


def test_layout_of_pixels_and_orientation(tmp_path):
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        put(tmp_path / "train", name, count=5)
    pixels = random.integers(0, 256, (6, 4, 3), np.uint8)
    (tmp_path / "test" / "a").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "test" / "a" / "0.png")
    # Stored turned by 90 degrees, with the EXIF tag (274) for the rotation back.
    turned = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[274] = 6
    turned.save(tmp_path / "test" / "a" / "1.png", exif=exif)
    images = load(tmp_path).splits["test"].arrays["image"]
    np.testing.assert_array_equal(images[0], pixels.transpose(2, 0, 1))
    np.testing.assert_array_equal(images[1], images[0])


def test_large_folders_do_not_fill_the_memory(classes, monkeypatch):
    expected = load(classes).splits["train"].arrays["image"]
    monkeypatch.setattr(memory, "IN_MEMORY_BYTES", 100)
    found = load(classes).splits["train"].arrays["image"]
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, expected)


def test_differing_sizes_name_two_files_and_the_key(classes):
    put(classes, "dog", count=1, size=(5, 5))
    with pytest.raises(InputError) as caught:
        load(classes)
    said = str(caught.value)
    assert "00.png is 6x4" in said
    assert "00.png is 5x5" in said
    assert "data.image_size" in said


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_corrupt_image_is_named(tmp_path, suffix):
    folder = put(tmp_path, "cat", suffix=suffix)
    file = folder / f"03.{suffix}"
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (6, 4, 3), np.uint8)).save(file)
    whole = file.read_bytes()
    for content in (b"", b"no image", whole[:20], whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(InputError, match="cannot be decoded") as caught:
            load(tmp_path)
        assert caught.value.where == str(file)


def test_sixteen_bits_are_not_silently_clipped(classes):
    Image.fromarray(np.full((6, 4), 40000, np.uint16)).save(classes / "cat" / "16.png")
    with pytest.raises(InputError, match="more than 8 bits"):
        load(classes)


def test_wrong_folders(tmp_path, classes):
    (classes / "empty").mkdir()
    with pytest.raises(InputError, match="'empty' has no images"):
        load(classes)
    with pytest.raises(InputError, match="no class folders"):
        load(classes / "empty")
    with pytest.raises(InputError, match="no folder"):
        load(classes / "cat" / "notes.txt")
    with pytest.raises(InputError, match="'RGBA'"):
        load(classes, args={"mode": "RGBA"})


def test_a_class_only_in_test_is_an_error(tmp_path):
    put(tmp_path / "train", "a")
    put(tmp_path / "test", "b")
    with pytest.raises(InputError, match="'b' of test has no images in train"):
        load(tmp_path)


def test_the_fingerprint_is_of_names_and_contents(classes):
    config = DataConfig(source="image-folder", path=str(classes))
    first = source_fingerprint(config, classes)
    assert source_fingerprint(config, classes) == first
    (classes / "cat" / "00.png").rename(classes / "cat" / "99.png")
    second = source_fingerprint(config, classes)
    put(classes, "cat", count=2, value=50)
    third = source_fingerprint(config, classes)
    assert len({str(f) for f in (first, second, third)}) == 3


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 4 6
%%EndComments
showpage
"""


@pytest.mark.parametrize("name", ["03.png", "03.jpg", "03.tif"])
def test_a_file_of_another_format_starts_no_program(classes, monkeypatch, name):
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a program was started"))
    file = classes / "cat" / name
    file.write_bytes(EPS)
    with pytest.raises(InputError, match="cannot be decoded") as caught:
        load(classes)
    assert caught.value.where == str(file)


def test_an_image_that_is_a_decompression_bomb_is_refused(classes, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for side in (40, 400):  # a warning of Pillow's, and an error
        Image.new("RGB", (side, side)).save(classes / "cat" / "huge.png")
        with pytest.raises(InputError, match="could be decompression bomb") as caught:
            load(classes)
        assert caught.value.where == str(classes / "cat" / "huge.png")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", ["png", "gif", "bmp", "tif", "webp", "ppm"])
def test_whatever_is_wrong_with_an_image_is_an_input_error(classes, suffix):
    file = classes / "cat" / f"00.{suffix}"
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (6, 4, 3), np.uint8)).save(file)
    whole = file.read_bytes()
    for _ in range(60):
        changed = bytearray(whole)
        for place in random.integers(0, len(whole), 3):
            changed[place] = random.integers(0, 256)
        file.write_bytes(changed)
        with contextlib.suppress(InputError):
            load(classes)
