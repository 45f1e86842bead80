"""Depth: the repeated blocks of a network, of which evenly spaced ones remain.

A block that is dropped is replaced by :class:`Skipped`, which returns its input: no name in the
network changes, whatever its forward does with the list of its blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.config.pruning import DropLayersConfig
from edgekd.errors import EdgekdError, InputError
from edgekd.models.build import example_batch, probe
from edgekd.models.dict_model import DictModel

_WHERE = "student.drop_layers"
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Run:
    """Blocks of one class that are called one after the other and keep the shape of their input.

    The first one, which always remains, may change it, as in a stage of a residual network. Blocks
    that are alone in their stages form one run.
    """

    blocks: tuple[str, ...]
    """Their paths in the order of their calls."""
    kind: str
    """Their class."""

    def dropped(self, keep: float) -> tuple[str, ...]:
        """The blocks that go, where a share of them or a number (from 1 up) remains.

        The first and the last remain, and evenly spaced ones between them: of twelve layers six
        are 0, 2, 4, 7, 9 and 11, those of DistilBERT (Sanh et al. 2019).
        """
        count = len(self.blocks)
        kept = max(1, min(count, int(keep) if keep >= 1 else int(count * keep + 0.5)))
        step = (count - 1) / max(1, kept - 1)
        stay = {int(number * step + 0.5) for number in range(kept)}
        return tuple(name for number, name in enumerate(self.blocks) if number not in stay)


class Skipped(nn.Module):
    """What is in the place of a dropped block: its first tensor, unchanged.

    Args:
        block: the dropped one, whose plain attributes a network may read.
        rest: what follows the tensor in the block's output, a tuple; None: it is the tensor alone.
    """

    def __init__(self, block: nn.Module, rest: tuple[None, ...] | None) -> None:
        super().__init__()
        plain = {key: value for key, value in vars(block).items() if not key.startswith("_")
                 and isinstance(value, bool | int | float | str | None)}  # fmt: skip
        self.__dict__.update(plain)
        self.rest = rest

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first tensor among the arguments, in the form of the block's output."""
        given = _first_tensor(args, kwargs)
        return given if self.rest is None else (given, *self.rest)


@dataclass(frozen=True)
class _Call:
    """A module's call: the shape and type of its first tensor, and its output."""

    given: tuple[Any, ...]
    output: tuple[Any, ...] | None
    """None: it is not a tensor, or a tuple of one and Nones."""
    rest: tuple[None, ...] | None


def repeated_blocks(model: DictModel) -> tuple[Run, ...]:
    """The runs of repeated blocks of any network, found by running it once on empty samples.

    Blocks are modules of one class in one module, each called once, with layers inside them. Of
    blocks within blocks only the outer ones count.
    """
    modules = dict(model.module.named_modules())
    runs: list[Run] = []
    calls = _calls(model, modules)
    waiting = [""]
    while waiting:
        parent = waiting.pop(0)
        found = list(_runs_in(parent, modules[parent], calls))
        inside = {name for run in found for name in run.blocks}
        runs += found
        waiting += [
            path
            for name, _ in modules[parent].named_children()
            if (path := f"{parent}.{name}".lstrip(".")) in modules and path not in inside
        ]
    # Blocks of a single layer, such as a convolution with its norm, count where there are no other
    deep = [run for run in runs if _weights(modules[run.blocks[0]]) > 1]
    runs = deep or runs
    # A block that stands alone in its stage is a block all the same: its layers are not a run.
    kinds = {type(modules[name]) for run in runs for name in run.blocks} - set(_CONTAINERS)
    order = {name: number for number, name in enumerate(calls)}
    outer = [run for run in runs if not any(
        type(modules[around]) in kinds for around in _around(run.blocks[0]))]  # fmt: skip
    return tuple(sorted(outer, key=lambda run: order[run.blocks[0]]))


def drop_layers(model: DictModel, config: DropLayersConfig) -> tuple[DictModel, tuple[str, ...]]:
    """A copy of a network without some of its repeated blocks, and their names.

    The other blocks keep their weights.

    Raises:
        InputError: it has no repeated blocks, all of them would remain, or the network does not
            run without them; the reason is named.
    """
    names = dropped_names(model, config.keep)
    smaller = copy.deepcopy(model)
    skip_blocks(smaller, names)
    try:
        probe(smaller)
    except EdgekdError as error:
        raise InputError(
            f"the network does not run without its blocks {', '.join(names)}: {error.what}",
            where=_WHERE,
            remedy="use prune, or name a network with fewer layers",
        ) from error
    return smaller, names


