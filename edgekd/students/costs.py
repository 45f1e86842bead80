"""What a candidate costs on a device: counted from its graph, and predicted from that.

Figures with a band: a prediction's is where the measurement will be, a measurement's is the
confidence interval. MB are 10⁶ bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx

from edgekd.onnx.graph import all_graphs, reads, subgraphs
from edgekd.onnx.memory_estimate import bind_graph, estimate_memory, tensor_bytes

Precision = Literal["fp32", "fp16", "bf16", "int8"]
_VIEWS = {"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze"}
_IN_PLACE = {
    "Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Gelu", "Erf",
    "BatchNormalization", "LayerNormalization", "Softmax", "Dropout", "Cast",
    "Add", "Sub", "Mul", "Div", "Pow", "Sqrt",
}  # fmt: skip
_FUSED = {"Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "HardSigmoid", "BatchNormalization"}
_BLOCK = 16
_KINDS = {
    "Conv": "Conv", "ConvTranspose": "Conv", "Gemm": "MatMul", "MatMul": "MatMul",
    "LSTM": "LSTM", "GRU": "LSTM", "RNN": "LSTM",
}  # fmt: skip
"""Operators that copy nothing, those that can write over an input, those that a layer before them
computes with its own result, and layers by the kind of their weights."""


@dataclass(frozen=True)
class GraphCosts:
    """What one query costs, counted from an ONNX file; tensors of unknown size are not counted.

    Attributes:
        parameters: elements of weights.
        macs: multiply-accumulates of convolutions, products and recurrent layers.
        weights_bytes: weights as stored.
        convolution_bytes, product_bytes, recurrent_bytes: of convolutions, of Gemm and MatMul, and
            of LSTM, GRU and RNN; ``largest_product_bytes`` is the largest single product's.
        inputs_bytes: the inputs.
        activations_bytes: the most that is alive at one time, by liveness, inputs included;
            ``blocked_bytes`` where convolutions give blocks of 16 channels, as in float32.
        traffic_bytes: inputs, outputs and weights of all nodes.
        nodes: nodes that run, roughly as after fusion.
        operators: the operators, with their domain where it is not ONNX's.
    """

    parameters: int
    macs: int
    weights_bytes: int
    convolution_bytes: int
    product_bytes: int
    recurrent_bytes: int
    largest_convolution_bytes: int
    largest_product_bytes: int
    windows: int
    inputs_bytes: int
    activations_bytes: int
    blocked_bytes: int
    traffic_bytes: int
    nodes: int
    operators: tuple[str, ...]


@dataclass(frozen=True)
class Range:
    """A value with its band."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """A plain mapping for a JSON file."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Figures:
    """Measured figures of one file, as it would be shipped.

    ``latency_ms`` is by percentile (``p50``, ``p95``), from ``processes`` fresh processes;
    ``memory_mb`` is the peak above an empty process, None where the system does not report it;
    ``speedup`` is the teacher's p50 over this file's, where that was measured. ``variant`` is
    its name (``float32``, ``int8-cpu``).
    """

    latency_ms: Mapping[str, Range]
    memory_mb: Range | None
    size_mb: float
    parameters: int
    variant: str
    processes: int
    speedup: Range | None = None

    def to_json(self) -> dict[str, Any]:
        """A plain mapping for a JSON file; :meth:`from_json` reads it."""
        return {
            "variant": self.variant,
            "latency_ms": {name: each.to_json() for name, each in self.latency_ms.items()},
            "memory_mb": None if self.memory_mb is None else self.memory_mb.to_json(),
            "size_mb": self.size_mb,
            "parameters": self.parameters,
            "processes": self.processes,
            "speedup": None if self.speedup is None else self.speedup.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Figures:
        """The inverse of :meth:`to_json`."""
        read = {key: value[key] and Range(**value[key]) for key in ("memory_mb", "speedup")}
        latency = {name: Range(**each) for name, each in value["latency_ms"].items()}
        return cls(**{**value, **read, "latency_ms": latency})


@dataclass(frozen=True)
class Footprint:
    """What the runtime itself needs with a model that does nothing.

    ``memory_mb`` is the peak above an empty process, ``latency_ms`` the p50 of a query.
    """

    memory_mb: float | None
    latency_ms: float
    measured: bool = True


@dataclass(frozen=True)
class Prediction:
    """Predicted figures: ``latency_ms`` by percentile as in :class:`Figures`."""

    latency_ms: Mapping[str, Range]
    memory_mb: Range
    size_mb: Range
    parameters: int

    def to_json(self) -> dict[str, Any]:
        """A plain mapping for a JSON file; the latency is the median."""
        return {
            "latency_ms": self.latency_ms["p50"].to_json(),
            "memory_mb": self.memory_mb.to_json(),
            "size_mb": self.size_mb.value,
        }


def graph_costs(onnx_path: Path, batch: int | None = None) -> GraphCosts:
    """Count the costs of one query of ``batch`` samples; None is 1, or the model's fixed size.

    As ONNX Runtime computes it: what depends on weights alone is folded, views copy nothing, an
    activation is part of the layer before it, and an elementwise operator writes over an input of
    its size that is not read again.

    Raises:
        InputError: the file is broken, or is built for another batch size.
    """
    bound = bind_graph(onnx_path, batch=batch)
    graph, shapes = bound.model.graph, bound.shapes()
    kinds = {value.name: value.type.tensor_type.elem_type for value in bound.values}
    weights = {t.name: t for each in all_graphs(graph) for t in each.initializer}
    sizes = {name: tensor_bytes(kinds[name], shapes[name]) or 0
             for name in kinds if name in shapes}  # fmt: skip
    nodes, stored = _folded(graph, set(weights))
    stored_bytes = {name: tensor_bytes(t.data_type, tuple(t.dims)) or 0
                    for name, t in weights.items()}  # fmt: skip
    buffers = _buffers(graph, nodes, sizes)
    made_by = {name: node.op_type for node in nodes for name in node.output}
    running = [
        node for node in nodes if node.op_type not in _VIEWS
        and not (node.op_type in _FUSED and made_by.get(node.input[0]) in _KINDS)
    ]  # fmt: skip
    layers: dict[str, list[int]] = {"Conv": [], "MatMul": [], "LSTM": []}
    for node in nodes:
        if (kind := _KINDS.get(node.op_type)) is not None:
            given = [name for name in node.input[1:] if name in stored]
            layers[kind].append(sum(sizes.get(n) or stored_bytes.get(n, 0) for n in given))
    blocked, windows = dict(sizes), [0]
    for node in nodes:
        out, weight = shapes.get(node.output[0], ()), shapes.get((*node.input, "", "")[1], ())
        if node.op_type == "Conv" and len(out) == len(weight) > 2:
            full = math.ceil(out[1] / _BLOCK) * _BLOCK
            blocked[node.output[0]] = sizes[node.output[0]] * full // out[1]
            windows.append(math.prod(weight[2:]) * math.prod(out[2:]))
    traffic = sum(
        sizes.get(name) or stored_bytes.get(name, 0)
        for node in running
        for name in {*node.input, *node.output}
        if name
    )
    return GraphCosts(
        parameters=sum(math.prod(t.dims) for t in weights.values()),
        macs=sum(_macs(node, shapes) for node in nodes),
        weights_bytes=estimate_memory(onnx_path, batch=batch).weights_bytes,
        convolution_bytes=sum(layers["Conv"]),
        product_bytes=sum(layers["MatMul"]),
        recurrent_bytes=sum(layers["LSTM"]),
        largest_convolution_bytes=max(layers["Conv"], default=0),
        largest_product_bytes=max(layers["MatMul"], default=0),
        windows=max(windows, default=0),
        inputs_bytes=sum(sizes.get(v.name, 0) for v in graph.input if v.name not in weights),
        activations_bytes=_peak(graph, nodes, buffers, sizes),
        blocked_bytes=_peak(graph, nodes, buffers, blocked),
        traffic_bytes=traffic,
        nodes=len(running),
        operators=tuple(sorted({operator_name(n) for g in all_graphs(graph) for n in g.node})),
    )


def _folded(graph: onnx.GraphProto, stored: set[str]) -> tuple[list[onnx.NodeProto], set[str]]:
    """The nodes that depend on an input, and the names of the tensors that do not."""
    nodes = []
    for node in graph.node:
        if all(name in stored for name in node.input if name) and not subgraphs(node):
            stored |= set(node.output)
        else:
            nodes.append(node)
    return nodes, stored


def _buffers(
    graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto], sizes: Mapping[str, int]
) -> dict[str, str]:
    """By tensor: the one whose memory it shares, itself where it has its own."""
    last = {name: index for index, node in enumerate(nodes) for name in reads(node)}
    last |= {value.name: len(nodes) for value in graph.output}
    given = {value.name for value in graph.input}
    shares: dict[str, str] = {name: name for name in given}
    for index, node in enumerate(nodes):
        for out in node.output:
            shares[out] = out
        if node.op_type in _VIEWS and node.input[0] in shares:
            shares[node.output[0]] = shares[node.input[0]]
        elif node.op_type in _IN_PLACE:
            over = (n for n in node.input if last.get(n) == index and n not in given
                    and n in shares and sizes.get(n) == sizes.get(node.output[0]))  # fmt: skip
            shares[node.output[0]] = shares[next(over, node.output[0])]
    return shares


