"""The extremes of tensors inside a model on real samples; a NaN or an infinity is an error."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from edgekd.engines.batched_run import run_batch
from edgekd.engines.quantize.prepare import save_onnx
from edgekd.engines.samples import Array
from edgekd.engines.session import CPU_PROVIDER, open_session
from edgekd.errors import InputError

Ranges = dict[str, tuple[float, float]]


class Extremes:
    """The lowest and the highest value of tensors over as many batches as come.

    They are reduced inside the model: no tensor leaves it, however large.

    Args:
        model: a float model in one file, with the types of its tensors; opset 13 or later.
        tensors: their names; those without a float type are left out.
        scratch: a folder for the model with further outputs.
        threads: of the session.
        source: the file that the model was prepared from, for errors.
    """

    def __init__(
        self, model: Path, tensors: Collection[str], scratch: Path, threads: int, source: Path
    ) -> None:
        proto = onnx.load(str(model))
        self._source = source
        types = _float_tensors(proto.graph, tensors)
        self.tensors = tuple(types)
        self._outputs = [_add_probes(proto.graph, name, kind) for name, kind in types.items()]
        augmented = scratch / "extremes.onnx"
        save_onnx(proto, augmented)
        self._session = open_session(augmented, (CPU_PROVIDER,), threads, "disabled")
        self.ranges: Ranges = {}

    def elements(self, inputs: Mapping[str, Array]) -> int:
        """How many values the tensors hold together when the model runs on these inputs."""
        return sum(int(size) for _, _, _, size in self._run(inputs))

    def add(self, inputs: Mapping[str, Array], on: str) -> None:
        """Take one batch; ``on`` says which samples it is, for an error.

        Raises:
            InputError: a tensor becomes NaN or infinite.
        """
        for name, (low, high, some_nan, _) in zip(self.tensors, self._run(inputs), strict=True):
            # A reduction may pass over a NaN, and then says nothing of it.
            if some_nan or not (math.isfinite(low) and math.isfinite(high)):
                raise InputError(
                    f"tensor {name!r} of the float model becomes NaN or infinite on {on}",
                    where=str(self._source),
                    remedy="leave those samples out, or check their preprocessing and the float "
                    "model first; samples are counted from 0",
                )
            lowest, highest = self.ranges.get(name, (math.inf, -math.inf))
            self.ranges[name] = (min(lowest, float(low)), max(highest, float(high)))

    def _run(self, inputs: Mapping[str, Array]) -> list[list[Array]]:
        """(lowest, highest, whether any is NaN, number of values) of each tensor."""
        names = [name for four in self._outputs for name in four]
        values = run_batch(self._session, names, inputs, self._source)
        return [values[i : i + 4] for i in range(0, len(values), 4)]


def _float_tensors(graph: onnx.GraphProto, tensors: Collection[str]) -> dict[str, int]:
    """Element types by name."""
    weights = {tensor.name for tensor in graph.initializer}
    values = (*graph.input, *graph.value_info, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
    named = sorted(set(tensors) - weights)
    return {name: types[name] for name in named if types.get(name) in floats}


def _add_probes(graph: onnx.GraphProto, name: str, kind: int) -> list[str]:
    """Outputs that tell about one tensor, in the order of :meth:`Extremes._run`."""
    low, high, nan, size = (f"{name}/edgekd/{what}" for what in ("low", "high", "nan", "size"))
    graph.node.extend(
        [
            helper.make_node("ReduceMin", [name], [low], keepdims=0),
            helper.make_node("ReduceMax", [name], [high], keepdims=0),
            helper.make_node("IsNaN", [name], [f"{nan}/each"]),
            helper.make_node("Cast", [f"{nan}/each"], [f"{nan}/bytes"], to=TensorProto.UINT8),
            helper.make_node("ReduceMax", [f"{nan}/bytes"], [nan], keepdims=0),
            helper.make_node("Size", [name], [size]),
        ]
    )
    types = ((low, kind), (high, kind), (nan, TensorProto.UINT8), (size, TensorProto.INT64))
    graph.output.extend(helper.make_tensor_value_info(output, of, []) for output, of in types)
    return [low, high, nan, size]
