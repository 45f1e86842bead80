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

from edgekd.config.profile import Profile
from edgekd.onnx.graph import all_graphs
from edgekd.onnx.memory_estimate import bind_graph, estimate_memory, tensor_bytes

Precision = Literal["fp32", "fp16", "bf16", "int8"]
_VIEWS = {"Constant", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Shape", "Cast"}
_QUANTIZING = {"QuantizeLinear", "DequantizeLinear"}
_FUSED = {"Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "HardSigmoid", "BatchNormalization"}
_LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
"""Operators that ONNX Runtime removes; those that are part of quantized kernels; those that it
computes inside the layer before them; and these layers."""


@dataclass(frozen=True)
class GraphCosts:
    """What one query costs, counted from an ONNX file; tensors of unknown size are not counted.

    Attributes:
        parameters: elements of weights.
        macs: multiply-accumulates of convolutions, products and recurrent layers.
        weights_bytes: weights as stored.
        activations_bytes: the most that is alive at one time, by liveness.
        traffic_bytes: inputs, outputs and weights of all nodes, without those that are fused.
        nodes: nodes that run, roughly as after fusion.
        operators: the operators, with their domain where it is not ONNX's.
    """

    parameters: int
    macs: int
    weights_bytes: int
    activations_bytes: int
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

    Raises:
        InputError: the file is broken, or is built for another batch size.
    """
    bound = bind_graph(onnx_path, batch=batch)
    shapes, graph = bound.shapes(), bound.model.graph
    memory = estimate_memory(onnx_path, batch=batch)
    sizes = {v.name: tensor_bytes(v.type.tensor_type.elem_type, shapes[v.name])
             for v in bound.values if v.name in shapes}  # fmt: skip
    weights = {t.name: t for each in all_graphs(graph) for t in each.initializer}
    sizes |= {name: tensor_bytes(t.data_type, tuple(t.dims)) for name, t in weights.items()}
    nodes = [node for each in all_graphs(graph) for node in each.node]
    readers: dict[str, int] = {}
    for node in nodes:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    layer_outputs = {n.output[0] for n in nodes if n.op_type in _LAYERS}
    fused = [n for n in nodes if n.op_type in _FUSED and n.input[0] in layer_outputs
             and readers[n.input[0]] == 1]  # fmt: skip
    # What a fused node gives is read like the output of its layer; it is not written twice.
    free = {id(n) for n in fused} | {id(n) for n in nodes if n.op_type in _VIEWS | _QUANTIZING}
    running = [node for node in nodes if id(node) not in free]
    traffic = sum(
        sizes.get(name) or 0 for node in running for name in (*node.input, *node.output) if name
    )
    return GraphCosts(
        parameters=sum(math.prod(t.dims) for t in weights.values()),
        macs=sum(_macs(node, shapes) for node in nodes),
        weights_bytes=memory.weights_bytes,
        activations_bytes=memory.activations_bytes,
        traffic_bytes=traffic,
        nodes=len(running),
        operators=tuple(sorted({operator_name(node) for node in nodes})),
    )


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


class CostModel:
    """Predicts a candidate's figures from its graph; each measurement corrects it.

    Args:
        profile: its peak rates are the prior.
        precisions: those that may be shipped; without quantization float32 alone.
        threads: of the runtime.
        footprint: what the runtime itself needs; None: as on x86-64.
    """

    def __init__(
        self,
        profile: Profile,
        precisions: Sequence[Precision] = ("fp32",),
        threads: int = 1,
        footprint: Footprint | None = None,
    ) -> None:
        raise NotImplementedError

    def predict(self, costs: GraphCosts) -> Prediction:
        """The figures with bands over all precisions that may be shipped."""
        raise NotImplementedError

    def correct(self, costs: GraphCosts, figures: Figures) -> None:
        """Learn from the measured figures of a candidate."""
        raise NotImplementedError

    def error(self) -> dict[str, float | int | None]:
        """``latency_error`` and ``memory_error``: median relative errors of candidates predicted
        from all others, None for fewer than three; ``measured``: their number."""
        raise NotImplementedError
