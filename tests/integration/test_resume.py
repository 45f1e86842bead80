"""A kill at any moment loses at most the current epoch, and the result is the same."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command_line import edgekd_process
from tests.integration.pipelines import DIGITS

UNTIL = "distill"


def weights(run: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in run.glob("artifacts/*/*/*.safetensors")
    }


def kill_when(run: Path, cwd: Path, label: str, epoch: int) -> None:
    """Start a run and kill it -9 once its log shows this training inside this epoch."""
    with subprocess.Popen(
        [sys.executable, "-m", "edgekd", "run", "p.yaml", "-o", str(run), "--until", UNTIL],
        cwd=cwd,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if _reached(run / "log.jsonl", label, epoch):
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.005)
        process.wait()
        assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"


def _reached(log: Path, label: str, epoch: int) -> bool:
    if not log.is_file():
        return False
    for line in log.read_text().splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if event.get("label") == label and event.get("epoch", 0) >= epoch:
            return True
    return False


def test_killed_run_goes_on_to_the_same_weights(tmp_path: Path, edgekd) -> None:
    small = DIGITS.replace("convnet-m", "convnet-s").replace("1e-2}", "1e-2, baseline: false}")
    (tmp_path / "p.yaml").write_text(small)
    edgekd("run", "p.yaml", "-o", "straight", "--until", UNTIL)
    killed = tmp_path / "killed"
    kill_when(killed, tmp_path, "teacher", 3)
    kill_when(killed, tmp_path, "student", 4)
    done = edgekd("run", "p.yaml", "-o", "killed", "--until", UNTIL)
    assert "resuming after epoch" in done.stdout
    assert weights(killed) == weights(tmp_path / "straight")
    assert len(weights(killed)) == 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_leaves_with_its_code(tmp_path: Path, number: int, code: int) -> None:
    (tmp_path / "p.yaml").write_text(DIGITS.replace("epochs: 6", "epochs: 500"))
    with subprocess.Popen(
        [sys.executable, "-m", "edgekd", "run", "p.yaml", "-o", "run"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background of a script inherits that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        while not _reached(tmp_path / "run" / "log.jsonl", "teacher", 1):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        _, errors = process.communicate(timeout=240)
    assert process.returncode == code
    assert "run again to resume" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run" / "tmp").exists()


def test_files_that_a_killed_run_left_are_removed(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(DIGITS)
    left = tmp_path / "run" / "tmp" / "edgekd-1234"
    unfinished = tmp_path / "run" / "artifacts" / "data" / ".tmp-0123456789abcdef"
    for left_to_do in (True, False):
        left.mkdir(parents=True)
        unfinished.mkdir(parents=True)
        (left / "feed.npz").touch()
        (tmp_path / "run" / ".owner").write_text("1234")
        done = edgekd_process("run", "p.yaml", "-o", "run", "--until", "data", cwd=tmp_path)
        assert ("Nothing to do" in done.stdout) is not left_to_do
        assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.name != ".lock") == [
            *("artifacts", "log.jsonl", "scratch"),
        ]
        assert not unfinished.exists()
