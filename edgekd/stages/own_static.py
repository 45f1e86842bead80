"""Static INT8 of any ONNX file: which layers stay in float32, for accuracy and for speed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.stages.own_remarks import remarks_on_ranges
from edgekd.stages.own_timing import compare_latency

if TYPE_CHECKING:
    from edgekd.engines.samples import Array, Samples
    from edgekd.stages.judge import Judge
    from edgekd.stages.own_model import QuantizeSettings

RANKED_ON = 512


def write_static(
    model: Path,
    out: Path,
    samples: Samples,
    judge: Judge,
    settings: QuantizeSettings,
    scratch: Path,
    progress: Callable[[str], None] | None,
) -> dict[str, Any]:
    """Write the model in static INT8, if ``settings.max_drop`` can be met.

    Where files are timed and the scheme is the CPU's, the layers at the inputs are tried in
    float32 too; they stay so if that is shown to be faster.

    Returns:
        ``warnings``; the ``reasons`` of nodes that stay in float32; with ``max_drop`` the
        ``decision`` and its ``decision_lines``; ``mixed``, where nodes stay in float32 because
        one scale would lose a part of them; where it was tried ``float_inputs``: the ``nodes``,
        whether that was ``taken``, and the latency with them in float32 (``p50_ms``) against
        that with them in INT8 (``int8_p50_ms``).
    """
    from edgekd.engines.onnx_file import describe_onnx
    from edgekd.engines.quantize import StaticQuantizer

    quantizer = StaticQuantizer(
        model,
        FirstSamples(samples, settings.samples),
        scratch,
        runtime=settings.runtime,
        calibration=settings.calibrator,
        keep=settings.keep,
        threads=settings.threads,
    )
    said: dict[str, Any] = {"warnings": remarks_on_ranges(quantizer.constant)}
    reasons = dict.fromkeys(quantizer.kept, "it was asked to stay") | quantizer.left_in_float
    if quantizer.mixed:
        said["mixed"] = [str(mixed) for mixed in quantizer.mixed]
    decision = None
    if settings.max_drop is None:
        quantizer.write(out)
    else:
        from edgekd.engines.quantize.sensitivity import keep_accurate

        decision = keep_accurate(
            quantizer,
            out,
            judge.drop_of,
            settings.max_drop,
            samples=FirstSamples(samples, RANKED_ON),
            progress=progress,
        )
        said["decision_lines"] = list(decision.lines())
    kept = decision.kept if decision is not None else ()
    reasons |= dict.fromkeys(kept, "its 8 bits cost more than --max-drop allows")
    inputs = quantizer.input_layers(kept)
    if inputs and settings.timing and settings.runtime == "cpu":
        if progress is not None:
            progress(f"{', '.join(inputs)} in float32")
        other = scratch / "float-inputs.onnx"
        quantizer.write(other, (*kept, *inputs))
        timing = compare_latency(other, out, describe_onnx(model).spec, samples, settings.threads)
        taken = _shown_faster(timing)
        if taken and decision is not None:
            drop = judge.drop_of(other)
            taken = drop <= decision.budget
            decision = decision.keeping(inputs, out, drop) if taken else decision
        if taken:
            shutil.copyfile(other, out)
            reasons |= dict.fromkeys(inputs, "it is faster so")
        said["float_inputs"] = {"nodes": list(inputs), "taken": taken, **_of_both(timing)}
    if decision is not None:
        said["decision"] = decision.to_json()
    said["reasons"] = reasons
    return said


def _shown_faster(timing: Mapping[str, Any]) -> bool:
    interval = timing.get("interval")
    return interval is not None and interval[0] > 1


def _of_both(timing: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison with the file whose inputs' layers are in INT8, under the right name."""
    return {
        "int8_p50_ms" if name == "float_p50_ms" else name: value for name, value in timing.items()
    }


class FirstSamples:
    """The first samples of others."""

    def __init__(self, samples: Samples, limit: int) -> None:
        self._samples = samples
        self.limit = limit

    @property
    def count(self) -> int:
        """The number of samples."""
        return min(self._samples.count, self.limit)

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """See :class:`edgekd.engines.samples.Samples`."""
        left = self.count
        for batch in self._samples.batches(size):
            taken = min(left, len(next(iter(batch.values()))))
            yield {name: array[:taken] for name, array in batch.items()}
            left -= taken
            if left <= 0:
                return
