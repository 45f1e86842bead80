"""This machine: processor, memory, GPU, execution providers, launcher."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil

CPU_PROVIDER = "CPUExecutionProvider"

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")

TEGRA_RELEASE = Path("/etc/nv_tegra_release")

# Preferred first. Not TensorRT, which needs libraries of its own and minutes to build an engine:
# it must be listed explicitly. Not Azure, which sends the data to a server.
LOCAL_PROVIDERS = (
    "CUDAExecutionProvider",
    "CoreMLExecutionProvider",
    "OpenVINOExecutionProvider",
    CPU_PROVIDER,
)


@dataclass(frozen=True)
class Machine:
    """Cores that this process may use, memory in MB that it may use, and the processor."""

    cores: int
    memory_mb: float
    cpu_model: str


def this_machine() -> Machine:
    """Read the machine; limits of a container (affinity, memory control group) count."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    memory = psutil.virtual_memory().total
    limit = _container_limit(Path("/sys/fs/cgroup"))
    return Machine(cores, round(min(memory, limit or memory) / 1e6), cpu_model())


def _container_limit(folder: Path) -> int | None:
    """The control group's memory limit in bytes (version 2, then 1); None without one."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (folder / name).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name: x86 and ARM kernels put it under different keys, and some omit it."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    for key in ("model name", "Model", "Hardware"):
        if fields.get(key):
            return fields[key]
    return platform.processor() or platform.machine()


def has_nvidia_gpu() -> bool:
    """Whether an NVIDIA kernel driver is loaded: a desktop GPU's, or a Jetson's."""
    return NVIDIA_DRIVER.exists() or TEGRA_RELEASE.exists()


def local_providers() -> tuple[str, ...]:
    """The execution providers of the installed ONNX Runtime that this machine can serve.

    A build with CUDA on a machine without an NVIDIA driver has CUDA left out, so that ``host``
    means what is available. Without ONNX Runtime: the CPU provider, which every build has.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return (CPU_PROVIDER,)
    import onnxruntime

    built_in = set(onnxruntime.get_available_providers())
    if not has_nvidia_gpu():
        built_in.discard("CUDAExecutionProvider")
    return tuple(name for name in LOCAL_PROVIDERS if name in built_in)


_X86 = {"x86_64", "amd64", "i386", "i686", "x86"}

# Dot-product instructions that add four 8-bit products in 32 bits. VNNI is avx_vnni or
# avx512_vnni; AMX has its own flag.
_WIDE = ("avx_vnni", "avx512_vnni", "amx_int8")


def saturates(machine: str | None = None, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """True where uint8 x int8 products are summed in pairs in 16 bits and may overflow.

    That is x86 before VNNI (``vpmaddubsw``): 255 x 127 x 2 exceeds 32767. Weights of 7 bits fit.
    ARM and newer x86 sum in 32 bits. An x86 that does not list its features counts as old:
    one bit of the weights costs less than a wrong sum.
    """
    if (machine or platform.machine()).lower() not in _X86:
        return False
    try:
        flags = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    return not any(name in flags for name in _WIDE)


def world_size() -> int:
    """The number of processes of ``torchrun`` or a launcher that sets the same variables."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


ONNXRUNTIME_BUILDS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino")


def version_of(package: str) -> str | None:
    """The installed version of a distribution; of any of its builds for ONNX Runtime."""
    for name in ONNXRUNTIME_BUILDS if package == "onnxruntime" else (package,):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return version if name == package else f"{version} ({name})"
    return None
