"""Quantize any ONNX file: what the quantize stage does, for a model that has no pipeline."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgekd.errors import InputError
from edgekd.stages.judge import BATCH, Judge
from edgekd.stages.own_timing import compare_latency
from edgekd.stages.sample_labels import read_labels

if TYPE_CHECKING:
    from edgekd.engines.samples import Array, Samples

Method = Literal["static", "dynamic", "weights-only", "fp16", "bf16"]
SCHEMA = "edgekd.quantize/1"
NEED_SAMPLES = ("static",)
RANKED_ON = 512


@dataclass(frozen=True)
class QuantizeSettings:
    """How a model is made smaller.

    Attributes:
        method: ``static`` needs samples; ``dynamic`` and ``weights-only`` are compared on them.
        runtime: whose scheme INT8 follows: ``cpu`` or ``tensorrt``.
        calibration: how the ranges of activations are found.
        samples: at most this many samples are calibrated on; all serve the comparison.
        max_drop: keep layers in float32 until the metric falls by no more; None accepts any.
        labels: the array of the samples' file with a class for each, for the metric accuracy;
            without it the metric is agreement with float32.
        keep: names of nodes that stay as they are.
        threads: of ONNX Runtime.
        timing: compare latency on this machine.
        per_layer: list each layer's error.
    """

    method: Method = "static"
    runtime: Literal["cpu", "tensorrt"] = "cpu"
    calibration: Literal["minmax", "entropy", "percentile"] = "minmax"
    samples: int = 512
    max_drop: float | None = None
    labels: str | None = None
    keep: tuple[str, ...] = ()
    threads: int = 1
    timing: bool = True
    per_layer: bool = False


def quantize_model(
    model: Path, out: Path, calibration: Path | None, settings: QuantizeSettings
) -> dict[str, Any]:
    """Write ``out`` and say what it costs and gains: a record ``edgekd.quantize/1``.

    The record's ``output`` is None when ``max_drop`` could not be met; nothing is written then.
    ``out`` is written last: until then, and where something fails, it is what it was before.
    Where the files could not be timed, the record's ``timing`` is ``{"failed": why}``.

    Raises:
        InputError: the model, the samples or a name do not fit.
        StageError: the file cannot be written or does not run.
    """
    from edgekd.engines.onnx_file import check_onnx, describe_onnx
    from edgekd.engines.replacing import replacing
    from edgekd.engines.sample_files import open_samples

    check_onnx(model)
    info = describe_onnx(model)
    _check_output(model, out)
    if calibration is None and settings.method in NEED_SAMPLES:
        raise InputError(
            "static quantization needs samples to find the ranges of the activations",
            where="--calibration",
            remedy=f"give an npz file of real inputs: {', '.join(map(str, info.spec.inputs))}; "
            "or use --method dynamic or weights-only",
        )
    if settings.method == "bf16" and settings.per_layer:
        raise InputError(
            "ONNX Runtime's CPU provider has no bfloat16 kernels to compare the layers with",
            where="--per-layer",
            remedy="leave it out, or look at --method fp16",
        )
    if calibration is None and (settings.max_drop is not None or settings.per_layer):
        raise InputError(
            "nothing can be compared without samples",
            where="--max-drop" if settings.max_drop is not None else "--per-layer",
            remedy="give --calibration DATA.npz",
        )
    samples = None if calibration is None else open_samples(calibration, info.spec)
    judge = None
    if samples is not None and calibration is not None:
        labels = None if settings.labels is None else read_labels(calibration, settings.labels)
        batch = 1 if settings.method == "dynamic" else BATCH
        judge = Judge(model, samples, labels, threads=settings.threads, batch=batch)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "model": str(model),
        "output": None,
        "method": settings.method,
        "runtime": settings.runtime if settings.method == "static" else None,
        "parameters": info.parameters,
        "float_bytes": info.size_bytes,
    }
    with replacing(out) as written:
        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
            extra = _write(model, written, samples, judge, settings, Path(folder))
        record |= extra
        if extra.get("decision", {}).get("chosen", out) is None:
            return record
        record |= {"output": str(out), "bytes": describe_onnx(written).size_bytes}
        if "decision" in extra:
            extra["decision"]["chosen"] = out.name
        if settings.method == "bf16":
            return record  # ONNX Runtime's CPU provider has no such kernels.
        if judge is not None:
            record |= judge.compare(written)
        if settings.per_layer and samples is not None:
            from edgekd.engines.layer_errors import layer_errors

            record["layers"] = [row.to_json() for row in layer_errors(model, written, samples)]
        if settings.timing:
            record["timing"] = compare_latency(written, model, info.spec, samples, settings.threads)
    return record


def _write(
    model: Path,
    out: Path,
    samples: Samples | None,
    judge: Judge | None,
    settings: QuantizeSettings,
    scratch: Path,
) -> dict[str, Any]:
    """Write the file by the method asked for; what the method has to say."""
    from edgekd.engines.quantize import StaticQuantizer, quantize_dynamic, quantize_weights

    if settings.method in ("dynamic", "weights-only"):
        write = quantize_dynamic if settings.method == "dynamic" else quantize_weights
        write(model, out, keep=settings.keep)
        return {}
    if settings.method == "fp16" or settings.method == "bf16":
        from edgekd.engines.half import convert_half

        info = convert_half(model, out, settings.method, samples=samples, keep=settings.keep)
        return {"half": info.to_json()}
    assert samples is not None
    assert judge is not None
    quantizer = StaticQuantizer(
        model,
        FirstSamples(samples, settings.samples),
        scratch,
        runtime=settings.runtime,
        calibration=settings.calibration,
        keep=settings.keep,
        threads=settings.threads,
    )
    if settings.max_drop is None:
        quantizer.write(out)
        return {}
    from edgekd.engines.quantize.sensitivity import keep_accurate

    decision = keep_accurate(
        quantizer, out, judge.drop_of, settings.max_drop, samples=FirstSamples(samples, RANKED_ON)
    )
    return {"decision": decision.to_json(), "decision_lines": list(decision.lines())}


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


def _check_output(model: Path, out: Path) -> None:
    if out.resolve() == model.resolve():
        raise InputError(
            "the output is the model itself", where="--output", remedy="give another file"
        )
    if out.is_dir() or not out.resolve().parent.is_dir():
        what = "is a folder" if out.is_dir() else "lies in a folder that does not exist"
        raise InputError(f"the output {what}", where=str(out), remedy="give the path of a file")
