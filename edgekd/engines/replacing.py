"""A file that appears whole under its name, or not at all."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgekd.errors import EdgekdError, StageError
from edgekd.supervision import writing

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; what is there at the end takes the place of ``path``.

    Where the body fails, or writes nothing, ``path`` stays as it was: absent, or the file from
    before. The name is in the same folder, so that a model's external data is found from it.

    Raises:
        StageError: the folder cannot be written, or the disk fills up in the body.
        EdgekdError: the body's own, which then names ``path``.
    """
    final = path.resolve()  # where a link points to
    try:
        # Opened first, so that a folder that cannot be written is told from all that may follow.
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
    """An empty file beside ``final``; no file that is there already, which may be a user's."""
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
