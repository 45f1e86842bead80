"""TensorRT for a model and a device: the settings and place of a build, and its parser's verdict.

The builder itself is edgerun's, as an engine for a Jetson is built on the Jetson; it is called
through a target, in a separate process, so that a crash of TensorRT is contained.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx

from edgekd.config.budgets import Budgets
from edgekd.config.pipeline import TensorRTConfig
from edgekd.config.profile import Profile
from edgekd.errors import InputError, StageError, TargetError
from edgekd.files import edgerun_folder
from edgekd.onnx.graph import opset_of
from edgerun.cli import command_words
from edgerun.tensorrt.library import MODULES, installation, is_installed
from edgerun.tensorrt.settings import BuildSettings, Range

BuildPrecision = Literal["fp32", "fp16", "bf16", "int8"]

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


def device_command(settings: BuildSettings, model: str, engine: str) -> str:
    """What to type on the device, in a bundle's folder, to build the engine there."""
    given = {"engine": engine, **vars(settings)}
    if settings.batch == 1:
        del given["batch"]
    return shlex.join(["python3", "-m", "edgerun", *command_words("build", Path(model), given)])


def engine_settings(
    config: TensorRTConfig,
    profile: Profile | None,
    budgets: Budgets | None = None,
    *,
    batch: int = 1,
    precision: BuildPrecision | None = None,
    keep: Sequence[str] = (),
    timing_cache: Path | None = None,
) -> BuildSettings:
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
    return BuildSettings(
        library=config.kind,
        compute_capabilities=capabilities,
        precision=precision,
        keep=tuple(keep),
        shapes={name: Range(*shapes) for name, shapes in config.shapes.items()},
        batch=batch,
        workspace_mb=workspace,
        timing_cache=timing_cache,
        version_compatible=config.version_compatible,
        hardware_compatible=config.hardware_compatible,
        dla=config.dla,
        gpu_fallback=config.gpu_fallback,
    )


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
        raise InputError(f"{kind} is not installed", where=where, remedy=installation(kind))


def check_runtime(settings: BuildSettings, profile: Profile | None, model: Path) -> None:
    """Check that the engine can be built on this machine.

    Raises:
        InputError: the library is absent, with what to install; or the engine is built on the
            device, with the command to type there.
    """
    if where_built(settings.library, profile) == "on the device":
        assert profile is not None
        command = device_command(settings, model.name, f"{model.stem}.engine")
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


Status = Literal["ok", "fails", "inconclusive", "note"]


@dataclass(frozen=True)
class Diagnostic:
    """The result of one check: with ``fails`` and ``inconclusive`` the model does not pass.

    ``note`` is information, also about engines that were not requested. ``nodes`` are those
    affected.
    """

    subject: str
    status: Status
    detail: str
    remedy: str = ""
    nodes: tuple[str, ...] = ()


Parse = Callable[[Path, str], Mapping[str, Any]]
"""(model, library) → a record ``edgerun.parse/1``: the parser's verdict."""

OPSETS = {(10, 0): (9, 20), (10, 15): (9, 24), (11, 0): (9, 25)}
"""TensorRT version → the ONNX opsets that its parser accepts, as its documentation states: of 10.0
and 10.15 onnx-tensorrt's docs/operators.md, of 11.x NVIDIA's ONNX opset guide."""

OTHERWISE = "replace the operation in the network and export again, or run it in ONNX Runtime"

_REMEDIES = {
    r"zero point|Int32 but must|DynamicQuantizeLinear|MatMulInteger|ConvInteger|QLinear": (
        "quantize the float model for TensorRT (symmetric int8, biases in float): "
        "edgekd quantize MODEL.onnx --calibration DATA -o OUT.onnx --for tensorrt"
    ),
    r"^(NonZero|Unique|NonMaxSuppression|Compress)\b": (
        "the shape of its output depends on values: select a fixed number of elements (TopK), "
        "or leave this step to the program around the model"
    ),
    r"^(Loop|Scan|If|Sequence\w*)\b": "export the model without control flow and lists",
    r"STRING|^String": "strings stay outside: turn them into numbers before the model",
    r"[Pp]lugin not found": (
        "the operation is not one of ONNX: export the model without it, or run it where its "
        "plugin is installed"
    ),
}


