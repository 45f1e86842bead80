"""The ranges of activations on real samples, in memory that does not grow with their number."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from edgekd.errors import InputError
from edgekd.onnx.file import describe_onnx
from edgekd.onnx.inference import rows_of, run_batch, to_model
from edgekd.onnx.samples import Array, Samples, is_mask, spec_layout
from edgekd.quantization.prepare import open_derived
from edgekd.quantization.rewrites import element_types

Calibration = Literal["minmax", "entropy", "percentile"]

Ranges = dict[str, tuple[float, float]]
"""(lowest, highest) by tensor."""

LEAST_SAMPLES = 2
_BATCH_BYTES = 32 * 1024**2
_LARGEST_BATCH = 64


@dataclass(frozen=True)
class Calibrated:
    """The calibration of a model's tensors on samples.

    Attributes:
        ranges: (lowest, highest) value of a tensor that 8 bits should cover.
        without: the tensors that have no range, and why: infinite or NaN values that a later node
            takes away again, as a softmax does with a mask, or no values at all.
    """

    ranges: Ranges
    without: dict[str, str]


def calibrate(
    model: Path,
    tensors: Collection[str],
    samples: Samples,
    scratch: Path,
    *,
    calibration: Calibration,
    symmetric: bool,
    threads: int,
    source: Path | None = None,
) -> Calibrated:
    """The (lowest, highest) value of each tensor that 8 bits should cover.

    ``minmax`` uses the extremes over all samples. ``entropy`` and ``percentile`` read the
    samples a second time, count magnitudes within those extremes, and cut at a threshold;
    nothing depends on the order or batching of the samples. So many are run at a time that the
    named tensors take about 32 MB.

    Args:
        model: a prepared model in one file, with the types of its tensors.
        samples: at least two.
        scratch: a folder for the model with additional outputs.
        symmetric: whether the runtime's ranges are symmetric around 0.
        threads: of the sessions.
        source: the file that the model was prepared from, for errors; None: the model itself.

    Raises:
        InputError: too few samples, an input is missing from them, or a tensor and an output of
            the model become NaN or infinite on them.
    """
    source = source or model
    check_count(samples.count, source)
    extremes = Extremes(model, tensors, scratch, threads, source)
    layout = spec_layout(describe_onnx(model).spec.inputs)
    # Measured on one sample: the sizes of open dimensions are not in the graph.
    first = next(feeds(model, samples, 1, source))
    sample_bytes = 4 * extremes.elements(first) // rows_of(layout, first)
    size = max(1, min(_LARGEST_BATCH, _BATCH_BYTES // max(sample_bytes, 1)))
    start = 0
    for feed in feeds(model, samples, size, source):
        # A fixed batch's last one is filled up.
        end = min(start + rows_of(layout, feed), samples.count)
        on = f"samples {start} to {end - 1}" if end - start > 1 else f"sample {start}"
        _check_finite(source, feed, on)
        extremes.add(feed, on, rows_of(layout, feed))
        start = end
    ranges, without = extremes.ranges, extremes.without_range
    if calibration != "minmax":
        batches = feeds(model, samples, size, source)
        found = _histograms(model, ranges, batches, scratch, threads, source)
        ranges = {n: _cut(found[n], *ranges[n], calibration, symmetric) for n in ranges}
    return Calibrated(ranges, without)


def check_count(count: int, source: Path) -> None:
    """
    Raises:
        InputError: there are too few samples to calibrate on; the error names ``source``.
    """
    if count < LEAST_SAMPLES:
        raise InputError(
            f"calibration needs at least {LEAST_SAMPLES} samples, there are {count}",
            where=str(source),
            remedy="give some hundred real inputs, preprocessed as the model expects them",
        )


def feeds(model: Path, samples: Samples, size: int, source: Path) -> Iterator[dict[str, Array]]:
    """The samples in batches of at most ``size``, or of the size that the model fixes.

    A last batch that is too small for a fixed one is padded by repeating its own samples.

    Raises:
        InputError: an input of the model is missing from the samples.
    """
    inputs = describe_onnx(model).spec.inputs
    layout = spec_layout(inputs)
    fixed = layout.size
    for batch in samples.batches(fixed or size):
        missing = [tensor.name for tensor in inputs if tensor.name not in batch]
        if missing:
            raise InputError(
                f"the samples have no input named {missing[0]!r}",
                where=str(source),
                remedy=f"the model takes {', '.join(map(str, inputs))}; the samples have "
                + ", ".join(batch),
            )
        feed = {tensor.name: batch[tensor.name] for tensor in inputs}
        if fixed:
            feed = {n: np.resize(array, (fixed, *array.shape[1:])) for n, array in feed.items()}
        yield to_model(layout, feed)


def _check_finite(source: Path, feed: dict[str, Array], on: str) -> None:
    # Not every input is among the calibrated tensors.
    for name, array in feed.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all() and not is_mask(array):
            raise InputError(
                f"input {name!r} of the samples has a NaN or infinite value in {on}",
                where=str(source),
                remedy="leave that sample out or repair it; samples are counted from 0",
            )


def _histograms(
    model: Path,
    ranges: Ranges,
    batches: Iterator[dict[str, Array]],
    scratch: Path,
    threads: int,
    source: Path,
) -> dict[str, MagnitudeHistogram]:
    proto = onnx.load(str(model))
    inputs = {value.name for value in proto.graph.input}
    shown = {value.name for value in proto.graph.output}
    values = {value.name: value for value in proto.graph.value_info}
    proto.graph.output.extend(
        values[name] for name in ranges if name not in shown and name not in inputs
    )
    session = open_derived(proto, scratch / "histograms.onnx", source, threads)
    computed = [name for name in ranges if name not in inputs]
    histograms = {
        n: MagnitudeHistogram(max(abs(low), abs(high))) for n, (low, high) in ranges.items()
    }
    for feed in batches:
        for name in inputs & ranges.keys():
            histograms[name].add(feed[name])
        found = run_batch(session, computed, feed, source)
        for name, array in zip(computed, found, strict=True):
            histograms[name].add(array)
    return histograms


def _cut(
    histogram: MagnitudeHistogram, low: float, high: float, calibration: str, symmetric: bool
) -> tuple[float, float]:
    if high == low or histogram.limit == 0:
        return low, high
    if calibration == "percentile":
        threshold = histogram.percentile()
    else:
        # Number of the 256 steps on the larger side of 0.
        side = 0.5 if symmetric else histogram.limit / (max(high, 0.0) - min(low, 0.0))
        threshold = histogram.entropy(max(int(256 * side), 1))
    return max(low, -threshold), min(high, threshold)


class Extremes:
    """The lowest and the highest value of tensors over any number of batches.

    They are reduced inside the model: no tensor leaves it, however large.

    Args:
        model: a float model in one file, with the types of its tensors; opset 13 or later.
        tensors: their names; those without a float type are left out.
        scratch: a folder for the model with additional outputs.
        threads: of the session.
        source: the file that the model was prepared from, for errors.
    """

    def __init__(
        self, model: Path, tensors: Collection[str], scratch: Path, threads: int, source: Path
    ) -> None:
        proto = onnx.load(str(model))
        self._source = source
        floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
        shown = {
            value.name for value in proto.graph.output if value.type.tensor_type.elem_type in floats
        }
        types = _float_tensors(proto.graph, tensors)
        self.tensors = tuple(types)
        self._outputs = [_add_probes(proto.graph, name, kind) for name, kind in types.items()]
        self._session = open_derived(proto, scratch / "extremes.onnx", source, threads)
        self._float_outputs = [
            output.name for output in self._session.get_outputs() if output.name in shown
        ]
        self._found: Ranges = {}
        self._not_finite: dict[str, str] = {}
        """Tensor → on which samples it was not finite first."""
        self._nan: set[str] = set()
        self._samples = self._infinite = 0

    @property
    def ranges(self) -> Ranges:
        """(lowest, highest) of each tensor that has values, and finite ones only."""
        return {n: found for n, found in self._found.items() if n not in self._not_finite}

    @property
    def without_range(self) -> dict[str, str]:
        """The other tensors, and what is the matter with each.

        Raises:
            InputError: a tensor is infinite, and so are the outputs for some samples but less than
                half of them: that is no mask.
        """
        if self._not_finite and 0 < 2 * self._infinite < self._samples:
            raise self._refusal(*next(iter(self._not_finite.items())))
        reasons = {name: "has no elements" for name in self.tensors if name not in self._found}
        for name in self._not_finite:
            reasons[name] = "is NaN" if name in self._nan else "is infinite"
        return {name: f"{reason} on the samples" for name, reason in reasons.items()}

    def elements(self, inputs: Mapping[str, Array]) -> int:
        """Total number of elements of the tensors when the model runs on these inputs."""
        return sum(int(size) for _, _, _, size in self._run(inputs))

    def add(self, inputs: Mapping[str, Array], on: str, count: int) -> None:
        """Add one batch of ``count`` samples; ``on`` describes them, for errors.

        Raises:
            InputError: a tensor becomes NaN or infinite, and an output NaN or +inf.
        """
        self._samples += count
        bad = []
        for name, (low, high, some_nan, size) in zip(self.tensors, self._run(inputs), strict=True):
            if not size:
                continue
            # A reduction may ignore a NaN.
            if some_nan or not (math.isfinite(low) and math.isfinite(high)):
                bad.append(name)
                self._not_finite.setdefault(name, on)
                if some_nan:
                    self._nan.add(name)
            lowest, highest = self._found.get(name, (math.inf, -math.inf))
            self._found[name] = (min(lowest, float(low)), max(highest, float(high)))
        if bad:
            self._infinite += self._infinite_outputs(inputs, count, bad[0], on)

    def _infinite_outputs(
        self, inputs: Mapping[str, Array], count: int, tensor: str, on: str
    ) -> int:
        """Number of these samples with -inf in an output, as in masked logits.

        Raises:
            InputError: an output is NaN or +inf.
        """
        infinite = np.zeros(count, bool)
        for values in run_batch(self._session, self._float_outputs, inputs, self._source):
            if np.isnan(values).any() or np.isposinf(values).any():
                raise self._refusal(tensor, on)
            places = np.isneginf(values)
            if values.ndim and len(values) == count:
                infinite |= places.reshape(count, -1).any(axis=1)
            else:
                infinite |= places.any()
        return int(infinite.sum())

    def _refusal(self, tensor: str, on: str) -> InputError:
        return InputError(
            f"tensor {tensor!r} of the float model becomes NaN or infinite on {on}, and its "
            "outputs with it",
            where=str(self._source),
            remedy="leave those samples out, or check their preprocessing and the float model "
            "first; samples are counted from 0",
        )

    def _run(self, inputs: Mapping[str, Array]) -> list[list[Array]]:
        """(lowest, highest, whether any is NaN, number of values) of each tensor."""
        names = [name for four in self._outputs for name in four]
        values = run_batch(self._session, names, inputs, self._source)
        return [values[i : i + 4] for i in range(0, len(values), 4)]


def _float_tensors(graph: onnx.GraphProto, tensors: Collection[str]) -> dict[str, int]:
    """Element types by name."""
    weights = {tensor.name for tensor in graph.initializer}
    types = element_types(graph)
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
    named = sorted(set(tensors) - weights)
    return {name: types[name] for name in named if types.get(name) in floats}


def _add_probes(graph: onnx.GraphProto, name: str, kind: int) -> list[str]:
    """The outputs that describe one tensor, in the order of :meth:`Extremes._run`."""
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


BINS = 2048

PERCENTILE = 99.999
"""The percentile of ONNX Runtime's percentile calibrator."""

