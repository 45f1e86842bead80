"""Run a model on samples: in batches that it takes, with samples first whatever its batch axes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from edgekd.errors import InputError, StageError
from edgekd.onnx.samples import Array, Samples, random_inputs
from edgekd.onnx.session import CPU_PROVIDER, Optimization, first_line, open_session
from edgekd.spec import ModelSpec
from edgerun import limits
from edgerun.model import BatchLayout, TensorInfo
from edgerun.onnx_session import shape_of

INPUT_BYTES = 8 << 20
"""Largest size of a batch's inputs, in bytes; a network's activations take tens of times as
much.
"""
TRIED_SIZES = (1, 16, 128, 512)
"""Trial sizes of symbolic dimensions other than the batch when no samples are given."""
_TRIED_BATCHES = (2, 3)  # batch sizes that identify the batch axis of an output
_FLOATS = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}


class BatchedModel:
    """A model that runs any number of samples on the CPU, in batches that it supports.

    At most ``batch`` samples are run at a time, fewer where they are large
    (:data:`INPUT_BYTES`). A model whose batch dimension is fixed is run in batches of that size,
    the last one filled up with its last sample. A model with an output whose size depends on the
    data, or that has no axis for the samples, is run one sample at a time.

    Raises:
        InputError: there are no samples; the file cannot be opened.
        StageError: the model fails on the first samples.
    """

    def __init__(
        self,
        path: Path,
        samples: Samples,
        *,
        threads: int = 1,
        optimization: Optimization = "all",
        batch: int = 64,
    ) -> None:
        self.path, self.samples = path, samples
        self._session = open_session(path, (CPU_PROVIDER,), threads, optimization)
        self.size = batch_size(self._session, samples, batch, path)
        """How many samples are run at a time."""
        layout = session_layout(self._session)
        self._fixed = layout.size
        self._shared = {name for name, axis in layout.axes.items() if axis is None}
        self.outputs = OutputAxes.of(self._session, layout, self._first)
        """Where its outputs count samples."""
        if self.outputs.one_by_one and self._fixed is None:
            self.size = 1

    def predict(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs for samples (n, …) by input name: (n, …) by output name, whichever axis
        counts samples in the model; an output whose size depends on the data as :func:`ragged`.

        Raises:
            InputError: the samples lack an input or have another type or shape than the model
                takes; no axis of an output counts the samples.
            StageError: the model fails while it runs.
        """
        count = len(next(iter(inputs.values())))
        parts = []
        start = 0
        while start < count:
            end = min(start + self.size, count)
            # Samples with different values of a shared input are not run together.
            for name in self._shared & inputs.keys():
                first = inputs[name][start]
                rest = range(start + 1, end)
                end = next((i for i in rest if not np.array_equal(inputs[name][i], first)), end)
            parts.append(self._run({name: array[start:end] for name, array in inputs.items()}))
            start = end
        return parts[0] if len(parts) == 1 else joined(parts)

    def predict_batches(self) -> Iterator[tuple[slice, dict[str, Array]]]:
        """The outputs for all samples, batch by batch: the slice of the samples, and (n, …) by
        output name.

        Raises:
            InputError, StageError: as :meth:`predict`.
        """
        for rows, inputs in numbered_batches(self.samples, self.size):
            yield rows, self.predict(inputs)

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        real = len(next(iter(inputs.values())))
        ran = self._fixed or real
        feeds = model_inputs(self._session, inputs, self.path, self._fixed)
        found: dict[str, Array] = {}
        for name, values in outputs_of(self._session, feeds, self.path).items():
            axis = self.outputs.axes[name]
            if axis is None and isinstance(values, np.ndarray) and ran == 1:
                found[name] = ragged([values]) if name in self.outputs.ragged else values[None]
                continue
            size = values.shape[axis or 0 :][:1] if isinstance(values, np.ndarray) else None
            if size != (ran,):
                shape = getattr(values, "shape", type(values).__name__)
                raise InputError(
                    f"output {name!r} is {shape} for {ran} samples: no axis of it counts them",
                    where=str(self.path),
                    remedy="export the model with an open batch, and tensors as outputs",
                )
            values = np.moveaxis(values, axis or 0, 0)
            # A copy, so that the padded rows are not held in memory.
            found[name] = values[:real].copy() if real < ran else values
        return found

    def _first(self, count: int) -> dict[str, Any]:
        """The outputs on the first samples, which are repeated where there are fewer."""
        parts: list[dict[str, Array]] = []
        for part in self.samples.batches(count):
            parts.append(part)
            if sum(len(next(iter(p.values()))) for p in parts) >= count:
                break
        batch = {
            name: np.resize(array[:1] if name in self._shared else array, (count, *array.shape[1:]))
            for name, array in joined(parts).items()
        }
        inputs = model_inputs(self._session, batch, self.path, None)
        return outputs_of(self._session, inputs, self.path)


