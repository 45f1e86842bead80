"""What a TensorRT engine is built with, and where: from the pipeline and the profile to settings.

The builder itself is edgerun's, as an engine for a Jetson is built on the Jetson; it is called
through a target, in a separate process, so that a crash of TensorRT is contained.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from edgekd.config.budgets import Budgets
from edgekd.config.pipeline import TensorRTConfig
from edgekd.config.profile import Profile
from edgekd.errors import InputError
from edgekd.files import edgerun_folder

Library = Literal["tensorrt", "tensorrt-rtx"]
BuildPrecision = Literal["fp32", "fp16", "bf16", "int8"]

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Library → the module that it is imported as; edgerun, which is independent, has its own table."""

INSTALL = {
    "tensorrt": "on a Jetson it comes with JetPack (apt install python3-libnvinfer, and a virtual "
    "environment with --system-site-packages); elsewhere: pip install tensorrt; "
    "without a GPU use tensorrt-rtx",
    "tensorrt-rtx": "pip install 'edgekd[rtx]', or pip install tensorrt-rtx",
}
JETSON_MACHINE = "aarch64"
Place = Literal["here", "on the device"]

_START_CUDA = """
from edgerun.cuda_runtime import load_cuda_runtime
from edgerun.errors import EdgerunError
try:
    load_cuda_runtime()
except EdgerunError as error:
    print(error.what)
"""


@dataclass(frozen=True)
class EngineSettings:
    """The arguments of :meth:`edgekd.targets.LocalTarget.build`, which explains them."""

    library: Library
    compute_capabilities: tuple[str, ...] = ()
    precision: BuildPrecision | None = None
    keep: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    batch: int = 1
    workspace_mb: float | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    dla: int | None = None
    gpu_fallback: bool = True

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for a target's ``build``."""
        return asdict(self)

    def command(self, model: str, engine: str) -> str:
        """What to type on the device, in a bundle's folder, to build the engine there."""
        words = ["python3", "-m", "edgerun", "build", model, "--engine", engine]
        words += ["--library", self.library]
        for option, values in (
            ("--sm", self.compute_capabilities),
            ("--keep", self.keep),
            ("--shape", self.shapes),
        ):
            for value in values:
                words += [option, value]
        for option, one in (
            ("--precision", self.precision),
            ("--batch", self.batch if self.batch != 1 else None),
            ("--workspace-mb", self.workspace_mb),
            ("--timing-cache", self.timing_cache),
            ("--dla", self.dla),
        ):
            if one is not None:
                words += [option, f"{one:g}" if isinstance(one, float) else str(one)]
        switches = {
            "--version-compatible": self.version_compatible,
            "--hardware-compatible": self.hardware_compatible,
            "--no-gpu-fallback": not self.gpu_fallback,
        }
        return shlex.join([*words, *(switch for switch, on in switches.items() if on)])


def engine_settings(
    config: TensorRTConfig,
    profile: Profile | None,
    budgets: Budgets | None = None,
    *,
    batch: int = 1,
    precision: BuildPrecision | None = None,
    keep: Sequence[str] = (),
    timing_cache: Path | None = None,
) -> EngineSettings:
    """The settings that a pipeline's engine and a device profile mean together.

    Scratch memory is limited to the budget of the peak memory, and TensorRT for RTX builds for the
    profile's GPU, where the engine does not set another.

    Args:
        config: an entry of ``engines``.
        profile: of the device.
        budgets: of the job; None: the profile's.
        batch: the benchmark's batch size, for open batch dimensions.
        precision: the precision of the model; None builds it unchanged.
        keep: nodes that were left in float32 intentionally.
        timing_cache: a file that later builds reuse.
    """
    workspace, capabilities = config.workspace_mb, config.compute_capabilities
    if workspace is None:
        workspace = (budgets or Budgets.resolve(profile=profile))["memory.peak_mb"]
    if not capabilities and config.kind == "tensorrt-rtx" and profile is not None and profile.gpu:
        capabilities = (profile.gpu.compute_capability.value,)
    return EngineSettings(
        library=config.kind,
        compute_capabilities=capabilities,
        precision=precision,
        keep=tuple(keep),
        shapes=tuple(
            f"{name}={':'.join('x'.join(map(str, shape)) for shape in shapes)}"
            for name, shapes in config.shapes.items()
        ),
        batch=batch,
        workspace_mb=workspace,
        timing_cache=timing_cache,
        version_compatible=config.version_compatible,
        hardware_compatible=config.hardware_compatible,
        dla=config.dla,
        gpu_fallback=config.gpu_fallback,
    )


def is_installed(library: str) -> bool:
    """Whether a TensorRT can be imported by this interpreter; it is not imported."""
    return importlib.util.find_spec(MODULES[library]) is not None


def where_built(kind: str, profile: Profile | None) -> Place:
    """Where an engine is built: a Jetson's TensorRT builds on a Jetson alone, all else here.

    Args:
        kind: ``onnxruntime``, ``tensorrt`` or ``tensorrt-rtx``.
        profile: of the device that the engine is for; None is this machine.
    """
    jetson = profile is not None and profile.kind == "jetson"
    if kind == "tensorrt" and jetson and platform.machine() != JETSON_MACHINE:
        return "on the device"
    return "here"


def check_installed(kind: str, where: str | None = None) -> None:
    """Check that the builder of this kind of engine is installed.

    Raises:
        InputError: it is not; with what to install.
    """
    if kind in MODULES and not is_installed(kind):
        raise InputError(f"{kind} is not installed", where=where, remedy=INSTALL[kind])


def check_runtime(settings: EngineSettings, profile: Profile | None, model: Path) -> None:
    """Check that the engine can be built on this machine.

    Raises:
        InputError: the library is absent, with what to install; or the engine is built on the
            device, with the command to type there.
    """
    if where_built(settings.library, profile) == "on the device":
        assert profile is not None
        command = settings.command(model.name, f"{model.stem}.engine")
        raise InputError(
            f"an engine for {profile.name} is built on the device: TensorRT does not build for "
            f"a Jetson on {platform.machine()}",
            where=str(model),
            remedy=f"there, next to the model: {command}",
        )
    check_installed(settings.library)


def can_run_here(kind: str) -> str | None:
    """Why no engine of this kind can run on this machine; None where it can.

    CUDA is started as edgerun starts it, in a separate process: it would remain initialised in this
    one, and processes forked from it could not use the GPU.

    Args:
        kind: ``onnxruntime``, which runs everywhere, ``tensorrt`` or ``tensorrt-rtx``.
    """
    if kind not in MODULES:
        return None
    folder = str(edgerun_folder().parent)
    done = subprocess.run(
        [sys.executable, "-c", _START_CUDA],
        env={**os.environ, "PYTHONPATH": folder},
        # Not in the user's folder: a numpy.py there would be imported first.
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode == 0:
        return done.stdout.strip() or None
    last = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
    return f"CUDA cannot be started: {last}"
