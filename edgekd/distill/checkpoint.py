"""Training checkpoints: what is needed to resume bit-exactly, and the history of epochs."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.config.training import TrainConfig
from edgekd.distill.objective import Objective
from edgekd.files import write_errors, write_whole


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
    """All epochs, counted from 1; ``best_epoch`` is the one whose weights are saved."""

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
        """The epoch whose weights are saved; ``epochs[-1]`` is the last one."""
        return self.epochs[self.best_epoch - 1]

    @property
    def epochs_since_better(self) -> int:
        """Number of epochs since validation last improved; an equal value is no improvement."""
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


NAME = "checkpoint.pt"

_VERSION = 3


@dataclass
class TrainingState:
    """The training state: everything that the next epoch depends on.

    Attributes:
        run: the configuration of the training; a state of another configuration is not resumed.
        model: the weights and buffers after the last epoch.
        objective: the weights and buffers of the loss terms' adapters.
        step: the state of :class:`edgekd.distill.step.Step`: optimizer, loss scale, average.
        best: the weights and buffers of the best epoch; the averaged ones with EMA.
        history: the epochs so far.
    """

    run: Mapping[str, Any]
    model: Mapping[str, Tensor]
    objective: Mapping[str, Tensor]
    step: Mapping[str, Any]
    best: Mapping[str, Tensor]
    history: History


def training_identity(
    model: nn.Module, objective: Objective, config: TrainConfig, seed: int, steps: int
) -> dict[str, Any]:
    """The values that must be equal for a checkpoint to be resumed, as plain values."""
    return {
        "config": config.model_dump_json(),
        "seed": seed,
        "steps": steps,
        "terms": objective.identity,
        "shapes": {key: list(tensor.shape) for key, tensor in model.state_dict().items()},
        **output_scales(model),
    }


def output_scales(model: nn.Module) -> dict[str, Any]:
    """The output scaling of the networks inside, part of what their weights mean."""
    names = ("output_scale", "output_offset")
    found = {
        key: buffer.tolist()
        for key, buffer in model.named_buffers()
        if key.rpartition(".")[2] in names
    }
    return {"outputs": found} if found else {}


def save_checkpoint(state: TrainingState, folder: Path) -> None:
    """Write the state into a folder, atomically.

    Raises:
        StageError: it cannot be written; an earlier checkpoint is still intact.
    """
    path = folder / NAME
    content = {
        "version": _VERSION,
        "run": dict(state.run),
        "model": dict(state.model),
        "objective": dict(state.objective),
        "step": dict(state.step),
        "best": dict(state.best),
        "history": state.history.to_json(),
    }
    # Through memory: torch's own writer reports a full disk with a cryptic error.
    serialized = io.BytesIO()
    torch.save(content, serialized)
    what, remedy = "the training state", "free space; the next run resumes from the epoch before"
    with write_errors(path, what, remedy):
        folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, serialized.getbuffer(), what, remedy, durable=True)


def load_checkpoint(folder: Path, run: Mapping[str, Any]) -> tuple[TrainingState | None, str]:
    """The state to resume from.

    Returns:
        The state or None, and why an existing file was not used ("" if there is no
        file). A damaged file is no error: the training can start again.
    """
    path = folder / NAME
    if not path.is_file():
        return None, ""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["version"] != _VERSION or content["run"] != dict(run):
            return None, "it is of another training"
        return (
            TrainingState(
                content["run"],
                content["model"],
                content["objective"],
                content["step"],
                content["best"],
                History.from_json(content["history"]),
            ),
            "",
        )
    except (
        OSError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile,
        KeyError, TypeError, ValueError, IndexError, AttributeError,
    ) as error:  # fmt: skip
        reason = str(error).strip().splitlines()
        return None, f"it cannot be read ({reason[0][:120] if reason else type(error).__name__})"
