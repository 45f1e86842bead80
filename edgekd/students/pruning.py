"""Structured pruning: the least important channels go, in all layers that depend on them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgekd.config.pruning import PruneConfig
from edgekd.errors import InputError, unknown_name
from edgekd.models.build import example_batch, probe
from edgekd.models.dict_model import DictModel, count_parameters
from edgekd.students.operators import explain
from edgekd.students.pruning_plan import (
    ChannelCut,
    Graph,
    apply_cuts,
    channel_dependencies,
    loses_only_its_inputs,
    torch_pruning,
    traced,
)

_PRUNED_KINDS = (nn.modules.conv._ConvNd, nn.Linear)
_WHERE = "student.prune"
_UNCERTAIN = "which inputs of later layers are its channels is not certain"
_PARTS = (2, 3, 4)
"""Numbers of equal parts in which a layer is tried, where it cannot be pruned freely:
the halves of a chunk or of a GLU, the three of query, key and value."""


@dataclass(frozen=True)
class Width:
    """The output channels of one layer before and after."""

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class Pruned:
    """A pruned network, and what was done to it."""

    model: DictModel
    cuts: tuple[ChannelCut, ...]
    config: PruneConfig
    """The request; rounding and unpruned layers change the actual ratios."""
    layers: tuple[Width, ...]
    """Those that became narrower, in the order of the network."""
    left: dict[str, str]
    """The reason why a layer is not pruned, by name."""
    parameters: tuple[int, int]
    macs: tuple[int, int]
    """Multiply-adds of convolutions and matrix products for one sample, before and after."""

    def summary(self) -> str:
        """One line: parameters and multiply-adds before and after."""
        before, after = self.parameters
        return (
            f"{before:,} → {after:,} parameters, {self.macs[0]:,} → {self.macs[1]:,} multiply-adds"
        )

    def to_json(self) -> dict[str, Any]:
        """All but the network and the cuts, as JSON values."""
        return {
            "from_parameters": self.parameters[0],
            "to_parameters": self.parameters[1],
            "from_macs": self.macs[0],
            "to_macs": self.macs[1],
            "ratio": self.config.ratio,
            "ratios": self.config.ratios,
            "layers": [{"name": w.name, "from": w.before, "to": w.after} for w in self.layers],
            "left": self.left,
        }


@dataclass
class _Group:
    """Channels that are removed together in several layers; ``name`` is the first of these."""

    name: str
    scores: list[float]
    """The importance of each unit: a channel, or one of each group of a grouped layer."""
    repeats: int
    """Channels of a unit."""
    step: int
    """Units by which the width may change, for ``round_to``."""
    layers: tuple[str, ...] = ()
    """All that lose these channels as outputs."""
    removed: list[int] = field(default_factory=list)

    @property
    def units(self) -> int:
        return len(self.scores)

    def in_parts(self, times: int) -> _Group | None:
        """The same channels in ``times`` as many parts that lose the same ones; None: uneven."""
        if self.units % times or self.units // times <= self.step:
            return None
        size = self.units // times
        parts = [self.scores[k * size : (k + 1) * size] for k in range(times)]
        made = _Group(
            self.name,
            [sum(of) / times for of in zip(*parts, strict=True)],
            self.repeats * times,
            max(1, self.step // math.gcd(self.step, times)),
            self.layers,
        )
        made.keep_about(made.units * (1 - len(self.removed) / self.units))
        return made if made.removed else None

    @property
    def least_first(self) -> list[int]:
        return sorted(range(self.units), key=self.scores.__getitem__)

    def keep_about(self, wanted: float) -> None:
        """Remove the least important units so that the nearest multiple of the step remains."""
        remaining = max(self.step, math.floor(wanted / self.step + 0.5) * self.step)
        self.removed = self.least_first[: max(0, self.units - remaining)]

    def cut(self) -> ChannelCut:
        channels = [i + r * self.units for i in self.removed for r in range(self.repeats)]
        return ChannelCut(self.name, tuple(sorted(channels)))


def prune(model: DictModel, config: PruneConfig, seed: int = 0) -> Pruned:
    """A narrower copy of a network; the network is unchanged.

    The output layers keep their width, and so do the layers that ``keep`` names (their output
    channels; it may lose inputs). Layers whose outputs are added lose the same channels. A layer
    is not pruned where the rest of the network cannot follow. ``magnitude`` is the mean square of
    the weights that go with a channel, over the layers that depend on it; ``taylor`` the first
    order change of the loss (Molchanov et al. 2019); ``lamp`` a magnitude that layers share (Lee
    et al. 2021).

    Args:
        model: a trained network. For ``taylor`` its parameters have gradients of the loss.
        config: ratio, importance and scope.
        seed: of ``random``.

    Raises:
        InputError: torch-pruning is not installed; ``keep`` names no layer; the ratio leaves
            nothing of a layer, or nothing can be pruned.
    """
    protected = _protected(model, config.keep)
    with traced(model) as graph, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        groups, left = _groups(model, graph, config, protected)
        widths = _widths(graph)
        unreachable, operators = explain(model)
    left |= _choose(groups, config, names=[name for name in graph.names.values() if name])
    left |= {
        g.name: "it is as narrow as allowed" for g in groups if not g.removed and g.name not in left
    }
    cuts = [group.cut() for group in groups if group.removed]
    pruned = _checked(model, cuts)
    if pruned is None:
        # The complete network cannot follow: try one layer after the other to find which.
        fits = [cut for group in groups if group.removed and (cut := _fitting(model, group))]
        left |= {
            cut.layer: _UNCERTAIN for cut in cuts if cut.layer not in {fit.layer for fit in fits}
        }
        cuts, pruned = fits, _checked(model, fits)
    left |= unreachable
    for name in set(operators) & {name for name, reason in left.items() if reason == _UNCERTAIN}:
        left[name] = f"{_UNCERTAIN} (after it: {operators[name]})"
    if pruned is None or not cuts:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:4])
        raise InputError(
            f"nothing of this network can be pruned: {listed or 'it has no layers to prune'}",
            where=_WHERE,
            remedy="raise the ratio, lower round_to, keep less; or name a smaller student",
        )
    with traced(pruned) as graph:
        now = _widths(graph)
    return Pruned(
        model=pruned,
        cuts=tuple(cuts),
        config=config,
        layers=tuple(Width(n, w, now[n]) for n, w in widths.items() if now[n] != w),
        left=left,
        parameters=(count_parameters(model), count_parameters(pruned)),
        macs=(count_macs(model), count_macs(pruned)),
    )


def count_macs(model: DictModel) -> int:
    """Multiply-adds of convolutions and matrix products for one sample."""
    batch = {name: tensor[:1] for name, tensor in example_batch(model.spec.inputs).items()}
    training = model.training
    model.eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), counter:
        model(batch)
    model.train(training)
    return int(counter.get_total_flops()) // 2


def _protected(model: DictModel, names: Sequence[str]) -> set[nn.Module]:
    """The layers that ``keep`` names, with all layers inside them."""
    modules = dict(model.module.named_modules())
    for name in names:
        if not name or name not in modules:
            raise unknown_name("layer", name, filter(None, modules), f"{_WHERE}.keep")
    return {inner for name in names for inner in modules[name].modules()}


def _widths(graph: Graph) -> dict[str, int]:
    """Output channels of the layers that can be pruned, by name."""
    return {
        name: int(graph.dependencies.get_out_channels(layer))
        for layer, name in graph.names.items()
        if isinstance(layer, _PRUNED_KINDS) and layer in graph.dependencies.module2node
    }


def _importance(kind: str) -> Any:
    classes = torch_pruning().importance
    made = {
        "magnitude": classes.GroupMagnitudeImportance,
        "taylor": classes.GroupTaylorImportance,
        "lamp": classes.LAMPImportance,
        "random": classes.RandomImportance,
    }
    return made[kind]()


def _groups(
    model: DictModel, graph: Graph, config: PruneConfig, protected: set[nn.Module]
) -> tuple[list[_Group], dict[str, str]]:
    """The groups of channels that may be removed, and why others may not, by their first layer."""
    groups: list[_Group] = []
    left: dict[str, str] = {}
    importance = _importance(config.importance)
    for layer, found in _all_groups(graph):
        name = graph.names[layer]
        if found is None:
            left[name] = _UNCERTAIN
            continue
        if reason := _reason_to_stay(model, graph, found, protected):
            left[name] = reason
            continue
        try:
            scores, repeats = importance(found), _repeats(graph, found)
            repeats = math.lcm(repeats, _together(graph, layer, len(found[0].idxs)))
        except (IndexError, RuntimeError, ValueError):
            # The graph speaks of channels that a layer does not have.
            left[name] = _UNCERTAIN
            continue
        if scores is None:
            left[name] = "it has no weights to rank by"
        elif repeats == 0 or len(scores) % repeats:
            left[name] = _UNCERTAIN
        else:
            # Layers that got no gradient at all are normalised to NaN.
            each = scores.float().view(repeats, -1).mean(0).nan_to_num(0.0)
            step = config.round_to // math.gcd(config.round_to, repeats)
            outputs = tuple(
                graph.names[dep.target.module]
                for dep, _ in found
                if graph.dependencies.is_out_channel_pruning_fn(dep.handler)
                and dep.target.module in graph.names
            )
            groups.append(_Group(name, each.tolist(), repeats, step, outputs))
    order = {name: number for number, name in enumerate(graph.names.values())}
    groups.sort(key=lambda group: order[group.name])
    return groups, dict(sorted(left.items(), key=lambda entry: order[entry[0]]))


def _reason_to_stay(model: DictModel, graph: Graph, group: Any, protected: set[nn.Module]) -> str:
    """Why a group's channels cannot go; empty when they may."""
    is_out = graph.dependencies.is_out_channel_pruning_fn
    targets = [dep.target for dep, _ in group if is_out(dep.handler)]
    if any(target.grad_fn in graph.outputs for target in targets):
        return "it is an output layer"
    if any(target.module in protected for target in targets):
        return "keep"
    if not channel_dependencies(model, graph, group):
        return _UNCERTAIN
    return ""


