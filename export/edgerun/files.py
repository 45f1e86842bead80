"""Files: atomic writing, and the files that belong to a model."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import zlib
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from edgerun.errors import BadInput, CannotWrite


def check_output(path: Path, option: str, stream: bool = False) -> None:
    """Check that a file can be written at a path; nothing is written.

    Args:
        option: the option that names the file, for the message.
        stream: whether it is written to, not replaced: a device or a pipe is then accepted.

    Raises:
        BadInput: it is a folder, something else than a file, or is in a folder that does not
            exist.
        CannotWrite: its folder cannot be read, or its name is too long.
    """
    final = Path(os.path.realpath(path))  # where a link points to; a loop is left unchanged
    try:
        if final.is_dir():
            what = "this is a folder, not a file to write"
        elif final.exists() and not final.is_file() and not stream:
            what = "this is a device or a pipe, which a file would replace"
        elif not final.parent.is_dir():
            what = "the file to write lies in a folder that does not exist"
        else:
            return
    except OSError as error:
        raise _unwritable(path, error) from error
    raise BadInput(what, where=str(path), remedy=f"give {option} a file in a folder that exists")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically: a truncated one is an error that is found late.

    Raises:
        CannotWrite: there is no space or no permission.
    """
    final = Path(os.path.realpath(path))
    # A separate short name: the file's may have the maximum length.
    part = final.with_name(f".{os.getpid()}.{zlib.crc32(os.fsencode(final.name)):08x}.part")
    try:
        part.write_bytes(content)
        part.replace(final)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise _unwritable(path, error) from error


def remove(path: Path) -> None:
    """Remove a file if it exists.

    Raises:
        CannotWrite: there is no permission.
    """
    try:
        path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> CannotWrite:
    too_long = error.errno == errno.ENAMETOOLONG
    return CannotWrite(
        f"the file cannot be written: {error.strerror}",
        where=str(path),
        remedy="choose a shorter name" if too_long else "free space or choose another folder",
    )


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
