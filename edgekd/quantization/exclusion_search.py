"""Accuracy-aware quantization: the fewest nodes that must stay in float32 for a budgeted drop."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from edgekd.errors import InputError
from edgekd.files import write_errors
from edgekd.onnx.error_metrics import ErrorSums
from edgekd.onnx.file import read_onnx
from edgekd.onnx.inference import run_samples
from edgekd.onnx.output_parts import Part, find_parts
from edgekd.onnx.samples import Array, ArraySamples, Samples

UNITS = 100
"""A model with more nodes is searched in this many groups of consecutive nodes first."""
RANKING_SAMPLES = 64
_NAMED = 8  # nodes that a line for a person names


@dataclass(frozen=True)
class NodeSensitivity:
    """One node: how much it costs to quantize it, and what was decided.

    ``sensitivity`` is None where it was not needed, or is not finite. In a large model it is
    that of the node's group.
    """

    node: str
    op: str
    sensitivity: float | None
    kept: bool


@dataclass(frozen=True)
class Decision:
    """Which nodes stay in float32, and the measurements behind it.

    ``drop`` is measured on the very file that was written, ``drop_all`` with every node in INT8;
    None where a measured value is not finite. ``chosen`` is that file, None when not one node
    can be quantized within the budget: then nothing was written and ``drop`` is None too.
    ``quantized`` are the other nodes; a join (Add, Concat) among them computes in
    float all the same where all its neighbours do.

    ``measure`` is the unit of the sensitivities: ``noise`` = Σ(o − p)² / Σp², summed over the
    outputs' parts, with p float32's outputs and o those of a model with this node alone in INT8;
    ``drop`` = the metric's fall with it alone in INT8. For a node that is not quantized alone it
    is the change of either for the complete model when the node stays in float32. ``evaluations``
    counts the files whose drop was measured, ``ranked`` those that were run for ``noise``.
    """

    chosen: Path | None
    kept: tuple[str, ...]
    quantized: tuple[str, ...]
    drop: float | None
    drop_all: float | None
    budget: float
    measure: Literal["noise", "drop"] | None
    evaluations: int
    ranked: int
    rows: tuple[NodeSensitivity, ...]

    def to_json(self) -> dict[str, Any]:
        """A plain mapping for a JSON file; ``chosen`` is the file's name."""
        return {**asdict(self), "chosen": self.chosen.name if self.chosen else None}

    def keeping(self, nodes: Collection[str], chosen: Path, drop: float) -> Decision:
        """The same with more nodes in float32, for another reason than the drop, which
        :meth:`lines` leaves out.

        Args:
            nodes: their names.
            chosen: the file with them in float32.
            drop: measured on it.
        """
        return replace(
            self,
            chosen=chosen,
            kept=(*self.kept, *nodes),
            quantized=tuple(node for node in self.quantized if node not in nodes),
            drop=drop,
            evaluations=self.evaluations + 1,
            rows=tuple(replace(row, kept=True) if row.node in nodes else row for row in self.rows),
        )

    def lines(self) -> tuple[str, ...]:
        """The same in a few lines for a person."""
        total = len(self.rows)
        drop_all = "not finite" if self.drop_all is None else f"{self.drop_all:.4g}"
        if self.chosen is not None and not self.kept:
            text = f"all {total} quantizable nodes in INT8: drop {drop_all}"
            return (f"{text}, budget {self.budget:.4g}",)
        effort = f"found with {self.evaluations} evaluations"
        whole = f"all {total} quantizable nodes in INT8: drop {drop_all}, "
        whole += f"over the budget {self.budget:.4g}"
        if self.chosen is None:
            verdict = "no node can be in INT8 within the budget: the model stays in float32"
            return (whole, f"{verdict} ({effort})")
        kept = [row for row in self.rows if row.kept]
        kept.sort(key=lambda row: -math.inf if row.sensitivity is None else -row.sensitivity)
        names = ", ".join(f"{row.node} ({row.op})" for row in kept[:_NAMED])
        more = f" and {len(kept) - _NAMED} more" if len(kept) > _NAMED else ""
        return (
            whole,
            f"{len(kept)} of {total} stay in float32: drop {self.drop:.4g} ({effort})",
            f"in float32: {names}{more}",
        )


