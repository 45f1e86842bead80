"""Quantize an ONNX file and report what that gains and costs: ``edgekd quantize``."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import CrashError, InputError, StageError, TargetError
from edgekd.quantization.evaluator import (
    BATCH,
    SampleEvaluator,
    largest_drop,
    read_labels,
    remarks_on_ranges,
)
from edgekd.quantization.quantize_onnx import (
    Quantized,
    QuantizeSettings,
    opener,
    quantize_onnx,
    write_queries,
)

if TYPE_CHECKING:
    from edgekd.onnx.samples import Array, Samples
    from edgekd.spec import ModelSpec

SCHEMA = "edgekd.quantize/1"

SUSPICIOUS_DROP = 0.05
"""A file with a larger drop is also run without optimizations, to see whether they cause it."""

MUCH_NEARER = 3.0
"""Optimizations are the cause where the drop without them is this many times smaller."""

ROUNDING = 0.1
"""Share of an output's largest value by which optimization may change a file in fewer bits:
it rounds in other places."""

TIMED_SECONDS = 20.0

RANKED_ON = 512
"""Number of samples of which some rank the nodes by their sensitivity."""

UNCALIBRATED = ("dynamic", "weights-only")

FITTED = ("static", "fp16")
"""Methods whose output depends on the calibration samples."""

NO_BF16 = "ONNX Runtime's CPU provider has no bfloat16 kernels"


def quantize_model(
    model: Path,
    out: Path,
    calibration: Path | None,
    settings: QuantizeSettings,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write ``out`` and return its drop and gain: a record ``edgekd.quantize/1``.

    ``float32_nodes`` of the record are those with weights in float32, and those whose values 8
    bits cannot represent: ``node``, ``op``, ``bytes`` of weights and ``reason``. ``compared_on``
    has a note on each output that is not one row per sample (``outputs``).
    ``errors`` has a row for each output with the parts that it was compared by; ``worst`` is the
    part with the largest drop, where that is not the metric's own output, and that drop.
    ``warnings`` are lines for a person; ``decision`` and its ``decision_lines`` are there with
    ``max_drop``, ``mixed`` where nodes stay in float32 because one scale would lose a part of them.

    For a CPU and where files are timed, static INT8 is tried with the layers at the inputs in
    float32 too, and they stay so if that is shown to be faster. ``float_inputs`` then has the
    ``nodes``, whether that was ``taken``, and the latency with them in float32 (``p50_ms``)
    against that with them in INT8 (``int8_p50_ms``).

    The record's ``output`` is None when ``max_drop`` could not be met; nothing is written then.
    ``out`` is written last: until then, and on failure, an existing file is unchanged.
    Where the files could not be timed, the record's ``timing`` is ``{"failed": why}``. bfloat16
    is compared by its rounding, computed in float32.

    Args:
        model: a float32 model.
        out: where to write.
        calibration: file of real inputs; also compared on, where no other samples are given.
        settings: method, scheme and limits.
        progress: receives messages about what is being tried.

    Raises:
        InputError: the model, the samples or a name do not fit; ``out`` would replace one of
            these files.
        StageError: the file cannot be written or does not run.
    """
    from edgekd.files import atomic_write, check_output
    from edgekd.onnx.file import check_fits_one_file, check_onnx, describe_onnx
    from edgekd.onnx.samples import open_samples
    from edgekd.quantization.calibration import check_count

    check_fits_one_file(model)
    check_onnx(model)
    info = describe_onnx(model)
    validation = None if settings.validation is None else Path(settings.validation)
    check_output(out, "--output", inputs=files_read(model, calibration, validation))
    check_settings(model, info.spec, calibration, settings)
    samples = None if calibration is None else open_samples(calibration, info.spec)
    if settings.method == "static" and samples is not None and calibration is not None:
        check_count(min(samples.count, settings.samples), calibration)
    compared = samples if validation is None else open_samples(validation, info.spec)
    data = validation or calibration
    evaluator = None
    if compared is not None and data is not None:
        labels = None if settings.labels is None else read_labels(data, settings.labels)
        batch = 1 if settings.method == "dynamic" else BATCH
        evaluator = SampleEvaluator(model, compared, labels, threads=settings.threads, batch=batch)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "model": str(model),
        "output": None,
        "method": settings.method,
        "runtime": settings.runtime if settings.method == "static" else None,
        "parameters": info.parameters,
        "float_bytes": info.size_bytes,
        "warnings": [],
    }
    with atomic_write(out) as written, tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        work = _Work(model, info.spec, settings, samples, evaluator, Path(folder), progress)
        quantized = work.write(written)
        record |= _about_nodes(quantized)
        if settings.timing and quantized.input_layers:
            record["float_inputs"] = work.try_float_inputs(quantized)
        if quantized.decision is not None:
            record["decision"] = quantized.decision.to_json()
        if quantized.refused:
            return record
        if evaluator is not None:
            record = work.compared(quantized, record)
            record["compared_on"] = {"file": str(data), **record["compared_on"]}
            if settings.max_drop is not None and largest_drop(record) > settings.max_drop:
                written.unlink()
                return record
        record |= {"output": str(out), "bytes": describe_onnx(written).size_bytes}
        if settings.method not in ("fp16", "bf16"):
            record["float32_nodes"] = [row.to_json() for row in quantized.float_nodes()]
        if "decision" in record:
            record["decision"]["chosen"] = out.name
        if settings.timing and settings.method == "bf16":
            record["timing"] = {"failed": NO_BF16, "threads": settings.threads}
        elif settings.timing:
            record["timing"] = compare_latency(
                written, model, info.spec, compared, settings.threads
            )
            if compared is None:
                record["warnings"] += _remarks_on_random_inputs(model)
    return record