_STEP = 8  # candidates are 1/256 of the largest magnitude apart


class MagnitudeHistogram:
    """How often magnitudes occur between 0 and a limit known before, in 2,048 bins.

    As the limit is fixed, the counts do not depend on the batches or on their order.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.counts: npt.NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.zeros = 0

    def add(self, values: npt.NDArray[np.floating]) -> None:
        """Count finite values of any shape; those above the limit fall into the last bin."""
        if self.limit <= 0 or not values.size:
            return
        bins = np.abs(values).ravel()
        # Divided first: BINS / limit leaves float32 where the limit is next to nothing.
        bins /= self.limit
        bins *= BINS
        counted = np.bincount(np.minimum(bins.astype(np.int32), BINS - 1), minlength=BINS)
        self.counts += counted
        self.zeros += values.size - int(np.count_nonzero(values))

    def percentile(self, percent: float = PERCENTILE) -> float:
        """The magnitude below which ``percent`` of all values are, to a bin's width."""
        total = int(self.counts.sum())
        if not total:
            return self.limit
        inside = np.cumsum(self.counts) >= percent / 100 * total
        return float((int(inside.argmax()) + 1) * self.limit / BINS)

    def entropy(self, levels: int) -> float:
        """The threshold whose ``levels`` equal steps lose least information.

        Least Kullback-Leibler divergence of the clipped distribution from its quantized one (S.
        Migacz, 8-bit inference with TensorRT, GTC 2017). Exact zeros are left out: every scheme
        here represents them exactly, and after a ReLU they would outweigh the rest.
        """
        counts = self.counts.astype(np.float64)
        counts[0] -= self.zeros
        if counts.sum() <= 0:
            return self.limit
        candidates = range(levels, BINS + 1, _STEP)
        divergence = [_divergence(counts, size, levels) for size in candidates]
        return candidates[int(np.argmin(divergence))] * self.limit / BINS


def _divergence(counts: npt.NDArray[np.float64], size: int, levels: int) -> float:
    inside = counts[:size]
    reference = inside.copy()
    reference[-1] += counts[size:].sum()
    present = inside > 0
    starts = np.arange(levels) * size // levels
    sums = np.add.reduceat(inside, starts)
    filled = np.add.reduceat(present.astype(np.float64), starts)
    share = np.divide(sums, filled, out=np.zeros_like(sums), where=filled > 0)
    quantized = np.where(present, np.repeat(share, np.diff(np.append(starts, size))), 0.0)
    if not quantized.any():
        return float("inf")
    p, q = reference / reference.sum(), quantized / quantized.sum()
    # Values that are clipped into an empty bin have no quantized counterpart: improbable, not
    # impossible, else one outlier would rule out every threshold below it.
    q = np.maximum(q, 1e-9)
    some = p > 0
    return float(np.sum(p[some] * np.log(p[some] / q[some])))
