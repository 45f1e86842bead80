"""Files that appear whole, whatever else is written beside them."""

import threading

import pytest

from edgerun.errors import CannotWrite
from edgerun.files import remove, write_whole


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
