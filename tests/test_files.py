"""Arrays of any name in an npz file, by edgekd and by edgerun on a device."""

from __future__ import annotations

import io
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgekd.config.pipeline import DataConfig
from edgekd.data import load_dataset, source_fingerprint
from edgekd.errors import InputError, StageError
from edgekd.files import check_output, files_in, hash_path, require_regular_file, write_npz
from edgerun.npz import write_npz as write_npz_on_device


def put(folder, count, value=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.fromarray(np.full((4, 4, 3), value + number, np.uint8)).save(
            folder / f"{number:02}.png"
        )


@pytest.fixture(params=["split", "class", "inner", "file"])
def linked(tmp_path, request):
    """A folder of photos of which a part is elsewhere, and where that part is."""
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


ARRAYS = {
    "file": np.arange(6, dtype=np.float32).reshape(2, 3),
    "allow_pickle": np.array(True),
    "block/0:out": np.arange(4, dtype=np.uint8)[::2],
    "fortran": np.asfortranarray(np.eye(3)),
    "label": np.array(["cat", "dog"]),
}


@pytest.mark.parametrize("where", ["workstation", "device"])
def test_numpy_reads_them_back(tmp_path, where):
    path = tmp_path / "a.npz"
    if where == "workstation":
        write_npz(path, ARRAYS)
    else:
        content = io.BytesIO()
        write_npz_on_device(content, ARRAYS)
        path.write_bytes(content.getvalue())
    with np.load(path) as archive:
        assert archive.files == list(ARRAYS)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(archive[name], array)
            assert archive[name].dtype == array.dtype


def test_the_same_arrays_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_npz(tmp_path / name, ARRAYS)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_new_file_an_existing_one_and_links_are_accepted_unchanged(tmp_path):
    old, link, dangling = tmp_path / "old", tmp_path / "link", tmp_path / "dangling"
    old.write_bytes(b"content")
    link.symlink_to(old)
    dangling.symlink_to(tmp_path / "later")
    for path in (tmp_path / "new", old, link, dangling):
        check_output(path, "-o", inputs=[tmp_path / "model.onnx"])
    assert old.read_bytes() == b"content"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "link", "old"]


def test_folders_devices_pipes_and_the_model_itself_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "model.onnx").write_bytes(b"model")
    (tmp_path / "link").symlink_to(tmp_path / "model.onnx")
    (tmp_path / "away").symlink_to(tmp_path / "none" / "file")
    bad = ["/dev/full", tmp_path, *(tmp_path / n for n in ("pipe", "none/m", "link", "away"))]
    for path in bad:
        with pytest.raises(InputError) as caught:
            check_output(Path(path), "--output", inputs=[tmp_path / "model.onnx"])
        assert caught.value.where == str(path)
        assert "--output" in caught.value.remedy


def test_what_is_only_written_to_may_be_a_device_or_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    check_output(tmp_path / "pipe", "--json", stream=True)
    check_output(Path("/dev/null"), "--json", stream=True)
    with pytest.raises(InputError):
        check_output(tmp_path, "--json", stream=True)


def test_a_name_that_no_folder_takes_is_no_traceback(tmp_path):
    with pytest.raises(StageError, match="too long"):
        check_output(tmp_path / ("a" * 300), "-o")


def readers():
    """What reads a file that a user names, by what it is."""
    from edgekd.config.budgets import GateConfig
    from edgekd.config.loader import load_section
    from edgekd.data.sources.fashion_mnist import read_bytes
    from edgekd.models.weights import read_checkpoint
    from edgekd.onnx.file import check_onnx, describe_onnx
    from edgerun.npz import NpzFile

    def images(path):
        put(path.parent / "photos" / "b", 5)
        folder = path.parent / "photos" / "a"
        put(folder, 5)
        (folder / "x.png").symlink_to(path)
        config = DataConfig(source="image-folder", path=str(folder.parent))
        assert source_fingerprint(config, folder)
        load_dataset(config, folder, seed=0)

    def source(path):
        load_dataset(DataConfig(source="npz", path=str(path)), path.parent, seed=0)

    def fingerprint(path):
        source_fingerprint(DataConfig(source="npz", path=str(path)), path.parent)

    return {
        "yaml": lambda path: load_section(path, GateConfig),
        "safetensors": lambda path: read_checkpoint(path.rename(path.with_suffix(".safetensors"))),
        "torch": lambda path: read_checkpoint(path.rename(path.with_suffix(".pt"))),
        "onnx": describe_onnx,
        "checked onnx": check_onnx,
        "npz": lambda path: NpzFile(path, InputError),
        "data": source,
        "fingerprint": fingerprint,
        "idx": read_bytes,
        "image": images,
        "hash": hash_path,
    }


@pytest.mark.skipif(os.name == "nt", reason="pipes with a name")
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("reader", sorted(readers()))
def test_pipes_sockets_and_devices_are_refused_before_they_are_read(tmp_path, kind, reader):
    path = tmp_path / "input"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(InputError, match=f"this is a {kind}, not a file"):
        readers()[reader](path)


def test_a_loop_of_links_and_a_name_of_a_zero_are_errors_too(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for path in (tmp_path / "a", tmp_path / "zero\0"):
        with pytest.raises(InputError, match="cannot be read"):
            require_regular_file(path)
    require_regular_file(tmp_path / "none")
