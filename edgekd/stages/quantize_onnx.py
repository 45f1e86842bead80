"""Quantize any ONNX file, as the quantize stage does, without a pipeline."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import InputError
from edgekd.quantization.settings import Method, QuantizeSettings
from edgekd.stages.evaluator import BATCH, Evaluator, read_labels
from edgekd.stages.quantize_onnx_static import compare_latency, opener

if TYPE_CHECKING:
    from edgekd.onnx.samples import Samples
    from edgekd.spec import ModelSpec

SUSPICIOUS_DROP = 0.05
"""A file with a larger drop is also run without optimizations, to see whether they cause it."""

MUCH_NEARER = 3.0
"""Optimizations are the cause where the drop without them is this many times smaller."""

ROUNDING = 0.1
"""Share of an output's largest value by which optimization may change a file in fewer bits:
it rounds in other places."""

SCHEMA = "edgekd.quantize/1"

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
    from edgekd.onnx.file import check_fits_one_file, check_onnx, describe_onnx, read_onnx
    from edgekd.onnx.sample_files import open_samples
    from edgekd.onnx.samples import deciding_inputs

    check_fits_one_file(model)
    check_onnx(model)
    info = describe_onnx(model)
    validation = None if settings.validation is None else Path(settings.validation)
    check_output(out, "--output", inputs=files_read(model, calibration, validation))
    check_settings(model, info.spec, calibration, settings)
    samples = None if calibration is None else open_samples(calibration, info.spec)
    if settings.method == "static" and samples is not None:
        _check_count(min(samples.count, settings.samples), calibration)
    compared = samples if validation is None else open_samples(validation, info.spec)
    data = validation or calibration
    judge = None
    if compared is not None and data is not None:
        labels = None if settings.labels is None else read_labels(data, settings.labels)
        batch = 1 if settings.method == "dynamic" else BATCH
        judge = Evaluator(model, compared, labels, threads=settings.threads, batch=batch)
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
        found = _write(model, info.spec, written, samples, judge, settings, Path(folder), progress)
        reasons = found.pop("reasons", {})
        record |= found
        if "decision" in record and record["decision"]["chosen"] is None:
            return record
        runnable = _runnable(written, settings.method, Path(folder))
        if judge is not None and compared is not None:
            from edgekd.onnx.batch_inference import BatchedModel

            found = judge.compare(runnable)
            warnings = found.pop("warnings")
            record["warnings"] += warnings
            if warnings or largest_drop(found) > (settings.max_drop or SUSPICIOUS_DROP):
                record |= _blame(runnable, judge, compared, found, settings.threads)
                record["warnings"] += record.get("optimizer_fault", {}).get("remarks", ())
            fitted = compared.count if validation is None and settings.method in FITTED else 0
            if settings.method == "static":
                fitted = min(fitted, settings.samples)
            record |= found
            record["compared_on"] = {
                "file": str(data),
                "samples": compared.count,
                "calibrated_on": fitted,
            }
            notes = BatchedModel(model, compared, threads=settings.threads).outputs.notes()
            if notes:
                record["compared_on"]["outputs"] = notes
            if settings.per_layer:
                from edgekd.onnx.layer_errors import layer_errors

                rows = layer_errors(model, runnable, compared)
                record["layers"] = [row.to_json() for row in rows]
            if settings.max_drop is not None and largest_drop(found) > settings.max_drop:
                written.unlink()
                return record
        record |= {"output": str(out), "bytes": describe_onnx(written).size_bytes}
        if settings.method not in ("fp16", "bf16"):
            from edgekd.quantization.node_selection import float_nodes

            reasons |= dict.fromkeys(settings.keep, "listed in --keep")
            default = f"{settings.method} quantization has no 8 bits for it"
            record["float32_nodes"] = [
                row.to_json() for row in float_nodes(written, reasons, default)
            ]
        if "decision" in record:
            record["decision"]["chosen"] = out.name
        if settings.timing and settings.method == "bf16":
            record["timing"] = {"failed": NO_BF16, "threads": settings.threads}
        elif settings.timing:
            record["timing"] = compare_latency(
                written, model, info.spec, compared, settings.threads
            )
            if compared is None and (decides := deciding_inputs(read_onnx(model))):
                work = "; ".join(f"{name} decides {what}" for name, what in decides.items())
                record["warnings"].append(
                    f"the times are those of random inputs, which decide how much is computed "
                    f"({work}): --calibration DATA.npz, or 'edgekd benchmark --inputs', gives real "
                    "ones"
                )
    return record


def _blame(
    file: Path, judge: Evaluator, samples: Samples, found: Mapping[str, Any], threads: int
) -> dict[str, Any]:
    """``optimizer_fault`` where a file is far closer to float32 without optimizations than with
    them.
    """
    from edgekd.onnx.batch_inference import one_batch
    from edgekd.onnx.optimizer_faults import find_fault

    plain = largest_drop(judge.compare(file, "disabled"))
    if plain > largest_drop(found) / MUCH_NEARER:
        return {}
    fault = find_fault(file, one_batch(file, samples), threads=threads, tolerance=ROUNDING)
    if fault is None:
        return {}
    remark = f"{fault}; the drop is {plain:.4g} without: {fault.remedy}"
    return {"optimizer_fault": {**fault.to_json(), "drop_without": plain, "remarks": [remark]}}


def largest_drop(record: Mapping[str, Any]) -> float:
    """The drop that is checked against a budget: the metric's, or that of a part which drops
    more.
    """
    worst = record["worst"]
    drop: float = record["drop"]["value"]
    return drop if worst is None else max(drop, worst["drop"])


def _write(
    model: Path,
    spec: ModelSpec,
    out: Path,
    samples: Samples | None,
    judge: Evaluator | None,
    settings: QuantizeSettings,
    scratch: Path,
    progress: Callable[[str], None] | None,
) -> dict[str, Any]:
    """Write the file by the requested method; return the method's part of the record."""
    from edgekd.quantization.dynamic import quantize_dynamic
    from edgekd.quantization.weights_only import quantize_weights

    if settings.method in ("dynamic", "weights-only"):
        write = quantize_dynamic if settings.method == "dynamic" else quantize_weights
        write(model, out, keep=settings.keep, samples=samples)
        return {}
    if settings.method == "fp16" or settings.method == "bf16":
        from edgekd.quantization.mixed_precision import convert_mixed_precision

        # The CPU computes nothing in bfloat16, so that no session can test it here.
        opens = opener(scratch, spec, samples, settings.threads)
        info = convert_mixed_precision(
            model,
            out,
            settings.method,
            samples=samples,
            keep=settings.keep,
            opens=opens if settings.method == "fp16" else None,
        )
        return {"half": info.to_json()}
    from edgekd.stages.quantize_onnx_static import write_static

    assert samples is not None
    assert judge is not None
    return write_static(model, out, samples, judge, settings, scratch, progress)


def _runnable(written: Path, method: Method, scratch: Path) -> Path:
    """The file, or where ONNX Runtime has no kernels for it the same rounding in float32."""
    if method != "bf16":
        return written
    from edgekd.quantization.mixed_precision_verify import write_rounded

    rounded = scratch / "rounded.onnx"
    write_rounded(written, rounded, "bf16")
    return rounded


def _check_count(count: int, calibration: Path | None) -> None:
    from edgekd.quantization.calibration import LEAST_SAMPLES

    if count < LEAST_SAMPLES:
        raise InputError(
            f"calibration needs at least {LEAST_SAMPLES} samples, there are {count}",
            where=str(calibration),
            remedy="give some hundred real inputs, preprocessed as the model takes them",
        )


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
        asked = {
            "--max-drop": settings.max_drop is not None,
            "--per-layer": settings.per_layer,
            "--labels": settings.labels is not None,
        }
        for option in (option for option, given in asked.items() if given):
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
