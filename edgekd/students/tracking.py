"""Whether a dependency graph knows where the channels of a layer go.

The graph of torch-pruning guesses at reshapes and concatenations: a layer joined behind a raw
input, or flattened with its channels last, would lose the wrong inputs, and no shape would tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.models.build import example_batch
from edgekd.models.named import NamedModel
from edgekd.students.structure import Cut, Graph

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
    with ExitStack() as stack, torch.no_grad(), torch.random.fork_rng(devices=[]):
        stack.callback(model.train, model.training)
        model.eval()
        torch.manual_seed(0)
        batch = _noise(model)
        sources = []
        for dep, channels in half:
            module = dep.target.module
            if module not in graph.names:
                continue
            if is_out(dep.handler):
                sources.append((module, channels))
            elif is_in(dep.handler):
                stack.callback(module.register_forward_pre_hook(_silence(channels)).remove)
        try:
            before = model(batch)
            for module, channels in sources:
                stack.callback(module.register_forward_hook(_disturb(channels)).remove)
            after = model(batch)
        except (IndexError, RuntimeError, ValueError):
            # The graph speaks of channels that the layer does not have.
            return False
    return all(torch.equal(before[name], after[name]) for name in before)


def loses_only_its_inputs(
    model: NamedModel, graph: Graph, cuts: Sequence[Cut], pruned: NamedModel
) -> bool:
    """Whether a pruned network answers as the whole one does when the inputs that went are zeros.

    Where channels are split, dealt out or paired with each other (chunk, GLU, a channel shuffle,
    a pixel shuffle), the layers that stay must still meet the channels that they were made for.
    Norms over channels are left out on both sides: every channel changes their answer.

    Args:
        model: the whole network.
        graph: its dependencies.
        cuts: what went.
        pruned: the network without it.
    """
    layers = {name: layer for layer, name in graph.names.items()}
    with ExitStack() as stack, torch.no_grad(), torch.random.fork_rng(devices=[]):
        for network in (model, pruned):
            stack.callback(network.train, network.training)
            network.eval()
            for module in network.modules():
                if isinstance(module, _ACROSS_CHANNELS):
                    stack.callback(module.register_forward_hook(_pass_on).remove)
        for cut in cuts:
            for dep, channels in graph.group(layers[cut.layer], cut.removed):
                module = dep.target.module
                if module in graph.names and graph.dependencies.is_in_channel_pruning_fn(
                    dep.handler
                ):
                    stack.callback(module.register_forward_pre_hook(_silence(channels)).remove)
        torch.manual_seed(0)
        batch = _noise(model)
        try:
            wanted, found = model(batch), pruned(batch)
        except (IndexError, RuntimeError, ValueError):
            return False
    return all(
        found[name].shape == wanted[name].shape
        and bool(
            (found[name] - wanted[name]).abs().max() <= _ROUNDING * wanted[name].abs().max() + 1e-6
        )
        for name in wanted
    )


_ROUNDING = 1e-4
"""Sums of fewer terms are summed in another order."""


def _noise(model: NamedModel) -> dict[str, Tensor]:
    return {
        name: torch.randn_like(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in example_batch(model.spec.inputs).items()
    }


def _pass_on(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return inputs[0]


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
