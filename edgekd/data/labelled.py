"""Samples without labels: those that come so, and those whose labels are put aside."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from edgekd.data.dataset import Array
from edgekd.errors import InputError
from edgekd.spec import UNLABELLED

Arrays = Mapping[str, Array]

_STREAMS = {"train": 2, "validation": 3}
"""One stream of random numbers for each split; 0 and 1 are those that the splits are cut by."""


def fill_labels(splits: Mapping[str, Arrays], names: Collection[str]) -> dict[str, Arrays]:
    """Give splits without any target those that the others have: integers, ``UNLABELLED``.

    Args:
        splits: arrays by name, by split.
        names: the arrays that are targets.
    """
    found = {
        name: array
        for arrays in splits.values()
        for name, array in arrays.items()
        if name in names and array.ndim > 0 and array.dtype.kind in "biu"
    }
    return {
        split: arrays if set(arrays) & set(names) else {**arrays, **_unlabelled(arrays, found)}
        for split, arrays in splits.items()
    }


def without_labels(splits: Mapping[str, Arrays], name: str) -> dict[str, Arrays]:
    """Give every sample of every split the label ``UNLABELLED``, int64 (N,)."""
    like = {name: np.empty(0, np.int64)}
    return {split: {**arrays, **_unlabelled(arrays, like)} for split, arrays in splits.items()}


def _unlabelled(arrays: Arrays, like: Arrays) -> dict[str, Array]:
    count = len(next(iter(arrays.values()))) if arrays else 0
    return {
        name: np.full((count, *array.shape[1:]), UNLABELLED, np.int64)
        for name, array in like.items()
    }


def keep_share(
    splits: Mapping[str, Arrays],
    share: float,
    targets: set[str],
    where: str = "data.labelled",
) -> dict[str, Arrays]:
    """Put the labels of train and validation aside, but for a share of each class.

    ``round(share * members)`` labels of each class stay, at least one; those of the test split
    all do. The choice depends on the samples only: it is the same for every training seed, and a
    smaller share is part of a larger one.

    Args:
        splits: arrays by name, by split.
        share: how much of the labels stays, in (0, 1].
        targets: the arrays that are targets.
        where: the key that asks for it, for errors.

    Raises:
        InputError: a target is no class per sample.
    """
    if share == 1:
        return dict(splits)
    kept: dict[str, Arrays] = {}
    for split, arrays in splits.items():
        if split not in _STREAMS:
            kept[split] = arrays
            continue
        for name in targets:
            if arrays[name].ndim != 1 or arrays[name].dtype.kind != "i":
                raise InputError(
                    f"a share of the labels is to be kept, and {name!r} is not one class per "
                    f"sample: {arrays[name].dtype} {arrays[name].shape}",
                    where=where,
                    remedy=f"remove {where}; write unlabelled positions as -1 yourself",
                )
        random = np.random.RandomState(_STREAMS[split])
        order = random.permutation(len(next(iter(arrays.values()))))
        kept[split] = {
            name: _kept(array, order, share) if name in targets else array
            for name, array in arrays.items()
        }
    return kept


def _kept(labels: Array, order: Array, share: float) -> Array:
    """The labels with those of each class that come last in the order put aside."""
    kept = np.full_like(labels, UNLABELLED)
    for label in np.unique(labels[labels != UNLABELLED]):
        members = order[labels[order] == label]
        stay = members[: max(1, round(share * len(members)))]
        kept[stay] = label
    return kept
