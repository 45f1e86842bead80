"""An ``.npz`` file of named arrays, split or not."""

from __future__ import annotations

from edgekd.data.dataset import Array
from edgekd.data.source import RawData, Request, Source
from edgekd.data.splits import by_split
from edgekd.errors import InputError
from edgekd.files import file_sha256
from edgerun.npz import NpzFile

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
    with NpzFile(path, InputError) as archive:
        arrays: dict[str, Array] = {name: archive.read(name) for name in archive.names}
    if not arrays:
        raise InputError(
            "the file has no array", where=str(path), remedy="write it again with numpy.savez"
        )
    labels = None
    if LABEL_NAMES in arrays and arrays[LABEL_NAMES].dtype.kind == "U":
        labels = tuple(str(name) for name in arrays.pop(LABEL_NAMES).ravel())
    return RawData(
        splits=by_split(arrays, str(path)), where=str(path), description=str(path), labels=labels
    )


def fingerprint_npz(request: Request) -> dict[str, str]:
    """SHA-256 of the file."""
    return {"npz": file_sha256(request.required_path("an .npz file"))}


NPZ = Source(read_npz, fingerprint_npz)
