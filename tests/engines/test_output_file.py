"""What a file to be written may be, said before the work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgekd.engines.output_file import check_output
from edgekd.errors import InputError, StageError


def test_a_new_file_one_from_before_and_a_link_to_one_are_taken_and_left_alone(tmp_path):
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
