"""Cutting a validation or test split from the training samples.

The choice depends on the samples only, never on the training seed: runs with several seeds are
compared on the same test samples, and choose their best epoch on the same validation samples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekd.data.dataset import Array
from edgekd.errors import InputError

Indices = NDArray[np.int64]


def cut(
    count: int, fraction: float, labels: Array | None, what: str, where: str
) -> tuple[Indices, Indices]:
    """Choose ``round(count * fraction)`` samples, stratified by ``labels`` when there are any.

    Args:
        count: the samples there are.
        fraction: how many of them to cut off, in (0, 1).
        labels: (count,) integers, or None for a plain random choice.
        what: "test" or "validation": the two choices are independent of each other.
        where: the key or file, for the error.

    Returns:
        The indices that are kept and those cut off, each in ascending order. Every class gives
        its share to within one sample, and its only sample last of all.

    Raises:
        InputError: one of the two parts would be empty.
    """
    size = round(count * fraction)
    if not 0 < size < count:
        raise InputError(
            f"{fraction:g} of {count} samples as {what} leaves "
            f"{'no sample to train on' if size else f'no {what} sample'}",
            where=where,
            remedy=f"give more samples, or another fraction in data.{what}",
        )
    # RandomState's stream is frozen by numpy's compatibility policy, Generator's is not.
    random = np.random.RandomState({"test": 0, "validation": 1}[what])
    if labels is None:
        chosen = random.permutation(count)[:size]
    else:
        _, classes, members = np.unique(labels, return_inverse=True, return_counts=True)
        order = random.permutation(count)
        grouped = order[np.argsort(classes[order], kind="stable")]
        quota = members * fraction
        share = np.floor(quota).astype(np.int64)
        # Shuffled before the sort, so that ties do not always favour the first classes.
        shuffled = random.permutation(len(members))
        by_remainder = shuffled[np.argsort(-(quota - share)[shuffled], kind="stable")]
        # A class keeps a sample to train on as long as the others can give one instead.
        able = by_remainder[share[by_remainder] + 1 < members[by_remainder]]
        unable = by_remainder[share[by_remainder] + 1 >= members[by_remainder]]
        # round() and the floors differ by less than the number of classes.
        share[np.concatenate([able, unable])[: size - int(share.sum())]] += 1
        ends = np.cumsum(members)
        starts = ends - members
        chosen = np.concatenate(
            [grouped[start : start + n] for start, n in zip(starts, share, strict=True)]
        )
    mask = np.zeros(count, bool)
    mask[chosen] = True
    return np.flatnonzero(~mask), np.flatnonzero(mask)
