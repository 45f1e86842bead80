"""Samples in an .npz or .npy file, read as a stream: memory holds one batch, not the file."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from edgekd.engines.onnx_file import UNKNOWN_RANK
from edgekd.engines.samples import Array, Samples, is_mask
from edgekd.errors import InputError, nearest
from edgekd.spec import ModelSpec, TensorSpec

_NPY_MAGIC = b"\x93NUMPY"
# What zipfile and zlib raise for a file that was cut off or changed on its way.
_BROKEN = (zipfile.BadZipFile, EOFError, ValueError, OSError, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class _Header:
    """What the file says of one array before its elements; ``member`` None is a bare .npy."""

    member: str | None
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool


def open_samples(path: Path, spec: ModelSpec) -> Samples:
    """The samples of a file: an .npz with one array (N, …) per input of the model under the
    input's name, or an .npy for a model of one input. Further arrays (labels) are left alone.

    Only headers are read here; the elements are read, and checked for NaN and infinite values,
    when batches are asked for.

    Raises:
        InputError: the file is missing, truncated or neither kind; it has no samples; the model
            does not take its samples along axis 0 of every input; an input has no array, or one
            of another shape, dtype or count; an array is in Fortran order or pickled. While
            reading: the file is truncated or a value is NaN or infinite, other than -inf in a mask.
    """
    headers = _headers(path, spec)
    _check_layout(path, spec)
    counts = {}
    for tensor in spec.inputs:
        _check_array(path, tensor, headers[tensor.name])
        counts[tensor.name] = headers[tensor.name].shape[0]
    _check_symbols(path, spec, headers)
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
            remedy="save some hundred real inputs, preprocessed as the model takes them",
        )
    return _FileSamples(path, spec, {t.name: headers[t.name] for t in spec.inputs}, count)


class _FileSamples:
    """See :func:`open_samples`."""

    def __init__(
        self, path: Path, spec: ModelSpec, headers: dict[str, _Header], count: int
    ) -> None:
        self._path, self._spec, self._headers, self._count = path, spec, headers, count

    @property
    def count(self) -> int:
        """The number of samples."""
        return self._count

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """See :class:`edgekd.engines.samples.Samples`."""
        with ExitStack() as stack:
            streams = self._streams(stack)
            for start in range(0, self._count, size):
                rows = min(size, self._count - start)
                yield {
                    tensor.name: self._read(streams[tensor.name], tensor, start, rows)
                    for tensor in self._spec.inputs
                }

    def _streams(self, stack: ExitStack) -> dict[str, IO[bytes]]:
        streams: dict[str, IO[bytes]] = {}
        try:
            archive: zipfile.ZipFile | None = None
            for name, header in self._headers.items():
                if header.member is None:
                    streams[name] = stack.enter_context(self._path.open("rb"))
                else:
                    archive = archive or stack.enter_context(zipfile.ZipFile(self._path))
                    streams[name] = stack.enter_context(archive.open(header.member))
                _read_header(streams[name], header.member)
        except _BROKEN as error:
            raise _truncated(self._path) from error
        return streams

    def _read(self, stream: IO[bytes], tensor: TensorSpec, start: int, rows: int) -> Array:
        header = self._headers[tensor.name]
        shape = (rows, *header.shape[1:])
        wanted = int(np.prod(shape, dtype=np.int64)) * header.dtype.itemsize
        try:
            content = stream.read(wanted)
        except (*_BROKEN, zipfile.zlib.error) as error:  # type: ignore[attr-defined]
            raise _truncated(self._path) from error
        if len(content) < wanted:
            raise _truncated(self._path)
        array = np.frombuffer(content, header.dtype).reshape(shape)
        array = array.astype(header.dtype.newbyteorder("="), copy=False)
        if array.dtype.kind in "fc" and not np.isfinite(array).all() and not is_mask(array):
            bad = ~np.isfinite(array).reshape(rows, -1).all(axis=1)
            raise InputError(
                f"input {tensor.name!r} of sample {start + int(bad.argmax())} has a NaN or "
                "infinite value",
                where=str(self._path),
                remedy="leave the sample out or repair it; samples are counted from 0",
            )
        return array


def _headers(path: Path, spec: ModelSpec) -> dict[str, _Header]:
    if not path.is_file():
        what = "this is a folder, not a file" if path.is_dir() else "the file does not exist"
        raise InputError(
            what, where=str(path), remedy="give an .npz file with one array per input of the model"
        )
    try:
        with path.open("rb") as stream:
            start = stream.read(len(_NPY_MAGIC))
            stream.seek(0)
            if start == _NPY_MAGIC:
                return _bare(path, spec, _read_header(stream, None))
        if zipfile.is_zipfile(path):
            return _archived(path, spec)
    except _BROKEN as error:
        raise _truncated(path) from error
    if start.startswith(b"PK"):
        raise _truncated(path)
    raise InputError(
        "the file is neither .npz nor .npy",
        where=str(path),
        remedy="write it with numpy: np.savez(file, NAME=array, …) with the names of the inputs: "
        + _named(spec),
    )


def _bare(path: Path, spec: ModelSpec, header: _Header) -> dict[str, _Header]:
    if len(spec.inputs) != 1:
        raise InputError(
            f"an .npy file holds one array, the model takes {len(spec.inputs)} inputs",
            where=str(path),
            remedy=f"write an .npz file with {_named(spec)}",
        )
    return {spec.inputs[0].name: header}


def _archived(path: Path, spec: ModelSpec) -> dict[str, _Header]:
    headers: dict[str, _Header] = {}
    with zipfile.ZipFile(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        for tensor in spec.inputs:
            if tensor.name not in members:
                guess = nearest(tensor.name, members)
                hint = f"rename {guess!r} to {tensor.name!r}; " if guess else ""
                raise InputError(
                    f"the file has no array for input {tensor.name!r}",
                    where=str(path),
                    remedy=f"{hint}the model takes {_named(spec)}; "
                    f"the file has {', '.join(sorted(members)) or 'nothing'}",
                )
            with archive.open(members[tensor.name]) as stream:
                headers[tensor.name] = _read_header(stream, members[tensor.name])
    return headers


def _read_header(stream: IO[bytes], member: str | None) -> _Header:
    version = np.lib.format.read_magic(stream)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = read(stream)
    return _Header(member, shape, dtype, fortran)


def _check_layout(path: Path, spec: ModelSpec) -> None:
    """A batch is cut along axis 0 of every input: refuse a model that takes it otherwise.

    Recurrent models do: a state [2, batch, 128] has two layers on its first axis.
    """
    shapes = {
        tensor.name: tensor.shape for tensor in spec.inputs if tensor.shape != (UNKNOWN_RANK,)
    }
    firsts = [shape[0] for shape in shapes.values() if shape]
    symbol = next((first for first in firsts if isinstance(first, str)), None)
    for name, shape in shapes.items():
        if not shape:
            found = "is one number for all samples"
        elif symbol in shape[1:] and shape[0] != symbol:
            found = f"has its samples ({symbol!r}) along axis {shape.index(str(symbol))}"
        elif symbol is not None and isinstance(shape[0], int) and shape[0] > 1:
            found = f"has the fixed size {shape[0]} on axis 0, where other inputs have the samples"
        else:
            continue
        raise InputError(
            f"the model cannot be given samples from a file: input {name!r} {found}",
            where=str(path),
            remedy="quantize it by a method that needs none (--method dynamic, weights-only or "
            "fp16, without --calibration), or export it with the samples along axis 0 of every "
            f"input; it takes {_named(spec)}",
        )


def _check_array(path: Path, tensor: TensorSpec, header: _Header) -> None:
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
            remedy=f"preprocess it as the model takes it, then array.astype(np.{tensor.dtype})",
        )
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
            where=where,
            remedy=f"the model takes {tensor}; put the samples along axis 0",
        )
    if header.fortran:
        raise InputError(
            f"the array of {tensor.name!r} is in Fortran order, which cannot be read in batches",
            where=where,
            remedy="save np.ascontiguousarray(array)",
        )


def _check_symbols(path: Path, spec: ModelSpec, headers: dict[str, _Header]) -> None:
    """Dimensions of one name (sequence length) have one size in all inputs."""
    sizes: dict[str, tuple[str, int]] = {}
    for tensor in spec.inputs:
        if tensor.shape == (UNKNOWN_RANK,):
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
