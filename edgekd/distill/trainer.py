"""The training loop of teachers, and of students with and without a teacher."""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.config.host import world_size
from edgekd.config.training import TrainConfig
from edgekd.distill.checkpoint import (
    Epoch,
    History,
    load_checkpoint,
    save_checkpoint,
    training_fingerprint,
)
from edgekd.distill.distributed import (
    ProcessGroup,
    device_of,
    open_process_group,
    synced_batch_norms,
    to_device,
    training_device,
)
from edgekd.distill.features import FeatureExtractor
from edgekd.distill.loss_term import ConfiguredLoss, Named
from edgekd.distill.objective import Objective, check_gradients
from edgekd.distill.optimizer import (
    EMA,
    build_optimizer,
    check_train_config,
    compiled,
    learning_rate,
)
from edgekd.distill.teacher import Teacher
from edgekd.errors import InputError, StageError
from edgekd.progress import Progress
from edgekd.tasks import Task

_UPDATES_PER_EPOCH = 25
_STEPS_BETWEEN_CHECKS_ON_GPU = 50
"""Reading a loss waits for the GPU; on the CPU it costs about a microsecond."""

_HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class BatchSource(Protocol):
    """A source of batches: mappings from name to tensor, inputs and targets together."""

    def epoch(self, seed: int, epoch: int) -> Iterator[Mapping[str, Tensor]]:
        """The batches of an epoch, shuffled and augmented by (seed, epoch)."""
        ...

    def ordered(self) -> Iterator[Mapping[str, Tensor]]:
        """Every sample once, in order and without augmentation."""
        ...

    def __len__(self) -> int:
        """Number of batches per epoch."""
        ...

    @property
    def samples(self) -> int:
        """Number of rows of the split."""
        ...


