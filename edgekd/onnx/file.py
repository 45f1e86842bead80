"""Read any ONNX file: validity, inputs, outputs and size. No torch."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from edgekd.crashes import native_call
from edgekd.errors import InputError
from edgekd.files import require_regular_file
from edgekd.onnx.session import CPU_PROVIDER, first_line, open_session
from edgekd.spec import Dimension, ModelSpec, TensorSpec
from edgerun.model import dimension_name

UNKNOWN_RANK = "..."
"""The only dimension of a tensor of unknown rank."""

LARGEST = 2**31
"""Size limit of a protobuf message, in bytes."""

ENGINE_SUFFIXES = (".engine", ".plan", ".trt")
"""Suffixes of TensorRT's engines; edgerun, which is independent, has its own list."""

# Element types of shapes, axes, indices, masks and vocabularies, not of weights.
_NOT_WEIGHTS = {
    onnx.TensorProto.INT64,
    onnx.TensorProto.UINT64,
    onnx.TensorProto.BOOL,
    onnx.TensorProto.STRING,
}


@dataclass(frozen=True)
class OnnxInfo:
    """The description of an ONNX file.

    ``parameters`` counts the elements of float, 8-bit-or-narrower and 16/32-bit integer tensors
    among initializers and the values of Constant nodes, in the graph, its subgraphs and
    functions; 64-bit integers, booleans and strings are shapes, axes and words, and a Constant
    of one number is a setting. ``size_bytes`` has the external data in it.
    """

    spec: ModelSpec
    parameters: int
    opset: int
    size_bytes: int
    metadata: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """A plain mapping for a JSON file."""
        return {
            "spec": self.spec.to_json(),
            "parameters": self.parameters,
            "opset": self.opset,
            "size_bytes": self.size_bytes,
            "metadata": dict(self.metadata),
        }


def check_onnx(path: Path) -> None:
    """Check that a file is a complete and valid ONNX model, its external data included.

    Raises:
        InputError: it is missing, truncated, not ONNX, breaks ONNX's rules, or its external data
            is missing, too short or outside the model's folder.
    """
    read_onnx(path)
    try:
        # By path: the checker then also accepts models above protobuf's 2 GB.
        with native_call("checked", path):
            onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        # The checker also refuses files that every runtime accepts, such as those that leave an
        # output's shape out: the runtime has the last word.
        try:
            open_session(path, (CPU_PROVIDER,), 1, "disabled")
        except InputError as refusal:
            raise InputError(
                f"the ONNX file breaks ONNX's rules: {first_line(error)}",
                where=str(path),
                remedy="export it again with a current exporter",
            ) from refusal


def describe_onnx(path: Path) -> OnnxInfo:
    """Read names, shapes, parameters, opset and metadata; the weights are not loaded.

    A dimension without a size or a name is called ``<tensor>.<axis>``. A tensor whose shape is
    missing gets it from shape inference where possible, else ``("...",)``.

    Raises:
        InputError: as :func:`check_onnx` for the file; or an input or output is no tensor.
    """
    model = read_onnx(path)
    graph = model.graph
    # Before IR version 4 every initializer is also listed as an input.
    filled = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in filled]
    if any(not value.type.tensor_type.HasField("shape") for value in graph.output):
        graph = _inferred(model).graph
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    return OnnxInfo(
        spec=ModelSpec(
            tuple(_tensor_spec(value, path) for value in inputs),
            tuple(_tensor_spec(value, path) for value in graph.output),
        ),
        parameters=count_onnx_parameters(model),
        opset=opsets.get("", opsets.get("ai.onnx", 0)),
        size_bytes=path.stat().st_size + sum(f.stat().st_size for f in _external(model, path)),
        metadata={entry.key: entry.value for entry in model.metadata_props},
    )


def read_onnx(path: Path) -> onnx.ModelProto:
    """The model without its external data, which is only looked at.

    Raises:
        InputError: the file is missing, empty, truncated, not ONNX (an engine for example), or
            its external data is missing, too short or outside the model's folder.
    """
    where, remedy = str(path), "give the path of an .onnx file"
    require_regular_file(path, remedy)
    if not path.is_file():
        raise InputError("the file does not exist", where=where, remedy=remedy)
    if path.stat().st_size >= LARGEST:
        # Not read at all: protobuf would refuse it after gigabytes.
        raise InputError(
            f"the file has {path.stat().st_size / 1e9:.2f} GB, and one ONNX file is limited to "
            f"{LARGEST / 1e9:.2f}",
            where=where,
            remedy="save the model with its weights in a file next to it: onnx.save(model, FILE, "
            "save_as_external_data=True)",
        )
    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise InputError(
            f"the file cannot be read: {error.strerror}", where=where, remedy="check its permission"
        ) from error
    except DecodeError as error:
        raise _not_onnx(path, "the file is truncated or is not ONNX") from error
    # Protobuf parses many other files, and one truncated between two fields, as a message.
    if model.ir_version <= 0 or not model.graph.output or not model.opset_import:
        raise _not_onnx(
            path, "the file is truncated or is not ONNX: it has no graph with an output"
        )
    problem = _problem(model)
    if problem is not None:
        raise InputError(
            f"the ONNX model cannot be used: {problem}",
            where=where,
            remedy="export it again with a current exporter",
        )
    _external(model, path)
    return model


