import gzip
import hashlib
import struct
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from edgekd.config.pipeline import DataConfig
from edgekd.data import load_dataset, source_fingerprint
from edgekd.data.sources import fashion_mnist
from edgekd.data.sources.fashion_mnist import parse_idx, read_bytes
from edgekd.errors import InputError

BASE = Path()


def idx(array):
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def contents():
    random = np.random.default_rng(0)
    return {
        f"{prefix}-{kind}": idx(random.integers(0, high, shape, np.uint8))
        for prefix, count in (("train", 40), ("t10k", 20))
        for kind, shape, high in (
            ("images-idx3-ubyte", (count, 28, 28), 256),
            ("labels-idx1-ubyte", (count,), 10),
        )
    }


@pytest.fixture
def folder(tmp_path, contents):
    for number, (name, content) in enumerate(contents.items()):
        # Half of them plain, half compressed: both are accepted.
        if number % 2:
            (tmp_path / name).write_bytes(content)
        else:
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    return tmp_path


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, contents):
    """No Debian package, an empty cache, and the checksums of the small stand-in files."""
    monkeypatch.setattr(fashion_mnist, "PACKAGE_FOLDER", tmp_path / "not-installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checksums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(fashion_mnist, "SHA256", checksums)
    return tmp_path / "cache" / "edgekd" / "fashion-mnist"


@pytest.fixture
def served(tmp_path, monkeypatch, contents):
    """A loopback server of the compressed files."""
    root = tmp_path / "served"
    root.mkdir()
    for name, content in contents.items():
        (root / f"{name}.gz").write_bytes(gzip.compress(content))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv(fashion_mnist.URL_VARIABLE, f"http://127.0.0.1:{server.server_port}/")
    yield root
    server.shutdown()
    server.server_close()
    thread.join()


def load(**config):
    return load_dataset(DataConfig(source="fashion-mnist", **config), BASE, seed=0)


def test_files_from_a_path(folder, contents):
    dataset = load(path=str(folder))
    assert [len(dataset.splits[s]) for s in ("train", "validation", "test")] == [36, 4, 20]
    test = dataset.splits["test"].arrays
    assert test["image"].tobytes() == contents["t10k-images-idx3-ubyte"][16:]
    assert test["label"].tolist() == list(contents["t10k-labels-idx1-ubyte"][8:])
    # Another set in the same format must not get the names of clothes.
    assert dataset.labels is None


@pytest.mark.skipif(
    not fashion_mnist.PACKAGE_FOLDER.is_dir(), reason="dataset-fashion-mnist is not installed"
)
def test_the_published_checksums_are_those_of_the_package():
    for name, checksum in fashion_mnist.SHA256.items():
        content = read_bytes(fashion_mnist.PACKAGE_FOLDER / f"{name}.gz")
        assert hashlib.sha256(content).hexdigest() == checksum


def test_missing_data_says_the_three_ways(elsewhere):
    for call in (load, lambda: source_fingerprint(DataConfig(source="fashion-mnist"), BASE)):
        with pytest.raises(InputError) as caught:
            call()
        for way in ("apt install dataset-fashion-mnist", "data.path", "data.download: true"):
            assert way in caught.value.remedy


def test_a_download_is_kept_and_found_again_without_a_server(elsewhere, served):
    config = DataConfig(source="fashion-mnist", download=True)
    before = source_fingerprint(config, BASE)
    assert not elsewhere.exists()
    first = load(download=True)
    for file in served.iterdir():
        file.unlink()
    second = load()
    assert second.labels[9] == "Ankle boot"
    np.testing.assert_array_equal(
        first.splits["train"].arrays["image"], second.splits["train"].arrays["image"]
    )
    # Otherwise the first run after the download would repeat everything.
    assert source_fingerprint(config, BASE) == before


def test_an_interrupted_download_goes_on_where_it_was(elsewhere, served):
    last = served / "t10k-labels-idx1-ubyte.gz"
    content = last.read_bytes()
    last.unlink()
    with pytest.raises(InputError, match=r"download failed.*404"):
        load(download=True)
    assert len(list(elsewhere.iterdir())) == 3
    last.write_bytes(content)
    assert len(load(download=True).splits["test"]) == 20


@pytest.mark.parametrize("damage", ["other", "cut", "plain"])
def test_a_download_that_is_not_the_published_file_is_not_kept(elsewhere, served, damage):
    file = served / "train-images-idx3-ubyte.gz"
    file.write_bytes(
        {
            "other": gzip.compress(b"something else"),
            "cut": file.read_bytes()[:1000],
            "plain": b"<html>",
        }[damage]
    )
    with pytest.raises(InputError):
        load(download=True)
    assert not any(elsewhere.glob("*"))


def test_a_changed_cache_is_noticed(elsewhere, served):
    load(download=True)
    file = elsewhere / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(gzip.compress(idx(np.zeros(20, np.uint8))))
    with pytest.raises(InputError, match="not what was downloaded"):
        load()


def test_the_fingerprint_is_of_the_content(folder):
    config = DataConfig(source="fashion-mnist", path=str(folder))
    before = source_fingerprint(config, BASE)
    file = folder / "t10k-labels-idx1-ubyte"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    after = source_fingerprint(config, BASE)
    assert [name for name in before if before[name] != after[name]] == [file.name]


def test_an_incomplete_folder_names_what_is_missing(folder):
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match="lacks t10k-labels-idx1-ubyte"):
        load(path=str(folder))


def test_idx_round_trip_and_damage():
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    content = idx(array)
    np.testing.assert_array_equal(parse_idx(content, 3, "f"), array)
    for cut, said in (
        (content[:-1], "holds 39 bytes, but 2 x 3 x 4 values need 40"),
        (content + b"x", "holds 41 bytes"),
        (content[:9], "header alone needs 16"),
        (content[:4], "header alone needs 16"),
        (b"", "starts with nothing"),
        (b"PK\3\4" + content, "starts with 504b0304"),
    ):
        with pytest.raises(InputError, match=said):
            parse_idx(cut, 3, "f")
    with pytest.raises(InputError, match="exchanged"):
        parse_idx(content, 1, "f")


def test_a_corrupt_gzip_file_is_named(tmp_path):
    path = tmp_path / "train-images.gz"
    whole = gzip.compress(bytes(range(256)) * 50)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for content in (whole[:-30], bytes(flipped), b"no gzip", whole[:-4] + b"1234"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"after {len(content)} bytes") as caught:
            read_bytes(path)
        assert caught.value.where == str(path)
