"""Transforms of a batch: named augmentations, and mixing of samples (mixup, CutMix).

The partner, its augmentation and the share are drawn from the sample's own draws, so that a
mixed image, too, depends on (seed, sample, view) only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekd.data.augment import AUGMENTATIONS, SampleRng, check_within, restored
from edgekd.data.dataset import Array, Dataset, is_image
from edgekd.errors import EdgekdError, InputError
from edgekd.extension import check_arguments, parameters_of, resolve

Mixing = Callable[[Tensor, Tensor, SampleRng], tuple[Tensor, Tensor]]
"""(images, their partners, draws) to (mixed images, (N,) each image's own share of it)."""


def mixup(
    images: Tensor, partners: Tensor, draws: SampleRng, alpha: float = 0.2
) -> tuple[Tensor, Tensor]:
    """λ times the image and 1 - λ times its partner: Zhang et al. (2018), equation 1.

    λ ~ Beta(alpha, alpha) for each image; uint8 is rounded.
    """
    check_within("alpha", alpha, 0.01, 100)
    share = draws.beta(alpha)
    weight = share[:, None, None, None]
    return restored(images * weight + partners * (1 - weight), images.dtype), share


def cutmix(
    images: Tensor, partners: Tensor, draws: SampleRng, alpha: float = 1.0
) -> tuple[Tensor, Tensor]:
    """A box of the partner replaces that part of the image: Yun et al. (2019), equations 1 and 2.

    The box's sides are √(1 - λ) times the image's, rounded, with λ ~ Beta(alpha, alpha); its centre
    is uniform, and the box is clipped to the image. The share is the exact remaining area.
    """
    check_within("alpha", alpha, 0.01, 100)
    height, width = images.shape[-2:]
    side = (1 - draws.beta(alpha)).sqrt()
    rows = _box(side, height, draws)
    columns = _box(side, width, draws)
    replaced = rows.sum(1) * columns.sum(1)
    inside = (rows[:, :, None] & columns[:, None, :])[:, None]
    share = (height * width - replaced).to(torch.float32) / (height * width)
    return torch.where(inside, partners, images), share


def _box(side: Tensor, length: int, draws: SampleRng) -> Tensor:
    """(N, length) booleans: a run of ``side`` (N,) times the length about a drawn centre."""
    run = (side * length).round().to(torch.int64)[:, None]
    start = draws.integers(length)[:, None] - run // 2
    place = torch.arange(length)
    return (place >= start) & (place < start + run)


MIXINGS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"mixup": mixup, "cutmix": cutmix}


def partner_rows(samples: NDArray[np.int64], draws: SampleRng, count: int) -> NDArray[np.int64]:
    """(N,) for each sample another of the ``count`` rows, uniform; with a single row, that row."""
    steps: NDArray[np.int64] = draws.integers(max(1, count - 1)).numpy()
    return (samples + 1 + steps) % count


def mixed_classes(labels: Tensor, partners: Tensor, share: Tensor, classes: int) -> Tensor:
    """Class probabilities (N, C) float32 of two integer labels (N,) each.

    A pair of which one is unlabelled (-1) has no label either: its row is zero, so that it adds
    nothing to a cross-entropy.
    """
    labelled = (labels >= 0) & (partners >= 0)
    probabilities = torch.zeros(len(labels), classes)
    for label, weight in ((labels, share), (partners, 1 - share)):
        probabilities.scatter_add_(1, label.clamp(min=0)[:, None], (weight * labelled)[:, None])
    return probabilities


def mixed_values(values: Tensor, partners: Tensor, share: Tensor) -> Tensor:
    """Continuous targets (N, …), mixed as the images are."""
    weight = share.reshape(-1, *(1,) * (values.ndim - 1))
    return values * weight + partners * (1 - weight)