MOST_NODES = 20_000
"""Limit of a graph with its bodies; exports of language models have about 10,000 nodes."""

_MOST_ROUNDS = 10**9
"""Rounds of a loop without a condition, each of at least a microsecond."""


def _problem(model: onnx.ModelProto) -> str | None:
    """What makes a model unreadable or endless, which what reads it further on does not expect."""
    graphs = [model.graph]
    nodes: list[onnx.NodeProto] = []
    calls: dict[tuple[str, str], set[tuple[str, str]]] = {}
    texts: list[Any] = [entry.domain for entry in model.opset_import]
    for function in model.functions:
        called = list(_all_nodes(function.node, graphs))
        nodes += called
        calls[function.domain, function.name] = {(n.domain, n.op_type) for n in called}
        texts += [function.domain, function.name, *function.input, *function.output]
    nodes += _all_nodes(model.graph.node, graphs)
    if len(nodes) > MOST_NODES:
        return f"it has {len(nodes):,} nodes, more than {MOST_NODES:,}"
    constants: dict[str, onnx.TensorProto] = {}
    types = {tensor.data_type for tensor in _all_tensors(model)}
    for graph in graphs:
        constants |= {tensor.name: tensor for tensor in graph.initializer}
        types |= {tensor.indices.data_type for tensor in graph.sparse_initializer}
        texts += [graph.name, *(tensor.values.name for tensor in graph.sparse_initializer)]
        for value in (*graph.input, *graph.output, *graph.value_info):
            types.add(value.type.tensor_type.elem_type)
            shape = value.type.tensor_type.shape.dim
            texts += [value.name, *(size.dim_param for size in shape)]
    for node in nodes:
        texts += [node.name, node.op_type, node.domain, *node.input, *node.output]
        texts += [attribute.name for attribute in node.attribute]
        types |= {attribute.t.data_type for attribute in node.attribute}
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            constants |= dict.fromkeys(node.output, node.attribute[0].t)
    texts += [text for entry in model.metadata_props for text in (entry.key, entry.value)]
    # Protobuf gives bytes for a text that is not UTF-8.
    strange = next((text for text in (*texts, *constants) if isinstance(text, bytes)), None)
    if strange is not None:
        return f"the name {strange!r} in it is not UTF-8"
    unknown = min(types - set(onnx.TensorProto.DataType.values()), default=None)
    if unknown is not None:
        return f"a tensor in it has the type {unknown}, which ONNX does not have"
    negative = next((t.name for t in constants.values() if min(t.dims, default=0) < 0), None)
    if negative is not None:
        return f"the tensor {negative!r} has a negative size"
    if (recursive := _recursive(calls)) is not None:
        return f"the function {recursive[1]!r} calls itself"
    return next((why for node in nodes if (why := _endless(node, constants)) is not None), None)


