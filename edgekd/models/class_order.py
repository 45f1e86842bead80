"""The order of a network's outputs: class names in its file, and evidence from labelled samples."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import InputError, nearest

_KEYS = (
    "class_to_idx", "idx_to_class", "id2label", "label2id", "classes", "class_names", "names",
    "labels", "label_names", "classnames", "categories", "CLASSES", "class_labels",
)  # fmt: skip
_CONTAINERS = (
    "hyper_parameters", "hparams", "config", "cfg", "args", "opt", "meta", "metadata",
    "dataset_meta", "info", "extra", "data",
)  # fmt: skip
"""Keys under which trainers store them; the first one found is used."""

_NESTING = 3
_SIGNIFICANCE = 1e-3
_CLEARLY = 2.0
"""How many times as many samples another order must have right."""


@dataclass(frozen=True)
class ClassNames:
    """The classes of a network's outputs in their order, and where that is written."""

    names: tuple[str, ...]
    source: str


def class_names_in(content: object, nesting: int = _NESTING) -> ClassNames | None:
    """The class names in a checkpoint's content next to its weights; None without any."""
    held = content if isinstance(content, Mapping) else getattr(content, "__dict__", None)
    if not isinstance(held, Mapping):
        return None
    for key in _KEYS:
        names = _as_names(held.get(key))
        if names is not None:
            return ClassNames(names, key)
    for key in _CONTAINERS if nesting else ():
        found = class_names_in(held.get(key), nesting - 1)
        if found is not None:
            return ClassNames(found.names, f"{key}.{found.source}")
    return None


def class_names_in_metadata(metadata: Mapping[str, str]) -> ClassNames | None:
    """The class names in the texts of an ONNX or safetensors file: JSON, a Python literal (as
    Ultralytics writes them), one to a line, or separated by commas."""
    for key in _KEYS:
        names = _as_names(_parsed(metadata[key])) if key in metadata else None
        if names is not None:
            return ClassNames(names, key)
    return None


def output_order(
    found: ClassNames, labels: Sequence[str], where: str, stated: bool
) -> tuple[int, ...] | None:
    """Which output is each of the data's classes.

    Args:
        found: the outputs' names.
        labels: the data's class names in their order.
        where: the YAML key, for errors.
        stated: the user wrote the names; those of a file may be another language's.

    Returns:
        A position for each label; None when names of a file are none of the data's.

    Raises:
        InputError: some of the data's classes are named and some are not.
    """
    positions = _positions(found.names, labels)
    lacking = [label for label, at in zip(labels, positions, strict=True) if at is None]
    if not lacking:
        return tuple(at for at in positions if at is not None)
    if len(lacking) == len(labels) and not stated:
        return None
    guess = nearest(lacking[0], found.names)
    raise InputError(
        f"{found.source} names {len(found.names)} outputs of the teacher, and none of them is the "
        f"class {lacking[0]!r}"
        + (f" ({len(lacking)} of the data's {len(labels)} are missing)" if lacking[1:] else ""),
        where=where,
        remedy=(f"is it {guess!r}? " if guess else "")
        + "name the outputs in their order as the data name their classes: "
        f"teacher.classes: [{', '.join(labels[:4])}{', …' if labels[4:] else ''}]",
    )


def class_list(names: Sequence[str]) -> str:
    """Names as a line of YAML."""
    return f"classes: {json.dumps(list(names), ensure_ascii=False)}"


def fitting_permutation(
    labels: NDArray[np.int64], predictions: NDArray[np.int64], classes: int
) -> tuple[int, ...] | None:
    """The order of outputs in which a classifier would be right far more often.

    The permutation is found on one half of the samples (Kuhn 1955, on the matrix of confusions)
    and tested on the other, and vice versa, so that a good fit by chance does not count:
    a one-sided sign test of the samples that only one order has right must be below 0.001. Only
    cycles count that have most samples right, at least twice as many as before, and in which no
    class clearly fits better unmoved; all other classes keep their position.

    Args:
        labels: (N,) the right classes.
        predictions: (N,) the largest outputs.
        classes: how many there are.

    Returns:
        For each class the index of its output; None when the order is correct, or
        the samples are inconclusive.
    """
    # By class, so that each half has samples of every one.
    order = np.argsort(labels, kind="stable")
    halves = [_confusion(labels[order[i::2]], predictions[order[i::2]], classes) for i in (0, 1)]
    gained = lost = 0
    for found_on, tried_on in (halves, halves[::-1]):
        permutation = _clear_cycles(found_on)
        moved = permutation != np.arange(classes)
        rows = np.arange(classes)[moved]
        gained += int(tried_on[rows, permutation[moved]].sum())
        lost += int(tried_on[rows, rows].sum())
    if gained <= _CLEARLY * lost or _sign_test(gained, lost) >= _SIGNIFICANCE:
        return None
    best = _clear_cycles(halves[0] + halves[1])
    return None if (best == np.arange(classes)).all() else tuple(map(int, best))


