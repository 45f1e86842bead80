"""Changed inputs of every parser: an error with its exit code, soon and in little memory.

The inputs are made from seeds, so that they are the same everywhere. ``make test`` reads about
1,500 in about a minute; ``make fuzz`` more: EDGEKD_FUZZ is the number for each parser, and
EDGEKD_FUZZ_FROM that of the first. To see one again, ``python -m tests.fuzz.worker DIR`` takes its
line, such as ``budgets 17``, and leaves it in DIR/budgets.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fuzz.worker import MEMORY, ROOT, TARGETS, Target

COUNT = int(os.environ.get("EDGEKD_FUZZ", "90"))
FIRST = int(os.environ.get("EDGEKD_FUZZ_FROM", "0"))

FOUND = {"manifest": (110,), "npz-data": (288, 1086)}
"""Numbers of inputs that once were read wrongly, read in every run."""

SECONDS = 10.0
"""Of the processor, for one input."""

PATIENCE = 120.0
"""On the clock, which on a busy machine is more."""

SHOWN = 8


class Worker:
    """The process that reads the inputs, started again when one ends it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def ask(self, name: str, number: int) -> dict[str, object]:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.worker", str(self.folder)],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'export'}"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            # It says that it has imported everything, which is no input's time.
            assert self.process.stdout is not None
            assert self.process.stdout.readline() == "ready\n"
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{name} {number}\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            self.close()
            return {"ended": f"no end within {PATIENCE:g} s"}
        line = self.process.stdout.readline()
        if line:
            return dict(json.loads(line))
        code = self.process.wait()
        self.process = None
        return {"ended": f"the process ended with {code}"}

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    worker = Worker(tmp_path_factory.mktemp("fuzz"))
    yield worker
    worker.close()


def problem(target: Target, answer: dict[str, object], folder: Path) -> str | None:
    """What is wrong with how an input was read; None: nothing."""
    if "ended" in answer and not callable(target.words):
        # Native code may end the process: a command that opens models survives that.
        answer = in_its_own_process(target, folder)
    if "ended" in answer:
        return str(answer["ended"])
    output = str(answer["output"])
    if "Traceback" in output or "failed unexpectedly" in output:
        return output[-1500:]
    if answer["code"] not in target.codes:
        return f"exit code {answer['code']}: {output[-600:]}"
    if float(str(answer["seconds"])) > SECONDS:
        return f"{answer['seconds']} s: {output[-300:]}"
    return None


def in_its_own_process(target: Target, folder: Path) -> dict[str, object]:
    assert not callable(target.words)
    started = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "edgekd", *target.words],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'export'}"},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return {"ended": f"the command did not end within {PATIENCE:g} s"}
    # What a probe of a crashed model costs is not the parser's time.
    seconds = 0.0 if "was killed by signal" in done.stderr else time.monotonic() - started
    code = 2 if "was killed by signal" in done.stderr and done.returncode == 3 else done.returncode
    return {"code": code, "output": done.stdout + done.stderr, "seconds": seconds}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", TARGETS)
def test_changed_inputs_give_errors(name, worker):
    target = TARGETS[name]
    found, codes = [], set()
    numbers = range(FIRST, FIRST + max(1, round(COUNT * target.share)))
    for number in (*numbers, *FOUND.get(name, ())):
        answer = worker.ask(name, number)
        wrong = problem(target, answer, worker.folder / name)
        codes.add(answer.get("code"))
        if wrong is not None:
            found.append(f"{name} {number}: {wrong}")
        assert float(str(answer.get("peak_mb", 0))) < (MEMORY + (1 << 30)) / 1e6, f"{name} {number}"
        if len(found) == SHOWN:
            break
    assert not found, "\n\n".join(found)
    # Else they are all refused by the same first check, and the rest of the parser is not read.
    assert 0 in codes or target.share * COUNT < 20, codes
