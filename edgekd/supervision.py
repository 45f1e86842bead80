"""A command in a process of its own: where native code ends it, that is an error and no silence.

ONNX Runtime and ONNX's checker are C++, and some models end the process that opens them. The
command is run in a forked child. It notes what it is about to do with which file; where a signal
ends it, its parent removes the files that it was writing and says what had been noted.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from edgekd.errors import CrashError, EdgekdError

_BYTES = 1 << 16
_FORWARDED = (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))

_shared: mmap.mmap | None = None
_noted: dict[str, Any] = {"step": None, "writing": [], "model": None}


def note_step(step: str, file: Path | str, level: str = "disabled") -> None:
    """Note what native code is about to do, as ``opened`` or ``ran``.

    Args:
        step: what would have to be said after "while it ...".
        file: the file that it does it with.
        level: of ONNX Runtime's graph optimization.
    """
    _note(step=[step, str(file), level])


def note_model(model: Path) -> None:
    """Note the file that a command was given: what temporary files were made from."""
    _note(model=str(model))


def noted_file() -> str | None:
    """The file that native code was last given, by the name that a user knows."""
    step = _noted["step"]
    return _named(step[1] if step else None, Path(tempfile.gettempdir()) / "edgekd-")


@contextmanager
def writing(partial: Path, final: Path) -> Iterator[None]:
    """Note that ``partial`` is being written in the place of ``final``, and is to be removed."""
    pair = [str(partial), str(final)]
    _note(writing=[*_noted["writing"], pair])
    try:
        yield
    finally:
        _note(writing=[each for each in _noted["writing"] if each != pair])


def supervise() -> None:
    """Go on in a child process; the parent waits for it and ends as it does.

    Only for a process that has no other thread yet. Nothing is done where there is no ``fork``.
    """
    global _shared
    if not hasattr(os, "fork"):
        return
    try:
        folder = Path(tempfile.mkdtemp(prefix="edgekd-"))
    except OSError:
        return  # The command says it when it needs one.
    _shared = mmap.mmap(-1, _BYTES)
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
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def _note(**fields: Any) -> None:
    _noted.update(fields)
    if _shared is None:
        return
    content = json.dumps(_noted).encode()
    if len(content) < _BYTES:
        _shared[: len(content) + 1] = content + b"\0"


def _use_temporary(folder: Path) -> None:
    """Put temporary files there, the runtimes' own too: what a killed one leaves goes with it."""
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)


def _end_with_parent() -> None:
    """Where the parent is killed, so is this process (Linux)."""
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
    """Say what ended the command and remove what it was writing; the exit code, or −signal."""
    import click

    assert _shared is not None
    with suppress(ValueError):
        _noted.update(json.loads(_shared[: _shared.find(b"\0")]))
    try:
        if number in _FORWARDED:
            return -number
        error = _crash(number, folder)
    finally:
        for partial, _ in _noted["writing"]:
            with suppress(OSError):
                Path(partial).unlink()
    click.secho("error: ", nl=False, err=True, fg="red", bold=True)
    click.echo(str(error), err=True)
    return error.exit_code


def _crash(number: int, folder: Path) -> CrashError:
    from edgekd.targets.local import LocalTarget, named_signal

    step: str | None
    file: str | None
    step, file, level = _noted["step"] or (None, None, "disabled")
    where = _named(file, folder)
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
            pass  # What made-up inputs do not show has no remedy to be tried.
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


def _named(file: str | None, folder: Path) -> str | None:
    """The file by the name that a user knows."""
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
