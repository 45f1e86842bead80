"""An ONNX model in 16 bits: float16 or bfloat16, strongly typed, as TensorRT 11 requires.

The graph states what computes in 16 bits: weights are stored so, and there is a cast where a
tensor changes its type. Inputs and outputs stay float32 by default. Matrix
products and convolutions are converted for any length, as every runtime accumulates them in
float32. These stay in float32, each with its reason in the :class:`MixedPrecisionInfo`:

- what ONNX does not define in the type at the model's opset (the schema decides; for bfloat16 the
  opset is raised to 22 where possible, since older convolutions do not support it), operators of
  other domains, sequences, and If, Loop and Scan with their bodies;
- exponentials and powers, whose relative error is the absolute error of their input; products
  and sums of squares, which overflow before their root is computed; sampling positions,
  angles, and what computes them from integers; random numbers;
- sums, means and softmax over more than 1/roundoff terms (2,048 in float16, 256 in bfloat16)
  or over an unknown number: there a running sum stops growing;
- nodes with a weight beyond the range, or so small that 16 bits lose its digits; what takes the
  results of such nodes, until a softmax, a norm or the like bounds them;
- with samples: nodes that take or give an activation above half of the range, or only below the
  smallest normal number; the float model is run over all samples for this;
- ``keep``; and nodes that only move values between such nodes.

ONNX Runtime's own converter is not used: it clamps weights to the range silently, gives a
float32 node that shares a weight with a 16-bit one the rounded weight too, puts the casts of a
subgraph into the main graph, and does not support bfloat16.

Models with Q/DQ nodes are converted too, for TensorRT: their scales become 16 bits at opset 19, so
that there is no cast between a convolution and its Q/DQ. They are not for ONNX Runtime: its
optimizer quantizes a float16 bias by a scale that float16 cannot represent, and computes wrong
(1.31, 'basic' and above; right with optimizations disabled).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import EncodeError

from edgekd.errors import EdgekdError, InputError, StageError, unknown_name
from edgekd.files import write_errors
from edgekd.onnx.file import check_fits_one_file, check_onnx
from edgekd.onnx.inference import fixed_batch, model_inputs, outputs_of
from edgekd.onnx.optimizer_faults import guard_padding
from edgekd.onnx.samples import Samples
from edgekd.onnx.session import CPU_PROVIDER, first_line, open_session
from edgekd.quantization.mixed_precision_graph import lower, open_graph, opset_of, rounded
from edgekd.quantization.mixed_precision_rules import (
    FLOAT,
    LOW_TYPES,
    Kind,
    LowType,
    nodes_in_float,
    touches_float,
)

BATCH = 16
"""Samples run at a time while ranges and differences are measured."""
_HARMFUL_KINDS = 8
"""Largest number of kinds of crashing nodes that are left in float32 before giving up."""


@dataclass(frozen=True)
class MixedPrecisionInfo:
    """The precision of each of a model's nodes, and the effect on its outputs and size.

    ``low`` names the nodes that compute in 16 bits, ``kept`` those in float32 with the reason;
    nodes that touch no floating-point number are in neither. ``max_difference`` is the largest
    |16 bits − float32| over all outputs and samples, None without samples.
    """

    kind: Kind
    low: tuple[str, ...]
    kept: dict[str, str]
    max_difference: float | None
    opset: int
    size_bytes: int
    float_bytes: int

    def to_json(self) -> dict[str, Any]:
        """A plain mapping for a JSON file."""
        return asdict(self)


def convert_mixed_precision(
    onnx_path: Path,
    out: Path,
    kind: Kind,
    *,
    keep_io: bool = True,
    samples: Samples | None = None,
    keep: Collection[str] = (),
    opens: Callable[[Path], object] | None = None,
) -> MixedPrecisionInfo:
    """Write a model in 16 bits, as one file, with the same names, metadata and dynamic dimensions.

    Args:
        onnx_path: a float32 model, or a quantized one with Q/DQ nodes.
        out: where to write.
        kind: the type; bfloat16 has float32's range and 8 bits of precision, float16 has 11.
        keep_io: inputs and outputs stay float32.
        samples: real inputs; they find what overflows, and the result is verified on them.
        keep: names of nodes that stay in float32.
        opens: opens and runs a file in another process, as
            :meth:`edgekd.targets.LocalTarget.probe` does; where that raises an error for the
            result and none for ``onnx_path``, the nodes that cause it stay in float32 as well.

    Raises:
        CrashError: ONNX Runtime crashes on the result, whatever nodes stay in float32.
        InputError: the file is no complete ONNX model, is in 16 bits already or in float64, or too
            large for one file; ``keep`` names no node; the samples do not fit; nothing can be
            converted.
        StageError: an output is not finite any more, the converted graph is not valid, or the
            file cannot be written.
    """
    where = str(onnx_path)
    low = LOW_TYPES[kind]
    check_fits_one_file(onnx_path)
    check_onnx(onnx_path)
    proto = onnx.load(str(onnx_path))
    _refuse_16_bits(proto, where)
    float_bytes = len(_serialized(proto, where))
    model = open_graph(proto, low)
    _refuse_float64(model, where)
    names = [str(node.name) for node in model.graph]
    for name in keep:
        if name not in names:
            raise unknown_name("node", name, names, where)
    flat = ir.to_proto(model)
    ranges = _ranges(model, flat, samples) if samples is not None and kind == "fp16" else None
    if ranges is not None and not keep_io:
        _refuse_large_inputs(model, ranges, low, where)
    kept = nodes_in_float(model.graph, opset_of(model), low, ranges, set(keep), keep_io=keep_io)
    chosen = [n for n in model.graph if n not in kept and touches_float(n)]
    if not chosen:
        raise InputError(
            f"no node of the model can compute in {low.name}",
            where=where,
            remedy="; ".join(f"{n.name}: {why}" for n, why in list(kept.items())[:5])
            or "it has no floating-point node",
        )
    reasons = {str(node.name): kept[node] for node in model.graph if node in kept}
    chosen_names = [str(node.name) for node in chosen]
    opset = opset_of(model)
    lower(model, chosen, low, keep_io=keep_io)
    converted = _checked(ir.to_proto(model), where)
    guard_padding(converted)
    if opens is not None:
        trials = _Trials(flat, low, keep_io, opens, onnx_path)
        harmful = trials.harmful(converted, chosen_names)
        if harmful:
            reasons |= harmful
            reasons = {name: reasons[name] for name in names if name in reasons}
            chosen_names = [name for name in chosen_names if name not in harmful]
            converted = trials.convert(chosen_names)
    difference = None
    if samples is not None:
        difference = largest_difference(flat, converted, low, samples, names)
    content = _serialized(converted, where)
    with write_errors(out, "the ONNX file"):
        out.write_bytes(content)
    check_onnx(out)
    return MixedPrecisionInfo(
        kind=kind,
        low=tuple(chosen_names),
        kept=reasons,
        max_difference=difference,
        opset=opset,
        size_bytes=len(content),
        float_bytes=float_bytes,
    )


class _Trials:
    """Files that a default session is opened with, in another process, to see which it accepts."""

    def __init__(
        self,
        flat: onnx.ModelProto,
        low: LowType,
        keep_io: bool,
        opens: Callable[[Path], object],
        source: Path,
    ) -> None:
        self._flat, self._low, self._keep_io = flat, low, keep_io
        self._opens, self._source = opens, source

    def convert(self, chosen: Collection[str]) -> onnx.ModelProto:
        """The float model with these nodes in 16 bits."""
        model = ir.from_proto(self._flat)
        lower(model, [n for n in model.graph if n.name in chosen], self._low, keep_io=self._keep_io)
        converted = _checked(ir.to_proto(model), str(self._source))
        guard_padding(converted)
        return converted

    def harmful(self, converted: onnx.ModelProto, chosen: Sequence[str]) -> dict[str, str]:
        """Nodes that must not be in 16 bits, each with the reason; of those ``chosen``.

        The last node of the shortest prefix that fails, found by bisection, and those that are
        like it (the same operation on results of the same ones), until the rest is accepted.
        """
        failure = self._failure(converted)
        if failure is None:
            return {}
        try:
            self._opens(self._source)
        except EdgekdError:
            return {}  # The failure is not caused by 16 bits.
        found: dict[str, str] = {}
        first = failure
        for _ in range(_HARMFUL_KINDS):
            rest = [name for name in chosen if name not in found]
            low, high = 0, len(rest)
            while high - low > 1:
                middle = (low + high) // 2
                fails = self._failure(self.convert(rest[:middle]))
                low, high = (low, middle) if fails else (middle, high)
            kinds = self._kinds()
            alike = [name for name in rest if kinds[name] == kinds[rest[high - 1]]]
            reason = f"in {self._low.name}, {failure.what.partition(' while ')[0]}"
            found |= dict.fromkeys(alike, reason)
            if len(found) == len(chosen):
                break
            failure = self._failure(self.convert([n for n in chosen if n not in found]))
            if failure is None:
                return found
        raise first

    def _failure(self, converted: onnx.ModelProto) -> EdgekdError | None:
        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
            path = Path(folder) / self._source.name
            path.write_bytes(_serialized(converted, str(self._source)))
            try:
                self._opens(path)
            except EdgekdError as error:
                error.where = str(self._source)
                return error
        return None

    def _kinds(self) -> dict[str, tuple[str, ...]]:
        """Each node's operation and those that make its inputs."""
        makers = {name: node.op_type for node in self._flat.graph.node for name in node.output}
        return {
            node.name: (node.op_type, *(makers.get(name, "") for name in node.input))
            for node in self._flat.graph.node
        }


