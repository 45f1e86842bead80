"""From a TensorRT engine's file to one in memory, and why that may fail.

Deserialising needs a GPU and was never run with one. What TensorRT-RTX 1.7 says about whole,
truncated and foreign files without a GPU was tried.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgerun.cuda_runtime import load_cuda_runtime
from edgerun.errors import BadInput, EdgerunError, NoDevice, RunFailed
from edgerun.tensorrt_library import Library

# The bindings raise TypeError for a constructor that returned nothing, as without a driver.
LIBRARY_ERRORS = (RuntimeError, TypeError, ValueError)
_NOT_WHOLE = ("Serialization", "readHeader", "empty memory buffer")
_MEMORY = ("out of memory", "OutOfMemory")


@dataclass(frozen=True)
class LoadedEngine:
    """An engine, with the runtime that must live as long as it does."""

    library: Library
    runtime: Any
    engine: Any
    load_ms: float


def load_engine(path: Path, library: Library, version_compatible: bool = False) -> LoadedEngine:
    """Deserialise an engine.

    Args:
        version_compatible: the engine brings host code of its own along, which it may run: only
            for one that is known to be built so.

    Raises:
        BadInput: the file is not a whole engine of this library, it was built for another
            version or device.
        NoDevice: there is no driver or GPU.
        RunFailed: the device's memory does not suffice.
    """
    log = library.log
    log.clear()
    begin = time.perf_counter()
    try:
        runtime = library.module.Runtime(log)
        if version_compatible and hasattr(runtime, "engine_host_code_allowed"):
            runtime.engine_host_code_allowed = True
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
    except LIBRARY_ERRORS as error:
        raise _why(path, library, log.last_error() or str(error)) from error
    if engine is None:
        raise _why(path, library, log.last_error() or "it gives no reason")
    return LoadedEngine(library, runtime, engine, (time.perf_counter() - begin) * 1e3)


def _why(path: Path, library: Library, reason: str) -> EdgerunError:
    """The error for an engine that does not load."""
    where = f"{path} ({path.stat().st_size} bytes)"
    if any(word in reason for word in _NOT_WHOLE):
        return BadInput(
            f"this is not a whole engine of {library}: {reason}",
            where=where,
            remedy="it may be truncated, or built by another library or version: build it again, "
            "or copy it again",
        )
    try:
        load_cuda_runtime()
    except NoDevice as missing:
        return NoDevice(f"the engine cannot be loaded here: {missing.what}", where, missing.remedy)
    if any(word in reason for word in _MEMORY):
        return RunFailed(
            f"{library} cannot load the engine: {reason}", where, "end what else uses the GPU"
        )
    return BadInput(
        f"{library} cannot load the engine: {reason}",
        where=where,
        remedy="an engine runs with the library's version and on the kind of GPU that it was "
        "built for: build it on this device (python -m edgerun build)",
    )
