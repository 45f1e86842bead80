"""Prepare a float model for the quantizers: batch norm folded, constants as initializers, every
node with a name; the outputs are unchanged."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import onnxruntime
from google.protobuf.message import EncodeError

from edgekd.errors import InputError, StageError, unknown_name
from edgekd.files import write_errors
from edgekd.onnx.file import check_fits_one_file, check_onnx, describe_onnx, read_onnx
from edgekd.onnx.graph import opset_of
from edgekd.onnx.inference import first_batch, outputs_of, outputs_of_random_inputs
from edgekd.onnx.optimizer_faults import (
    OPTIMIZERS,
    TOLERANCE,
    changed,
    guard_padding,
    optimizers_to_disable,
)
from edgekd.onnx.samples import Array, Samples
from edgekd.onnx.session import (
    CPU_PROVIDER,
    Optimization,
    first_line,
    open_session,
    session_options,
)
from edgekd.quantization.rewrites import (
    LEAST_IR,
    all_nodes,
    assign,
    drop_leading_ones,
    name_nodes,
    plain_bias,
    readers_of,
    restore_identity,
    separate_additions,
)

LEAST_OPSET = 13
"""DequantizeLinear has an axis, and with it per-channel scales, from here on."""

_IR_OF_LEAST_OPSET = 7
_QUANTIZED_STARTS = ("QLinear", "DynamicQuantize", "QGemm", "QAttention", "QMoE", "QEmbed")
_QUANTIZED = {
    "QuantizeLinear", "DequantizeLinear", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat",
    "MatMulInteger16", "MatMulNBits", "MatMulBnb4", "GatherBlockQuantized",
}  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A float model to quantize, and the mapping of the file's nodes to its own."""

    model: onnx.ModelProto
    source: Path
    origins: dict[str, str | None]
    """Names in the file to names here; None for a node that was folded into a constant."""
    left_out: tuple[str, ...] = ()
    """ONNX Runtime's optimizers that would have changed the outputs."""

    def copy(self) -> onnx.ModelProto:
        """The model, to be changed."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        return model

    def write(self, quantized: onnx.ModelProto, out: Path) -> None:
        """Write a model that was made from this one, with its metadata.

        Raises:
            InputError: it does not fit into one file.
            StageError: the file cannot be written.
        """
        # Types of tensors that may be gone; a runtime infers those that it needs.
        del quantized.graph.value_info[:]
        restore_identity(quantized, self.model)
        save_onnx(quantized, out)
        check_onnx(out)

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
            self._inputs = first_batch(session, samples, source, 2)
            self._reference = outputs_of(session, self._inputs, source)
        else:
            try:
                spec = describe_onnx(source).spec
                self._inputs, self._reference = outputs_of_random_inputs(session, spec, source)
            except (InputError, StageError):
                return  # no input sizes are known that the model accepts
        if changed(self._reference, outputs_of(session, self._inputs, source), TOLERANCE):
            self._inputs = None  # it draws random numbers: no two outputs are the same

    def difference(self, model: onnx.ModelProto) -> tuple[str, float] | None:
        """The output that another model changes, and by how much."""
        if self._inputs is None:
            return None
        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
            path = Path(folder, "prepared.onnx")
            session = open_derived(model, path, self._source, self._threads)
            outputs = outputs_of(session, self._inputs, self._source)
        return changed(self._reference, outputs, TOLERANCE)


def _prepare(source: Path, disabled: Sequence[str]) -> Prepared:
    model = onnx.load(str(source))
    refuse_quantized(model, source)
    original = read_onnx(source)
    _drop_initializer_inputs(model)
    name_nodes(model.graph)
    named = [(node.name, list(node.output)) for node in model.graph.node]
    readers = {n: [list(r.output) for r in each] for n, each in readers_of(model.graph).items()}
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
    plain_bias(folded.graph)
    separate_additions(folded.graph, model.graph)
    drop_leading_ones(folded.graph)
    least = _IR_OF_LEAST_OPSET if raised else LEAST_IR
    restore_identity(folded, original, least)
    return Prepared(folded, source, _origins(named, readers, folded.graph))


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


def open_derived(
    model: onnx.ModelProto,
    path: Path,
    source: Path,
    threads: int = 1,
    optimization: Optimization = "disabled",
    *,
    options: onnxruntime.SessionOptions | None = None,
    disabled_optimizers: Sequence[str] = (),
) -> onnxruntime.InferenceSession:
    """Save a model that was made from ``source`` and open it on the CPU.

    Raises:
        InputError: it does not fit into one file, or is invalid; the error names ``source``.
        StageError: the file cannot be written.
    """
    try:
        save_onnx(model, path)
        return open_session(
            path,
            (CPU_PROVIDER,),
            threads,
            optimization,
            options,
            disabled_optimizers=disabled_optimizers,
        )
    except InputError as error:
        what = error.what.replace(f"Load model from {path} failed:", "")
        what = what.replace(str(path), str(source))
        raise InputError(what, where=str(source), remedy=error.remedy) from error


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
    model.ir_version = max(model.ir_version, LEAST_IR)
    filled = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in filled]
    assign(graph.input, inputs)


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
        options = session_options(1, "basic" if level == "basic" else "disabled")
        options.optimized_model_filepath = str(after)
        open_derived(
            model, before, source, 1, "basic", options=options, disabled_optimizers=disabled
        )
        # Types by path: in memory it accepts no model above 2 GB.
        onnx.shape_inference.infer_shapes_path(str(after), str(before))
        return onnx.load(str(before))


def _origins(
    named: list[tuple[str, list[str]]],
    readers: dict[str, list[list[str]]],
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
            after = [reader for o in outputs for reader in readers.get(o, [])]
            outputs = after[0] if len(after) == 1 else []
    return origins