def _ranges(model: ir.Model, flat: onnx.ModelProto, samples: Samples) -> dict[str, float]:
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    # A sequence of tensors has their type, too.
    tensors = [v for v in values if isinstance(v.type, ir.TensorType)]
    names = [str(v.name) for v in tensors if v.name and v.dtype == FLOAT]
    return measure_ranges(flat, names, samples)


def _refuse_large_inputs(
    model: ir.Model, ranges: dict[str, float], low: LowType, where: str
) -> None:
    for value in model.graph.inputs:
        if ranges.get(str(value.name), 0.0) > low.largest:
            raise InputError(
                f"the input {value.name!r} reaches {ranges[str(value.name)]:.3g} on the samples; "
                f"{low.name} ends at {low.largest:.5g}",
                where=where,
                remedy="keep inputs and outputs in float32, or scale the input",
            )


def _refuse_16_bits(proto: onnx.ModelProto, where: str) -> None:
    low = {int(each.dtype): each.name for each in LOW_TYPES.values()}
    values = (*proto.graph.input, *proto.graph.output, *proto.graph.value_info)
    types = [value.type.tensor_type.elem_type for value in values]
    types += [tensor.data_type for tensor in proto.graph.initializer]
    types += [a.i for n in proto.graph.node if n.op_type == "Cast" for a in n.attribute]
    found = next((low[t] for t in types if t in low), None)
    if found is not None:
        raise InputError(
            f"the model computes in {found} already",
            where=where,
            remedy="give the float32 model that it was made from",
        )


