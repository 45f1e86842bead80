"""The machine of a measurement: its environment, and conditions that may change meanwhile.

Clocks, temperatures, power mode and throttling are read where the machine exposes them; a sensor
that is missing is None, never zero.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator

import numpy as np

import edgerun
from edgerun.cuda_runtime import load_cuda_runtime
from edgerun.errors import EdgerunError
from edgerun.nvml import MB, Unread, open_nvml, read_gpus
from edgerun.tensorrt.library import find_gpu

ROOT = Path("/")
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
        text = _text(root / name)
        if text:
            return text
    return None


def _operating_system(root: Path) -> str | None:
    match = re.search(r'^PRETTY_NAME="?([^"\n]+)', _text(root / "etc/os-release") or "", re.M)
    return match.group(1) if match else platform.system() or None


def _cpu(root: Path) -> str | None:
    text = _text(root / "proc/cpuinfo") or ""
    match = re.search(r"^(?:model name|Hardware|Model)\s*:\s*(.+)$", text, re.M)
    return match.group(1).strip() if match else platform.processor() or None


def _usable_cpus() -> int | None:
    """Processors that the scheduler lets this process use, fewer than all in a container."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory_mb(root: Path) -> float | None:
    match = re.search(r"^MemTotal:\s*(\d+) kB", _text(root / "proc/meminfo") or "", re.M)
    return int(match.group(1)) * 1024 / 1e6 if match else None


def _virtual_machine(root: Path) -> bool | None:
    text = _text(root / "proc/cpuinfo")
    if text is None or not re.search(r"^flags\s*:", text, re.M):
        return None
    return re.search(r"^flags\s*:.*\bhypervisor\b", text, re.M) is not None


def read_conditions(root: Path = ROOT) -> dict[str, Any]:
    """Values that may change during a measurement: read before and after it.

    Keys: ``clocks_mhz`` (per core), ``temperatures_c`` (per zone), ``load_1m``, ``power_mw``
    (per rail), ``throttling`` (see :func:`read_throttling`), ``gpus`` (NVIDIA's, by NVML).
    """
    return {
        "clocks_mhz": _clocks(root),
        "temperatures_c": _temperatures(root),
        "load_1m": _load(root),
        "power_mw": _rails(root),
        "throttling": read_throttling(root),
        "gpus": read_gpus() if root == ROOT else None,
    }


def read_power(root: Path = ROOT) -> dict[str, Any]:
    """Fixed settings: governor, clock limits, turbo, Jetson power mode."""
    policy = root / "sys/devices/system/cpu/cpu0/cpufreq"
    return {
        "governor": _text(policy / "scaling_governor"),
        "clock_min_mhz": _scaled(policy / "scaling_min_freq", 1e3),
        "clock_max_mhz": _scaled(policy / "scaling_max_freq", 1e3),
        "turbo": _turbo(root),
        "nvpmodel": _nvpmodel(root),
    }


def read_throttling(root: Path = ROOT) -> dict[str, Any] | None:
    """Counters and flags of throttling; None where the machine has none.

    x86: events summed over the cores. Raspberry Pi: the flags of ``vcgencmd get_throttled``
    (bit 0 under-voltage, 1 clock capped, 2 throttled, 3 soft temperature limit; the same shifted
    by 16 for "has happened since start"). Jetson: over-current events per rail.
    """
    found: dict[str, Any] = {}
    cores = root / "sys/devices/system/cpu"
    counts = [_number(p) for p in cores.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")]
    known = [c for c in counts if c is not None]
    if known:
        found["x86_events"] = int(sum(known))
    flags = _vcgencmd_throttled(root)
    if flags is not None:
        found["raspberry_pi_flags"] = flags
    rails = {path.name: _number(path) for path in root.glob("sys/class/hwmon/hwmon*/oc*_event_cnt")}
    if rails:
        found["jetson_overcurrent_events"] = rails
    return found or None


def _clocks(root: Path) -> list[float] | None:
    cores = root / "sys/devices/system/cpu"
    files = sorted(
        cores.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"),
        key=lambda p: int(re.sub(r"\D", "", p.parent.parent.name)),
    )
    clocks = [c for c in (_scaled(path, 1e3) for path in files) if c is not None]
    if clocks:
        return clocks
    # A virtual machine often has no cpufreq, but names the clock here.
    found = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _text(root / "proc/cpuinfo") or "", re.M)
    return [float(value) for value in found] or None


def read_clock(root: Path = ROOT) -> float | None:
    """The highest clock of a core now, in MHz: that of the one which is in use."""
    clocks = _clocks(root)
    return max(clocks) if clocks else None


def _temperatures(root: Path) -> dict[str, float] | None:
    zones: dict[str, float] = {}
    for zone in sorted(root.glob("sys/class/thermal/thermal_zone*")):
        value = _scaled(zone / "temp", 1e3)
        if value is not None:
            zones[f"{zone.name}:{_text(zone / 'type') or 'unnamed'}"] = value
    return zones or None


def _load(root: Path) -> float | None:
    text = _text(root / "proc/loadavg")
    return float(text.split()[0]) if text else None


def _rails(root: Path) -> dict[str, float] | None:
    """Power of each rail of a Jetson's INA3221: the files are in mV and mA."""
    rails: dict[str, float] = {}
    for label in sorted(root.glob("sys/class/hwmon/hwmon*/in[0-9]_label")):
        channel = re.sub(r"\D", "", label.name)
        volts = _scaled(label.parent / f"in{channel}_input", 1e3)
        milliamperes = _number(label.parent / f"curr{channel}_input")
        if volts is not None and milliamperes is not None:
            rails[_text(label) or label.name] = volts * milliamperes
    return rails or None


def _turbo(root: Path) -> bool | None:
    no_turbo = _number(root / "sys/devices/system/cpu/intel_pstate/no_turbo")
    if no_turbo is not None:
        return no_turbo == 0
    boost = _number(root / "sys/devices/system/cpu/cpufreq/boost")
    return None if boost is None else boost == 1


def _nvpmodel(root: Path) -> str | None:
    if root != ROOT or shutil.which("nvpmodel") is None:
        return None
    output = _command("nvpmodel", "-q")
    match = re.search(r"NV Power Mode:\s*(\S+)", output or "")
    return match.group(1) if match else None


def _vcgencmd_throttled(root: Path) -> int | None:
    if root != ROOT or shutil.which("vcgencmd") is None:
        return None
    match = re.search(r"throttled=(0x[0-9a-fA-F]+)", _command("vcgencmd", "get_throttled") or "")
    return int(match.group(1), 16) if match else None


def _command(*words: str) -> str | None:
    try:
        done = subprocess.run(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ") or None
    except OSError:
        return None


def _number(path: Path) -> float | None:
    text = _text(path)
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _scaled(path: Path, divisor: float) -> float | None:
    value = _number(path)
    return None if value is None else value / divisor


def description_lines(value: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Nested keys and values, one a line; unknown values are shown as "not known"."""
    for key, item in value.items():
        if isinstance(item, dict):
            yield f"{indent}{key}:"
            yield from description_lines(item, indent + "  ")
        elif isinstance(item, list):
            yield f"{indent}{key}: {', '.join(map(str, item))}"
        else:
            yield f"{indent}{key}: {'not known' if item is None else item}"
