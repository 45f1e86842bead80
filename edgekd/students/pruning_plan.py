"""A pruning plan: channel cuts, their graph, and the check of what depends on a channel.

The structure of a pruned network is a list of cuts: plain data, with which any later stage builds
the same network out of a fresh one. The dependency graph is torch-pruning's (Fang et al. 2023).

The graph of torch-pruning guesses at reshapes and concatenations: a layer joined behind a raw
input, or flattened with its channels last, would lose the wrong inputs without a shape error.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.errors import InputError
from edgekd.models.build import example_batch
from edgekd.models.dict_model import DictModel
from edgekd.students.operators import failing_line

_PREFIX = "module."
"""Where a :class:`DictModel` has the network whose layers are named."""


@dataclass(frozen=True)
class ChannelCut:
    """Output channels that a layer loses, and with it all layers that depend on them.

    Layers that add their outputs lose the same channels, layers that read them lose those inputs.
    """

    layer: str
    """Its module path."""
    removed: tuple[int, ...]
    """Channels of the network before any cut, ascending."""


def torch_pruning() -> Any:
    """The package torch-pruning.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module("torch_pruning")
    except ModuleNotFoundError as error:
        raise InputError(
            f"pruning needs the package {error.name!r}, which is not installed",
            where="student.prune",
            remedy="pip install 'edgekd[prune]'",
        ) from error


@dataclass(frozen=True)
class Graph:
    """The dependency graph of the network in its current state."""

    dependencies: Any
    """A ``torch_pruning.DependencyGraph``."""
    names: dict[torch.nn.Module, str]
    """Module paths inside the network."""
    outputs: frozenset[Any]
    """The autograd nodes of the network's outputs."""

    def group(self, layer: torch.nn.Module, channels: Sequence[int]) -> Any:
        """The layer and all that loses something when it loses these output channels."""
        pruner = self.dependencies.get_pruner_of_module(layer)
        return self.dependencies.get_pruning_group(layer, pruner.prune_out_channels, list(channels))


@contextmanager
def traced(model: DictModel) -> Iterator[Graph]:
    """The dependency graph of a network, whose channels may be removed while inside.

    Raises:
        InputError: torch-pruning is not installed, or cannot follow the network.
    """
    library = torch_pruning()
    training = model.training
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    given: list[torch.Tensor] = []

    def forward(network: DictModel, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        given.extend(network(batch).values())
        return given

    try:
        # The graph is that of autograd, which does not see what needs no gradient.
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        try:
            with torch.enable_grad(), torch.random.fork_rng(devices=[]):
                graph = library.DependencyGraph().build_dependency(
                    model, example_batch(model.spec.inputs), forward_fn=forward, verbose=False
                )
        except Exception as error:
            raise InputError(
                f"torch-pruning cannot follow this network: {type(error).__name__}: {error}"
                f"{failing_line(error)}",
                where="student.prune",
                remedy="its outputs must be computed by torch operations with gradients; or name a "
                "smaller student instead of pruning",
            ) from error
        names = {
            module: name.removeprefix(_PREFIX)
            for name, module in model.named_modules()
            if name.startswith(_PREFIX)
        }
        yield Graph(graph, names, frozenset(tensor.grad_fn for tensor in given))
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.is_floating_point() and name not in frozen)
        model.train(training)


def apply_cuts(model: DictModel, cuts: Sequence[ChannelCut]) -> None:
    """Take channels out of a network, in place.

    Raises:
        InputError: the network has no such layer or channel: it is not the one that was pruned.
    """
    if not cuts:
        return
    with traced(model) as graph:
        layers = {name: layer for layer, name in graph.names.items()}
        for cut in cuts:
            layer = layers.get(cut.layer)
            known = layer in graph.dependencies.module2node
            width = graph.dependencies.get_out_channels(layer) if known else None
            if width is None or max(cut.removed) >= width:
                raise InputError(
                    f"the network has no channel {max(cut.removed)} of a layer {cut.layer!r}",
                    where="student",
                    remedy="build it with the model and arguments that it had when it was pruned",
                )
            graph.group(layer, cut.removed).prune()  # type: ignore[arg-type]


def write_structure(
    path: Path, cuts: Sequence[ChannelCut] = (), dropped: Sequence[str] = ()
) -> None:
    """Write what was removed from a network as JSON: the dropped blocks, then the cut channels."""
    rows = [asdict(cut) for cut in cuts]
    content = {"schema": "edgekd.structure/1", "dropped": list(dropped), "cuts": rows}
    path.write_text(json.dumps(content), encoding="utf-8")


def read_structure(path: Path) -> tuple[tuple[ChannelCut, ...], tuple[str, ...]]:
    """Read what :func:`write_structure` wrote: the cuts and the dropped blocks."""
    content = json.loads(path.read_text(encoding="utf-8"))
    cuts = tuple(ChannelCut(row["layer"], tuple(row["removed"])) for row in content["cuts"])
    return cuts, tuple(content["dropped"])


_ACROSS_CHANNELS = (nn.LayerNorm, nn.GroupNorm)
"""Norms by which every channel depends on all others: they need no check."""


def channel_dependencies(model: DictModel, graph: Graph, group: Any) -> bool:
    """Whether channels reach the outputs only through the inputs that would be removed with them.

    Half of the channels are disturbed where they arise, and the inputs that the graph says are
    theirs are set to zero: then the outputs must not change.

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
    model: DictModel, graph: Graph, cuts: Sequence[ChannelCut], pruned: DictModel
) -> bool:
    """Whether a pruned network's outputs equal the full one's with zeros for the removed inputs.

    Where channels are split, dealt out or paired with each other (chunk, GLU, a channel shuffle,
    a pixel shuffle), the remaining layers must still get the channels that they were trained on.
    Norms over channels are skipped on both sides: every channel changes their output.

    Args:
        model: the unpruned network.
        graph: its dependencies.
        cuts: the removed channels.
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
            expected, found = model(batch), pruned(batch)
        except (IndexError, RuntimeError, ValueError):
            return False
    return all(
        found[name].shape == expected[name].shape
        and bool(
            (found[name] - expected[name]).abs().max()
            <= _ROUNDING * expected[name].abs().max() + 1e-6
        )
        for name in expected
    )


_ROUNDING = 1e-4
"""Sums of fewer terms are summed in another order."""


def _noise(model: DictModel) -> dict[str, Tensor]:
    return {
        name: torch.randn_like(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in example_batch(model.spec.inputs).items()
    }


def _pass_on(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return inputs[0]


def _channel_dim(module: nn.Module) -> int:
    # Subclasses of LayerNorm are those of images, with channels in the second place.
    return -1 if isinstance(module, nn.Linear) or type(module) is nn.LayerNorm else 1


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
