"""How much memory a model needs: its weights, and the most activations alive at one time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx
from onnx import inliner, shape_inference

from edgekd.errors import InputError
from edgekd.onnx.file import UNKNOWN_RANK, describe_onnx, read_onnx
from edgekd.onnx.graph import all_graphs, node_label, reads, subgraphs
from edgekd.spec import Dimension, TensorSpec

TensorProto = onnx.TensorProto
Shapes = Mapping[str, Sequence[int]]

# Several elements share a byte; numpy's types for them take one byte each.
_PACKED_BITS = {
    getattr(TensorProto, name): bits
    for name, bits in {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}.items()
    if hasattr(TensorProto, name)
}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a model needs, from its graph alone.

    ``weights_bytes``: initializers and constants, once each. ``activations_bytes``: the most that
    is alive while one node runs, ``at_node``; ``alive`` are its tensors, the largest first.
    ``unknown`` are tensors of unknown size; they are **not** counted, so that
    with any of them the figures are lower bounds. ``dimensions`` are the sizes assumed for symbolic
    dimensions.

    Inputs are held by the caller for the complete run, outputs from their node to its end. No node
    writes over its input and no two are fused, as runtimes often do; scratch space of kernels,
    packed copies of weights and the runtime itself are not in it.
    """

    weights_bytes: int
    activations_bytes: int
    at_node: str
    alive: dict[str, int]
    unknown: tuple[str, ...] = ()
    dimensions: dict[str, int] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Weights and activations together."""
        return self.weights_bytes + self.activations_bytes

    def to_json(self) -> dict[str, Any]:
        """A plain mapping for a JSON file."""
        return asdict(self) | {"total_bytes": self.total_bytes}


def estimate_memory(
    onnx_path: Path, shapes: Shapes | None = None, batch: int | None = None
) -> MemoryEstimate:
    """Weights, and the peak of activations by liveness in the order of the graph's nodes.

    Args:
        onnx_path: the model; its weights are not read.
        shapes: sizes of inputs by name; a symbolic dimension has the given size wherever its
            name occurs. One without a size leaves tensors in ``unknown``.
        batch: the size of the inputs' symbolic first dimensions that are not in ``shapes``;
            None is 1.

    Raises:
        InputError: the file is broken, or a shape is of no input or contradicts the declared one.
    """
    bound = bind_graph(onnx_path, shapes, batch)
    graph = bound.model.graph
    sizes: dict[str, int] = {}
    for value in bound.values:
        size = _value_bytes(value)
        if size is not None:
            # Two branches may use one name for tensors of their own; the larger one counts.
            sizes[value.name] = max(size, sizes.get(value.name, 0))
    filled = {tensor.name for tensor in graph.initializer}
    given = [value.name for value in graph.input if value.name not in filled]
    walk = _Walk(sizes)
    peak, at_node, alive = walk.peak(graph, given)
    return MemoryEstimate(
        weights_bytes=_weight_bytes(graph),
        activations_bytes=peak,
        at_node=at_node,
        alive=dict(sorted(alive.items(), key=lambda item: -item[1])),
        unknown=tuple(sorted(walk.unknown)),
        dimensions=bound.dimensions,
    )


@dataclass(frozen=True)
class BoundGraph:
    """A model whose symbolic dimensions have sizes, as far as they are known.

    ``values`` declare the tensors of the graph and its subgraphs, with inferred shapes where the
    file or shape inference has them; ``dimensions`` are the sizes of symbolic dimensions.
    """

    model: onnx.ModelProto
    values: tuple[onnx.ValueInfoProto, ...]
    dimensions: dict[str, int]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By name: the shapes that are known completely, those of initializers included."""
        found = {value.name: shape for value in self.values if (shape := _shape(value)) is not None}
        for graph in all_graphs(self.model.graph):
            found |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        return found


def bind_graph(
    onnx_path: Path, shapes: Shapes | None = None, batch: int | None = None
) -> BoundGraph:
    """A model with the sizes of its symbolic dimensions; arguments as :func:`estimate_memory`.

    Raises:
        InputError: the file is broken, or a shape is of no input or contradicts the declared one.
    """
    model = read_onnx(onnx_path)
    inputs = describe_onnx(onnx_path).spec.inputs
    bound = bind_dimensions(inputs, shapes or {}, batch, str(onnx_path))
    if model.functions:
        model = inliner.inline_local_functions(model)
    return BoundGraph(model, _inferred_values(model, inputs, bound), bound)


def bind_dimensions(
    inputs: Sequence[TensorSpec], shapes: Shapes, batch: int | None, where: str
) -> dict[str, int]:
    """The size of each symbolic dimension that is known.

    Raises:
        InputError: a shape is of no input, contradicts a declared size, or gives one dimension
            two sizes; or the model fixes another batch size.
    """
    bound: dict[str, int] = {}
    declared = {tensor.name: tensor for tensor in inputs}
    for name, shape in shapes.items():
        tensor = declared.get(name)
        if tensor is None:
            raise InputError(
                f"there is no input {name!r}", where=where, remedy=f"it has {', '.join(declared)}"
            )
        sizes = tuple(shape)
        if tensor.shape == (UNKNOWN_RANK,):
            bound.update({f"{name}.{axis}": size for axis, size in enumerate(sizes)})
            continue
        fits = len(sizes) == len(tensor.shape) and all(
            (bound.setdefault(d, size) if isinstance(d, str) else d) == size
            for d, size in zip(tensor.shape, sizes, strict=True)
        )
        if not fits:
            raise InputError(
                f"shape {'x'.join(map(str, sizes)) or 'of a scalar'} does not fit {tensor}",
                where=where,
                remedy="the number of dimensions, each fixed size and each named one must agree",
            )
    firsts = [tensor.shape[0] for tensor in inputs if tensor.shape]
    fixed = next((size for size in firsts if isinstance(size, int)), None)
    if batch is not None and fixed not in (None, batch) and len(set(firsts)) == 1:
        raise InputError(
            f"the model is built for batch size {fixed}, not {batch}",
            where=where,
            remedy=f"leave the batch out, or export the model again for batch {batch}",
        )
    for first in firsts:
        if isinstance(first, str) and first != UNKNOWN_RANK:
            bound.setdefault(first, batch or 1)
    return bound