def tensorrt_verdict(
    path: Path,
    model: onnx.ModelProto,
    parse: Parse,
    requested: Collection[str],
    profile: Profile | None,
) -> tuple[dict[str, Any] | None, list[Diagnostic]]:
    """The record of the parser that was run, None without one, and its diagnostics.

    One library is run: the requested one, else a substitute, TensorRT for RTX
    before TensorRT (which needs a GPU even to parse).

    Args:
        path: the ONNX file.
        model: what is in it.
        parse: runs a library's parser.
        requested: engines that must take the model; TensorRT may be none of them.
        profile: of the device.
    """
    found = []
    wanted = [name for name in MODULES if name in requested]
    good: Status = "ok" if wanted else "note"
    bad: Status = "fails" if wanted else "note"
    gap: Status = "inconclusive" if wanted else "note"
    version = profile.runtime.tensorrt if profile and "tensorrt" in requested else None
    if version:
        found.append(_opset(model, version.value))
    chosen = next((n for n in (*wanted, *reversed(MODULES)) if is_installed(n)), None)
    if chosen is None:
        if wanted:
            remedy = installation("tensorrt-rtx")
            found.append(Diagnostic("TensorRT", gap, "not checked: no TensorRT here", remedy))
        return None, found
    try:
        verdict = dict(parse(path, chosen))
    except (InputError, StageError, TargetError) as error:
        detail = f"its parser could not be run: {error.what}"
        return None, [*found, Diagnostic(chosen, gap, detail, error.remedy or "")]
    subject = f"{verdict['library']} {verdict['version']}"
    names = {
        "tensorrt": f"TensorRT {version.value}" if version else "TensorRT itself",
        "tensorrt-rtx": "TensorRT for RTX",
    }
    absent = " and ".join(names[name] for name in wanted if name != chosen)
    substitute = f"; stands in for {absent}, which may differ" if absent else ""
    if verdict["supported"]:
        detail = f"its parser takes the model; not built{substitute}"
        return verdict, [*found, Diagnostic(subject, good, detail, _build(path, wanted, profile))]
    for problem in verdict["problems"]:
        node, op, message = (str(problem.get(key) or "") for key in ("node", "op", "message"))
        # For an unknown operation the parser only reports a failed assertion without a message.
        why = "it has no such operation" if message in ("", "false") else message
        text = (
            f"its parser refuses {node or 'the model'}{f' ({op})' if op else ''}: {why}{substitute}"
        )
        found.append(
            Diagnostic(subject, bad, text, remedy_for(op, message), (node,) if node else ())
        )
    if not verdict["problems"]:
        found.append(Diagnostic(subject, bad, f"its parser refuses the model{substitute}"))
    return verdict, found


def takes_opset(version: str, opset: int) -> bool | None:
    """Whether a TensorRT version accepts an opset.

    For a version between two documented ones, only what both have in common is claimed; None
    where it is not documented.
    """
    numbers = [int(part) for part in re.findall(r"\d+", version)[:2]]
    ours = (numbers[0], numbers[1] if len(numbers) > 1 else 0) if numbers else (0, 0)
    older = [span for known, span in OPSETS.items() if known <= ours]
    newer = [span for known, span in OPSETS.items() if known >= ours]
    if older and older[-1][0] <= opset <= older[-1][1]:
        return True
    if newer and opset > newer[0][1]:
        return False
    if older and opset < older[-1][0]:
        return False
    return None


def remedy_for(op: str, message: str) -> str:
    """What to do about a node that TensorRT's parser refuses."""
    text = f"{op} {message}"
    return next((remedy for key, remedy in _REMEDIES.items() if re.search(key, text)), OTHERWISE)


def _build(path: Path, wanted: Sequence[str], profile: Profile | None) -> str:
    """The remedy where only a build is conclusive; empty for engines that were not requested."""
    if not wanted:
        return ""
    words = ["edgekd", "build", str(path), "--engine", wanted[0]]
    words += ["--profile", profile.name] if profile else []
    command = shlex.join([*words, "-o", f"{path.stem}.engine"])
    if where_built(wanted[0], profile) == "on the device":
        return (
            "only a build on the device shows that an engine can be made of it; the command "
            f"there: {command}"
        )
    return f"only a build shows that an engine can be made of it: {command}"


def _opset(model: onnx.ModelProto, version: str) -> Diagnostic:
    opset = opset_of(model)
    takes = takes_opset(version, opset)
    subject = f"opset in TensorRT {version}"
    if takes is None:
        return Diagnostic(
            subject, "note", f"whether it takes opset {opset} is not stated anywhere here"
        )
    if takes:
        return Diagnostic(subject, "ok", f"opset {opset} is one that it takes")
    remedy = "export again, or convert it: onnx.version_converter.convert_version(model, 18)"
    return Diagnostic(subject, "fails", f"it does not take opset {opset}", remedy)
