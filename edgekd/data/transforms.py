"""``data.augment``: the augmentations and the mixing it names, looked up and tried out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgekd.data.augment import AUGMENTATIONS
from edgekd.data.draws import Draws
from edgekd.data.mixing import MIXINGS, Mixing
from edgekd.errors import EdgekdError, InputError, unknown_name
from edgekd.extension import resolve

Augmentation = Callable[[Tensor, Draws], Tensor]
Entry = str | Mapping[str, Mapping[str, Any]]
"""``flip``, ``{shift: {pixels: 2}}`` or ``{package.module:name: {…}}``."""


def augmentations(
    entries: Sequence[Entry], where: str = "data.augment"
) -> tuple[Augmentation, ...]:
    """The functions that ``data.augment`` names, with their arguments bound, but for the mixing.

    Args:
        entries: in the order in which they are applied.
        where: the key, for the error.

    Raises:
        InputError: a name or an argument is unknown, or a mixing is not the last entry.
    """
    result: list[Augmentation] = []
    for number, entry in enumerate(entries, start=1):
        name, arguments = _named(entry, where)
        if name not in MIXINGS:
            known = {**AUGMENTATIONS, **MIXINGS}
            function = resolve(name, known, "augmentation", where)
            _check_arguments(name, function, arguments, 2, where)
            result.append(partial(function, **arguments))
        elif number < len(entries):
            raise InputError(
                f"{name!r} is entry {number} of {len(entries)}, and mixing comes last",
                where=where,
                remedy=f"write {name} at the end; there is one mixing at most",
            )
    return tuple(result)


def mixing(entries: Sequence[Entry], where: str = "data.augment") -> Mixing | None:
    """The ``mixup`` or ``cutmix`` at the end of ``data.augment``, with its arguments bound.

    Raises:
        InputError: an argument is unknown.
    """
    if not entries:
        return None
    name, arguments = _named(entries[-1], where)
    if name not in MIXINGS:
        return None
    _check_arguments(name, MIXINGS[name], arguments, 3, where)
    return partial(MIXINGS[name], **arguments)


def check_augmentations(entries: Sequence[Entry], where: str = "data.augment") -> None:
    """Look up the names and arguments of ``data.augment``, before there are any images.

    Raises:
        InputError: a name or an argument is unknown, or a mixing is not the last entry.
    """
    augmentations(entries, where)
    mixing(entries, where)


def probe(augmentation: Augmentation, images: Tensor, where: str = "data.augment") -> None:
    """Try an augmentation on a few images, so that it fails before training and not during it.

    Raises:
        InputError: it fails, changes the shape or the dtype, or makes something else of an image
            when it meets it again with the same draws in another batch.
    """
    name = getattr(getattr(augmentation, "func", augmentation), "__name__", str(augmentation))
    later = slice(min(1, len(images) - 1), None)
    rows = np.arange(len(images))
    try:
        # Copies, so that one that works in place is not given its own result.
        result = augmentation(images.clone(), Draws(0, rows, rows))
        again = augmentation(images[later].clone(), Draws(0, rows[later], rows[later]))
    except EdgekdError:
        raise
    except Exception as error:
        raise InputError(
            f"the augmentation {name!r} fails: {type(error).__name__}: {error}",
            where=where,
            remedy=f"it is given images {images.dtype} {tuple(images.shape)} and draws, which are "
            "no torch.Generator: draws.uniform() gives one random number per image, and there "
            "are integers(high), normal() and beta(alpha)",
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
    if not torch.equal(result[later], again):
        raise InputError(
            f"the augmentation {name!r} made two different images of one image and its draws",
            where=where,
            remedy="take random numbers from draws alone, and treat each image by itself: "
            "a teacher's answer to an augmented image is kept and met again",
        )


def _named(entry: Entry, where: str) -> tuple[str, Mapping[str, Any]]:
    named = {entry: {}} if isinstance(entry, str) else entry
    if len(named) != 1:
        raise InputError(
            f"an augmentation is one name with its arguments, not {len(named)}: "
            f"{', '.join(named) or 'nothing'}",
            where=where,
            remedy="write e.g. [flip, {shift: {pixels: 2}}]",
        )
    return next(iter(named.items()))


def _check_arguments(
    name: str, function: Any, arguments: Mapping[str, Any], given: int, where: str
) -> None:
    """``given``: how many parameters come from the loader and not from the file."""
    if not callable(function):
        raise InputError(
            f"the augmentation {name!r} is {type(function).__name__}, not a function",
            where=where,
            remedy="name a function (images, draws, **arguments) -> images",
        )
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = list(parameters)[given:]
    for argument in arguments:
        if argument not in known:
            raise unknown_name(f"argument of {name!r}", argument, known, where)
