"""An ``.npz`` file of named arrays, split or not."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from edgekd.data.dataset import Array
from edgekd.data.source import RawData, Request, Source
from edgekd.data.splits import by_split
from edgekd.errors import InputError
from edgekd.files import hash_file

LABEL_NAMES = "classes"
"""The text array of the class names, next to the samples."""


def read_npz(request: Request) -> RawData:
    """Arrays named ``train_image``, ``test_label``; or ``x_train``, ``y_test``; or unsplit.

    ``val_``, ``valid_`` and ``dev_`` mean ``validation_``, in any case and without the underscore
    where that is plain (``trainX``). An array of text named ``classes`` names the classes. Of
    unsplit arrays a fifth is split off as test. Pickles are never read.

    Raises:
        InputError: the file is missing, damaged, no npz, or contains an object array.
    """
    request.refuse("download")
    request.arguments(())
    path = request.required_path("an .npz file")
    arrays = _load(path)
    labels = None
    if LABEL_NAMES in arrays and arrays[LABEL_NAMES].dtype.kind == "U":
        labels = tuple(str(name) for name in arrays.pop(LABEL_NAMES).ravel())
    return RawData(
        splits=by_split(arrays, str(path)), where=str(path), description=str(path), labels=labels
    )


def _load(path: Path) -> dict[str, Array]:
    damaged = "write it again with numpy.savez; it is no complete .npz file"
    if path.is_dir():
        raise InputError("this is a folder", where=str(path), remedy="give an .npz file")
    if path.stat().st_size == 0:
        raise InputError("the file is empty", where=str(path), remedy=damaged)
    arrays: dict[str, Array] = {}
    name = ""
    try:
        if not zipfile.is_zipfile(path):
            raise InputError(
                "the file is no npz archive, or it is truncated", where=str(path), remedy=damaged
            )
        with np.load(path, allow_pickle=False) as archive:
            for name in archive.files:
                arrays[name] = archive[name]
    except ValueError as error:
        # numpy refuses an object array with a ValueError, for it would have to unpickle it.
        raise InputError(
            f"the array {name!r} cannot be read: {error}",
            where=str(path),
            remedy="save plain numbers: arrays of objects are pickles, which are refused",
        ) from error
    except (OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"the file is damaged{f' at array {name!r}' if name else ''}: {error}",
            where=str(path),
            remedy=damaged,
        ) from error
    if not arrays:
        raise InputError("the file has no array", where=str(path), remedy=damaged)
    return arrays


def fingerprint_npz(request: Request) -> dict[str, str]:
    """SHA-256 of the file."""
    return {"npz": hash_file(request.required_path("an .npz file"))}


NPZ = Source(read_npz, fingerprint_npz)
