"""The training loop of teachers, and of students with and without a teacher."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.config.host import world_size
from edgekd.config.training import TrainConfig
from edgekd.distill.checkpoint import (
    Epoch,
    History,
    TrainingState,
    load_checkpoint,
    save_checkpoint,
    training_identity,
)
from edgekd.distill.distributed import (
    ProcessGroup,
    open_process_group,
    synced_batch_norms,
    training_device,
)
from edgekd.distill.evaluate import BatchSource, Loaders, device_of, prepared, score
from edgekd.distill.features import FeatureExtractor
from edgekd.distill.loss_term import ConfiguredLoss, Named
from edgekd.distill.objective import Objective, check_gradients
from edgekd.distill.optimizer import EMA, learning_rate
from edgekd.distill.step import Step, check_step, read_values
from edgekd.distill.teacher import Teacher
from edgekd.errors import InputError
from edgekd.progress import Progress
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

    With ``ema`` these are the averaged ones, and so are those that are validated. On the CPU, and
    with the same number of threads, the same seed gives the same weights, also when the training
    was stopped and resumed. A checkpoint is written after each epoch. Where ``torchrun``
    started several processes, each calls this with the same arguments and ends with the same
    weights: those of one process, except for rounding and dropout.

    Args:
        model: takes a batch, returns outputs by name; trained in place, on a GPU when there is
            one, then moved back to its original device.
        objective: the objective to minimise.
        loaders: the training and the validation batches.
        task: defines the metric that selects the best epoch.
        config: epochs, optimizer, schedule and the like.
        seed: of shuffling, augmentation and dropout; the initial weights are the caller's.
        checkpoint_folder: where the state after each epoch is saved, and loaded from at the start.
        progress: receives each step and the validation after each epoch.
        teacher: run on each batch, when the objective needs it.
        label: the name of the training in the progress display.

    Raises:
        InputError: the batches do not fit the model or the objective; no teacher where one is
            needed; a configuration that this machine cannot train.
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
    came_from = device_of(model)
    device = training_device() if came_from.type == "cpu" else came_from
    processes = open_process_group() if world_size() > 1 else None
    check_step(config, objective, device, processes)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    objective.to(device)
    history, best = History(task.metric, task.higher_is_better), _copied(model)
    run = _Run(
        model=model,
        objective=objective,
        loaders=Loaders(*loaders),
        task=task,
        config=config,
        seed=seed,
        teacher=teacher,
        progress=progress,
        device=device,
        processes=processes,
    )
    with ExitStack() as stack:
        stack.callback(run.capture.remove)
        if processes is not None:
            stack.enter_context(synced_batch_norms(model, processes))
        run.prepare()
        identity = training_identity(model, objective, config, seed, len(run.loaders.train))
        state, refused = run.from_first(lambda: load_checkpoint(checkpoint_folder, identity))
        if refused:
            progress.message(f"{label}: the checkpoint is not used: {refused}; starting again")
        if state is not None:
            model.load_state_dict(state.model)
            objective.load_state_dict(state.objective)
            run.step.load_state(state.step)
            history, best = state.history, dict(state.best)
        done = len(history.epochs)
        waits = config.patience or config.epochs
        if done == 0:
            run.check_terms()
        if 0 < done < config.epochs and history.epochs_since_better < waits:
            progress.message(f"{label}: resuming after epoch {done} of {config.epochs}")
        progress.start(label, (config.epochs - done) * len(run.loaders.train), "step")
        stack.callback(progress.finish)
        # Dropout draws from torch's own generator: seeded per epoch, and restored afterwards.
        stack.enter_context(torch.random.fork_rng(devices=run.devices_to_fork))
        for number in range(done + 1, config.epochs + 1):
            if history.epochs_since_better >= waits:
                progress.message(
                    f"{label}: stopped after epoch {number - 1} of {config.epochs}: validation "
                    f"{task.metric} was not better for {waits}"
                )
                break
            if history.add(run.epoch(number)):
                best = _copied(run.kept)
            if processes is None or processes.rank == 0:
                states = model.state_dict(), objective.state_dict(), run.step.state()
                save_checkpoint(TrainingState(identity, *states, best, history), checkpoint_folder)
    model.load_state_dict(best)
    model.to(device=came_from, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    model.eval()
    return history


class _Run:
    """A training: model, objective, optimizer and everything an epoch needs.

    Attributes:
        kept: the network that is validated and saved: the model, or the average of its weights.
    """

    step: Step

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
        device: torch.device,
        processes: ProcessGroup | None,
    ) -> None:
        self.model, self.objective, self.loaders, self.task = model, objective, loaders, task
        self.config, self.seed, self.teacher, self.progress = config, seed, teacher, progress
        self.device, self.processes = device, processes
        self.together = 1 if processes is None else processes.count
        self.devices_to_fork = [self.device] if self.device.type == "cuda" else []
        if processes is not None:
            processes.broadcast_module(model)
        # Copied before any hook is on the model: the copy must not write into the capture.
        self.average = EMA(model, config.ema) if config.ema is not None else None
        self.kept = model if self.average is None else self.average.module
        self.capture = FeatureExtractor(model, objective.student_layers, "student")
        self.check_every = 1 if self.device.type == "cpu" else _STEPS_BETWEEN_CHECKS_ON_GPU
        self.labels = objective.labels

    def prepare(self) -> None:
        """Make the objective's adapters for the shapes of a first batch, and the optimizer."""
        if self.objective.needs_shapes:
            with torch.random.fork_rng(devices=self.devices_to_fork), torch.no_grad():
                torch.manual_seed(_epoch_seed(self.seed, 0))
                batch = self._prepared(next(iter(self.loaders.train.epoch(self.seed, 1))))
                self.model.eval()
                student = self.model(batch) | self.capture.take()
                self.objective.prepare(student, self._ask(batch), self.loaders.train.samples)
            if self.processes is not None:
                self.processes.broadcast_module(self.objective)
        self.step = Step(
            model=self.model,
            average=self.average,
            objective=self.objective,
            config=self.config,
            capture=self.capture,
            device=self.device,
            processes=self.processes,
        )

    def check_terms(self) -> None:
        """Refuse a loss term without a gradient to the student.

        Raises:
            InputError: a term of the pipeline has no gradient on the first batches.
        """
        if not any(isinstance(term, ConfiguredLoss) for term in self.objective.terms):
            return

        def answered() -> Iterator[tuple[Named, Named | None, Named]]:
            for batch in map(self._prepared, self.loaders.train.epoch(self.seed, 1)):
                with torch.no_grad():
                    answers = self.model(batch) | self.capture.take()
                yield answers, self._ask(batch), batch

        self.model.eval()
        with torch.random.fork_rng(devices=self.devices_to_fork):
            for remark in check_gradients(self.objective, answered()):
                self.progress.message(f"  {remark}")

    def epoch(self, number: int) -> Epoch:
        """Train one epoch (from 1) and validate."""
        seed = _epoch_seed(self.seed, number)
        torch.manual_seed(seed)
        self.model.train()
        steps = len(self.loaders.train)
        report_every = max(1, steps // _UPDATES_PER_EPOCH)
        started = time.perf_counter()
        pending: list[Tensor] = []
        rows: list[list[float]] = []
        sizes: list[int] = []
        rate = 0.0
        for step, batch in enumerate(self.loaders.train.epoch(self.seed, number)):
            at, of = (number - 1) * steps + step, self.config.epochs * steps
            rate = learning_rate(self.config, at, of)
            batch = self._prepared(batch)
            if step == 0 and callable(check := getattr(self.model, "check_batch", None)):
                check(batch)
            if callable(on_progress := getattr(self.model, "on_progress", None)):
                on_progress(at / of)
            sizes.append(len(batch[self.task.target]))
            pending.append(
                self.step.take(
                    batch,
                    sizes[-1],
                    self._ask(batch),
                    rate=rate,
                    progress=at / of,
                    step=step,
                    steps=steps,
                    seed=seed,
                )
            )
            if len(pending) == self.check_every:
                rows += read_values(pending, self.labels, number, len(rows))
            if (step + 1) % report_every == 0:
                self.progress.advance(report_every, epoch=number, loss=rows[-1][0] if rows else 0.0)
        rows += read_values(pending, self.labels, number, len(rows))
        seconds = time.perf_counter() - started
        means = np.average(np.array(rows), axis=0, weights=sizes)
        self.kept.eval()
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

    def from_first(
        self, load: Callable[[], tuple[TrainingState | None, str]]
    ) -> tuple[TrainingState | None, str]:
        """The first process's checkpoint: all processes must resume from the same state."""
        if self.processes is None:
            return load()
        return self.processes.broadcast_object(load() if self.processes.rank == 0 else None)

    def _prepared(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return prepared(batch, self.device, self.config.channels_last)

    def _answer(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The validated network's outputs, in float32 as exported."""
        batch = self._prepared(batch)
        size = len(batch[self.task.target])
        shared_by = None if size < self.together else self.processes
        if shared_by is not None:
            batch = shared_by.shard(batch, size)
        outputs: dict[str, Tensor] = self.kept(batch)
        if self.average is None:
            self.capture.take()
        return outputs if shared_by is None else shared_by.all_gather(outputs, size)

    def _ask(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The teacher's outputs, when the objective compares with them."""
        if self.teacher is None or not self.objective.needs_teacher:
            return None
        if self.processes is None and self.device.type == "cpu":
            return self.teacher.answer(batch)
        size = len(batch[self.task.target])
        asked = batch if self.processes is None else self.processes.shard(batch, size)
        # The teacher may be on another device.
        answers = {name: t.to(self.device) for name, t in self.teacher.answer(asked).items()}
        return answers if self.processes is None else self.processes.all_gather(answers, size)


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy({key: tensor.detach() for key, tensor in model.state_dict().items()})


def _epoch_seed(seed: int, epoch: int) -> int:
    digest = hashlib.sha256(f"edgekd epoch {seed} {epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
