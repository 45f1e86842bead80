"""Faults of the teacher cache: what it survives, and what it never returns as an output."""

import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from edgekd.distill import cache as cache_module
from edgekd.errors import InputError, StageError
from edgekd.spec import SAMPLE, VIEW
from tests.distill.small_cache import (
    BLOCK,
    SAMPLES,
    VIEWS,
    Teacher,
    assert_right,
    fill,
    once,
)
from tests.progress import RecordedProgress


@pytest.fixture(params=["in memory", "on disk"], autouse=True)
def large(request, monkeypatch):
    """Whether the cache is too large for memory."""
    large = request.param == "on disk"
    if large:
        monkeypatch.setattr(cache_module, "HELD_BYTES", 0)
    return large


def test_a_teacher_that_falls_over_leaves_whole_blocks(tmp_path):
    first, progress = Teacher(fail_after=31), RecordedProgress()
    with pytest.raises(RuntimeError, match="fell over"):
        fill(tmp_path, first, progress)
    assert not progress.open
    second = Teacher()
    assert_right(fill(tmp_path, second))
    twice = [pair for pair, n in (first.asked + second.asked).items() if n > 1]
    assert set(first.asked | second.asked) == set(once())
    # Only the computed samples of the unfinished block.
    assert len(twice) < BLOCK


KILLED = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.distill.small_cache import Teacher, fill
fill(Path({folder!r}), Teacher(seconds=0.1))
"""


def test_a_killed_process_leaves_whole_blocks(tmp_path):
    code = KILLED.format(root=str(Path(__file__).parents[2]), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while sum(f.stat().st_size for f in tmp_path.glob("*/blocks.bin")) < 3 * 8:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    teacher = Teacher()
    assert_right(fill(tmp_path, teacher))
    assert set(teacher.asked.values()) == {1}
    kept = SAMPLES * VIEWS - teacher.asked.total()
    assert 3 * BLOCK <= kept < SAMPLES * VIEWS


@pytest.mark.parametrize("file", ["answers.bin", "blocks.bin"])
def test_no_flipped_bit_is_ever_an_answer(tmp_path, file):
    path = fill(tmp_path).folder / file
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for at in generator.choice(len(whole), 25, replace=False):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        teacher = Teacher()
        assert_right(fill(tmp_path, teacher))
        assert 0 < teacher.asked.total() <= BLOCK
        assert path.read_bytes() == whole


def test_damage_found_while_training_is_mended_then_and_said(tmp_path):
    teacher, progress = Teacher(), RecordedProgress()
    cached = fill(tmp_path, teacher, progress)
    path = cached.folder / "answers.bin"
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size // 2)
        stream.write(b"rotten")
    assert_right(cached)
    assert (teacher.asked - once()).total() == BLOCK
    assert len(progress.messages) == 1
    assert "view 1, samples 10 to 14" in progress.messages[0]


@pytest.mark.parametrize("file", ["answers.bin", "blocks.bin"])
@pytest.mark.parametrize("part", [0.0, 0.4, 0.99])
def test_a_truncated_file_is_filled_up(tmp_path, file, part):
    path = fill(tmp_path).folder / file
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    teacher = Teacher()
    cached = fill(tmp_path, teacher)
    assert path.read_bytes() == whole
    assert_right(cached)
    assert teacher.asked.total() <= SAMPLES * VIEWS * (1 - part) + BLOCK


def test_a_cache_deleted_during_training_is_rebuilt_where_needed(tmp_path, large):
    teacher = Teacher()
    cached = fill(tmp_path, teacher)
    assert_right(cached)
    shutil.rmtree(cached.folder)
    assert_right(cached)
    assert set(teacher.asked.values()) == {2 if large else 1}
    assert cached.folder.exists() is large
    cached.folder.mkdir(exist_ok=True)
    (cached.folder / "answers.bin").write_bytes(b"")
    assert_right(cached)
    assert set(teacher.asked.values()) == {3 if large else 1}
    assert_right(fill(tmp_path, teacher))
    assert set(teacher.asked.values()) == {3 if large else 2}


def test_a_disk_that_loses_what_it_is_given(tmp_path, monkeypatch):
    cached = fill(tmp_path)
    (cached.folder / "answers.bin").write_bytes(b"")
    monkeypatch.setattr("edgekd.distill.cache_store._write", lambda *a, **k: None)
    with pytest.raises(StageError, match=r"block 0 .* does not read as it was written"):
        cached.predict({SAMPLE: torch.tensor([0]), VIEW: torch.tensor([0])})


def test_a_block_in_another_place_is_no_answer(tmp_path):
    folder = fill(tmp_path).folder
    for name in ("answers.bin", "blocks.bin"):
        content = (folder / name).read_bytes()
        third = len(content) // VIEWS
        swapped = content[third : 2 * third] + content[:third] + content[2 * third :]
        (folder / name).write_bytes(swapped)
    teacher = Teacher()
    assert_right(fill(tmp_path, teacher))
    assert teacher.asked == once(2)


@contextmanager
def largest_file(size):
    """The system refuses to let a file grow beyond this, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_what_was_written(tmp_path):
    record = 4 * (40 + 6)
    with (
        largest_file(12 * record),
        pytest.raises(StageError, match=r"10 outputs are cached"),
    ):
        fill(tmp_path)
    teacher = Teacher()
    assert_right(fill(tmp_path, teacher))
    assert teacher.asked.total() == SAMPLES * VIEWS - 10


def test_a_disk_that_is_too_small_is_said_before_the_teacher_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "disk_usage", lambda folder: usage(free=1000))
    teacher = Teacher()
    with pytest.raises(StageError, match="MB are free"):
        fill(tmp_path, teacher)
    assert not teacher.asked


def usage(free):
    return SimpleNamespace(free=free)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((StageError, InputError)):
        fill(tmp_path / "file")
