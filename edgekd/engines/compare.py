"""How far are a model's answers from those of another: per output, over real samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from edgekd.engines.samples import Array, Samples
from edgekd.engines.session import CPU_PROVIDER, Optimization, first_line, open_session
from edgekd.errors import InputError, StageError, unknown_name

INPUT_BYTES = 8 << 20
"""A batch's inputs take at most this; a network's activations take tens of times as much."""
_ROWS = 256  # compared at a time in float64
_CONFIDENCE = 0.95
_FLOATS = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64"}


@dataclass(frozen=True)
class OutputError:
    """One output of a candidate against the reference's, over ``samples`` samples.

    With p the reference's and o the candidate's values: ``max_absolute`` = max |o − p|, ``rmse``
    = √mean (o − p)², ``sqnr_db`` = 10·log₁₀(Σp² / Σ(o − p)²), None without any error or signal.
    ``cosine`` is the mean over samples of p·o / (‖p‖‖o‖), ``cosine_worst`` the smallest (1 where
    both are zero, 0 where one is). ``not_finite`` counts samples with a value that is NaN or
    infinite on one side only, or otherwise on the other; all four are None then.

    ``argmax_agreement`` is the share of samples with the same largest class, with Wilson's 95 %
    interval; None for an output that is not (N, classes ≥ 2) or not the classification's. A
    sample that is not finite on one side only does not agree. Strings are compared as 0 where
    they are the same and 1 where not.
    """

    name: str
    samples: int
    max_absolute: float | None
    rmse: float | None
    sqnr_db: float | None
    cosine: float | None
    cosine_worst: float | None
    not_finite: int
    argmax_agreement: float | None = None
    argmax_interval: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """A plain mapping for a JSON file."""
        return asdict(self)


def run_samples(
    path: Path,
    samples: Samples,
    *,
    providers: Sequence[str] = (CPU_PROVIDER,),
    threads: int = 1,
    optimization: Optimization = "all",
    batch: int = 64,
) -> dict[str, Array]:
    """A model's answers to all samples, (N, …) by output name.

    At most ``batch`` samples are run at a time, fewer where they are large
    (:data:`INPUT_BYTES`). A model whose batch dimension is fixed is run in batches of that size,
    the last one filled up with its last sample. Dynamic quantization takes a tensor's range over
    the whole batch: ``batch=1`` gives what a device answers to one query.

    Raises:
        InputError: there are no samples, they lack an input or have another type or shape than
            the model takes; the file cannot be opened; an output is not one row per sample.
        StageError: the model fails while it runs.
    """
    session = open_session(path, providers, threads, optimization)
    names = [output.name for output in session.get_outputs()]
    size = batch_size(session, samples, batch, path)
    rows = size if fixed_sizes(session) else None
    parts: dict[str, list[Array]] = {name: [] for name in names}
    for each in samples.batches(size):
        real = len(next(iter(each.values())))
        ran = rows or real
        answers = run_batch(session, names, model_inputs(session, each, path, rows), path)
        for name, values in zip(names, answers, strict=True):
            if not isinstance(values, np.ndarray) or values.shape[:1] != (ran,):
                found = getattr(values, "shape", type(values).__name__)
                raise InputError(
                    f"output {name!r} is {found} for {ran} samples, not one row per sample",
                    where=str(path),
                    remedy="export the model with the batch as first dimension of every output",
                )
            # A copy, so that the filled-up rows are not kept in memory.
            parts[name].append(values[:real].copy() if real < ran else values)
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def compare_answers(
    reference: Mapping[str, Array], candidate: Mapping[str, Array], classes: str | None
) -> tuple[OutputError, ...]:
    """The error of every output of the reference, in its order.

    Args:
        reference: (N, …) by output name, as :func:`run_samples` gives it.
        candidate: the other model's, to the same samples.
        classes: the output whose largest value is the answer; None when there is none.

    Raises:
        InputError: the candidate lacks an output or has another shape; there are no samples;
            ``classes`` is no output.
    """
    if classes is not None and classes not in reference:
        raise unknown_name("output", classes, reference)
    rows = []
    for name, expected in reference.items():
        if name not in candidate:
            raise unknown_name("output of the candidate", name, candidate)
        answer = candidate[name]
        if expected.shape != answer.shape or expected.ndim == 0 or len(expected) == 0:
            raise InputError(
                f"output {name!r} is {expected.shape} in one model and {answer.shape} in the other",
                where="comparison of two models' answers",
                remedy="run both models on the same samples, at least one",
            )
        rows.append(_compare(name, expected, answer, name == classes))
    return tuple(rows)


class ErrorSums:
    """Sums of error and signal over as many batches as come, in constant memory.

    Equal infinities and NaN on both sides are no error and no signal.
    """

    def __init__(self) -> None:
        self.values = 0
        self.error = 0.0
        """Σ (o − p)² over all values that are finite on both sides."""
        self.signal = 0.0
        """Σ p² over the same."""
        self.largest = 0.0
        self.not_finite = 0
        """Rows with a value that is not finite on one side only."""

    def add(self, reference: Array, candidate: Array) -> Array:
        """Take (n, values) of both; gives (n,) whether a row is finite wherever the other is."""
        p, o = reference.astype(np.float64), candidate.astype(np.float64)
        known = np.isfinite(p) & np.isfinite(o)
        fine: Array = (known | (p == o) | (np.isnan(p) & np.isnan(o))).all(axis=1)
        p, o = p[known], o[known]
        self.values += reference.size
        self.signal += float(np.vdot(p, p))
        o -= p
        self.error += float(np.vdot(o, o))
        self.largest = max(self.largest, float(np.abs(o).max(initial=0.0)))
        self.not_finite += int((~fine).sum())
        return fine

    @property
    def rmse(self) -> float | None:
        """√mean (o − p)²; None when not finite."""
        return None if self.not_finite else math.sqrt(self.error / max(self.values, 1))

    @property
    def relative(self) -> float | None:
        """√(Σ(o − p)² / Σp²); None when not finite, or when there is error without signal."""
        if self.not_finite or (self.error and not self.signal):
            return None
        return math.sqrt(self.error / self.signal) if self.error else 0.0

    @property
    def sqnr_db(self) -> float | None:
        """10·log₁₀(Σp² / Σ(o − p)²); None when not finite, without error, or without signal."""
        if self.not_finite or not self.error or not self.signal:
            return None
        return 10 * math.log10(self.signal / self.error)


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


def _compare(name: str, expected: Array, answer: Array, classes: bool) -> OutputError:
    if expected.dtype.kind not in "fiub":
        expected, answer = np.zeros(expected.shape), (expected != answer).astype(np.float64)
    classes = classes and expected.ndim == 2 and expected.shape[1] >= 2
    sums, cosine, worst, same = ErrorSums(), 0.0, 1.0, 0
    for start in range(0, len(expected), _ROWS):
        p, o = (a[start : start + _ROWS] for a in (expected, answer))
        p, o = (a.reshape(len(a), math.prod(a.shape[1:])) for a in (p, o))
        fine = sums.add(p, o)
        cosines = _cosines(p.astype(np.float64), o.astype(np.float64))
        cosine += float(cosines.sum())
        worst = min(worst, float(cosines.min()))
        if classes:
            same += int((fine & (p.argmax(axis=1) == o.argmax(axis=1))).sum())
    samples, finite = len(expected), not sums.not_finite
    return OutputError(
        name=name,
        samples=samples,
        max_absolute=sums.largest if finite else None,
        rmse=sums.rmse,
        sqnr_db=sums.sqnr_db,
        cosine=cosine / samples if finite else None,
        cosine_worst=worst if finite else None,
        not_finite=sums.not_finite,
        argmax_agreement=same / samples if classes else None,
        argmax_interval=_interval(same, samples) if classes else None,
    )


def _interval(successes: int, n: int) -> tuple[float, float]:
    # Imported here: it takes longer than all else that the command line loads.
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(_CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def _cosines(p: Array, o: Array) -> Array:
    """(n,) of the rows' cosines over the values that are finite on both sides."""
    known = np.isfinite(p) & np.isfinite(o)
    p, o = _unit(np.where(known, p, 0.0)), _unit(np.where(known, o, 0.0))
    both_zero = ~p.any(axis=1) & ~o.any(axis=1)
    cosines = np.clip(np.einsum("ij,ij->i", p, o), -1.0, 1.0)
    result: Array = np.where(both_zero, 1.0, cosines)
    return result


def _unit(rows: Array) -> Array:
    """Each row divided by its length; rows of zeros stay."""
    # By the largest first, so that squares of very small or large values do not leave float64.
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0.0)
    rows = rows / np.where(largest > 0, largest, 1.0)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    result: Array = rows / np.where(length > 0, length, 1.0)
    return result
