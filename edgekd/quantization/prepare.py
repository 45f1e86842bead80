"""Prepare a float model for the quantizers: batch norm folded, constants as initializers, every
node with a name; the outputs are unchanged."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import EncodeError
from onnx import TensorProto, numpy_helper

from edgekd.errors import InputError, StageError, unknown_name
from edgekd.files import write_errors
from edgekd.onnx.batch_inference import fixed_sizes, model_inputs
from edgekd.onnx.file import check_fits_one_file, check_onnx, describe_onnx, read_onnx
from edgekd.onnx.graph import opset_of, subgraphs
from edgekd.onnx.optimizer_faults import (
    OPTIMIZERS,
    TOLERANCE,
    changed,
    guard_padding,
    optimizers_to_disable,
)
from edgekd.onnx.samples import Array, Samples, answers_of, outputs_of_random_inputs
from edgekd.onnx.session import CPU_PROVIDER, first_line, open_session, session_options

LEAST_OPSET = 13
"""DequantizeLinear has an axis, and with it per-channel scales, from here on."""

_LEAST_IR = 4  # initializers need not be inputs from here on
_IR_OF_LEAST_OPSET = 7
_QUANTIZED_STARTS = ("QLinear", "DynamicQuantize", "QGemm", "QAttention", "QMoE", "QEmbed")
_QUANTIZED = {
    "QuantizeLinear",
    "DequantizeLinear",
    "ConvInteger",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "MatMulInteger16",
    "MatMulNBits",
    "MatMulBnb4",
    "GatherBlockQuantized",
}


@dataclass(frozen=True)
class Prepared:
    """A float model to quantize, and the mapping of the file's nodes to its own."""

    model: onnx.ModelProto
    source: Path
    origins: dict[str, str | None]
    """Names in the file to names here; None for a node that was folded into a constant."""
    left_out: tuple[str, ...] = ()
    """ONNX Runtime's optimizers that would have changed the outputs."""

    def named(self, names: Collection[str], kind: str = "node") -> set[str]:
        """The names here of nodes that are named as in the file or as here.

        Raises:
            InputError: there is no such node.
        """
        here = {node.name for node in self.model.graph.node}
        found = set()
        for name in names:
            if name in here:
                found.add(name)
            elif name not in self.origins:
                raise unknown_name(kind, name, here | set(self.origins), str(self.source))
            elif (became := self.origins[name]) is not None:
                found.add(became)
        return found


def prepare_onnx(source: Path, samples: Samples | None = None, threads: int = 1) -> Prepared:
    """Read a float model and bring it into the quantizers' form.

    Batch normalization is folded into the convolution before it (ONNX Runtime's basic
    optimizations), weights in Constant nodes become initializers, the opset is raised to 13 where
    it is lower, nodes without a name get ``<type>_<index>``. Inputs, outputs, metadata and the IR
    version are those of the file.

    The result is compared with the file, run without optimizations. An optimizer that changes the
    outputs is disabled.

    Args:
        source: a float model.
        samples: real inputs to compare on, two of them; random where None. A model for which
            no random ones work is not compared.
        threads: of ONNX Runtime.

    Raises:
        InputError: as :func:`edgekd.onnx.file.check_onnx`; or the model is quantized
            already, or its opset is too old to convert; or the samples do not fit.
        StageError: the prepared model's outputs differ, whatever is disabled.
    """
    check_fits_one_file(source)
    check_onnx(source)
    compare = _Comparison(source, samples, threads)
    prepared = _prepare(source, ())
    if compare.difference(prepared.model) is None:
        return prepared
    disabled = optimizers_to_disable(
        lambda names: compare.difference(_prepare(source, names).model) is None
    )
    prepared = _prepare(source, disabled or OPTIMIZERS)
    found = compare.difference(prepared.model)
    if found is not None:
        raise StageError(
            f"output {found[0]!r} changed by {found[1]:.3g} when the model was prepared for "
            "quantization, also without any of ONNX Runtime's optimizations",
            where=str(source),
            remedy=_remedy(opset_of(prepared.model), opset_of(read_onnx(source))),
        )
    return replace(prepared, left_out=disabled)


def _remedy(opset: int, own: int) -> str:
    if own < opset:
        return f"its opset was raised from {own} to {opset}: export it again with {opset} or later"
    return (
        "does it draw random numbers, or hold batch norm in training mode? Export it for inference"
    )


