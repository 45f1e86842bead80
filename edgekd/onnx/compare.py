"""The error of a model's outputs against another's: per output and part, over real samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.errors import InputError, unknown_name
from edgekd.measurement import wilson_interval
from edgekd.onnx.error_metrics import ErrorSums, PartError, PartSums, cosines
from edgekd.onnx.inference import BatchedModel, is_ragged, numbered_batches
from edgekd.onnx.output_parts import Part, find_parts
from edgekd.onnx.samples import Array, Samples
from edgekd.onnx.session import Optimization

Score = Callable[[Mapping[str, Array], Mapping[str, Array], slice], Array]
"""(the reference's outputs, a model's, the slice of all samples) → each one's score, (n,)."""

REFERENCE_BYTES = 128 << 20
"""Largest size, in bytes, of a reference's outputs that are cached for the next candidate."""
_VALUES = 1 << 20  # compared at a time in float64
_MATCHED_ROWS = 2048  # of a sample; the cost of an assignment grows with their cube


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
    parts: tuple[PartError, ...] = ()
    """The parts that the output was compared by, one where it is of one piece; none for the
    classification's, whose classes are compared."""

    def to_json(self) -> dict[str, Any]:
        """A plain mapping for a JSON file."""
        return asdict(self) | {"parts": [part.to_json() for part in self.parts]}


@dataclass(frozen=True)
class Comparison:
    """Two models on the same samples: ``errors`` of the candidate's outputs, and the scores of
    both, (N,) float64; empty without a score function."""

    errors: tuple[OutputError, ...]
    reference_scores: Array
    scores: Array

    @property
    def worst(self) -> PartError | None:
        """The part that falls most; None where there is none."""
        parts = [part for error in self.errors for part in error.parts]
        return max(parts, key=lambda part: part.drop, default=None)


class Reference:
    """The reference model on some samples: run as written, without optimizations.

    What a runtime's optimizer makes of a model is not the model. Outputs are computed once where
    they fit into :data:`REFERENCE_BYTES`.

    Args:
        path: the model.
        samples: real inputs.
        threads: of ONNX Runtime, also for candidates.
        batch: samples run at a time, see :class:`edgekd.onnx.inference.BatchedModel`.

    Raises:
        InputError, StageError: as :class:`edgekd.onnx.inference.BatchedModel`.
    """

    def __init__(self, path: Path, samples: Samples, *, threads: int = 1, batch: int = 64) -> None:
        self.path, self.samples = path, samples
        self._threads, self._batch = threads, batch
        self._model = BatchedModel(
            path, samples, threads=threads, optimization="disabled", batch=batch
        )
        self._cached: list[dict[str, Array]] = []
        self._cached_size = 0
        self.first = self._model.predict(next(samples.batches(self._model.size)))
        """The outputs for the first batch."""
        self.parts = find_parts(path, samples, self.first, self._model.outputs.axes)
        """The parts of each output, by its name."""

    def predictions(self, size: int) -> Iterator[tuple[slice, dict[str, Array], dict[str, Array]]]:
        """Batch by batch: the slice of the samples, their inputs, and the outputs."""
        cached = self._cached if self._cached_size == size else []
        stored: list[dict[str, Array]] = []
        left = REFERENCE_BYTES
        for number, (rows, inputs) in enumerate(numbered_batches(self.samples, size)):
            outputs = cached[number] if number < len(cached) else self._model.predict(inputs)
            left -= sum(values.nbytes for values in outputs.values())
            if left >= 0:
                stored.append(outputs)
            yield rows, inputs, outputs
        self._cached, self._cached_size = stored, size

    def compare(
        self,
        candidate: Path,
        classes: str | None = None,
        score: Score | None = None,
        *,
        optimization: Optimization = "all",
        batch: int | None = None,
    ) -> Comparison:
        """Run a candidate on the same samples; only errors and scores of its outputs are stored.

        Args:
            candidate: the model to compare.
            classes: the output whose largest value is the predicted class; None when there is none.
            score: the score function, also applied to the reference itself.
            optimization: of the candidate.
            batch: the candidate's, where that is another than the reference's: dynamic
                quantization computes ranges over the complete batch, and 1 gives a device's output
                for one query.

        Raises:
            InputError: as :class:`edgekd.onnx.inference.BatchedModel` for the candidate, and
                :meth:`ComparisonSums.add`.
            StageError: a model fails while it runs.
        """
        model = BatchedModel(
            candidate,
            self.samples,
            threads=self._threads,
            optimization=optimization,
            batch=batch or self._batch,
        )
        errors = ComparisonSums(classes, self.parts)
        scores: tuple[list[Array], list[Array]] = ([], [])
        for rows, inputs, expected in self.predictions(max(self._model.size, model.size)):
            expected, found = comparable(expected, model.predict(inputs))
            errors.add(expected, found)
            if score is not None:
                scores[0].append(score(expected, expected, rows))
                scores[1].append(score(expected, found, rows))
        own, others = (
            np.concatenate(parts).astype(np.float64) if parts else np.zeros(0) for parts in scores
        )
        return Comparison(errors.rows(), own, others)