class Quantizer(Protocol):
    """What :class:`edgekd.quantization.static.StaticQuantizer` offers here."""

    prepared: Path

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes that can be quantized, in graph order."""
        ...

    def write(self, out: Path, float_nodes: Collection[str] = ()) -> None:
        """Write the model with all but these nodes quantized.

        Raises:
            InputError: nothing would be quantized.
        """
        ...


def search_float_layers(
    quantizer: Quantizer,
    out: Path,
    drop: Callable[[Path], float],
    budget: float,
    *,
    samples: Samples | None = None,
    progress: Callable[[str], None] | None = None,
) -> Decision:
    """Write a quantized model with few nodes in float32 whose drop is within the budget.

    All nodes in INT8 if that meets the budget. Else nodes are ranked by their measured sensitivity,
    the shortest sufficient prefix of the ranking is found by bisection, and each of its nodes is
    put back to INT8 if it is not needed: none of the float nodes can then be put back alone. Every
    set that is relied on was measured; that more nodes in float32 are better is only a guess
    that saves evaluations. The result is deterministic if ``drop`` is.

    Args:
        quantizer: of the model.
        out: written last, and only if a set meets the budget.
        drop: how much the metric on validation samples falls against float32 with a file on the
            engine; may be negative.
        budget: the largest drop allowed, in the metric's unit.
        samples: real inputs to rank by the noise at the outputs, :data:`RANKING_SAMPLES` of
            them. Without them nodes are ranked by ``drop``, which is coarser (it often does not
            distinguish nodes) and takes longer.
        progress: receives messages about what is being done.

    Raises:
        InputError: the model has no node that can be quantized, or ``budget`` is not a number.
        StageError: the file cannot be written.
    """
    if math.isnan(budget):
        raise InputError(
            "the budgeted drop is not a number", where="max_drop", remedy="give 0 or more"
        )
    if not quantizer.nodes:
        raise InputError(
            "the model has no node that can be quantized",
            where=str(quantizer.prepared),
            remedy="use the float32 model",
        )
    with tempfile.TemporaryDirectory() as folder:
        search = _Search(quantizer, Path(folder), out.name, drop, budget, progress)
        ranking = None
        found = search.holds(frozenset())
        if not found:
            ranking = _Ranking(search, samples)
            found = _fewest(search, ranking)
        if found:
            search.hand_over(out)
    return _decision(search, ranking, out)


class _Search:
    """Writes quantized models and measures them, each set of float nodes once."""

    def __init__(
        self,
        quantizer: Quantizer,
        folder: Path,
        name: str,
        drop: Callable[[Path], float],
        budget: float,
        progress: Callable[[str], None] | None,
    ) -> None:
        self.quantizer, self.budget = quantizer, budget
        self.nodes = quantizer.nodes
        self.best: frozenset[str] | None = None
        """The smallest set of float nodes found that meets the budget."""
        self.drops: dict[frozenset[str], float] = {}
        self.evaluations = 0
        self._drop, self._progress = drop, progress
        self._trial, self._kept = folder / "trial" / name, folder / "kept" / name

    def report(self, message: str) -> None:
        """Report progress."""
        if self._progress is not None:
            self._progress(message)

    def write(self, kept: Collection[str]) -> Path | None:
        """A model with these nodes in float32; None when nothing would be quantized."""
        shutil.rmtree(self._trial.parent, ignore_errors=True)
        self._trial.parent.mkdir()
        in_order = tuple(node for node in self.nodes if node in kept)
        try:
            self.quantizer.write(self._trial, in_order)
        except InputError:
            # All nodes at once could be written, so the error is that too few are left.
            if not in_order:
                raise
            return None
        return self._trial

    def measure(self, kept: frozenset[str]) -> float:
        """The drop with these nodes in float32; infinite when it is not a number."""
        if kept not in self.drops:
            path = self.write(kept) if len(kept) < len(self.nodes) else None
            value = math.inf
            if path is not None:
                self.evaluations += 1
                value = float(self._drop(path))
                value = math.inf if math.isnan(value) else value
                self.report(f"{len(kept)} of {len(self.nodes)} nodes in float32: drop {value:.4g}")
            self.drops[kept] = value
            smaller = self.best is None or len(kept) < len(self.best)
            if path is not None and value <= self.budget and smaller:
                self.best = kept
                shutil.rmtree(self._kept.parent, ignore_errors=True)
                path.parent.rename(self._kept.parent)
        return self.drops[kept]

    def holds(self, kept: frozenset[str]) -> bool:
        """Whether the drop with these nodes in float32 is within the budget."""
        return self.measure(kept) <= self.budget

    def hand_over(self, out: Path) -> None:
        """Move the best file, as it was measured, with its external data."""
        with write_errors(out, "the ONNX file"):
            for file in self._kept.parent.iterdir():
                shutil.move(file, out.parent / file.name)


class _Ranking:
    """The units of a search (nodes, or groups of them), the most sensitive first."""

    def __init__(self, search: _Search, samples: Samples | None) -> None:
        nodes = search.nodes
        step = math.ceil(len(nodes) / UNITS)
        units = [frozenset(nodes[i : i + step]) for i in range(0, len(nodes), step)]
        noise = _Noise(search, samples) if samples is not None else None
        self.measure: Literal["noise", "drop"] = "drop"
        cost: Callable[[frozenset[str]], float] = search.measure
        if noise is not None and noise.possible:
            self.measure, cost = "noise", noise
        found: list[float] = []
        self.sensitivity: dict[str, float] = {}
        for number, unit in enumerate(units):
            search.report(f"sensitivity of {number + 1} of {len(units)}: {nodes[number * step]}")
            others = frozenset(nodes) - unit
            alone = cost(others)
            if alone == math.inf and search.write(others) is None:
                gain = cost(frozenset()) - cost(unit)
                alone = 0.0 if math.isnan(gain) else gain
            found.append(alone)
            self.sensitivity |= dict.fromkeys(unit, alone)
        order = sorted(range(len(units)), key=lambda index: (-found[index], index))
        self.units = [units[index] for index in order]
        self.ranked = noise.runs if noise is not None else 0


class _Noise:
    """The quantization noise of the outputs, relative to float32's outputs."""

    def __init__(self, search: _Search, samples: Samples) -> None:
        self._search, self._samples = search, _spread(samples, RANKING_SAMPLES)
        prepared = search.quantizer.prepared
        outputs = run_samples(prepared, self._samples, optimization="disabled")
        self._reference = {
            name: values
            for name, values in outputs.items()
            if values.dtype.kind == "f" and bool(values.any())
        }
        self._parts = find_parts(prepared, self._samples, self._reference)
        self.possible = bool(self._reference)
        """Whether an output can show noise: one that is only a label cannot."""
        self.runs = 0
        self._known: dict[frozenset[str], float] = {}

    def __call__(self, kept: frozenset[str]) -> float:
        """Σ over outputs' parts of Σ(o − p)² / Σp²; infinite where not finite or nothing is in
        INT8."""
        if kept not in self._known:
            path = self._search.write(kept)
            power = math.inf
            if path is not None:
                self.runs += 1
                outputs = run_samples(path, self._samples)
                power = sum(
                    _power(p, outputs[name], part)
                    for name, p in self._reference.items()
                    for part in self._parts[name]
                )
            self._known[kept] = power
        return self._known[kept]