def _clear_cycles(confusion: NDArray[np.int64]) -> NDArray[np.int64]:
    """The best assignment of outputs to classes, without its cycles that are hardly better."""
    from scipy.optimize import linear_sum_assignment

    classes = len(confusion)
    # Of equally good assignments the one that moves least.
    _, best = linear_sum_assignment(confusion + 0.5 * np.eye(classes), maximize=True)
    kept = np.arange(classes)
    seen: set[int] = set()
    for start in range(classes):
        cycle, at = [], start
        while at not in seen:
            seen.add(at)
            cycle.append(at)
            at = int(best[at])
        moved, stay = confusion[cycle, best[cycle]], confusion[cycle, cycle]
        better_off = (stay - moved > 2 * np.sqrt(stay + moved)) & (
            2 * stay > confusion[cycle].sum(axis=1)
        )
        # A network without skill, such as one with wrongly preprocessed inputs, is not right
        # most of the time in any order.
        knows = 2 * moved.sum() > confusion[cycle].sum()
        clearly = moved.sum() >= _CLEARLY * stay.sum() and not better_off.any()
        if len(cycle) > 1 and knows and clearly:
            kept[cycle] = best[cycle]
    return kept


def _confusion(
    labels: NDArray[np.int64], predictions: NDArray[np.int64], classes: int
) -> NDArray[np.int64]:
    """How often each class (row) got each output (column) as the largest."""
    counts = np.bincount(labels * classes + predictions, minlength=classes * classes)
    return counts.reshape(classes, classes)


def _sign_test(gained: int, lost: int) -> float:
    """The chance of so many gains or more if gains and losses were equally likely."""
    from scipy.special import bdtrc

    return float(bdtrc(gained - 1, gained + lost, 0.5)) if gained else 1.0


def _positions(names: Sequence[str], labels: Sequence[str]) -> list[int | None]:
    exact = {name.strip(): at for at, name in enumerate(names)}
    if all(label.strip() in exact for label in labels):
        return [exact[label.strip()] for label in labels]
    loose = {_plain(name): at for at, name in enumerate(names)}
    if len(loose) < len(names) or len(set(map(_plain, labels))) < len(labels):
        return [exact.get(label.strip()) for label in labels]
    return [loose.get(_plain(label)) for label in labels]


def _plain(name: str) -> str:
    """A name without case, spaces, hyphens and underscores."""
    return re.sub(r"[\s_\-/]+", "", name).casefold()


def _as_names(value: Any) -> tuple[str, ...] | None:
    """Names in their order: of a list, or of a mapping from or to numbers 0 to K - 1."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        pairs = list(value.items())
        if all(isinstance(v, int) for _, v in pairs):
            pairs = [(v, k) for k, v in pairs]
        try:
            numbered = {int(number): name for number, name in pairs}
        except (TypeError, ValueError):
            return None
        if sorted(numbered) != list(range(len(pairs))):
            return None
        value = [numbered[number] for number in range(len(pairs))]
    if not isinstance(value, list | tuple) or len(value) < 2:
        return None
    if not all(isinstance(name, str) for name in value) or len(set(value)) < len(value):
        return None
    # The placeholder names of transformers.
    if all(re.fullmatch(r"LABEL_\d+", name) for name in value):
        return None
    return tuple(value)


def _parsed(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    lines = [line.strip() for line in text.strip().splitlines()]
    return lines if len(lines) > 1 else [part.strip() for part in text.split(",")]
