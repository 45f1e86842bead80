"""``edgekd doctor``: what this machine can do, what is missing, and which feature needs it.

Packages are looked up by their metadata and not imported, except ONNX Runtime (its providers
are known only to itself); torch is imported only with ``deep``.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click
import psutil
from rich.markup import escape
from rich.table import Table

from edgekd.config.host import NVIDIA_DRIVER, TEGRA_RELEASE, this_machine, version_of
from edgekd.data.sources.fashion_mnist import PACKAGE_FOLDER
from edgekd.progress import Console
from edgerun.nvml import Unread, open_nvml

Status = Literal["ok", "missing", "note"]
LOW_MEMORY_MB = 4000
LOW_DISK_MB = 5000


@dataclass(frozen=True)
class Check:
    """The result of one check.

    ``missing`` is something that a command needs and that is absent; ``note`` something
    optional that is absent, or information. ``remedy`` is empty when nothing is to be done.
    """

    name: str
    status: Status
    detail: str
    needed_for: str
    remedy: str = ""

    def to_json(self) -> dict[str, str]:
        """A plain mapping for a JSON file."""
        return asdict(self)


REQUIRED = {
    "torch": "training, distillation and export",
    "onnx": "export and checking of ONNX files",
    "onnxscript": "export (torch's exporter needs it)",
    "onnxruntime": "engines and benchmarks",
    "scikit-learn": "the digits pipeline",
    "safetensors": "weights on disk",
}
OPTIONAL = {
    "tensorrt": (
        "TensorRT engines on a Jetson or a data-centre GPU",
        "on a Jetson: part of JetPack; elsewhere NVIDIA's package index",
    ),
    "tensorrt_rtx": (
        "'edgekd check' for TensorRT, and engines for RTX GPUs; needs no GPU",
        "pip install 'edgekd[rtx]'",
    ),
    "torchao": ("quantization-aware distillation", "pip install 'edgekd[qat]'"),
    "torch-pruning": ("structured pruning", "pip install 'edgekd[prune]'"),
    "optuna": ("search for the student, losses: auto", "pip install 'edgekd[search]'"),
    "nvidia-ml-py": ("GPU name, clocks and temperature", "pip install nvidia-ml-py"),
}
PROGRAMS = {
    "gcc": ("torch.compile", "install a C compiler (Debian: gcc)"),
    "nvcc": ("building CUDA code", "install the CUDA toolkit"),
    "ssh": ("benchmarks on a device", "install an SSH client (Debian: openssh-client)"),
}


def examine(folder: Path | None = None, deep: bool = False) -> list[Check]:
    """Check this machine.

    Args:
        folder: where runs would be written; its free space is checked. None: the current one.
        deep: also import torch (seconds) to see whether it starts and what it can use.
    """
    return [
        _python(),
        *(_required(package, use) for package, use in REQUIRED.items()),
        providers(),
        *(_optional(package, use, remedy) for package, (use, remedy) in OPTIONAL.items()),
        gpu(),
        *_machine(folder or Path()),
        *(_program(name, use, remedy) for name, (use, remedy) in PROGRAMS.items()),
        fashion_mnist(),
        *([_torch_starts()] if deep else []),
    ]


def _python() -> Check:
    version = platform.python_version()
    good = sys.version_info >= (3, 10)
    remedy = "" if good else "install Python 3.10 or later"
    return Check("Python", "ok" if good else "missing", version, "everything", remedy)


def _required(package: str, use: str) -> Check:
    version = version_of(package)
    if version is None:
        return Check(package, "missing", "not installed", use, f"pip install {package}")
    return Check(package, "ok", version, use)


def _optional(package: str, use: str, remedy: str) -> Check:
    version = version_of(package)
    if version is None:
        return Check(package, "note", "not installed", use, remedy)
    return Check(package, "ok", version, use)


def providers() -> Check:
    """The execution providers of the installed ONNX Runtime."""
    name, use = "ONNX Runtime providers", "where engines can run"
    if importlib.util.find_spec("onnxruntime") is None:
        return Check(name, "missing", "no ONNX Runtime", use, "pip install onnxruntime")
    try:
        import onnxruntime
    except ImportError as error:
        return Check(name, "missing", str(error), use, "pip install --force-reinstall onnxruntime")
    available = onnxruntime.get_available_providers()
    return Check(name, "ok", ", ".join(available), use)


def gpu(driver: Path = NVIDIA_DRIVER, tegra: Path = TEGRA_RELEASE) -> Check:
    """The NVIDIA GPU and its driver, by NVML where there is one, else by the kernel's files."""
    name, use = "GPU", "CUDA and TensorRT engines, faster training"
    if tegra.exists():
        return Check(name, "ok", "Jetson, " + _first_line(tegra), use)
    found = _nvml()
    if found:
        return Check(name, "ok", found, use)
    if driver.exists():
        version = re.search(r"\b\d+\.\d+(\.\d+)?\b", _first_line(driver))
        detail = f"NVIDIA driver {version.group() if version else 'of an unknown version'}"
        return Check(name, "ok", detail, use)
    return Check(name, "note", "no NVIDIA driver", use, "none needed for CPU targets")


