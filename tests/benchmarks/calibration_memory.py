"""Seconds and peak resident memory of static quantization, over the number of samples.

    python tests/benchmarks/calibration_memory.py MODEL.onnx [--samples 512 8192]

Each row is a process of its own that reads random inputs from an npz file. The memory of the
imports is shown in the first row, which quantizes nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from edgekd.onnx.file import describe_onnx
from edgekd.onnx.samples import open_samples
from edgekd.quantization.static import StaticQuantizer


def main() -> None:
    """Make the data and print one row for each process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--calibrators", nargs="+", default=["minmax", "percentile", "entropy"])
    parser.add_argument("--child", nargs=2, metavar=("DATA", "CALIBRATOR"))
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_measure(options.model, Path(options.child[0]), options.child[1])))
        return
    print("| calibrator | samples | s | peak MB |\n|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        _row(options.model, "imports alone", 0, "none", "none")
        for count in options.samples:
            data = Path(folder) / f"{count}.npz"
            _write(options.model, data, count)
            for calibrator in options.calibrators:
                _row(options.model, calibrator, count, str(data), calibrator)


def _row(model: Path, name: str, count: int, data: str, calibrator: str) -> None:
    command = [sys.executable, __file__, str(model), "--child", data, calibrator]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    print(f"| {name} | {count:,} | {figures['seconds']:.2f} | {figures['mb']:.1f} |", flush=True)


def _write(model: Path, data: Path, count: int) -> None:
    random = np.random.default_rng(0)
    arrays = {}
    for tensor in describe_onnx(model).spec.inputs:
        shape = [count, *(size if isinstance(size, int) else 1 for size in tensor.shape[1:])]
        arrays[tensor.name] = random.standard_normal(shape).astype(tensor.dtype)
    np.savez(data, **arrays)


def _measure(model: Path, data: Path, calibrator: str) -> dict[str, float]:
    seconds = 0.0
    if calibrator != "none":
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            samples = open_samples(data, describe_onnx(model).spec)
            quantizer = StaticQuantizer(
                model,
                samples,
                Path(folder),
                runtime="cpu",
                calibration=calibrator,  # type: ignore[arg-type]
            )
            quantizer.write(Path(folder) / "int8.onnx")
            seconds = time.perf_counter() - begin
    return {"seconds": seconds, "mb": _peak_mb()}


def _peak_mb() -> float:
    """The peak of this program alone: getrusage's also has that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


if __name__ == "__main__":
    main()
