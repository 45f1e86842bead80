"""A dataset: splits of named arrays, in memory or mapped, its folder on disk, and its checks."""

from __future__ import annotations

import json
import reprlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import InputError, StageError
from edgekd.files import write_errors
from edgekd.spec import TensorSpec

Array = NDArray[Any]


def is_image(array: Array) -> bool:
    """Whether an input array is a batch of images: (N, C, H, W)."""
    return array.ndim == 4


@dataclass(frozen=True)
class Preprocess:
    """``(x * scale - mean) / std`` in float32.

    ``mean`` and ``std`` contain one value for all, or one per channel or feature, along
    ``axis`` of the batch; without it along axis 1 of images (N, C, H, W) and the last of others.
    """

    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    axis: int | None = None

    def constants(self, dimensions: int) -> tuple[Array, Array]:
        """``mean`` and ``std`` as float32, shaped to broadcast over an array of this rank."""
        axis = self.axis or (1 if dimensions == 4 else dimensions - 1)
        tail = (1,) * (dimensions - 1 - axis)
        mean = np.asarray(self.mean, np.float32).reshape(-1, *tail)
        std = np.asarray(self.std, np.float32).reshape(-1, *tail)
        return mean, std

    def apply(self, array: Array) -> NDArray[np.float32]:
        """The model's input for a batch of raw samples; the shape stays, the dtype is float32."""
        mean, std = self.constants(array.ndim)
        if array.ndim == 1:
            mean, std = mean.reshape(()), std.reshape(())
        values: NDArray[np.float32] = array.astype(np.float32)
        values *= np.float32(self.scale)
        values -= mean
        values /= std
        return values

    def to_json(self) -> dict[str, Any]:
        """A plain mapping for a JSON file; :meth:`from_json` takes it back."""
        constants = {"scale": self.scale, "mean": list(self.mean), "std": list(self.std)}
        return constants if self.axis is None else {**constants, "axis": self.axis}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Preprocess:
        """The inverse of :meth:`to_json`."""
        return cls(value["scale"], tuple(value["mean"]), tuple(value["std"]), value.get("axis"))


@dataclass(frozen=True)
class Split:
    """Named arrays (N, …) of the same N; they may be memory-mapped."""

    arrays: Mapping[str, Array]

    def __len__(self) -> int:
        return next((len(array) for array in self.arrays.values()), 0)


@dataclass(frozen=True)
class Dataset:
    """The splits ``train``, ``validation`` and ``test`` with what is needed to feed a model.

    Attributes:
        splits: raw arrays: inputs and targets together, by name.
        inputs: the inputs of a model *after* preprocessing, batch dimension first.
        targets: what it is taught, e.g. label int64 (batch,).
        labels: class names in the order of the integer labels, where there are any.
        preprocess: per input name; an input without an entry (integers) is unchanged.
        source: the origin of the samples, as text.
        remarks: what was recognized in the samples and is not written in the pipeline.
    """

    splits: Mapping[str, Split]
    inputs: tuple[TensorSpec, ...]
    targets: tuple[TensorSpec, ...]
    labels: tuple[str, ...] | None
    preprocess: Mapping[str, Preprocess]
    source: str
    remarks: tuple[str, ...] = ()

    def model_inputs(self, split: str, start: int, stop: int) -> dict[str, Array]:
        """The preprocessed inputs of samples ``start`` to ``stop`` of a split."""
        arrays = self.splits[split].arrays
        return {
            spec.name: (
                self.preprocess[spec.name].apply(arrays[spec.name][start:stop])
                if spec.name in self.preprocess
                else np.asarray(arrays[spec.name][start:stop])
            )
            for spec in self.inputs
        }


IN_MEMORY_BYTES = 512_000_000

CHUNK_BYTES = 16_000_000


