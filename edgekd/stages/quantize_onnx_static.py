"""Static INT8 of an ONNX file: measured, timed, float layers searched."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.errors import CrashError, InputError, StageError, TargetError
from edgekd.files import write_npz
from edgekd.stages.evaluator import remarks_on_ranges

if TYPE_CHECKING:
    from edgekd.onnx.samples import Array, Samples
    from edgekd.quantization.settings import QuantizeSettings
    from edgekd.spec import ModelSpec
    from edgekd.stages.evaluator import Evaluator

QUERIES = 8
"""Number of different queries used in turn."""

MAX_SECONDS = 20.0


def compare_latency(
    model: Path, against: Path, spec: ModelSpec, samples: Samples | None, threads: int
) -> dict[str, Any]:
    """p50 of both, interleaved, in a fresh process: ``p50_ms``, ``float_p50_ms``, ``speedup``
    with its ``interval``, ``threads``.

    Where they could not be timed, ``failed`` says why.

    Args:
        model: the file that was made.
        against: the float model.
        spec: the specs of its inputs.
        samples: None takes random inputs.
        threads: number of threads of ONNX Runtime.

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
                max_seconds=MAX_SECONDS,
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


def opener(
    folder: Path, spec: ModelSpec, samples: Samples | None, threads: int = 1
) -> Callable[[Path], object]:
    """A function that opens a file in another process and runs it once; raises as
    :meth:`edgekd.targets.LocalTarget.probe` does.

    Args:
        folder: a folder that exists for as long as the function is used.
        spec: the inputs of the files.
        samples: None takes random inputs.
        threads: of ONNX Runtime.
    """
    from edgekd.targets import LocalTarget

    inputs = None
    if samples is not None and samples.count:
        inputs = folder / "probe.npz"
        write_queries(inputs, spec, samples)
    return lambda path: LocalTarget().probe(path, inputs=inputs, threads=threads)


def write_queries(path: Path, spec: ModelSpec, samples: Samples) -> None:
    """A few queries of the size that the model fixes, else of one sample, as an npz file."""
    from edgekd.onnx.inference import to_model
    from edgekd.onnx.samples import spec_layout

    layout = spec_layout(spec.inputs)
    size = layout.size or 1
    batch = next(samples.batches(QUERIES * size))
    count = len(next(iter(batch.values())))
    rows = max(size, count // size * size)
    # Fewer samples than one query needs are repeated.
    whole = {name: np.resize(array, (rows, *array.shape[1:])) for name, array in batch.items()}
    write_npz(path, to_model(layout, whole))


RANKED_ON = 512


def write_static(
    model: Path,
    out: Path,
    samples: Samples,
    judge: Evaluator,
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
    from edgekd.onnx.file import describe_onnx
    from edgekd.quantization.static import StaticQuantizer

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
    reasons = dict.fromkeys(quantizer.kept, "listed in --keep") | quantizer.left_in_float
    if quantizer.mixed:
        said["mixed"] = [str(mixed) for mixed in quantizer.mixed]
    decision = None
    if settings.max_drop is None:
        quantizer.write(out)
    else:
        from edgekd.quantization.mixed_precision_search import search_float_layers

        decision = search_float_layers(
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
    """The timing with ``float_p50_ms`` renamed to ``int8_p50_ms``: both files are quantized."""
    return {
        "int8_p50_ms" if name == "float_p50_ms" else name: value for name, value in timing.items()
    }


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
