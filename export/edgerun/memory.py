"""Peak memory of a model: fresh processes that only run it, less an empty one.

The peak is the kernel's high-water mark of resident memory (VmHWM), which starts anew when a
program starts; ``getrusage`` would carry over the parent's.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from edgerun.errors import RunFailed
from edgerun.inputs import Feed
from edgerun.session import Model, Settings

MB = 1e6
PROCESSES = 3
QUERIES = 20
"""Peak and empty memory are each taken from three processes; the model answers 20 queries,
after which the runtime's arena no longer grows for inputs of the same shape."""


def peak_mb() -> float | None:
    """The most resident memory that this process has held so far, in MB of 10⁶ bytes.

    None where the kernel does not tell.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / MB
    return None


def empty_memory() -> float | None:
    """Median peak in MB of processes that only import the runtime."""
    peaks = [_child([]) for _ in range(PROCESSES)]
    known = [p for p in peaks if p is not None]
    return statistics.median(known) if known else None


def model_memory(
    model: Path, settings: Settings, feed: Feed, empty: float | None
) -> dict[str, Any]:
    """``{"peak_mb", "empty_mb", "above_empty_mb", "processes"}``: the largest of the peaks.

    Values are null where the kernel does not tell them.

    Raises:
        RunFailed: the process ended without an answer, as when it is killed for memory.
    """
    with tempfile.TemporaryDirectory(prefix="edgerun-") as folder:
        path = Path(folder) / "feed.npz"
        # By number: an input's name may not be usable as a file name inside an npz.
        arrays: dict[str, Any] = {f"a{i}": array for i, array in enumerate(feed.values())}
        np.savez(path, **arrays)
        job = {
            "model": str(model),
            "feed": str(path),
            "names": list(feed),
            "threads": settings.threads,
            "providers": list(settings.providers),
            "optimization": settings.optimization,
        }
        peaks = [_child([json.dumps(job)]) for _ in range(PROCESSES)]
    known = [p for p in peaks if p is not None]
    peak = max(known) if known else None
    above = None if peak is None or empty is None else peak - empty
    return {"peak_mb": peak, "empty_mb": empty, "above_empty_mb": above, "processes": PROCESSES}


def _child(arguments: Sequence[str]) -> float | None:
    """The peak that a fresh process reports."""
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parent.parent))
    done = subprocess.run(
        [sys.executable, "-m", "edgerun.memory", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise RunFailed(
            f"the process that measures memory ended with code {done.returncode}: {last}",
            remedy="a negative code is a signal; 9 often means that the memory ran out",
        )
    answer: float | None = json.loads(done.stdout)
    return answer


def _main(arguments: Sequence[str]) -> None:
    """The child: run the job, if there is one, and print the peak."""
    if arguments:
        job = json.loads(arguments[0])
        with np.load(job["feed"]) as archive:
            feed = {name: archive[f"a{i}"] for i, name in enumerate(job["names"])}
        settings = Settings(job["threads"], tuple(job["providers"]), job["optimization"])
        model = Model(Path(job["model"]), settings)
        for _ in range(QUERIES):
            model.run(feed)
    print(json.dumps(peak_mb()))


if __name__ == "__main__":
    _main(sys.argv[1:])
