"""A file to be written: whether it can be one, before the work, and writing it whole."""

from __future__ import annotations

import errno
import os
import zlib
from contextlib import suppress
from pathlib import Path

from edgerun.errors import BadInput, CannotWrite


def check_output(path: Path, option: str, stream: bool = False) -> None:
    """Check that a file may stand at a path; nothing is written.

    Args:
        option: that names the file, for the message.
        stream: whether it is written to and not replaced: a device or a pipe is then taken.

    Raises:
        BadInput: it is a folder, something else than a file, or lies in a folder that is not
            there.
        CannotWrite: its folder cannot be looked into, or its name is too long.
    """
    final = Path(os.path.realpath(path))  # where a link points to; a loop is left as it is
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
    """Write a file whole or not at all: a truncated one is an error that shows late.

    Raises:
        CannotWrite: there is no space or no permission.
    """
    final = Path(os.path.realpath(path))
    # A short name of its own: the file's may be as long as a name can be.
    part = final.with_name(f".{os.getpid()}.{zlib.crc32(os.fsencode(final.name)):08x}.part")
    try:
        part.write_bytes(content)
        part.replace(final)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise _unwritable(path, error) from error


def remove(path: Path) -> None:
    """Remove a file that may be there.

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