class _Comparison:
    """Compares a file's outputs, run without optimizations, with those of a derived model."""

    def __init__(self, source: Path, samples: Samples | None, threads: int) -> None:
        self._source, self._threads = source, threads
        self._inputs: dict[str, Array] | None = None
        self._reference: dict[str, Array] = {}
        session = open_session(source, (CPU_PROVIDER,), threads, "disabled")
        if samples is not None:
            rows = next(iter(fixed_sizes(session)), None)
            batch = next(samples.batches(rows or 2))
            self._inputs = model_inputs(session, batch, source, rows)
            self._reference = answers_of(session, self._inputs, source)
        else:
            try:
                spec = describe_onnx(source).spec
                self._inputs, self._reference = outputs_of_random_inputs(session, spec, source)
            except (InputError, StageError):
                return  # no input sizes are known that the model accepts
        if changed(self._reference, answers_of(session, self._inputs, source), TOLERANCE):
            self._inputs = None  # it draws random numbers: no two outputs are the same

    def difference(self, model: onnx.ModelProto) -> tuple[str, float] | None:
        """The output that another model changes, and by how much."""
        if self._inputs is None:
            return None
        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
            path = Path(folder, "prepared.onnx")
            save_onnx(model, path)
            session = open_session(path, (CPU_PROVIDER,), self._threads, "disabled")
            answers = answers_of(session, self._inputs, self._source)
        return changed(self._reference, answers, TOLERANCE)


def _prepare(source: Path, disabled: Sequence[str]) -> Prepared:
    model = onnx.load(str(source))
    refuse_quantized(model, source)
    original = read_onnx(source)
    _drop_initializer_inputs(model)
    name_nodes(model.graph)
    named = [(node.name, list(node.output)) for node in model.graph.node]
    consumers = _consumers(model.graph)
    raised = opset_of(model) < LEAST_OPSET
    if raised:
        model = _raise_opset(model, source)
        name_nodes(model.graph)
    domains = {node.domain for node in all_nodes(model.graph.node)}
    guard_padding(model)
    folded = _optimize(model, source, "basic", disabled)
    # A runtime's own operators would not run elsewhere.
    if {node.domain for node in all_nodes(folded.graph.node)} - domains:
        folded = _optimize(model, source, "disabled")
    name_nodes(folded.graph)
    _plain_bias(folded.graph)
    _separate_additions(folded.graph, model.graph)
    _drop_leading_ones(folded.graph)
    least = _IR_OF_LEAST_OPSET if raised else _LEAST_IR
    restore_identity(folded, original, least)
    return Prepared(folded, source, _origins(named, consumers, folded.graph))


def save_onnx(model: onnx.ModelProto, out: Path) -> None:
    """Write a model as one file.

    Raises:
        InputError: it does not fit into one file.
        StageError: the file cannot be written.
    """
    try:
        with write_errors(out, "the ONNX file"):
            onnx.save(model, str(out))
    except (EncodeError, ValueError) as error:
        raise InputError(
            f"the model does not fit into one ONNX file, which is limited to 2.15 GB: "
            f"{first_line(error)}",
            where=out.name,
            remedy="quantize a smaller model",
        ) from error