def allocate(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
    """An uninitialised array, memory-mapped when it is larger than ``IN_MEMORY_BYTES``.

    Raises:
        StageError: there is no space for the temporary file.
    """
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if size <= IN_MEMORY_BYTES:
        return np.empty(shape, dtype)
    try:
        # The mapping outlives the closed file, whose disk space is freed with the array.
        with tempfile.TemporaryFile(prefix="edgekd-") as file:
            return np.memmap(file, dtype, "w+", shape=shape)
    except OSError as error:
        raise StageError(
            f"no space for {size / 1e6:.0f} MB of samples: {error}",
            where=tempfile.gettempdir(),
            remedy="free space there, or set TMPDIR to a larger disk",
        ) from error


def chunks(array: Array) -> Iterator[tuple[int, Array]]:
    """Consecutive pieces of about ``CHUNK_BYTES`` along the first axis, each with its start."""
    row = max(1, array.nbytes // max(1, len(array)))
    step = max(1, CHUNK_BYTES // row)
    for start in range(0, len(array), step):
        yield start, array[start : start + step]


def take(array: Array, indices: NDArray[np.int64]) -> Array:
    """``array[indices]`` in bounded memory."""
    result = allocate((len(indices), *array.shape[1:]), array.dtype)
    for start, piece in chunks(result):
        piece[...] = array[indices[start : start + len(piece)]]
    return result


SCHEMA = "edgekd.dataset/1"

_INDEX = "dataset.json"


def save_dataset(dataset: Dataset, folder: Path) -> None:
    """Write a dataset; the folder is made if need be.

    Raises:
        StageError: it cannot be written (a full disk, no permission).
    """
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
    with write_errors(folder, "the dataset"):
        for split, samples in dataset.splits.items():
            (folder / split).mkdir(parents=True, exist_ok=True)
            for name, array in samples.arrays.items():
                np.save(folder / split / f"{name}.npy", array, allow_pickle=False)
        text = json.dumps(index, indent=1, ensure_ascii=False) + "\n"
        (folder / _INDEX).write_text(text, encoding="utf-8")


def open_dataset(folder: Path) -> Dataset:
    """Read what :func:`save_dataset` wrote; the arrays are memory-mapped, read-only.

    Raises:
        InputError: the folder has no dataset, or it is damaged.
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


Arrays = Mapping[str, Array]

_LONGEST_NAME = 200
"""Bytes; that of a file has at most 255."""


def check_axes(splits: Mapping[str, Arrays], where: str) -> None:
    """Check that each split has arrays, and each array an axis of samples.

    Raises:
        InputError: one has not.
    """
    for split, arrays in splits.items():
        if not arrays:
            raise InputError(
                f"the {split} split has no array", where=where, remedy="give inputs and targets"
            )
        for name, array in arrays.items():
            if array.ndim == 0:
                raise InputError(
                    f"{name!r} of {split} is a single number, not an array of samples",
                    where=where,
                    remedy="the first axis counts the samples",
                )


def check_arrays(splits: Mapping[str, Arrays], where: str) -> None:
    """Check that each array can be trained on, and that all splits have the same names.

    Raises:
        InputError: the first problem found.
    """
    check_axes(splits, where)
    reference = splits["train"]
    for split, arrays in splits.items():
        for name, array in arrays.items():
            _check_one(split, name, array, where)
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name}: {length}" for name, length in lengths.items())
            raise InputError(
                f"the arrays of {split} differ in length ({found})",
                where=where,
                remedy="every array needs one row per sample",
            )
        if set(arrays) != set(reference):
            odd = sorted(set(arrays) ^ set(reference))
            raise InputError(
                f"the splits have different arrays: {', '.join(odd)} "
                f"{'is' if len(odd) == 1 else 'are'} not in both train and {split}",
                where=where,
                remedy="give every split the same names",
            )


def _check_one(split: str, name: str, array: Array, where: str) -> None:
    if not name.isidentifier() or len(name.encode()) > _LONGEST_NAME:
        raise InputError(
            f"{reprlib.repr(name)} is no usable name for an array",
            where=where,
            remedy="use letters, digits and underscores, at most 200 bytes: the name becomes a "
            "model's input and a file's",
        )
    if array.dtype.kind not in "biuf":
        raise InputError(
            f"{name!r} of {split} has dtype {array.dtype}, which no model takes",
            where=where,
            remedy="give numbers: uint8 images, float32 vectors, int64 labels",
        )
    if array.size == 0:
        raise InputError(
            f"{name!r} of {split} is empty: its shape is {array.shape}",
            where=where,
            remedy="give at least one sample",
        )


def check_samples(splits: Mapping[str, Arrays], where: str) -> None:
    """Check that each array has one sample shape and dtype in all splits, no NaN and no infinity.

    Raises:
        InputError: one has not; the first sample is named and such samples are counted.
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
    for split, arrays in splits.items():
        for name, array in arrays.items():
            if array.dtype.kind == "f":
                _check_finite(split, name, array, where)


def _check_finite(split: str, name: str, array: Array, where: str) -> None:
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


def _kind(array: Array) -> str:
    return f"{array.dtype} {tuple(array.shape[1:])}"
