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
from torch import nn

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

    @property
    def best(self) -> Epoch:
        """The epoch whose weights are saved; ``epochs[-1]`` is the last one."""
        return self.epochs[self.best_epoch - 1]

    def add(self, epoch: Epoch) -> bool:
        """Append an epoch; whether it is the best so far. Of equal ones the later is better."""
        sign = 1 if self.higher_is_better else -1
        is_best = not self.epochs or sign * epoch.validation >= sign * self.best.validation
        self.epochs.append(epoch)
        if is_best:
            self.best_epoch = epoch.epoch
        return is_best

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


def training_fingerprint(
    model: nn.Module, objective: Objective, config: TrainConfig, seed: int, steps: int
) -> dict[str, Any]:
    """The values that must be equal for a checkpoint to be resumed, as plain values."""
    # The output scaling of the networks inside is part of what their weights mean.
    scales = {
        key: buffer.tolist()
        for key, buffer in model.named_buffers()
        if key.rpartition(".")[2] in ("output_scale", "output_offset")
    }
    return {
        "config": config.model_dump_json(),
        "seed": seed,
        "steps": steps,
        "terms": objective.fingerprint,
        "shapes": {key: list(tensor.shape) for key, tensor in model.state_dict().items()},
        **({"outputs": scales} if scales else {}),
    }


def save_checkpoint(
    folder: Path, run: Mapping[str, Any], state: Mapping[str, Any], history: History
) -> None:
    """Write a training's state into a folder, atomically.

    Args:
        folder: created if missing.
        run: the training's :func:`training_fingerprint`.
        state: ``model``, ``objective`` and ``best``: weights and buffers after the last epoch, of
            the adapters, and of the best epoch; ``step``: optimizer, loss scale and average.
        history: the epochs so far.

    Raises:
        StageError: it cannot be written; an earlier checkpoint is still intact.
    """
    path = folder / NAME
    content = {"version": _VERSION, "run": run, **state, "history": history.to_json()}
    # Through memory: torch's own writer reports a full disk with a cryptic error.
    serialized = io.BytesIO()
    torch.save(content, serialized)
    what, remedy = "the training state", "free space; the next run resumes from the epoch before"
    with write_errors(path, what, remedy):
        folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, serialized.getbuffer(), what, remedy, durable=True)


def load_checkpoint(
    folder: Path, run: Mapping[str, Any]
) -> tuple[dict[str, Any], History | None, str]:
    """The state to resume from, as given to :func:`save_checkpoint`.

    Returns:
        The state, the history (None if there is nothing to resume), and why an existing file was
        not used ("" if there is no file). A damaged file is no error: the training can start again.
    """
    path = folder / NAME
    if not path.is_file():
        return {}, None, ""
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not compare the checksums
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{damaged} is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["version"] != _VERSION or content["run"] != dict(run):
            return {}, None, "it is of another training"
        state = {key: content[key] for key in ("model", "objective", "step", "best")}
        return state, History.from_json(content["history"]), ""
    except (
        OSError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile,
        KeyError, TypeError, ValueError, IndexError, AttributeError,
    ) as error:  # fmt: skip
        reason = str(error).strip().splitlines()
        first = reason[0][:120] if reason else type(error).__name__
        return {}, None, f"it cannot be read ({first})"