def check_mixing(
    dataset: Dataset, arrays: Mapping[str, Array], known: Mapping[str, int]
) -> dict[str, int]:
    """How many classes each integer target has, for :func:`mixed_classes`.

    Where it is not known: as many as the dataset names, and without names as the largest label of
    the training split has.

    Args:
        dataset: what is an input and what a target.
        arrays: of the split that is to be mixed.
        known: classes by the target's name, as the task counts them.

    Raises:
        InputError: there is more than one input, or it is no image; or a target that is no
            class and no quantity cannot be mixed; or a label is beyond the classes.
    """
    inputs = [spec.name for spec in dataset.inputs]
    if len(inputs) != 1 or not is_image(arrays[inputs[0]]):
        raise _refused(
            f"images can be mixed where one image is the only input; here: {', '.join(inputs)}"
        )
    classes = {}
    for spec in dataset.targets:
        array, name = arrays[spec.name], spec.name
        if name.endswith("_mask"):
            raise _refused(f"the target {name!r} is a mask, which has no blend")
        if array.dtype.kind == "f":
            continue
        if array.ndim != 1:
            raise _refused(
                f"the target {name!r} has integers {array.shape[1:]} per sample, not one class"
            )
        classes[name], said_by = _classes(dataset, name, known)
        if classes[name] == 0:
            raise _refused(f"no {name!r} of the training split is known, and no class is named")
        if int(array.max()) >= classes[name]:
            raise InputError(
                f"{name!r} holds the label {int(array.max())}, but there are {classes[name]} "
                f"classes ({said_by})",
                where=dataset.source,
                remedy="labels count from 0; fix them or the names",
            )
    return classes


def _classes(dataset: Dataset, target: str, known: Mapping[str, int]) -> tuple[int, str]:
    """How many classes an integer target has, and the source of that number."""
    if target in known:
        return known[target], "as the task counts them"
    if dataset.labels:
        return len(dataset.labels), "as named"
    return int(dataset.splits["train"].arrays[target].max()) + 1, "in the training split"


def _refused(what: str) -> InputError:
    return InputError(
        what, where="data.augment", remedy=f"remove {' or '.join(MIXINGS)} from data.augment"
    )


Augmentation = Callable[[Tensor, SampleRng], Tensor]

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
            result.append(_bound(name, function, arguments, 2, where))
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
    return _bound(name, MIXINGS[name], arguments, 3, where)


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
            when it gets it again with the same draws in another batch.
    """
    name = getattr(getattr(augmentation, "func", augmentation), "__name__", str(augmentation))
    later = slice(min(1, len(images) - 1), None)
    rows = np.arange(len(images))
    try:
        # Copies, so that an in-place one does not get its own result.
        result = augmentation(images.clone(), SampleRng(0, rows, rows))
        again = augmentation(images[later].clone(), SampleRng(0, rows[later], rows[later]))
    except EdgekdError:
        raise
    except Exception as error:
        raise InputError(
            f"the augmentation {name!r} fails: {type(error).__name__}: {error}",
            where=where,
            remedy=f"its arguments are images {images.dtype} {tuple(images.shape)} and draws, "
            "which are no torch.Generator: draws.uniform() gives one random number per image, "
            "and there are integers(high), normal() and beta(alpha)",
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
            remedy="use random numbers from draws only, and process each image separately: "
            "the teacher's output for an augmented image is cached and reused",
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


def _bound(
    name: str, function: Any, arguments: Mapping[str, Any], given: int, where: str
) -> Callable[..., Any]:
    """The function with its arguments; ``given``: how many parameters the loader passes."""
    if not callable(function):
        raise InputError(
            f"the augmentation {name!r} is {type(function).__name__}, not a function",
            where=where,
            remedy="name a function (images, draws, **arguments) -> images",
        )
    supplied = tuple(parameters_of(function, where))[:given]
    checked = check_arguments(
        function, arguments, supplied=supplied, name=f"augmentation {name!r}", where=where
    )
    return partial(function, **checked)
