"""The ranges of activations on real samples, in memory that does not grow with their number."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from edgekd.errors import InputError
from edgekd.onnx.file import describe_onnx
from edgekd.onnx.inference import rows_of, run_batch, to_model
from edgekd.onnx.samples import Array, Samples, is_mask, spec_layout
from edgekd.onnx.session import CPU_PROVIDER, open_session
from edgekd.quantization.prepare import save_onnx
from edgekd.quantization.ranges import Extremes, MagnitudeHistogram, Ranges, under_its_own_name

Calibration = Literal["minmax", "entropy", "percentile"]

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
    if samples.count < LEAST_SAMPLES:
        raise InputError(
            f"calibration needs at least {LEAST_SAMPLES} samples, there are {samples.count}",
            where=str(source),
            remedy="give some hundred real inputs, preprocessed as the model expects them",
        )
    extremes = Extremes(model, tensors, scratch, threads, source)
    size = _batch_size(model, extremes, samples, source)
    layout = spec_layout(describe_onnx(model).spec.inputs)
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
            feed = {name: _filled(array, fixed) for name, array in feed.items()}
        yield to_model(layout, feed)


def _filled(array: Array, rows: int) -> Array:
    return array if len(array) == rows else np.resize(array, (rows, *array.shape[1:]))


def _batch_size(model: Path, extremes: Extremes, samples: Samples, source: Path) -> int:
    """The number of samples for which the named tensors of a batch take about 32 MB.

    Measured on one sample: the sizes of open dimensions are not in the graph.
    """
    feed = next(feeds(model, samples, 1, source))
    each = (
        4 * extremes.elements(feed) // rows_of(spec_layout(describe_onnx(model).spec.inputs), feed)
    )
    return max(1, min(_LARGEST_BATCH, _BATCH_BYTES // max(each, 1)))


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
    augmented = scratch / "histograms.onnx"
    save_onnx(proto, augmented)
    try:
        session = open_session(augmented, (CPU_PROVIDER,), threads, "disabled")
    except InputError as error:
        raise under_its_own_name(error, augmented, source) from error
    computed = [name for name in ranges if name not in inputs]
    histograms = {
        n: MagnitudeHistogram(max(abs(low), abs(high))) for n, (low, high) in ranges.items()
    }
    for feed in batches:
        for name in inputs & ranges.keys():
            histograms[name].add(feed[name])
        for name, values_of in zip(
            computed, run_batch(session, computed, feed, source), strict=True
        ):
            histograms[name].add(values_of)
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
