"""Compare models on samples of the user's: labels, metric or agreement, remarks."""

from __future__ import annotations

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgekd.errors import InputError, unknown_name
from edgerun.npz import NpzFile

if TYPE_CHECKING:
    from edgekd.onnx.compare import Comparison, Reference
    from edgekd.onnx.error_metrics import PartError
    from edgekd.onnx.samples import Array, Samples
    from edgekd.onnx.session import Optimization
    from edgekd.release.statistics import Estimate

LEAST_SQNR_DB = 10.0
"""Below it the error has more than a tenth of the signal's power."""

LEAST_AGREEMENT = 0.9

_NAMED = 5


def remarks_on_errors(errors: Sequence[Mapping[str, Any]]) -> list[str]:
    """Warnings about outputs, or parts of them, that hardly correlate with float32's.

    Args:
        errors: rows of :class:`edgekd.onnx.compare.OutputError`, as JSON.
    """
    found = []
    for row in errors:
        parts = row["parts"]
        # Where there are parts, the complete output adds no information.
        faults = [] if parts else _faults_of_classes(row)
        if row["not_finite"] and parts:
            faults.append(f"{row['not_finite']} of {row['samples']} samples are not finite")
        if faults:
            found.append(f"{row['name']}: {'; '.join(faults)}")
        for part in parts:
            if faults := _faults_of_part(part, row["cosine"] if len(parts) == 1 else None):
                name = f"{row['name']} ({part['part']})" if part["part"] else row["name"]
                found.append(f"{name}: {'; '.join(faults)}")
    if not found:
        return []
    return [f"the outputs have little in common with float32's: {', '.join(found)}"]


def _faults_of_classes(row: Mapping[str, Any]) -> list[str]:
    faults = []
    if row["not_finite"]:
        faults.append(f"{row['not_finite']} of {row['samples']} samples are not finite")
    if row["sqnr_db"] is not None and row["sqnr_db"] < LEAST_SQNR_DB:
        faults.append(f"SQNR {row['sqnr_db']:.1f} dB, cosine {row['cosine']:.2f}")
    agreement = row["argmax_agreement"]
    if agreement is not None and agreement < LEAST_AGREEMENT:
        faults.append(f"the same class for {agreement:.1%} of the samples only")
    return faults


def _faults_of_part(part: Mapping[str, Any], cosine: float | None) -> list[str]:
    faults = []
    relative, agreement = part["relative"], part["agreement"]
    if relative is not None and relative > 10 ** (-LEAST_SQNR_DB / 20):
        sqnr = "" if part["sqnr_db"] is None else f"SQNR {part['sqnr_db']:.1f} dB"
        faults.append(sqnr + ("" if cosine is None else f", cosine {cosine:.2f}"))
    if part["one_value"]:
        faults.append("one value only on all samples, where float32's vary")
    if agreement is not None and agreement < LEAST_AGREEMENT:
        what = "values" if part["kind"] == "decisions" else "scores above the threshold"
        faults.append(f"{agreement:.1%} of {part['decided']:,} {what} are the same")
    return faults


def remarks_on_ranges(constant: Sequence[str]) -> list[str]:
    """Warnings about activations that were constant during calibration.

    Args:
        constant: their names.
    """
    if not constant:
        return []
    more = f" and {len(constant) - _NAMED} more" if len(constant) > _NAMED else ""
    return [
        f"these tensors have one value only on all calibration samples, so that their 8 bits cover "
        f"nothing else: {', '.join(constant[:_NAMED])}{more}; are the samples real inputs?"
    ]


WHERE = "--labels"

_SHOWN = 8  # wrong values that an error spells out