def _fewest(search: _Search, ranking: _Ranking) -> bool:
    """Find few nodes to keep in float32; whether there is a set that meets the budget."""
    units, everything = ranking.units, frozenset(search.nodes)
    low, high = 0, len(units)  # keeping none misses the budget, keeping all is float32 itself
    while high - low > 1:
        middle = (low + high) // 2
        if search.holds(frozenset().union(*units[:middle])):
            high = middle
        else:
            low = middle
    singles = [frozenset([n]) for n in reversed(search.nodes) if len(units) < len(search.nodes)]
    least_first = [*reversed(units), *singles]
    if search.best is None:
        # Before reporting that nothing can be in INT8, each is tried alone.
        any(search.holds(everything - unit) for unit in least_first)
    if search.best is None:
        return False
    _put_back(search, least_first)
    return True


def _put_back(search: _Search, units: Sequence[frozenset[str]]) -> None:
    """Put kept units back to INT8, in this order, until none can be put back."""
    kept: frozenset[str] | None = None
    while kept != search.best:
        kept = search.best
        for unit in units:
            if search.best and unit <= search.best:
                search.holds(search.best - unit)


def _power(reference: Array, candidate: Array, part: Part) -> float:
    sums = ErrorSums()
    p, o = (values.reshape(len(values), -1) for values in (reference, candidate))
    if part.positions is not None:
        p, o = p[:, part.positions], o[:, part.positions]
        if not p.any() and not o.any():
            return 0.0
    sums.add(p.reshape(1, -1), o.reshape(1, -1))
    return math.inf if sums.relative is None else sums.relative**2


def _spread(samples: Samples, limit: int) -> ArraySamples:
    """At most ``limit`` samples, spread evenly: their order may be that of the classes."""
    rows = {int(row) for row in np.linspace(0, samples.count - 1, min(limit, samples.count))}
    picked = [batch for index, batch in enumerate(samples.batches(1)) if index in rows]
    return ArraySamples({k: np.concatenate([one[k] for one in picked]) for k in picked[0]})


def _decision(search: _Search, ranking: _Ranking | None, out: Path) -> Decision:
    best, nodes = search.best, search.nodes
    kept = frozenset(nodes) if best is None else best
    graph = read_onnx(search.quantizer.prepared).graph
    types = {node.name: node.op_type for node in graph.node}
    costs = ranking.sensitivity if ranking is not None else {}
    return Decision(
        chosen=out if best is not None else None,
        kept=tuple(node for node in nodes if node in kept),
        quantized=tuple(node for node in nodes if node not in kept),
        drop=_finite(search.drops[best]) if best is not None else None,
        drop_all=_finite(search.drops[frozenset()]),
        budget=search.budget,
        measure=ranking.measure if ranking is not None else None,
        evaluations=search.evaluations,
        ranked=ranking.ranked if ranking is not None else 0,
        rows=tuple(
            NodeSensitivity(node, types.get(node, ""), _finite(costs.get(node)), node in kept)
            for node in nodes
        ),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
