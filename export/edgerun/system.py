"""The environment of a measurement: device, operating system, versions, processor, memory."""

from __future__ import annotations

import os
import platform
import re
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

import edgerun
from edgerun.cuda_runtime import load_cuda_runtime
from edgerun.errors import EdgerunError
from edgerun.nvml import MB, Unread, open_nvml
from edgerun.sensors import ROOT, read_power
from edgerun.tensorrt.library import find_gpu

PARENT = "EDGERUN_PARENT"
"""Environment variable: the number of the process with which this one has to end."""

RUNTIMES = ("onnxruntime", "tensorrt", "tensorrt_rtx")


def describe_environment(root: Path = ROOT) -> dict[str, Any]:
    """Properties that do not change during a measurement; unreadable ones are None."""
    # First, as it loads the runtime whose version is reported.
    providers = _providers()
    return {
        "device": _device(root),
        "os": _operating_system(root),
        "kernel": platform.release() or None,
        "machine": platform.machine() or None,
        "cpu": _cpu(root),
        "cpus": os.cpu_count(),
        "cpus_usable": _usable_cpus(),
        "memory_mb": _memory_mb(root),
        "python": platform.python_version(),
        "versions": {
            "edgerun": edgerun.__version__,
            "numpy": np.__version__,
            **_runtimes(),
        },
        "providers_available": providers,
        "gpu": _gpu() if root == ROOT else None,
        "virtual_machine": _virtual_machine(root),
        **read_power(root),
    }


def end_with_parent() -> None:
    """Have the kernel (Linux) kill this process when the one that ``PARENT`` names ends.

    Otherwise the child of a process that was killed goes on measuring, and disturbs what is
    measured next.
    """
    parent = os.environ.get(PARENT, "")
    if not parent.isdigit() or sys.platform != "linux":
        return
    import ctypes

    try:
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))
    except (OSError, AttributeError):
        return
    if os.getppid() != int(parent):  # It ended before that call.
        sys.exit(128 + signal.SIGKILL)


def _runtimes() -> dict[str, str]:
    """Versions of the runtimes that this process has loaded."""
    loaded = {name: sys.modules.get(name) for name in RUNTIMES}
    return {name: str(module.__version__) for name, module in loaded.items() if module}


def _providers() -> list[str]:
    try:
        import onnxruntime
    except ImportError:
        # A device may have TensorRT alone.
        return []
    return list(onnxruntime.get_available_providers())


def _gpu() -> dict[str, Any] | None:
    """The GPU that CUDA uses, and the versions of its driver, of CUDA in it and of libcudart."""
    found = find_gpu()
    if found is None:
        return None
    gpu: dict[str, Any] = {
        **found.to_json(),
        **dict.fromkeys(("integrated", "cuda_driver", "cuda_runtime", "driver", "memory_mb")),
    }
    bus = None
    try:
        device = load_cuda_runtime().device()
        # Where the GPU is part of the chip, NVML may not list it by a bus.
        bus = None if device.integrated else device.pci_bus_id
        gpu["integrated"] = device.integrated
        gpu["cuda_driver"], gpu["cuda_runtime"] = device.driver, device.runtime
    except EdgerunError:
        pass
    try:
        nvml = open_nvml(bus)
        gpu["driver"] = nvml.driver()
        gpu["memory_mb"] = nvml.total() / MB
    except Unread:
        pass
    return gpu


def _device(root: Path) -> str | None:
    """The board's name: from the device tree (ARM boards) or the firmware (x86)."""
    for name in ("proc/device-tree/model", "sys/devices/virtual/dmi/id/product_name"):
        text = _read(root / name)
        if text:
            return text
    return None


def _operating_system(root: Path) -> str | None:
    match = re.search(r'^PRETTY_NAME="?([^"\n]+)', _read(root / "etc/os-release") or "", re.M)
    return match.group(1) if match else platform.system() or None


def _cpu(root: Path) -> str | None:
    text = _read(root / "proc/cpuinfo") or ""
    match = re.search(r"^(?:model name|Hardware|Model)\s*:\s*(.+)$", text, re.M)
    return match.group(1).strip() if match else platform.processor() or None


def _usable_cpus() -> int | None:
    """Processors that the scheduler lets this process use, fewer than all in a container."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory_mb(root: Path) -> float | None:
    match = re.search(r"^MemTotal:\s*(\d+) kB", _read(root / "proc/meminfo") or "", re.M)
    return int(match.group(1)) * 1024 / 1e6 if match else None


def _virtual_machine(root: Path) -> bool | None:
    text = _read(root / "proc/cpuinfo")
    if text is None or not re.search(r"^flags\s*:", text, re.M):
        return None
    return re.search(r"^flags\s*:.*\bhypervisor\b", text, re.M) is not None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ") or None
    except OSError:
        return None