def restore_identity(
    model: onnx.ModelProto, original: onnx.ModelProto, least_ir: int = _LEAST_IR
) -> None:
    """Give a model the metadata, producer and IR version of the file it was made from, and only
    the opsets that it uses."""
    model.ir_version = max(original.ir_version, least_ir)
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(model, field, getattr(original, field))
    del model.metadata_props[:]
    model.metadata_props.extend(original.metadata_props)
    del model.graph.metadata_props[:]
    model.graph.metadata_props.extend(original.graph.metadata_props)
    used = {node.domain for node in all_nodes(model.graph.node)} | {"", "ai.onnx"}
    imports = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(imports)


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes and those of their subgraphs."""
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from all_nodes(graph.node)


def set_aside_outputs(graph: onnx.GraphProto) -> Callable[[onnx.GraphProto], None]:
    """Take out the outputs that no node makes: inputs and constants that are passed through.

    ONNX Runtime's quantizers give the tensor before an output a new name, which these cannot have.

    Returns:
        a function that puts them back, with their constants, into the derived graph.
    """
    made = {name for node in graph.node for name in node.output}
    outputs = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in graph.output]
    names = {value.name for value in outputs} - made
    constants = [tensor for tensor in graph.initializer if tensor.name in names]
    constants = [onnx.TensorProto.FromString(t.SerializeToString()) for t in constants]
    kept = [value for value in outputs if value.name in made]
    del graph.output[:]
    graph.output.extend(kept)

    def put_back(changed: onnx.GraphProto) -> None:
        del changed.output[:]
        changed.output.extend(outputs)
        there = {tensor.name for tensor in changed.initializer}
        changed.initializer.extend(t for t in constants if t.name not in there)

    return put_back


def inner_names(graph: onnx.GraphProto) -> set[str]:
    """Tensors that subgraphs name, including those that they read from the outer graph."""
    inner = [g for node in all_nodes(graph.node) for g in subgraphs(node)]
    names = {name for g in inner for node in g.node for name in node.input}
    return names | {value.name for g in inner for value in g.output}


def name_nodes(graph: onnx.GraphProto) -> None:
    """Give nodes without a name, or with that of an earlier one, a unique name."""
    taken = {node.name for node in graph.node}
    seen: set[str] = set()
    for index, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            name = base = f"{node.name or node.op_type}_{index}"
            while name in taken:
                name = base = f"{base}_"
            node.name = name
            taken.add(name)
        seen.add(node.name)


def refuse_quantized(model: onnx.ModelProto, source: Path) -> None:
    """
    Raises:
        InputError: a node of the model, of its bodies or functions computes in 8 bits.
    """
    inside = [node for function in model.functions for node in function.node]
    for node in all_nodes([*model.graph.node, *inside]):
        if node.op_type in _QUANTIZED or node.op_type.startswith(_QUANTIZED_STARTS):
            raise InputError(
                f"the model is quantized already: it has a {node.op_type} node "
                f"{node.name or node.output[0]!r}",
                where=str(source),
                remedy="give the float model that it was made from",
            )


def _drop_initializer_inputs(model: onnx.ModelProto) -> None:
    """Weights that are inputs too (IR version 3) may be replaced by a caller: none does so here,
    and only constants can be folded."""
    graph = model.graph
    model.ir_version = max(model.ir_version, _LEAST_IR)
    filled = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in filled]
    del graph.input[:]
    graph.input.extend(inputs)


def _raise_opset(model: onnx.ModelProto, source: Path) -> onnx.ModelProto:
    try:
        return onnx.version_converter.convert_version(model, LEAST_OPSET)
    except Exception as error:  # the converter raises its own C++ error and RuntimeError alike
        raise InputError(
            f"opset {opset_of(model)} is too old to quantize per channel (needs {LEAST_OPSET}) and "
            f"cannot be converted: {first_line(error)}",
            where=str(source),
            remedy=f"export the model again with opset {LEAST_OPSET} or later",
        ) from error


def _optimize(
    model: onnx.ModelProto, source: Path, level: str, disabled: Sequence[str] = ()
) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        before, after = Path(folder, "before.onnx"), Path(folder, "after.onnx")
        try:
            save_onnx(model, before)
        except InputError as error:
            raise InputError(error.what, where=str(source), remedy=error.remedy) from error
        options = session_options(1, "basic" if level == "basic" else "disabled")
        options.optimized_model_filepath = str(after)
        try:
            open_session(before, (CPU_PROVIDER,), 1, "basic", options, disabled_optimizers=disabled)
        except InputError as error:
            # The scratch file's path means nothing to the user.
            what = error.what.replace(f"Load model from {before} failed:", "")
            what = what.replace(str(before), str(source))
            raise InputError(what, where=str(source), remedy=error.remedy) from error
        # Types by path: in memory it accepts no model above 2 GB.
        onnx.shape_inference.infer_shapes_path(str(after), str(before))
        return onnx.load(str(before))


def _plain_bias(graph: onnx.GraphProto) -> None:
    """Gemm's constant C as (N,) with beta 1: ONNX Runtime's quantizer drops a beta when the bias
    stays in float, and needs one number per channel when it does not."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "Gemm" or len(node.input) < 3:
            continue
        if node.input[1] not in weights or node.input[2] not in weights:
            continue
        settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        columns = weights[node.input[1]].dims[0 if settings.get("transB") else 1]
        bias = numpy_helper.to_array(weights[node.input[2]])
        beta = settings.get("beta", 1.0)
        if (bias.ndim == 2 and bias.shape[0] != 1) or (beta == 1.0 and bias.shape == (columns,)):
            continue
        plain = np.broadcast_to(bias * np.asarray(beta, bias.dtype), (1, columns))[0]
        name = f"{node.name}.bias"
        while name in weights:
            name += "_"
        weights[name] = numpy_helper.from_array(np.ascontiguousarray(plain), name)
        graph.initializer.append(weights[name])
        node.input[2] = name
        kept = [attribute for attribute in node.attribute if attribute.name != "beta"]
        del node.attribute[:]
        node.attribute.extend(kept)
    drop_unused(graph)


