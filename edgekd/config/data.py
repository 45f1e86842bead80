"""Section ``data``: where samples come from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from edgekd.config.section import Count, Section


class DataConfig(Section):
    """Section ``data``: where samples come from and how they are split.

    The test split is never used to choose anything.
    """

    source: str
    """``digits``, ``fashion-mnist``, ``npz``, ``image-folder`` (one folder per class), or
    ``package.module:name``: a function that returns ``{"train": {"image": …, "label": …}, "test":
    {…}}``.
    """
    path: str | None = None
    """File or folder of the source, relative to the pipeline file."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the source, and ``normalize: false``, which leaves floats as they are;
    ``layout``, which says what the axes of the inputs are where it is not plain: ``nchw`` or
    ``nhwc`` (images), ``nhw`` (grey images), ``nct`` or ``ntc`` (signals: channels, time), ``nt``
    (one channel), ``nf`` (features), or a mapping by input name. ``image-folder`` takes ``mode:
    L`` (grey) and ``splits``: the folder of each split, or false when the folders are classes.
    """
    targets: tuple[str, ...] | None = None
    """Names of the arrays to be learnt, where they are not the task's usual ones."""
    classes: Literal["observed"] | tuple[int | str, ...] | dict[int | str, str] | None = None
    """The values that the labels have, numbers or text, in the order of the classes; a mapping
    ``{1: cat, 2: dog}`` names them. ``observed`` takes all that occur, in order.
    """
    label_format: Literal["index", "one-hot", "probabilities"] | None = None
    """In which form the labels come where it is not plain: ``index`` (each number is a class),
    ``one-hot``, or ``probabilities`` (the largest of each row is the class).
    """
    unlabelled: int | str = -1
    """The label of samples that have none."""
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction cut from the training split for validation, stratified where there are labels;
    unused when the source has a validation split.
    """
    test: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Fraction cut off as test split when the source has none."""
    labelled: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training and validation labels that is kept; the other samples are taught by
    the teacher alone. A label of −1, or no label at all, is unlabelled too.
    """
    image_size: tuple[Count, Count] | None = None
    """Height and width to which images of a folder are resized."""
    augment: tuple[str | dict[str, dict[str, Any]], ...] = ()
    """Augmentations in order: ``flip``, ``shift``, ``erase``, ``crop``, ``colour``, and last
    ``mixup`` or ``cutmix``; or own functions ``package.module:name``. A name, or ``{name:
    {arguments}}``.
    """
    download: bool = False
    """Whether a source may download its files."""
