"""Inputs of a model: from files or random, as it declares them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Mapping, Sequence

import numpy as np

from edgerun.errors import BadInput
from edgerun.manifest import Manifest
from edgerun.model import (
    BatchLayout,
    ChosenShape,
    TensorInfo,
    check_shape,
    choose_shapes,
    written,
)
from edgerun.npz import NpzFile

Feed = Dict[str, "np.ndarray[Any, Any]"]
"""Input name → contiguous array, ready for the runtime."""

FEEDS = 8

FEW = 8
"""Largest number of integers in an input that may be a count, a length or a shape."""

FEED_BYTES = 4_000_000
MOST_ELEMENTS = 1 << 27
"""Size limit of one random input, in elements: 512 MB in float32."""
"""Several feeds, so that no query repeats the bytes of the previous one; few enough that they
do not flush the caches, because an application's input was prepared just before."""


@dataclass(frozen=True)
class Feeds:
    """Feeds that are used in turn, with their source."""

    feeds: tuple[Feed, ...]
    source: str
    notes: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Source, number of feeds, and per input its shape, dtype and what was chosen."""
        first = self.feeds[0]
        return {
            "source": self.source,
            "feeds": len(self.feeds),
            "inputs": {
                name: {
                    "shape": list(array.shape),
                    "dtype": str(array.dtype),
                    "note": self.notes.get(name, ""),
                }
                for name, array in first.items()
            },
        }


def make_feeds(
    inputs: Sequence[TensorInfo],
    shapes: Mapping[str, tuple[int, ...]],
    batch: int | None = None,
    seed: int = 0,
) -> Feeds:
    """Random feeds from declared inputs; the same seed gives the same bytes.

    Floating-point values are uniform in [0, 1): no denormals, nothing outside the domain of a
    root or logarithm. Wider integers are 0 or 1, which any index, mask or length accepts; 8-bit
    ones cover 0 to 127 (signed) or 255, as pixels and quantized values do.

    Raises:
        BadInput: an input of strings or another type that numpy has not; a shape that does not
            fit.
    """
    check_dtypes(inputs)
    chosen = choose_shapes(inputs, shapes, batch)
    sizes = {t.name: math.prod(chosen[t.name].shape) for t in inputs}
    for tensor in inputs:
        if sizes[tensor.name] > MOST_ELEMENTS:
            raise BadInput(
                f"a random input {tensor.name!r} would have {sizes[tensor.name]:.3g} elements",
                remedy="give a smaller --shape or --batch, or real inputs",
            )
    one = sum(sizes[t.name] * np.dtype(t.dtype).itemsize for t in inputs)
    count = max(1, min(FEEDS, FEED_BYTES // max(1, one)))
    feeds = []
    for index in range(count):
        generator = np.random.default_rng([seed, index])
        feeds.append({t.name: _random(t, chosen[t.name].shape, generator) for t in inputs})
    notes = {t.name: _note(t, chosen[t.name]) for t in inputs}
    return Feeds(tuple(feeds), f"random, seed {seed}", notes)


def _note(tensor: TensorInfo, choice: ChosenShape) -> str:
    """A note on the chosen sizes, and a warning that few integers are often a count or a size."""
    kind = np.dtype(tensor.dtype)
    few = len(choice.shape) <= 1 and int(np.prod(choice.shape)) <= FEW
    if kind.kind not in "iu" or kind.itemsize == 1 or not few:
        return choice.note
    shape = "" if choice.note == "declared" else f"{choice.note}; "
    return f"{shape}0 or 1 at random: a count or a size needs a real one, see --inputs"


def check_dtypes(inputs: Sequence[TensorInfo]) -> None:
    """Raise BadInput for an input that numpy cannot hold."""
    for tensor in inputs:
        if "(" in tensor.dtype:
            raise BadInput(
                f"input {tensor.name!r} is of type {tensor.dtype}, which edgerun cannot feed",
                remedy="move that part (such as a tokenizer) out of the model: inputs must be "
                "tensors of numbers or booleans",
            )


def load_arrays(
    path: Path,
    inputs: Sequence[TensorInfo],
    manifest: Manifest | None = None,
    raw: bool = False,
) -> Feed:
    """The arrays of an npz file that the model takes, in its dtypes.

    Arrays that the model does not take (such as labels) are ignored. Raw ``uint8`` data for a
    floating-point input is preprocessed by the manifest; with ``raw``, data of any dtype is,
    for every input that the manifest has constants for.

    Raises:
        BadInput: not an npz file, a name missing, or a dtype that does not fit.
    """
    check_dtypes(inputs)
    arrays: Feed = {}
    with NpzFile(path) as archive:
        missing = [t.name for t in inputs if t.name not in archive.names]
        if missing:
            raise BadInput(
                f"there is no array {', '.join(map(repr, missing))}",
                where=str(path),
                remedy=f"the model takes: {', '.join(str(t) for t in inputs)}; "
                f"the file has: {', '.join(archive.names) or 'nothing'}",
            )
        for tensor in inputs:
            arrays[tensor.name] = _as_declared(
                archive.read(tensor.name), tensor, path, manifest, raw
            )
    return arrays


@dataclass(frozen=True)
class SampleArrays:
    """Arrays split into batches along the batch axis."""

    arrays: Feed
    layout: BatchLayout
    count: int

    @classmethod
    def of(cls, arrays: Feed, inputs: Sequence[TensorInfo], where: str) -> SampleArrays:
        """Check the arrays' shapes against the declared ones and count the samples.

        Raises:
            BadInput: a shape that does not fit, or inputs with different numbers of samples.
        """
        layout = BatchLayout.of(inputs)
        counts: dict[str, int] = {}
        axes = dict(layout.axes)
        for tensor in inputs:
            shape = arrays[tensor.name].shape
            axis = axes[tensor.name]
            if axis is None or len(shape) != len(tensor.shape):
                check_shape(tensor, shape, where)
                continue
            declared = tensor.shape[axis]
            one_batch = list(shape)
            one_batch[axis] = declared if isinstance(declared, int) else shape[axis]
            check_shape(tensor, one_batch, where)
            # One initial state, with its batch axis after its layers, is used for every sample.
            if axis == 0 or shape[axis] != 1:
                counts[tensor.name] = int(shape[axis])
        total = max(counts.values(), default=1)
        for name, count in counts.items():
            # A model of fixed batch may have a state of exactly that size: it is shared.
            if count != total and layout.size is not None and count == layout.size:
                axes[name] = None
            elif count != total:
                each = ", ".join(f"{n}: {c}" for n, c in counts.items())
                raise BadInput(
                    f"the inputs have different numbers of samples ({each})",
                    where=where,
                    remedy="give every input the same number along its batch axis",
                )
        if total == 0:
            raise BadInput("there are no samples", where, "give at least one")
        return cls(arrays, BatchLayout(axes, layout.size, layout.names), total)

    def feed(self, start: int, batch: int) -> Feed:
        """Samples ``start … start + batch``; the last one is repeated to pad the batch."""
        chosen = np.minimum(np.arange(start, start + batch), self.count - 1)
        whole = start + batch <= self.count
        feed: Feed = {}
        for name, array in self.arrays.items():
            axis = self.layout.axes[name]
            if axis is None:
                part = array
            elif whole and axis == 0:
                part = array[start : start + batch]
            else:
                part = np.take(array, np.minimum(chosen, array.shape[axis] - 1), axis=axis)
            # A scalar must remain one: ascontiguousarray would give it a dimension.
            feed[name] = np.ascontiguousarray(part) if part.ndim else part
        return feed


def feeds_from(
    path: Path,
    inputs: Sequence[TensorInfo],
    batch: int | None,
    manifest: Manifest | None = None,
) -> Feeds:
    """Feeds from the first samples of an npz file.

    Raises:
        BadInput: as :func:`load_arrays` and :meth:`SampleArrays.of`; fewer samples than one batch.
    """
    samples = SampleArrays.of(load_arrays(path, inputs, manifest), inputs, str(path))
    size = samples.layout.batch(batch)
    batched = any(axis is not None for axis in samples.layout.axes.values())
    if batched and samples.count < size:
        raise BadInput(
            f"{samples.count} samples do not fill one batch of {size}",
            where=str(path),
            remedy=f"give at least {size} samples, or a smaller --batch",
        )
    bytes_each = sum(a.nbytes for a in samples.feed(0, size).values())
    count = max(1, min(FEEDS, samples.count // size, FEED_BYTES // max(1, bytes_each)))
    feeds = tuple(samples.feed(i * size, size) for i in range(count))
    return Feeds(feeds, path.name, {})


def _as_declared(
    array: np.ndarray[Any, Any],
    tensor: TensorInfo,
    path: Path,
    manifest: Manifest | None,
    raw: bool,
) -> np.ndarray[Any, Any]:
    wanted = np.dtype(tensor.dtype)
    preprocess = manifest.preprocess.get(tensor.name) if manifest else None
    pixels = array.dtype == np.uint8 and wanted.kind == "f"
    if preprocess is not None and (raw or pixels):
        return preprocess.apply(array).astype(wanted, copy=False)
    if array.dtype == wanted:
        return array
    if pixels:
        raise BadInput(
            f"array {tensor.name!r} is raw uint8, and the model takes {tensor.dtype}",
            where=str(path),
            remedy="give the manifest.json that holds its preprocessing (edgerun run "
            "--manifest), or save preprocessed data",
        )
    if array.dtype.kind in "iu" and wanted.kind in "iu" and array.size:
        limits = np.iinfo(tensor.dtype)
        if int(array.min()) >= limits.min and int(array.max()) <= limits.max:
            return array.astype(wanted)
    elif array.dtype.kind == wanted.kind == "f":
        return array.astype(wanted)
    raise BadInput(
        f"array {tensor.name!r} is {array.dtype}{written(array.shape)}, and the model takes "
        f"{tensor}",
        where=str(path),
        remedy=f"save it as {tensor.dtype}",
    )


def _random(
    tensor: TensorInfo, shape: Sequence[int], generator: np.random.Generator
) -> np.ndarray[Any, Any]:
    kind = np.dtype(tensor.dtype)
    if kind.kind == "f":
        return np.asarray(generator.random(shape, dtype=np.float32)).astype(kind)
    byte = kind.kind in "iu" and kind.itemsize == 1
    above = int(np.iinfo(tensor.dtype).max) + 1 if byte else 2
    # asarray: a scalar's shape () would give a Python number.
    return np.asarray(generator.integers(0, above, shape)).astype(kind)
