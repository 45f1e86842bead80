"""Whether a dependency graph knows where the channels of a layer go.

The graph of torch-pruning guesses at reshapes and concatenations: a layer joined behind a raw
input, or flattened with its channels last, would lose the wrong inputs, and no shape would tell.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.models.build import example_batch
from edgekd.models.named import NamedModel
from edgekd.students.structure import Graph

_ACROSS_CHANNELS = (nn.LayerNorm, nn.GroupNorm)
"""Norms by which every channel depends on all others: there is nothing to find out."""


def follows(model: NamedModel, graph: Graph, group: Any) -> bool:
    """Whether channels reach the answers only through the inputs that would go with them.

    Half of the channels are disturbed where they arise, and the inputs that the graph says are
    theirs are silenced: then the answers must not change.

    Args:
        model: the network of the graph.
        graph: its dependencies.
        group: all channels of a layer, with what depends on them.
    """
    if any(isinstance(dep.target.module, _ACROSS_CHANNELS) for dep, _ in group):
        return True
    layer = group[0].dep.target.module
    # Every second one: a part that is in one piece could be mistaken for another piece.
    half = graph.group(layer, group[0].idxs[::2] or group[0].idxs)
    is_out, is_in = (
        graph.dependencies.is_out_channel_pruning_fn,
        graph.dependencies.is_in_channel_pruning_fn,
    )
    training = model.training
    with ExitStack() as stack, torch.no_grad(), torch.random.fork_rng(devices=[]):
        stack.callback(model.train, training)
        model.eval()
        torch.manual_seed(0)
        batch = {
            name: torch.randn_like(tensor) if tensor.is_floating_point() else tensor
            for name, tensor in example_batch(model.spec.inputs).items()
        }
        sources = []
        for dep, channels in half:
            module = dep.target.module
            if module not in graph.names:
                continue
            if is_out(dep.handler):
                sources.append((module, channels))
            elif is_in(dep.handler):
                stack.callback(module.register_forward_pre_hook(_silence(channels)).remove)
        before = model(batch)
        for module, channels in sources:
            stack.callback(module.register_forward_hook(_disturb(channels)).remove)
        after = model(batch)
    return all(torch.equal(before[name], after[name]) for name in before)


def _channel_dim(module: nn.Module) -> int:
    return -1 if isinstance(module, nn.Linear) else 1


def _silence(channels: list[int]) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def silence(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        first, *rest = inputs
        index = torch.tensor(channels)
        return first.index_fill(_channel_dim(module), index, 0.0), *rest

    return silence


def _disturb(channels: list[int]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def disturb(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        moved = output.movedim(_channel_dim(module), 0).clone()
        moved[channels] += 10 * torch.randn_like(moved[channels])
        return moved.movedim(0, _channel_dim(module))

    return disturb
