"""Split an output into parts: values of one scale, scores, decisions.

A single figure over an output of boxes in pixels and scores in [0, 1] is a figure of the boxes.
Parts are found from the graph (the inputs of the Concat that makes an output, behind operators
that only move values) and, where that is inconclusive, from the values: channels whose largest
values are far from those of others.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekd.errors import InputError, StageError
from edgekd.onnx.file import read_onnx
from edgekd.onnx.graph import ProbedModel, tensor_types
from edgekd.onnx.inference import first_batch, is_ragged, run_batch
from edgekd.onnx.samples import Array, Samples
from edgekd.onnx.session import CPU_PROVIDER, open_session

Kind = Literal["values", "scores", "decisions"]

APART = 20.0
"""Ratio of largest values above which channels have separate scales: a common 8-bit one would
leave the smaller ones a dozen steps."""
MOST_PARTS = 16
"""A Concat of more inputs than this is not split into them."""
_LEAST_SHARE = 1 / 64
"""Smallest number of channels that form a part of their own scale; fewer are outliers."""
_MOST_CHANNELS = 4096
_IR = 8

MOVES = frozenset(
    {
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators that pass on values of their first input (Concat: of all) unchanged."""

_UNIT = {"Sigmoid", "Softmax", "HardSigmoid"}
# Operators that map numbers in [0, 1] to numbers in [0, 1].
_WITHIN_UNIT = {"Mul", "Min", "Max", "ReduceMax", "ReduceMin", "ReduceMean", "MaxPool", "Clip"}
_NUMBERS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}


@dataclass(frozen=True, eq=False)
class Part:
    """Values of an output that are compared together.

    Attributes:
        name: the tensor that they come from, or the channels; empty for the complete output.
        positions: which values of one sample, flattened, (size,) int64; None is all.
        kind: ``values`` have an error relative to their size; ``scores`` are in [0, 1] and also
            decide by a threshold; ``decisions`` (classes, indices, flags) are the same or not.
        sets: each sample has a set of its own size; values that neither model has are not counted.
    """

    name: str
    positions: Array | None
    kind: Kind
    sets: bool = False


def find_parts(
    path: Path,
    samples: Samples,
    outputs: Mapping[str, Array],
    output_axes: Mapping[str, int | None] = MappingProxyType({}),
) -> dict[str, tuple[Part, ...]]:
    """The parts of each output of a float model; an output of one piece has one part.

    Args:
        path: the float model.
        samples: its real inputs; the first ones are run again where a Concat makes an output.
        outputs: the model's outputs for the first samples, (n, …) by output name.
        output_axes: where an output counts samples in the model, if not on the first axis.

    Raises:
        InputError, StageError: the model does not run on the samples.
    """
    graph = _Makers(read_onnx(path))
    found: dict[str, tuple[Part, ...]] = {}
    for name, values in outputs.items():
        if is_ragged(values):
            numbers = values[0].dtype.kind == "f"
            found[name] = (Part("", None, "values" if numbers else "decisions", sets=True),)
            continue
        if values.dtype.kind != "f" or graph.from_integers(name):
            kind: Kind = "decisions" if graph.decides(name) else "values"
            found[name] = (Part("", None, kind),)
            continue
        parts = _by_concat(path, graph, samples, name, values, output_axes)
        # An output may be one piece of a joined tensor.
        unit = graph.unit(name) or (len(parts) == 1 and graph.unit(parts[0].name))
        if len(parts) < 2:
            parts = [] if unit else _by_scale(values)
        kind = "scores" if unit and values.ndim > 2 else "values"
        found[name] = tuple(parts) if len(parts) > 1 else (Part("", None, kind),)
    return found