def _refuse_float64(model: ir.Model, where: str) -> None:
    graph = model.graph
    values = (*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs))
    types = {value.dtype for value in values}
    if ir.DataType.DOUBLE in types and FLOAT not in types:
        raise InputError(
            "the model computes in float64, and only float32 is converted to 16 bits",
            where=where,
            remedy="export it in float32 (PyTorch: model.float() before the export)",
        )


def _checked(proto: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """The model with all types and shapes inferred again: a wrong type is found here."""
    try:
        typed = onnx.shape_inference.infer_shapes(proto, check_type=True, data_prop=True)
        onnx.checker.check_model(typed)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        raise StageError(
            f"the converted graph breaks ONNX's rules: {first_line(error)}",
            where=where,
            remedy="keep the node that it names in float32: --keep NODE",
        ) from error
    return typed


def _serialized(proto: onnx.ModelProto, where: str) -> bytes:
    try:
        content: bytes = proto.SerializeToString()
    except (ValueError, EncodeError) as error:
        raise InputError(
            f"the model does not fit into one file: {first_line(error)}",
            where=where,
            remedy="ONNX files can have at most 2 GB; give a smaller model",
        ) from error
    return content


def measure_ranges(
    model: onnx.ModelProto, names: Collection[str], samples: Samples
) -> dict[str, float]:
    """max |x| of each named tensor over all samples, inf when any of it is not finite.

    The maximum is computed inside the graph: no activation outlives its last use, so that memory
    is that of one batch, however many samples there are.

    Raises:
        InputError: the samples do not fit the model, or there are none.
        StageError: ONNX Runtime cannot run the model.
    """
    if not names:
        return {}  # A graph without outputs does not run.
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    chosen = list(names)
    for index, name in enumerate(chosen):
        for kind in ("ReduceMin", "ReduceMax"):
            out = f"edgekd_{kind}_{index}"
            probe.graph.node.append(onnx.helper.make_node(kind, [name], [out], keepdims=0))
            probe.graph.output.append(
                onnx.helper.make_tensor_value_info(out, onnx.TensorProto.FLOAT, [])
            )
    largest = np.zeros(len(chosen))
    for outputs in _run(probe, samples):
        ends = np.array(list(outputs.values()), np.float64).reshape(len(chosen), 2)
        extremes = np.abs(ends).max(axis=1)
        extremes[~np.isfinite(extremes)] = np.inf
        # The least of no elements is beyond their largest.
        extremes[ends[:, 0] > ends[:, 1]] = 0
        largest = np.maximum(largest, extremes)
    return dict(zip(chosen, largest.tolist(), strict=True))


def _run(model: onnx.ModelProto, samples: Samples) -> Iterator[dict[str, Any]]:
    """The outputs of a model by name for each batch of samples, on the CPU without optimizations.

    Raises:
        InputError: the samples do not fit the model, or there are none.
        StageError: ONNX Runtime cannot run the model.
    """
    where = "samples for the 16-bit conversion"
    if not samples.count:
        raise InputError("there are no samples", where=where, remedy="give at least one")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model.SerializeToString())
        try:
            session = open_session(path, (CPU_PROVIDER,), 1, "disabled")
        except InputError as error:
            # The scratch file's path means nothing to the user.
            what = error.what.replace(f"Load model from {path} failed:", "")
            raise StageError(
                what.replace(str(path), "it"),
                where="the graph of the 16-bit conversion",
                remedy="convert it without samples, or keep the node that the message names in "
                "float32",
            ) from error
    fixed = fixed_batch(session)
    for batch in samples.batches(fixed or BATCH):
        yield outputs_of(session, model_inputs(session, batch, where, fixed), where)


