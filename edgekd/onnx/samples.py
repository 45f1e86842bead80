"""Samples for an ONNX model: arrays, random inputs, and .npz or .npy files read as a stream."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from edgekd.errors import InputError, nearest
from edgekd.files import require_regular_file
from edgekd.onnx.file import UNKNOWN_RANK
from edgekd.spec import Dimension, ModelSpec, TensorSpec
from edgerun.inputs import MOST_ELEMENTS
from edgerun.model import BatchLayout, TensorInfo
from edgerun.npz import ArrayHeader, NpzFile, read_header

Array = npt.NDArray[Any]


class Samples(Protocol):
    """The inputs of a model by name, preprocessed as the model expects them."""

    @property
    def count(self) -> int:
        """The number of samples."""
        ...

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """All samples in their order, ``size`` at a time (the last batch may be smaller).

        Each call starts from the first sample. Arrays are (size, …), inputs by name.
        """
        ...


class ArraySamples:
    """Samples that are in memory already: arrays (N, …) by input name."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        count = min(map(len, arrays.values()), default=0)
        self._arrays = {name: np.asarray(array)[:count] for name, array in arrays.items()}
        self.count = count

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """As :meth:`Samples.batches`."""
        for start in range(0, self.count, size):
            yield {name: array[start : start + size] for name, array in self._arrays.items()}


def is_mask(values: Array) -> bool:
    """Whether floats are 0 or below, including -inf: a mask that is added before a softmax to
    exclude places. Other infinities, and NaN, are broken data."""
    return values.dtype.kind == "f" and bool((values <= 0).all())


def random_inputs(spec: ModelSpec, size: int = 1, seed: int = 0) -> dict[str, Array]:
    """Inputs of the right shapes for a model about which nothing else is known.

    Floats are standard normal, all else is zero. The first input is treated as the data and later
    ones for its state: symbolic dimensions of the first input but its first one (the batch) are
    ``size`` wherever they occur, all others are 1.

    Raises:
        InputError: an input has no known number of dimensions, or strings, or is too large.
    """
    random = np.random.default_rng(seed)
    free = {d for tensor in spec.inputs[:1] for d in tensor.shape[1:] if isinstance(d, str)}
    inputs: dict[str, Array] = {}
    for tensor in spec.inputs:
        if tensor.dtype == "string" or UNKNOWN_RANK in tensor.shape:
            raise InputError(
                f"no random input for {tensor}",
                where=tensor.name,
                remedy="give samples",
            )
        shape = tuple(d if isinstance(d, int) else size if d in free else 1 for d in tensor.shape)
        if math.prod(shape) > MOST_ELEMENTS:
            raise InputError(
                f"a random input {tensor.name!r} would have {math.prod(shape):.3g} elements",
                remedy="give samples, or export the model for a smaller input",
            )
        floating = "float" in tensor.dtype
        values = random.standard_normal(shape) if floating else np.zeros(shape)
        inputs[tensor.name] = np.asarray(values).astype(tensor.dtype)
    return inputs


def spec_layout(inputs: Sequence[TensorSpec]) -> BatchLayout:
    """Where a model's declared inputs count samples."""
    return BatchLayout.of(
        [
            TensorInfo(t.name, t.dtype, (None,) if t.shape == (UNKNOWN_RANK,) else t.shape)
            for t in inputs
        ]
    )


