"""Files: atomic writing, checks before reading and writing, and the files of a model."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import stat
import time
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Callable, Collection, Iterator, Optional, Union

from edgerun.errors import BadInput, CannotWrite

ErrorType = Callable[..., Exception]
"""Makes the error of what is wrong, ``where`` and ``remedy``."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LEFTOVER_SECONDS = 60


@contextmanager
def write_errors(
    path: Path,
    what: str = "the file",
    remedy: Optional[str] = None,
    error: ErrorType = CannotWrite,
) -> Iterator[None]:
    """Report an OSError of the body as "WHAT cannot be written".

    Args:
        path: the file or folder that is written, for the error.
        what: its content, such as "the weights".
        remedy: what to do; None: the usual.
        error: the kind of error to raise.
    """
    try:
        yield
    except OSError as problem:
        if remedy is None and problem.errno == errno.ENAMETOOLONG:
            remedy = "choose a shorter name"
        raise error(
            f"{what} cannot be written: {problem.strerror or problem}",
            where=str(path),
            remedy=remedy or "free space or choose another folder",
        ) from problem


@contextmanager
def atomic_write(
    path: Path,
    what: str = "the file",
    remedy: Optional[str] = None,
    error: ErrorType = CannotWrite,
    durable: bool = False,
) -> Iterator[Path]:
    """Write a file atomically: yields a name next to ``path``, which replaces ``path`` at the end.

    Where the body fails, or writes nothing, ``path`` is unchanged: absent, or the file from
    before. The name is in the same folder, so that a model's external data is found from it.

    Args:
        path: the file, or a link to it.
        what: its content, for the error.
        remedy: of the error; None: the usual.
        error: the kind of error to raise.
        durable: wait until the content is on the disk.

    Raises:
        CannotWrite: (or ``error``) the folder cannot be written, or the disk fills up in the body.
    """
    final = Path(os.path.realpath(path))  # where a link points to; a loop is left unchanged
    # Opened first, so that a folder that cannot be written is distinguished from later errors.
    with write_errors(path, what, remedy, error):
        partial = _new_file(final)
    try:
        try:
            yield partial
        except OSError as problem:
            if problem.errno not in _FULL:
                raise
            with write_errors(path, what, remedy, error):
                raise
        if partial.is_file() and partial.stat().st_size:
            with write_errors(path, what, remedy, error):
                if durable:
                    with partial.open("rb") as file:
                        os.fsync(file.fileno())
                partial.replace(final)
    finally:
        with suppress(OSError):
            partial.unlink()


def _new_file(final: Path) -> Path:
    """A new empty file next to ``final``; what a killed process left of it is removed.

    Its name is short, because ``final``'s may have the maximum length, and has its suffix.
    """
    suffix = final.suffix if len(final.suffix) <= 8 else ""
    key = f"{zlib.crc32(os.fsencode(final.name)):08x}"
    for leftover in final.parent.glob(f".{key}.*.part*"):
        with suppress(OSError, ValueError):
            process = int(leftover.name.split(".")[2].partition("-")[0])
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_SECONDS and not _runs(process):
                leftover.unlink()
    for number in itertools.count():
        partial = final.with_name(f".{key}.{os.getpid()}-{number}.part{suffix}")
        with suppress(FileExistsError), partial.open("xb"):
            return partial
    raise AssertionError("unreachable")


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def write_whole(
    path: Path,
    content: Union[bytes, memoryview],
    what: str = "the file",
    remedy: Optional[str] = None,
    error: ErrorType = CannotWrite,
    durable: bool = False,
) -> None:
    """Write a file's content atomically; arguments and errors as of :func:`atomic_write`."""
    replacing = atomic_write(path, what, remedy, error, durable)
    with replacing as partial, write_errors(path, what, remedy, error):
        partial.write_bytes(content)


def remove(path: Path) -> None:
    """Remove a file if it exists.

    Raises:
        CannotWrite: there is no permission.
    """
    with write_errors(path), suppress(FileNotFoundError):
        path.unlink()