def _peak(
    graph: onnx.GraphProto,
    nodes: Sequence[onnx.NodeProto],
    buffers: Mapping[str, str],
    sizes: Mapping[str, int],
) -> int:
    """The most bytes of buffers that are alive at one time, the inputs included."""
    last: dict[str, int] = {}
    for index, node in enumerate(nodes):
        last |= {buffers[name]: index for name in (*reads(node), *node.output) if name in buffers}
    for value in (*graph.input, *graph.output):
        if value.name in buffers:
            last[buffers[value.name]] = len(nodes)
    alive = {name for name in (value.name for value in graph.input) if name in buffers}
    peak = 0
    for index, node in enumerate(nodes):
        alive |= {buffers[name] for name in node.output if name}
        peak = max(peak, sum(sizes.get(name, 0) for name in alive))
        alive -= {name for name in alive if last[name] == index}
    return peak


def operator_name(node: onnx.NodeProto) -> str:
    """``Conv``; with the domain where it is not ONNX's own: ``com.microsoft.Gelu``."""
    return f"{node.domain}.{node.op_type}" if node.domain else str(node.op_type)


def _macs(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Multiply-accumulates of a node; 0 for other operators, and where a size is not known."""
    op = node.op_type.removeprefix("Fused")
    quantized = op.startswith("QLinear")
    op = op.removeprefix("QLinear").removesuffix("Integer")
    # x, x_scale, x_zero_point, w, …: of the quantized kernels.
    first, second = 0, 3 if quantized else 1
    given = [shapes.get(name) for name in node.input]
    out = shapes.get(node.output[0]) if node.output else None
    if len(given) <= second or (x := given[first]) is None or (w := given[second]) is None:
        return 0
    if op in ("LSTM", "GRU", "RNN"):
        recurrent = given[2] or ()
        return math.prod(x[:2]) * (math.prod(w) + math.prod(recurrent))
    if op == "ConvTranspose":
        return math.prod(x) * math.prod(w[1:])
    if out is None:
        return 0
    if op == "Conv":
        return math.prod(out) * math.prod(w[1:])
    if op == "Gemm":
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return math.prod(out) * x[0 if transposed else -1]
    if op == "MatMul":
        return math.prod(out) * x[-1]
    if op == "Einsum":
        equation = next(a.s.decode() for a in node.attribute if a.name == "equation")
        terms = equation.replace(" ", "").split("->")[0].split(",")
        dims = {k: n for term, shape in zip(terms, given, strict=False)
                for k, n in zip(term, shape or (), strict=False)}  # fmt: skip
        return math.prod(dims.values())
    return 0