def read_labels(path: Path, name: str) -> Array:
    """The array ``name`` of a file that :func:`edgekd.onnx.samples.open_samples` takes.

    Raises:
        InputError: the file is an .npy, which holds one array; there is no such array; it is
            pickled objects or damaged.
    """
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"{path.name} holds one array, the inputs, and no labels",
            where=WHERE,
            remedy=f"write an npz file: np.savez(file, INPUT=inputs, {name}=classes)",
        )
    with NpzFile(path, InputError) as archive:
        if name not in archive.names:
            raise unknown_name("array", name, archive.names, where=f"{WHERE} in {path}")
        return archive.read(name)


def check_labels(labels: Array, count: int, classes: int) -> None:
    """Check that there is one class from 0 to ``classes`` − 1 for each of ``count`` samples.

    Raises:
        InputError: there is not.
    """
    if (
        labels.shape == (count,)
        and labels.dtype.kind in "iu"
        and 0 <= int(labels.min()) <= int(labels.max()) < classes
    ):
        return
    if labels.shape == (count,) and labels.dtype.kind in "iu":
        wrong = labels[(labels < 0) | (labels >= classes)]
        values = [int(value) for value in np.unique(wrong)]
        shown = ", ".join(map(str, values[:_SHOWN])) + (", …" if len(values) > _SHOWN else "")
        raise InputError(
            f"{len(wrong)} of {count} labels are no class from 0 to {classes - 1}: {shown}",
            where=WHERE,
            remedy="count the classes from 0, and leave out samples without a label",
        )
    raise InputError(
        f"the labels are {labels.dtype}{labels.shape}; one class from 0 to {classes - 1} for each "
        f"of the {count} samples is needed",
        where=WHERE,
        remedy="give an integer array of that length",
    )


CLASSES_AT_LEAST = 2

BATCH = 64

AGREEMENT = "agreement with float32"

RELATIVE = "1 - relative error"

ABSOLUTE = "1 - error (float32 gives zeros)"


class Evaluator(ABC):
    """Compares files with the float model on the same samples, batch by batch.

    Float32 is the model as written, run without graph optimizations. A subclass gives each sample's
    score, of which the mean is the metric; outputs are not stored, only their scores and errors.

    Args:
        model: the float model.
        samples: all are compared.
        threads: number of threads of ONNX Runtime.
        batch: batch size of the candidates. Dynamic ranges depend on the batch: with batch 1 the
            outputs are those on a device.
    """

    output: str | None = None
    """The output whose largest value is the predicted class; None where there is none."""
    scores: Array
    """Float32's, as of :meth:`score`."""
    checks_parts = False
    """Whether the drop is that of the part of the outputs that falls most, if the metric falls
    by less; see :class:`edgekd.onnx.error_metrics.PartError`."""

    def __init__(
        self, model: Path, samples: Samples, *, threads: int = 1, batch: int = BATCH
    ) -> None:
        self.model, self.samples = model, samples
        self._threads, self._batch = threads, batch

    @abstractmethod
    def score(self, outputs: Mapping[str, Array], rows: slice = slice(None)) -> Array:
        """The scores of the samples of these rows, higher is better; samples without a label have
        none."""

    @cached_property
    def reference(self) -> Reference:
        """The float model on the samples.

        Raises:
            InputError: as :func:`edgekd.onnx.inference.run_samples`.
        """
        from edgekd.onnx.compare import Reference

        return Reference(self.model, self.samples, threads=self._threads, batch=BATCH)

    def drop_of(self, path: Path) -> float:
        """The drop of the metric against float32, or of a part that drops more."""
        if self.checks_parts:
            return _worst_drop(self.side_by_side(path))
        return float((self.scores - self.scores_of(path)).mean())

    def scores_of(self, path: Path, optimization: Optimization = "all") -> Array:
        """The scores of a file, as of :meth:`score`."""
        batches = self.run(path, optimization)
        return np.concatenate([self.score(outputs, rows) for rows, outputs in batches])

    def run(
        self, path: Path, optimization: Optimization = "all"
    ) -> Iterator[tuple[slice, dict[str, Array]]]:
        """A file's outputs batch by batch, with their rows."""
        from edgekd.onnx.inference import BatchedModel

        return BatchedModel(
            path,
            self.samples,
            threads=self._threads,
            optimization=optimization,
            batch=self._batch,
        ).predict_batches()

    def side_by_side(
        self, path: Path, optimization: Optimization = "all", batch: int | None = None
    ) -> Comparison:
        """The scores of a file and float32's, and the error of each of its outputs."""
        return self.reference.compare(
            path,
            self.output,
            lambda _, outputs, rows: self.score(outputs, rows),
            optimization=optimization,
            batch=batch or self._batch,
        )


