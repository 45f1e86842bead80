"""One model in INT8 by edgekd, by ONNX Runtime's own defaults, by NNCF and by Olive, side by side.

    python tests/benchmarks/int8.py MODEL.onnx CALIBRATION.npz HELD_OUT.npz [--threads 1 2]

Everything is calibrated on the same samples and compared with float32 on others. The seconds of
edgekd's rows are mostly those of its own comparisons of latency. With an array ``label`` in the
held-out file the accuracy is shown too. Latency: each file in turn with float32, in a fresh
process, as a ratio. NNCF and Olive are left out where they are not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from edgekd.api import quantize
from edgekd.onnx.file import describe_onnx
from edgekd.onnx.inference import run_samples
from edgekd.onnx.samples import open_samples
from edgekd.targets import LocalTarget

Way = Callable[[Path, Path, Path, Path], None]
"""(model, file to write, calibration samples, scratch folder) -> None."""


def main() -> None:
    """Write all files, then print one row for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    options = parser.parse_args()
    spec = describe_onnx(options.model).spec
    held_out = open_samples(options.held_out, spec)
    with np.load(options.held_out) as archive:
        labels = archive.get("label")
    output = spec.outputs[0].name
    reference = run_samples(options.model, held_out)[output].argmax(1)
    heads = "".join(f" p50, {n} thread(s) | speed-up |" for n in options.threads)
    print(f"| way | s | bytes | smaller | same class | accuracy |{heads}")
    print("|---|---:|---:|---:|---:|---:|" + "---:|---:|" * len(options.threads))
    size = options.model.stat().st_size
    with tempfile.TemporaryDirectory() as folder:
        _row("float32", options.model, size, 0.0, reference, reference, labels, [])
        for way in options.ways:
            package = PACKAGES.get(way)
            if package and importlib.util.find_spec(package) is None:
                continue
            out, scratch = Path(folder) / f"{way.replace(' ', '-')}.onnx", Path(folder) / way
            scratch.mkdir()
            begin = time.perf_counter()
            WAYS[way](options.model, out, options.calibration, scratch)
            seconds = time.perf_counter() - begin
            answers = run_samples(out, held_out)[output].argmax(1)
            times = [_time(out, options.model, options.held_out, n) for n in options.threads]
            _row(way, out, size, seconds, answers, reference, labels, times)


def _row(
    name: str,
    file: Path,
    size: int,
    seconds: float,
    answers: np.ndarray,
    reference: np.ndarray,
    labels: np.ndarray | None,
    times: list[str],
) -> None:
    own = file.stat().st_size
    accuracy = "–" if labels is None else f"{(answers == labels).mean():.2%}"
    print(
        f"| {name} | {seconds:.1f} | {own:,} | {size / own:.2f}× | "
        f"{(answers == reference).mean():.2%} | {accuracy} | {' | '.join(times)} |",
        flush=True,
    )


def _time(file: Path, against: Path, inputs: Path, threads: int) -> str:
    record = LocalTarget().bench(
        file, against=against, inputs=inputs, threads=threads, max_seconds=30, memory=False
    )
    low, high = record["comparison"]["interval"]
    p50 = record["models"][0]["latency"]["p50"]["value"]
    return f"{p50:.4f} ms | {record['comparison']['ratio']:.2f}× ({low:.2f}–{high:.2f})"


def _edgekd_for(runtime: str, calibrator: str = "minmax") -> Way:
    """As ``edgekd quantize`` writes it on this machine."""

    def write(model: Path, out: Path, calibration: Path, scratch: Path) -> None:
        quantize(model, out, calibration, runtime=runtime, calibrator=calibrator)

    return write


def _onnxruntime(model: Path, out: Path, calibration: Path, scratch: Path) -> None:
    """By its own defaults, after the preparation that its documentation asks for."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    samples = open_samples(calibration, describe_onnx(model).spec)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = samples.batches(1)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rows, None)

    quant_pre_process(str(model), str(scratch / "prepared.onnx"))
    quantize_static(str(scratch / "prepared.onnx"), str(out), Reader())


def _nncf(model: Path, out: Path, calibration: Path, scratch: Path) -> None:
    import nncf

    samples = open_samples(calibration, describe_onnx(model).spec)
    data = nncf.Dataset(list(samples.batches(1)))
    onnx.save(nncf.quantize(onnx.load(model), data, subset_size=samples.count), out)


def _olive(model: Path, out: Path, calibration: Path, scratch: Path) -> None:
    from olive.data.config import DataComponentConfig, DataConfig
    from olive.data.registry import Registry
    from olive.hardware import AcceleratorSpec
    from olive.model import ONNXModelHandler
    from olive.passes.olive_pass import create_pass_from_dict
    from olive.passes.onnx.quantization import OnnxStaticQuantization

    samples = open_samples(calibration, describe_onnx(model).spec)

    class Rows:
        def __init__(self) -> None:
            self.rows = [(row, 0) for row in samples.batches(1)]

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], int]:
            return {name: array[0] for name, array in self.rows[index][0].items()}, 0

    Registry.register_dataset("edgekd_rows")(lambda *_, **__: Rows())
    data = DataConfig(name="rows", load_dataset_config=DataComponentConfig(type="edgekd_rows"))
    step = create_pass_from_dict(
        OnnxStaticQuantization,
        {"data_config": data},
        disable_search=True,
        accelerator_spec=AcceleratorSpec("cpu", "CPUExecutionProvider"),
    )
    written = step.run(ONNXModelHandler(str(model)), str(scratch / "olive"))
    out.write_bytes(Path(written.model_path).read_bytes())


WAYS: dict[str, Way] = {
    "edgekd cpu": _edgekd_for("cpu"),
    "edgekd cpu, percentile": _edgekd_for("cpu", "percentile"),
    "edgekd cpu, entropy": _edgekd_for("cpu", "entropy"),
    "edgekd tensorrt": _edgekd_for("tensorrt"),
    "onnxruntime": _onnxruntime,
    "nncf": _nncf,
    "olive": _olive,
}
PACKAGES = {"nncf": "nncf", "olive": "olive"}


if __name__ == "__main__":
    main()
