"""Which layers of a network depend on each other's channels, and taking channels out of all.

The structure of a pruned network is a list of cuts: plain data, with which any later stage makes
the same network out of a fresh one. The dependency graph is torch-pruning's (Fang et al. 2023).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from edgekd.errors import InputError
from edgekd.models.build import example_batch
from edgekd.models.named import NamedModel

_PREFIX = "module."
"""Where a :class:`NamedModel` has the network whose layers are named."""


@dataclass(frozen=True)
class Cut:
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
    """The dependency graph of a network as it is now."""

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
def traced(model: NamedModel) -> Iterator[Graph]:
    """The dependency graph of a network, whose channels may be taken out while inside.

    Raises:
        InputError: torch-pruning is not installed, or cannot follow the network.
    """
    library = torch_pruning()
    training = model.training
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    given: list[torch.Tensor] = []

    def answers(network: NamedModel, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        given.extend(network(batch).values())
        return given

    try:
        # The graph is that of autograd, which does not see what needs no gradient.
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        try:
            with torch.enable_grad(), torch.random.fork_rng(devices=[]):
                graph = library.DependencyGraph().build_dependency(
                    model, example_batch(model.spec.inputs), forward_fn=answers, verbose=False
                )
        except Exception as error:
            raise InputError(
                f"torch-pruning cannot follow this network: {type(error).__name__}: {error}",
                where="student.prune",
                remedy="its answers must be made by torch operations with gradients; or name a "
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


def apply_cuts(model: NamedModel, cuts: Sequence[Cut]) -> None:
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


def write_cuts(cuts: Sequence[Cut], path: Path) -> None:
    """Write the structure of a pruned network as JSON."""
    rows = [asdict(cut) for cut in cuts]
    path.write_text(json.dumps({"schema": "edgekd.structure/1", "cuts": rows}), encoding="utf-8")


def read_cuts(path: Path) -> tuple[Cut, ...]:
    """Read what :func:`write_cuts` wrote."""
    rows = json.loads(path.read_text(encoding="utf-8"))["cuts"]
    return tuple(Cut(row["layer"], tuple(row["removed"])) for row in rows)