def run_samples(
    path: Path, samples: Samples, *, optimization: Optimization = "all", batch: int = 64
) -> dict[str, Array]:
    """A model's outputs for all samples, (N, …) by output name; they are all held in memory.

    Dynamic quantization computes a tensor's range over the complete batch: ``batch=1`` gives the
    output of one query on a device. See :class:`BatchedModel` for how many are run at a time.

    Raises:
        InputError, StageError: as :class:`BatchedModel` and its ``predict``.
    """
    model = BatchedModel(path, samples, optimization=optimization, batch=batch)
    return joined([outputs for _, outputs in model.predict_batches()])


def joined(parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Batches (n, …) by name as one, (Σn, …)."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def first_batch(
    session: onnxruntime.InferenceSession, samples: Samples, path: Path, size: int
) -> dict[str, Array]:
    """The first ``size`` samples (where the model fixes its batch: as many as that) as it takes
    them, by input name.

    Raises:
        InputError: as :func:`model_inputs`.
    """
    fixed = fixed_batch(session)
    return model_inputs(session, next(samples.batches(fixed or size)), path, fixed)


def numbered_batches(samples: Samples, size: int) -> Iterator[tuple[slice, dict[str, Array]]]:
    """Batches with the rows of all samples that they are."""
    start = 0
    for inputs in samples.batches(size):
        end = start + len(next(iter(inputs.values())))
        yield slice(start, end), inputs
        start = end