def _all_groups(graph: Graph) -> Iterator[tuple[nn.Module, Any]]:
    """Each group of layers whose channels go together, with all of its channels, by its first
    layer; None for the group of a layer that the graph cannot follow."""
    dependencies, seen = graph.dependencies, set()
    for layer in list(dependencies.module2node):
        if not isinstance(layer, _PRUNED_KINDS) or layer in seen or layer not in graph.names:
            continue
        width = dependencies.get_out_channels(layer)
        if width is None:
            continue
        try:
            group = graph.group(layer, range(width))
        except (IndexError, RuntimeError, ValueError, AttributeError):
            # torch-pruning raises arbitrary errors of its bookkeeping.
            yield layer, None
            continue
        targets = [d.target.module for d, _ in group
                   if dependencies.is_out_channel_pruning_fn(d.handler)]  # fmt: skip
        seen.update(targets)
        yield layer, group


def _repeats(graph: Graph, group: Any) -> int:
    """How many equal parts the channels of a group are in, for grouped convolutions and norms."""
    parts = [1]
    for dep, _ in group:
        layer = dep.target.module
        if isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == layer.out_channels:
            continue
        pruner = graph.dependencies.get_pruner_of_module(layer)
        out = graph.dependencies.is_out_channel_pruning_fn(dep.handler)
        found = pruner.get_out_channel_groups(layer) if out else pruner.get_in_channel_groups(layer)
        parts.append(int(found))
    return max(parts)