def largest_difference(
    reference: onnx.ModelProto,
    converted: onnx.ModelProto,
    low: LowType,
    samples: Samples,
    names: Collection[str],
) -> float:
    """max |converted − reference| over all float outputs of all samples.

    Computed by :func:`rounded`, and for float16 also by running the model itself. That alone would
    not do: on the CPU, ONNX Runtime computes float16 in float32 and drops the casts between its
    nodes, so that what overflows elsewhere does not overflow there; bfloat16 it does not run.

    Args:
        reference: the float model.
        converted: the same in 16 bits.
        low: the type.
        samples: real inputs.
        names: the nodes of the float model, which an error can name.

    Raises:
        StageError: an output that is finite in float32 is not any more.
    """
    runs = [rounded(converted, low)[0], *([converted] if low.kind == "fp16" else [])]
    worst = 0.0
    for expected, *outputs in zip(*(_run(m, samples) for m in (reference, *runs)), strict=True):
        for name, wanted in expected.items():
            if not isinstance(wanted, np.ndarray) or wanted.dtype.kind != "f":
                continue
            finite = np.isfinite(wanted)
            for found in (each[name][finite] for each in outputs):
                if not np.isfinite(found).all():
                    raise _overflow(name, converted, low, samples, names)
                gap = np.abs(found.astype(np.float64) - wanted[finite])
                worst = max(worst, float(gap.max(initial=0.0)))
    return worst


def _overflow(
    output: str,
    converted: onnx.ModelProto,
    low: LowType,
    samples: Samples,
    names: Collection[str],
) -> StageError:
    """The error for an output that is no number any more, naming the first node to blame."""
    probe, makers = rounded(converted, low)
    ranges = measure_ranges(probe, list(makers), samples)
    order = {node.name: index for index, node in enumerate(converted.graph.node)}
    broken = [makers[tensor] for tensor, largest in ranges.items() if not np.isfinite(largest)]
    first = min(broken, key=lambda node: order.get(node, len(order)), default="")
    if first not in names:
        # An inserted cast: the node that needs 16 bits is the one to exclude.
        made = {out for node in converted.graph.node if node.name == first for out in node.output}
        first = next(
            (n.name for n in converted.graph.node if n.name in names and made & set(n.input)), first
        )
    return StageError(
        f"{output!r} is not finite any more in {low.name}; the first node to overflow is {first!r}",
        where="16-bit conversion",
        remedy=f"keep it in float32: --keep {first}; samples that show the largest activations "
        "find such nodes by themselves",
    )