def _about_nodes(quantized: Quantized) -> dict[str, Any]:
    """A method's part of the record."""
    found: dict[str, Any] = {}
    if quantized.half is not None:
        found["half"] = quantized.half.to_json()
    if quantized.quantizer is not None:
        found["warnings"] = remarks_on_ranges(quantized.quantizer.constant)
        if quantized.quantizer.mixed:
            found["mixed"] = [str(mixed) for mixed in quantized.quantizer.mixed]
    if quantized.decision is not None:
        found["decision_lines"] = list(quantized.decision.lines())
    return found


@dataclass(frozen=True)
class _Work:
    """A model to quantize: how, on which samples, and how the result is evaluated.

    Without ``evaluator`` there are no samples to compare on; ``samples`` are those to calibrate on.
    """

    model: Path
    spec: ModelSpec
    settings: QuantizeSettings
    samples: Samples | None
    evaluator: SampleEvaluator | None
    scratch: Path
    progress: Callable[[str], None] | None

    def write(self, out: Path) -> Quantized:
        """Write the model by the method of the settings."""
        settings, calibration, opens = self.settings, self.samples, None
        if settings.method == "fp16":
            opens = opener(self.scratch, self.spec, self.samples, settings.threads)
        if settings.method == "static" and self.samples is not None:
            calibration = FirstSamples(self.samples, settings.samples)
        return quantize_onnx(
            self.model,
            out,
            self.evaluator,
            settings,
            calibration=calibration,
            ranking=None if self.samples is None else FirstSamples(self.samples, RANKED_ON),
            scratch=self.scratch,
            opens=opens,
            progress=self.progress,
        )

    def try_float_inputs(self, quantized: Quantized) -> dict[str, Any]:
        """Keep the layers at the inputs in float32 where that is shown to be faster and meets the
        budget; returns the record's ``float_inputs``."""
        assert quantized.quantizer is not None
        nodes, decision = quantized.input_layers, quantized.decision
        if self.progress is not None:
            self.progress(f"{', '.join(nodes)} in float32")
        other, threads = self.scratch / "float-inputs.onnx", self.settings.threads
        quantized.quantizer.write(other, (*quantized.searched, *nodes))
        timing = compare_latency(other, quantized.path, self.spec, self.samples, threads)
        interval = timing.get("interval")
        taken = interval is not None and interval[0] > 1
        if taken and decision is not None:
            assert self.evaluator is not None
            drop = self.evaluator.drop_of(other)
            taken = drop <= decision.budget
            if taken:
                quantized.decision = decision.keeping(nodes, quantized.path, drop)
        if taken:
            shutil.copyfile(other, quantized.path)
            quantized.reasons |= dict.fromkeys(nodes, "it is faster so")
        # Both files are quantized.
        names = {"float_p50_ms": "int8_p50_ms"}
        both = {names.get(name, name): value for name, value in timing.items()}
        return {"nodes": list(nodes), "taken": taken, **both}

    def compared(self, quantized: Quantized, record: dict[str, Any]) -> dict[str, Any]:
        """The record with the comparison of the file with float32."""
        from edgekd.onnx.inference import BatchedModel

        assert self.evaluator is not None
        evaluator, samples, threads = self.evaluator, self.evaluator.samples, self.settings.threads
        runnable = quantized.runnable(self.scratch)
        found = evaluator.compare(runnable)
        warnings = found.pop("warnings")
        if warnings or largest_drop(found) > (self.settings.max_drop or SUSPICIOUS_DROP):
            found |= _optimizer_fault(runnable, evaluator, found, threads)
            warnings += found.get("optimizer_fault", {}).get("remarks", ())
        compared_on: dict[str, Any] = {
            "samples": samples.count,
            "calibrated_on": _fitted(self.settings, samples.count),
        }
        if notes := BatchedModel(self.model, samples, threads=threads).outputs.notes():
            compared_on["outputs"] = notes
        found |= {"warnings": record["warnings"] + warnings, "compared_on": compared_on}
        if self.settings.per_layer:
            from edgekd.onnx.layer_errors import layer_errors

            rows = layer_errors(self.model, runnable, samples)
            found["layers"] = [row.to_json() for row in rows]
        return record | found


