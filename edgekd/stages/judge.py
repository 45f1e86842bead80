"""How near a file's answers are to float32's, and to the labels where there are any."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgekd.errors import InputError
from edgekd.stages.own_remarks import remarks_on_errors
from edgekd.stages.sample_labels import check_labels

if TYPE_CHECKING:
    from edgekd.engines.compare import Comparison
    from edgekd.engines.samples import Array, Samples

CLASSES_AT_LEAST = 2
BATCH = 64
AGREEMENT = "agreement with float32"


class Judge:
    """Compares files with the float model on the same samples, batch by batch.

    The metric is accuracy where there are labels, agreement with float32 where the first output
    is (N, classes), else 1 − ‖answer − float32‖ / ‖float32‖ of each sample over all outputs. A
    sample whose answer is NaN or infinite where float32's is not, or the other way round, is
    wrong, as :func:`edgekd.engines.compare.compare_answers` counts it; its last metric is at most
    that of an answer of zeros, 0.

    Args:
        model: the float model.
        samples: all serve the comparison.
        labels: (N,) the samples' classes, None where there are none.
        threads: of ONNX Runtime.
        batch: the candidates'. Dynamic ranges are those of a whole batch: one by one is what a
            device answers.

    Raises:
        InputError: the labels do not fit the samples or the output; as
            :func:`edgekd.engines.compare.run_samples` for the model.
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
        from edgekd.engines.batched_run import answer_batches

        self._model, self._samples = model, samples
        self._threads, self._batch = threads, batch
        first = next(answer_batches(model, samples, threads=threads, batch=BATCH))[1]
        self._primary, answers = next(iter(first.items()))
        self._has_classes = answers.ndim == 2 and answers.shape[1] >= CLASSES_AT_LEAST
        self._class_count = answers.shape[-1] if self._has_classes else 0
        if labels is not None and not self._has_classes:
            raise InputError(
                f"labels need an output (N, classes), and {self._primary!r} is "
                f"{('N', *answers.shape[1:])}",
                where="--labels",
                remedy="leave it out: the outputs are then compared with float32's",
            )
        if labels is not None:
            check_labels(labels, samples.count, answers.shape[1])
        self._labels = labels
        self._known: tuple[_Classes, Array] | None = None
        self._answered: set[int] = set()
        self.metric = "1 - relative error"
        if self._has_classes:
            self.metric = AGREEMENT if labels is None else "accuracy"

    def drop_of(self, path: Path) -> float:
        """How much the metric falls against float32."""
        if not self._has_classes:
            found = self._side_by_side(path)
            return float((found.reference_scores - found.scores).mean())
        # A class and a score for each sample are little to keep: float32 is run once.
        if self._known is None:
            known = self._classes(self._model, BATCH)
            self._known = (known, self._right(known, known, slice(None)))
        wanted, own = self._known
        scores = self._right(wanted, self._classes(path, self._batch), slice(None))
        return float((own - scores).mean())

    def compare(self, path: Path) -> dict[str, Any]:
        """The metric, its drop with an interval, the error of each output, and ``warnings``."""
        from edgekd.release.statistics import mean_score, paired_difference, wilson

        found = self._side_by_side(path)
        if self.metric == AGREEMENT:
            # It falls from 1, which is not a measured value: only the disagreement is uncertain.
            drop = wilson(int((found.scores == 0).sum()), len(found.scores))
        else:
            drop = paired_difference(found.reference_scores, found.scores)
        errors = [error.to_json() for error in found.errors]
        warnings = remarks_on_errors(errors)
        if self.metric == AGREEMENT and len(self._answered) == 1 < len(found.scores):
            warnings.append(
                f"float32 answers class {min(self._answered)} to all {len(found.scores)} samples: "
                "agreement on these says little"
            )
        unit = self.metric.split()[0] if self._has_classes else ""
        if self._labels is not None:
            right, chance = found.reference_scores, 1 / self._class_count
            sure = wilson(int(right.sum()), len(right)).interval
            if sure is not None and sure[0] <= chance:
                warnings.append(
                    f"float32 itself is right on {right.mean():.1%} of the samples, and chance is "
                    f"{chance:.1%}: are they prepared as the model takes them, the labels its own?"
                )
        own, score = mean_score(found.reference_scores), mean_score(found.scores)
        return {
            "metric": self.metric,
            "float_score": own.figure(unit, "measured-on-host").to_json(),
            "score": score.figure(unit, "measured-on-host").to_json(),
            "drop": drop.figure("points" if unit else "", "measured-on-host").to_json(),
            "errors": errors,
            "warnings": warnings,
        }

    def _side_by_side(self, path: Path) -> Comparison:
        from edgekd.engines.compare import compare_models

        return compare_models(
            self._model,
            path,
            self._samples,
            self._primary if self._has_classes else None,
            self._score,
            threads=self._threads,
            batch=BATCH,
            candidate_batch=self._batch,
        )

    def _score(
        self, reference: Mapping[str, Array], answers: Mapping[str, Array], rows: slice
    ) -> Array:
        if not self._has_classes:
            return _closeness(reference, answers)
        wanted = _Classes.of(reference[self._primary])
        self._answered.update(np.unique(wanted.classes).tolist())
        return self._right(wanted, _Classes.of(answers[self._primary]), rows)

    def _right(self, reference: _Classes, answers: _Classes, rows: slice) -> Array:
        """(n,) whether the classes of these samples are the labels', or float32's."""
        wanted = reference.classes if self._labels is None else self._labels[rows]
        right: Array = (answers.classes == wanted) & (answers.not_finite == reference.not_finite)
        return right.astype(np.float64)

    def _classes(self, path: Path, batch: int) -> _Classes:
        """What a file answers to all samples."""
        from edgekd.engines.batched_run import answer_batches

        batches = answer_batches(path, self._samples, threads=self._threads, batch=batch)
        parts = [_Classes.of(answers[self._primary]) for _, answers in batches]
        return _Classes(
            np.concatenate([part.classes for part in parts]),
            np.concatenate([part.not_finite for part in parts]),
        )


class _Classes(NamedTuple):
    """(n,) each: the class answered, and which values of the answer are not finite."""

    classes: Array
    not_finite: Array

    @classmethod
    def of(cls, answers: Array) -> _Classes:
        """From (n, classes)."""
        from edgekd.engines.error_sums import not_finite_places

        return cls(answers.argmax(1), not_finite_places(answers))


def _closeness(reference: Mapping[str, Array], answers: Mapping[str, Array]) -> Array:
    """1 − ‖answer − reference‖ / ‖reference‖ of each sample over all float outputs, (n,)."""
    floats = [name for name, values in reference.items() if values.dtype.kind == "f"]
    count = len(next(iter(reference.values())))
    off, whole = np.zeros(count), np.zeros(count)
    broken = np.zeros(count, bool)
    for name in floats:
        for row in range(count):
            expected = reference[name][row].astype(np.float64).ravel()
            answer = answers[name][row].astype(np.float64).ravel()
            known = np.isfinite(expected) & np.isfinite(answer)
            same = known | (expected == answer) | (np.isnan(expected) & np.isnan(answer))
            broken[row] |= not same.all()
            expected = expected[known]
            difference = answer[known] - expected
            off[row] += np.vdot(difference, difference)
            whole[row] += np.vdot(expected, expected)
    closeness: Array = 1 - np.sqrt(off / np.maximum(whole, np.finfo(np.float64).tiny))
    return np.where(broken, np.minimum(closeness, 0.0), closeness)
