"""Running a model over samples, batch by batch, whatever batch it was built for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from edgekd.engines.samples import Array, Samples
from edgekd.engines.session import CPU_PROVIDER, Optimization, first_line, open_session
from edgekd.errors import InputError, StageError

INPUT_BYTES = 8 << 20
"""A batch's inputs take at most this; a network's activations take tens of times as much."""
_FLOATS = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}


class BatchedModel:
    """A model that answers any number of samples, in batches that it can run.

    At most ``batch`` samples are run at a time, fewer where they are large
    (:data:`INPUT_BYTES`). A model whose batch dimension is fixed is run in batches of that size,
    the last one filled up with its last sample.

    Raises:
        InputError: there are no samples; the file cannot be opened.
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
        self._rows = self.size if fixed_sizes(self._session) else None

    def answer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The answers to samples (n, …) by input name: (n, …) by output name.

        Raises:
            InputError: the samples lack an input or have another type or shape than the model
                takes; an output is not one row per sample.
            StageError: the model fails while it runs.
        """
        count = len(next(iter(inputs.values())))
        parts = [
            self._run({name: array[start : start + self.size] for name, array in inputs.items()})
            for start in range(0, count, self.size)
        ]
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
            if not isinstance(values, np.ndarray) or values.shape[:1] != (ran,):
                shape = getattr(values, "shape", type(values).__name__)
                raise InputError(
                    f"output {name!r} is {shape} for {ran} samples, not one row per sample",
                    where=str(self.path),
                    remedy="export the model with the batch as first dimension of every output",
                )
            # A copy, so that the filled-up rows are not kept in memory.
            found[name] = values[:real].copy() if real < ran else values
        return found


def answer_batches(
    path: Path,
    samples: Samples,
    *,
    providers: Sequence[str] = (CPU_PROVIDER,),
    threads: int = 1,
    optimization: Optimization = "all",
    batch: int = 64,
) -> Iterator[tuple[slice, dict[str, Array]]]:
    """A model's answers batch by batch: which samples these are, and (n, …) by output name.

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
    """A model's answers to all samples, (N, …) by output name; they are all held in memory.

    Dynamic quantization takes a tensor's range over the whole batch: ``batch=1`` gives what a
    device answers to one query. See :class:`BatchedModel` for how many are run at a time.

    Raises:
        InputError: there are no samples, they lack an input or have another type or shape than
            the model takes; the file cannot be opened; an output is not one row per sample.
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
    """The first samples as a model takes them, by input name.

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
        InputError: there are no samples, or the model's inputs have different fixed sizes.
    """
    first = next(samples.batches(1), None) if samples.count else None
    if first is None:
        raise InputError("there are no samples", where=str(path), remedy="give at least one")
    sizes = fixed_sizes(session)
    if len(sizes) > 1:
        raise InputError(
            f"the inputs have different fixed first dimensions: {sorted(sizes)}",
            where=str(path),
            remedy="export the model with the batch as first dimension of every input",
        )
    one = sum(array.nbytes for array in first.values())
    return next(iter(sizes), min(batch, max(1, INPUT_BYTES // max(one, 1))))


def fixed_sizes(session: onnxruntime.InferenceSession) -> set[int]:
    """The first dimensions of the model's inputs that are numbers."""
    return {v.shape[0] for v in session.get_inputs() if v.shape and isinstance(v.shape[0], int)}


def model_inputs(
    session: onnxruntime.InferenceSession, batch: Mapping[str, Array], path: Path, rows: int | None
) -> dict[str, Array]:
    """The model's own inputs of a batch, filled up to ``rows`` with its last sample.

    Floats of another width are converted: a model may take its inputs in 16 bits.
    """
    inputs = {v.name: _as_taken(v, batch, path) for v in session.get_inputs()}
    for name, array in inputs.items():
        if rows is not None and len(array) < rows:
            last = np.repeat(array[-1:], rows - len(array), axis=0)
            inputs[name] = np.concatenate([array, last])
    return inputs


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
            remedy = "give samples of the type and shape that the model takes"
            raise InputError(what, where=str(path), remedy=remedy) from error
        remedy = "'edgekd check' shows what the model needs; free memory if that is short"
        raise StageError(what, where=str(path), remedy=remedy) from error


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