def _optimizer_fault(
    file: Path, evaluator: SampleEvaluator, found: Mapping[str, Any], threads: int
) -> dict[str, Any]:
    """``optimizer_fault`` where a file is far closer to float32 without optimizations than with
    them.
    """
    from edgekd.onnx.inference import first_batch
    from edgekd.onnx.optimizer_faults import find_fault
    from edgekd.onnx.session import CPU_PROVIDER, open_session

    plain = largest_drop(evaluator.compare(file, "disabled"))
    if plain > largest_drop(found) / MUCH_NEARER:
        return {}
    session = open_session(file, (CPU_PROVIDER,), 1, "disabled")
    inputs = first_batch(session, evaluator.samples, file, 16)
    fault = find_fault(file, inputs, threads=threads, tolerance=ROUNDING)
    if fault is None:
        return {}
    remark = f"{fault}; the drop is {plain:.4g} without: {fault.remedy}"
    return {"optimizer_fault": {**fault.to_json(), "drop_without": plain, "remarks": [remark]}}


def _fitted(settings: QuantizeSettings, compared: int) -> int:
    """How many of the samples compared on the file was fitted to."""
    if settings.validation is not None or settings.method not in FITTED:
        return 0
    return min(compared, settings.samples) if settings.method == "static" else compared


