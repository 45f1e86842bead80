"""The error of each layer of a quantized or half-precision model on real samples.

A quantized model preserves the names of the float model's tensors; a layer here is the node, or the
nodes folded into one, between tensors that both models have.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from edgekd.errors import InputError
from edgekd.onnx.error_metrics import ErrorSums
from edgekd.onnx.file import read_onnx
from edgekd.onnx.graph import ProbedModel, reads
from edgekd.onnx.inference import batch_size, fixed_batch, model_inputs, run_batch
from edgekd.onnx.samples import Array, Samples

MEMORY_BYTES = 256 << 20
"""Memory limit of the compared tensors of both models; beyond it they are compared in
groups, each of which costs another pass over the samples."""
_PROBED = 32  # tensors whose size is looked at in one run
_CHUNK = 1 << 20  # values compared at a time in float64
_FLOATS = {"tensor(float)", "tensor(float16)", "tensor(double)"}


@dataclass(frozen=True)
class LayerError:
    """One layer of the float model, a node or several that the candidate folded into one.

    ``node`` is the one that has the weights, ``op`` names all operators (``Conv+Relu``). A model
    input that the candidate rounds is a row of its own, with an empty ``node`` and the op
    ``Input``. ``tensor`` is the layer's output; where the candidate quantizes it, it is read
    after dequantization, as the next layer sees it.

    With p the float model's and o the candidate's values of all samples, ``relative`` =
    √(Σ(o − p)² / Σp²); ``sqnr_db`` = −20·log₁₀ of it, None without any error or signal. ``own`` =
    √(relative² − the worst input's relative²), 0 where the error does not grow: the powers of
    independent errors add up, so this is what the layer itself brings in. Where a value is NaN or
    infinite on one side only, ``finite`` is false and ``relative`` None; ``own`` is None for the
    first such layer, whose fault it is, and 0 for those after it.
    """

    node: str
    op: str
    tensor: str
    relative: float | None
    sqnr_db: float | None
    own: float | None
    finite: bool

    def to_json(self) -> dict[str, Any]:
        """A plain mapping for a JSON file."""
        return asdict(self)


def layer_errors(
    reference: Path,
    candidate: Path,
    samples: Samples,
    *,
    batch: int = 64,
    limit: int = 256,
    memory_bytes: int = MEMORY_BYTES,
) -> tuple[LayerError, ...]:
    """The error of every float tensor that both models have, in the order of the float graph.

    Both models run on the CPU without optimizations, which would fuse the tensors away.

    Args:
        reference: the float model.
        candidate: derived from it with unchanged tensor names, by ONNX Runtime's quantizer
            or by a conversion to 16 bits.
        samples: real inputs.
        batch: samples run at a time; fewer where activations are large, the model's own number
            where that is fixed.
        limit: batches are read until they have this many samples: a layer's error is a mean over
            all its values, and known after a few samples.
        memory_bytes: see :data:`MEMORY_BYTES`.

    Raises:
        InputError: no layer has the same output tensor in both models, they have different fixed
            batch sizes, or cannot be opened or run on the samples.
        StageError: a model fails while it runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        graph = LayerGraph(read_onnx(reference).graph)
        first = ProbedModel(reference, Path(folder) / "reference")
        second = ProbedModel(candidate, Path(folder) / "candidate")
        both = _Both(first, second, _pairs(graph, first, second))
        size, rows = _common_size(first, second, samples, min(batch, limit))
        sizes = both.sizes(samples, rows)
        if not any(tensor in graph.maker for tensor in sizes):
            raise InputError(
                f"no layer of {candidate.name} gives a float tensor of {reference.name}",
                where=str(candidate),
                remedy="compare it with the float model that it was made from: names are the link",
            )
        if rows is None:
            size = max(1, min(size, memory_bytes // max(sum(sizes.values()), 1)))
        sums: dict[str, ErrorSums] = {}
        for group in _groups(sizes, memory_bytes // size):
            sums |= both.measure(group, samples, size, rows, limit)
    return tuple(_layer(tensor, graph, sums) for tensor in graph.order if tensor in sums)


class _Both:
    """The two models on the same samples: ``pairs`` has each tensor's name in both."""

    def __init__(
        self, first: ProbedModel, second: ProbedModel, pairs: Mapping[str, tuple[str, str]]
    ) -> None:
        self._models, self._pairs = (first, second), pairs

    def sizes(self, samples: Samples, rows: int | None) -> dict[str, int]:
        """Bytes per sample of each tensor in both models; those of different shapes are excluded.

        Looked at with one batch, as small as can be, and a few tensors at a time.
        """
        batch = next(samples.batches(rows or 1))
        found = {}
        names = list(self._pairs)
        for start in range(0, len(names), _PROBED):
            for name, p, o in self._run(names[start : start + _PROBED], [batch], rows):
                if p.shape == o.shape:
                    found[name] = (p.nbytes + o.nbytes) // (rows or 1)
        return found

    def measure(
        self, names: Sequence[str], samples: Samples, size: int, rows: int | None, limit: int
    ) -> dict[str, ErrorSums]:
        """The errors of some tensors over the samples."""
        sums = {name: ErrorSums() for name in names}
        for name, p, o in self._run(names, _until(samples.batches(size), limit), rows):
            flat, other = p.reshape(1, p.size), o.reshape(1, o.size)
            for start in range(0, p.size, _CHUNK):
                part = slice(start, start + _CHUNK)
                sums[name].add(flat[:, part], other[:, part])
        return sums

    def _run(
        self, names: Sequence[str], batches: Iterable[dict[str, Array]], rows: int | None
    ) -> Iterator[tuple[str, Array, Array]]:
        wanted = [[self._pairs[name][side] for name in names] for side in (0, 1)]
        sessions = [m.open(w) for m, w in zip(self._models, wanted, strict=True)]
        for batch in batches:
            outputs = [
                run_batch(s, w, model_inputs(s, batch, m.path, rows), m.path)
                for s, w, m in zip(sessions, wanted, self._models, strict=True)
            ]
            yield from zip(names, *outputs, strict=True)


def _pairs(
    graph: LayerGraph, first: ProbedModel, second: ProbedModel
) -> dict[str, tuple[str, str]]:
    """The float tensors that both models have: the names of each in the one and in the other."""
    common = [name for name in graph.order if name in second.tensors]
    seen = seen_tensors(second.graph)
    pairs = {name: (name, seen.get(name, name)) for name in common}
    for name in common:
        # An input that the candidate does not round has no error.
        if name not in graph.maker and pairs[name][1] == name:
            del pairs[name]
    floats = [
        {value.name for value in model.open(names).get_outputs() if value.type in _FLOATS}
        for model, names in ((first, pairs), (second, {read for _, read in pairs.values()}))
    ]
    return {n: pair for n, pair in pairs.items() if pair[0] in floats[0] and pair[1] in floats[1]}


def _common_size(
    first: ProbedModel, second: ProbedModel, samples: Samples, batch: int
) -> tuple[int, int | None]:
    """How many samples both models can run at a time, and the batch size that one fixes."""
    sessions = {model.path: model.open() for model in (first, second)}
    sizes = [batch_size(s, samples, batch, path) for path, s in sessions.items()]
    fixed = {size for s in sessions.values() if (size := fixed_batch(s)) is not None}
    if len(fixed) > 1:
        raise InputError(
            f"one model takes batches of {min(fixed)} only, the other of {max(fixed)}",
            where=str(second.path),
            remedy="make the one from the other, or export both with a dynamic batch",
        )
    return next(iter(fixed), min(sizes)), next(iter(fixed), None)


def _groups(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """The tensors in groups of at most ``limit`` bytes per sample, a larger one by itself."""
    group: list[str] = []
    total = 0
    for name, size in sizes.items():
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    if group:
        yield group


def _until(batches: Iterator[dict[str, Array]], limit: int) -> Iterator[dict[str, Array]]:
    count = 0
    for batch in batches:
        yield batch
        count += len(next(iter(batch.values())))
        if count >= limit:
            return


def _layer(tensor: str, graph: LayerGraph, sums: Mapping[str, ErrorSums]) -> LayerError:
    nodes, sources = graph.between(tensor, sums)
    found = sums[tensor]
    return LayerError(
        node=graph.weighted(nodes),
        op=operators([node.op_type for node in nodes]),
        tensor=tensor,
        relative=found.relative,
        sqnr_db=found.sqnr_db,
        own=_own(found, [sums[source] for source in sources]),
        finite=not found.not_finite,
    )


def _own(found: ErrorSums, sources: Sequence[ErrorSums]) -> float | None:
    before = [source.relative for source in sources]
    if any(error is None for error in before):
        return 0.0
    if found.relative is None:
        return None
    worst = max((error for error in before if error is not None), default=0.0)
    return math.sqrt(max(0.0, found.relative**2 - worst**2))


_HALVES = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}

_SHOWN = 3  # operators of one layer that are spelt out


class LayerGraph:
    """Which node of a float model makes a tensor, and what that is made from.

    ``order`` has all activations, the inputs first; ``maker`` the node of each that is no input.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) > 1}
        filled = {tensor.name for tensor in graph.initializer}
        self.order = [value.name for value in graph.input if value.name not in filled]
        self.maker: dict[str, onnx.NodeProto] = {}
        live = set(self.order)
        for node in graph.node:
            # A tensor that no input reaches is a weight in disguise, not an activation.
            if live & reads(node):
                made = [name for name in node.output if name]
                live.update(made)
                self.maker |= dict.fromkeys(made, node)
                self.order += made

    def weighted(self, nodes: Sequence[onnx.NodeProto]) -> str:
        """The name of the first node with a matrix of weights, else of the last one."""
        with_weights = [node for node in nodes if self._matrices & set(node.input)]
        node = next(iter(with_weights or nodes[-1:]), onnx.NodeProto())
        return node.name or next(iter(node.output), "")

    def between(self, tensor: str, known: Container[str]) -> tuple[list[onnx.NodeProto], set[str]]:
        """The nodes that make a tensor, in graph order, and the known tensors they start from."""
        needed: set[str] = set()
        sources: set[str] = set()
        todo = [tensor]
        while todo:
            name = todo.pop()
            if name not in self.maker or name in needed:
                continue
            needed.add(name)
            taken = sorted(reads(self.maker[name]))
            sources.update(other for other in taken if other in known)
            todo += [other for other in taken if other not in known]
        nodes: dict[str, onnx.NodeProto] = {}
        for name in self.order:
            if name in needed:
                node = self.maker[name]
                nodes.setdefault(next(out for out in node.output if out), node)
        return list(nodes.values()), sources


def seen_tensors(graph: onnx.GraphProto) -> dict[str, str]:
    """By tensor: the one that its consumers read, after Q and DQ or a cast to 16 bits, which may
    be cast back again."""
    seen: dict[str, str] = {}
    quantized: dict[str, str] = {}
    halved: dict[str, str] = {}
    for node in graph.node:
        to = next((a.i for a in node.attribute if a.name == "to"), None)
        if node.op_type == "QuantizeLinear":
            quantized[node.output[0]] = node.input[0]
        elif node.op_type == "DequantizeLinear" and node.input[0] in quantized:
            seen.setdefault(quantized[node.input[0]], node.output[0])
        elif node.op_type == "Cast" and to in _HALVES:
            if seen.setdefault(node.input[0], node.output[0]) == node.output[0]:
                halved[node.output[0]] = node.input[0]
        elif node.op_type == "Cast" and node.input[0] in halved:
            seen[halved[node.input[0]]] = node.output[0]
    return seen


def operators(types: Sequence[str]) -> str:
    """The operators of a layer in a few words; ``Input`` for no node."""
    if len(types) > _SHOWN:
        return f"{types[0]}+…+{types[-1]} ({len(types)} nodes)"
    return "+".join(types) or "Input"
