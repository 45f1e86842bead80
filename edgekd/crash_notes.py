"""Notes on what native code is about to do with which file; they survive a crash of the process."""

from __future__ import annotations

import json
import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_BYTES = 1 << 16

_shared: mmap.mmap | None = None
_noted: dict[str, Any] = {"step": None, "writing": [], "model": None}


def share() -> None:
    """Store the notes in memory shared with a child process; call it before the fork."""
    global _shared
    _shared = mmap.mmap(-1, _BYTES)


def read_shared() -> dict[str, Any]:
    """The notes of this process or its child: ``step``, ``writing`` and ``model``."""
    if _shared is not None:
        with suppress(ValueError):
            _noted.update(json.loads(_shared[: _shared.find(b"\0")]))
    return _noted


def note_step(step: str, file: Path | str, level: str = "disabled") -> None:
    """Note what native code is about to do, as ``opened`` or ``ran``.

    Args:
        step: the verb of the message "while it ...".
        file: the file concerned.
        level: the level of ONNX Runtime's graph optimization.
    """
    _note(step=[step, str(file), level])


def note_model(model: Path) -> None:
    """Note the file that a command was given: the source of temporary files."""
    _note(model=str(model))


def noted_file() -> str | None:
    """The file that native code last opened, under the user's name for it."""
    step = _noted["step"]
    return user_file(step[1] if step else None, Path(tempfile.gettempdir()) / "edgekd-")


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


def user_file(file: str | None, folder: Path) -> str | None:
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
