"""Check that a network in evaluation mode is deterministic and does not change its state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from edgekd.errors import InputError
from edgekd.models.dict_model import DictModel

_CALLS = 3
_ROUNDING = 1e-4
"""Largest difference of two calls, relative to the largest output: parallel sums vary in order."""


def check_repeatable(model: DictModel, batch: Mapping[str, Tensor], where: str) -> None:
    """Call a network several times with one batch, as it will be called for every figure.

    The network, its mode, its buffers and the random state are unchanged.

    Args:
        model: on the batch's device.
        batch: real samples.
        where: the YAML section, for errors.

    Raises:
        InputError: its outputs differ, or it changes a buffer; the module is named.
    """
    training = model.training
    buffers = dict(model.named_buffers())
    before = {name: tensor.clone() for name, tensor in buffers.items()}
    model.eval()
    try:
        with torch.random.fork_rng(devices=_cuda_devices(model)), torch.no_grad():
            calls = [_call(model, batch) for _ in range(_CALLS)]
        changed = [
            name
            for name, tensor in model.named_buffers()
            if name not in before or not torch.equal(tensor, before[name])
        ]
    finally:
        with torch.no_grad():
            for name, tensor in model.named_buffers():
                if name in before and tensor.shape == before[name].shape:
                    tensor.copy_(before[name])
        model.train(training)
    first = calls[0].answers
    worst = max(_difference(first, call.answers) for call in calls[1:])
    network = type(model.module).__name__
    if worst > 0:
        culprit = next(filter(None, (_culprit(calls[0], call) for call in calls[1:])), "")
        named = f"the layer {culprit}" if culprit else f"the forward of {network} itself"
        raise InputError(
            f"the network's outputs for the same batch differ by up to {worst:.3g} in "
            f"evaluation mode: {named} draws random numbers or counts its calls",
            where=where,
            remedy="let it do so in training only, e.g. F.dropout(x, p, training=self.training), "
            "and let train(False) reach every layer",
        )
    if changed:
        name = changed[0].removeprefix("module.")
        more = f" and {len(changed) - 1} more" if changed[1:] else ""
        raise InputError(
            f"the network changes its buffer {name!r}{more} in evaluation mode: an output depends "
            "on the batches before it",
            where=where,
            remedy="update buffers under 'if self.training:' only, and let train(False) reach "
            "every layer (a batch norm that remains in training mode uses the batch's statistics)",
        )


class _Call(NamedTuple):
    """One forward pass: its outputs, and each module's inputs and outputs, innermost first."""

    answers: Mapping[str, Tensor]
    seen: list[tuple[str, str, Any, Any]]


def _call(model: DictModel, batch: Mapping[str, Tensor]) -> _Call:
    seen: list[tuple[str, str, Any, Any]] = []
    handles = []

    def hook(path: str) -> Any:
        def record(module: nn.Module, given: Any, answer: Any) -> None:
            seen.append((path, type(module).__name__, _digest(given), _digest(answer)))

        return record

    for path, module in model.module.named_modules():
        if path:
            handles.append(module.register_forward_hook(hook(path)))
    try:
        return _Call(model(batch), seen)
    finally:
        for handle in handles:
            handle.remove()


def _culprit(one: _Call, other: _Call) -> str:
    """The first module with different outputs for the same inputs; empty: none."""
    for (path, kind, given, answer), (path_2, _, given_2, answer_2) in zip(
        one.seen, other.seen, strict=False
    ):
        if path != path_2:
            return ""
        if given == given_2 and answer != answer_2:
            return f"{path} ({kind})"
    return ""


def _digest(value: Any) -> Any:
    """Something that is the same for the same tensors, in little memory."""
    if isinstance(value, Tensor):
        # In place, the output may be the input: two sums distinguish them without a copy.
        wide = value.double()
        weights = torch.arange(1, wide.numel() + 1, device=wide.device) % 1009
        return (tuple(value.shape), wide.sum().item(), (wide.reshape(-1) * weights).sum().item())
    if isinstance(value, Mapping):
        return tuple((key, _digest(entry)) for key, entry in value.items())
    if isinstance(value, tuple | list):
        return tuple(map(_digest, value))
    return None


def _difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference beyond rounding; infinite where shapes differ."""
    worst = 0.0
    for name, tensor in one.items():
        if name not in other or tensor.shape != other[name].shape:
            return float("inf")
        if tensor.numel() == 0:
            continue
        a, b = tensor.double(), other[name].double()
        difference = float(torch.where(a == b, 0, (a - b).abs()).nan_to_num(nan=0.0).max())
        if difference > _ROUNDING * float(a.abs().nan_to_num(posinf=0.0, neginf=0.0).max()):
            worst = max(worst, difference)
    return worst


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    found = {p.device for p in model.parameters() if p.device.type == "cuda"}
    return sorted(found, key=str)
