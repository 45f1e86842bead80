"""Batch norm over the batch of all processes: the CPU has none of its own in torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgekd.distill.runtime import Processes
from edgekd.errors import InputError

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SyncedBatchNorm(_BatchNorm):
    """A batch norm whose mean and variance are those of all processes' rows together."""

    processes: Processes

    def forward(self, input: Tensor) -> Tensor:
        """As the batch norm in one process, for (B, C) or (B, C, …).

        Raises:
            ValueError: the whole batch has a single value per channel.
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
        """Any: the class that stands here in one process has checked it."""

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum
        if share is None:  # a plain mean over all batches
            share = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


@contextmanager
def synced_batch_norms(model: nn.Module, processes: Processes) -> Iterator[None]:
    """Sync the batch norms of a model; afterwards they are as before.

    Only their class is another one meanwhile, so that names, weights and hooks stay. On CUDA it
    is torch's own :class:`torch.nn.SyncBatchNorm`.

    Raises:
        InputError: a batch norm is of a class of its own.
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
