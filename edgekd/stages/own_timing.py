"""The latency of two files on this machine, on samples that are open already."""

from __future__ import annotations

import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.errors import CrashError, InputError, StageError, TargetError
from edgekd.npz import write_npz

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekd.engines.samples import Samples
    from edgekd.spec import ModelSpec

QUERIES = 8
"""So many different ones are used in turn."""
MAX_SECONDS = 20.0


def compare_latency(
    model: Path, against: Path, spec: ModelSpec, samples: Samples | None, threads: int
) -> dict[str, Any]:
    """p50 of both in alternation, in a fresh process: ``p50_ms``, ``float_p50_ms``, ``speedup``
    with its ``interval``, ``threads``.

    Where they could not be timed, ``failed`` says why.

    Args:
        model: the file that was made.
        against: the float model.
        spec: its inputs.
        samples: None takes random inputs.
        threads: of ONNX Runtime.

    Raises:
        CrashError: ONNX Runtime dies of one of the files.
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
                raise  # The file is at fault, and not the machine.
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
    """What opens a file in another process and runs it once; raises an error as
    :meth:`edgekd.targets.LocalTarget.probe` does.

    Args:
        folder: outlives it.
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
    from edgekd.engines.batch_layout import spec_layout, to_model

    layout = spec_layout(spec.inputs)
    size = layout.size or 1
    batch = next(samples.batches(QUERIES * size))
    count = len(next(iter(batch.values())))
    rows = max(size, count // size * size)
    # Fewer samples than one query takes are taken again.
    whole = {name: np.resize(array, (rows, *array.shape[1:])) for name, array in batch.items()}
    write_npz(path, to_model(layout, whole))
