"""Stages run once, again when what they depend on changes, and resume after a failure."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edgekd.config.pipeline import PipelineConfig
from edgekd.config.profile import load_profile
from edgekd.errors import InputError, StageError
from edgekd.extension import resolve
from edgekd.pipeline.runner import Runner, is_disk_full, plan, stages_until
from edgekd.pipeline.stage import Context, Job
from edgekd.pipeline.store import Store
from edgekd.progress import EventLog
from edgekd.stages import STAGES
from tests.progress import RecordedProgress


@dataclass
class Recorded:
    """A stage that writes a text, counts its runs and fails on request."""

    name: str
    key: str
    inputs: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    text: str = "same"
    fails_with: Exception | None = None
    runs: list[str] = field(default_factory=list)

    def config_slice(self, job: Job) -> dict[str, Any]:
        return {self.key: getattr(job.config, self.key)}

    def run(self, context: Context, inputs: Mapping[str, Path]) -> None:
        self.runs.append(self.name)
        (context.scratch / "checkpoint").write_text("epoch 1")
        (context.out / "out.txt").write_text(self.text)
        if self.fails_with is not None:
            raise self.fails_with


def job(tmp_path: Path, **changes: Any) -> Job:
    values = {
        "name": "n",
        "data": {"source": "digits"},
        "teacher": {"model": "m", "train": {}},
        "student": {"model": "s"},
    }
    config = PipelineConfig.model_validate(values | changes)
    return Job(config, tmp_path, load_profile("host"))


@pytest.fixture
def stages():
    first = Recorded("first", "seed")
    second = Recorded("second", "target", inputs=("first",))
    third = Recorded("third", "name", inputs=("second",))
    return (first, second, third)


def run(made: Job, folder: Path, stages: tuple[Recorded, ...]) -> list[str]:
    return Runner(made, Store(folder), RecordedProgress(), stages=stages).run().ran


def test_second_run_does_nothing(tmp_path: Path, stages) -> None:
    assert run(job(tmp_path), tmp_path / "r", stages) == ["first", "second", "third"]
    assert run(job(tmp_path), tmp_path / "r", stages) == []


def test_changed_key_reruns_what_depends_on_it(tmp_path: Path, stages) -> None:
    run(job(tmp_path), tmp_path / "r", stages)
    stages[1].text = "other"
    changed = job(tmp_path, target="ssh://board")
    rows = plan(changed, tmp_path / "r", stages=stages)
    assert [row.action for row in rows] == ["cached", "run", "run"]
    assert "target local → ssh://board" in rows[1].reason
    assert run(changed, tmp_path / "r", stages) == ["second", "third"]
    assert run(job(tmp_path), tmp_path / "r", stages) == [], "the old result is still there"


def test_rerun_with_the_same_result_stops_there(tmp_path: Path, stages) -> None:
    run(job(tmp_path), tmp_path / "r", stages)
    assert run(job(tmp_path, target="ssh://board"), tmp_path / "r", stages) == ["second"]


def test_plan_writes_nothing(tmp_path: Path, stages) -> None:
    rows = plan(job(tmp_path), tmp_path / "r", stages=stages)
    assert [row.action for row in rows] == ["run"] * 3
    assert not (tmp_path / "r").exists()


def test_failure_keeps_what_is_done_and_the_checkpoint(tmp_path: Path, stages) -> None:
    stages[1].fails_with = ValueError("of the user's own making")
    with pytest.raises(StageError, match="of the user's own making"):
        run(job(tmp_path), tmp_path / "r", stages)
    assert list((tmp_path / "r" / "scratch").glob("second-*/checkpoint"))
    stages[1].fails_with = None
    assert run(job(tmp_path), tmp_path / "r", stages) == ["second", "third"]
    assert not list((tmp_path / "r" / "scratch").glob("second-*"))


def test_damaged_artifact_is_made_again(tmp_path: Path, stages) -> None:
    folder = tmp_path / "r"
    run(job(tmp_path), folder, stages)
    next(folder.glob("artifacts/second/*/out.txt")).write_text("bit rot")
    assert run(job(tmp_path), folder, stages) == ["second"]


def test_full_disk_is_said_and_leaves_the_store_consistent(tmp_path: Path, stages) -> None:
    stages[1].fails_with = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(StageError, match="the disk is full"):
        run(job(tmp_path), tmp_path / "r", stages)
    assert not list((tmp_path / "r").glob("artifacts/*/.tmp-*"))
    assert [row.action for row in plan(job(tmp_path), tmp_path / "r", stages=stages)] == [
        "cached",
        "run",
        "run",
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that is full")
def test_full_disk_is_named_when_the_log_cannot_be_written() -> None:
    log = EventLog(Path("/dev/full"))
    with pytest.raises(StageError, match=r"the log cannot be written: No space left"):
        log.write("message", text="x")
    log.close()


def test_disk_full_is_found_behind_a_library_error(tmp_path: Path) -> None:
    error = RuntimeError("serialization failed")
    error.__cause__ = OSError(errno.ENOSPC, "x")
    assert is_disk_full(error, tmp_path)
    assert not is_disk_full(RuntimeError("shape mismatch"), tmp_path)


def test_misspelt_stage_is_suggested() -> None:
    with pytest.raises(InputError, match="did you mean 'distill'"):
        stages_until("distil", STAGES)


def flip_a_byte(file: Path) -> None:
    """Change a file as a failing disk does: neither its size nor its time stamp."""
    status = file.stat()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("victim", ["first", "second"])
def test_a_flipped_bit_in_what_a_stage_reads_is_found(tmp_path: Path, stages, victim) -> None:
    folder = tmp_path / "r"
    Runner(job(tmp_path), Store(folder), RecordedProgress(), stages=stages).run("second")
    (file,) = folder.glob(f"artifacts/{victim}/*/out.txt")
    flip_a_byte(file)
    progress = RecordedProgress()
    made = job(tmp_path, target="ssh://board") if victim == "first" else job(tmp_path)
    outcome = Runner(made, Store(folder), progress, stages=stages).run()
    assert victim in outcome.ran
    assert outcome.ran[-1] == "third"
    assert (outcome.folder(victim) / "out.txt").read_text() == "same"
    assert any(f"{victim}: damaged on the disk" in line for line in progress.messages)


def test_own_code_edited_during_a_run_is_noticed(tmp_path: Path, monkeypatch) -> None:
    name = f"own_{tmp_path.name}"
    mine = tmp_path / f"{name}.py"
    mine.write_text("VALUE = 1\n")

    @dataclass
    class Own(Recorded):
        edit: bool = False

        def config_slice(self, job: Job) -> dict[str, Any]:
            return {"loss": f"{name}:VALUE"}

        def run(self, context: Context, inputs: Mapping[str, Path]) -> None:
            self.text = str(resolve(f"{name}:VALUE", {}, "loss"))
            if self.edit:
                # Of another size: Python compares its byte code by seconds and size only.
                mine.write_text("VALUE = 2  # edited\n")
            super().run(context, inputs)

    def run_stages(*stages):
        return Runner(job(tmp_path), Store(tmp_path / "r"), RecordedProgress(), stages=stages).run()

    first, second = Own("first", "seed", edit=True), Own("second", "seed", ("first",))
    with pytest.raises(InputError, match="edited after this run imported it"):
        run_stages(first, second)
    # What was made of the old form is stored under its hash; the new form makes it anew.
    assert second.runs == []
    del sys.modules[name]
    first.edit = False
    outcome = run_stages(first, second)
    assert outcome.ran == ["first", "second"]
    assert (outcome.folder("first") / "out.txt").read_text() == "2"
    mine.write_text("VALUE = 1\n")
    del sys.modules[name]
    assert "first" not in run_stages(first).ran
