"""Files that appear complete, whatever else is written next to them."""

import errno
import os
import subprocess
import sys
import threading

import pytest

from edgerun.errors import CannotWrite
from edgerun.files import atomic_write, remove, write_whole


def test_files_of_one_folder_do_not_meet_while_they_are_written(tmp_path):
    failures = []

    def write(name, content):
        try:
            for _ in range(100):
                write_whole(tmp_path / name, content)
                assert (tmp_path / name).read_bytes() == content
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(str(i), bytes([i]) * 9999)) for i in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_a_name_as_long_as_a_name_can_be(tmp_path):
    write_whole(tmp_path / ("n" * 255), b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["n" * 255]
    with pytest.raises(CannotWrite) as caught:
        write_whole(tmp_path / ("n" * 256), b"x")
    assert caught.value.remedy == "choose a shorter name"
    assert [path.name for path in tmp_path.iterdir()] == ["n" * 255]


def test_what_is_not_there_is_removed_already(tmp_path):
    remove(tmp_path / "none")
    (tmp_path / "file").touch()
    remove(tmp_path / "file")
    assert not any(tmp_path.iterdir())
    with pytest.raises(CannotWrite):
        remove(tmp_path)


def test_leftovers_of_a_killed_process_are_removed_unless_recent(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    final = tmp_path / "engine.bin"
    with atomic_write(final) as partial:
        partial.write_bytes(b"x")
        key = partial.name.split(".")[1]
        names = {
            "old": f".{key}.{ended.pid}-0.part.bin",
            "new": f".{key}.{ended.pid}-1.part.bin",
            "alive": f".{key}.{os.getpid()}-9.part.bin",
            "other": f".00000000.{ended.pid}-0.part.bin",
        }
        for name in names.values():
            (tmp_path / name).write_bytes(b"part")
        for name in ("old", "alive", "other"):
            os.utime(tmp_path / names[name], (0, 0))
        write_whole(final, b"y")
    assert final.read_bytes() == b"x"
    left = {name for name, file in names.items() if (tmp_path / file).exists()}
    assert left == {"new", "alive", "other"}


def write_half(path, error):
    with atomic_write(path) as partial:
        partial.write_bytes(b"half")
        raise error


def test_a_body_that_fails_or_writes_nothing_changes_nothing(tmp_path):
    final = tmp_path / "model.onnx"
    final.write_bytes(b"before")
    with pytest.raises(CannotWrite, match="the file cannot be written"):
        write_half(final, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(RuntimeError):
        write_half(final, RuntimeError())
    with atomic_write(final) as partial:
        assert partial.suffix == ".onnx"
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [
        ("model.onnx", b"before")
    ]