def _separate_additions(graph: onnx.GraphProto, before: onnx.GraphProto) -> None:
    """Gemm(A, B, C) whose C is not one constant number per column as a product and an Add, which
    compute in 8 bits: ONNX Runtime fuses MatMul + Add(shortcut) into such a Gemm.

    A fused product and its sum get their names from before the fusion back.

    Args:
        graph: in place.
        before: the same, not optimized.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in before.node for name in node.output}
    types = {value.name: value.type.tensor_type.elem_type for value in _values(graph)}
    taken = {name for node in graph.node for name in (node.name, *node.input, *node.output)}
    taken |= {tensor.name for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        added = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
        beta = next((a.f for a in node.attribute if a.name == "beta"), 1.0)
        constant = added in weights and len(weights[added].dims) == 1
        floats = types.get(node.output[0], TensorProto.FLOAT) == TensorProto.FLOAT
        if not added or constant or not floats or node.domain not in ("", "ai.onnx"):
            nodes.append(node)
            continue
        addition = makers.get(node.output[0])
        name, output, sum_name = node.name, "", ""
        if addition is not None and addition.op_type == "Add":
            product = next((makers[n] for n in addition.input if n != added and n in makers), None)
            fused = product is not None and product.op_type == "MatMul"
            if product is not None and fused and product.output[0] not in taken:
                name, output, sum_name = product.name, product.output[0], addition.name
        if not output:
            output = _free(f"{node.output[0]}.product", taken)
            sum_name = _free(f"{node.name}.add", taken)
        kept = [a for a in node.attribute if a.name in ("alpha", "transA", "transB")]
        plain = not any(a.i if a.name.startswith("trans") else a.f != 1.0 for a in kept)
        separate = onnx.helper.make_node(
            "MatMul" if plain else "Gemm", list(node.input[:2]), [output], name=name
        )
        if not plain:
            separate.attribute.extend(kept)
        nodes.append(separate)
        made = [output]
        if beta != 1.0:
            scaled = _free(f"{node.output[0]}.scaled", taken)
            factor = _free(f"{node.name}.beta", taken)
            graph.initializer.append(numpy_helper.from_array(np.float32(beta), factor))
            scale_name = _free(f"{node.name}.scale", taken)
            nodes.append(onnx.helper.make_node("Mul", [added, factor], [scaled], name=scale_name))
            added = scaled
            made.append(scaled)
        nodes.append(onnx.helper.make_node("Add", [output, added], [node.output[0]], name=sum_name))
        taken |= {name, output, sum_name}
        graph.value_info.extend(
            onnx.helper.make_tensor_value_info(each, TensorProto.FLOAT, None) for each in made
        )
    del graph.node[:]
    graph.node.extend(nodes)


def _drop_leading_ones(graph: onnx.GraphProto) -> None:
    """MatMul's constant (1, K, N) as (K, N) where the other factor has as many dimensions: the
    same product, and a scale for each column is possible."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    ranks = _ranks(graph)
    for node in graph.node:
        if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx"):
            continue
        weight = weights.get(node.input[1])
        if weight is None or len(weight.dims) < 3 or any(size != 1 for size in weight.dims[:-2]):
            continue
        if ranks.get(node.input[0], 0) < len(weight.dims):
            continue
        name = f"{weight.name}.matrix"
        if name not in weights:
            values = numpy_helper.to_array(weight)
            weights[name] = numpy_helper.from_array(values.reshape(values.shape[-2:]), name)
            graph.initializer.append(weights[name])
        node.input[1] = name
    drop_unused(graph)


def _values(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    yield from (*graph.value_info, *graph.input, *graph.output)


def _ranks(graph: onnx.GraphProto) -> dict[str, int]:
    """The number of dimensions of each tensor that has a shape."""
    return {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in _values(graph)
        if value.type.tensor_type.HasField("shape")
    }


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove unused initializers."""
    used = {name for node in graph.node for name in node.input} | inner_names(graph)
    used |= {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    if len(kept) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(kept)


def _consumers(graph: onnx.GraphProto) -> dict[str, list[list[str]]]:
    readers: dict[str, list[list[str]]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(list(node.output))
    return readers


def _origins(
    named: list[tuple[str, list[str]]],
    consumers: dict[str, list[list[str]]],
    graph: onnx.GraphProto,
) -> dict[str, str | None]:
    """The new node of each node of the file: by its name, else the node that now makes its output
    or, as fusion keeps the last output (MatMul + Add becomes Gemm), that of its only reader."""
    here = {node.name for node in graph.node}
    makers = {name: node.name for node in graph.node for name in node.output}
    origins: dict[str, str | None] = {}
    for name, outputs in named:
        origins[name] = name if name in here else None
        while origins[name] is None and outputs:
            origins[name] = next((makers[o] for o in outputs if o in makers), None)
            readers = [r for o in outputs for r in consumers.get(o, [])]
            outputs = readers[0] if len(readers) == 1 else []
    return origins