def _first_line(path: Path) -> str:
    try:
        return (path.read_text(errors="replace").splitlines() or [""])[0].strip()
    except OSError:
        return ""


def _nvml() -> str | None:
    """The GPUs by NVML; None without a driver or a GPU."""
    try:
        gpus = [open_nvml(index=index) for index in range(open_nvml().count())]
        return f"{', '.join(g.name() for g in gpus)}; driver {gpus[0].driver()}" if gpus else None
    except Unread:
        return None


def _machine(folder: Path) -> list[Check]:
    machine = this_machine()
    free_memory = psutil.virtual_memory().available / 1e6
    free_disk = shutil.disk_usage(folder).free / 1e6
    memory_low, disk_low = free_memory < LOW_MEMORY_MB, free_disk < LOW_DISK_MB
    return [
        Check("processor", "ok", f"{machine.cpu_model}, {machine.cores} core(s)", "everything"),
        Check(
            "memory",
            "note" if memory_low else "ok",
            f"{machine.memory_mb / 1e3:.1f} GB, {free_memory / 1e3:.1f} GB free",
            "training",
            f"free {LOW_MEMORY_MB / 1e3:g} GB, or use smaller batches" if memory_low else "",
        ),
        Check(
            "disk",
            "note" if disk_low else "ok",
            f"{free_disk / 1e3:.1f} GB free",
            "runs, the teacher cache and bundles",
            f"free {LOW_DISK_MB / 1e3:g} GB" if disk_low else "",
        ),
    ]


def _program(name: str, use: str, remedy: str) -> Check:
    path = shutil.which(name)
    if path is None:
        return Check(name, "note", "not found", use, remedy)
    return Check(name, "ok", path, use)


def fashion_mnist(folder: Path = PACKAGE_FOLDER) -> Check:
    """Whether the Fashion-MNIST files of the Debian package are installed."""
    use = "the fashion-mnist pipeline"
    files = sorted(folder.glob("*-ubyte*")) if folder.is_dir() else []
    if len(files) >= 4:
        return Check("Fashion-MNIST", "ok", str(folder), use)
    detail = "not found" if not files else f"{len(files)} of 4 files in {folder}"
    remedy = "apt install dataset-fashion-mnist, or data: {path: …} in the pipeline"
    return Check("Fashion-MNIST", "note", detail, use, remedy)


_TORCH_PROBE = """
import torch
gpus = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
print(f"{torch.__version__}, {torch.get_num_threads()} thread(s), CUDA: {gpus or 'no'}")
"""


def _torch_starts() -> Check:
    """Import torch in a separate process: a broken build can crash it."""
    name, use = "torch starts", "training, distillation and export"
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TORCH_PROBE], capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        return Check(name, "missing", "torch did not start in 120 s", use, "reinstall torch")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return Check(name, "missing", lines[-1], use, "pip install --force-reinstall torch")
    return Check(name, "ok", done.stdout.strip(), use)


_MARKS = {"ok": "[green]ok[/green]", "missing": "[red]missing[/red]", "note": "[yellow]–[/yellow]"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the checks as JSON.")
@click.option("--deep", is_flag=True, help="Also start torch and see what it can use (seconds).")
def doctor(as_json: bool, deep: bool) -> None:
    """Show what this machine can do, and what is missing for which feature."""
    checks = examine(deep=deep)
    if as_json:
        click.echo(json.dumps([check.to_json() for check in checks], indent=2))
        return
    console = Console()
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("what", no_wrap=True)
    table.add_column("found")
    table.add_column("for")
    for check in checks:
        table.add_row(
            _MARKS[check.status], check.name, escape(check.detail), escape(check.needed_for)
        )
    console.print(table)
    _to_do(console, checks)


def _to_do(console: Console, checks: list[Check]) -> None:
    for status, heading in (("missing", "Missing"), ("note", "Optional")):
        rows = [check for check in checks if check.status == status and check.remedy]
        if rows:
            console.print(f"\n[bold]{heading}[/bold]")
        for check in rows:
            # Text from packages and the system may hold brackets, which rich reads as markup.
            console.print(
                f"  {check.name}, for {check.needed_for}: {check.remedy}",
                markup=False,
                highlight=False,
            )
    if not any(check.status == "missing" for check in checks):
        console.print("\nNothing that edgekd needs is missing.")