class _Makers:
    """The node that makes a tensor, and the kind of values by its operator."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model, self.graph = model, model.graph
        self.opsets = list(model.opset_import)
        self.maker = {name: node for node in self.graph.node for name in node.output if name}
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}

    @cached_property
    def _types(self) -> dict[str, int]:
        return tensor_types(self._model)

    def data(self, node: onnx.NodeProto) -> list[str]:
        """The inputs whose values a moving node passes on."""
        return list(node.input) if node.op_type == "Concat" else list(node.input[:1])

    def moves(self, name: str) -> onnx.NodeProto | None:
        """The node that makes a tensor, if it only moves values."""
        node = self.maker.get(name)
        ours = node is not None and node.domain in ("", "ai.onnx") and node.op_type in MOVES
        return node if ours else None

    def sources(self, name: str) -> list[str]:
        """The tensors that the values of one come from, before nodes that only move them; in the
        order of the Concats, each once."""
        found: dict[str, None] = {}
        todo = [name]
        while todo:
            tensor = todo.pop()
            node = self.moves(tensor)
            if node is None:
                found.setdefault(tensor)
            else:
                todo += reversed(self.data(node))
        return list(found)

    def tail(self, name: str) -> list[onnx.NodeProto]:
        """The moving nodes between the sources and a tensor, in graph order."""
        seen: set[str] = set()
        todo = [name]
        while todo:
            tensor = todo.pop()
            node = self.moves(tensor)
            if node is not None and tensor not in seen:
                seen.update(node.output)
                todo += self.data(node)
        return [node for node in self.graph.node if seen & set(node.output)]

    def unit(self, name: str) -> bool:
        """Whether all values come from an operator whose results are in [0, 1]."""
        known: dict[str, bool] = {}

        def within(tensor: str) -> bool:
            if tensor not in known:
                known[tensor] = False  # for a loop, which no valid graph has
                node = self.maker.get(tensor)
                if node is not None and node.op_type in _UNIT:
                    known[tensor] = True
                elif node is not None and (node.op_type in _WITHIN_UNIT or self.moves(tensor)):
                    joins = node.op_type in ("Mul", "Min", "Max")
                    taken = node.input if joins else self.data(node)
                    known[tensor] = all(within(t) for t in taken)
            return known[tensor]

        return within(name)

    def decides(self, name: str) -> bool:
        """Whether an output that is not floating point is a choice; not where it is a number that
        was rounded at last (an image in 8 bits)."""
        types = self._types
        seen: set[str] = set()
        todo = [name]
        while todo:
            tensor = todo.pop()
            node = self.maker.get(tensor)
            if node is None or tensor in seen:
                continue
            seen.add(tensor)
            if node.op_type == "QuantizeLinear":
                return False
            moves = self.moves(tensor) is not None
            if types.get(tensor) in _NUMBERS and node.op_type != "Cast" and not moves:
                return False
            if moves or node.op_type == "Cast":
                todo += self.data(node)
        return True

    def from_integers(self, name: str) -> bool:
        """Whether all values of a floating-point output were integers before (classes that an
        export writes as floats)."""
        makers = [self.maker.get(source) for source in self.sources(name)]
        if not makers or any(node is None or node.op_type != "Cast" for node in makers):
            return False
        types = self._types
        given = {types.get(node.input[0], 0) for node in makers if node is not None}
        return not given & {*_NUMBERS, 0}


def _by_concat(
    path: Path,
    graph: _Makers,
    samples: Samples,
    name: str,
    values: Array,
    output_axes: Mapping[str, int | None],
) -> list[Part]:
    """One part for each input of the Concats that make an output."""
    sources = [s for s in graph.sources(name) if s not in graph.constants]
    if not 2 <= len(sources) <= MOST_PARTS or values.ndim < 2:
        return []
    labels = _traced(path, graph, samples, name, sources, output_axes)
    if labels is None or labels.shape != values.shape[1:]:
        return []
    flat = labels.reshape(-1)
    first = values.reshape(len(values), -1)
    parts = []
    for number, source in enumerate(sources, 1):
        positions = np.flatnonzero(flat == number)
        if len(positions):
            scores = graph.unit(source) or _like_scores(first[:, positions], first)
            parts.append(Part(source, positions, "scores" if scores else "values"))
    return parts


def _like_scores(part: Array, whole: Array) -> bool:
    """Whether values are in [0, 1] while others are far larger."""
    finite = part[np.isfinite(part)]
    if not finite.size or finite.min() < 0 or finite.max() > 1:
        return False
    return float(np.abs(whole[np.isfinite(whole)]).max()) > APART * float(finite.max())


def _traced(
    path: Path,
    graph: _Makers,
    samples: Samples,
    name: str,
    sources: Sequence[str],
    output_axes: Mapping[str, int | None],
) -> Array | None:
    """The source of each value of a sample: the source's number from 1, in the output's
    shape; None where it is unknown.

    The nodes that move values are run on numbers in place of the sources' values.
    """
    nodes = graph.tail(name)
    sides = {
        side
        for node in nodes
        for side in node.input
        if side and side not in graph.data(node) and side not in graph.constants
    }
    wanted = [*sources, *sorted(sides)]
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        session = ProbedModel(path, Path(folder) / "probed").open(wanted)
        inputs = first_batch(session, samples, path, 1)
        tensors = dict(zip(wanted, run_batch(session, wanted, inputs, path), strict=True))
        if any(not _is_float(tensors[source]) for source in sources):
            return None
        for number, source in enumerate(sources, 1):
            tensors[source] = np.full_like(tensors[source], number)
        tail = Path(folder) / "tail.onnx"
        onnx.save(_tail_model(graph, nodes, tensors, name), tail)
        try:
            session = open_session(tail, (CPU_PROVIDER,), 1, "disabled")
            (traced,) = run_batch(session, [name], tensors, tail)
        except (InputError, StageError):
            # A tail that does not run by itself; the parts are then found by the output's scales.
            return None
    axis = output_axes.get(name, 0)
    sample = traced[0] if axis is None or traced.ndim == 0 else np.moveaxis(traced, axis, 0)[0]
    labels: Array = np.rint(sample).astype(np.int64)
    return labels


def _is_float(values: Any) -> bool:
    return isinstance(values, np.ndarray) and values.dtype.kind == "f"


def _tail_model(
    graph: _Makers, nodes: Sequence[onnx.NodeProto], tensors: Mapping[str, Array], name: str
) -> onnx.ModelProto:
    """A model of the nodes that move values, with ``tensors`` as its inputs."""
    given = {name for node in nodes for name in node.input}
    constants = {name: tensor for name, tensor in graph.constants.items() if name in given}
    for constant in set(graph.sources(name)) & constants.keys():
        # Values joined to the outputs that are no source: they have no number.
        joined = constants[constant]
        zeros = np.zeros(joined.dims, helper.tensor_dtype_to_np_dtype(joined.data_type))
        constants[constant] = numpy_helper.from_array(zeros, constant)
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in tensors.items()
    ]
    outputs = [onnx.ValueInfoProto(name=name)]
    tail = helper.make_graph(nodes, "tail", inputs, outputs, list(constants.values()))
    return helper.make_model(tail, opset_imports=graph.opsets, ir_version=_IR)


def _by_scale(values: Array) -> list[Part]:
    """Parts along the axis whose channels' largest values are furthest apart; none where they are
    of one scale."""
    if values.ndim < 2 or not values.size:
        return []
    with np.errstate(invalid="ignore"):
        size = np.nan_to_num(np.abs(values.astype(np.float64)), nan=0.0, posinf=0.0).max(axis=0)
    best: tuple[float, int, list[Array]] | None = None
    for axis in range(size.ndim):
        if not 2 <= size.shape[axis] <= _MOST_CHANNELS:
            continue
        others = tuple(a for a in range(size.ndim) if a != axis)
        gap, groups = _clusters(size.max(axis=others))
        if len(groups) > 1 and (best is None or gap > best[0]):
            best = gap, axis, groups
    if best is None:
        return []
    _, axis, groups = best
    numbers = np.arange(size.size).reshape(size.shape)
    whole = values.reshape(len(values), -1)
    parts = []
    for group in sorted(groups, key=lambda group: int(group[0])):
        positions = np.take(numbers, group, axis=axis).reshape(-1)
        kind: Kind = "scores" if _like_scores(whole[:, positions], whole) else "values"
        parts.append(Part(f"[{_ranges(group)}] of axis {axis + 1}", np.sort(positions), kind))
    return parts


def _clusters(peaks: Array) -> tuple[float, list[Array]]:
    """Channels of one scale each, and the widest gap between two scales.

    Channels of zeros have no scale; they go with the smallest.
    """
    order = np.argsort(peaks, kind="stable")
    least = max(1, math.ceil(len(peaks) * _LEAST_SHARE))
    positive = order[peaks[order] > 0]
    cuts: list[int] = []
    widest = 1.0
    for place in range(1, len(positive)):
        gap = float(peaks[positive[place]] / peaks[positive[place - 1]])
        here = place - (cuts[-1] if cuts else 0)
        if gap >= APART and here >= least and len(positive) - place >= least:
            cuts.append(place)
            widest = max(widest, gap)
    groups = [np.sort(group) for group in np.split(positive, cuts)] if len(positive) else []
    zeros = order[peaks[order] == 0]
    if groups and len(zeros):
        smallest = min(groups, key=lambda group: float(peaks[group].max()))
        groups = [np.sort([*g, *zeros]) if g is smallest else g for g in groups]
    return widest, groups


def _ranges(numbers: Iterable[int]) -> str:
    """Channel numbers in a few characters: ``0-3,7``."""
    text = []
    for _, run in groupby(enumerate(map(int, numbers)), lambda pair: pair[1] - pair[0]):
        consecutive = [number for _, number in run]
        first, last = consecutive[0], consecutive[-1]
        text.append(str(first) if first == last else f"{first}-{last}")
    return ",".join(text[:4]) + (",…" if len(text) > 4 else "")