class ComparisonSums:
    """The errors of a candidate's outputs over any number of batches, in constant memory.

    Args:
        classes: the output whose largest value is the predicted class; None when there is none.
        parts: the parts of each output, by its name.
    """

    def __init__(
        self, classes: str | None, parts: Mapping[str, Sequence[Part]] | None = None
    ) -> None:
        self._classes = classes
        self._parts = parts or {}
        self._outputs: dict[str, _OutputSums] = {}

    def add(self, reference: Mapping[str, Array], candidate: Mapping[str, Array]) -> None:
        """Take (n, …) by output name of both.

        Raises:
            InputError: the candidate lacks an output or has another shape; there are no samples;
                ``classes`` is no output.
        """
        if self._classes is not None and self._classes not in reference:
            raise unknown_name("output", self._classes, reference)
        for name, expected in reference.items():
            if name not in candidate:
                raise unknown_name("output of the candidate", name, candidate)
            actual = candidate[name]
            if expected.shape != actual.shape or expected.ndim == 0 or len(expected) == 0:
                raise InputError(
                    f"output {name!r} is {expected.shape} in one model and {actual.shape} in "
                    "the other",
                    where="comparison of two models' outputs",
                    remedy="run both models on the same samples, at least one",
                )
            if name not in self._outputs:
                classes = name == self._classes
                parts = () if classes else self._parts.get(name, ())
                self._outputs[name] = _OutputSums(name, classes, parts)
            self._outputs[name].add(expected, actual)

    def rows(self) -> tuple[OutputError, ...]:
        """The error of every output so far, in the reference's order."""
        return tuple(sums.row() for sums in self._outputs.values())


