"""Quantize any ONNX file: what the quantize stage does, for a model that has no pipeline."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgekd.errors import InputError, unknown_name
from edgekd.spec import ModelSpec

if TYPE_CHECKING:
    from edgekd.engines.samples import Array, Samples

Method = Literal["static", "dynamic", "weights-only", "fp16", "bf16"]
SCHEMA = "edgekd.quantize/1"
NEED_SAMPLES = ("static",)
CLASSES_AT_LEAST = 2
BATCH = 64
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

    Raises:
        InputError: the model, the samples or a name do not fit.
        StageError: the file cannot be written or does not run.
    """
    from edgekd.engines.onnx_file import check_onnx, describe_onnx
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
        judge = _Judge(model, info.spec, samples, _labels(calibration, settings.labels), settings)
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        extra = _write(model, out, samples, judge, settings, Path(folder))
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "model": str(model),
        "output": str(out) if out.is_file() else None,
        "method": settings.method,
        "runtime": settings.runtime if settings.method == "static" else None,
        "parameters": info.parameters,
        "float_bytes": info.size_bytes,
        **extra,
    }
    if record["output"] is None:
        return record
    record["bytes"] = describe_onnx(out).size_bytes
    runs_here = settings.method != "bf16"  # ONNX Runtime's CPU provider has no such kernels.
    if judge is not None and runs_here:
        record |= judge.compare(out)
    if settings.per_layer and samples is not None and runs_here:
        from edgekd.engines.layer_errors import layer_errors

        record["layers"] = [row.to_json() for row in layer_errors(model, out, samples)]
    if settings.timing and runs_here:
        record["timing"] = _timing(model, out, calibration, settings)
    return record


def _write(
    model: Path,
    out: Path,
    samples: Samples | None,
    judge: _Judge | None,
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
    if decision.chosen is None:
        out.unlink(missing_ok=True)
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


class _Judge:
    """How near a file's answers are to float32's, and to the labels where there are any."""

    def __init__(
        self,
        model: Path,
        spec: ModelSpec,
        samples: Samples,
        labels: Array | None,
        settings: QuantizeSettings,
    ) -> None:
        from edgekd.engines.compare import run_samples

        self.samples, self.settings = samples, settings
        self.reference: Mapping[str, Array] = run_samples(model, samples, threads=settings.threads)
        self.primary = spec.outputs[0].name
        first = self.reference[self.primary]
        self.classes = first.ndim == 2 and first.shape[1] >= CLASSES_AT_LEAST
        if labels is not None and not self.classes:
            raise InputError(
                f"labels need an output (N, classes), and {self.primary!r} is {first.shape}",
                where="--labels",
                remedy="leave it out: the outputs are then compared with float32's",
            )
        if labels is not None and (
            labels.shape != (samples.count,) or labels.dtype.kind not in "iu"
            or not 0 <= int(labels.min()) <= int(labels.max()) < first.shape[1]
        ):  # fmt: skip
            raise InputError(
                f"the labels are {labels.dtype}{labels.shape}; one class from 0 to "
                f"{first.shape[1] - 1} for each of the {samples.count} samples is needed",
                where="--labels",
                remedy="give an integer array of that length",
            )
        self.labels = labels
        self.metric, self._scores = self._how()
        self.scores = self._scores(self.reference)

    def _how(self) -> tuple[str, Callable[[Mapping[str, Array]], Array]]:
        if self.labels is not None:
            return "accuracy", lambda a: (
                a[self.primary].argmax(1) == self.labels
            ).astype(np.float64)  # fmt: skip
        if self.classes:
            wanted = self.reference[self.primary].argmax(1)
            return "agreement with float32", lambda a: (
                a[self.primary].argmax(1) == wanted
            ).astype(np.float64)  # fmt: skip
        return "1 - relative error", self._closeness

    def _closeness(self, answers: Mapping[str, Array]) -> Array:
        """1 − ‖answer − float32‖ / ‖float32‖ of each sample over all outputs, (N,)."""
        off, whole = np.zeros(self.samples.count), np.zeros(self.samples.count)
        for name, expected in self.reference.items():
            if expected.dtype.kind != "f":
                continue
            e = expected.reshape(len(expected), -1).astype(np.float64)
            a = answers[name].reshape(len(expected), -1).astype(np.float64)
            off += ((a - e) ** 2).sum(1)
            whole += (e**2).sum(1)
        closeness: Array = 1 - np.sqrt(off / np.maximum(whole, np.finfo(np.float64).tiny))
        return closeness

    def _run(self, path: Path) -> dict[str, Array]:
        from edgekd.engines.compare import run_samples

        # Dynamic ranges are those of a whole batch: one by one is what a device answers.
        batch = 1 if self.settings.method == "dynamic" else BATCH
        return run_samples(path, self.samples, threads=self.settings.threads, batch=batch)

    def drop_of(self, path: Path) -> float:
        """How much the metric falls against float32."""
        return float((self.scores - self._scores(self._run(path))).mean())

    def compare(self, path: Path) -> dict[str, Any]:
        """The metric, its drop with an interval, and the error of each output."""
        from edgekd.engines.compare import compare_answers
        from edgekd.release.statistics import mean_score, paired_difference

        answers = self._run(path)
        scores = self._scores(answers)
        drop = paired_difference(self.scores, scores)
        errors = compare_answers(self.reference, answers, self.primary if self.classes else None)
        unit = self.metric.split()[0] if self.classes else ""
        return {
            "metric": self.metric,
            "float_score": mean_score(self.scores).figure(unit, "measured-on-host").to_json(),
            "score": mean_score(scores).figure(unit, "measured-on-host").to_json(),
            "drop": drop.figure("points" if unit else "", "measured-on-host").to_json(),
            "errors": [error.to_json() for error in errors],
        }


def _labels(calibration: Path, name: str | None) -> Array | None:
    if name is None:
        return None
    with np.load(calibration, allow_pickle=False) as archive:
        if name not in archive:
            raise unknown_name("array", name, list(archive), where=f"--labels in {calibration}")
        labels: Array = archive[name]
    return labels


def _check_output(model: Path, out: Path) -> None:
    if out.resolve() == model.resolve():
        raise InputError(
            "the output is the model itself", where="--output", remedy="give another file"
        )
    if out.is_dir() or not out.resolve().parent.is_dir():
        what = "is a folder" if out.is_dir() else "lies in a folder that does not exist"
        raise InputError(f"the output {what}", where=str(out), remedy="give the path of a file")


def _timing(
    model: Path, out: Path, calibration: Path | None, settings: QuantizeSettings
) -> dict[str, Any]:
    """Latency of both in alternation, in a fresh process on this machine."""
    from edgekd.targets import LocalTarget

    record = LocalTarget().bench(
        out,
        against=model,
        inputs=calibration,
        threads=settings.threads,
        max_seconds=20.0,
        memory=False,
    )
    ratio: Sequence[float] | None = record["comparison"]["interval"]
    return {
        "p50_ms": record["models"][0]["latency"]["p50"]["value"],
        "float_p50_ms": record["models"][1]["latency"]["p50"]["value"],
        "speedup": record["comparison"]["ratio"],
        "interval": list(ratio) if ratio else None,
        "threads": settings.threads,
    }
