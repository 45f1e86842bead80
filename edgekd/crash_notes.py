"""What native code is about to do with which file, kept where a crash of the process leaves it."""

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
    """Keep the notes in memory that a child process shares with this one; before it is forked."""
    global _shared
    _shared = mmap.mmap(-1, _BYTES)


def read_shared() -> dict[str, Any]:
    """The notes that this process or its child left: ``step``, ``writing`` and ``model``."""
    if _shared is not None:
        with suppress(ValueError):
            _noted.update(json.loads(_shared[: _shared.find(b"\0")]))
    return _noted


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
    return user_file(step[1] if step else None, Path(tempfile.gettempdir()) / "edgekd-")


@contextmanager
def writing(partial: Path, final: Path) -> Iterator[None]:
    """Note that ``partial`` is being written in the place of ``final``, and is to be removed."""
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