class _OutputSums:
    """What one output's figures are made of."""

    def __init__(self, name: str, classes: bool, parts: Sequence[Part]) -> None:
        self._name, self._classes = name, classes
        self._sums = ErrorSums()
        self._parts = [PartSums(name, part) for part in parts]
        self._samples = self._same = 0
        self._cosine, self._worst = 0.0, 1.0

    def add(self, expected: Array, actual: Array) -> None:
        if expected.dtype.kind not in "fiub":
            expected, actual = np.zeros(expected.shape), (expected != actual).astype(np.float64)
        self._classes = self._classes and expected.ndim == 2 and expected.shape[1] >= 2
        each = math.prod(expected.shape[1:])
        step = max(1, _VALUES // max(each, 1))
        for start in range(0, len(expected), step):
            p, o = (a[start : start + step] for a in (expected, actual))
            p, o = (a.reshape(len(a), each) for a in (p, o))
            fine, _ = self._sums.add(p, o)
            for part in self._parts:
                part.add(p, o)
            of_samples = cosines(p.astype(np.float64), o.astype(np.float64))
            self._cosine += float(of_samples.sum())
            self._worst = min(self._worst, float(of_samples.min()))
            if self._classes:
                self._same += int((fine & (p.argmax(axis=1) == o.argmax(axis=1))).sum())
        self._samples += len(expected)

    def row(self) -> OutputError:
        finite = not self._sums.not_finite
        same, samples = self._same, self._samples
        return OutputError(
            name=self._name,
            samples=samples,
            max_absolute=self._sums.largest if finite else None,
            rmse=self._sums.rmse,
            sqnr_db=self._sums.sqnr_db,
            cosine=self._cosine / samples if finite else None,
            cosine_worst=self._worst if finite else None,
            not_finite=self._sums.not_finite,
            argmax_agreement=same / samples if self._classes else None,
            argmax_interval=wilson_interval(same, samples) if self._classes else None,
            parts=tuple(part.row() for part in self._parts),
        )


def comparable(
    reference: Mapping[str, Array], candidate: Mapping[str, Array]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Outputs of two models with ragged outputs as arrays of one shape, (n, …).

    Floats (K, F): each row of the reference paired with the nearest row of the candidate
    (the assignment of least total distance); rows without a partner are paired with zeros. Anything
    else (indices of boxes, words): for each row that either has, 1 where it is in the sample's
    output and 0 elsewhere. Other outputs are unchanged.
    """
    first, second = dict(reference), dict(candidate)
    for name, expected in reference.items():
        actual = candidate.get(name)
        if actual is None or not len(expected) or not is_ragged(expected):
            continue
        if not is_ragged(actual):
            raise InputError(
                f"output {name!r} has one size for all samples in one model only",
                where="comparison of two models' outputs",
                remedy="derive one from the other, or export both with the same settings",
            )
        pairs = [_pair(p, o) for p, o in zip(expected, actual, strict=True)]
        first[name], second[name] = (_padded([pair[side] for pair in pairs]) for side in (0, 1))
    return first, second


def _pair(expected: Array, actual: Array) -> tuple[Array, Array]:
    """(values,) of both sides of one sample."""
    if expected.dtype.kind != "f":
        return _memberships(expected, actual)
    p, o = (_as_rows(a) for a in (expected, actual))
    columns = max(p.shape[1], o.shape[1])
    p, o = (np.pad(a, ((0, 0), (0, columns - a.shape[1]))).astype(np.float64) for a in (p, o))
    if p.shape[0] != 1 or o.shape[0] != 1:
        p, o = _matched(p, o)
    return p.ravel(), o.ravel()


def _as_rows(values: Array) -> Array:
    """(K, F) of any number of dimensions and elements."""
    if not values.ndim:
        return values.reshape(1, 1)
    return values.reshape(len(values), math.prod(values.shape[1:]))


def _matched(p: Array, o: Array) -> tuple[Array, Array]:
    """Pair rows with their nearest ones."""
    if max(len(p), len(o)) <= _MATCHED_ROWS and len(p) and len(o):
        # Imported here: it takes longer than the rest of the command line's imports.
        from scipy.optimize import linear_sum_assignment
        from scipy.spatial.distance import cdist

        known = [np.nan_to_num(a, posinf=0.0, neginf=0.0) for a in (p, o)]
        rows, partners = linear_sum_assignment(cdist(*known))
        rest = [np.setdiff1d(np.arange(len(a)), i) for a, i in ((p, rows), (o, partners))]
        p, o = (
            np.concatenate([p[rows], p[rest[0]], np.zeros((len(rest[1]), p.shape[1]))]),
            np.concatenate([o[partners], np.zeros((len(rest[0]), o.shape[1])), o[rest[1]]]),
        )
    longest = max(len(p), len(o))
    first, second = (np.pad(a, ((0, longest - len(a)), (0, 0))) for a in (p, o))
    return first, second


def _memberships(expected: Array, actual: Array) -> tuple[Array, Array]:
    """Of each row that either has, whether it is in the one and in the other; of a list of
    numbers, each with its place."""

    def rows(values: Array) -> list[tuple[Any, ...]]:
        if values.ndim < 2:
            return list(enumerate(values.ravel().tolist()))
        return [tuple(row.tolist()) for row in _as_rows(values)]

    ours, theirs = set(rows(expected)), set(rows(actual))
    union = sorted(ours | theirs, key=repr)
    return (
        np.array([row in ours for row in union], np.float64),
        np.array([row in theirs for row in union], np.float64),
    )


def _padded(values: Sequence[Array]) -> Array:
    longest = max((len(each) for each in values), default=0)
    return np.stack([np.pad(each, (0, longest - len(each))) for each in values])
