"""Detect the classes in a target array, and number them from 0.

What is detected without being declared is reported. Where more than one reading makes sense, an
error asks for it and names the key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgekd.config.pipeline import DataConfig
from edgekd.data.dataset import Array
from edgekd.data.label_format import IntegerLabels, integer_labels, plain_labels
from edgekd.errors import InputError, is_utf8
from edgekd.spec import UNLABELLED

_SHOWN = 12
_LISTED = 30
_COUNTED_RANGE = 1 << 20
"""Largest range of integers that is counted in a table; sorting a large array is far slower."""

OBSERVED = "observed"
"""``data.classes: observed``: the classes are the values that the labels have, in order."""

Value = int | str


@dataclass(frozen=True)
class ClassTarget:
    """The target that a task reads as classes.

    Attributes:
        name: its array, after the usual names were unified (``labels`` and ``y`` are ``label``).
        count: the number of classes by the task; None: determined from the data.
    """

    name: str = "label"
    count: int | None = None


LABEL_CLASSES = ClassTarget()
"""The array ``label``, with the classes found in the data."""


@dataclass(frozen=True)
class ClassLabels:
    """The labels of each split as class numbers from 0, int64, ``UNLABELLED`` where there is none.

    Attributes:
        arrays: by split, (N,) or (N, T).
        names: the classes' names in their order; None when their numbers are all that is known.
        remarks: messages about what was detected without being declared.
    """

    arrays: Mapping[str, Array]
    names: tuple[str, ...] | None
    remarks: tuple[str, ...] = ()


def read_classes(
    arrays: Mapping[str, Array],
    config: DataConfig,
    *,
    array: str,
    names: Sequence[str] | None = None,
    count: int | None = None,
    where: str = "",
) -> ClassLabels | None:
    """Class numbers from the labels of all splits.

    Args:
        arrays: the label array of each split that has one: integers, booleans, text or whole
            floats, (N,), (N, 1) or one per position (N, T); or one-hot rows (N, C), (N, T, C).
        config: its ``classes``, ``label_format`` and ``unlabelled``.
        array: the array's name, for messages.
        names: the class names of the source, in the order of the classes.
        count: the number of classes by the task.
        where: the file or function, for errors.

    Returns:
        None when the array has quantities and no classes; the task decides whether that is valid.

    Raises:
        InputError: the labels are ambiguous, or of no known form.
    """
    reader = _Reader(config, array, tuple(names) if names else None, count, where)
    found = {split: plain_labels(values, array, where) for split, values in arrays.items()}
    kinds = {"text" if values.dtype.kind == "U" else "number" for values in found.values()}
    if len(kinds) > 1:
        raise reader.error(
            f"{array!r} is text in one split and numbers in another",
            "write the labels of all splits in the same form",
        )
    if kinds == {"text"}:
        return reader.checked(reader.from_text(found))
    numbers = integer_labels(found, config.label_format, array, where)
    return None if numbers is None else reader.checked(reader.from_integers(numbers))


@dataclass
class _Reader:
    config: DataConfig
    name: str
    class_names: tuple[str, ...] | None
    count: int | None
    where: str
    remarks: list[str] = field(default_factory=list)
    columns: bool = False
    """Whether each class has a column, so that ``data.classes`` can only name them."""

    def error(self, what: str, remedy: str) -> InputError:
        return InputError(what, where=self.where or None, remedy=remedy)

    def checked(self, found: ClassLabels) -> ClassLabels:
        """The classes, whose names can be written in UTF-8."""
        for name in found.names or ():
            if not is_utf8(name):
                raise self.error(
                    f"the class name {name!r} is not valid UTF-8",
                    "rename it, for example the folder of its images",
                )
        return found

    def from_text(self, found: Mapping[str, Array]) -> ClassLabels:
        """Labels that are names: in the order given, else sorted, numbers by their size."""
        unknown = "" if self.config.unlabelled == UNLABELLED else str(self.config.unlabelled)
        labelled = {split: values != unknown for split, values in found.items()}
        present = {s: set(v[labelled[s]].ravel().tolist()) for s, v in found.items()}
        given = self._names_given()
        if given is None and self.class_names:
            given = self.class_names
        if given is None:
            every = set[str]().union(*present.values())
            observed = self.config.classes == OBSERVED
            given = tuple(sorted(every if observed else present.get("train", every), key=_natural))
            self._refuse_unseen(present, given)
            self.remarks.append(
                f"{self.name!r} names {len(given)} classes, in this order: {_listed(given)} "
                "(data.classes gives another)"
            )
        self._refuse_outside(present, given)
        self._say_unseen(present, given, None)
        if blank := sum(int((~mask).sum()) for mask in labelled.values()):
            self.remarks.append(f"{blank:,} samples whose {self.name!r} is {unknown!r} count as "
                                "unlabelled")  # fmt: skip
        table = {value: index for index, value in enumerate(given)} | {unknown: UNLABELLED}
        arrays = {}
        for split, values in found.items():
            distinct, inverse = np.unique(values, return_inverse=True)
            numbers = np.array([table[str(value)] for value in distinct], np.int64)
            arrays[split] = numbers[inverse].reshape(values.shape)
        return self._labels(arrays, given)

    def _take_columns(self, classes: int) -> None:
        """Every column is a class, whether a training sample has it or not."""
        given = self._names_given()
        for count, source in (
            (self.count, "task_args.classes says"),
            (len(self.class_names) if self.class_names else None, "the class names say"),
            (None if given is None else len(given), "data.classes says"),
        ):
            if count is not None and count != classes:
                raise self.error(
                    f"{self.name!r} has {classes} columns, and {source} {count} classes",
                    "make them agree",
                )
        self.count, self.columns = classes, True
        if given is not None:
            self.class_names = given

    def from_integers(self, labels: IntegerLabels) -> ClassLabels:
        """Class numbers from 0: those in the file, or their places among ``data.classes``."""
        found = labels.arrays
        if labels.columns is not None:
            self._take_columns(labels.columns)
        if labels.remark is not None:
            self.remarks.append(labels.remark)
        if self.config.unlabelled != UNLABELLED:
            value = self.config.unlabelled
            found = {s: np.where(v == value, UNLABELLED, v) for s, v in found.items()}
        listed = None if self.columns else self._numbers_given(found)
        blank = set() if listed and UNLABELLED in listed else {UNLABELLED}
        present = {split: _distinct(values) - blank for split, values in found.items()}
        if listed is not None:
            self._refuse_outside(present, listed)
            return self._mapped(found, listed)
        names = self.class_names
        known = self.count if self.count is not None else (len(names) if names else None)
        values = set[int]().union(*present.values())
        if not values:
            return self._labels(dict(found), names)
        low, high = min(values), max(values)
        if known is not None and low >= 1 and high == known:
            return self._counted_from_one(found, known, names)
        if known is not None:
            if low < 0 or high >= known:
                self._refuse_outside(present, range(known))
            self._say_unseen(present, range(known), names)
            if self.columns and names is None and max(present.get("train") or {0}) < known - 1:
                names = tuple(map(str, range(known)))
            return self._labels(dict(found), names)
        self._refuse_sign(found, values)
        if low < 0:
            self._refuse_negative(present)
        trained = tuple(sorted(present.get("train", values)))
        self._refuse_unseen(present, trained)
        if len(trained) == high - low + 1 and low == 0:
            return self._labels(dict(found), None)
        if len(trained) == high and low == 1 and len(trained) > 1:
            return self._counted_from_one(found, high, None)
        if len(trained) == 1:
            raise self.error(
                f"every label of {self.name!r} is {low}; there is nothing to classify",
                "give data of two classes or more, or declare how many there are: "
                "task_args: {classes: …}",
            )
        # The labels may be as large as an identifier: only the first missing numbers are listed.
        first = sorted(set(range(min(high + 1, len(trained) + _SHOWN))) - set(trained))[:_SHOWN]
        missing = ", ".join(map(str, first))
        more = ", …" if high + 1 - len(trained) > _SHOWN else ""
        raise self.error(
            f"{self.name!r} holds {len(trained)} different labels from {low} to {high}, so that "
            f"{high + 1 - len(trained):,} numbers below {high + 1:,} have no training sample: "
            f"{missing}{more}",
            f"write data.classes: {_yaml(trained)} when these are the {len(trained)} classes, or "
            f"task_args: {{classes: {high + 1}}} when all numbers from 0 are",
        )

    def _numbers_given(self, found: Mapping[str, Array]) -> tuple[int, ...] | None:
        """The class numbers of ``data.classes``; with ``observed``, those of the labels."""
        if self.config.classes == OBSERVED:
            return tuple(sorted(set[int]().union(*map(_distinct, found.values())) - {UNLABELLED}))
        named = self._names_given()
        if named is None:
            return None
        if self.class_names and {*named} <= {*self.class_names}:
            order = tuple(self.class_names.index(name) for name in named)
            self.class_names = named
            return order
        try:
            values = tuple(map(int, named))
        except ValueError as error:
            raise InputError(
                f"data.classes lists text, and {self.name!r} holds numbers",
                where="data.classes",
                remedy="list the numbers in the order of the classes; {1: cat, 2: dog} names them",
            ) from error
        self._refuse_repeated(values)
        return values

    def _counted_from_one(
        self, found: Mapping[str, Array], count: int, names: tuple[str, ...] | None
    ) -> ClassLabels:
        listed = range(1, count + 1)
        self.remarks.append(
            f"{self.name!r} counts {count} classes from 1: label 1 is class 0 "
            f"(task_args: {{classes: {count + 1}}} counts from 0)"
        )
        return self._labels(_places(found, listed), names or tuple(map(str, listed)))

    def _mapped(self, found: Mapping[str, Array], numbers: Sequence[int]) -> ClassLabels:
        names: tuple[str, ...] | None = None
        if isinstance(self.config.classes, dict):
            names = tuple(self.config.classes.values())
        elif self.class_names:
            names = self.class_names
        else:
            # Also where they count from 0: the last class may have no training sample.
            names = tuple(map(str, numbers))
        for count, source in ((self.count, "task_args.classes says"),
                            (names and len(names), "there are names for")):  # fmt: skip
            if count is not None and count != len(numbers):
                raise self.error(
                    f"data.classes lists {len(numbers)} classes, and {source} {count}",
                    "make them agree",
                )
        self._say_unseen({s: _distinct(v) for s, v in found.items()}, numbers, names)
        return self._labels(_places(found, numbers), names)

    def _names_given(self) -> tuple[str, ...] | None:
        """The values that ``data.classes`` lists as text, in the order of the classes."""
        if self.config.classes is None or self.config.classes == OBSERVED:
            return None
        values = tuple(str(value) for value in self.config.classes)
        self._refuse_repeated(values)
        return values

    def _refuse_repeated(self, values: Sequence[Value]) -> None:
        if repeated := [value for value in values if values.count(value) > 1]:
            raise InputError(
                f"data.classes lists {repeated[0]!r} twice",
                where="data.classes",
                remedy="list each value that the labels have once, in the order of the classes",
            )

    def _labels(self, arrays: Mapping[str, Array], names: Sequence[str] | None) -> ClassLabels:
        if isinstance(self.config.classes, dict):
            names = tuple(self.config.classes.values())
        return ClassLabels(arrays, None if names is None else tuple(names), tuple(self.remarks))

    def _say_unseen(
        self,
        present: Mapping[str, set[Any]],
        classes: Sequence[Value],
        names: Sequence[str] | None,
    ) -> None:
        if "train" not in present or not present["train"]:
            return
        unseen = [
            str(value) if names is None else names[index]
            for index, value in enumerate(classes)
            if value not in present["train"]
        ]
        if unseen:
            self.remarks.append(
                f"{len(unseen)} of {len(classes)} classes have no labelled training sample: "
                f"{_listed(unseen)}"
            )

    def _refuse_unseen(self, present: Mapping[str, set[Any]], trained: Sequence[Value]) -> None:
        known = set(trained)
        for split, values in present.items():
            if known and (unseen := sorted(values - known, key=_natural)):
                every = sorted({*known, *values}, key=_natural)
                raise self.error(
                    f"the {split} split has labels that no training sample has: {_listed(unseen)}",
                    f"write data.classes: {_yaml(every)} to have a class for each of them all the "
                    "same, or remove these samples",
                )

    def _refuse_outside(self, present: Mapping[str, set[Any]], classes: Sequence[Value]) -> None:
        for split, values in present.items():
            if outside := sorted(values - {*classes}, key=_natural):
                source = (
                    f"data.classes lists {_listed(classes)}"
                    if self.config.classes is not None
                    else f"there are {len(classes)} classes, "
                    + (
                        f"counted from 0 to {len(classes) - 1}"
                        if isinstance(classes, range)
                        else _listed(classes)
                    )
                )
                raise self.error(
                    f"{self.name!r} of {split} holds {_listed(outside)}, outside the classes: "
                    f"{source}",
                    f"list every value of the labels in data.classes; {UNLABELLED}, or the value "
                    "of data.unlabelled, is for samples without a label",
                )

    def _refuse_sign(self, found: Mapping[str, Array], values: set[int]) -> None:
        unlabelled = any((labels == UNLABELLED).any() for labels in found.values())
        if values == {1} and unlabelled:
            raise self.error(
                f"{self.name!r} holds {UNLABELLED} and 1 only, and {UNLABELLED} stands for samples "
                "without a label",
                f"write data.classes: [{UNLABELLED}, 1] when both are classes",
            )

    def _refuse_negative(self, present: Mapping[str, set[int]]) -> None:
        split, low = min(((s, min(v)) for s, v in present.items() if v), key=lambda row: row[1])
        raise self.error(
            f"{self.name!r} of {split} holds {low}, outside the classes, which count from 0",
            f"write data.unlabelled: {low} when these samples have no label ({UNLABELLED} says so "
            "by itself), or list the classes in data.classes",
        )


def _distinct(values: Array) -> set[int]:
    if not values.size:
        return set()
    low, high = int(values.min()), int(values.max())
    if high - low < _COUNTED_RANGE:
        counts = np.bincount((values - low).ravel())
        return {int(value) + low for value in np.flatnonzero(counts)}
    return {int(value) for value in np.unique(values)}


def _places(found: Mapping[str, Array], listed: Sequence[int]) -> dict[str, Array]:
    """Each label's place in the list, ``UNLABELLED`` where it is not in it."""
    order = np.argsort(np.asarray(listed))
    ascending = np.asarray(listed)[order]
    places = {}
    for split, values in found.items():
        at = np.searchsorted(ascending, values).clip(max=len(ascending) - 1)
        places[split] = np.where(ascending[at] == values, order[at], UNLABELLED).astype(np.int64)
    return places


def _natural(value: Any) -> tuple[int, int, str]:
    """Numbers by their size, also those in text, before names."""
    text = str(value)
    try:
        return 0, int(text), text
    except ValueError:
        return 1, 0, text


def _listed(values: Sequence[Any]) -> str:
    shown = ", ".join(str(value) for value in values[:_SHOWN])
    return shown + (f", … ({len(values):,} in all)" if len(values) > _SHOWN else "")


def _yaml(values: Sequence[Any]) -> str:
    """What to write as ``data.classes`` to have these values as classes."""
    if len(values) > _LISTED:
        return OBSERVED
    return f"[{', '.join(str(value) for value in values)}]"
