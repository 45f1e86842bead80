"""The graph of an ONNX model: nodes, subgraphs, types, and inputs that decide what is computed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

import onnx
import onnx.inliner
import onnxruntime

from edgekd.onnx.file import files_of_onnx, read_onnx
from edgekd.onnx.session import CPU_PROVIDER, open_session


class Precisions(TypedDict):
    """The reduced precisions of TensorRT that a model's own types require."""

    half: bool
    int8: bool


def precisions_of(path: Path) -> Precisions:
    """Whether a model has float16 weights, and whether it is quantized (Q/DQ).

    For :func:`edgekd.onnx.session.default_options`. Weights in Constant nodes, subgraphs and
    functions count.

    Raises:
        InputError: as :func:`edgekd.onnx.file.read_onnx`.
    """
    model = read_onnx(path)
    graphs = list(all_graphs(model.graph))
    nodes = [node for graph in graphs for node in graph.node]
    nodes += [node for function in model.functions for node in function.node]
    tensors = [tensor for graph in graphs for tensor in graph.initializer]
    tensors += [a.t for node in nodes for a in node.attribute if node.op_type == "Constant"]
    return {
        "half": any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in tensors),
        "int8": any(node.op_type == "DequantizeLinear" for node in nodes),
    }


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and those inside its nodes."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from all_graphs(inner)


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the standard ONNX operators; 0 where the file has none."""
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    return int(opsets.get("", opsets.get("ai.onnx", 0)))


def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The bodies and branches of a node."""
    found = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return found + [graph for attribute in node.attribute for graph in attribute.graphs]


def tensor_types(model: onnx.ModelProto) -> dict[str, int]:
    """The element types of tensors by name, inferred where that can be done."""
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except (ValueError, RuntimeError, onnx.shape_inference.InferenceError):
        graph = model.graph  # too large, or inference failed: the shapes in the file
    return {
        value.name: value.type.tensor_type.elem_type
        for inner in all_graphs(graph)
        for value in (*inner.value_info, *inner.input, *inner.output)
    }


def node_label(node: onnx.NodeProto) -> str:
    """A node's name; without one, its operator and output."""
    return str(node.name) or f"{node.op_type} → {', '.join(node.output)}"


def reads(node: onnx.NodeProto) -> set[str]:
    """The tensors that a node reads, those of the outer graph in its subgraphs included."""
    names = {name for name in node.input if name}
    for graph in subgraphs(node):
        made = {name for inner in graph.node for name in inner.output}
        made |= {value.name for value in graph.input}
        needed = {name for inner in graph.node for name in reads(inner)}
        names |= (needed | {value.name for value in graph.output}) - made
    return names


class ProbedModel:
    """A model whose intermediate tensors can be read, by copies with more outputs."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self._model = read_onnx(path)
        self._copy = folder / "model.onnx"
        folder.mkdir()
        for file in files_of_onnx(path)[1:]:
            place = folder / file.relative_to(path.resolve().parent)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, place)
            except OSError:  # another file system
                shutil.copyfile(file, place)
        graph = self._model.graph
        self._outputs = [value.name for value in graph.output]
        self.tensors = {value.name for value in graph.input}
        self.tensors |= {name for node in graph.node for name in node.output if name}
        self.graph = graph

    def open(self, tensors: Iterable[str] = ()) -> onnxruntime.InferenceSession:
        """A session that returns these tensors in addition to its outputs."""
        outputs = self._model.graph.output
        for name in set(tensors) - set(self._outputs):
            # Without a type: ONNX Runtime infers it, also of operators that onnx does not know.
            outputs.append(onnx.ValueInfoProto(name=name))
        self._copy.write_bytes(self._model.SerializeToString())
        del outputs[len(self._outputs) :]
        return open_session(self._copy, (CPU_PROVIDER,), 1, "disabled")


DECIDES: Mapping[str, Mapping[int, str]] = {
    "Loop": {0: "the number of rounds", 1: "whether there are any rounds"},
    "If": {0: "the branch"},
    "Range": dict.fromkeys(range(3), "the length"),
    "ConstantOfShape": {0: "the shape"},
    "Expand": {1: "the shape"},
    "Reshape": {1: "the shape"},
    "Tile": {1: "the repeats", 2: "the repeats"},
    "TopK": {1: "k"},
    "Slice": dict.fromkeys(range(1, 5), "what is cut out"),
    "Split": {1: "the sizes"},
    "Pad": {1: "the padding", 3: "the padding"},
    "Resize": dict.fromkeys(range(1, 4), "the size"),
    "Upsample": {1: "the size"},
    "OneHot": {1: "the number of classes"},
    "CenterCropPad": {1: "the shape"},
    "AffineGrid": {1: "the size"},
    "MaxUnpool": {2: "the shape"},
    "NonMaxSuppression": {2: "the number of boxes"},
    "DFT": {1: "the length"},
    "STFT": {1: "the step", 3: "the length"},
    **{name: {0: "the length"} for name in ("HannWindow", "HammingWindow", "BlackmanWindow")},
    **{name: {4: "the number of steps"} for name in ("LSTM", "GRU", "RNN")},
    "NonZero": {0: "how many there are"},
    "Compress": {1: "how many there are"},
    "Unique": {0: "how many there are"},
}
"""What the value of an input of an operator decides about how much is computed, by position."""

_CARRIES = frozenset(
    (
        "Cast", "Identity", "Squeeze", "Unsqueeze", "Reshape", "Flatten",
        "Transpose", "Gather", "GatherElements", "Concat", "Slice", "Split",
        "Expand", "Tile", "Add", "Sub", "Mul", "Div",
        "Mod", "Neg", "Abs", "Min", "Max", "Floor",
        "Ceil", "Round", "Clip", "Where", "Sum", "Sign",
        "ReduceMax", "ReduceMin", "ReduceSum", "ReduceProd", "CumSum", "Equal",
        "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or",
        "Not", "Xor", "OneHot", "SequenceConstruct", "SequenceAt", "ConcatFromSequence",
        "Pow", "Sqrt", "Range", "ConstantOfShape",
    )
)  # fmt: skip
"""Operators whose result is a number made of their inputs' numbers, and no feature of them."""


