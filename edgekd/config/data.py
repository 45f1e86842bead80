"""Section ``data``: where samples come from."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from edgekd.config.section import Count, Section


class DataConfig(Section):
    """Where samples come from and how they are split.

    ``source`` is a built-in name (``digits``, ``fashion-mnist``), ``npz``, ``image-folder`` or
    ``package.module:name``. ``test`` is never used to choose anything; ``validation`` is the
    fraction cut from the training split, stratified where there are labels. ``labelled`` below 1
    keeps that part of the training and validation labels, the rest is taught by the teacher alone.
    """

    source: str
    path: str | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    targets: tuple[str, ...] | None = None
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    test: Annotated[float, Field(gt=0, lt=1)] | None = None
    labelled: Annotated[float, Field(gt=0, le=1)] = 1.0
    image_size: tuple[Count, Count] | None = None
    augment: tuple[str | dict[str, dict[str, Any]], ...] = ()
    download: bool = False
