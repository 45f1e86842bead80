import numpy as np
import pytest
from PIL import Image

from edgekd.config.data import DataConfig
from edgekd.data import load_dataset, source_fingerprint
from edgekd.errors import InputError
from edgekd.files import files_in, hash_path


def put(folder, count, value=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.fromarray(np.full((4, 4, 3), value + number, np.uint8)).save(
            folder / f"{number:02}.png"
        )


@pytest.fixture(params=["split", "class", "inner", "file"])
def linked(tmp_path, request):
    """A folder of photos of which a part lies elsewhere, and where that part is."""
    photos, away = tmp_path / "photos", tmp_path / "away"
    for split in ("train", "test"):
        for number, name in enumerate(("a", "b")):
            put(photos / split / name / "deep", 10, 100 * number)
    part = {
        "split": photos / "train",
        "class": photos / "train" / "a",
        "inner": photos / "train" / "a" / "deep",
        "file": photos / "train" / "a" / "deep" / "00.png",
    }[request.param]
    part.rename(away)
    part.symlink_to(away)
    changed = {
        "split": away / "a" / "deep" / "00.png",
        "class": away / "deep" / "00.png",
        "inner": away / "00.png",
        "file": away,
    }[request.param]
    return photos, changed


def test_what_lies_behind_a_link_is_read_and_belongs_to_the_fingerprint(linked):
    photos, changed = linked
    config = DataConfig(source="image-folder", path=str(photos))
    dataset = load_dataset(config, photos, seed=0)
    assert len(dataset.splits["train"]) + len(dataset.splits["validation"]) == 20
    before = source_fingerprint(config, photos)
    assert source_fingerprint(config, photos) == before
    Image.new("RGB", (4, 4), (9, 9, 9)).save(changed, format="PNG")
    after = source_fingerprint(config, photos)
    assert after != before
    changed.unlink()
    assert source_fingerprint(config, photos) not in (before, after)


def test_links_that_lead_back_do_not_go_round_for_ever(tmp_path):
    put(tmp_path / "a" / "b", 2)
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a")
    (tmp_path / "twice").symlink_to(tmp_path / "a" / "b")
    found = [str(file.relative_to(tmp_path)) for file in files_in(tmp_path)]
    assert found == ["a/b/00.png", "a/b/01.png", "twice/00.png", "twice/01.png"]
    assert hash_path(tmp_path) == hash_path(tmp_path)


def test_hidden_files_and_those_of_systems_are_no_images(tmp_path):
    config = DataConfig(source="image-folder", path=str(tmp_path), test=0.3)
    for name in ("a", "b"):
        put(tmp_path / name, 10)
    before = source_fingerprint(config, tmp_path)
    for name in (".DS_Store", "._00.png", "Thumbs.db", "desktop.ini"):
        (tmp_path / "a" / name).write_bytes(b"x")
    for name in ("__MACOSX", ".ipynb_checkpoints"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "00.png").write_bytes(b"x")
    dataset = load_dataset(config, tmp_path, seed=0)
    assert dataset.labels == ("a", "b")
    assert sum(len(split) for split in dataset.splits.values()) == 20
    assert source_fingerprint(config, tmp_path) == before


def test_an_image_that_is_a_link_to_nothing_is_named(tmp_path):
    put(tmp_path / "a", 5)
    put(tmp_path / "b", 5)
    (tmp_path / "a" / "99.png").symlink_to(tmp_path / "gone.png")
    config = DataConfig(source="image-folder", path=str(tmp_path))
    assert source_fingerprint(config, tmp_path)
    with pytest.raises(InputError, match="cannot be decoded"):
        load_dataset(config, tmp_path, seed=0)


def test_two_folders_of_the_same_bytes_under_other_names_differ(tmp_path):
    for name in ("a\nb", "a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "x").write_text("1")
    (tmp_path / "b" / "y").write_text("1")
    assert hash_path(tmp_path / "a") != hash_path(tmp_path / "b")
