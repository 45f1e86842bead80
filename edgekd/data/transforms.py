"""Augmentations: pure functions ``(images, generator, **arguments) -> images`` of a batch.

They see raw images (N, C, H, W) before normalisation, uint8 where the source is, so that what
is shifted in or erased is the image's own zero. They run as batches: no loop over images.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

from edgekd.errors import EdgekdError, InputError, unknown_name
from edgekd.extension import resolve

Augmentation = Callable[[Tensor, Generator], Tensor]


def flip(images: Tensor, generator: Generator, p: float = 0.5) -> Tensor:
    """Mirror each image left to right with probability ``p``."""
    _within("p", p, 0, 1)
    chosen = torch.rand(len(images), generator=generator) < p
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


def shift(images: Tensor, generator: Generator, pixels: int = 2) -> Tensor:
    """Shift each image by up to ``pixels`` up or down and left or right; zeros move in."""
    _within("pixels", pixels, 0, min(images.shape[-2:]) - 1)
    if pixels == 0:
        return images
    count, _, height, width = images.shape
    padded = functional.pad(images, (pixels,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    offsets = torch.randint(2 * pixels + 1, (2, count), generator=generator)
    return windows[torch.arange(count), :, offsets[0], offsets[1]]


def erase(images: Tensor, generator: Generator, p: float = 0.5, size: float = 0.3) -> Tensor:
    """Set a rectangle to zero with probability ``p``: Cutout, DeVries and Taylor (2017).

    Its sides are ``size`` times the image's; its place is uniform, wholly inside the image.
    """
    _within("p", p, 0, 1)
    _within("size", size, 0, 1)
    count, _, height, width = images.shape
    chosen = torch.rand(count, generator=generator) < p
    rows = _interval(count, height, size, generator)
    columns = _interval(count, width, size, generator)
    erased = rows[:, :, None] & columns[:, None, :] & chosen[:, None, None]
    return images.masked_fill(erased[:, None], 0)


AUGMENTATIONS: dict[str, Callable[..., Tensor]] = {"flip": flip, "shift": shift, "erase": erase}


def augmentations(
    entries: Sequence[str | Mapping[str, Mapping[str, Any]]], where: str = "data.augment"
) -> tuple[Augmentation, ...]:
    """The functions that ``data.augment`` names, with their arguments bound.

    Args:
        entries: ``flip``, ``{shift: {pixels: 2}}`` or ``{package.module:name: {…}}``, in the
            order in which they are applied.
        where: the key, for the error.

    Raises:
        InputError: a name or an argument is unknown.
    """
    result: list[Augmentation] = []
    for entry in entries:
        named = {entry: {}} if isinstance(entry, str) else entry
        if len(named) != 1:
            raise InputError(
                f"an augmentation is one name with its arguments, not {len(named)}: "
                f"{', '.join(named) or 'nothing'}",
                where=where,
                remedy="write e.g. [flip, {shift: {pixels: 2}}]",
            )
        name, arguments = next(iter(named.items()))
        function = resolve(name, AUGMENTATIONS, "augmentation", where)
        _check_arguments(name, function, arguments, where)
        result.append(partial(function, **arguments))
    return tuple(result)


def check_augmentations(
    entries: Sequence[str | Mapping[str, Mapping[str, Any]]], where: str = "data.augment"
) -> None:
    """Look up the names and arguments of ``data.augment``, before there are any images.

    Raises:
        InputError: a name or an argument is unknown.
    """
    augmentations(entries, where)


def probe(augmentation: Augmentation, images: Tensor, where: str = "data.augment") -> None:
    """Try an augmentation on a few images, so that it fails before training and not during it.

    Raises:
        InputError: it fails, or changes the shape or the dtype.
    """
    name = getattr(getattr(augmentation, "func", augmentation), "__name__", str(augmentation))
    try:
        result = augmentation(images, Generator().manual_seed(0))
    except EdgekdError:
        raise
    except Exception as error:
        raise InputError(
            f"the augmentation {name!r} fails: {type(error).__name__}: {error}",
            where=where,
            remedy=f"it is given images {images.dtype} {tuple(images.shape)} and a generator",
        ) from error
    if not isinstance(result, Tensor) or (result.shape, result.dtype) != (
        images.shape,
        images.dtype,
    ):
        found = (
            f"{result.dtype} {tuple(result.shape)}"
            if isinstance(result, Tensor)
            else type(result).__name__
        )
        raise InputError(
            f"the augmentation {name!r} turned {images.dtype} {tuple(images.shape)} into {found}",
            where=where,
            remedy="return a tensor of the same shape and dtype",
        )


def _check_arguments(name: str, function: Any, arguments: Mapping[str, Any], where: str) -> None:
    if not callable(function):
        raise InputError(
            f"the augmentation {name!r} is {type(function).__name__}, not a function",
            where=where,
            remedy="name a function (images, generator, **arguments) -> images",
        )
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = list(parameters)[2:]
    for argument in arguments:
        if argument not in known:
            raise unknown_name(f"argument of {name!r}", argument, known, where)


def _within(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise InputError(
            f"{name} is {value!r}", where="data.augment", remedy=f"give {low:g} to {high:g}"
        )


def _interval(count: int, length: int, size: float, generator: Generator) -> Tensor:
    """(count, length) booleans: one run of ``size * length`` in each row, at a random place."""
    run = round(size * length)
    start = torch.randint(length - run + 1, (count, 1), generator=generator)
    position = torch.arange(length)
    return (position >= start) & (position < start + run)
