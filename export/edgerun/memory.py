"""Peak memory of a model: fresh processes that only run it, less an empty one.

The peak is the kernel's high-water mark of resident memory (VmHWM), which is reset when a
program starts; ``getrusage`` would carry over the parent's. For a model on a GPU the device's
memory is read as well, after each query (see :class:`MemoryWatch`; that part was never run).
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from edgerun.cuda_runtime import load_cuda_runtime
from edgerun.errors import EdgerunError, RunFailed
from edgerun.files import is_engine
from edgerun.inputs import Feed
from edgerun.model import Settings
from edgerun.nvml import MB, Nvml, Unread, open_nvml
from edgerun.process import PARENT, end_with_parent
from edgerun.run import open_model
from edgerun.tensorrt.library import MODULES

PROCESSES = 3
QUERIES = 20
"""Peak and empty memory are each taken from three processes; the model runs 20 queries,
after which the runtime's arena no longer grows for inputs of the same shape."""

GPU_PROVIDERS = (
    "CUDAExecutionProvider",
    "TensorrtExecutionProvider",
    "NvTensorRTRTXExecutionProvider",
)
NO_GPU = {"device_mb": None, "device_note": "no GPU is used"}


def peak_mb() -> float | None:
    """The peak resident memory of this process so far, in MB of 10⁶ bytes.

    None where the kernel does not report it.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / MB
    return None


def runtime_of(path: Path, providers: Sequence[str]) -> tuple[str, ...]:
    """The modules that opening a model imports, its runtime among them.

    Args:
        path: the model.
        providers: those of the opened model.
    """
    if is_engine(path):
        return ("edgerun.tensorrt.runner", MODULES[providers[0]])
    return ("edgerun.onnx_session",)


@functools.lru_cache(maxsize=None)
def empty_memory(runtime: tuple[str, ...]) -> float | None:
    """Median peak in MB of processes that only import the runtime; measured once."""
    peaks = [_child({"runtime": list(runtime)})["peak_mb"] for _ in range(PROCESSES)]
    known = [p for p in peaks if p is not None]
    return statistics.median(known) if known else None


def model_memory(
    model: Path, runtime: tuple[str, ...], settings: Settings, feed: Feed
) -> dict[str, Any]:
    """``{"peak_mb", "empty_mb", "above_empty_mb", "processes", "device_mb", "device_note"}``.

    The largest of the peaks; ``device_mb`` is the GPU's, which the others do not count.
    Values are null where the kernel or the driver does not report them.

    Args:
        model: its file.
        runtime: :func:`runtime_of` it.
        settings: to open it with.
        feed: of its queries.

    Raises:
        RunFailed: the process ended without a result, as when it is killed for memory.
    """
    with tempfile.TemporaryDirectory(prefix="edgerun-") as folder:
        path = Path(folder) / "feed.npz"
        # By number: an input's name may not be usable as a file name inside an npz.
        arrays: dict[str, Any] = {f"a{i}": array for i, array in enumerate(feed.values())}
        np.savez(path, **arrays)
        options = {name: dict(given) for name, given in settings.provider_options.items()}
        job = {
            "model": str(model),
            "feed": str(path),
            "names": list(feed),
            "settings": {**vars(settings), "provider_options": options},
        }
        reports = [_child(job) for _ in range(PROCESSES)]
    known = [report["peak_mb"] for report in reports if report["peak_mb"] is not None]
    peak, empty = max(known) if known else None, empty_memory(runtime)
    return {
        "peak_mb": peak,
        "empty_mb": empty,
        "above_empty_mb": None if peak is None or empty is None else peak - empty,
        "processes": PROCESSES,
        **max((report["device"] for report in reports), key=lambda d: d["device_mb"] or 0.0),
    }


def _child(job: dict[str, Any]) -> dict[str, Any]:
    """The report of a fresh process: ``{"peak_mb", "device"}``."""
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parent.parent))
    environment[PARENT] = str(os.getpid())
    done = subprocess.run(
        [sys.executable, "-m", "edgerun.memory", json.dumps(job)],
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
    # Other lines on standard output are written by libraries.
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return report


class MemoryWatch:
    """Peak device memory of this process, sampled between queries.

    The driver's figure for this process, CUDA's context included; where it has none, how far
    the complete device's figure has risen since the start, in which other processes count, too.

    Args:
        nvml: the device, opened before the process first uses it; None when there is none.
        remark: a note: why there is no device, or that its memory is the host's.
    """

    def __init__(self, nvml: Nvml | None, remark: str = "") -> None:
        self._nvml = nvml
        self._remarks = [remark] if remark else []
        self._before: int | None = None
        self._own: int | None = None
        self._risen: int | None = None
        if nvml is not None:
            try:
                self._before = nvml.used()
            except Unread as error:
                self._remark(error)

    def look(self) -> None:
        """Read the figures now."""
        if self._nvml is None:
            return
        try:
            self._own = max(self._own or 0, self._nvml.used_by(os.getpid()))
            return
        except Unread as error:
            self._remark(error)
        if self._before is not None:
            try:
                self._risen = max(self._risen or 0, self._nvml.used() - self._before)
            except Unread as error:
                self._remark(error)

    def result(self) -> dict[str, Any]:
        """``device_mb`` (MB of 10⁶ bytes; None: not known) and ``device_note``: what it is."""
        if self._own is not None:
            figure, what = self._own / MB, "this process, CUDA's context included"
        elif self._risen is not None:
            figure, what = (
                self._risen / MB,
                "rise of the complete device's, other processes included",
            )
        else:
            return {"device_mb": None, "device_note": "; ".join(["not known", *self._remarks])}
        return {"device_mb": figure, "device_note": "; ".join([what, *self._remarks])}

    def _remark(self, error: Unread) -> None:
        if str(error) not in self._remarks:
            self._remarks.append(str(error))


def _watch(model: Path, providers: Sequence[str]) -> MemoryWatch | None:
    """The GPU's memory before the model uses it; None for a model on the CPU."""
    if not is_engine(model) and not set(providers) & set(GPU_PROVIDERS):
        return None
    bus, shared = None, ""
    try:
        device = load_cuda_runtime().device()
        # Where the GPU is part of the chip, NVML may not list it by a bus.
        bus = None if device.integrated else device.pci_bus_id
        shared = "the GPU shares the host's memory" if device.integrated else ""
    except EdgerunError:
        # Without libcudart the first GPU is measured; a model that needs it fails by itself.
        pass
    try:
        return MemoryWatch(open_nvml(bus), shared)
    except Unread as error:
        return MemoryWatch(None, "; ".join(filter(None, (shared, str(error)))))


def _main(job: dict[str, Any]) -> None:
    """The child: run the model, or only import the runtime, and print the peaks."""
    device = NO_GPU
    if "runtime" in job:
        for module in job["runtime"]:
            importlib.import_module(module)
    else:
        with np.load(job["feed"]) as archive:
            feed = {name: archive[f"a{i}"] for i, name in enumerate(job["names"])}
        path, given = Path(job["model"]), job["settings"]
        settings = Settings(**{**given, "providers": tuple(given["providers"])})
        watch = _watch(path, settings.providers)
        model = open_model(path, settings)
        for _ in range(QUERIES):
            model.run(feed)
            if watch is not None:
                watch.look()
        device = NO_GPU if watch is None else watch.result()
    print(json.dumps({"peak_mb": peak_mb(), "device": device}))


if __name__ == "__main__":
    end_with_parent()
    _main(json.loads(sys.argv[1]))
