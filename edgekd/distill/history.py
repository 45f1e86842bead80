"""What happened in a training, epoch by epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Epoch:
    """One epoch.

    ``loss`` and ``terms`` are means over the epoch's samples, terms before weighting;
    ``validation`` is the task's metric after the epoch; ``learning_rate`` that of its last step.
    """

    epoch: int
    loss: float
    terms: Mapping[str, float]
    validation: float
    learning_rate: float
    seconds: float
    samples_per_second: float


@dataclass
class History:
    """All epochs, counted from 1; ``best_epoch`` is the one whose weights are kept."""

    metric: str
    higher_is_better: bool
    epochs: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0

    def add(self, epoch: Epoch) -> bool:
        """Append an epoch; whether it is the best so far. Of equal ones the later is better."""
        best = next((row for row in self.epochs if row.epoch == self.best_epoch), None)
        self.epochs.append(epoch)
        if best is None:
            is_best = True
        elif self.higher_is_better:
            is_best = epoch.validation >= best.validation
        else:
            is_best = epoch.validation <= best.validation
        if is_best:
            self.best_epoch = epoch.epoch
        return is_best

    @property
    def kept(self) -> Epoch:
        """The epoch whose weights are kept; ``epochs[-1]`` is the last one."""
        return self.epochs[self.best_epoch - 1]

    @property
    def epochs_since_better(self) -> int:
        """How many epochs have ended since validation last became better; equal is not better."""
        better_at, best = 0, None
        sign = 1 if self.higher_is_better else -1
        for row in self.epochs:
            if best is None or sign * row.validation > best:
                better_at, best = row.epoch, sign * row.validation
        return len(self.epochs) - better_at

    def to_json(self) -> dict[str, Any]:
        """A plain mapping for a JSON file; :meth:`from_json` takes it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> History:
        """The inverse of :meth:`to_json`."""
        rows = [Epoch(**row) for row in value["epochs"]]
        return cls(value["metric"], value["higher_is_better"], rows, value["best_epoch"])