def _together(graph: Graph, layer: nn.Module, width: int) -> int:
    """Number of channels of a layer removed with its first one: both halves of a GLU's, so 2.

    0 where these are not the same place of equal parts, so that units cannot be identified.
    """
    out = graph.dependencies.is_out_channel_pruning_fn
    removed = {
        channel
        for dep, channels in graph.group(layer, [0])
        if dep.target.module is layer and out(dep.handler)
        for channel in channels
    }
    count = len(removed)
    if not count or width % count or removed != {k * (width // count) for k in range(count)}:
        return 0
    return count


def _choose(groups: Sequence[_Group], config: PruneConfig, names: Sequence[str]) -> dict[str, str]:
    """Choose what every group loses; returns why the others lose nothing, by name.

    Raises:
        InputError: a pattern of ``ratios`` matches no layer, or a ratio leaves nothing of one.
    """
    own: dict[str, float] = {}
    for pattern, ratio in config.ratios.items():
        matched = {name for name in names if _matches(name, pattern)}
        if not matched:
            raise unknown_name("layer", pattern, names, f"{_WHERE}.ratios")
        own |= {group.name: ratio for group in groups if matched & set(group.layers)}
    _choose_in_each([(g, own[g.name]) for g in groups if own.get(g.name)], "ratios")
    others = [group for group in groups if group.name not in own]
    if config.ratio is not None:
        if config.scope == "layer":
            _choose_in_each([(group, config.ratio) for group in others], "ratio")
        else:
            _choose_in_all(others, config.ratio)
    none = [name for name, ratio in own.items() if ratio == 0]
    if config.ratio is None:
        none += [group.name for group in others]
    return dict.fromkeys(none, "its ratio is 0")


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern names a layer or a module around it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _choose_in_each(chosen: Sequence[tuple[_Group, float]], key: str) -> None:
    """Of every group its own share is removed."""
    for group, ratio in sorted(chosen, key=lambda one: one[0].units):
        if group.units > group.step == 1 and group.units * (1 - ratio) < 0.5:
            raise InputError(
                f"a ratio of {ratio:g} leaves nothing of {group.name!r}, which has "
                f"{group.units * group.repeats} channels",
                where=f"{_WHERE}.{key}",
                remedy=f"at most {math.floor(100 * (1 - 0.5 / group.units)) / 100:g}, or keep: "
                f"[{group.name}], or scope: global",
            )
    for group, ratio in chosen:
        group.keep_about(group.units * (1 - ratio))


def _choose_in_all(groups: Sequence[_Group], ratio: float) -> None:
    """The least important of all go, down to one step of each group."""
    total = sum(group.units * group.repeats for group in groups)
    spare = {g.name: max(0, g.units - g.step) for g in groups}
    to_go = int(total * ratio)
    possible = sum(spare[group.name] * group.repeats for group in groups)
    if to_go > possible:
        raise InputError(
            f"a ratio of {ratio:g} leaves nothing of some layers: of {total} channels {to_go} "
            f"should go, and {possible} can",
            where=f"{_WHERE}.ratio",
            remedy=f"at most {math.floor(100 * possible / max(1, total)) / 100:g}",
        )
    taken = dict.fromkeys(spare, 0)
    units = [(score, group) for group in groups for score in group.scores]
    for _, group in sorted(units, key=lambda unit: unit[0]):
        if to_go < group.repeats or taken[group.name] == spare[group.name]:
            continue
        taken[group.name] += 1
        to_go -= group.repeats
    for group in groups:
        group.keep_about(group.units - taken[group.name])


def _fitting(model: DictModel, group: _Group) -> ChannelCut | None:
    """What a group alone can lose so that the network follows; None: nothing."""
    tried = [group, *(parts for n in _PARTS if (parts := group.in_parts(n)) is not None)]
    return next((g.cut() for g in tried if _checked(model, [g.cut()]) is not None), None)


def _checked(model: DictModel, cuts: Sequence[ChannelCut]) -> DictModel | None:
    """A copy without these channels; None when it does not run, or lost something else."""
    pruned = _with_cuts(model, cuts)
    if pruned is None or not cuts:
        return pruned
    with traced(model) as graph:
        return pruned if loses_only_its_inputs(model, graph, cuts, pruned) else None


def _with_cuts(model: DictModel, cuts: Sequence[ChannelCut]) -> DictModel | None:
    """A copy without these channels; None when it does not run."""
    pruned = copy.deepcopy(model)
    try:
        apply_cuts(pruned, cuts)
        probe(pruned)
    except Exception:
        # Any error of a library or a user's own forward means that this cannot be removed.
        return None
    return pruned
