"""Latency and memory predicted from a graph's costs, each with a band, corrected by measurements.

Before any measurement latency is a roofline of the profile's peak rates and memory the runtime's
footprint plus weights and activations times what ONNX Runtime holds of them. Both are sums of
parts; measurements scale the parts, and the band is that of candidates predicted from all others.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from edgekd.config.profile import Profile
from edgekd.release.statistics import t_quantile
from edgekd.students.costs import Figures, Footprint, GraphCosts, Precision, Prediction, Range

Parts = tuple[float, ...]

FOOTPRINT = Footprint(9.94, 0.01, measured=False)
"""ONNX Runtime 1.31 on x86-64 above an empty process, with a model that does nothing."""
_MEMORY_PARTS: dict[bool, tuple[float, ...]] = {
    False: (0.018, 2.4, 3.1, 1.2, 1.0, 2.3, 0.0, 3.0, 2.4),
    True: (0.025, 1.8, 0.0, 2.6, 0.0, 2.3, 8e-6, 1.2, 2.7),
}
"""In float32 and in INT8: MB for each node; how often memory holds a byte of the weights of
convolutions (of which float32 ones are copied to blocks), of the largest convolution while it is
loaded, of products, of the largest product while it is loaded, and of recurrent layers; MB for each
position that a quantized convolution reads, an address; and how often memory holds the inputs and
the activations: the arena of the first query, and the block that is planned after it."""
_TAILS = {"p50": 1.0, "p90": 1.15, "p95": 1.3, "p99": 2.0}
"""Percentiles over the median where none was measured."""
_CYCLE_MACS = {"fp32": 8.0, "fp16": 8.0, "bf16": 8.0, "int8": 16.0}
_EFFICIENCY = 0.4
_NODE_MS, _GPU_NODE_MS, _GPU_CALL_MS = 0.002, 0.005, 0.03
_BYTES: dict[Precision, float] = {"fp32": 1.0, "fp16": 0.5, "bf16": 0.5, "int8": 0.25}
_PRIOR_SPREAD = {"latency": 0.9, "memory": 0.1}
_FIRST_SPREAD = {"latency": 0.35, "memory": 0.08}
"""Standard deviations of the logarithm of measured over predicted: without a measurement of this
machine, and with the first ones, which count as one observation more."""
_RIDGE = 0.3
_ALIKE = 0.7
"""How strongly parts keep their common scale; distance in logarithms at which networks are alike."""


@dataclass
class _Learner:
    """A figure as a sum of parts, whose scales are learned from measurements.

    Non-negative least squares of the relative error, with a penalty that keeps the scales of the
    parts together; what it leaves over for similar networks is interpolated.
    """

    kind: str
    parts: list[Parts] = field(default_factory=list)
    measured: list[float] = field(default_factory=list)
    _errors: list[float] | None = None

    def add(self, parts: Parts, value: float) -> None:
        self.parts.append(parts)
        self.measured.append(value)
        self._errors = None

    @property
    def errors(self) -> list[float]:
        """log(measured / predicted) of each one from all others; none for fewer than three."""
        if self._errors is None:
            count = len(self.measured)
            self._errors = [
                math.log(self.measured[i] / self._value(self.parts[i], without=i))
                for i in range(count if count > 2 else 0)
            ]
        return self._errors

    def predict(self, parts: Parts) -> Range:
        value = self._value(parts)
        if not self.measured:
            width = 1.96 * _PRIOR_SPREAD[self.kind]
        else:
            # The first spread counts as one observation.
            squares = _FIRST_SPREAD[self.kind] ** 2 + sum(e * e for e in self.errors)
            degrees = 1 + len(self.errors)
            spread = math.sqrt(squares / degrees)
            width = min(t_quantile(0.95, degrees), 4.3) * spread
        return Range(value, value * math.exp(-width), value * math.exp(width))

    def _value(self, parts: Parts, without: int | None = None) -> float:
        rows = [i for i in range(len(self.measured)) if i != without]
        if not rows:
            return sum(parts)
        from scipy.optimize import nnls

        x = np.array([self.parts[i] for i in rows])
        y = np.array([self.measured[i] for i in rows])
        scale = float(np.exp(np.median(np.log(y / x.sum(1)))))
        keep = math.sqrt(_RIDGE) * np.eye(len(parts))
        scales, _ = nnls(
            np.vstack([x * scale / y[:, None], keep]), np.append(np.ones(len(y)), keep.sum(1))
        )
        scales = scales * scale
        left = np.log(y / np.maximum(x @ scales, 1e-12))
        logs, here = np.log(x + 1e-9), np.log(np.array(parts) + 1e-9)
        # A part that is nearly nothing in both is not a difference.
        weight = np.maximum(x / x.sum(1, keepdims=True), np.array(parts) / sum(parts))
        distance = ((np.clip(logs - here, -3, 3) ** 2) * weight).sum(1)
        alike = np.exp(-distance / (2 * _ALIKE**2))
        correction = float((alike * left).sum() / (alike.sum() + 0.5))
        return float(np.array(parts) @ scales) * math.exp(correction)


class CostModel:
    """Predicts a candidate's figures from its graph; each measurement corrects it.

    Args:
        profile: its peak rates are the prior of the latency.
        precisions: those that may be shipped; without quantization float32 alone.
        threads: of the runtime.
        footprint: what the runtime itself needs; None: :data:`FOOTPRINT`.
    """

    def __init__(
        self,
        profile: Profile,
        precisions: Sequence[Precision] = ("fp32",),
        threads: int = 1,
        footprint: Footprint | None = None,
    ) -> None:
        self.profile, self.precisions, self.threads = profile, tuple(precisions), threads
        self.footprint = footprint or FOOTPRINT
        self.measured = 0
        self._latency = {precision: _Learner("latency") for precision in _BYTES}
        self._memory = {precision: _Learner("memory") for precision in _BYTES}
        self._tails: dict[str, list[float]] = {}

    def predict(self, costs: GraphCosts) -> Prediction:
        """The figures, with bands over all precisions that may be shipped."""
        median = _hull(
            [self._latency[p].predict(self._latency_parts(costs, p)) for p in self.precisions]
        )
        memory = [self._memory[p].predict(self._memory_parts(costs, p)) for p in self.precisions]
        sizes = [costs.weights_bytes * _stored(costs, p) / 1e6 for p in self.precisions]
        return Prediction(
            latency_ms={name: self._tail(name, median) for name in _TAILS},
            memory_mb=_hull(memory),
            size_mb=_hull([Range(size, 0.9 * size, 1.1 * size + 0.02) for size in sizes]),
            parameters=costs.parameters,
        )

    def correct(self, costs: GraphCosts, figures: Figures) -> None:
        """Learn from the measured figures of a candidate or of one of its variants."""
        precision = precision_of(figures.variant)
        median = figures.latency_ms["p50"].value
        self._latency[precision].add(self._latency_parts(costs, precision), median)
        if figures.memory_mb is not None:
            parts = self._memory_parts(costs, precision)
            self._memory[precision].add(parts, figures.memory_mb.value)
        for name, range_ in figures.latency_ms.items():
            self._tails.setdefault(name, []).append(range_.value / median)
        self.measured += 1

    def error(self) -> dict[str, float | int | None]:
        """``latency_error`` and ``memory_error``: median relative errors of candidates predicted
        from all others, None for fewer than three; ``measured``: their number."""
        found: dict[str, float | int | None] = {}
        for key, learners in (("latency_error", self._latency), ("memory_error", self._memory)):
            errors = [abs(math.expm1(-e)) for each in learners.values() for e in each.errors]
            found[key] = statistics.median(errors) if errors else None
        return {**found, "measured": self.measured}

    def _tail(self, name: str, median: Range) -> Range:
        measured = self._tails.get(name)
        if not measured:
            factor = _TAILS[name]
            return Range(median.value * factor, median.low, median.high * factor)
        low, high = min(measured), max(measured)
        factor = statistics.median(measured)
        return Range(median.value * factor, median.low * low, median.high * high)

    def _latency_parts(self, costs: GraphCosts, precision: Precision) -> Parts:
        """Milliseconds of the call, of starting nodes, of computing and of moving data."""
        compute, gpu = self.profile.compute, self.profile.gpu is not None
        tops = {
            "fp32": compute.fp32_tflops,
            "int8": compute.int8_dense_tops,
        }.get(precision, compute.fp16_dense_tflops)
        if tops is not None:
            macs_per_ms = tops.value * 1e9 / 2 * _EFFICIENCY
        else:
            text = self.profile.cpu.model.value if self.profile.cpu is not None else ""
            clock = re.search(r"([\d.]+) ?GHz", text)
            cycles = (float(clock[1]) if clock else 2.0) * 1e6 * self.threads
            macs_per_ms = cycles * _CYCLE_MACS[precision] * _EFFICIENCY
        bandwidth = compute.bandwidth_gb_s.value if compute.bandwidth_gb_s else 10.0
        share = _stored(costs, precision)
        return (
            max(self.footprint.latency_ms, _GPU_CALL_MS if gpu else 0.0),
            costs.nodes * (_GPU_NODE_MS if gpu else _NODE_MS),
            costs.macs / macs_per_ms,
            costs.traffic_bytes * share / (bandwidth * 1e6),
        )

    def _memory_parts(self, costs: GraphCosts, precision: Precision) -> Parts:
        """MB of the runtime, its objects for nodes, weights, and activations.

        Loading the largest weights and running do not need their memory at the same time.
        """
        whole = precision == "int8"
        node, conv, largest_conv, product, largest, recurrent, window, inputs, active = (
            _MEMORY_PARTS[whole]
        )
        scale = _BYTES[precision] / 1e6
        layers = costs.convolution_bytes + costs.product_bytes + costs.recurrent_bytes
        held = (
            scale * (conv * costs.convolution_bytes + product * costs.product_bytes)
            # Recurrent layers, and what is no layer's, stay in float32.
            + (recurrent * costs.recurrent_bytes + max(0, costs.weights_bytes - layers)) / 1e6
        )
        loading = scale * max(
            largest_conv * costs.largest_convolution_bytes, largest * costs.largest_product_bytes
        )
        peak = costs.activations_bytes if whole else costs.blocked_bytes
        moving = (peak - costs.inputs_bytes) * _stored(costs, precision)
        running = (inputs * costs.inputs_bytes + active * moving) / 1e6 + window * costs.windows
        footprint = self.footprint.memory_mb or FOOTPRINT.memory_mb or 0.0
        return (footprint, node * costs.nodes, held, max(loading, running))


def precision_of(variant: str) -> Precision:
    """The precision of a variant by its name (``float32``, ``fp16``, ``int8-cpu``)."""
    if variant == "fp16" or variant == "bf16":
        return "fp16" if variant == "fp16" else "bf16"
    return "int8" if variant.startswith("int8") else "fp32"


def _stored(costs: GraphCosts, precision: Precision) -> float:
    """The share of float32's bytes in a precision: INT8 leaves recurrent layers as they are."""
    layers = costs.convolution_bytes + costs.product_bytes
    total = layers + costs.recurrent_bytes
    share = layers / total if total and precision == "int8" else 1.0
    return 1 - share * (1 - _BYTES[precision])


def _hull(ranges: Sequence[Range]) -> Range:
    """The last one's value with a band around all."""
    return Range(
        ranges[-1].value, min(each.low for each in ranges), max(each.high for each in ranges)
    )
