"""The error of a model's outputs against another's: per output and part, over real samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.errors import InputError, unknown_name
from edgekd.onnx.batch_inference import BatchedModel, numbered_batches, run_samples
from edgekd.onnx.batch_layout import comparable
from edgekd.onnx.error_metrics import ErrorSums, cosines
from edgekd.onnx.output_parts import Part, find_parts
from edgekd.onnx.part_errors import PartError, PartSums
from edgekd.onnx.samples import Array, Samples
from edgekd.onnx.session import CPU_PROVIDER, Optimization

__all__ = [
    "AnswerErrors",
    "Comparison",
    "OutputError",
    "PartError",
    "Reference",
    "Score",
    "compare_answers",
    "compare_models",
    "run_samples",
]

Score = Callable[[Mapping[str, Array], Mapping[str, Array], slice], Array]
"""(the reference's outputs, a model's, the slice of all samples) → each one's score, (n,)."""

REFERENCE_BYTES = 128 << 20
"""Largest size, in bytes, of a reference's outputs that are cached for the next candidate."""
_VALUES = 1 << 20  # compared at a time in float64
_CONFIDENCE = 0.95


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

    What a runtime's optimizer makes of a model is not the model. Answers are computed once where
    they fit into :data:`REFERENCE_BYTES`.

    Args:
        path: the model.
        samples: real inputs.
        providers: of all models, like ``threads``.
        threads: of ONNX Runtime.
        batch: samples run at a time, see :class:`edgekd.onnx.batch_inference.BatchedModel`.

    Raises:
        InputError, StageError: as :func:`run_samples` for the model.
    """

    def __init__(
        self,
        path: Path,
        samples: Samples,
        *,
        providers: Sequence[str] = (CPU_PROVIDER,),
        threads: int = 1,
        batch: int = 64,
    ) -> None:
        self.path, self.samples = path, samples
        self._providers, self._threads = tuple(providers), threads
        self._model = self._opened(path, "disabled", batch)
        self._batch = batch
        self._known: list[tuple[slice, dict[str, Array]]] = []
        self._known_size = 0
        self.first = self._model.answer(next(samples.batches(self._model.size)))
        """The outputs for the first batch."""
        self.parts = find_parts(path, samples, self.first, self._model.outputs.axes)
        """The parts of each output, by its name."""

    def _opened(self, path: Path, optimization: Optimization, batch: int) -> BatchedModel:
        return BatchedModel(
            path,
            self.samples,
            providers=self._providers,
            threads=self._threads,
            optimization=optimization,
            batch=batch,
        )

    def answers(self, size: int) -> Iterator[tuple[slice, dict[str, Array], dict[str, Array]]]:
        """Batch by batch: the slice of the samples, their inputs, and the outputs."""
        known = dict(enumerate(self._known)) if self._known_size == size else {}
        kept: list[tuple[slice, dict[str, Array]]] = []
        left = REFERENCE_BYTES
        for number, (rows, inputs) in enumerate(numbered_batches(self.samples, size)):
            answers = known[number][1] if number in known else self._model.answer(inputs)
            left -= sum(values.nbytes for values in answers.values())
            if left >= 0:
                kept.append((rows, answers))
            yield rows, inputs, answers
        self._known, self._known_size = kept, size

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
            classes: as in :func:`compare_answers`.
            score: the score function, also applied to the reference itself.
            optimization: of the candidate.
            batch: the candidate's, where that is another than the reference's: dynamic
                quantization computes ranges over the complete batch, and 1 gives a device's output
                for one query.

        Raises:
            InputError: as :func:`run_samples` for the candidate and :func:`compare_answers`.
            StageError: a model fails while it runs.
        """
        model = self._opened(candidate, optimization, batch or self._batch)
        errors = AnswerErrors(classes, self.parts)
        scores: tuple[list[Array], list[Array]] = ([], [])
        for rows, inputs, expected in self.answers(max(self._model.size, model.size)):
            expected, answers = comparable(expected, model.answer(inputs))
            errors.add(expected, answers)
            if score is not None:
                scores[0].append(score(expected, expected, rows))
                scores[1].append(score(expected, answers, rows))
        own, others = (
            np.concatenate(parts).astype(np.float64) if parts else np.zeros(0) for parts in scores
        )
        return Comparison(errors.rows(), own, others)