def open_samples(path: Path, spec: ModelSpec) -> Samples:
    """The samples of a file: an .npz with one array (N, …) per input of the model under the
    input's name, or an .npy for a model of one input. Additional arrays (labels) are ignored.

    A state whose batch is another axis, [2, batch, 6], is (2, N, 6) or (N, 2, 6); an input without
    a batch, such as a sampling rate, is one for all samples or (N, …). Batches are (n, …) of all.

    Only headers are read here; the elements are read, and checked for NaN and infinite values,
    when batches are read.

    Raises:
        InputError: the file is missing, truncated or neither kind; it has no samples; an input has
            no array, or one of another shape, dtype or count; an array is in Fortran order or
            pickled. While reading: the file is truncated or a value is NaN or infinite, other
            than -inf in a mask.
    """
    headers = _headers(path, spec)
    layout = spec_layout(spec.inputs)
    counts: dict[str, int] = {}
    others: dict[str, _Arranged] = {}
    for tensor in spec.inputs:
        header = headers[tensor.name]
        _check_type(path, tensor, header)
        state = _state_of_fixed_batch(tensor, layout, header.shape) if counts else None
        if state is not None and header.shape[:1] != (max(counts.values()),):
            others[tensor.name] = state
        elif layout.axes[tensor.name] == 0:
            _check_shape(path, tensor, header)
            counts[tensor.name] = header.shape[0]
        else:
            others[tensor.name] = _arranged(path, tensor, layout, header.shape)
    for name, arranged in others.items():
        shared = arranged.count in (1, layout.size) and arranged.count not in counts.values()
        if not (counts and shared):
            counts[name] = arranged.count
    _check_symbols(path, spec, headers, set(others))
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name!r} {count}" for name, count in counts.items())
        raise InputError(
            f"the arrays have different numbers of samples: {listed}",
            where=str(path),
            remedy="give each input one row per sample, in the same order",
        )
    count = min(counts.values(), default=0)
    if count == 0:
        raise InputError(
            "the file has no samples",
            where=str(path),
            remedy="save some hundred real inputs, preprocessed as the model expects them",
        )
    return _FileSamples(path, headers, count, others)


@dataclass(frozen=True)
class _Arranged:
    """How the array of an input that does not count samples on its first axis becomes (n, …):
    reshaped, then one axis moved to the front. ``every``: a query takes one value for
    all its samples, so that different ones must be run one at a time."""

    shape: tuple[int, ...]
    axis: int
    every: bool

    @property
    def count(self) -> int:
        """The number of samples."""
        return self.shape[self.axis]

    def apply(self, array: Array) -> Array:
        """Rows (n, …) of the array in the file's layout."""
        return np.moveaxis(array.reshape(self.shape), self.axis, 0)


@dataclass
class _FileSamples:
    """Samples read from a file batch by batch; made by :func:`open_samples`.

    ``others`` are the inputs that do not count samples on their first axis: read completely.
    """

    path: Path
    headers: dict[str, ArrayHeader]
    count: int
    others: dict[str, _Arranged]
    _whole: dict[str, Array] | None = None

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """As :meth:`Samples.batches`."""
        with ExitStack() as stack:
            streams = self._streams(stack)
            if self._whole is None:
                self._whole = {
                    name: arranged.apply(self._read(streams[name], name, 0, None))
                    for name, arranged in self.others.items()
                }
            if any(
                arranged.every and not (self._whole[name] == self._whole[name][:1]).all()
                for name, arranged in self.others.items()
            ):
                size = 1
            for start in range(0, self.count, size):
                rows = min(size, self.count - start)
                batch = {}
                for name in self.headers:
                    if name in self._whole:
                        whole = self._whole[name]
                        batch[name] = whole[np.arange(start, start + rows) % len(whole)]
                    else:
                        batch[name] = self._read(streams[name], name, start, rows)
                yield batch

    def _streams(self, stack: ExitStack) -> dict[str, IO[bytes]]:
        if _is_npy(self.path):
            stream = stack.enter_context(self.path.open("rb"))
            _npy_header(self.path, stream)
            return dict.fromkeys(self.headers, stream)
        archive = stack.enter_context(NpzFile(self.path, InputError))
        return {name: stack.enter_context(archive.open(name)[1]) for name in self.headers}

    def _read(self, stream: IO[bytes], name: str, start: int, rows: int | None) -> Array:
        """The next rows of an array, or all of it."""
        header = self.headers[name]
        shape = header.shape if rows is None else (rows, *header.shape[1:])
        wanted = int(np.prod(shape, dtype=np.int64)) * header.dtype.itemsize
        try:
            content = stream.read(wanted)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise _truncated(self.path) from error
        if len(content) < wanted:
            raise _truncated(self.path)
        array = np.frombuffer(content, header.dtype).reshape(shape)
        array = array.astype(header.dtype.newbyteorder("="), copy=False)
        if array.dtype.kind in "fc" and not np.isfinite(array).all() and not is_mask(array):
            bad = ~np.isfinite(array).reshape(rows or 1, -1).all(axis=1)
            which = "" if rows is None else f" of sample {start + int(bad.argmax())}"
            raise InputError(
                f"input {name!r}{which} has a NaN or infinite value",
                where=str(self.path),
                remedy="leave the sample out or repair it; samples are counted from 0",
            )
        return array


