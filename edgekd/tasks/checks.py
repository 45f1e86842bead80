"""Checks of a data set's values that every task makes before anything is trained."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgekd.errors import InputError, StageError
from edgekd.tasks.task import Arrays, DatasetLike

_ROWS_AT_ONCE = 4096
"""A memory-mapped array is looked through in pieces, so that it never lies in memory whole."""


def target_arrays(dataset: DatasetLike, target: str, task: str) -> dict[str, np.ndarray[Any, Any]]:
    """The target array of each split.

    Raises:
        InputError: a split is empty or has no such array.
    """
    found = {}
    for split, content in dataset.splits.items():
        if target not in content.arrays:
            known = ", ".join(sorted(content.arrays)) or "nothing"
            raise InputError(
                f"the task {task} needs the target {target!r}, and the data have {known}",
                where=f"split {split}",
                remedy=f"name the array in the pipeline: task_args: {{target: …}}; it is "
                f"{target!r} when left out",
            )
        array = content.arrays[target]
        if len(array) == 0:
            raise InputError(
                f"the split {split!r} has no samples",
                where=f"split {split}",
                remedy="give more data, or change the fraction that is cut off for it",
            )
        found[split] = array
    return found


def check_inputs(dataset: DatasetLike) -> None:
    """Raise InputError for an input that is missing or holds NaN or infinity."""
    for split, content in dataset.splits.items():
        for spec in dataset.inputs:
            if spec.name not in content.arrays:
                raise InputError(
                    f"the split {split!r} has no input {spec.name!r}",
                    where=f"split {split}",
                    remedy=f"it has {', '.join(sorted(content.arrays))}",
                )
            check_finite(content.arrays[spec.name], f"input {spec.name!r}", split)


def check_finite(array: np.ndarray[Any, Any], what: str, split: str) -> None:
    """Raise InputError for the first NaN or infinity, with its sample and position."""
    if array.dtype.kind not in "fc":
        return
    for start in range(0, len(array), _ROWS_AT_ONCE):
        bad = ~np.isfinite(array[start : start + _ROWS_AT_ONCE])
        if not bad.any():
            continue
        position = np.argwhere(bad)[0]
        value = array[start : start + _ROWS_AT_ONCE][tuple(position)]
        inside = [int(i) for i in position[1:]]
        raise InputError(
            f"{what} of sample {start + int(position[0])} is {value}"
            + (f" at {inside}" if inside else ""),
            where=f"split {split}",
            remedy="remove the sample or fill in the value; nothing can be learnt from NaN",
        )


def check_outputs_finite(output: np.ndarray[Any, Any], name: str) -> None:
    """Raise StageError when a model gave NaN or infinity: no metric of it would mean anything."""
    finite = np.isfinite(output.reshape(len(output), -1)).all(axis=1)
    if not finite.all():
        raise StageError(
            f"the model's {name!r} is not finite for {int((~finite).sum())} of "
            f"{len(finite)} samples, first for sample {int(np.argmin(finite))}",
            remedy="lower the learning rate, set clip_norm, or look at the weights it started from",
        )


def required(arrays: Arrays, name: str, kind: str) -> np.ndarray[Any, Any]:
    """An array by name.

    Raises:
        InputError: there is none; the names there are are listed.
    """
    if name not in arrays:
        raise InputError(
            f"there is no {kind} named {name!r}",
            remedy=f"there are: {', '.join(sorted(arrays)) or 'none'}",
        )
    return np.asarray(arrays[name])
