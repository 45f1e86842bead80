"""The interface of a data source: raw named arrays by split, and a fingerprint of their origin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.config.pipeline import DataConfig
from edgekd.data.dataset import Array
from edgekd.data.preprocessing import Layout
from edgekd.errors import InputError, unknown_name

UNSPLIT = "all"
"""The split name of samples that the source has not split."""

SPLITS = ("train", "validation", "test")

LABEL_NAMES = "classes"
"""The name of an array of class names, next to the samples."""


@dataclass(frozen=True)
class RawData:
    """The raw data of a source, before names are cleaned, splits made and targets identified.

    Attributes:
        splits: arrays by name, by split: ``train`` with or without the others, or only ``all``.
        where: the file, folder or key to name in errors about these samples.
        description: the origin of the samples, as text.
        labels: class names, in the order of the integer labels.
        layout: the axes of 4-D inputs, if known.
        image_scale: the factor that brings uint8 images to [0, 1].
        test_fraction: the fraction that is split off as test when the samples are unsplit.
        remarks: what the source decided that is not written in the pipeline, for a person.
    """

    splits: Mapping[str, Mapping[str, Array]]
    where: str
    description: str
    labels: tuple[str, ...] | None = None
    layout: Layout | None = None
    image_scale: float = 1 / 255
    test_fraction: float = 0.2
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """A request to a source: the pipeline's ``data`` section and the pipeline's folder."""

    config: DataConfig
    base: Path

    @property
    def path(self) -> Path | None:
        """``data.path``, relative to the pipeline file, with ``~`` expanded."""
        if self.config.path is None:
            return None
        return self.base / Path(self.config.path).expanduser()

    def required_path(self, what: str) -> Path:
        """:attr:`path`, which must be given and exist.

        Raises:
            InputError: it is not given, or does not exist.
        """
        if self.path is None:
            raise InputError(
                f"the source {self.config.source!r} needs a path",
                where="data.path",
                remedy=f"give {what} as data.path, relative to the pipeline file",
            )
        if not self.path.exists():
            raise InputError(
                "data.path does not exist",
                where=str(self.path),
                remedy=f"give {what}; a relative path starts at the pipeline file's folder",
            )
        return self.path

    def arguments(self, known: Iterable[str]) -> Mapping[str, Any]:
        """``data.args`` without the arguments that all sources share.

        Raises:
            InputError: an argument is unknown to this source.
        """
        known = {*known, *SHARED_ARGUMENTS}
        for name in self.config.args:
            if name not in known:
                raise unknown_name("argument", name, known, "data.args")
        return self.config.args

    def refuse(self, *keys: str) -> None:
        """Refuse keys that mean nothing to this source, so that none is silently ignored.

        Raises:
            InputError: one of them is given.
        """
        for key in keys:
            if getattr(self.config, key):
                raise InputError(
                    f"the source {self.config.source!r} takes no {key!r}",
                    where=f"data.{key}",
                    remedy=f"remove data.{key}, or choose another source",
                )


SHARED_ARGUMENTS = ("normalize", "layout")
"""Arguments in ``data.args`` that every source accepts; see :mod:`edgekd.data.build_dataset`."""


@dataclass(frozen=True)
class Source:
    """A registered source: its reader and its content hash."""

    read: Callable[[Request], RawData]
    fingerprint: Callable[[Request], dict[str, str]]
