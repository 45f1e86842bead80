"""Crashes of native code: notes on what it is about to do, and a parent process that reports them.

ONNX Runtime and ONNX's checker are C++, and some models end the process that opens them. A
supervised command is run in a forked child. It notes what it is about to do with which file; if a
signal ends it, its parent removes the files that it was writing and reports its last note.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edgekd.errors import CrashError, EdgekdError, InputError, printable
from edgerun.errors import BadInput, EdgerunError
from edgerun.limits import call_seconds, too_slow
from edgerun.process import (
    FORWARDED,
    OUT_OF_MEMORY,
    end_with_parent,
    forward_signals,
    named_signal,
)

_BYTES = 1 << 16
_SINCE = struct.Struct("d")
"""After the notes: when the runtime's current call began, by the clock of all processes; 0: none
runs.
"""

_shared: mmap.mmap | None = None
_is_child = False
_overdue = False
_noted: dict[str, Any] = {"step": None, "writing": [], "model": None}


def note_step(step: str, file: Path | str, level: str = "disabled") -> None:
    """Note what native code is about to do, as ``opened`` or ``ran``.

    Args:
        step: the verb of the message "while it ...".
        file: the file concerned.
        level: the level of ONNX Runtime's graph optimization.
    """
    _note(step=[step, str(file), level])


@contextmanager
def native_call(step: str, file: Path | str, level: str = "disabled") -> Iterator[None]:
    """:func:`note_step` of one call of a runtime, which has a time limit in a supervised process:
    :func:`edgerun.limits.call_seconds`.
    """
    note_step(step, file, level)
    _set_since(time.monotonic())
    try:
        yield
    finally:
        _set_since(0.0)


def _set_since(moment: float) -> None:
    if _shared is not None:
        _SINCE.pack_into(_shared, _BYTES, moment)


def note_model(model: Path) -> None:
    """Note the file that a command was given: the source of temporary files."""
    _note(model=str(model))


def noted_file() -> str | None:
    """The file that native code last opened, under the user's name for it."""
    step = _noted["step"]
    return _user_file(step[1] if step else None, Path(tempfile.gettempdir()) / "edgekd-")


@contextmanager
def writing(partial: Path, final: Path) -> Iterator[None]:
    """Note that ``partial`` is being written in place of ``final``, and is to be removed after a
    crash.
    """
    pair = [str(partial), str(final)]
    _note(writing=[*_noted["writing"], pair])
    try:
        yield
    finally:
        _note(writing=[each for each in _noted["writing"] if each != pair])


def _note(**fields: Any) -> None:
    _noted.update(fields)
    if _shared is None:
        return
    content = json.dumps(_noted).encode()
    if len(content) < _BYTES:
        _shared[: len(content) + 1] = content + b"\0"


def _user_file(file: str | None, folder: Path) -> str | None:
    """The file under the user's name for it."""
    model: str | None = _noted["model"]
    if file is None:
        return model
    for partial, final in _noted["writing"]:
        if file == partial:
            return f"{final}, which is made of {model} and was not written"
    temporary = str(Path(file).resolve()).startswith(str(folder.resolve()))
    if temporary and model is not None:
        return f"{model}, in the form that is made of it here"
    return file


def supervise(probe: Callable[[Path, str], object]) -> None:
    """Continue in a child process; the parent waits for it and exits with its status.

    Only for a process that has no other thread yet. Nothing is done where there is no ``fork``.

    Args:
        probe: opens and runs a model at a level of graph optimization, in a process of its own;
            raises CrashError, with a remedy that was tried, if that is killed as well.
    """
    global _shared, _is_child
    if not hasattr(os, "fork"):
        return
    try:
        folder = Path(tempfile.mkdtemp(prefix="edgekd-"))
    except OSError:
        return  # A command that needs one reports it.
    _shared = mmap.mmap(-1, _BYTES + _SINCE.size)
    sys.stdout.flush()
    sys.stderr.flush()
    own, child = os.getpid(), os.fork()
    if child == 0:
        _is_child = True
        end_with_parent(own)
        _use_temporary(folder)
        return
    forward_signals(child)
    _kill_when_overdue(child)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        if code < 0:
            _use_temporary(folder)
            code = _report(-code, folder, probe)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(code if code >= 0 else 128 - code)


def _use_temporary(folder: Path) -> None:
    """Redirect temporary files, also the runtimes', to a folder that is removed after a crash."""
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)


def is_supervised() -> bool:
    """Whether this process is the child of :func:`supervise`."""
    return _is_child


def _kill_when_overdue(child: int) -> None:
    """Have a timer kill the child when a call of its runtime exceeds its time."""

    def look(*_: object) -> None:
        global _overdue
        assert _shared is not None
        (since,) = _SINCE.unpack_from(_shared, _BYTES)
        if since and time.monotonic() - since > seconds:
            _overdue = True
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    try:
        seconds = call_seconds()
    except BadInput:
        return  # The child reports it.
    signal.signal(signal.SIGALRM, look)
    interval = min(1.0, seconds / 4)
    signal.setitimer(signal.ITIMER_REAL, interval, interval)


def _report(number: int, folder: Path, probe: Callable[[Path, str], object]) -> int:
    """Report what ended the command, remove its partial files; the exit code, or −signal for a
    signal that asked it to end."""
    import click

    if _shared is not None:
        with suppress(ValueError):
            _noted.update(json.loads(_shared[: _shared.find(b"\0")]))
    try:
        if number in FORWARDED:
            return -number
        error = _crash(number, folder, probe)
    finally:
        for partial, _ in _noted["writing"]:
            with suppress(OSError):
                Path(partial).unlink()
    click.secho("error: ", nl=False, err=True, fg="red", bold=True)
    click.echo(printable(str(error)), err=True)
    return error.exit_code


def _crash(number: int, folder: Path, probe: Callable[[Path, str], object]) -> EdgerunError:
    step: str | None
    file: str | None
    step, file, level = _noted["step"] or (None, None, "disabled")
    where = _user_file(file, folder)
    what = f"edgekd was killed by signal {named_signal(number)}"
    if _overdue:
        doing = {"opened": "opened", "ran": "run once"}.get(step or "", "checked")
        return too_slow(doing, call_seconds(), where, InputError)
    remedy = OUT_OF_MEMORY if number == signal.SIGKILL else None
    if step is None or file is None:
        return CrashError(what, signal=number, where=where, remedy=remedy)
    in_runtime = step in ("opened", "ran")
    if remedy is None and in_runtime and Path(file).is_file():
        try:
            probe(Path(file), level)
        except CrashError as error:
            remedy = error.remedy
        except InputError as error:
            return error  # What it needs is more than it may have.
        except EdgekdError:
            pass  # No remedy can be tried where random inputs do not reproduce the crash.
    name = Path((where or "the model").partition(",")[0]).name
    if in_runtime:
        what = f"ONNX Runtime was killed by signal {named_signal(number)}"
    return CrashError(
        f"{what} while it {step} {name}",
        signal=number,
        where=where,
        remedy=remedy or "export the model again, in another opset or with another exporter",
    )