def batch_size(
    session: onnxruntime.InferenceSession, samples: Samples, batch: int, path: Path
) -> int:
    """How many samples to run at a time: the model's fixed number, else ``batch`` or fewer.

    Raises:
        InputError: there are no samples.
    """
    first = next(samples.batches(1), None) if samples.count else None
    if first is None:
        raise InputError("there are no samples", where=str(path), remedy="give at least one")
    one = sum(array.nbytes for array in first.values())
    return fixed_batch(session) or min(batch, max(1, INPUT_BYTES // max(one, 1)))


def fixed_batch(session: onnxruntime.InferenceSession) -> int | None:
    """The batch size that the model fixes; None where it is open."""
    return session_layout(session).size


def model_inputs(
    session: onnxruntime.InferenceSession,
    batch: Mapping[str, Array],
    path: Path | str,
    rows: int | None,
) -> dict[str, Array]:
    """The model's own inputs of a batch, padded to ``rows`` with its last sample.

    The batch is (n, …) by name; a state gets its samples on the model's batch axis for it.
    Floats of another width are converted: a model may have 16-bit inputs.

    Raises:
        InputError: the batch lacks an input; or as :func:`to_model`.
    """
    inputs: dict[str, Array] = {}
    for value in session.get_inputs():
        if value.name not in batch:
            raise InputError(
                f"the samples lack the model's input {value.name!r}",
                where=str(path),
                remedy=f"they have: {', '.join(batch)}",
            )
        array = batch[value.name]
        if array.dtype.kind == "f":
            array = array.astype(_FLOATS.get(value.type, array.dtype), copy=False)
        if rows is not None and len(array) < rows:
            last = np.repeat(array[-1:], rows - len(array), axis=0)
            array = np.concatenate([array, last])
        inputs[value.name] = array
    return to_model(session_layout(session), inputs)


def run_batch(
    session: onnxruntime.InferenceSession,
    names: Sequence[str],
    inputs: Mapping[str, Array],
    path: Path | str,
) -> list[Any]:
    """The outputs of one batch, in the order of ``names``.

    Raises:
        InputError: the inputs have another type or shape than the model declares.
        StageError: the model fails while it runs.
    """
    try:
        return list(session.run(list(names), dict(inputs)))
    except Exception as error:  # the runtime's own exception classes have no public base
        shapes = ", ".join(f"{name} {a.dtype}{a.shape}" for name, a in inputs.items())
        what = f"the model does not run on {shapes}: {first_line(error)}"
        if limits.is_limited() and limits.is_out_of_memory(error):
            raise limits.too_large("the model", str(path), InputError) from error
        if isinstance(error, InvalidArgument):
            remedy = "give samples of the type and shape that the model expects"
            raise InputError(what, where=str(path), remedy=remedy) from error
        raise StageError(what, where=str(path), remedy=_remedy(str(error))) from error


_OUT_OF_MEMORY = re.compile(r"bad_alloc|allocat|out of memory|not enough memory", re.IGNORECASE)
_NODE = re.compile(r"Name: ?'([^']+)'")


def _remedy(message: str) -> str:
    """What to do about a model that failed while it ran."""
    if _OUT_OF_MEMORY.search(message):
        return "free memory, or give smaller samples; 'edgekd check' shows what the model needs"
    node = _NODE.search(message)
    named = f"node {node[1]!r}: check its inputs" if node else "the message says where"
    return f"the graph cannot compute this, {named}; or export the model again"


def outputs_of(
    session: onnxruntime.InferenceSession, inputs: Mapping[str, Array], path: Path | str
) -> dict[str, Any]:
    """All outputs of one batch, by name.

    Raises:
        InputError, StageError: as :func:`run_batch`.
    """
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, run_batch(session, names, inputs, path), strict=True))