def compare_models(
    reference: Path,
    candidate: Path,
    samples: Samples,
    classes: str | None,
    score: Score,
    *,
    providers: Sequence[str] = (CPU_PROVIDER,),
    threads: int = 1,
    optimization: Optimization = "all",
    batch: int = 64,
    candidate_batch: int | None = None,
) -> Comparison:
    """:meth:`Reference.compare` for a single candidate.

    Args:
        reference: the model that is right, run without optimizations.
        candidate: the model to compare.
        samples: real inputs.
        classes: as in :func:`compare_answers`.
        score: the score function, also applied to the reference itself.
        providers: of both, like ``threads``.
        threads: of ONNX Runtime.
        optimization: the candidate's.
        batch: samples run at a time.
        candidate_batch: the candidate's, where that is another.

    Raises:
        InputError, StageError: as :class:`Reference` and its ``compare``.
    """
    right = Reference(reference, samples, providers=providers, threads=threads, batch=batch)
    return right.compare(
        candidate, classes, score, optimization=optimization, batch=candidate_batch
    )


def compare_answers(
    reference: Mapping[str, Array], candidate: Mapping[str, Array], classes: str | None
) -> tuple[OutputError, ...]:
    """The error of every output of the reference, in its order.

    Args:
        reference: (N, …) by output name, as returned by :func:`run_samples`.
        candidate: the other model's, to the same samples.
        classes: the output whose largest value is the predicted class; None when there is none.

    Raises:
        InputError: the candidate lacks an output or has another shape; there are no samples;
            ``classes`` is no output.
    """
    errors = AnswerErrors(classes)
    errors.add(reference, candidate)
    return errors.rows()


class AnswerErrors:
    """:func:`compare_answers` over any number of batches, in constant memory."""

    def __init__(
        self, classes: str | None, parts: Mapping[str, Sequence[Part]] | None = None
    ) -> None:
        self._classes = classes
        self._parts = parts or {}
        self._outputs: dict[str, _OutputSums] = {}

    def add(self, reference: Mapping[str, Array], candidate: Mapping[str, Array]) -> None:
        """Take (n, …) by output name of both.

        Raises:
            InputError: as :func:`compare_answers`.
        """
        if self._classes is not None and self._classes not in reference:
            raise unknown_name("output", self._classes, reference)
        for name, expected in reference.items():
            if name not in candidate:
                raise unknown_name("output of the candidate", name, candidate)
            answer = candidate[name]
            if expected.shape != answer.shape or expected.ndim == 0 or len(expected) == 0:
                raise InputError(
                    f"output {name!r} is {expected.shape} in one model and {answer.shape} in "
                    "the other",
                    where="comparison of two models' outputs",
                    remedy="run both models on the same samples, at least one",
                )
            if name not in self._outputs:
                classes = name == self._classes
                parts = () if classes else self._parts.get(name, ())
                self._outputs[name] = _OutputSums(name, classes, parts)
            self._outputs[name].add(expected, answer)

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

    def add(self, expected: Array, answer: Array) -> None:
        if expected.dtype.kind not in "fiub":
            expected, answer = np.zeros(expected.shape), (expected != answer).astype(np.float64)
        self._classes = self._classes and expected.ndim == 2 and expected.shape[1] >= 2
        each = math.prod(expected.shape[1:])
        step = max(1, _VALUES // max(each, 1))
        for start in range(0, len(expected), step):
            p, o = (a[start : start + step] for a in (expected, answer))
            p, o = (a.reshape(len(a), each) for a in (p, o))
            fine, _ = self._sums.add(p, o)
            for part in self._parts:
                part.add(p, o)
            found = cosines(p.astype(np.float64), o.astype(np.float64))
            self._cosine += float(found.sum())
            self._worst = min(self._worst, float(found.min()))
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
            argmax_interval=_interval(same, samples) if self._classes else None,
            parts=tuple(part.row() for part in self._parts),
        )


def _interval(successes: int, n: int) -> tuple[float, float]:
    # Imported here: it takes longer than the rest of the command line's imports.
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(_CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)
