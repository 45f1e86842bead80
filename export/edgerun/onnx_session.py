"""An ONNX Runtime session: opened with explicit settings, described, with readable errors."""

from __future__ import annotations

import functools
import re
import time
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as _state

from edgerun.errors import BadInput, EdgerunError, RunFailed
from edgerun.limits import is_out_of_memory, time_limit, too_large
from edgerun.model import Settings, TensorInfo, check_file, dimension_name, written_feed

if hasattr(onnxruntime, "disable_telemetry_events"):
    onnxruntime.disable_telemetry_events()

DTYPES = {
    "float": "float32",
    "double": "float64",
    "float16": "float16",
    "int8": "int8",
    "int16": "int16",
    "int32": "int32",
    "int64": "int64",
    "uint8": "uint8",
    "uint16": "uint16",
    "uint32": "uint32",
    "uint64": "uint64",
    "bool": "bool",
}
"""numpy's name of each tensor element type that numpy supports."""

OPTIMIZATION = {
    "disabled": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}

CONFIGURATION = {"session.qdq_matmulnbits_accuracy_level": "1"}
"""Entries of every session's configuration; level 1 computes in float32.

Otherwise a product with weights stored in 8 bits rounds the activations to 8 bits as well.
"""

# The runtime's exception classes share no base but Exception; collecting them by type keeps a
# programming error from being reported as the runtime's.
RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    *(v for v in vars(_state).values() if isinstance(v, type) and issubclass(v, Exception)),
    RuntimeError,
    MemoryError,
    UnicodeError,  # of a message with a name from the file
)
_NOT_A_MODEL = ("InvalidProtobuf", "InvalidGraph", "InvalidArgument", "NoSuchFile", "NoModel")


def session_options(threads: int | None, optimization: str) -> Any:
    """Session options: every one that changes latency or memory is set explicitly.

    Sequential execution, as an edge device runs one query at a time.

    Args:
        threads: for one operator; None is the runtime's choice.
        optimization: one of :data:`OPTIMIZATION`.
    """
    options = onnxruntime.SessionOptions()
    # Every error of the runtime also comes as an exception; here it would be printed twice.
    options.log_severity_level = 4
    options.graph_optimization_level = OPTIMIZATION[optimization]
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = threads or 0
    for key, value in CONFIGURATION.items():
        options.add_session_config_entry(key, value)
    return options


def open_session(
    path: Path,
    options: Any,
    providers: Sequence[str],
    provider_options: Mapping[str, Mapping[str, str]],
    all_providers: bool = True,
    session: Callable[..., Any] | None = None,
    disabled_optimizers: Sequence[str] = (),
) -> Any:
    """Open a model on exactly the given providers.

    Args:
        options: of :func:`session_options`.
        providers: the preferred one first.
        provider_options: by provider; one that is not in it has the runtime's defaults.
        all_providers: whether a provider that does not start is an error.
        session: makes it instead of ``onnxruntime.InferenceSession``.
        disabled_optimizers: of the runtime's graph optimizers, by name.

    Raises:
        BadInput: the file is not an ONNX model, or is truncated.
        RunFailed: the runtime cannot load it, or silently left out a provider.
    """
    # A pair only with options: every build accepts plain names.
    named = [(p, dict(provider_options[p])) if provider_options.get(p) else p for p in providers]
    more = {"disabled_optimizers": list(disabled_optimizers)} if disabled_optimizers else {}
    try:
        made = (session or onnxruntime.InferenceSession)(
            str(path), options, providers=named, **more
        )
    except RUNTIME_ERRORS as error:
        raise _load_error(path, error) from error
    started = made.get_providers()
    left_out = [provider for provider in providers if provider not in started]
    if left_out and all_providers:
        raise RunFailed(
            f"{', '.join(left_out)} did not start; ONNX Runtime would run the model on "
            f"{', '.join(started)}",
            where=str(path),
            remedy="install the provider's driver and libraries, check its options, or choose "
            "another provider",
        )
    return made


