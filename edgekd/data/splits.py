"""Splits of samples: how they are named and made, and the share of their labels that is used.

The choice depends on the samples only, never on the training seed: runs with several seeds are
compared on the same test samples, and choose their best epoch on the same validation samples.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edgekd.data.dataset import Array, Arrays
from edgekd.data.source import SPLITS, UNSPLIT
from edgekd.errors import InputError
from edgekd.spec import UNLABELLED

Indices = NDArray[np.int64]


def choose_split(
    count: int, fraction: float, labels: Array | None, what: str, where: str
) -> tuple[Indices, Indices]:
    """Choose ``round(count * fraction)`` samples, stratified by ``labels`` when there are any.

    Args:
        count: the samples there are.
        fraction: the share of them to split off, in (0, 1).
        labels: (count,) integers, or None for a plain random choice.
        what: "test" or "validation": the two choices are independent of each other.
        where: the key or file, for the error.

    Returns:
        The remaining indices and those split off, each in ascending order. Every class contributes
        its share to within one sample, and a class's only sample only as the last resort.

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
        # A class's last training sample is taken only when no other class can contribute.
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


_STREAMS = {"train": 2, "validation": 3}
"""One stream of random numbers for each split; 0 and 1 are those that make the splits."""


def fill_labels(splits: Mapping[str, Arrays], names: Collection[str]) -> dict[str, Arrays]:
    """Add the missing integer targets to splits without any target, as ``UNLABELLED``.

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
    """Remove the labels of train and validation, except for a share of each class.

    ``round(share * members)`` labels of each class remain, at least one; those of the test split
    all do. The choice depends on the samples only: it is the same for every training seed, and a
    smaller share is part of a larger one.

    Args:
        splits: arrays by name, by split.
        share: the share of the labels that remains, in (0, 1].
        targets: the arrays that are targets.
        where: the key that sets it, for errors.

    Raises:
        InputError: a target is no class per sample.
    """
    if share == 1:
        return dict(splits)
    remaining: dict[str, Arrays] = {}
    for split, arrays in splits.items():
        if split not in _STREAMS:
            remaining[split] = arrays
            continue
        for name in targets:
            if arrays[name].ndim != 1 or arrays[name].dtype.kind != "i":
                raise InputError(
                    f"a share of the labels is to be used, and {name!r} is not one class per "
                    f"sample: {arrays[name].dtype} {arrays[name].shape}",
                    where=where,
                    remedy=f"remove {where}; write unlabelled positions as -1 yourself",
                )
        random = np.random.RandomState(_STREAMS[split])
        order = random.permutation(len(next(iter(arrays.values()))))
        remaining[split] = {
            name: _kept(array, order, share) if name in targets else array
            for name, array in arrays.items()
        }
    return remaining


def _kept(labels: Array, order: Array, share: float) -> Array:
    """The labels without those that come last in the order of each class."""
    remaining = np.full_like(labels, UNLABELLED)
    for label in np.unique(labels[labels != UNLABELLED]):
        members = order[labels[order] == label]
        stay = members[: max(1, round(share * len(members)))]
        remaining[stay] = label
    return remaining


SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "development"), "validation"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
"""The names that are recognized, in any case, with ``set``, ``split`` or ``data`` behind them."""

_WORDS = {
    *SPLIT_NAMES,
    "tests", "tr", "te", "eval", "evaluation", "holdout", "heldout", "unseen", "trainval", "fit",
}  # fmt: skip
"""Words that make a name look like a split's, although it may not be known which."""

_BEHIND = r"[ _./-]?(?:set|split|data|dataset)?\d*"
_NAME = "|".join(sorted(SPLIT_NAMES, key=len, reverse=True))
_WHOLE = re.compile(rf"({_NAME}){_BEHIND}", re.IGNORECASE)
_BEFORE = re.compile(rf"({_NAME})(?:_?set)?[_./-](.+)", re.IGNORECASE)
_AFTER = re.compile(rf"(.+)[_./-]({_NAME})", re.IGNORECASE)
# Without a separator: xtrain, trainX, imagesTest; but not latest, testament or Valence.
_SHORT_BEFORE = re.compile(rf"((?i:{_NAME}))([xyXY]|[A-Z]\w*)")
_SHORT_AFTER = re.compile(rf"([xyXY])((?i:{_NAME}))")
_CAMEL_AFTER = re.compile(rf"(\w*[a-z0-9])((?:{'|'.join(n.capitalize() for n in SPLIT_NAMES)}))")

Value = TypeVar("Value")


def split_of(name: str) -> str | None:
    """The split that a folder or key names: ``Training``, ``val``, ``test_set``, ``val2017``."""
    match = _WHOLE.fullmatch(name.strip())
    return SPLIT_NAMES[match[1].lower()] if match else None


def looks_like_split(name: str) -> bool:
    """Whether one of a name's words is one that splits are called by: ``eval``, ``test-2017``."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
    return split_of(name) is not None or any(word.lower() in _WORDS for word in words)


def split_and_name(array: str) -> tuple[str, str] | None:
    """The split and the rest of an array's name: ``train_image``, ``y_test``, ``Xval``, ``testX``.

    None when it names no split.
    """
    for pattern, split, rest in (
        (_BEFORE, 1, 2), (_AFTER, 2, 1), (_SHORT_BEFORE, 1, 2),
        (_SHORT_AFTER, 2, 1), (_CAMEL_AFTER, 2, 1),
    ):  # fmt: skip
        if match := pattern.fullmatch(array):
            return SPLIT_NAMES[match[split].lower()], match[rest]
    return None


def by_split(arrays: Mapping[str, Value], where: str) -> dict[str, dict[str, Value]]:
    """Arrays named for their split, by split; all of them in ``UNSPLIT`` when none is.

    Raises:
        InputError: some name a split and others do not, or two have one name in one split.
    """
    splits: dict[str, dict[str, Value]] = {}
    names: dict[tuple[str, str], str] = {}
    for name, array in arrays.items():
        split, short = split_and_name(name) or (UNSPLIT, name)
        refuse_twice(names, (split, short), name, where)
        splits.setdefault(split, {})[short] = array
    if UNSPLIT in splits and len(splits) > 1:
        raise InputError(
            f"some arrays name their split, these do not: {', '.join(splits[UNSPLIT])}",
            where=where,
            remedy="name them train_NAME, validation_NAME and test_NAME, or none of the arrays so",
        )
    return splits


def refuse_twice(names: dict[Value, str], key: Value, name: str, where: str) -> None:
    """Note the name behind a key, such as a split.

    Raises:
        InputError: another name means the same split.
    """
    if key in names:
        raise InputError(
            f"{names[key]!r} and {name!r} both name the same split",
            where=where,
            remedy=f"keep one of them, or rename one: the splits are {', '.join(SPLITS)}",
        )
    names[key] = name


def recognized(names: Iterable[str], where: str) -> dict[str, str]:
    """The split of each name that is one's, by name.

    Raises:
        InputError: two of them name the same split.
    """
    found: dict[str, str] = {}
    for name in names:
        if (split := split_of(name)) is not None:
            refuse_twice(found, split, name, where)
    return {name: split for split, name in found.items()}