def outputs_of_random_inputs(
    session: onnxruntime.InferenceSession, spec: ModelSpec, path: Path
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Random inputs of the first size that the model can run, and its outputs for them.

    Raises:
        InputError: as :func:`edgekd.onnx.samples.random_inputs`; or the model needs more memory
            than is allowed.
        StageError: the model runs with none of :data:`TRIED_SIZES`.
    """
    failure: InputError | StageError | None = None
    for size in TRIED_SIZES:
        inputs = random_inputs(spec, size)
        try:
            return inputs, outputs_of(session, inputs, path)
        except (InputError, StageError) as error:
            failure = failure or error
    assert failure is not None
    if limits.is_limited() and limits.is_out_of_memory(failure.__cause__):
        raise failure
    remedy = "give samples of the shapes that the model expects"
    raise StageError(failure.what, where=str(path), remedy=remedy) from failure


def session_layout(session: onnxruntime.InferenceSession) -> BatchLayout:
    """Where the inputs of an open model count samples."""
    return BatchLayout.of(
        [TensorInfo(v.name, v.type, shape_of(v.shape)) for v in session.get_inputs()]
    )


def to_model(layout: BatchLayout, batch: Mapping[str, Array]) -> dict[str, Array]:
    """Inputs as the model expects them, from inputs (n, …) by name.

    A state with another batch axis is transposed; an input that all samples share
    is that of the first.

    Raises:
        InputError: the samples have different values of an input that they would share.
    """
    taken = {}
    for name, array in batch.items():
        axis = layout.axes.get(name, 0)
        if axis is None:
            if len(array) > 1 and not np.array_equal(array[1:], array[:-1]):
                raise InputError(
                    f"the model has one {name!r} for all samples of a batch, and these differ",
                    where=f"samples, {name!r}",
                    remedy="give the same value to all samples, or batches of one sample",
                )
            taken[name] = np.asarray(array[0])
        else:
            taken[name] = array if axis == 0 else np.ascontiguousarray(np.moveaxis(array, 0, axis))
    return taken


def rows_of(layout: BatchLayout, inputs: Mapping[str, Array]) -> int:
    """The number of samples in inputs as the model expects them."""
    counted = ((name, axis) for name, axis in layout.axes.items() if axis is not None)
    return next((inputs[name].shape[axis] for name, axis in counted), 1)


@dataclass(frozen=True)
class OutputAxes:
    """Where each output of a model counts samples.

    Attributes:
        axes: output name → axis; None for an output that does not count them.
        ragged: those of the latter whose size depends on the data, such as the boxes that a
            non-maximum suppression leaves. The samples are run one at a time then.
    """

    axes: Mapping[str, int | None]
    ragged: frozenset[str]

    @property
    def one_by_one(self) -> bool:
        """Whether an output has separate samples only if they are run one at a time."""
        return None in self.axes.values()

    def notes(self) -> dict[str, str]:
        """Notes on outputs that are not one row per sample."""
        notes = {}
        for name, axis in self.axes.items():
            if name in self.ragged:
                notes[name] = (
                    "its size depends on the data: samples run one at a time, and the rows of "
                    "each compared as a set"
                )
            elif axis is None:
                notes[name] = "it has no axis for the samples: run one at a time"
            elif axis > 0:
                notes[name] = f"its samples lie along axis {axis}"
        return notes

    @classmethod
    def of(
        cls,
        session: onnxruntime.InferenceSession,
        layout: BatchLayout,
        run: Callable[[int], Mapping[str, Any]],
    ) -> OutputAxes:
        """Read from the declared shapes; where these are ambiguous, found by running the model.

        Args:
            session: the model.
            layout: of its inputs.
            run: its outputs by name on a number of real samples.
        """
        declared = [
            TensorInfo(v.name, v.type, shape_of(v.shape or ())) for v in session.get_outputs()
        ]
        axes: dict[str, int | None] = {}
        ragged = set()
        unclear = []
        for output in declared:
            named = [i for i, d in enumerate(output.shape) if d in layout.names]
            if named:
                axes[output.name] = named[0]
            elif layout.size is None or not output.shape:
                unclear.append(output.name)
            else:
                axes[output.name], open_size = _in_fixed(output.shape, layout.size)
                if open_size:
                    ragged.add(output.name)
        if unclear:
            tried = _TRIED_BATCHES if layout.size is None else (layout.size,)
            runs: list[Mapping[str, Any]] = [{}]
            # An error is reported where the samples themselves are run.
            with suppress(InputError, StageError):
                runs = [run(count) for count in tried]
            for name in unclear:
                shapes = [getattr(outputs.get(name), "shape", None) for outputs in runs]
                axes[name] = _varying(shapes, tried)
                if axes[name] is None:
                    ragged.add(name)
        return cls({o.name: axes[o.name] for o in declared}, frozenset(ragged))


def _in_fixed(shape: Sequence[int | str | None], size: int) -> tuple[int | None, bool]:
    """The axis of an output that counts samples in a model of fixed batch, and whether its size
    depends on the data."""
    if not shape or shape[0] == size:
        return 0, False
    if size > 1:
        return next((i for i, d in enumerate(shape) if d == size), 0), False
    return None, any(not isinstance(d, int) for d in shape)


def _varying(shapes: Sequence[tuple[int, ...] | None], counts: Sequence[int]) -> int | None:
    """The first axis that has as many elements as there were samples."""
    ranks = {None if shape is None else len(shape) for shape in shapes}
    if None in ranks:
        return 0  # A sequence or similar, which is refused where it is read.
    if len(ranks) > 1:
        return None
    sizes = list(zip(*cast("Sequence[tuple[int, ...]]", shapes), strict=True))
    return next((axis for axis, found in enumerate(sizes) if found == tuple(counts)), None)


def ragged(arrays: Sequence[Array]) -> Array:
    """Arrays of different shapes, one per sample, as an array of objects (n,)."""
    found = np.empty(len(arrays), object)
    for index, array in enumerate(arrays):
        found[index] = array
    return found


def is_ragged(values: Array) -> bool:
    """Whether these are outputs as returned by :func:`ragged`."""
    return values.dtype == object and values.ndim == 1 and isinstance(values[0], np.ndarray)
