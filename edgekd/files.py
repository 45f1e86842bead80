"""Files by their content: hashes of files and folders, with links followed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from edgekd.errors import InputError

_LITTER = ("thumbs.db", "desktop.ini", "__macosx")


def is_litter(path: Path) -> bool:
    """Whether a name is hidden or one that operating systems leave behind: no content of its own.

    ``.DS_Store``, ``._photo.png``, ``Thumbs.db``, ``desktop.ini``, ``__MACOSX``.
    """
    return path.name.startswith(".") or path.name.lower() in _LITTER


def files_in(folder: Path, litter: bool = False) -> Iterator[Path]:
    """All files below a folder in the order of their names.

    Links to files and folders are followed, each folder once on a path from the top, so that a
    link to a folder above it does not go round for ever. A link to nothing is given too: to
    read it is an error that names it.

    Args:
        folder: where to look.
        litter: give those of :func:`is_litter` too.

    Raises:
        InputError: a folder cannot be read.
    """
    yield from _files_in(folder, litter, ())


def _files_in(folder: Path, litter: bool, above: tuple[str, ...]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        children = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(
            f"the folder cannot be read: {error.strerror}", where=str(folder), remedy="check it"
        ) from error
    for child in children:
        if not litter and is_litter(child):
            continue
        if child.is_dir():
            yield from _files_in(child, litter, (*above, real))
        elif child.is_file() or child.is_symlink():
            yield child


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content.

    Raises:
        InputError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(
            f"the file cannot be read: {error.strerror}", where=str(path), remedy="check it"
        ) from error
    return digest.hexdigest()


def hash_path(path: Path, litter: bool = True) -> str:
    """SHA-256 of a file, or of a folder: the relative paths of :func:`files_in` and their contents.

    Raises:
        InputError: something cannot be read.
    """
    if not path.is_dir():
        return hash_file(path)
    digest = hashlib.sha256()
    for file in files_in(path, litter):
        content = hash_file(file) if file.exists() else "missing"
        # repr() escapes a newline in a path, so that no two folders give the same lines.
        digest.update(f"{file.relative_to(path).as_posix()!r} {content}\n".encode())
    return digest.hexdigest()