class SampleEvaluator(Evaluator):
    """By the classes or the outputs alone: without a task.

    The metric is accuracy where there are labels, agreement with float32 where the first output is
    (N, classes) in floating point, else that of the part of the outputs which falls most. A sample
    whose output is NaN or infinite where float32's is not, or vice versa, is wrong.

    Args:
        model: as of :class:`Evaluator`, like ``samples``, ``threads`` and ``batch``.
        labels: (N,) the samples' classes, None where there are none.

    Raises:
        InputError: the labels do not fit the samples or the output; as :class:`Evaluator`.
    """

    def __init__(
        self,
        model: Path,
        samples: Samples,
        labels: Array | None,
        *,
        threads: int = 1,
        batch: int = BATCH,
    ) -> None:
        super().__init__(model, samples, threads=threads, batch=batch)
        name, outputs = next(iter(self.reference.first.items()))
        has_classes = (
            outputs.dtype.kind == "f"
            and self.reference.parts[name][0].kind != "decisions"
            and outputs.ndim == 2
            and outputs.shape[1] >= CLASSES_AT_LEAST
        )
        if labels is not None and not has_classes:
            raise InputError(
                f"labels need an output (N, classes), and {name!r} is {('N', *outputs.shape[1:])}",
                where="--labels",
                remedy="leave it out: the outputs are then compared with float32's",
            )
        if labels is not None:
            check_labels(labels, samples.count, outputs.shape[1])
        self.checks_parts = not has_classes or len(self.reference.first) > 1
        self.metric = AGREEMENT if labels is None else "accuracy"
        """The metric of the classes; without classes, each comparison returns its own."""
        if not has_classes:
            return
        self.output, self._class_count = name, outputs.shape[1]
        parts = [_Classes.of(each[name]) for _, _, each in self.reference.predictions(BATCH)]
        self._float32 = _Classes(*(np.concatenate(each) for each in zip(*parts, strict=True)))
        self._expected = self._float32.classes if labels is None else labels
        self.scores = (self._float32.classes == self._expected).astype(np.float64)

    def score(self, outputs: Mapping[str, Array], rows: slice = slice(None)) -> Array:
        """Whether the classes of these samples are the labels, or float32's; none without
        classes."""
        if self.output is None:
            return np.zeros(0)
        found = _Classes.of(outputs[self.output])
        same = found.not_finite == self._float32.not_finite[rows]
        right: Array = (found.classes == self._expected[rows]) & same
        return right.astype(np.float64)

    def compare(self, path: Path, optimization: Optimization = "all") -> dict[str, Any]:
        """The metric, its drop with an interval, the error of each output, and ``warnings``.

        ``worst`` names the part that falls most and its ``drop``; None where that is the metric.
        """
        found = self.side_by_side(path, optimization)
        errors = [error.to_json() for error in found.errors]
        warnings = remarks_on_errors(errors)
        part = found.worst
        if self.output is not None:
            metric, unit, of_drop = self.metric, self.metric.split()[0], "points"
            float_score, score, drop = self._class_statistics(found)
            warnings += self._remarks_on_classes(found)
        else:
            assert part is not None  # an output without classes has parts
            metric, unit, of_drop = _metric_of(part), "", ""
            float_score, score, drop = _part_statistics(part)
        worst = None
        if part is not None and (self.output is None or part.drop > (drop.value or 0.0)):
            worst = {"part": part.label, "metric": _metric_of(part), "drop": part.drop}
        return {
            "metric": metric,
            "float_score": float_score.figure(unit, "measured-on-host").to_json(),
            "score": score.figure(unit, "measured-on-host").to_json(),
            "drop": drop.figure(of_drop, "measured-on-host").to_json(),
            "worst": worst,
            "errors": errors,
            "warnings": warnings,
        }

    def _class_statistics(self, found: Comparison) -> tuple[Estimate, Estimate, Estimate]:
        """Float32's score, the candidate's, and the drop, of the classes."""
        from edgekd.release.statistics import mean_score, paired_difference, wilson

        if self.metric == AGREEMENT:
            # It falls from 1, which is not a measured value: only the disagreement is uncertain.
            drop = wilson(int((found.scores == 0).sum()), len(found.scores))
        else:
            drop = paired_difference(found.reference_scores, found.scores)
        return mean_score(found.reference_scores), mean_score(found.scores), drop

    def _remarks_on_classes(self, found: Comparison) -> list[str]:
        """Warnings about samples, or labels, on which float32's classes say little."""
        from edgekd.release.statistics import wilson

        count = len(found.scores)
        if self.metric == AGREEMENT:
            classes = np.unique(self._float32.classes)
            if len(classes) != 1 or count <= 1:
                return []
            return [
                f"float32 predicts class {classes[0]} to all {count} samples: "
                "agreement on these says little"
            ]
        right, chance = found.reference_scores, 1 / self._class_count
        interval = wilson(int(right.sum()), count).interval
        if interval is None or interval[0] > chance:
            return []
        return [
            f"float32 itself is right on {right.mean():.1%} of the samples, and chance is "
            f"{chance:.1%}: are they preprocessed as the model expects, the labels right?"
        ]


