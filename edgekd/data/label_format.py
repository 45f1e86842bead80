"""The form of labels: text, class numbers, one-hot rows or probabilities.

The form is detected, and reported, where only one reading makes sense; where two do, an error
asks for it and names the key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from edgekd.data.dataset import Array
from edgekd.errors import InputError
from edgekd.spec import UNLABELLED

_ROW_SUM_TOLERANCE = 1e-3
"""Of probabilities that were saved in 16 bits or rounded to a few digits."""


@dataclass(frozen=True)
class IntegerLabels:
    """Class numbers as in the file.

    Attributes:
        arrays: by split, int64 (N,) or (N, T).
        columns: how many classes there are, where each had a column.
        remark: what was detected without being declared.
    """

    arrays: Mapping[str, Array]
    columns: int | None = None
    remark: str | None = None


def plain_labels(values: Array, name: str, where: str) -> Array:
    """Numbers or text, (N, 1) as (N,); Python objects converted by their type.

    Raises:
        InputError: the objects are of no one type.
    """
    if values.dtype.kind == "O":
        flat = values.ravel()
        kinds = {type(value) for value in flat}
        if kinds and all(issubclass(kind, str) for kind in kinds):
            values = values.astype(str)
        elif kinds and all(issubclass(kind, (int, np.integer, np.bool_)) for kind in kinds):
            values = np.array(flat.tolist()).reshape(values.shape)
        else:
            shown = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise InputError(
                f"{name!r} holds Python objects: {shown}",
                where=where,
                remedy="give class numbers or names, all of one type",
            )
    elif values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8", errors="replace")
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    return values


def integer_labels(
    found: Mapping[str, Array], form: str | None, name: str, where: str
) -> IntegerLabels | None:
    """Class numbers as in the file, converted from any form.

    Args:
        found: the label array of each split: numbers, (N,), (N, T), (N, C) or (N, T, C).
        form: ``data.label_format``.
        name: the array's name, for messages.
        where: the file or function, for errors.

    Returns:
        None when the numbers are quantities and no classes.

    Raises:
        InputError: the form is not the declared one, or ambiguous.
    """
    if any(values.dtype.kind not in "biuf" for values in found.values()):
        return None
    shape = next(iter(found.values())).shape
    matrix = all(values.ndim >= 2 and values.shape[-1] >= 2 for values in found.values())
    if form in ("one-hot", "probabilities") and not matrix:
        raise InputError(
            f"{name!r} of shape {shape} has no column for each class",
            where=where,
            remedy=f"remove data.label_format: {form}",
        )
    one_hot = form in (None, "one-hot") and matrix and _all(found, _is_one_hot)
    if form == "one-hot" and not one_hot:
        raise InputError(
            f"the rows of {name!r} are not one-hot: a single 1 and otherwise 0",
            where=where,
            remedy="write data.label_format: probabilities to take the largest of each row, or "
            "index when each number is a separate class",
        )
    if one_hot or form == "probabilities":
        remark = None
        if form is None:
            remark = (
                f"{name!r} is one-hot: {shape[-1]} classes, the n-th column is class n "
                "(data.label_format: index reads each number as a separate class)"
            )
        elif form == "probabilities":
            remark = f"the class of {name!r} is the largest of each row"
        largest = {split: _largest(values) for split, values in found.items()}
        return IntegerLabels(largest, shape[-1], remark)
    if form is None and matrix:
        _refuse_matrix(found, name, where)
    remark = None
    if any(values.dtype.kind == "f" for values in found.values()):
        if not _all(found, _is_whole) or _all(found, _is_constant):
            return None
        remark = f"the floats of {name!r} are whole and taken as class numbers"
    return IntegerLabels(
        {split: _int64(values, name, where) for split, values in found.items()}, remark=remark
    )


def _refuse_matrix(found: Mapping[str, Array], name: str, where: str) -> None:
    """Refuse 0/1 matrices and soft labels: more than one reading makes sense."""
    shape = next(iter(found.values())).shape
    columns = shape[-1]
    if len(shape) == 2 and _all(found, _is_binary):
        several = sum(int((v.sum(-1, dtype=np.int64) != 1).sum()) for v in found.values())
        samples = sum(len(values) for values in found.values())
        raise InputError(
            f"{name!r} of shape {shape} holds 0 and 1 only, and {several:,} of "
            f"{samples:,} rows do not have exactly one 1: several classes per sample "
            f"(multi-label), or {columns} questions of 2 classes",
            where=where,
            remedy="write data.label_format: index for one yes-or-no question per column (logits "
            f"(batch, {columns}, 2), accuracy over all of them); for one class per sample "
            "give class numbers",
        )
    if all(v.dtype.kind == "f" for v in found.values()) and _all(found, _is_probability):
        raise InputError(
            f"{name!r} of shape {shape} holds probabilities, not classes: its rows sum to one",
            where=where,
            remedy="write data.label_format: probabilities to take the most probable class of each "
            "row as the label; a teacher's own outputs come from the teacher section",
        )


def _int64(values: Array, name: str, where: str) -> Array:
    if values.size and (
        (values.dtype.kind == "u" and int(values.max()) > np.iinfo(np.int64).max)
        or (values.dtype.kind == "f" and float(np.abs(values).max()) >= 2.0**63)
    ):
        raise InputError(
            f"{name!r} holds {values.max()}, which is no class number",
            where=where,
            remedy="number the classes from 0",
        )
    return values.astype(np.int64, copy=False)


def _all(found: Mapping[str, Array], test: Callable[[Array], bool]) -> bool:
    return all(test(values) for values in found.values())


def _is_binary(values: Array) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def _blank(values: Array) -> Array:
    """Where a complete row is ``UNLABELLED``."""
    return np.asarray((values == UNLABELLED).all(axis=-1))


def _is_one_hot(values: Array) -> bool:
    rows = values[~_blank(values)]
    return _is_binary(rows) and bool((rows.sum(-1, dtype=np.float64) == 1).all())


def _is_probability(values: Array) -> bool:
    rows = values[~_blank(values)].astype(np.float64)
    if not (len(rows) and np.isfinite(rows).all() and (rows >= 0).all()):
        return False
    return bool((np.abs(rows.sum(-1) - 1) <= _ROW_SUM_TOLERANCE * rows.shape[-1]).all())


def _is_whole(values: Array) -> bool:
    return bool(np.isfinite(values).all() and (values == np.floor(values)).all())


def _is_constant(values: Array) -> bool:
    return bool((values == values.flat[0]).all()) if values.size else True


def _largest(values: Array) -> Array:
    return np.where(_blank(values), UNLABELLED, values.argmax(axis=-1)).astype(np.int64)