def _all_nodes(nodes: Any, graphs: list[onnx.GraphProto]) -> Iterator[onnx.NodeProto]:
    """The nodes and those of their bodies, which are added to ``graphs``."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                graphs.append(graph)
                yield from _all_nodes(graph.node, graphs)


def _recursive(
    calls: Mapping[tuple[str, str], Collection[tuple[str, str]]],
) -> tuple[str, str] | None:
    """A function that calls itself, directly or not."""
    left = {key: {called for called in inner if called in calls} for key, inner in calls.items()}
    while left:
        leaves = [key for key, inner in left.items() if not inner & left.keys()]
        if not leaves:
            return next(iter(left))
        for key in leaves:
            del left[key]
    return None


def _endless(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> str | None:
    """Why a node does not end in hours: a loop with a constant number of rounds."""
    if node.op_type != "Loop" or len(node.input) < 2 or not node.attribute:
        return None
    body = node.attribute[0].g
    rounds, condition = (_number(constants.get(name)) if name else 1 for name in node.input[:2])
    if not node.input[0]:
        rounds = 2**63
    if rounds is None or rounds <= _MOST_ROUNDS or not condition or len(body.input) < 2:
        return None
    going = body.output[0].name if body.output else ""
    source = {n.output[0]: n.input[0] for n in body.node if n.op_type == "Identity" and n.input}
    while going in source:
        going = source.pop(going)
    if going == body.input[1].name or _number(constants.get(going)):
        return f"the loop {node.name or node.output[0]!r} has {rounds:,} rounds"
    return None


def _number(tensor: onnx.TensorProto | None) -> int | None:
    """The value of a constant whole number or truth value; None for another tensor."""
    if tensor is None or tensor.data_type not in (onnx.TensorProto.INT64, onnx.TensorProto.BOOL):
        return None
    if tensor.data_location == onnx.TensorProto.EXTERNAL or math.prod(tensor.dims) != 1:
        return None
    try:
        return int(onnx.numpy_helper.to_array(tensor).item())
    except (TypeError, ValueError):
        return None


def _not_onnx(path: Path, what: str) -> InputError:
    if path.suffix.lower() in ENGINE_SUFFIXES:
        return InputError(
            "this is a TensorRT engine, not an ONNX model",
            where=str(path),
            remedy="give the ONNX model that it was built from; an engine can be measured "
            "(edgekd benchmark) and run (python -m edgerun run)",
        )
    remedy = f"it has {path.stat().st_size} bytes; copy or export it again"
    return InputError(what, where=str(path), remedy=remedy)


def files_of_onnx(path: Path) -> list[Path]:
    """The file itself and those of its external data.

    Raises:
        InputError: as :func:`read_onnx`.
    """
    return [path, *_external(read_onnx(path), path)]


def check_fits_one_file(path: Path) -> None:
    """Refuse a model that cannot be rewritten as one file, before its weights are read.

    Raises:
        InputError: it is too large with its external data; or as :func:`read_onnx`.
    """
    size = sum(file.stat().st_size for file in files_of_onnx(path))
    if size >= LARGEST:
        raise InputError(
            f"the model has {size / 1e9:.2f} GB with its weights, and it is written as one ONNX "
            f"file, which is limited to {LARGEST / 1e9:.2f}",
            where=str(path),
            remedy="give a smaller model, or leave this one unchanged",
        )


def count_onnx_parameters(model: onnx.ModelProto) -> int:
    """The number of weights, by the rule of :class:`OnnxInfo`."""
    return sum(_elements(tensor) for tensor in _all_tensors(model))


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(model)
    except (onnx.shape_inference.InferenceError, ValueError):
        # A convenience for files that leave shapes out; those it cannot help are described
        # as having an unknown shape, as in the file.
        return model


def _tensor_spec(value: onnx.ValueInfoProto, path: Path) -> TensorSpec:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type" or not value.type.tensor_type.elem_type:
        found = (kind or "value of no type").replace("_type", "")
        raise InputError(
            f"{value.name!r} is a {found}, not a tensor",
            where=str(path),
            remedy="export the model with tensors only (for scikit-learn: without ZipMap)",
        )
    tensor = value.type.tensor_type
    if tensor.elem_type not in onnx.TensorProto.DataType.values():
        raise InputError(
            f"{value.name!r} has an element type, {tensor.elem_type}, that ONNX does not know",
            where=str(path),
            remedy="export the model again with a current exporter",
        )
    if tensor.elem_type == onnx.TensorProto.STRING:
        dtype = "string"
    else:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    if not tensor.HasField("shape"):
        return TensorSpec(value.name, (UNKNOWN_RANK,), dtype)
    shape: list[Dimension] = []
    for axis, dimension in enumerate(tensor.shape.dim):
        symbol = dimension_name(dimension.dim_param)
        if dimension.dim_value > 0:
            shape.append(int(dimension.dim_value))
        else:
            shape.append(symbol or f"{value.name}.{axis}")
    return TensorSpec(value.name, tuple(shape), dtype)


def _elements(tensor: onnx.TensorProto) -> int:
    if tensor.data_type in _NOT_WEIGHTS:
        return 0
    count = 1
    for size in tensor.dims:
        count *= size
    return count


def _weights(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from (sparse.values for sparse in graph.sparse_initializer)
    yield from _node_weights(graph.node)


def _node_weights(nodes: Any) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _weights(attribute.g)
            for graph in attribute.graphs:
                yield from _weights(graph)
            if node.op_type == "Constant" and attribute.name == "value" and attribute.t.dims:
                yield attribute.t
            elif node.op_type == "Constant" and attribute.name == "sparse_value":
                yield attribute.sparse_tensor.values


def _all_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from _weights(model.graph)
    for function in model.functions:
        yield from _node_weights(function.node)


def _external(model: onnx.ModelProto, path: Path) -> list[Path]:
    """The files of external data, each checked to be in the model's folder and long enough."""
    folder = Path(os.path.realpath(path)).parent
    needed: dict[Path, int] = {}
    for tensor in _all_tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        location = entry.get("location", "")
        # A model may name any file of this machine as its data; only its own folder is read.
        usable = location and "\0" not in location and not Path(location).is_absolute()
        file = Path(os.path.realpath(folder / location)) if usable else folder.parent
        if not file.is_relative_to(folder):
            raise InputError(
                f"the weights of {tensor.name!r} are outside the model's folder: {location!r}",
                where=str(path),
                remedy="put the data file next to the model and save the model again",
            )
        try:
            end = int(entry.get("offset") or 0) + int(entry.get("length") or 0)
        except ValueError as error:
            raise InputError(
                f"the external data of {tensor.name!r} has no valid offset and length",
                where=str(path),
                remedy="save the model again",
            ) from error
        needed[file] = max(needed.get(file, 0), end)
    for file, length in needed.items():
        if not file.is_file():
            raise InputError(
                f"the model's weights are in {file.name!r}, which is missing",
                where=str(path),
                remedy="copy it into the model's folder, or save the model with its weights inside",
            )
        if file.stat().st_size < length:
            raise InputError(
                f"the weights file {file.name!r} is truncated: {file.stat().st_size} bytes, "
                f"the model needs {length}",
                where=str(path),
                remedy="copy it again",
            )
    return sorted(needed)
