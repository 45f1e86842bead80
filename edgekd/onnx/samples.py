"""Samples for an ONNX model: the interface, arrays, and random inputs where there are none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
import onnx.inliner
import onnxruntime

from edgekd.errors import InputError, StageError
from edgekd.onnx.file import UNKNOWN_RANK
from edgekd.onnx.session import first_line
from edgekd.spec import ModelSpec

Array = npt.NDArray[Any]


class Samples(Protocol):
    """The inputs of a model by name, preprocessed as the model expects them."""

    @property
    def count(self) -> int:
        """The number of samples."""
        ...

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """All samples in their order, ``size`` at a time (the last batch may be smaller).

        Each call starts from the first sample. Arrays are (size, …), inputs by name.
        """
        ...


class ArraySamples:
    """Samples that are in memory already: arrays (N, …) by input name."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = {name: np.asarray(array) for name, array in arrays.items()}

    @property
    def count(self) -> int:
        """The number of samples."""
        return min((len(array) for array in self._arrays.values()), default=0)

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """Batches of inputs by name, at most the limit in total."""
        for start in range(0, self.count, size):
            yield {
                name: array[start : min(start + size, self.count)]
                for name, array in self._arrays.items()
            }


def is_mask(values: Array) -> bool:
    """Whether floats are 0 or below, including -inf: a mask that is added before a softmax to
    exclude places out. Other infinities, and NaN, are broken data."""
    return values.dtype.kind == "f" and bool((values <= 0).all())


TRIED_SIZES = (1, 16, 128, 512)
"""Trial sizes of symbolic dimensions other than the batch when no samples are given."""


def random_inputs(spec: ModelSpec, size: int = 1, seed: int = 0) -> dict[str, Array]:
    """Inputs of the right shapes for a model about which nothing else is known.

    Floats are standard normal, all else is zero. The first input is treated as the data and later
    ones for its state: symbolic dimensions of the first input but its first one (the batch) are
    ``size`` wherever they occur, all others are 1.

    Raises:
        InputError: an input has no known number of dimensions, or strings.
    """
    random = np.random.default_rng(seed)
    free = {d for tensor in spec.inputs[:1] for d in tensor.shape[1:] if isinstance(d, str)}
    inputs: dict[str, Array] = {}
    for tensor in spec.inputs:
        if tensor.dtype == "string" or UNKNOWN_RANK in tensor.shape:
            raise InputError(
                f"no random input for {tensor}",
                where=tensor.name,
                remedy="give samples",
            )
        shape = tuple(d if isinstance(d, int) else size if d in free else 1 for d in tensor.shape)
        floating = "float" in tensor.dtype
        values = random.standard_normal(shape) if floating else np.zeros(shape)
        inputs[tensor.name] = np.asarray(values).astype(tensor.dtype)
    return inputs


def outputs_of_random_inputs(
    session: onnxruntime.InferenceSession, spec: ModelSpec, path: Path
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Random inputs of the first size that the model can run, and its outputs for them.

    Raises:
        InputError: as :func:`random_inputs`.
        StageError: the model runs with none of :data:`TRIED_SIZES`.
    """
    failure: StageError | None = None
    for size in TRIED_SIZES:
        inputs = random_inputs(spec, size)
        try:
            return inputs, answers_of(session, inputs, path)
        except StageError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def answers_of(
    session: onnxruntime.InferenceSession, inputs: Mapping[str, Array], path: Path
) -> dict[str, Array]:
    """A model's outputs by name.

    Raises:
        StageError: it does not run on these inputs.
    """
    names = [output.name for output in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))
    except Exception as error:  # the runtime's own exception classes have no public base
        shapes = ", ".join(f"{name} {value.shape}" for name, value in inputs.items())
        raise StageError(
            f"the model does not run on {shapes}: {first_line(error)}",
            where=str(path),
            remedy="give samples of the shapes that the model expects",
        ) from error


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
