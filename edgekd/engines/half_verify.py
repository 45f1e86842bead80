"""Does the 16-bit model give the float model's answers, and if not, where does it overflow?"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from edgekd.engines.half_ranges import measure_ranges, run_proto
from edgekd.engines.half_rules import FLOAT, LOW_TYPES, Kind, LowType
from edgekd.engines.samples import Samples
from edgekd.errors import StageError


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
    gives the node of ``converted`` that makes each rounded tensor.
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
        # A cast from float32 rounds as it is, and what it reads keeps one name.
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
        # An inserted cast: the node that asked for 16 bits is the one to keep.
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
