"""An artifact is complete or absent, and a damaged one is not used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgekd.errors import InputError
from edgekd.pipeline.store import Store

PRINT = "f" * 64


def put(store: Store, content: str = "content") -> Path:
    folder = store.begin("data", PRINT)
    (folder / "sub").mkdir()
    (folder / "sub" / "a.txt").write_text(content)
    return store.commit("data", PRINT, folder, {"config": {}}).folder


def test_round_trip(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store)
    found = store.find("data", PRINT)
    assert found is not None
    assert (found.folder / "sub" / "a.txt").read_text() == "content"
    assert store.find("data", "e" * 64) is None


def test_unfinished_artifact_is_not_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (store.begin("data", PRINT) / "half.txt").write_text("half")
    assert store.find("data", PRINT) is None


def test_digest_depends_on_contents_only(tmp_path: Path) -> None:
    digests = set()
    for name, content in (("a", "x"), ("b", "x"), ("c", "y")):
        store = Store(tmp_path / name)
        put(store, content)
        found = store.find("data", PRINT)
        assert found is not None
        digests.add(found.digest)
    assert len(digests) == 2


def test_touched_file_is_kept_and_changed_or_missing_file_is_not(tmp_path: Path) -> None:
    store = Store(tmp_path)
    file = put(store) / "sub" / "a.txt"
    os.utime(file, ns=(1, 1))
    assert store.find("data", PRINT) is not None
    file.write_text("CONTENT")
    assert store.find("data", PRINT) is None
    file.unlink()
    assert store.find("data", PRINT) is None


def test_corrupt_record_means_absent(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (put(store) / "artifact.json").write_text("{")
    assert store.find("data", PRINT) is None
    assert store.latest("data") is None


def test_any_flipped_bit_in_the_record_means_absent(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record = put(store) / "artifact.json"
    written = record.read_bytes()
    for position in range(len(written)):
        record.write_bytes(bytes(b ^ (position == i) for i, b in enumerate(written)))
        found = store.find("data", PRINT)
        assert found is None, written[position - 5 : position + 5]
    record.write_bytes(written)
    assert store.find("data", PRINT) is not None


def test_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from edgekd.pipeline.store import Store\n"
        "store = Store(Path(sys.argv[1])); store.acquire()\n"
        "print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"process {holder.pid}"):
            Store(tmp_path).acquire()
        holder.kill()
    store = Store(tmp_path)
    store.acquire()
    store.release()


def test_acquire_clears_what_a_kill_left(tmp_path: Path) -> None:
    leftover = Store(tmp_path).begin("data", PRINT)
    store = Store(tmp_path)
    store.acquire()
    store.release()
    assert not leftover.exists()


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--output"):
        Store(tmp_path / "file" / "run").acquire()


def test_link_follows_the_newest_artifact(tmp_path: Path) -> None:
    store = Store(tmp_path)
    put(store)
    found = store.find("data", PRINT)
    assert found is not None
    for _ in range(2):
        assert (store.link("data", found) / "sub" / "a.txt").read_text() == "content"