class OrtSession:
    """A loaded model file with its declared inputs and outputs.

    Raises:
        BadInput: the file is missing, is not an ONNX model, or is truncated.
        RunFailed: the runtime cannot load it, or silently left out a requested provider.
    """

    batch_range = None
    device_ms = None
    information = None

    def __init__(self, path: Path, settings: Settings, profile_to: Path | None = None) -> None:
        self.path = path
        self.settings = settings
        check_file(path)
        _check_providers(settings)
        options = session_options(settings.threads, settings.optimization)
        if profile_to is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile_to)
        begin = time.perf_counter()
        with time_limit("opened", str(path)):
            self.session = open_session(
                path, options, settings.providers, settings.provider_options
            )
        self.load_ms = (time.perf_counter() - begin) * 1e3
        self.providers = tuple(self.session.get_providers())
        self.inputs = tuple(_tensor(node) for node in self.session.get_inputs())
        self.outputs = tuple(_tensor(node) for node in self.session.get_outputs())
        # Bound in C: a Python method's overhead would be timed with each query.
        self._query = functools.partial(self.session.run, None)

    @property
    def query(self) -> Callable[[Mapping[str, np.ndarray[Any, Any]]], Any]:
        """``InferenceSession.run`` for all outputs."""
        return self._query

    def run(self, feed: Mapping[str, np.ndarray[Any, Any]]) -> list[Any]:
        """The outputs in declared order for one feed.

        Raises:
            BadInput: the feed does not fit what the model declares.
            RunFailed: the runtime fails; the message names the shapes fed.
        """
        try:
            with time_limit("run once", str(self.path)):
                outputs: list[Any] = self.session.run(None, dict(feed))
        except RUNTIME_ERRORS as error:
            if is_out_of_memory(error):
                raise too_large("the model", str(self.path)) from error
            refused = type(error).__name__ == "InvalidArgument"
            raise (BadInput if refused else RunFailed)(
                f"the model fails on inputs {written_feed(feed)}: {_reason(error)}",
                where=str(self.path),
                remedy="give the shapes it needs (--shape NAME=1x3x224x224) or real inputs "
                "(--inputs data.npz)",
            ) from error
        return outputs


def _check_providers(settings: Settings) -> None:
    available = onnxruntime.get_available_providers()
    for name in settings.provider_options:
        if name not in settings.providers:
            raise BadInput(
                f"there are options for {name}, which is not among the providers",
                where="--provider-options",
                remedy=f"the providers are: {', '.join(settings.providers)}",
            )
    for name in settings.providers:
        if name not in available:
            raise BadInput(
                f"this onnxruntime has no {name}",
                where="--providers",
                remedy=f"available here: {', '.join(available)}",
            )


def _tensor(node: Any) -> TensorInfo:
    kind = str(node.type)
    element = kind[len("tensor(") : -1] if kind.startswith("tensor(") else kind
    return TensorInfo(str(node.name), DTYPES.get(element, kind), shape_of(node.shape))


def shape_of(declared: Sequence[Any]) -> tuple[int | str | None, ...]:
    """A shape from ONNX Runtime, with None for dimensions without a name."""
    return tuple(_dimension(value) for value in declared)


def _dimension(value: Any) -> int | str | None:
    if isinstance(value, str):
        return dimension_name(value)
    # Some exporters write a size below 1 for "not known".
    return None if value is None or int(value) < 1 else int(value)


_SHAPE_IN_FILE = re.compile(r"external tensors(?:.*for tensor: *(?P<tensor>\S+))?", re.DOTALL)
_SOURCE_PLACE = re.compile(r"/\S+:\d+ [^()]*")


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first informative line of an error, shortened.

    ONNX Runtime's source location and C++ function are removed: they do not help a user.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if place := _SOURCE_PLACE.search(text):
        end = place.end()
        while text[end : end + 1] == "(":
            end = _closing(text, end) + 1
        text = text[: place.start()] + (text[end:].strip() or text[place.start() :])
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _closing(text: str, opening: int) -> int:
    """Where the bracket at ``opening`` is closed; the end of the text where it is not."""
    depth = 0
    for index in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return len(text)


def _reason(error: Exception) -> str:
    """:func:`first_line` without the runtime's prefix of codes."""
    text = first_line(error)
    return text.split(" : ", 3)[-1] if text.startswith("[ONNXRuntimeError]") else text


def _load_error(path: Path, error: Exception) -> EdgerunError:
    if is_out_of_memory(error):
        return too_large("the model", str(path))
    reason, whole = _reason(error), str(error)
    if match := _SHAPE_IN_FILE.search(whole):
        tensor = f" (here {match.group('tensor')!r})" if match.group("tensor") else ""
        return BadInput(
            "ONNX Runtime reads weights from an external file, but no constants that shapes and "
            f"axes depend on{tensor}",
            where=str(path),
            remedy="save the model with its small tensors inside: onnx.save(model, FILE, "
            "save_as_external_data=True, size_threshold=1024)",
        )
    # Releases word these differently; the file itself was there when it was opened.
    if any(word in whole.lower() for word in ("external", ".data", "file_size", "no such file")):
        return BadInput(
            f"the model's weights are in another file, which cannot be read: {reason}",
            where=str(path),
            remedy="put the weight file next to the model, under the name it was exported with",
        )
    if type(error).__name__ in _NOT_A_MODEL or "does not have a graph" in whole:
        return BadInput(
            f"this is not a complete ONNX model: {reason}",
            where=f"{path} ({path.stat().st_size} bytes)",
            remedy="the file may be truncated or of another format: export or copy it again",
        )
    return RunFailed(
        f"ONNX Runtime {onnxruntime.__version__} cannot open the model: {reason}",
        where=str(path),
        remedy="a newer runtime, another provider, or a lower opset at export may help",
    )
