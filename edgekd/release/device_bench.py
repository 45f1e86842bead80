"""What ``edgerun bench`` measured on the device (``edgerun.bench/1``), as figures for the gate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.config.profile import Profile
from edgekd.errors import InputError
from edgekd.measurement import Evidence, Measurement
from edgekd.release.build_result import MB, speedup_figure, timing_row
from edgekd.release.result import SCHEMA, Result

BENCH_SCHEMA = "edgerun.bench/1"
_ARM_KINDS = ("cpu-board", "jetson")
_ARM = ("aarch64", "arm64", "armv7l", "armv8l")
_NOT_SCORED = (
    "bench.json times a model and does not score it: give the pipeline's result too, "
    "edgekd gate result.json --device bench.json"
)


def read_bench(path: Path) -> dict[str, Any] | None:
    """The content of a file that ``edgerun bench --json`` wrote; None: it is something else.

    A missing file or invalid JSON is reported by the reader of results.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    is_bench = isinstance(content, dict) and content.get("schema") == BENCH_SCHEMA
    return content if is_bench else None


def evidence_of_bench(
    bench: Mapping[str, Any], profile: Profile | None, workstation: Mapping[str, Any] | None
) -> tuple[Evidence, str]:
    """How strong a bench.json is, and why where it is not the device's.

    Args:
        bench: its content.
        profile: the expected device; None: the measuring machine is the device.
        workstation: the ``environment`` of the workstation's result.
    """
    environment = bench.get("environment")
    if not isinstance(environment, Mapping):
        # The reader of the figures refuses it.
        return "measured-on-host", ""
    machine, cpu = environment.get("machine"), environment.get("cpu")
    if profile is None or profile.name == "host":
        return "measured-on-target", ""
    board = profile.kind in _ARM_KINDS
    if board and machine not in _ARM:
        return "measured-on-host", f"it was measured on {machine} ({cpu}), not on {profile.name}"
    if not board and workstation and cpu is not None and workstation.get("cpu") == cpu:
        return "measured-on-host", f"it was measured on the workstation's own {cpu}"
    return "measured-on-target", ""


def result_of_bench(
    bench: Mapping[str, Any], where: str, evidence: Evidence, lower_is_better: bool = False
) -> dict[str, Any]:
    """A result file's content with the figures that a bench.json has: latency, memory and size.

    Args:
        bench: its content.
        where: its path, for errors.
        evidence: of its figures.
        lower_is_better: the direction of a metric that it does not have.

    Raises:
        InputError: it is damaged.
    """
    try:
        rows = [_row(row, evidence) for row in bench["models"]]
        models = dict(zip(("student", "teacher"), rows, strict=False))
        speedup = speedup_figure(bench, evidence)
        content = {
            "schema": SCHEMA,
            "name": Path(bench["models"][0]["path"]).stem,
            "profile": str(bench["environment"].get("device") or "device"),
            "target": "device",
            "evidence": evidence,
            "task": {
                "name": "unknown",
                "metric": "metric",
                "higher_is_better": not lower_is_better,
            },
            "models": models,
            "comparison": {} if speedup is None else {"speedup": speedup.to_json()},
            "environment": bench["environment"],
            "versions": bench["environment"].get("versions") or {},
            "fingerprints": {},
        }
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise _damaged(where, error) from error
    Result.from_json(content, where)
    return content


def with_bench(
    result: Mapping[str, Any], bench: Mapping[str, Any], where: str, evidence: Evidence
) -> dict[str, Any]:
    """A result with the device's latency, memory and speed-up in place of the workstation's.

    Accuracy, size and parameters remain those of the result, with their own evidence.

    Args:
        result: the content of a result file.
        bench: that of the device's bench.json.
        where: its path, for errors.
        evidence: of the device's figures.

    Raises:
        InputError: the device measured another file, or its record is damaged.
    """
    try:
        measured = bench["models"]
        student = dict(result["models"]["student"])
        size = student.get("size_mb") or {}
        expected, found = round((size.get("value") or 0) * MB), measured[0]["size_bytes"]
        digest = student.get("sha256")
        same = measured[0]["sha256"] == digest if digest else expected in (0, found)
        # An engine of TensorRT is rebuilt on the device.
        if not same and str(student.get("file", "")).endswith(".onnx"):
            raise InputError(
                f"the device measured another file: {found:,} bytes, the result's student has "
                f"{expected:,}",
                where=where,
                remedy="measure the model.onnx of this run's bundle",
            )
        models = {**result["models"], "student": student | timing_row(measured[0], evidence)}
        comparison = {k: v for k, v in result["comparison"].items() if k != "speedup"}
        if "teacher" in models:
            teacher = dict(models["teacher"])
            for key in ("latency", "peak_memory_mb", "samples_ms", "warmup", "runtime"):
                teacher.pop(key, None)
            timed = timing_row(measured[1], evidence) if len(measured) > 1 else {}
            models["teacher"] = teacher | timed
        speedup = speedup_figure(bench, evidence)
        if speedup is not None:
            comparison["speedup"] = speedup.to_json()
        elif "speedup" in result["comparison"]:
            comparison["speedup"] = result["comparison"]["speedup"]
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise _damaged(where, error) from error
    merged = {
        **result,
        "models": models,
        "comparison": comparison,
        "environment": bench["environment"],
    }
    Result.from_json(merged, where)
    return merged


def _row(timed: Mapping[str, Any], evidence: Evidence) -> dict[str, Any]:
    return {
        "file": timed["path"],
        "metric": Measurement(None, "", 0, evidence=evidence, note=_NOT_SCORED).to_json(),
        "size_mb": Measurement(timed["size_bytes"] / MB, "MB", evidence=evidence).to_json(),
        **timing_row(timed, evidence),
    }


def _damaged(where: str, error: Exception) -> InputError:
    return InputError(
        f"this bench.json is damaged: {type(error).__name__}: {error}",
        where=where,
        remedy="measure again: python -m edgerun bench model.onnx --json bench.json",
    )
