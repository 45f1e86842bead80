"""The validation split as what engines are calibrated on, compared on and chosen by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekd.stages.fitting import Ground

if TYPE_CHECKING:
    from edgekd.engines.samples import Array


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
    """The task's metric on the validation split, of float32 and of any other file."""

    def __init__(self, ground: Ground, reference: Path) -> None:
        from edgekd.engines.compare import run_samples
        from edgekd.tasks import against_teacher

        self.samples = ValidationSamples(ground)
        self.task = ground.task
        split = ground.dataset.splits["validation"]
        self.targets = {
            spec.name: np.asarray(split.arrays[spec.name]) for spec in ground.dataset.targets
        }
        self.labelled = self.task.labelled(self.targets)
        self.reference = run_samples(reference, self.samples)
        if not self.labelled.any():
            # What float32 answers is then what is to be kept.
            self.task = against_teacher(self.task)
            self.targets |= self.task.targets_from(self.reference)
            self.labelled = np.ones(self.samples.count, bool)
        self.scores = self.score(self.reference)

    def score(self, answers: Mapping[str, Array]) -> Array:
        """Each labelled sample's score, turned so that higher is better, (N,)."""
        sign = 1 if self.task.higher_is_better else -1
        scores: Array = sign * self.task.scores(answers, self.targets)[self.labelled]
        return scores

    def drop(self, answers: Mapping[str, Array]) -> float:
        """How much the metric falls against float32 (negative: it rises)."""
        return float((self.scores - self.score(answers)).mean())
