"""Files: atomic writing, hashes, folders of files, and the files shipped with the package.

An installed wheel has profiles and pipelines inside the package; a source checkout has them at
its top. The device-side package ``edgerun`` is installed next to ``edgekd``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import edgerun
from edgekd.crashes import writing
from edgekd.errors import EdgekdError, InputError, StageError
from edgerun import files
from edgerun.npz import write_npz as write_npz


def json_sha256(value: Any) -> str:
    """The SHA-256 of a JSON value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


_LITTER = ("thumbs.db", "desktop.ini", "__macosx")


def is_litter(path: Path) -> bool:
    """Whether a name is hidden or a metadata file of an operating system.

    ``.DS_Store``, ``._photo.png``, ``Thumbs.db``, ``desktop.ini``, ``__MACOSX``.
    """
    return path.name.startswith(".") or path.name.lower() in _LITTER


def files_in(folder: Path, litter: bool = False) -> Iterator[Path]:
    """All files below a folder in the order of their names.

    Links to files and folders are followed, each folder once on a path from the top, so that a
    link to a folder above it does not loop. Broken links, pipes, sockets and devices are included
    too: reading one is an error that names it.

    Args:
        folder: where to look.
        litter: include those of :func:`is_litter`.

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
        else:
            yield child


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        InputError: the file cannot be read, or is a pipe, socket, device or folder.
    """
    require_regular_file(path)
    try:
        return files.sha256(path)
    except OSError as error:
        raise InputError(
            f"the file cannot be read: {error.strerror}", where=str(path), remedy="check it"
        ) from error


def hash_path(path: Path, litter: bool = True) -> str:
    """SHA-256 of a file, or of a folder: the relative paths of :func:`files_in` and their contents.

    Raises:
        InputError: something cannot be read.
    """
    if not path.is_dir():
        return file_sha256(path)
    digest = hashlib.sha256()
    for file in files_in(path, litter):
        content = file_sha256(file) if file.is_file() else "missing"
        # repr() escapes a newline in a path, so that no two folders give the same lines.
        digest.update(f"{file.relative_to(path).as_posix()!r} {content}\n".encode())
    return digest.hexdigest()


def require_regular_file(path: Path, remedy: str = "give a file") -> None:
    """Refuse a folder, pipe, socket or device before it is opened: reading it may never end.

    Raises:
        InputError: it is one of these; a file that does not exist is left to its reader.
    """
    files.require_regular_file(path, remedy, InputError)


def check_output(
    path: Path, option: str, *, inputs: Collection[Path] = (), stream: bool = False
) -> None:
    """:func:`edgerun.files.check_output`, with the errors of edgekd.

    Raises:
        InputError: a file cannot be written there.
        StageError: its folder cannot be read, or its name is too long.
    """
    files.check_output(path, option, inputs, stream, InputError, StageError)


def write_errors(
    path: Path,
    what: str = "the file",
    remedy: str | None = None,
    error: type[EdgekdError] = StageError,
) -> AbstractContextManager[None]:
    """Report an OSError of the body as "WHAT cannot be written", by default as a StageError."""
    return files.write_errors(path, what, remedy, error)


@contextmanager
def atomic_write(
    path: Path, what: str = "the model", remedy: str | None = None, durable: bool = False
) -> Iterator[Path]:
    """:func:`edgerun.files.atomic_write`, noted for a crash of native code that writes the file.

    Raises:
        StageError: the folder cannot be written, or the disk fills up in the body.
        EdgekdError: the body's own, which then names ``path``.
    """
    replacing = files.atomic_write(path, what, remedy, StageError, durable)
    with replacing as partial, writing(partial, path):
        try:
            yield partial
        except EdgekdError as error:
            error.what = error.what.replace(str(partial), str(path))
            error.what = error.what.replace(partial.name, path.name)
            if error.where is not None:
                error.where = error.where.replace(str(partial), str(path))
            raise


def write_whole(
    path: Path,
    content: bytes | memoryview | str,
    what: str = "the file",
    remedy: str | None = None,
    durable: bool = False,
) -> None:
    """Write a file's content, text in UTF-8, at once or not at all.

    Args:
        path: the file.
        content: not empty.
        what: the content, for the error, such as "the weights".
        remedy: of the error; None: the usual.
        durable: wait until the content is on the disk.

    Raises:
        StageError: it cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    files.write_whole(path, data, what, remedy, StageError, durable)


_PACKAGE = Path(__file__).resolve().parent


def _shipped(name: str, in_checkout: str) -> Path:
    inside = _PACKAGE / "shipped" / name
    return inside if inside.is_dir() else _PACKAGE.parent / in_checkout


def profiles_folder() -> Path:
    """The folder of the shipped device profiles."""
    return _shipped("profiles", "profiles")


def pipelines_folder() -> Path:
    """The folder of the shipped pipelines."""
    return _shipped("pipelines", "pipelines")


def edgerun_folder() -> Path:
    """The device-side package ``edgerun``, to be copied to or started on a device."""
    return Path(edgerun.__file__).resolve().parent
