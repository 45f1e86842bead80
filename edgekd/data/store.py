"""A dataset in a folder: ``<split>/<name>.npy`` for each array, and ``dataset.json``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.data.dataset import Array, Dataset, Preprocess, Split
from edgekd.errors import InputError, StageError
from edgekd.spec import TensorSpec

SCHEMA = "edgekd.dataset/1"
_INDEX = "dataset.json"


def save_dataset(dataset: Dataset, folder: Path) -> None:
    """Write a dataset; the folder is made if need be.

    Raises:
        StageError: it cannot be written (a full disk, no permission).
    """
    try:
        for split, samples in dataset.splits.items():
            (folder / split).mkdir(parents=True, exist_ok=True)
            for name, array in samples.arrays.items():
                np.save(folder / split / f"{name}.npy", array, allow_pickle=False)
        index = {
            "schema": SCHEMA,
            "source": dataset.source,
            "splits": {split: list(s.arrays) for split, s in dataset.splits.items()},
            "samples": {split: len(s) for split, s in dataset.splits.items()},
            "inputs": [asdict(spec) for spec in dataset.inputs],
            "targets": [asdict(spec) for spec in dataset.targets],
            "labels": dataset.labels,
            "preprocess": {name: p.to_json() for name, p in dataset.preprocess.items()},
            "remarks": list(dataset.remarks),
        }
        text = json.dumps(index, indent=1, ensure_ascii=False) + "\n"
        (folder / _INDEX).write_text(text, encoding="utf-8")
    except OSError as error:
        raise StageError(
            f"the dataset cannot be written: {error.strerror or error}",
            where=str(folder),
            remedy="make room on the disk, or mend the folder's permissions",
        ) from error


def open_dataset(folder: Path) -> Dataset:
    """Read what :func:`save_dataset` wrote; the arrays are memory-mapped, read-only.

    Raises:
        InputError: the folder holds no dataset, or it is damaged.
    """
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        if index["schema"] != SCHEMA:
            raise ValueError(f"its schema is {index['schema']!r}, not {SCHEMA!r}")
        splits = {
            split: Split({name: _open(folder / split / f"{name}.npy") for name in names})
            for split, names in index["splits"].items()
        }
        return Dataset(
            splits=splits,
            inputs=_specs(index["inputs"]),
            targets=_specs(index["targets"]),
            labels=None if index["labels"] is None else tuple(index["labels"]),
            preprocess={n: Preprocess.from_json(p) for n, p in index["preprocess"].items()},
            source=index["source"],
            remarks=tuple(index.get("remarks", ())),
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"the stored dataset cannot be opened: {error}",
            where=str(folder),
            remedy="remove the folder, so that the data stage makes it again",
        ) from error


def _open(path: Path) -> Array:
    array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _specs(rows: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(row["name"], tuple(row["shape"]), row["dtype"]) for row in rows)
