"""Devices, and training in several processes: collectives, sharded batches, synced batch norm.

Every process iterates over the same batches and takes its rows of each. The network's outputs
are gathered, so that every process computes the objective of the complete batch, whatever rows
it relates; the gradients are then averaged. A run in one process imports none of this.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgekd.config.host import world_size
from edgekd.errors import InputError, StageError

Value = TypeVar("Value")

_LONGEST_STEP = timedelta(minutes=30)

_LONGEST_STAGE = timedelta(days=30)
"""How long the other processes wait for the first process, which alone runs all other stages."""


def training_device() -> torch.device:
    """A CUDA device when there is one, else the CPU; ``ACCELERATE_USE_CPU=1`` forces the CPU."""
    if world_size() > 1:
        return open_process_group().device
    if not torch.cuda.is_available():
        return torch.device("cpu")
    from accelerate import PartialState

    device: torch.device = PartialState().device
    return device


def to_device(
    batch: Mapping[str, Tensor], device: torch.device, channels_last: bool
) -> dict[str, Tensor]:
    """A batch on the model's device, its images in the model's layout."""
    moved = {name: tensor.to(device) for name, tensor in batch.items()}
    if not channels_last:
        return moved
    return {
        name: tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
        for name, tensor in moved.items()
    }


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's parameters."""
    first = next(model.parameters(), None)
    return first.device if first is not None else torch.device("cpu")


@cache
def open_process_group() -> ProcessGroup:
    """Initialise the process group of this run.

    Raises:
        StageError: the processes cannot connect.
    """
    from accelerate import PartialState

    try:
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=_LONGEST_STEP)
        processes = ProcessGroup(state.process_index, state.num_processes, state.device)
    except (RuntimeError, ValueError) as error:
        raise StageError(
            f"the {world_size()} processes could not connect to each other: {error}",
            where="WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT in the environment",
            remedy="start them with torchrun",
        ) from error
    # Destroyed explicitly: the threads of a group may outlive the interpreter and abort the
    # process. Not before: the others wait for this process's end
    # (:meth:`edgekd.pipeline.runner.Workers.serve`).
    atexit.register(processes.close)
    return processes


class ProcessGroup:
    """The processes of a training; only the first (rank 0) prints and writes.

    Attributes:
        rank: this process's number, from 0.
        count: the number of processes.
        device: this process's device.
    """

    def __init__(self, rank: int, count: int, device: torch.device) -> None:
        self.rank, self.count, self.device = rank, count, device
        # A separate group: it still delivers the reason after a failed training's group is aborted.
        self.training: Any = torch.distributed.new_group(timeout=_LONGEST_STEP)
        self.control: Any = torch.distributed.new_group(backend="gloo", timeout=_LONGEST_STAGE)

    def rows(self, total: int) -> slice:
        """This process's rows of a batch of ``total``."""
        return slice(*self._ends(total)[self.rank : self.rank + 2])

    def run_sharded(
        self,
        predict: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
        batch: Mapping[str, Tensor],
        total: int,
    ) -> dict[str, Tensor]:
        """``predict(batch)``, of whose rows each process computes its own; with the graph.

        Raises:
            InputError: there are fewer rows than processes, or an output does not have a row per
                sample.
        """
        if total < self.count:
            raise InputError(
                f"a batch of {total} cannot be shared by {self.count} processes",
                remedy="raise batch_size, or start fewer processes",
            )
        rows = self.rows(total)
        gathered = {}
        gather: Any = _Gathered.apply
        for name, output in predict({key: t[rows] for key, t in batch.items()}).items():
            if output.ndim == 0 or len(output) != rows.stop - rows.start:
                raise InputError(
                    f"{name!r} is {list(output.shape)} for {rows.stop - rows.start} samples, and "
                    "several processes need one row per sample",
                    remedy="give the batch as the first dimension, or train in one process",
                )
            gathered[name] = gather(output.to(self.device), self, total)
        return gathered

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its mean over the processes.

        Not by DistributedDataParallel, which determines from the outputs of a forward
        which parameters are used; captured layers and adapters are not among these.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for gradient in gradients:
            by_type.setdefault(gradient.dtype, []).append(gradient)
        for group in by_type.values():
            flat = torch.cat([gradient.reshape(-1) for gradient in group])
            torch.distributed.all_reduce(flat, group=self.training)
            flat /= self.count
            pieces = torch.split(flat, [gradient.numel() for gradient in group])
            for gradient, piece in zip(group, pieces, strict=True):
                gradient.copy_(piece.view(gradient.shape))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, with its graph."""
        add: Any = _Sum.apply
        total: Tensor = add(tensor, self)
        return total

    def broadcast_module(self, module: nn.Module) -> None:
        """Broadcast the first process's weights and buffers."""
        for tensor in module.state_dict().values():
            plain = tensor.detach().to(self.device, memory_format=torch.contiguous_format)
            torch.distributed.broadcast(plain, src=0, group=self.training)
            tensor.copy_(plain)

    def broadcast_object(self, value: Value | None) -> Value:
        """Broadcast a value from the first process; the others' ``value`` is ignored."""
        values: list[Any] = [value]
        torch.distributed.broadcast_object_list(values, src=0, group=self.control)
        broadcast: Value = values[0]
        return broadcast

    def all_gather_object(self, value: Value) -> list[Value]:
        """The value of each process, by rank."""
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value, group=self.control)
        return values

    @contextmanager
    def fork_rng(self, seed: int) -> Iterator[None]:
        """Seed dropout for this process's rows; the common random state is restored afterwards."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed((seed + self.rank * 0x9E3779B97F4A7C15) % 2**63)
            yield

    def abort(self) -> None:
        """Abort the training group: the others' next collective fails instead of waiting."""
        with suppress(RuntimeError, ValueError):
            torch.distributed.destroy_process_group(self.training)
        # The connections close with the last reference to the group.
        self.training = None
        gc.collect()

    def close(self) -> None:
        """Destroy all process groups."""
        with suppress(RuntimeError, ValueError):
            torch.distributed.destroy_process_group()
        self.training = self.control = None
        gc.collect()

    def _ends(self, total: int) -> list[int]:
        return [rank * total // self.count for rank in range(self.count + 1)]

    def all_rows(self, tensor: Tensor, total: int) -> Tensor:
        """All processes' rows, (total, …), without a graph."""
        ends = self._ends(total)
        sizes = [stop - start for start, stop in pairwise(ends)]
        # Collectives need equal sizes: shorter tensors are padded.
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded, group=self.training)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class _Gathered(torch.autograd.Function):
    """All processes' rows. Each computes the same objective from them, and so the backward takes
    its own rows of the gradient, times the number of processes that the average divides by."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, processes: ProcessGroup, total: int) -> Tensor:
        ctx.rows, ctx.count = processes.rows(total), processes.count
        return processes.all_rows(mine.detach(), total)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0][ctx.rows] * ctx.count, None, None


class _Sum(torch.autograd.Function):
    """The sum over processes; the gradient is summed as well."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, processes: ProcessGroup) -> Tensor:
        ctx.processes = processes
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=processes.training)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient, group=ctx.processes.training)
        return gradient, None