@dataclass(eq=False, repr=False)
class Trainer:
    """Trains a network for an objective; :meth:`fit` does all of it.

    On the CPU, and with the same number of threads, the same seed gives the same weights, also when
    the training was stopped and resumed. Where ``torchrun`` started several processes, each makes
    the same trainer and ends with the same weights: those of one process, except for rounding and
    dropout.

    Raises:
        InputError: the objective needs a teacher and there is none, or there are no batches.
    """

    model: nn.Module
    """Takes a batch, returns outputs by name. Trained in place, on a GPU when there is one, then
    moved back to its original device. Its methods ``check_batch(batch)`` and
    ``on_progress(progress)``, if it has them, are called before the first step of an epoch and
    before each step."""
    objective: Objective
    """The objective to minimise; its adapters are trained with the model."""
    training: BatchSource
    """The training batches."""
    validation: BatchSource
    """The validation batches; the test split is not used in a training."""
    task: Task
    """Defines the metric that selects the best epoch."""
    config: TrainConfig
    """Epochs, optimizer, schedule and the like."""
    seed: int
    """Seed of shuffling, augmentation and dropout; the initial weights are the caller's."""
    checkpoint_folder: Path
    """Where the state is saved after each epoch, and loaded from at the start."""
    progress: Progress
    """Receives each step, and the validation after each epoch."""
    teacher: Teacher | None = None
    """Run on each batch, when the objective needs it."""
    label: str = "training"
    """The name of the training in messages."""

    history: History = field(init=False)
    """The epochs so far."""
    best: Mapping[str, Tensor] = field(init=False)
    """The weights and buffers of the best epoch; the averaged ones with ``ema``."""
    device: torch.device = field(init=False)
    """Where the model is trained."""
    processes: ProcessGroup | None = field(init=False)
    """The processes that share each batch; None: a single process."""
    average: EMA | None = field(init=False)
    """The moving average of the model's weights, if ``ema`` is set."""
    validated: nn.Module = field(init=False)
    """The network that is validated and saved: the model, or the average of its weights."""
    features: FeatureExtractor = field(init=False)
    """Captures the layers of the model that the objective compares."""
    parameters: list[nn.Parameter] = field(init=False)
    """The trained parameters of the model and of the objective's adapters."""
    optimizer: torch.optim.Optimizer = field(init=False)
    """Updates the parameters."""
    scaler: torch.amp.GradScaler | None = field(init=False)
    """Scales the loss, if the precision is float16."""
    forward: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = field(init=False)
    """The model, compiled if ``compile`` is set; its state, its validation and its export are those
    of the model itself."""

    def __post_init__(self) -> None:
        if self.objective.needs_teacher and self.teacher is None:
            raise InputError(
                "the objective compares with a teacher, and there is none",
                remedy="give a teacher, or leave out the losses that need one",
            )
        if len(self.training) == 0:
            raise InputError("there are no training batches", remedy="give more data")
        self.history = History(self.task.metric, self.task.higher_is_better)

    def fit(self) -> History:
        """Train the model; afterwards it holds the weights of its best epoch on validation.

        With ``ema`` these are the averaged ones, and so are those that are validated. A checkpoint
        is written after each epoch, and a training that was stopped is resumed from it.

        Raises:
            InputError: the batches do not fit the model or the objective, or a configuration that
                this machine cannot train.
            StageError: the loss became NaN or infinite (epoch, step and each term's value are
                named), or a checkpoint cannot be written.
        """
        config = self.config
        original_device = device_of(self.model)
        self.device = training_device() if original_device.type == "cpu" else original_device
        self.processes = open_process_group() if world_size() > 1 else None
        check_train_config(config, self.objective, self.device)
        with ExitStack() as stack:
            self._set_up(stack)
            self.load()
            done, patience = len(self.history.epochs), config.patience or config.epochs
            if done == 0:
                self._check_terms()
            elif done < config.epochs and self.history.epochs_since_better < patience:
                self.progress.message(
                    f"{self.label}: resuming after epoch {done} of {config.epochs}"
                )
            self.progress.start(self.label, (config.epochs - done) * len(self.training), "step")
            stack.callback(self.progress.finish)
            # Dropout draws from torch's own generator: seeded per epoch, and restored afterwards.
            stack.enter_context(self._fork_rng())
            for epoch in range(done + 1, config.epochs + 1):
                if self.history.epochs_since_better >= patience:
                    self.progress.message(
                        f"{self.label}: stopped after epoch {epoch - 1} of {config.epochs}: "
                        f"validation {self.task.metric} was not better for {patience}"
                    )
                    break
                if self.history.add(self.train_epoch(epoch)):
                    self.best = _copied(self.validated)
                self.save()
        self.model.load_state_dict(self.best)
        _move(self.model, original_device, torch.contiguous_format)
        self.model.eval()
        return self.history

    def train_epoch(self, epoch: int) -> Epoch:
        """Train one epoch, counted from 1, and validate."""
        torch.manual_seed(_epoch_seed(self.seed, epoch))
        self.model.train()
        steps = len(self.training)
        report_every = max(1, steps // _UPDATES_PER_EPOCH)
        read_every = 1 if self.device.type == "cpu" else _STEPS_BETWEEN_CHECKS_ON_GPU
        started = time.perf_counter()
        pending: list[Tensor] = []
        rows: list[list[float]] = []
        sizes: list[int] = []
        for step, batch in enumerate(self.training.epoch(self.seed, epoch)):
            batch = self._to_device(batch)
            if step == 0 and callable(check := getattr(self.model, "check_batch", None)):
                check(batch)
            if callable(on_progress := getattr(self.model, "on_progress", None)):
                on_progress(self._progress(epoch, step))
            sizes.append(len(batch[self.task.target]))
            pending.append(self.train_step(batch, epoch, step))
            if len(pending) == read_every:
                rows += self._read_losses(pending, epoch, len(rows))
            if (step + 1) % report_every == 0:
                self.progress.advance(report_every, epoch=epoch, loss=rows[-1][0] if rows else 0.0)
        rows += self._read_losses(pending, epoch, len(rows))
        seconds = time.perf_counter() - started
        loss, *terms = map(float, np.average(np.array(rows), axis=0, weights=sizes))
        validation = self.validate()
        self.progress.advance(
            steps % report_every, epoch=epoch, loss=loss, **{self.task.metric: validation}
        )
        return Epoch(
            epoch=epoch,
            loss=loss,
            terms=dict(zip(self.objective.labels, terms, strict=True)),
            validation=validation,
            learning_rate=self._learning_rate(epoch, len(sizes) - 1),
            seconds=seconds,
            samples_per_second=sum(sizes) / seconds,
        )

    def train_step(self, batch: Mapping[str, Tensor], epoch: int, step: int) -> Tensor:
        """Train on one batch; after ``accumulate`` batches the mean gradient updates the weights.

        Args:
            batch: on the model's device.
            epoch: from 1.
            step: the batch's number in its epoch, from 0; the epoch's last batches may be fewer
                than ``accumulate``.

        Returns:
            The objective and each term's value, (1 + terms,) float32, without a graph.
        """
        accumulate = self.config.accumulate
        begun = step - step % accumulate
        batches = min(accumulate, len(self.training) - begun)
        teacher = self._teacher_outputs(batch)
        student = self._student_outputs(batch, epoch, step)
        total, terms = self.objective(student, teacher, batch, self._progress(epoch, step))
        if step == begun:
            self.optimizer.zero_grad(set_to_none=True)
        share = total if batches == 1 else total / batches
        if self.scaler is not None:
            share = self.scaler.scale(share)
        share.backward()
        if step + 1 == begun + batches:
            self._update_weights(self._learning_rate(epoch, step))
        return torch.stack([value.float() for value in (total.detach(), *terms.values())])

    def validate(self) -> float:
        """The mean of the task's scores over the validation samples.

        Raises:
            InputError: there is nothing to score.
            StageError: an output is NaN or infinite.
        """
        self.validated.eval()
        self.model.eval()
        return float(score(self._predict, self.validation, self.task).mean())

    def save(self) -> None:
        """Write a checkpoint: everything that the next epoch depends on.

        Raises:
            StageError: it cannot be written; an earlier checkpoint is still intact.
        """
        if self.processes is not None and self.processes.rank != 0:
            return
        state = {
            "model": self.model.state_dict(),
            "objective": self.objective.state_dict(),
            "step": {
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict() if self.scaler is not None else {},
                "average": self.average.state_dict() if self.average is not None else {},
            },
            "best": dict(self.best),
        }
        save_checkpoint(self.checkpoint_folder, self._fingerprint(), state, self.history)

    def load(self) -> None:
        """Resume from the checkpoint, if there is one of this training; else change nothing.

        All processes resume from the checkpoint of the first.
        """
        found = None
        if self.processes is None or self.processes.rank == 0:
            found = load_checkpoint(self.checkpoint_folder, self._fingerprint())
        if self.processes is not None:
            found = self.processes.broadcast_object(found)
        assert found is not None
        state, history, refused = found
        if refused:
            self.progress.message(
                f"{self.label}: the checkpoint is not used: {refused}; starting again"
            )
        if history is None:
            return
        self.model.load_state_dict(state["model"])
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["step"]["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["step"]["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["step"]["average"])
        self.history, self.best = history, state["best"]

    def _fingerprint(self) -> dict[str, Any]:
        steps = len(self.training)
        return training_fingerprint(self.model, self.objective, self.config, self.seed, steps)

    def _set_up(self, stack: ExitStack) -> None:
        """Move the model to its device, capture its layers, make adapters and the optimizer."""
        config, model, objective = self.config, self.model, self.objective
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        _move(model, self.device, layout)
        objective.to(self.device)
        if self.processes is not None:
            self.processes.broadcast_module(model)
        # Copied before any hook is on the model: the copy must not write into the features.
        self.average = EMA(model, config.ema) if config.ema is not None else None
        self.validated = model if self.average is None else self.average.module
        self.best = _copied(model)
        self.features = FeatureExtractor(model, objective.student_layers, "student")
        stack.callback(self.features.remove)
        if self.processes is not None:
            stack.enter_context(synced_batch_norms(model, self.processes))
        if objective.needs_shapes:
            with self._fork_rng(), torch.no_grad():
                torch.manual_seed(_epoch_seed(self.seed, 0))
                student, teacher, _ = next(self._first_outputs())
                objective.prepare(student, teacher, self.training.samples)
            if self.processes is not None:
                self.processes.broadcast_module(objective)
        modules = (model, objective)
        self.parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.parameters, config)
        is_half = config.precision == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type) if is_half else None
        self.forward = compiled(model) if config.compile else model

    def _check_terms(self) -> None:
        """Refuse a loss term of the pipeline without a gradient on the first batches."""
        if any(isinstance(term, ConfiguredLoss) for term in self.objective.terms):
            with self._fork_rng():
                for remark in check_gradients(self.objective, self._first_outputs()):
                    self.progress.message(f"  {remark}")

    def _first_outputs(self) -> Iterator[tuple[Named, Named | None, Named]]:
        """The student's outputs and features, the teacher's, and the batch: of the first epoch's
        batches, in evaluation mode and without a graph."""
        self.model.eval()
        for batch in map(self._to_device, self.training.epoch(self.seed, 1)):
            with torch.no_grad():
                student = self.model(batch) | self.features.take()
            yield student, self._teacher_outputs(batch), batch

    def _student_outputs(
        self, batch: Mapping[str, Tensor], epoch: int, step: int
    ) -> dict[str, Tensor]:
        """The network's outputs and features for the complete batch, with their graph."""
        if self.processes is None:
            return self._forward(batch)
        with self.processes.fork_rng(_epoch_seed(self.seed, epoch) + step):
            return self.processes.run_sharded(self._forward, batch, len(batch[self.task.target]))

    def _forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        half = _HALF.get(self.config.precision)
        if half is None:
            outputs = self.forward(batch)
            return outputs | self.features.take()
        with torch.autocast(self.device.type, half):
            outputs = self.forward(batch) | self.features.take()
        # The objective and its adapters compute in float32.
        return {
            name: output.float() if output.dtype is half else output
            for name, output in outputs.items()
        }

    def _teacher_outputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The teacher's outputs, when the objective compares with them."""
        if self.teacher is None or not self.objective.needs_teacher:
            return None
        if self.processes is not None:
            size = len(batch[self.task.target])
            return self.processes.run_sharded(self.teacher.predict, batch, size)
        outputs = self.teacher.predict(batch)
        if self.device.type == "cpu":
            return outputs
        # The teacher may be on another device.
        return {name: tensor.to(self.device) for name, tensor in outputs.items()}

    def _update_weights(self, rate: float) -> None:
        if self.processes is not None:
            self.processes.average_gradients(self.parameters)
        if self.config.clip_norm is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _predict(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The validated network's outputs, in float32 as exported."""
        batch, size = self._to_device(batch), len(batch[self.task.target])
        # Fewer samples than processes: each computes all of them.
        if self.processes is None or size < self.processes.count:
            outputs: dict[str, Tensor] = self.validated(batch)
        else:
            outputs = self.processes.run_sharded(self.validated, batch, size)
        if self.average is None:
            self.features.take()
        return outputs

    def _to_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return to_device(batch, self.device, self.config.channels_last)

    def _progress(self, epoch: int, step: int) -> float:
        """The share of the training that is done before a step, 0 to 1."""
        steps = len(self.training)
        return ((epoch - 1) * steps + step) / (self.config.epochs * steps)

    def _learning_rate(self, epoch: int, step: int) -> float:
        steps = len(self.training)
        return learning_rate(self.config, (epoch - 1) * steps + step, self.config.epochs * steps)

    def _fork_rng(self) -> Any:
        """Restore torch's random state at the end of a block."""
        return torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])

    def _read_losses(self, pending: list[Tensor], epoch: int, read: int) -> list[list[float]]:
        """The values of the steps of an epoch after the first ``read`` ones; clears ``pending``.

        Raises:
            StageError: one of their totals is NaN or infinite.
        """
        rows: list[list[float]] = torch.stack(pending).tolist() if pending else []
        pending.clear()
        for step, (total, *terms) in enumerate(rows, start=read + 1):
            if math.isfinite(total):
                continue
            pairs = zip(self.objective.labels, terms, strict=True)
            named = ", ".join(f"{label} {value:g}" for label, value in pairs)
            raise StageError(
                f"the loss became {total:g} in epoch {epoch}, step {step}; its terms: {named}",
                remedy="lower learning_rate or set clip_norm; a term that is infinite by itself "
                "shows which loss, or which teacher output, is at fault",
            )
        return rows