def check_output(
    path: Path,
    option: str,
    inputs: Collection[Path] = (),
    stream: bool = False,
    bad: ErrorType = BadInput,
    unwritable: ErrorType = CannotWrite,
) -> None:
    """Check that a file can be written at a path; nothing is written, an existing file is allowed.

    Args:
        path: the file to write, or a link to it.
        option: the option that names it, such as ``-o``, for the message.
        inputs: files that must not be overwritten, such as the model; they need not exist.
        stream: whether it is written to, not replaced: a device or a pipe (``/dev/stdout``)
            is then accepted.
        bad, unwritable: the kinds of error to raise.

    Raises:
        BadInput: (or ``bad``) it is a folder, a device or a pipe, is in a folder that does not
            exist, or is one of ``inputs``.
        CannotWrite: (or ``unwritable``) its folder cannot be read, or its name is too long.
    """
    final = Path(os.path.realpath(path))  # not resolve(), which raises for a loop of links
    with write_errors(path, error=unwritable):
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
    raise bad(what, where=str(path), remedy=f"give {option} another file, in a folder that exists")


_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def require_regular_file(
    path: Path, remedy: str = "give a file", error: ErrorType = BadInput
) -> None:
    """Refuse a folder, pipe, socket or device before it is opened: reading it may never end.

    Raises:
        BadInput: (or ``error``) it is one of these, or a loop of links; a file that does not
            exist is left to its reader.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as problem:
        if isinstance(problem, OSError) and problem.errno == errno.ENOENT:
            return
        reason = problem.strerror if isinstance(problem, OSError) else problem
        raise error(
            f"the file cannot be read: {reason}", where=str(path), remedy=remedy
        ) from problem
    for is_kind, kind in _KINDS:
        if is_kind(mode):
            raise error(f"this is {kind}, not a file", where=str(path), remedy=remedy)


LARGEST_JSON = 64 << 20
"""Bytes of a JSON file that is read; a result of a million timed queries has a third of it."""


def read_json(path: Path, remedy: str = "give a file", error: ErrorType = BadInput) -> Any:
    """The content of a JSON file.

    Raises:
        BadInput: (or ``error``) it is a folder, pipe, socket or device.
        OSError: it is missing or cannot be read.
        ValueError: it is not JSON in UTF-8, too large, or nested too deeply.
    """
    require_regular_file(path, remedy, error)
    with path.open("rb") as stream:
        content = stream.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise ValueError(f"it has more than {LARGEST_JSON >> 20} MiB")
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


ENGINE_SUFFIXES = (".engine", ".plan", ".trt")

# A tensor names its weight file in an entry {key: "location", value: NAME} of the protobuf:
# field 1 of 8 bytes, then field 2 with the name's length (one byte, or two from 128 on).
_LOCATION = re.compile(rb"\n\x08location\x12([\x01-\x7f]|[\x80-\xff][\x01-\x7f])", re.DOTALL)


def is_engine(path: Path) -> bool:
    """Whether a file is a TensorRT engine, by its suffix."""
    return path.suffix.lower() in ENGINE_SUFFIXES


def model_files(path: Path) -> list[Path]:
    """The model's file, and the external weight files of an ONNX file, in order of use."""
    if is_engine(path):
        return [path]
    content = path.read_bytes()
    found: dict[Path, None] = {path: None}
    for match in _LOCATION.finditer(content):
        length = match.group(1)
        size = length[0] & 0x7F | (length[1] << 7 if len(length) == 2 else 0)
        name = content[match.end() : match.end() + size]
        # The pattern could also occur inside weights; only existing files count.
        beside = path.parent / name.decode("utf-8", errors="replace").replace("\0", "?")
        if beside.is_file():
            found[beside] = None
    return list(found)


def describe_files(path: Path) -> dict[str, Any]:
    """``sha256`` of the model's file, ``size_bytes`` of all, and ``files``, one entry each."""
    parts = model_files(path)
    return {
        "sha256": sha256(path),
        "size_bytes": sum(part.stat().st_size for part in parts),
        "files": [
            {"path": str(part), "sha256": sha256(part), "bytes": part.stat().st_size}
            for part in parts
        ],
    }


def sha256(file: Path | IO[bytes]) -> str:
    """The hexadecimal SHA-256 of a file, or of what remains of an open one."""
    if isinstance(file, Path):
        with file.open("rb") as content:
            return sha256(content)
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