_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SyncedBatchNorm(_BatchNorm):
    """A batch norm whose mean and variance are those of all processes' rows together."""

    processes: ProcessGroup

    def forward(self, input: Tensor) -> Tensor:
        """As the batch norm in one process, for (B, C) or (B, C, …).

        Raises:
            ValueError: the complete batch has a single value per channel.
        """
        if not self.training:
            return super().forward(input)
        wide = input if input.dtype == torch.float64 else input.float()
        dims = [0, *range(2, input.ndim)]
        count = wide.numel() // input.shape[1]
        summed = self.processes.sum(torch.cat([wide.sum(dims), wide.new_tensor([float(count)])]))
        total = summed[-1].detach()
        if total < 2:
            raise ValueError("a batch norm needs more than one value per channel")
        shape = (1, -1, *([1] * (input.ndim - 2)))
        mean = summed[:-1] / total
        centred = wide - mean.reshape(shape)
        variance = self.processes.sum(centred.square().sum(dims)) / total
        self._remember(mean.detach(), (variance * total / (total - 1)).detach())
        normal = centred * (variance + self.eps).rsqrt().reshape(shape)
        if self.weight is not None:
            normal = normal * self.weight.reshape(shape)
        if self.bias is not None:
            normal = normal + self.bias.reshape(shape)
        return normal.to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any rank: the original class has checked the input."""

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:  # a plain mean over all batches
            momentum = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


@contextmanager
def synced_batch_norms(model: nn.Module, processes: ProcessGroup) -> Iterator[None]:
    """Sync the batch norms of a model; they are restored afterwards.

    Only their class is replaced meanwhile, so that names, weights and hooks are preserved. On CUDA
    it is torch's own :class:`torch.nn.SyncBatchNorm`.

    Raises:
        InputError: a batch norm is of a custom class.
    """
    changed: list[tuple[_BatchNorm, type[_BatchNorm]]] = []
    for path, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        if type(module) not in _PLAIN:
            raise InputError(
                f"{path!r} is a {type(module).__name__}, whose statistics several processes "
                "cannot share",
                where="student",
                remedy="use torch's own batch norm, or train in one process",
            )
        changed.append((module, type(module)))
    on_cpu = processes.device.type == "cpu"
    try:
        for module, _ in changed:
            if on_cpu:
                module.__class__ = SyncedBatchNorm
                module.processes = processes  # type: ignore[assignment]
            else:
                module.__class__ = nn.SyncBatchNorm
                module.process_group = processes.training
        yield
    finally:
        for module, before in changed:
            module.__class__ = before
            vars(module).pop("processes" if on_cpu else "process_group", None)
