"""Checks of the arrays of a data set; errors name the sample."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgekd.data.dataset import Array, chunks
from edgekd.errors import InputError


def check_arrays(splits: Mapping[str, Mapping[str, Array]], where: str) -> None:
    """Check that each array can be trained on, and that all splits have the same names.

    Raises:
        InputError: the first problem found.
    """
    reference = splits["train"]
    for split, arrays in splits.items():
        if not arrays:
            raise InputError(
                f"the {split} split has no array", where=where, remedy="give inputs and targets"
            )
        for name, array in arrays.items():
            _check_one(split, name, array, where)
        _check_lengths(split, arrays, where)
        if set(arrays) != set(reference):
            odd = sorted(set(arrays) ^ set(reference))
            raise InputError(
                f"the splits have different arrays: {', '.join(odd)} "
                f"{'is' if len(odd) == 1 else 'are'} not in both train and {split}",
                where=where,
                remedy="give every split the same names",
            )


def check_alike(splits: Mapping[str, Mapping[str, Array]], where: str) -> None:
    """Check that each array has the same sample shape and dtype in all splits.

    Raises:
        InputError: one has not.
    """
    for split, arrays in splits.items():
        for name, array in arrays.items():
            first = splits["train"][name]
            if array.shape[1:] != first.shape[1:] or array.dtype != first.dtype:
                raise InputError(
                    f"{name!r} is {_kind(array)} in {split} but {_kind(first)} in train",
                    where=where,
                    remedy="give every split the same sample shape and dtype",
                )


def check_finite(split: str, name: str, array: Array, where: str) -> None:
    """Check that there is no NaN and no infinity.

    Raises:
        InputError: there is one; the first sample is named and the samples are counted.
    """
    if not np.issubdtype(array.dtype, np.floating):
        return
    bad: list[int] = []
    kind = ""
    for start, piece in chunks(array):
        finite = np.isfinite(piece)
        if finite.all():
            continue
        rows = np.flatnonzero(~finite.reshape(len(piece), -1).all(axis=1))
        if not bad:
            kind = "NaN" if np.isnan(piece[rows[0]]).any() else "infinity"
        bad.extend(int(start + row) for row in rows)
    if bad:
        more = f" ({len(bad)} such samples)" if len(bad) > 1 else ""
        raise InputError(
            f"{name!r} holds {kind} in sample {bad[0]} of {split}{more}",
            where=where,
            remedy="remove or fix these samples (counted from 0)",
        )


def _check_one(split: str, name: str, array: Array, where: str) -> None:
    if not name.isidentifier():
        raise InputError(
            f"{name!r} is no usable name for an array",
            where=where,
            remedy="use letters, digits and underscores: the name becomes a model's input",
        )
    if array.dtype.kind not in "biuf":
        raise InputError(
            f"{name!r} of {split} has dtype {array.dtype}, which no model takes",
            where=where,
            remedy="give numbers: uint8 images, float32 vectors, int64 labels",
        )
    if array.ndim == 0:
        raise InputError(
            f"{name!r} of {split} is a single number, not an array of samples",
            where=where,
            remedy="the first axis counts the samples",
        )
    if array.size == 0:
        raise InputError(
            f"{name!r} of {split} is empty: its shape is {array.shape}",
            where=where,
            remedy="give at least one sample",
        )


def _check_lengths(split: str, arrays: Mapping[str, Array], where: str) -> None:
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise InputError(
            f"the arrays of {split} differ in length ({found})",
            where=where,
            remedy="every array needs one row per sample",
        )


def _kind(array: Array) -> str:
    return f"{array.dtype} {tuple(array.shape[1:])}"
