"""Where samples come from: the built-in sources, and the user's own by ``package.module:name``.

Adding a source is one file with a :class:`~edgekd.data.source.Source`, and its line here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgekd.config.data import DataConfig
from edgekd.data.assemble import assemble
from edgekd.data.classes import LABEL_CLASSES, ClassTarget
from edgekd.data.dataset import Dataset
from edgekd.data.source import Request, Source
from edgekd.data.sources.digits import DIGITS
from edgekd.data.sources.fashion_mnist import FASHION_MNIST
from edgekd.data.sources.function import fingerprint_function, read_function
from edgekd.data.sources.image_folder import IMAGE_FOLDER
from edgekd.data.sources.npz import NPZ
from edgekd.extension import is_reference, resolve, searching

SOURCES: dict[str, Source] = {
    "digits": DIGITS,
    "fashion-mnist": FASHION_MNIST,
    "npz": NPZ,
    "image-folder": IMAGE_FOLDER,
}


def load_dataset(
    config: DataConfig, base: Path, seed: int, classes: ClassTarget | None = LABEL_CLASSES
) -> Dataset:
    """Read, check, split and normalise the samples of a pipeline.

    Args:
        config: the pipeline's ``data`` section.
        base: the pipeline file's folder: relative paths start and modules are found there.
        seed: given to the user's own function if it has a parameter of this name. Nothing else
            depends on it: all seeds see the same splits.
        classes: the target that the task reads as classes; None when it reads none so.

    Raises:
        InputError: the source, its files or its samples are wrong.
    """
    request = Request(config, base)
    with searching(base):
        source = find_source(config.source)
        if isinstance(source, Source):
            return assemble(source.read(request), config, classes)
        result = read_function(source, request, seed)
    return result if isinstance(result, Dataset) else assemble(result, config, classes)


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
        if not is_reference(config.source):
            find_source(config.source)
        return fingerprint_function(request)


def find_source(name: str, where: str = "data.source") -> Any:
    """The :class:`~edgekd.data.source.Source` or the user's function of a name.

    Raises:
        InputError: there is none.
    """
    return resolve(name, SOURCES, "data source", where)


__all__ = ["SOURCES", "find_source", "load_dataset", "source_fingerprint"]
