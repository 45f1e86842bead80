"""The validation split as what engines are calibrated on, compared on and chosen by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekd.stages.fitting import Ground

if TYPE_CHECKING:
    from edgekd.engines.compare import OutputError, Reference
    from edgekd.engines.samples import Array
    from edgekd.engines.session import Optimization

BATCH = 64
"""Samples run at a time."""


class ValidationSamples:
    """Prepared inputs of the validation split, batch by batch; at most ``limit`` samples.

    The samples are spread evenly over the split, whose order may be that of the classes.
    """

    def __init__(self, ground: Ground, limit: int | None = None) -> None:
        self._ground = ground
        total = len(ground.dataset.splits["validation"])
        self.rows = np.unique(np.linspace(0, total - 1, min(limit or total, total)).astype(int))

    @property
    def count(self) -> int:
        """The number of samples."""
        return len(self.rows)

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """See :class:`edgekd.engines.samples.Samples`."""
        dataset = self._ground.dataset
        for start in range(0, self.count, size):
            rows = self.rows[start : start + size]
            if rows[-1] - rows[0] + 1 == len(rows):
                yield dict(dataset.model_inputs("validation", int(rows[0]), int(rows[-1]) + 1))
                continue
            # One by one: what lies between two of them is never read.
            each = [dataset.model_inputs("validation", int(r), int(r) + 1) for r in rows]
            yield {name: np.concatenate([one[name] for one in each]) for name in each[0]}


class Validation:
    """The task's metric on the validation split, of float32 and of any other file.

    Models are run batch by batch: of their answers only scores and errors are kept. The reference
    is the model as it is written, run without a runtime's optimizations.
    """

    def __init__(self, ground: Ground, reference: Path) -> None:
        from edgekd.tasks import against_teacher

        self.samples = ValidationSamples(ground)
        self.task = ground.task
        split = ground.dataset.splits["validation"]
        self.targets = {
            spec.name: np.asarray(split.arrays[spec.name]) for spec in ground.dataset.targets
        }
        self.labelled = self.task.labelled(self.targets)
        self._file = reference
        self._reference: Reference | None = None
        if not self.labelled.any():
            # What float32 answers is then what is to be kept.
            self.task = against_teacher(self.task)
            self.targets |= self._answered()
            self.labelled = np.ones(self.samples.count, bool)
        self.scores = self._scores(reference, BATCH, "disabled")
        """Float32's, as :meth:`score` gives them."""

    def score(self, answers: Mapping[str, Array]) -> Array:
        """Each labelled sample's score, turned so that higher is better, (N,)."""
        scores: Array = self._score(answers, slice(None))[self.labelled]
        return scores

    def drop_of(self, path: Path, batch: int = BATCH) -> float:
        """How much the metric falls with a file against float32 (negative: it rises)."""
        return float((self.scores - self._scores(path, batch)).mean())

    def compare(self, path: Path, batch: int = BATCH) -> tuple[float, tuple[OutputError, ...]]:
        """:meth:`drop_of` a file, and how far each of its outputs is from float32's."""
        from edgekd.engines.compare import Reference

        if self._reference is None:
            self._reference = Reference(self._file, self.samples)
        found = self._reference.compare(
            path,
            self.task.output if self.task.name == "classification" else None,
            lambda _, answers, rows: self._score(answers, rows),
            batch=batch,
        )
        return float((self.scores - found.scores[self.labelled]).mean()), found.errors

    def _score(self, answers: Mapping[str, Array], rows: slice) -> Array:
        sign = 1 if self.task.higher_is_better else -1
        targets = {name: values[rows] for name, values in self.targets.items()}
        scores: Array = sign * self.task.scores(answers, targets)
        return scores

    def _scores(self, path: Path, batch: int, optimization: Optimization = "all") -> Array:
        from edgekd.engines.batched_run import answer_batches

        batches = answer_batches(path, self.samples, batch=batch, optimization=optimization)
        scores = np.concatenate([self._score(answers, rows) for rows, answers in batches])
        labelled: Array = scores[self.labelled]
        return labelled

    def _answered(self) -> dict[str, Array]:
        """The targets that float32 is right about in every sample."""
        from edgekd.engines.batched_run import answer_batches

        parts: dict[str, list[Array]] = {}
        for _, answers in answer_batches(
            self._file, self.samples, batch=BATCH, optimization="disabled"
        ):
            for name, values in self.task.targets_from(answers).items():
                parts.setdefault(name, []).append(values)
        return {name: np.concatenate(values) for name, values in parts.items()}
