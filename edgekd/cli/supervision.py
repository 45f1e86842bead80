"""Run a command in a child process, so that a crash of native code is reported as an error.

ONNX Runtime and ONNX's checker are C++, and some models end the process that opens them. The
command is run in a forked child. It notes what it is about to do with which file; if a signal
ends it, its parent removes the files that it was writing and reports its last note.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from edgekd import crash_notes
from edgekd.errors import CrashError, EdgekdError

_FORWARDED = (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))


def supervise() -> None:
    """Continue in a child process; the parent waits for it and exits with its status.

    Only for a process that has no other thread yet. Nothing is done where there is no ``fork``.
    """
    if not hasattr(os, "fork"):
        return
    try:
        folder = Path(tempfile.mkdtemp(prefix="edgekd-"))
    except OSError:
        return  # A command that needs one reports it.
    crash_notes.share()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _end_with_parent()
        _use_temporary(folder)
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # It reaches the child by itself.
    for number in _FORWARDED:
        signal.signal(number, _forwarding(child))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        if code < 0:
            _use_temporary(folder)
            code = _report(-code, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(code if code >= 0 else 128 - code)


def _use_temporary(folder: Path) -> None:
    """Redirect temporary files, also the runtimes', to a folder that is removed after a crash."""
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)


def _end_with_parent() -> None:
    """Have the kernel kill this process when its parent is killed (Linux)."""
    if sys.platform != "linux":
        return
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _forwarding(child: int) -> Any:
    def forward(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)

    return forward


def _report(number: int, folder: Path) -> int:
    """Report what ended the command, remove its partial files; the exit code, or −signal for a
    signal that asked it to end."""
    import click

    noted = crash_notes.read_shared()
    try:
        if number in _FORWARDED:
            return -number
        error = _crash(number, folder)
    finally:
        for partial, _ in noted["writing"]:
            with suppress(OSError):
                Path(partial).unlink()
    click.secho("error: ", nl=False, err=True, fg="red", bold=True)
    click.echo(str(error), err=True)
    return error.exit_code


def _crash(number: int, folder: Path) -> CrashError:
    from edgekd.targets.local import LocalTarget, named_signal

    step: str | None
    file: str | None
    step, file, level = crash_notes.read_shared()["step"] or (None, None, "disabled")
    where = crash_notes.user_file(file, folder)
    what = f"edgekd was killed by signal {named_signal(number)}"
    if step is None or file is None:
        return CrashError(what, signal=number, where=where, remedy=_MEMORY.get(number))
    remedy = _MEMORY.get(number)
    if number != signal.SIGKILL and Path(file).is_file() and step in ("opened", "ran"):
        try:
            LocalTarget().probe(Path(file), optimization=level)
        except CrashError as error:
            remedy = error.remedy
        except EdgekdError:
            pass  # No remedy can be tried where random inputs do not reproduce the crash.
    name = Path((where or "the model").partition(",")[0]).name
    return CrashError(
        f"ONNX Runtime was killed by signal {named_signal(number)} while it {step} {name}"
        if step in ("opened", "ran")
        else f"{what} while it {step} {name}",
        signal=number,
        where=where,
        remedy=remedy or "export the model again, in another opset or with another exporter",
    )


_MEMORY = {9: "it is often the system that ends a process so, for memory: free some"}
