"""Run a model over samples, batch by batch, also with a fixed batch size."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from edgekd.errors import InputError, StageError
from edgekd.onnx.batch_layout import OutputAxes, ragged, session_layout, to_model
from edgekd.onnx.samples import Array, Samples
from edgekd.onnx.session import CPU_PROVIDER, Optimization, first_line, open_session

INPUT_BYTES = 8 << 20
"""Largest size of a batch's inputs, in bytes; a network's activations take tens of times as
much.
"""
_FLOATS = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}


class BatchedModel:
    """A model that runs any number of samples, in batches that it supports.

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
        providers: Sequence[str] = (CPU_PROVIDER,),
        threads: int = 1,
        optimization: Optimization = "all",
        batch: int = 64,
    ) -> None:
        self.path = path
        self._session = open_session(path, providers, threads, optimization)
        self._names = [output.name for output in self._session.get_outputs()]
        self.size = batch_size(self._session, samples, batch, path)
        """How many samples are run at a time."""
        layout = session_layout(self._session)
        self._rows = layout.size
        self._shared = {name for name, axis in layout.axes.items() if axis is None}
        self.outputs = OutputAxes.of(
            self._session, layout, lambda count: self._first(samples, count)
        )
        """Where its outputs count samples."""
        if self.outputs.one_by_one and self._rows is None:
            self.size = 1

    def answer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs for samples (n, …) by input name: (n, …) by output name, whichever axis
        counts samples in the model; an output whose size depends on the data as
        :func:`edgekd.onnx.batch_layout.ragged`.

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
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in self._names}

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        real = len(next(iter(inputs.values())))
        ran = self._rows or real
        taken = model_inputs(self._session, inputs, self.path, self._rows)
        found: dict[str, Array] = {}
        answers = run_batch(self._session, self._names, taken, self.path)
        for name, values in zip(self._names, answers, strict=True):
            axis = self.outputs.axes[name]
            if name in self.outputs.ragged and isinstance(values, np.ndarray) and ran == 1:
                found[name] = ragged([values])
                continue
            if axis is None and isinstance(values, np.ndarray) and ran == 1:
                found[name] = values[None]
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

    def _first(self, samples: Samples, count: int) -> list[Any]:
        """The outputs on the first samples, which are repeated where there are fewer."""
        parts = []
        for part in samples.batches(count):
            parts.append(part)
            if sum(len(next(iter(p.values()))) for p in parts) >= count:
                break
        batch = {
            name: np.resize(array[:1] if name in self._shared else array, (count, *array.shape[1:]))
            for name, array in _joined(parts).items()
        }
        inputs = model_inputs(self._session, batch, self.path, None)
        return run_batch(self._session, self._names, inputs, self.path)


def _joined(parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def answer_batches(
    path: Path,
    samples: Samples,
    *,
    providers: Sequence[str] = (CPU_PROVIDER,),
    threads: int = 1,
    optimization: Optimization = "all",
    batch: int = 64,
) -> Iterator[tuple[slice, dict[str, Array]]]:
    """A model's outputs batch by batch: the slice of the samples, and (n, …) by output name.

    Raises:
        InputError, StageError: as :class:`BatchedModel`.
    """
    model = BatchedModel(
        path,
        samples,
        providers=providers,
        threads=threads,
        optimization=optimization,
        batch=batch,
    )
    for rows, inputs in numbered_batches(samples, model.size):
        yield rows, model.answer(inputs)


def run_samples(
    path: Path,
    samples: Samples,
    *,
    providers: Sequence[str] = (CPU_PROVIDER,),
    threads: int = 1,
    optimization: Optimization = "all",
    batch: int = 64,
) -> dict[str, Array]:
    """A model's outputs for all samples, (N, …) by output name; they are all held in memory.

    Dynamic quantization computes a tensor's range over the complete batch: ``batch=1`` gives the
    output of one query on a device. See :class:`BatchedModel` for how many are run at a time.

    Raises:
        InputError: there are no samples, they lack an input or have another type or shape than
            the model takes; the file cannot be opened; no axis of an output counts the samples.
        StageError: the model fails while it runs.
    """
    parts: dict[str, list[Array]] = {}
    for _, answers in answer_batches(
        path,
        samples,
        providers=providers,
        threads=threads,
        optimization=optimization,
        batch=batch,
    ):
        for name, values in answers.items():
            parts.setdefault(name, []).append(values)
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def one_batch(path: Path, samples: Samples, batch: int = 16) -> dict[str, Array]:
    """The first samples as a model expects them, by input name.

    Raises:
        InputError: as :class:`BatchedModel`.
    """
    session = open_session(path, (CPU_PROVIDER,), 1, "disabled")
    rows = next(iter(fixed_sizes(session)), None)
    return model_inputs(session, next(samples.batches(rows or batch)), path, rows)


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
    fixed = session_layout(session).size
    return fixed or min(batch, max(1, INPUT_BYTES // max(one, 1)))


def fixed_sizes(session: onnxruntime.InferenceSession) -> set[int]:
    """The batch size that the model fixes; none where it is open."""
    size = session_layout(session).size
    return set() if size is None else {size}


def model_inputs(
    session: onnxruntime.InferenceSession, batch: Mapping[str, Array], path: Path, rows: int | None
) -> dict[str, Array]:
    """The model's own inputs of a batch, padded to ``rows`` with its last sample.

    The batch is (n, …) by name; a state gets its samples on the model's batch axis for it.
    Floats of another width are converted: a model may have 16-bit inputs.
    """
    inputs = {v.name: _as_taken(v, batch, path) for v in session.get_inputs()}
    for name, array in inputs.items():
        if rows is not None and len(array) < rows:
            last = np.repeat(array[-1:], rows - len(array), axis=0)
            inputs[name] = np.concatenate([array, last])
    return to_model(session_layout(session), inputs)


def run_batch(
    session: onnxruntime.InferenceSession,
    names: Sequence[str],
    inputs: Mapping[str, Array],
    path: Path,
) -> list[Any]:
    """The outputs of one batch, in the order of ``names``."""
    try:
        return list(session.run(list(names), dict(inputs)))
    except Exception as error:  # the runtime's own exception classes have no public base
        shapes = ", ".join(f"{name} {a.dtype}{a.shape}" for name, a in inputs.items())
        what = f"the model does not run on {shapes}: {first_line(error)}"
        if isinstance(error, InvalidArgument):
            remedy = "give samples of the type and shape that the model expects"
            raise InputError(what, where=str(path), remedy=remedy) from error
        remedy = _remedy(str(error))
        raise StageError(what, where=str(path), remedy=remedy) from error


_OUT_OF_MEMORY = re.compile(r"bad_alloc|allocat|out of memory|not enough memory", re.IGNORECASE)
_NODE = re.compile(r"Name: ?'([^']+)'")


def _remedy(message: str) -> str:
    """What to do about a model that failed while it ran."""
    if _OUT_OF_MEMORY.search(message):
        return "free memory, or give smaller samples; 'edgekd check' shows what the model needs"
    node = _NODE.search(message)
    named = f"node {node[1]!r}: check its inputs" if node else "the message says where"
    return f"the graph cannot compute this, {named}; or export the model again"


def _as_taken(value: Any, batch: Mapping[str, Array], path: Path) -> Array:
    """The array for one input of the model."""
    if value.name not in batch:
        raise InputError(
            f"the samples lack the model's input {value.name!r}",
            where=str(path),
            remedy=f"they have: {', '.join(batch)}",
        )
    array = batch[value.name]
    wanted = _FLOATS.get(value.type)
    return array.astype(wanted, copy=False) if wanted and array.dtype.kind == "f" else array
