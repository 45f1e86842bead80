"""Opening a model in ONNX Runtime: execution providers and every session option, explicit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnxruntime

from edgekd.crashes import native_call
from edgekd.errors import InputError, unknown_name
from edgerun import onnx_session
from edgerun.errors import EdgerunError
from edgerun.onnx_session import CONFIGURATION, first_line, session_options

__all__ = [
    "CPU_PROVIDER",
    "Fallback",
    "Optimization",
    "default_options",
    "first_line",
    "open_session",
    "options_record",
    "provider_chain",
    "providers_for",
    "session_options",
    "source_of",
]

CPU_PROVIDER = "CPUExecutionProvider"
Optimization = Literal["disabled", "basic", "extended", "all"]
Fallback = Literal["error", "allow"]
"""Policy for nodes that another provider runs than the preferred one, and for absent providers."""

RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"
PACKAGES = {
    "CUDAExecutionProvider": "pip install onnxruntime-gpu (on a Jetson: NVIDIA's own build)",
    "TensorrtExecutionProvider": "pip install onnxruntime-gpu (on a Jetson: NVIDIA's own build)",
    "NvTensorRTRTXExecutionProvider": "a build of ONNX Runtime with TensorRT for RTX",
    "OpenVINOExecutionProvider": "pip install onnxruntime-openvino",
    "DmlExecutionProvider": "pip install onnxruntime-directml (Windows)",
    "QNNExecutionProvider": "pip install onnxruntime-qnn",
    "MIGraphXExecutionProvider": "a build of ONNX Runtime with ROCm",
    "CoreMLExecutionProvider": "pip install onnxruntime on macOS",
    "XnnpackExecutionProvider": "a build of ONNX Runtime with XNNPACK",
}
"""What brings a provider that the installed ONNX Runtime was not built with."""


@dataclass(frozen=True)
class ProviderChain:
    """Execution providers in the order of preference, and the requested ones that are not
    available.
    """

    providers: tuple[str, ...]
    left_out: tuple[str, ...] = ()


def providers_for(
    profile_providers: Sequence[str], requested: Sequence[str] | None
) -> tuple[str, ...]:
    """The execution providers to use: the requested ones, else the profile's.

    Raises:
        InputError: one is unknown, or this ONNX Runtime was not built with it. None is left
            out silently: a model measured on the CPU is not a model measured on a GPU.
    """
    return provider_chain(profile_providers, requested).providers


def provider_chain(
    profile_providers: Sequence[str],
    requested: Sequence[str] | None,
    fallback: Fallback = "error",
) -> ProviderChain:
    """The providers to use, and with ``fallback`` ``allow`` the ones that are not available.

    Raises:
        InputError: one is unknown; one is absent and no fallback is allowed; or all are absent.
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
    absent = tuple(name for name in wanted if name not in available)
    present = tuple(name for name in wanted if name in available)
    if absent and (fallback == "error" or not present):
        allow = ", or fallback: allow" if present else ""
        raise InputError(
            f"this ONNX Runtime ({onnxruntime.__version__}) has no {absent[0]}; "
            f"it has {', '.join(available)}",
            where=where,
            remedy=f"{source_of(absent[0])}; or choose another: "
            f"engines: [{{kind: onnxruntime, providers: [CPUExecutionProvider]}}]{allow}",
        )
    return ProviderChain(present, absent)


def source_of(provider: str) -> str:
    """What to install for a provider."""
    return PACKAGES.get(provider, "a build of ONNX Runtime with it")


def options_record(threads: int, optimization: Optimization) -> dict[str, str | int]:
    """What :func:`session_options` sets, for a record."""
    return {
        "intra_op_num_threads": threads,
        "inter_op_num_threads": 1,
        "execution_mode": "sequential",
        "graph_optimization_level": optimization,
        **CONFIGURATION,
    }


def default_options(
    providers: Sequence[str], threads: int, *, half: bool, int8: bool, cache: Path | None = None
) -> dict[str, dict[str, str]]:
    """Options of the providers, for one query at a time; providers without options are left out.

    Precision is that of the file: TensorRT may use float16 where the model has float16 weights
    (``half``) and INT8 where it has Q/DQ (``int8``), and nowhere else.

    Args:
        providers: the chain.
        threads: of the providers that compute on the CPU.
        half: the model has float16 weights.
        int8: the model is quantized.
        cache: a folder for compiled engines and measured timings, which take minutes to make;
            None: no cache.
    """
    # Whoever opens the model may work in another folder.
    folder = str(cache.resolve()) if cache else None
    options = {
        # Grown by the requested size: doubling uses memory that a Jetson's CPU needs as well.
        # Shapes do not change from query to query, so that an exhaustive search pays off.
        "CUDAExecutionProvider": {
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "EXHAUSTIVE",
        },
        "TensorrtExecutionProvider": {
            "trt_fp16_enable": str(half),
            "trt_int8_enable": str(int8),
            **(
                {
                    "trt_engine_cache_enable": "True",
                    "trt_engine_cache_path": folder,
                    "trt_timing_cache_enable": "True",
                    "trt_timing_cache_path": folder,
                }
                if folder
                else {}
            ),
        },
        "OpenVINOExecutionProvider": {
            "device_type": "CPU",
            "num_of_threads": str(threads),
            "num_streams": "1",
            **({"cache_dir": folder} if folder else {}),
        },
        "XnnpackExecutionProvider": {"intra_op_num_threads": str(threads)},
        "CoreMLExecutionProvider": {"ModelFormat": "MLProgram", "MLComputeUnits": "ALL"},
    }
    return {name: options[name] for name in providers if name in options}


class Session(onnxruntime.InferenceSession):  # type: ignore[misc]  # it has no types
    """A session that records its runs in :mod:`edgekd.crashes`."""

    file: Path
    level: Optimization

    def run(self, *arguments: Any, **settings: Any) -> Any:
        """As ``onnxruntime.InferenceSession.run``."""
        with native_call("ran", self.file, self.level):
            return super().run(*arguments, **settings)


def open_session(
    path: Path,
    providers: Sequence[str],
    threads: int,
    optimization: Optimization,
    options: onnxruntime.SessionOptions | None = None,
    *,
    provider_options: Mapping[str, Mapping[str, str]] | None = None,
    fallback: Fallback = "error",
    disabled_optimizers: Sequence[str] = (),
) -> onnxruntime.InferenceSession:
    """Open a model on exactly the given providers.

    Args:
        path: the model.
        providers: the preferred one first.
        threads: intra-op threads.
        optimization: the level.
        options: instead of those of :func:`session_options`.
        provider_options: by provider; none for one that is not in it.
        fallback: ``allow`` accepts a session in which a provider did not start.
        disabled_optimizers: of ONNX Runtime's, by name; see
            :mod:`edgekd.onnx.optimizer_faults`.

    Raises:
        InputError: ONNX Runtime refuses the file, or a provider does not start on this machine
            (ONNX Runtime alone would continue on the CPU and report it in its log only).
    """
    try:
        with native_call("opened", path, optimization):
            session: Session = onnx_session.open_session(
                path,
                options or session_options(threads, optimization),
                providers,
                provider_options or {},
                fallback == "error",
                Session,
                disabled_optimizers,
            )
    except EdgerunError as error:
        raise InputError(
            error.what,
            where=error.where,
            remedy=f"{error.remedy}; 'edgekd doctor' shows what is installed here",
        ) from error
    session.file, session.level = path, optimization
    return session