def largest_drop(record: Mapping[str, Any]) -> float:
    """The drop that is checked against a budget: the metric's, or that of a part which drops
    more.
    """
    worst = record["worst"]
    drop: float = record["drop"]["value"]
    return drop if worst is None else max(drop, worst["drop"])


class _Classes(NamedTuple):
    """(n,) each: the predicted class, and which values of the output are not finite."""

    classes: Array
    not_finite: Array

    @classmethod
    def of(cls, outputs: Array) -> _Classes:
        """From (n, classes)."""
        from edgekd.onnx.error_metrics import not_finite_places

        return cls(outputs.argmax(1), not_finite_places(outputs))


def _part_statistics(part: PartError) -> tuple[Estimate, Estimate, Estimate]:
    """Float32's score, the candidate's, and the drop, of a part without classes."""
    from edgekd.release.statistics import mean_score, paired_difference, wilson

    if part.by_decision and part.kind == "scores":
        same = round((part.agreement or 0.0) * part.decided)
        counts = (part.decided, same, part.decided - same)
        float_score, score, drop = (wilson(count, part.decided) for count in counts)
        return float_score, score, drop
    ones, scores = np.ones(len(part.losses)), 1 - part.losses
    return mean_score(ones), mean_score(scores), paired_difference(ones, scores)


def _worst_drop(found: Comparison) -> float:
    """The largest drop of the metric, where there is one, and of all parts."""
    drops = [] if found.worst is None else [found.worst.drop]
    if len(found.scores):
        drops.append(float((found.reference_scores - found.scores).mean()))
    return max(drops)


def _metric_of(part: PartError) -> str:
    """The name of the metric of a part that drops most."""
    if part.kind == "decisions":
        return AGREEMENT
    if part.by_decision:
        from edgekd.onnx.error_metrics import SCORE_THRESHOLD

        return f"agreement on scores over {SCORE_THRESHOLD:g}"
    return RELATIVE if part.relative is not None else ABSOLUTE
