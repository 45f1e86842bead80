"""Files: atomic writing, hashes, npz archives, and the files shipped with the package.

An installed wheel has profiles and pipelines inside the package; a source checkout has them at
its top. The device-side package ``edgerun`` is installed next to ``edgekd``.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import edgerun
from edgekd.crashes import writing
from edgekd.errors import EdgekdError, InputError, StageError


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
    link to a folder above it does not loop. A broken link is included too: to
    reading it is an error that names it.

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


def write_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays by name, uncompressed, as ``numpy.load`` reads them.

    Raises:
        OSError: the file cannot be written.
        ValueError: an array holds Python objects.
    """
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)


def check_output(
    path: Path, option: str, *, inputs: Collection[Path] = (), stream: bool = False
) -> None:
    """Check that a file can be written at a path; nothing is written, an existing file is allowed.

    Args:
        path: the file to write, or a link to it.
        option: the option that names it, such as ``-o``, for the message.
        inputs: files that must not be overwritten, such as the model; they need not exist.
        stream: whether it is written to, not replaced: a device or a pipe (``/dev/stdout``)
            is then accepted.

    Raises:
        InputError: it is a folder, a device or a pipe, is in a folder that does not exist, or
            is one of ``inputs``.
        StageError: its folder cannot be read, or its name is too long.
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


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file atomically: yields a name next to ``path``, which replaces ``path`` at the end.

    Where the body fails, or writes nothing, ``path`` is unchanged: absent, or the file from
    before. The name is in the same folder, so that a model's external data is found from it.

    Raises:
        StageError: the folder cannot be written, or the disk fills up in the body.
        EdgekdError: the body's own, which then names ``path``.
    """
    final = path.resolve()  # where a link points to
    try:
        # Opened first, so that a folder that cannot be written is distinguished from later errors.
        partial = _new_file(final)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        with writing(partial, path):
            yield partial
        if partial.is_file() and partial.stat().st_size:
            try:
                os.replace(partial, final)  # noqa: PTH105 - os.replace says that it is atomic
            except OSError as error:
                raise _unwritable(path, error) from error
    except EdgekdError as error:
        error.what = error.what.replace(str(partial), str(path)).replace(partial.name, path.name)
        if error.where is not None:
            error.where = error.where.replace(str(partial), str(path))
        raise
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def _new_file(final: Path) -> Path:
    """A new empty file next to ``final``; an existing file, which may be a user's, is not used."""
    for number in itertools.count():
        partial = final.with_name(f"{final.stem}.partial{number or ''}{final.suffix}")
        with suppress(FileExistsError), partial.open("xb"):
            return partial
    raise AssertionError("unreachable")


def _unwritable(path: Path, error: OSError) -> StageError:
    return StageError(
        f"the model cannot be written: {error.strerror}",
        where=str(path),
        remedy="free space or choose another folder",
    )


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
