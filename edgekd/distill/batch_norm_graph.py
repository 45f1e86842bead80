"""Batch norms in a graph that torchao prepared: their own settings, and folding them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

aten = torch.ops.aten


def batch_norms(graph: GraphModule) -> dict[str, tuple[float, float]]:
    """The momentum and ε of each batch norm, by the path of its running variance."""
    return {
        str(node.args[4].target): (node.args[6], node.args[7])
        for node in graph.graph.nodes
        if node.target is aten.batch_norm.default and isinstance(node.args[4], Node)
    }


def restore_batch_norms(graph: GraphModule, settings: Mapping[str, tuple[float, float]]) -> None:
    """Give the batch norms their own settings back, and take out what only counts batches."""
    for node in list(graph.graph.nodes):
        if node.target is aten.batch_norm.default and isinstance(node.args[4], Node):
            momentum, epsilon = settings[str(node.args[4].target)]
            node.update_arg(6, momentum)
            node.update_arg(7, epsilon)
            if isinstance(node.args[1], Node):
                # The convolution's output is divided by γ/σ in training: 0/0 otherwise.
                gamma = _attribute(graph, node.args[1])
                with torch.no_grad():
                    gamma[gamma == 0] = 1e-6
        elif node.target is aten.add.Tensor and _path(node.args[0]) in settings:
            node.update_arg(1, settings[_path(node.args[0])][1])
        elif node.target is aten.add_.Tensor and _path(node.args[0]).endswith(
            "num_batches_tracked"
        ):
            graph.graph.erase_node(node)
    graph.recompile()


def fold_batch_norms(graph: GraphModule) -> None:
    """Fold the batch norms that torchao put together with the convolutions before them.

    They are in the graph as y = bn(conv(x, q(w·γ/σ)) / (γ/σ) [+ b]), σ = √(v + ε), and become
    conv(x, q(w·γ/σ)) + β + ([b] − μ)·γ/σ. torchao's own conversion takes half a minute for
    this, for it tries every kind of convolution, and takes every ε to be 10⁻⁵.
    """
    for node in list(graph.graph.nodes):
        if node.target is not aten.batch_norm.default:
            continue
        divided, own_bias = node.args[0], None
        if divided.target is aten.add.Tensor:
            divided, own_bias = divided.args[0], divided.args[1].args[0]
        if divided.target is not aten.div.Tensor or _path(divided.args[1].args[0]):
            continue
        convolution, factor_node = divided.args[0], divided.args[1].args[0]
        rounded = convolution.args[1]
        scaled = rounded.args[0] if rounded.op == "call_module" else rounded
        if factor_node.target is not aten.div.Tensor or scaled.target is not aten.mul.Tensor:
            continue
        with torch.no_grad():
            gamma, beta, mean, variance = (_attribute(graph, n) for n in node.args[1:5])
            factor = gamma / torch.sqrt(variance + node.args[7])
            weight = _attribute(graph, scaled.args[0]) * factor.reshape(scaled.args[1].args[1])
            offset = -mean if own_bias is None else _attribute(graph, own_bias) - mean
            bias = beta + offset * factor
        name = str(node.name)
        with graph.graph.inserting_before(convolution):
            folded = [
                graph.graph.get_attr(_keep(graph, f"{name}_{key}", value))
                for key, value in (("weight", weight), ("bias", bias))
            ]
        if rounded is scaled:
            convolution.update_arg(1, folded[0])
        else:
            with graph.graph.inserting_before(rounded):
                before = graph.graph.get_attr(f"{name}_weight")
            rounded.update_arg(0, before)
        convolution.args = (*convolution.args[:2], folded[1], *convolution.args[3:])
        node.replace_all_uses_with(convolution)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _keep(graph: GraphModule, name: str, value: Tensor) -> str:
    graph.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return name


def _path(node: object) -> str:
    return str(node.target) if isinstance(node, Node) and node.op == "get_attr" else ""


def _attribute(graph: GraphModule, node: Node) -> Tensor:
    value: Any = graph
    for name in str(node.target).split("."):
        value = getattr(value, name)
    assert isinstance(value, Tensor)
    return value
