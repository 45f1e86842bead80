"""How people name training, validation and test splits: folders, arrays and keys."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from edgekd.data.source import SPLITS, UNSPLIT
from edgekd.errors import InputError

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