class _Walk:
    """The peak of one graph and, inside their nodes, of its subgraphs."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes = sizes
        self.unknown: set[str] = set()

    def peak(self, graph: onnx.GraphProto, held: Iterable[str]) -> tuple[int, str, dict[str, int]]:
        """Bytes alive at most, at which node, and what is alive there.

        Args:
            graph: its nodes in topological order, as ONNX demands.
            held: tensors alive all the time: the inputs.
        """
        last = _last_uses(graph)
        alive = {name: self._size(name) for name in held}
        best = (sum(alive.values()), "the inputs", dict(alive))
        for index, node in enumerate(graph.node):
            if node.op_type == "Constant":
                continue
            gives = {name: self._size(name) for name in node.output if name}
            for inner in (self.peak(g, [v.name for v in g.input]) for g in subgraphs(node)):
                # The outputs of an If are those of the branch; a Loop gathers its own meanwhile.
                around = alive if node.op_type == "If" else alive | gives
                total = sum(around.values()) + inner[0]
                if total > best[0]:
                    best = (total, f"{node_label(node)} / {inner[1]}", around | inner[2])
            alive |= gives
            if sum(alive.values()) > best[0]:
                best = (sum(alive.values()), node_label(node), dict(alive))
            for name in last.get(index, ()):
                alive.pop(name, None)
        return best

    def _size(self, name: str) -> int:
        size = self._sizes.get(name)
        if size is None:
            self.unknown.add(name)
        return size or 0


def _last_uses(graph: onnx.GraphProto) -> dict[int, list[str]]:
    """By node index: the tensors that are not read after it."""
    last: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        last.update(dict.fromkeys(node.output, index))
        last.update(dict.fromkeys(reads(node), index))
    for value in [*graph.output, *graph.input]:
        last.pop(value.name, None)
    by_node: dict[int, list[str]] = {}
    for name, index in last.items():
        by_node.setdefault(index, []).append(name)
    return by_node


def _weight_bytes(graph: onnx.GraphProto) -> int:
    total = sum(_proto_bytes(tensor) for tensor in graph.initializer)
    for sparse in graph.sparse_initializer:
        total += _proto_bytes(sparse.values) + _proto_bytes(sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.HasField("t"):
                total += _proto_bytes(attribute.t)
        total += sum(_weight_bytes(inner) for inner in subgraphs(node))
    return total


def _proto_bytes(tensor: onnx.TensorProto) -> int:
    return tensor_bytes(tensor.data_type, tuple(tensor.dims)) or 0


def tensor_bytes(elem_type: int, shape: Sequence[int]) -> int | None:
    """None for strings and what is no tensor: their size is in their values."""
    elements = math.prod(shape)
    if elem_type in _PACKED_BITS:
        return -(-elements * _PACKED_BITS[elem_type] // 8)
    if elem_type in (TensorProto.UNDEFINED, TensorProto.STRING):
        return None
    return elements * int(onnx.helper.tensor_dtype_to_np_dtype(elem_type).itemsize)


def _inferred_values(
    model: onnx.ModelProto, inputs: Sequence[TensorSpec], bound: Mapping[str, int]
) -> tuple[onnx.ValueInfoProto, ...]:
    """All tensors with the types and shapes that the file or shape inference has."""
    specs = {tensor.name: tensor for tensor in inputs}
    for graph in all_graphs(model.graph):
        for value in [*graph.input, *graph.value_info, *graph.output]:
            shape = value.type.tensor_type.shape.dim
            names = [d.dim_param for d in shape]
            _bind(value, specs[value.name].shape if value.name in specs else names, bound)
    try:
        graph = shape_inference.infer_shapes(model, data_prop=True).graph
    except (shape_inference.InferenceError, ValueError):
        graph = model.graph  # only the file's own shapes are known
    return tuple(v for g in all_graphs(graph) for v in [*g.input, *g.value_info, *g.output])


def _bind(value: onnx.ValueInfoProto, shape: Sequence[Dimension], bound: Mapping[str, int]) -> None:
    """Write the sizes of known dimensions into a tensor's declaration."""
    if value.type.WhichOneof("value") != "tensor_type":
        return
    if tuple(shape) == (UNKNOWN_RANK,):
        for axis in range(len(bound)):
            if (name := f"{value.name}.{axis}") in bound:
                value.type.tensor_type.shape.dim.add().dim_value = bound[name]
        return
    for dimension, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
        if not dimension.HasField("dim_value") and isinstance(size, str) and size in bound:
            dimension.dim_value = bound[size]


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...] | None:
    tensor = value.type.tensor_type
    if value.type.WhichOneof("value") != "tensor_type" or not tensor.HasField("shape"):
        return None
    if not all(dimension.HasField("dim_value") for dimension in tensor.shape.dim):
        return None
    return tuple(dimension.dim_value for dimension in tensor.shape.dim)


def _value_bytes(value: onnx.ValueInfoProto) -> int | None:
    shape = _shape(value)
    return None if shape is None else tensor_bytes(value.type.tensor_type.elem_type, shape)
