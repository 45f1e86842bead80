"""The classes of a file of samples, from an array beside the inputs."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekd.errors import InputError, unknown_name

if TYPE_CHECKING:
    from edgekd.engines.samples import Array

WHERE = "--labels"
_SHOWN = 8  # wrong values that an error spells out


def read_labels(path: Path, name: str) -> Array:
    """The array ``name`` of a file that :func:`edgekd.engines.sample_files.open_samples` takes.

    Raises:
        InputError: the file is an .npy, which holds one array; there is no such array; it is
            pickled objects or damaged.
    """
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"{path.name} holds one array, the inputs, and no labels",
            where=WHERE,
            remedy=f"write an npz file: np.savez(file, INPUT=inputs, {name}=classes)",
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            if name not in archive:
                raise unknown_name("array", name, list(archive), where=f"{WHERE} in {path}")
            labels: Array = archive[name]
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise InputError(
            f"the labels {name!r} in {path} cannot be read: they are pickled objects, or damaged",
            where=WHERE,
            remedy="save whole numbers: np.asarray(classes).astype(np.int64)",
        ) from error
    return labels


def check_labels(labels: Array, count: int, classes: int) -> None:
    """Check that there is one class from 0 to ``classes`` − 1 for each of ``count`` samples.

    Raises:
        InputError: there is not.
    """
    if (
        labels.shape == (count,)
        and labels.dtype.kind in "iu"
        and 0 <= int(labels.min()) <= int(labels.max()) < classes
    ):
        return
    if labels.shape == (count,) and labels.dtype.kind in "iu":
        wrong = labels[(labels < 0) | (labels >= classes)]
        values = [int(value) for value in np.unique(wrong)]
        shown = ", ".join(map(str, values[:_SHOWN])) + (", …" if len(values) > _SHOWN else "")
        raise InputError(
            f"{len(wrong)} of {count} labels are no class from 0 to {classes - 1}: {shown}",
            where=WHERE,
            remedy="count the classes from 0, and leave out samples without a label",
        )
    raise InputError(
        f"the labels are {labels.dtype}{labels.shape}; one class from 0 to {classes - 1} for each "
        f"of the {count} samples is needed",
        where=WHERE,
        remedy="give an integer array of that length",
    )
