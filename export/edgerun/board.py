"""What a board is, and what it lacks: readable without numpy and without a runtime."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

ROOT = Path("/")
# What decides the speed of a network: the dot products of 8-bit numbers, 16-bit floats, vectors.
FEATURES = (
    "neon", "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "avx2", "fma", "avx512f",
    "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8",
)  # fmt: skip
PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino")
LEAST_PYTHON = (3, 8)
LOW_DISK_MB = 500
LOW_MEMORY_MB = 200


def describe_board(root: Path = ROOT, folder: Optional[Path] = None) -> Dict[str, Any]:
    """What the machine is; unreadable values are None. ``missing`` says what to do about what.

    Args:
        root: another root of the file system, such as a recorded one.
        folder: whose free space is ``disk_free_mb``; None is the home folder.
    """
    info = _text(root / "proc/cpuinfo") or ""
    memory = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text(root / "proc/meminfo") or "", re.M))
    total, free = (int(memory[key]) * 1024 / 1e6 if key in memory else None
                   for key in ("MemTotal", "MemAvailable"))  # fmt: skip
    board: Dict[str, Any] = {
        "model": _text(root / "proc/device-tree/model")
        or _text(root / "sys/devices/virtual/dmi/id/product_name"),
        "host": platform.node(),
        "machine": platform.machine(),
        "os": _first(r'^PRETTY_NAME="?([^"\n]+)', _text(root / "etc/os-release")),
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "cpu": _first(r"^(?:model name|Hardware|Model)\s*:\s*(.+)$", info),
        "cpus": os.cpu_count(),
        "cpu_features": _features(info),
        "memory_mb": total,
        "memory_free_mb": free,
        "disk_free_mb": shutil.disk_usage(str(folder or Path.home())).free / 1e6,
        "python": f"{platform.python_version()} ({sys.executable})",
        "numpy": _version("numpy"),
        "onnxruntime": next(filter(None, map(_version, PACKAGES)), None),
        "providers": _providers(),
        "tensorrt": _version("tensorrt") or _package(root, "libnvinfer10", "libnvinfer8"),
        "jetpack": _package(root, "nvidia-jetpack"),
        "l4t": _l4t(root),
        "nvpmodel": _nvpmodel(root),
        "governor": _text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "temperature_c": _hottest(root),
    }
    board["missing"] = list(_missing(board))
    return board


def board_lines(board: Dict[str, Any]) -> Iterator[str]:
    """A line for each value; what is not known is left out."""
    for key, value in board.items():
        if value in (None, [], "") or key == "missing":
            continue
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        if isinstance(value, float):
            text = f"{value:,.0f}" if value >= 100 else f"{value:g}"
        yield f"{key:14} {text}"


def _missing(board: Dict[str, Any]) -> Iterator[Dict[str, str]]:
    if sys.version_info < LEAST_PYTHON:
        yield {"what": "Python 3.8 or later", "remedy": "sudo apt install python3"}
    lacking = [name for name in ("numpy", "onnxruntime") if board[name] is None]
    if lacking:
        remedy = "edgekd target bootstrap, or pip install numpy onnxruntime"
        yield {"what": ", ".join(lacking), "remedy": remedy}
    if board["l4t"] is not None and board["tensorrt"] is None:
        yield {"what": "TensorRT", "remedy": "sudo apt install nvidia-jetpack"}
    if board["disk_free_mb"] < LOW_DISK_MB:
        yield {"what": "free disk", "remedy": f"free {LOW_DISK_MB} MB"}
    if (board["memory_free_mb"] or LOW_MEMORY_MB) < LOW_MEMORY_MB:
        yield {"what": "free memory", "remedy": f"end other programs: {LOW_MEMORY_MB} MB"}


def _features(info: str) -> List[str]:
    found = set((_first(r"^(?:flags|Features)\s*:\s*(.+)$", info) or "").split())
    return [name for name in FEATURES if name in found]


def _providers() -> Optional[List[str]]:
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    # In a process of its own: a broken runtime may crash it.
    text = _command(
        sys.executable, "-c", "import onnxruntime as o; print(*o.get_available_providers())"
    )
    return None if text is None else text.split()


def _version(package: str) -> Optional[str]:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(root: Path, *names: str) -> Optional[str]:
    """The version of the first of these Debian packages that is installed."""
    text = _text(root / "var/lib/dpkg/status") or ""
    for name in names:
        entry = re.search(rf"^Package: {re.escape(name)}\n(?:.+\n)*", text, re.M)
        if entry and re.search(r"^Status: .* installed$", entry.group(0), re.M):
            return _first(r"^Version: (.+)$", entry.group(0))
    return None


def _l4t(root: Path) -> Optional[str]:
    """``36.4.3`` from ``# R36 (release), REVISION: 4.3, …``: the Linux of a Jetson."""
    found = re.search(
        r"R(\d+) \(release\), REVISION: ([\d.]+)", _text(root / "etc/nv_tegra_release") or ""
    )
    return f"{found.group(1)}.{found.group(2)}" if found else None


def _nvpmodel(root: Path) -> Optional[str]:
    if root != ROOT or shutil.which("nvpmodel") is None:
        return None
    return _first(r"NV Power Mode:\s*(\S+)", _command("nvpmodel", "-q"))


def _hottest(root: Path) -> Optional[float]:
    zones = [_text(p) for p in root.glob("sys/class/thermal/thermal_zone*/temp")]
    known = [int(text) / 1e3 for text in zones if text and re.fullmatch(r"-?\d+", text)]
    return max(known, default=None)


def _command(*words: str) -> Optional[str]:
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def _first(pattern: str, text: Optional[str]) -> Optional[str]:
    found = re.search(pattern, text or "", re.M)
    return found.group(1).strip() if found else None


def _text(path: Path) -> Optional[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ") or None
    except OSError:
        return None
