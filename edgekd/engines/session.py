"""Opening a model in ONNX Runtime: execution providers and every session option, explicit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import onnxruntime

from edgekd.errors import InputError, unknown_name

CPU_PROVIDER = "CPUExecutionProvider"
Optimization = Literal["disabled", "basic", "extended", "all"]

LEVELS = {
    "disabled": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_FATAL_ONLY = 4  # ONNX Runtime's log severity; errors are raised as well as logged

PACKAGES = {
    "CUDAExecutionProvider": "pip install onnxruntime-gpu (on a Jetson: NVIDIA's own build)",
    "TensorrtExecutionProvider": "pip install onnxruntime-gpu (on a Jetson: NVIDIA's own build)",
    "NvTensorRTRTXExecutionProvider": "a build of ONNX Runtime with TensorRT for RTX",
    "OpenVINOExecutionProvider": "pip install onnxruntime-openvino",
    "DmlExecutionProvider": "pip install onnxruntime-directml (Windows)",
    "QNNExecutionProvider": "pip install onnxruntime-qnn",
    "MIGraphXExecutionProvider": "a build of ONNX Runtime with ROCm",
    "CoreMLExecutionProvider": "pip install onnxruntime on macOS",
}
"""What brings a provider that the installed ONNX Runtime was not built with."""


def providers_for(
    profile_providers: Sequence[str], requested: Sequence[str] | None
) -> tuple[str, ...]:
    """The execution providers to use: those asked for, else the profile's.

    Raises:
        InputError: one is unknown, or this ONNX Runtime was not built with it. Nothing is left
            out silently: a model measured on the CPU is not a model measured on a GPU.
    """
    wanted = tuple(requested if requested is not None else profile_providers)
    where = "engines: providers" if requested is not None else "the profile's runtime.providers"
    if not wanted:
        raise InputError(
            "no execution provider is given", where=where, remedy="add CPUExecutionProvider"
        )
    available = onnxruntime.get_available_providers()
    known = {*onnxruntime.get_all_providers(), *available}
    for name in wanted:
        if name not in known:
            raise unknown_name("execution provider", name, known, where)
        if name not in available:
            source = PACKAGES.get(name, "a build of ONNX Runtime with it")
            raise InputError(
                f"this ONNX Runtime ({onnxruntime.__version__}) has no {name}; "
                f"it has {', '.join(available)}",
                where=where,
                remedy=f"{source}; or choose another: "
                "engines: [{kind: onnxruntime, providers: [CPUExecutionProvider]}]",
            )
    return wanted


def session_options(threads: int, optimization: Optimization) -> onnxruntime.SessionOptions:
    """Every option that changes latency or memory, set and not left to a default.

    Sequential execution, as one query at a time is what an edge device answers.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = LEVELS[optimization]
    options.log_severity_level = _FATAL_ONLY
    return options


def open_session(
    path: Path,
    providers: Sequence[str],
    threads: int,
    optimization: Optimization,
    options: onnxruntime.SessionOptions | None = None,
) -> onnxruntime.InferenceSession:
    """Open a model on exactly the given providers.

    Raises:
        InputError: ONNX Runtime refuses the file, or a provider does not start on this machine
            (ONNX Runtime alone would go on with the CPU and say so in its log only).
    """
    # It would otherwise write an identifier of this machine to disk.
    onnxruntime.disable_telemetry_events()
    options = options or session_options(threads, optimization)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # the runtime's own exception classes have no public base
        raise InputError(
            f"ONNX Runtime cannot open the model: {first_line(error)}",
            where=str(path),
            remedy="'edgekd doctor' shows the runtime's version; export the model for its opset",
        ) from error
    missing = [name for name in providers if name not in session.get_providers()]
    if missing:
        raise InputError(
            f"{', '.join(missing)} did not start; ONNX Runtime would run the model on "
            f"{', '.join(session.get_providers())}",
            where=str(path),
            remedy="install the provider's driver and libraries ('edgekd doctor'), "
            "or choose another provider",
        )
    return session


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of an error that says something, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