def dropped_names(model: DictModel, keep: float) -> tuple[str, ...]:
    """The blocks that :func:`drop_layers` removes.

    Raises:
        InputError: there are no repeated blocks, or all of them would remain.
    """
    runs = repeated_blocks(model)
    if not runs:
        raise InputError(
            f"the network {type(model.module).__name__} has no repeated blocks: modules of one "
            "class, each called once, whose output has the shape of their input",
            where=_WHERE,
            remedy="use prune, which removes channels; or put the repeated part of its forward "
            "into modules of their own",
        )
    names = tuple(name for run in runs for name in run.dropped(keep))
    if not names:
        found = ", ".join(f"{len(run.blocks)} × {run.kind} ({run.blocks[0]} …)" for run in runs)
        raise InputError(
            f"keep {keep:g} leaves all of the repeated blocks: {found}",
            where=f"{_WHERE}.keep",
            remedy="lower it",
        )
    return names


def skip_blocks(model: DictModel, names: Sequence[str]) -> None:
    """Replace blocks of a network by what returns their input, in place.

    Raises:
        InputError: it has no such block: it is not the network whose blocks were dropped.
    """
    if not names:
        return
    modules = dict(model.module.named_modules())
    calls = _calls(model, {name: modules[name] for name in names if name in modules})
    for name in names:
        call = calls.get(name)
        if call is None or call.output != call.given:
            raise InputError(
                f"the network has no block {name!r} that can be dropped",
                where="student",
                remedy="build it with the model and arguments that it had when it was dropped",
            )
        parent, _, last = name.rpartition(".")
        setattr(modules[parent], last, Skipped(modules[name], call.rest))


def _runs_in(parent: str, module: nn.Module, calls: Mapping[str, _Call]) -> Iterator[Run]:
    """The runs among the children of a module."""
    path = {child: f"{parent}.{name}".lstrip(".") for name, child in module.named_children()}
    of_kind: dict[tuple[Any, ...], list[str]] = {}
    for child, name in path.items():
        if name in calls and any(child.children()) and _weights(child):
            of_kind.setdefault(_kind(child), []).append(name)
    order = {name: number for number, name in enumerate(calls)}
    for kind, names in of_kind.items():
        runs: list[list[str]] = []
        for name in sorted(names, key=order.__getitem__):
            call = calls[name]
            before = calls[runs[-1][-1]].output if runs else None
            if call.given == call.output == before:
                runs[-1].append(name)
            else:
                runs.append([name])
        # Blocks that are alone in their stages are repeated from stage to stage.
        alone = [run[0] for run in runs if len(run) == 1]
        alone = [name for name in alone if calls[name].output == calls[name].given]
        for run in [*runs, alone]:
            if len(run) > 1:
                yield Run(tuple(run), kind[0].__name__)


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """What blocks of one kind have in common: their class; of a container, those inside it."""
    inside = module.children() if isinstance(module, _CONTAINERS) else ()
    return type(module), *map(_kind, inside)


def _weights(module: nn.Module) -> int:
    """The number of weight matrices and kernels."""
    return sum(parameter.ndim > 1 for parameter in module.parameters())


def _around(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _calls(model: DictModel, modules: Mapping[str, nn.Module]) -> dict[str, _Call]:
    """Those of the modules that a run of the network calls exactly once, in that order."""
    seen: dict[str, _Call] = {}
    count: dict[str, int] = {}
    begun: list[str] = []

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            count[name] = count.get(name, 0) + 1
            begun.append(name)

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = _first_tensor(args, kwargs)
            first, rest = output, None
            if isinstance(output, tuple) and output:
                first, *others = output
                rest = (None,) * len(others)
                if any(other is not None for other in others):
                    first = None
            shape = _shape(first) if isinstance(first, Tensor) else None
            seen[name] = _Call(_shape(given), shape, rest)

        return hook

    training = model.training
    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name), with_kwargs=True))
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(example_batch(model.spec.inputs))
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return {name: seen[name] for name in begun if name in seen and count[name] == 1}


def _first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)


def _shape(tensor: Tensor | None) -> tuple[Any, ...]:
    return () if tensor is None else (*tensor.shape, tensor.dtype)