def compare_latency(
    model: Path, against: Path, spec: ModelSpec, samples: Samples | None, threads: int
) -> dict[str, Any]:
    """p50 of both, interleaved, in a fresh process: ``p50_ms``, ``float_p50_ms``, ``speedup``
    with its ``interval``, ``threads``.

    Where they could not be timed, ``failed`` says why. Without samples inputs are random.

    Raises:
        CrashError: ONNX Runtime crashes on one of the files.
    """
    from edgekd.targets import LocalTarget

    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        inputs = None
        if samples is not None:
            inputs = Path(folder) / "samples.npz"
            write_queries(inputs, spec, samples)
        try:
            record = LocalTarget().bench(
                model,
                against=against,
                inputs=inputs,
                threads=threads,
                max_seconds=TIMED_SECONDS,
                memory=False,
            )
        except CrashError as error:
            if error.signal != signal.SIGKILL:
                raise  # The fault is in the file, not in the machine.
            return {"failed": error.what, "threads": threads}
        except (InputError, StageError, TargetError) as error:
            return {"failed": error.what, "threads": threads}
    ratio = record["comparison"]["interval"]
    return {
        "p50_ms": record["models"][0]["latency"]["p50"]["value"],
        "float_p50_ms": record["models"][1]["latency"]["p50"]["value"],
        "speedup": record["comparison"]["ratio"],
        "interval": list(ratio) if ratio else None,
        "threads": threads,
    }


def _remarks_on_random_inputs(model: Path) -> list[str]:
    """A warning where a model's inputs decide how much it computes."""
    from edgekd.onnx.file import read_onnx
    from edgekd.onnx.graph import deciding_inputs

    decides = deciding_inputs(read_onnx(model))
    if not decides:
        return []
    work = "; ".join(f"{name} decides {what}" for name, what in decides.items())
    return [
        f"the times are those of random inputs, which decide how much is computed ({work}): "
        "--calibration DATA.npz, or 'edgekd benchmark --inputs', gives real ones"
    ]


def check_settings(
    model: Path, spec: ModelSpec, calibration: Path | None, settings: QuantizeSettings
) -> None:
    """Refuse settings without the samples that they need, and an already quantized model.

    Raises:
        InputError: there is such a setting, or samples that would not be used.
    """
    from edgekd.onnx.file import read_onnx
    from edgekd.quantization.prepare import refuse_quantized

    method = settings.method
    if calibration is None and method == "static":
        raise InputError(
            "static quantization needs samples to find the ranges of the activations",
            where="--calibration",
            remedy=f"give an npz file of real inputs: {', '.join(map(str, spec.inputs))}; "
            "or use --method dynamic or weights-only",
        )
    if calibration is not None and settings.validation is not None and method in UNCALIBRATED:
        raise InputError(
            f"--method {method} uses no calibration samples in addition to --validation",
            where="--calibration",
            remedy="leave it out",
        )
    if calibration is None and settings.validation is None:
        requested = {
            "--max-drop": settings.max_drop is not None,
            "--per-layer": settings.per_layer,
            "--labels": settings.labels is not None,
        }
        for option in (option for option, given in requested.items() if given):
            raise InputError(
                "nothing can be compared without samples",
                where=option,
                remedy="give --validation DATA.npz, or --calibration DATA.npz",
            )
    if method in ("fp16", "bf16"):
        # ONNX Runtime computes wrong outputs where 16-bit floats and Q/DQ meet.
        refuse_quantized(read_onnx(model), model)


def files_read(model: Path, *samples: Path | None) -> list[Path]:
    """The files that must not be written over: the model, its external data and the samples.

    Raises:
        InputError: the model cannot be read.
    """
    from edgekd.onnx.file import files_of_onnx

    return [*files_of_onnx(model), *(path for path in samples if path is not None)]


class FirstSamples:
    """The first samples of another source."""

    def __init__(self, samples: Samples, limit: int) -> None:
        self._samples = samples
        self.limit = limit

    @property
    def count(self) -> int:
        """The number of samples."""
        return min(self._samples.count, self.limit)

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        """Batches of inputs by name, at most the limit in total."""
        left = self.count
        for batch in self._samples.batches(size):
            taken = min(left, len(next(iter(batch.values()))))
            yield {name: array[:taken] for name, array in batch.items()}
            left -= taken
            if left <= 0:
                return