def score(
    predict: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], source: BatchSource, task: Task
) -> np.ndarray[Any, Any]:
    """The task's score of each labelled sample, (N,) float64, in the source's order.

    Args:
        predict: returns the outputs by name: a teacher's ``predict``, or a model in evaluation
            mode.
        source: every sample of it that has a target is scored.
        task: defines the score.

    Raises:
        InputError: there is nothing to score.
        StageError: an output is NaN or infinite.
    """
    scores = []
    with torch.inference_mode():
        for batch in source.ordered():
            outputs = {name: _array(tensor) for name, tensor in predict(batch).items()}
            targets = {name: tensor.cpu().numpy() for name, tensor in batch.items()}
            scores.append(task.scores(outputs, targets)[task.labelled(targets)])
    found: np.ndarray[Any, Any] = np.concatenate(scores) if scores else np.empty(0)
    if len(found) == 0:
        raise InputError(
            f"there are no {'labelled ' if scores else ''}samples to score",
            remedy="give labels, or a teacher whose predictions replace them"
            if scores
            else "give more data",
        )
    return found


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    # numpy has no bfloat16.
    array: np.ndarray[Any, Any] = (
        (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).cpu().numpy()
    )
    return array


def _move(model: nn.Module, device: torch.device, layout: torch.memory_format) -> None:
    model.to(device=device, memory_format=layout)  # type: ignore[call-overload]


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy({key: tensor.detach() for key, tensor in model.state_dict().items()})


def _epoch_seed(seed: int, epoch: int) -> int:
    digest = hashlib.sha256(f"edgekd epoch {seed} {epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
