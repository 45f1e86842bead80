"""The only training loop: a teacher's, a student's alone, and a student's with a teacher."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.config.pipeline import TrainConfig
from edgekd.distill.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from edgekd.distill.evaluate import BatchSource, Loaders, device_of, prepared, score
from edgekd.distill.features import Capture
from edgekd.distill.history import Epoch, History
from edgekd.distill.objective import Objective
from edgekd.distill.optimizer import build_optimizer, learning_rate
from edgekd.distill.progress import Progress
from edgekd.distill.teacher import Teacher
from edgekd.errors import InputError, StageError
from edgekd.tasks import Task

__all__ = ["BatchSource", "Loaders", "Progress", "score", "train"]

_UPDATES_PER_EPOCH = 25
_STEPS_BETWEEN_CHECKS_ON_GPU = 50
"""Reading a loss waits for the GPU; on the CPU it costs about a microsecond."""


def train(
    model: nn.Module,
    objective: Objective,
    loaders: Loaders | tuple[BatchSource, BatchSource],
    task: Task,
    config: TrainConfig,
    seed: int,
    *,
    checkpoint_folder: Path,
    progress: Progress,
    teacher: Teacher | None = None,
    label: str = "training",
) -> History:
    """Train a model; afterwards it holds the weights of its best epoch on validation.

    On the CPU, and with the same number of threads, the same seed gives the same weights, also
    when the training was stopped and is gone on with. A checkpoint is left after each epoch.

    Args:
        model: takes a batch, gives outputs by name; trained in place, on the device it is on.
        objective: what it is trained for.
        loaders: the training and the validation batches.
        task: gives the metric that chooses the best epoch.
        config: epochs, optimizer, schedule and the like.
        seed: of shuffling, augmentation and dropout; the initial weights are the caller's.
        checkpoint_folder: where the state after each epoch is kept, and looked for first.
        progress: told of each step's share and of the validation after each epoch.
        teacher: asked for each batch, when the objective needs it.
        label: what the progress display calls the work.

    Raises:
        InputError: the batches do not fit the model or the objective; no teacher where one is
            needed.
        StageError: the loss became NaN or infinite (epoch, step and each term's value are
            named), or a checkpoint cannot be written.
    """
    if objective.needs_teacher and teacher is None:
        raise InputError(
            "the objective compares with a teacher, and there is none",
            remedy="give a teacher, or leave out the losses that need one",
        )
    if len(loaders[0]) == 0:
        raise InputError("there are no training batches", remedy="give more data")
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(memory_format=layout)  # type: ignore[call-overload]
    run = _Run(model, objective, Loaders(*loaders), task, config, seed, teacher, progress)
    history = History(task.metric, task.higher_is_better)
    best = _copied(model)
    run.prepare()
    identity = _identity(model, objective, config, seed, len(run.loaders.train))
    state, refused = load_checkpoint(checkpoint_folder, identity)
    if refused:
        progress.message(f"{label}: the checkpoint is not used: {refused}; starting again")
    if state is not None:
        model.load_state_dict(state.model)
        objective.load_state_dict(state.objective)
        run.optimizer.load_state_dict(dict(state.optimizer))
        history, best = state.history, dict(state.best)
    done = len(history.epochs)
    if 0 < done < config.epochs:
        progress.message(f"{label}: going on after epoch {done} of {config.epochs}")
    progress.start(label, (config.epochs - done) * len(run.loaders.train), "step")
    try:
        # Dropout draws from torch's own generator: seeded per epoch, and given back as it was.
        with torch.random.fork_rng(devices=run.devices_to_fork):
            for number in range(done + 1, config.epochs + 1):
                if history.add(run.epoch(number)):
                    best = _copied(model)
                after = TrainingState(
                    identity,
                    model.state_dict(),
                    objective.state_dict(),
                    run.optimizer.state_dict(),
                    best,
                    history,
                )
                save_checkpoint(after, checkpoint_folder)
    finally:
        progress.finish()
        run.capture.remove()
    model.load_state_dict(best)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    model.eval()
    return history


class _Run:
    """One training with everything an epoch needs."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        loaders: Loaders,
        task: Task,
        config: TrainConfig,
        seed: int,
        teacher: Teacher | None,
        progress: Progress,
    ) -> None:
        self.model, self.objective, self.loaders, self.task = model, objective, loaders, task
        self.config, self.seed, self.teacher, self.progress = config, seed, teacher, progress
        self.device = device_of(model)
        self.devices_to_fork = [self.device] if self.device.type == "cuda" else []
        self.capture = Capture(model, objective.student_layers, "student")
        self.check_every = 1 if self.device.type == "cpu" else _STEPS_BETWEEN_CHECKS_ON_GPU
        self.labels = objective.labels

    def prepare(self) -> None:
        """Make the objective's adapters for the shapes of a first batch, and the optimizer."""
        if self.objective.needs_shapes:
            with torch.random.fork_rng(devices=self.devices_to_fork), torch.no_grad():
                torch.manual_seed(_epoch_seed(self.seed, 0))
                batch = next(iter(self.loaders.train.epoch(self.seed, 1)))
                self.model.eval()
                student = self._answer(batch)
                self.objective.prepare(student, self._ask(batch), self.loaders.train.samples)
        modules = (self.model, self.objective)
        self.parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.parameters, self.config)

    def epoch(self, number: int) -> Epoch:
        """Train one epoch (from 1) and validate."""
        torch.manual_seed(_epoch_seed(self.seed, number))
        self.model.train()
        steps = len(self.loaders.train)
        report_every = max(1, steps // _UPDATES_PER_EPOCH)
        started = time.perf_counter()
        pending: list[Tensor] = []
        rows: list[list[float]] = []
        sizes: list[int] = []
        rate = 0.0
        for step, batch in enumerate(self.loaders.train.epoch(self.seed, number)):
            rate = learning_rate(
                self.config, (number - 1) * steps + step, self.config.epochs * steps
            )
            part = ((number - 1) * steps + step) / (self.config.epochs * steps)
            values, size = self._step(batch, rate, part, first=step == 0)
            pending.append(values)
            sizes.append(size)
            if len(pending) == self.check_every:
                rows += self._read(pending, number, len(rows))
            if (step + 1) % report_every == 0:
                self.progress.advance(report_every, epoch=number, loss=rows[-1][0] if rows else 0.0)
        rows += self._read(pending, number, len(rows))
        seconds = time.perf_counter() - started
        means = np.average(np.array(rows), axis=0, weights=sizes)
        self.model.eval()
        validation = float(score(self._answer, self.loaders.validation, self.task).mean())
        self.progress.advance(
            steps % report_every,
            epoch=number,
            loss=float(means[0]),
            **{self.task.metric: validation},
        )
        terms = dict(zip(self.labels, map(float, means[1:]), strict=True))
        samples_per_second = sum(sizes) / seconds
        return Epoch(number, float(means[0]), terms, validation, rate, seconds, samples_per_second)

    def _step(
        self, batch: Mapping[str, Tensor], rate: float, part: float, first: bool
    ) -> tuple[Tensor, int]:
        """One step; the total and each term's value (1 + terms,), and the batch's size."""
        batch = prepared(batch, self.device, self.config.channels_last)
        check = getattr(self.model, "check_batch", None)
        if first and callable(check):
            check(batch)
        teacher = self._ask(batch)
        student = self.model(batch) | self.capture.take()
        total, terms = self.objective(student, teacher, batch, part)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        values = [total.detach(), *terms.values()]
        size = len(batch[self.task.target])
        return torch.stack([value.float() for value in values]), size

    def _answer(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = self.model(
            prepared(batch, self.device, self.config.channels_last)
        )
        return outputs | self.capture.take()

    def _ask(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The teacher's answers, when the objective compares with them."""
        if self.teacher is None or not self.objective.needs_teacher:
            return None
        return self.teacher.answer(batch)

    def _read(self, pending: list[Tensor], epoch: int, before: int) -> list[list[float]]:
        """The values of the steps since the last reading, which are then forgotten.

        Raises:
            StageError: one of their totals is NaN or infinite.
        """
        rows: list[list[float]] = torch.stack(pending).tolist() if pending else []
        pending.clear()
        for step, row in enumerate(rows, start=before + 1):
            if math.isfinite(row[0]):
                continue
            named = ", ".join(
                f"{label} {value:g}" for label, value in zip(self.labels, row[1:], strict=True)
            )
            raise StageError(
                f"the loss became {row[0]:g} in epoch {epoch}, step {step}; its terms: {named}",
                remedy="lower learning_rate or set clip_norm; a term that is infinite by itself "
                "shows which loss, or which teacher answer, is at fault",
            )
        return rows


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy({key: tensor.detach() for key, tensor in model.state_dict().items()})


def _epoch_seed(seed: int, epoch: int) -> int:
    digest = hashlib.sha256(f"edgekd epoch {seed} {epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _identity(
    model: nn.Module, objective: Objective, config: TrainConfig, seed: int, steps: int
) -> dict[str, Any]:
    """What must be the same for a checkpoint to be gone on with, as plain values."""
    return {
        "config": config.model_dump_json(),
        "seed": seed,
        "steps": steps,
        "terms": objective.identity,
        "shapes": {key: list(tensor.shape) for key, tensor in model.state_dict().items()},
    }
