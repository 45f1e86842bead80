"""One training step: forward, objective, backward, and every ``accumulate`` batches an update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.config.training import TrainConfig
from edgekd.distill.distributed import ProcessGroup
from edgekd.distill.features import FeatureExtractor
from edgekd.distill.objective import Objective
from edgekd.distill.optimizer import EMA, build_optimizer
from edgekd.errors import InputError, StageError

_HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Step:
    """Updates the weights of a network and of its objective's adapters.

    Args:
        model: trained in place. It is compiled for training only: its state, its validation and
            its export are those of the module itself.
        average: the moving average of its weights, if any.
        objective: prepared, so that it has its parameters.
        config: optimizer, precision, clipping, accumulation.
        capture: captures the layers' features of a forward pass.
        device: the model's device.
        processes: the processes that share each batch; None: a single process.
    """

    def __init__(
        self,
        model: nn.Module,
        average: EMA | None,
        objective: Objective,
        config: TrainConfig,
        capture: FeatureExtractor,
        device: torch.device,
        processes: ProcessGroup | None,
    ) -> None:
        self.model, self.average, self.objective = model, average, objective
        self.capture, self.device, self.processes = capture, device, processes
        self.accumulate, self.clip_norm = config.accumulate, config.clip_norm
        self.half = _HALF.get(config.precision)
        self.scaler = torch.amp.GradScaler(device.type) if config.precision == "float16" else None
        self.forward = _compiled(model) if config.compile else model
        modules = (model, objective)
        self.parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.parameters, config)

    def take(
        self,
        batch: Mapping[str, Tensor],
        size: int,
        teacher: Mapping[str, Tensor] | None,
        *,
        rate: float,
        progress: float,
        step: int,
        steps: int,
        seed: int,
    ) -> Tensor:
        """Train on one batch; after ``accumulate`` batches the mean gradient updates the weights.

        Args:
            batch: on the model's device.
            size: its number of samples.
            teacher: the teacher's outputs for it.
            rate: the learning rate.
            progress: the share of the training that is done, 0 to 1.
            step: the batch's number in its epoch, from 0; the epoch's last batches may be fewer
                than ``accumulate``.
            steps: batches of an epoch.
            seed: the seed of dropout, with several processes.

        Returns:
            The objective and each term's value, (1 + terms,) float32, without a graph.
        """
        begun = step - step % self.accumulate
        batches = min(self.accumulate, steps - begun)
        student = self._answers(batch, size, seed + step)
        total, terms = self.objective(student, teacher, batch, progress)
        if step == begun:
            self.optimizer.zero_grad(set_to_none=True)
        share = total if batches == 1 else total / batches
        if self.scaler is not None:
            share = self.scaler.scale(share)
        share.backward()
        if step + 1 == begun + batches:
            self._use_gradient(rate)
        return torch.stack([value.float() for value in (total.detach(), *terms.values())])

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on besides the model and the objective."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else {},
            "average": self.average.state_dict() if self.average is not None else {},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self.optimizer.load_state_dict(dict(state["optimizer"]))
        if self.scaler is not None:
            self.scaler.load_state_dict(dict(state["scaler"]))
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def _answers(self, batch: Mapping[str, Tensor], size: int, seed: int) -> dict[str, Tensor]:
        """The network's outputs and features for the complete batch."""
        if self.processes is None:
            return self._network(batch)
        with self.processes.own_draws(seed):
            mine = self._network(self.processes.shard(batch, size))
        return self.processes.all_gather(mine, size)

    def _network(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        answers: dict[str, Tensor]
        if self.half is None:
            answers = self.forward(batch)
            return answers | self.capture.take()
        with torch.autocast(self.device.type, self.half):
            answers = self.forward(batch) | self.capture.take()
        # The objective and its adapters compute in float32.
        return {
            name: answer.float() if answer.dtype is self.half else answer
            for name, answer in answers.items()
        }

    def _use_gradient(self, rate: float) -> None:
        if self.processes is not None:
            self.processes.average_gradients(self.parameters)
        if self.clip_norm is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)


def _compiled(model: nn.Module) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """The model's forward, compiled when it is first called.

    Raises:
        InputError: the network cannot be compiled; raised at the first call.
    """
    from torch._dynamo.exc import TorchDynamoException

    compiled: Any = torch.compile(model)

    def forward(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            answers: dict[str, Tensor] = compiled(batch)
        except TorchDynamoException as error:
            raise InputError(
                f"the network cannot be compiled: {str(error).strip().splitlines()[0]}",
                where="compile",
                remedy="set compile: false, or install what it says (on a CPU a C++ compiler)",
            ) from error
        return answers

    return forward


def check_step(
    config: TrainConfig, objective: Objective, device: torch.device, processes: ProcessGroup | None
) -> None:
    """Refuse settings that would fail, or silently be ignored, later.

    Raises:
        InputError: float16 on a CPU, ``compile`` where layers are captured or processes share a
            batch, or a warm-up in addition to one-cycle's own.
    """
    if config.precision == "float16" and device.type == "cpu":
        raise InputError(
            "float16 is not trained on a CPU: its gradients are lost to underflow",
            where="precision",
            remedy="use bfloat16 or float32",
        )
    if config.compile and objective.student_layers:
        raise InputError(
            f"the student is to be compiled, and its layers {', '.join(objective.student_layers)} "
            "are compared, which a compiled network does not show",
            where="compile",
            remedy="set compile: false, or use losses on the outputs",
        )
    if config.compile and processes is not None:
        raise InputError(
            "compile is for a training in one process",
            where="compile",
            remedy="set compile: false, or start one process",
        )
    if config.warm_up and config.schedule == "one-cycle":
        raise InputError(
            "one-cycle has a warm-up of its own, and another is set",
            where="warm_up",
            remedy="leave warm_up out, or set schedule: cosine",
        )


def read_values(
    pending: list[Tensor], labels: Sequence[str], epoch: int, before: int
) -> list[list[float]]:
    """The values of the steps since the last call; clears them.

    Args:
        pending: the results of the steps, (1 + terms,) each.
        labels: the terms' names.
        epoch: from 1.
        before: steps of the epoch that were read before.

    Raises:
        StageError: one of their totals is NaN or infinite.
    """
    rows: list[list[float]] = torch.stack(pending).tolist() if pending else []
    pending.clear()
    for step, row in enumerate(rows, start=before + 1):
        if math.isfinite(row[0]):
            continue
        named = ", ".join(
            f"{label} {value:g}" for label, value in zip(labels, row[1:], strict=True)
        )
        raise StageError(
            f"the loss became {row[0]:g} in epoch {epoch}, step {step}; its terms: {named}",
            remedy="lower learning_rate or set clip_norm; a term that is infinite by itself "
            "shows which loss, or which teacher output, is at fault",
        )
    return rows