def deciding_inputs(model: onnx.ModelProto) -> dict[str, str]:
    """Inputs whose values decide how much a model computes, and what each of them decides.

    Whole numbers and truth values of any shape, and other numbers of at most one dimension,
    followed through arithmetic into :data:`DECIDES`, into the bodies of If, Loop and Scan too:
    a latency that was measured with random values is not representative of such a model.
    """
    # A function that cannot be inlined is analysed from the outside only.
    with suppress(RuntimeError, ValueError):
        model = onnx.inliner.inline_local_functions(model) if model.functions else model
    filled = {tensor.name for tensor in model.graph.initializer}
    sources: dict[str, frozenset[str]] = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        whole = tensor.elem_type in _WHOLE
        few = tensor.HasField("shape") and len(tensor.shape.dim) <= 1
        if value.name not in filled and (whole or few):
            sources[value.name] = frozenset([value.name])
    found: dict[str, str] = {}
    if sources:
        _follow(model.graph, sources, found)
    return {name: found[name] for name in sources if name in found}


_WHOLE = frozenset(
    (
        onnx.TensorProto.BOOL,
        *(
            getattr(onnx.TensorProto, f"{kind}INT{n}")
            for kind in ("", "U")
            for n in (8, 16, 32, 64)
        ),
    )
)


def _follow(
    graph: onnx.GraphProto, sources: Mapping[str, frozenset[str]], found: dict[str, str]
) -> dict[str, frozenset[str]]:
    """Which of the model's inputs each tensor's value is made of; ``found`` is added to."""
    made = dict(sources)
    nothing: frozenset[str] = frozenset()
    for node in graph.node:
        reads = [made.get(name, nothing) for name in node.input]
        for position, what in DECIDES.get(node.op_type, {}).items():
            for name in reads[position] if position < len(reads) else ():
                found.setdefault(name, f"{what} of {_label(node)}")
        given = nothing.union(*reads) if node.op_type in _CARRIES else nothing
        results = [given] * len(node.output)
        for attribute in node.attribute:
            if not attribute.HasField("g"):
                continue
            body = attribute.g
            # Only Loop's and Scan's bodies have inputs: the state's input has the type of its
            # output.
            state = {"Loop": reads[2:], "Scan": reads}.get(node.op_type, [])
            first = 2 if node.op_type == "Loop" else 0
            inner = dict(made)
            for value, read in zip(body.input[first:], state, strict=False):
                inner[value.name] = read
            inside = _follow(body, inner, found)
            ends = [inside.get(value.name, nothing) for value in body.output]
            if node.op_type == "Loop":
                for name in ends[0] if ends else ():
                    found.setdefault(name, f"the number of rounds of {_label(node)}")
                ends = ends[1:]
            results = [one | end for one, end in zip(results, ends, strict=False)]
        made.update(zip(node.output, results, strict=False))
    return made


def _label(node: onnx.NodeProto) -> str:
    return node.op_type + (f" {node.name!r}" if node.name else "")
