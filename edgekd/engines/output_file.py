"""A file to be written, looked at before any work: an hour of it must not end in a wrong path."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from edgekd.errors import InputError, StageError


def check_output(
    path: Path, option: str, *, inputs: Collection[Path] = (), stream: bool = False
) -> None:
    """Check that a file may stand at a path; nothing is written, and a file there is no trouble.

    Args:
        path: the file to write, or a link to it.
        option: that names it, such as ``-o``, for the message.
        inputs: files that must not be overwritten, such as the model; they need not exist.
        stream: whether it is written to and not replaced: a device or a pipe (``/dev/stdout``)
            is then taken.

    Raises:
        InputError: it is a folder, a device or a pipe, lies in a folder that does not exist, or
            is one of ``inputs``.
        StageError: its folder cannot be looked into, or its name is too long.
    """
    final = Path(os.path.realpath(path))  # not resolve(), which raises for a loop of links
    try:
        if final.is_dir():
            what = "this is a folder, not a file to write"
        elif final.exists() and not final.is_file() and not stream:
            what = "this is a device or a pipe, which a file would replace"
        elif not final.parent.is_dir():
            what = "the file to write lies in a folder that does not exist"
        elif final in [Path(os.path.realpath(given)) for given in inputs]:
            what = "the file to write would overwrite another file of this command"
        else:
            return
    except OSError as error:
        raise StageError(
            f"the file cannot be written: {error.strerror}",
            where=str(path),
            remedy="choose another folder or a shorter name",
        ) from error
    raise InputError(
        what, where=str(path), remedy=f"give {option} another file, in a folder that exists"
    )