def _headers(path: Path, spec: ModelSpec) -> dict[str, ArrayHeader]:
    require_regular_file(path, "give an .npz file with one array per input of the model")
    if not path.is_file():
        raise InputError("the file does not exist", where=str(path), remedy="check the path")
    if _is_npy(path):
        if len(spec.inputs) != 1:
            raise InputError(
                f"an .npy file holds one array, the model takes {len(spec.inputs)} inputs",
                where=str(path),
                remedy=f"write an .npz file with {_named(spec)}",
            )
        with path.open("rb") as stream:
            return {spec.inputs[0].name: _npy_header(path, stream)}
    if not zipfile.is_zipfile(path) and not _starts_with(path, b"PK"):
        raise InputError(
            "the file is neither .npz nor .npy",
            where=str(path),
            remedy="write it with numpy: np.savez(file, NAME=array, …) with the names of the "
            f"inputs: {_named(spec)}",
        )
    headers = {}
    with NpzFile(path, InputError) as archive:
        for tensor in spec.inputs:
            if tensor.name not in archive.names:
                guess = nearest(tensor.name, archive.names)
                hint = f"rename {guess!r} to {tensor.name!r}; " if guess else ""
                raise InputError(
                    f"the file has no array for input {tensor.name!r}",
                    where=str(path),
                    remedy=f"{hint}the model takes {_named(spec)}; "
                    f"the file has {', '.join(sorted(archive.names)) or 'nothing'}",
                )
            headers[tensor.name], elements = archive.open(tensor.name)
            elements.close()
    return headers


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(magic)) == magic


def _is_npy(path: Path) -> bool:
    return _starts_with(path, b"\x93NUMPY")


def _npy_header(path: Path, stream: IO[bytes]) -> ArrayHeader:
    try:
        header = read_header(stream)
    except Exception as error:  # numpy's parser raises errors of many kinds
        raise _truncated(path) from error
    if not header.dtype.hasobject and header.nbytes > path.stat().st_size - stream.tell():
        raise _truncated(path)
    return header


def _arranged(
    path: Path, tensor: TensorSpec, layout: BatchLayout, shape: tuple[int, ...]
) -> _Arranged:
    """The layout of an array for an input whose samples the model has on another axis than 0.

    A state [2, batch, 6] may be in the file as the model expects it, (2, N, 6), or with its samples
    first, (N, 2, 6) and (N, 2, 1, 6); of 1 sample, or of a fixed batch, it serves all. An input
    without a batch is one for all samples, or one for each: (N, …).

    Raises:
        InputError: the array has none of these shapes.
    """
    axis, declared = layout.axes[tensor.name], tensor.shape
    if axis is None:
        if _fits(shape, declared) or (not declared and shape == (1,)):
            return _Arranged((1, *(shape if declared else ())), 0, True)
        if len(shape) == len(declared) + 1 and _fits(shape[1:], declared):
            return _Arranged(shape, 0, True)
        if declared and declared[0] == 1 and _fits((1, *shape[1:]), declared):
            return _Arranged((shape[0], 1, *shape[1:]), 0, True)
        forms = f"{_form(declared)} for all samples, or {_form(('N', *declared))}"
    else:
        one = (*declared[:axis], *declared[axis + 1 :])
        opened = (*declared[:axis], "N", *declared[axis + 1 :])
        if _fits(shape, opened):
            return _Arranged(shape, axis, False)
        if shape and _fits(shape[1:], one):
            return _Arranged(shape, 0, False)
        if shape and _fits(shape[1:], (*declared[:axis], 1, *declared[axis + 1 :])):
            return _Arranged((shape[0], *shape[1 : axis + 1], *shape[axis + 2 :]), 0, False)
        forms = f"{_form(opened)}, as the model expects it, or {_form(('N', *one))}"
    raise InputError(
        f"the array of {tensor.name!r} has shape {shape}, the model takes {tensor}",
        where=str(path),
        remedy=f"with N samples, give {forms}",
    )


