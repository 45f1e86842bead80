"""The data sources: built-in ones, of which digits and npz are here, and the user's own.

A source is a :class:`~edgekd.data.source.Source`, and its line in :data:`SOURCES`; or a function,
by ``package.module:name`` or an entry point of ``edgekd.sources``.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.config.pipeline import DataConfig
from edgekd.data.build_dataset import build_dataset
from edgekd.data.classes import LABEL_CLASSES, ClassTarget
from edgekd.data.dataset import Array, Dataset
from edgekd.data.source import LABEL_NAMES, UNSPLIT, RawData, Request, Source
from edgekd.data.sources.fashion_mnist import FASHION_MNIST
from edgekd.data.sources.function import fingerprint_function, read_function
from edgekd.data.sources.image_folder import IMAGE_FOLDER
from edgekd.data.splits import by_split
from edgekd.errors import InputError
from edgekd.extension import find_reference, resolve, searching
from edgekd.files import file_sha256
from edgerun.limits import limited_memory
from edgerun.npz import NpzFile


def read_digits(request: Request) -> RawData:
    """``image`` uint8 (1797, 1, 8, 8) and ``label`` int64; a quarter is split off as test."""
    from sklearn.datasets import load_digits

    request.refuse("path", "download")
    request.arguments(())
    digits = load_digits()
    image = digits.images.astype(np.uint8)[:, None]
    return RawData(
        splits={UNSPLIT: {"image": image, "label": digits.target.astype(np.int64)}},
        where="scikit-learn's load_digits",
        description=f"scikit-learn {version('scikit-learn')} load_digits",
        labels=tuple(str(digit) for digit in range(10)),
        layout="nchw",
        image_scale=1 / 16,
        test_fraction=0.25,
    )


def fingerprint_digits(request: Request) -> dict[str, str]:
    """The version of the package that bundles the scans."""
    return {"scikit-learn": version("scikit-learn")}


DIGITS = Source(read_digits, fingerprint_digits)


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

SOURCES: dict[str, Source] = {
    "digits": DIGITS,
    "fashion-mnist": FASHION_MNIST,
    "npz": NPZ,
    "image-folder": IMAGE_FOLDER,
}

_GROUP = "edgekd.sources"


def load_dataset(
    config: DataConfig, base: Path, seed: int, classes: ClassTarget | None = LABEL_CLASSES
) -> Dataset:
    """Read, check, split and normalise the samples of a pipeline.

    Args:
        config: the pipeline's ``data`` section.
        base: the pipeline file's folder: relative paths start and modules are found there.
        seed: passed to the user's own function if it has a parameter of this name. Nothing else
            depends on it: all seeds see the same splits.
        classes: the target that the task reads as classes; None when there is none.

    Raises:
        InputError: the source, its files or its samples are wrong.
    """
    request = Request(config, base)
    with searching(base):
        source = find_source(config.source)
        if isinstance(source, Source):
            with limited_memory("the data", str(config.path or config.source), InputError):
                return build_dataset(source.read(request), config, classes)
        result = read_function(source, request, seed)
    return result if isinstance(result, Dataset) else build_dataset(result, config, classes)


def source_fingerprint(config: DataConfig, base: Path) -> dict[str, str]:
    """What identifies the content behind ``config``: hashes of files and modules, versions.

    The configuration itself is not part of it, and nothing of the user's is imported.

    Raises:
        InputError: the source is unknown or its files are missing.
    """
    request = Request(config, base)
    if config.source in SOURCES:
        return SOURCES[config.source].fingerprint(request)
    with searching(base):
        reference = find_reference(
            config.source, SOURCES, "data source", "data.source", group=_GROUP
        )
        return fingerprint_function(request, reference)


def find_source(name: str, where: str = "data.source") -> Any:
    """The :class:`~edgekd.data.source.Source` or the user's function of a name.

    Raises:
        InputError: there is none.
    """
    return resolve(name, SOURCES, "data source", where, group=_GROUP)


__all__ = ["SOURCES", "find_source", "load_dataset", "source_fingerprint"]
