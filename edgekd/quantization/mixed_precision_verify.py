"""FP16 measured: ranges of tensors, overflow, and the rounded model against the float one."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from edgekd.errors import InputError, StageError
from edgekd.onnx.inference import session_layout, to_model
from edgekd.onnx.samples import Samples
from edgekd.onnx.session import CPU_PROVIDER, first_line, open_session
from edgekd.quantization.mixed_precision_rules import (
    FLOAT,
    LOW_TYPES,
    Kind,
    LowType,
    low_inputs,
    low_outputs,
)

Array = npt.NDArray[Any]

HEADROOM = 2.0
"""A safety margin for unseen data: activations may reach half of the range."""

BATCH = 16

_EACH_COUNTS = {
    **dict.fromkeys(("Div", "QuantizeLinear", "DequantizeLinear"), 1),
    **dict.fromkeys(("Sqrt", "Reciprocal"), 0),
}
"""Inputs whose small elements matter as much as the large ones: they divide, or are divided."""


def weight_fault(node: ir.Node, opset: int, low: LowType) -> str | None:
    """Why a weight of the node cannot be stored in 16 bits, None when all can."""
    attribute = node.attributes.get("value") if node.op_type == "ConstantOfShape" else None
    if attribute is not None:
        return _fault(attribute.as_tensor().numpy(), "its value", low, each=False)
    for position in sorted(low_inputs(node, opset, low)):
        value = node.inputs[position]
        if value is None or value.const_value is None:
            continue
        each = _EACH_COUNTS.get(node.op_type) == position
        fault = _fault(value.const_value.numpy(), f"its weight {value.name!r}", low, each=each)
        if fault is not None:
            return fault
    return None


def exceeds(node: ir.Node, low: LowType) -> bool:
    """Whether a constant of the node is a finite number beyond the range of the type."""
    constants = [v.const_value for v in node.inputs if v is not None and v.dtype == FLOAT]
    if node.op_type == "ConstantOfShape" and "value" in node.attributes:
        constants.append(node.attributes["value"].as_tensor())
    return any(_largest(c.numpy()) > low.largest for c in constants if c is not None)


def _largest(array: Array) -> float:
    finite = np.abs(array[np.isfinite(array)]) if array.dtype.kind == "f" else np.zeros(0)
    return float(finite.max()) if finite.size else 0.0


def _fault(array: Array, what: str, low: LowType, *, each: bool) -> str | None:
    largest = _largest(array)
    if largest > low.largest:
        return f"{what} reaches {largest:.3g}; {low.name} ends at {low.largest:.5g}"
    # Below the smallest normal number the spacing no longer shrinks with the number. What a
    # tensor loses there counts only when nothing in it is much larger.
    if 0 < largest < low.normal:
        return f"{what} is at most {largest:.3g}; {low.name} is exact down to {low.normal:.2g}"
    if each and bool(np.any((np.abs(array) < low.normal) & (array != 0))):
        return f"{what} has divisors too small for {low.name}"
    return None


def measured_fault(node: ir.Node, ranges: dict[str, float], opset: int, low: LowType) -> str | None:
    """The reason why an input or output of the node does not fit, None when all do."""
    values = [
        *(node.inputs[i] for i in sorted(low_inputs(node, opset, low))),
        *(node.outputs[i] for i in sorted(low_outputs(node, opset, low))),
    ]
    for value in values:
        largest = ranges.get(str(value.name)) if value is not None else None
        if value is None or largest is None or largest == 0:
            continue
        if not math.isfinite(largest):
            return f"{value.name!r} is not finite on the samples"
        if largest > low.largest / HEADROOM:
            return f"{value.name!r} reaches {largest:.3g} on the samples"
        if largest < low.normal:
            return f"{value.name!r} is at most {largest:.3g} on the samples"
    return None


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
    for answers in run_proto(probe, samples):
        ends = np.array(answers, dtype=np.float64).reshape(len(chosen), 2)
        extremes = np.abs(ends).max(axis=1)
        extremes[~np.isfinite(extremes)] = np.inf
        # The least of no elements is beyond their largest.
        extremes[ends[:, 0] > ends[:, 1]] = 0
        largest = np.maximum(largest, extremes)
    return dict(zip(chosen, largest.tolist(), strict=True))


def run_proto(model: onnx.ModelProto, samples: Samples) -> Iterator[list[Array]]:
    """All outputs of a model for each batch of samples, on the CPU without optimizations.

    A model with a fixed batch size gets batches of that size; one that is not full is padded
    by repeating its own samples.

    Raises:
        InputError: the samples do not fit the model, or there are none.
        StageError: ONNX Runtime cannot run the model.
    """
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
    inputs = session.get_inputs()
    layout = session_layout(session)
    fixed = layout.size
    ran = False
    for batch in samples.batches(fixed or BATCH):
        missing = [i.name for i in inputs if i.name not in batch]
        if missing:
            raise InputError(
                f"the samples have no {missing[0]!r}; they have {', '.join(sorted(batch))}",
                where="samples for the 16-bit conversion",
                remedy="name the arrays as the model's inputs",
            )
        feeds = {
            i.name: batch[i.name].astype(np.float16)
            if i.type == "tensor(float16)"
            else batch[i.name]
            for i in inputs
        }
        if fixed is not None:
            feeds = {n: np.resize(array, (fixed, *array.shape[1:])) for n, array in feeds.items()}
        try:
            answers = session.run(None, to_model(layout, feeds))
        except Exception as error:  # the runtime's own exception classes have no public base
            raise StageError(
                f"ONNX Runtime cannot run the model on the samples: {first_line(error)}",
                where="samples for the 16-bit conversion",
                remedy="give samples with the shapes and types that the model expects",
            ) from error
        ran = True
        yield [np.asarray(answer) for answer in answers]
    if not ran:
        raise InputError(
            "there are no samples",
            where="samples for the 16-bit conversion",
            remedy="give at least one",
        )


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
    outputs = [value.name for value in reference.graph.output]
    worst = 0.0
    for answers in zip(*(run_proto(m, samples) for m in (reference, *runs)), strict=True):
        for name, wanted, *others in zip(outputs, *answers, strict=True):
            if wanted.dtype.kind != "f":
                continue
            finite = np.isfinite(wanted)
            for found in others:
                if not bool(np.all(np.isfinite(found[finite]))):
                    raise _overflow(name, converted, low, samples, names)
                gap = np.abs(found[finite].astype(np.float64) - wanted[finite])
                worst = max(worst, float(gap.max(initial=0.0)))
    return worst


def rounded(converted: onnx.ModelProto, low: LowType) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The same computation in float32, with every 16-bit tensor rounded to its 16 bits.

    That is what hardware with float32 accumulators computes, and any runtime can run it. Also
    returns the node of ``converted`` that makes each rounded tensor.
    """
    model = ir.from_proto(converted)
    graph = model.graph
    for weight in graph.initializers.values():
        if weight.dtype == low.dtype and weight.const_value is not None:
            array = weight.const_value.numpy().astype(np.float32)
            weight.const_value = ir.Tensor(array, name=weight.name)
            weight.type = ir.TensorType(FLOAT)
    makers: dict[str, str] = {}
    made = [v for node in list(graph) for v in node.outputs if v.dtype == low.dtype]
    for value in (*(v for v in graph.inputs if v.dtype == low.dtype), *made):
        name = f"{value.name}/float32"
        uses = list(value.uses())
        producer = value.producer()
        added = []
        # A cast from float32 rounds already, and its input keeps one name.
        source = producer.inputs[0] if producer and producer.op_type == "Cast" else None
        lowered = value
        if source is None or source.dtype != FLOAT:
            value.type = ir.TensorType(FLOAT)
            added = [ir.node("Cast", [value], {"to": int(low.dtype)})]
            lowered = added[0].outputs[0]
            lowered.name = f"{value.name}/{low.name}"
        wide = ir.node("Cast", [lowered], {"to": int(FLOAT)})
        wide.outputs[0].name, wide.outputs[0].type = name, ir.TensorType(FLOAT)
        wide.outputs[0].shape = value.shape
        if producer is None:
            graph.insert_before(graph[0], [*added, wide])
        else:
            if added and producer.op_type == "Cast":
                producer.attributes["to"] = ir.AttrInt64("to", int(FLOAT))
            graph.insert_after(producer, [*added, wide])
            makers[name] = str(producer.name)
        for node, index in uses:
            node.replace_input_with(index, wide.outputs[0])
        for index, output in enumerate(graph.outputs):
            if output is value:
                value.name, wide.outputs[0].name = name, value.name
                makers[str(output.name)] = makers.pop(name, "")
                graph.outputs[index] = wide.outputs[0]
    return ir.to_proto(model), makers


def write_rounded(path: Path, out: Path, kind: Kind) -> None:
    """:func:`rounded` of a file, as a file that any runtime can run."""
    model, _ = rounded(onnx.load(str(path)), LOW_TYPES[kind])
    onnx.save(model, str(out))


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