def _state_of_fixed_batch(
    tensor: TensorSpec, layout: BatchLayout, shape: tuple[int, ...]
) -> _Arranged | None:
    """A state next to the data of a model with a fixed batch: [1, 1, 5] may be that for all
    samples, or (1, N, 5) where the second 1 is the batch."""
    size = layout.size
    if size is None or layout.axes[tensor.name] != 0 or len(shape) != len(tensor.shape):
        return None
    if _fits(shape, tensor.shape):
        return _Arranged(shape, 0, False)
    for axis, declared in list(enumerate(tensor.shape))[1:]:
        opened = (*tensor.shape[:axis], "N", *tensor.shape[axis + 1 :])
        if declared == size and _fits(shape, opened):
            return _Arranged(shape, axis, False)
    return None


def _fits(shape: tuple[int, ...], declared: tuple[Dimension, ...]) -> bool:
    return len(shape) == len(declared) and all(
        not isinstance(wanted, int) or found == wanted
        for found, wanted in zip(shape, declared, strict=True)
    )


def _form(shape: tuple[Dimension, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def _check_type(path: Path, tensor: TensorSpec, header: ArrayHeader) -> None:
    where = str(path)
    if header.dtype.hasobject:
        raise InputError(
            f"the array of {tensor.name!r} is pickled objects, not numbers",
            where=where,
            remedy=f"save it as {tensor.dtype}: np.stack(samples).astype(np.{tensor.dtype})",
        )
    text = tensor.dtype == "string"
    if header.dtype.kind != "U" if text else header.dtype.newbyteorder("=").name != tensor.dtype:
        raise InputError(
            f"input {tensor.name!r} is {tensor.dtype}, the file has {header.dtype.name}",
            where=where,
            remedy=f"preprocess it as the model expects it, then array.astype(np.{tensor.dtype})",
        )
    if header.fortran:
        raise InputError(
            f"the array of {tensor.name!r} is in Fortran order, which cannot be read in batches",
            where=where,
            remedy="save np.ascontiguousarray(array)",
        )


def _check_shape(path: Path, tensor: TensorSpec, header: ArrayHeader) -> None:
    """Raise InputError for an array whose rows do not fit the model."""
    if tensor.shape == (UNKNOWN_RANK,):
        wrong = None if header.shape else "it has no dimension for the samples"
    elif len(header.shape) != len(tensor.shape) or not header.shape:
        wrong = f"it has {len(header.shape)} dimensions, the model takes {len(tensor.shape)}"
    else:
        # Axis 0 counts the samples, also where the model's own batch is fixed.
        wrong = next(
            (
                f"axis {axis} has {found}, the model takes {wanted}"
                for axis, (found, wanted) in enumerate(zip(header.shape, tensor.shape, strict=True))
                if axis and isinstance(wanted, int) and found != wanted
            ),
            None,
        )
    if wrong:
        raise InputError(
            f"the array of {tensor.name!r} has shape {header.shape}: {wrong}",
            where=str(path),
            remedy=f"the model takes {tensor}; put the samples along axis 0",
        )


def _check_symbols(
    path: Path, spec: ModelSpec, headers: dict[str, ArrayHeader], others: set[str]
) -> None:
    """Dimensions of one name (sequence length) have one size in all inputs of data."""
    sizes: dict[str, tuple[str, int]] = {}
    for tensor in spec.inputs:
        if tensor.shape == (UNKNOWN_RANK,) or tensor.name in others:
            continue
        shape = headers[tensor.name].shape
        for axis, wanted in list(enumerate(tensor.shape))[1:]:
            if not isinstance(wanted, str):
                continue
            other, size = sizes.setdefault(wanted, (tensor.name, shape[axis]))
            if size != shape[axis]:
                raise InputError(
                    f"dimension {wanted!r} is {size} in {other!r} and {shape[axis]} in "
                    f"{tensor.name!r} (axis {axis})",
                    where=str(path),
                    remedy="give both inputs the same size there",
                )


def _named(spec: ModelSpec) -> str:
    return ", ".join(map(str, spec.inputs))


def _truncated(path: Path) -> InputError:
    return InputError(
        "the file of samples is truncated or damaged",
        where=str(path),
        remedy=f"it has {path.stat().st_size} bytes; copy or write it again",
    )
