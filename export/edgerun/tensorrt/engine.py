"""An engine's file: checked against the record of its build, loaded, and inspected.

Everything but the GPU is checked before a runtime raises an opaque error, so that a truncated file
or another version is named on a machine without a GPU too. Loading needs a GPU and was never run
with one; the errors of TensorRT-RTX 1.7 for complete, truncated and other files without a GPU
were tried.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Tuple

from edgerun.cuda_runtime import load_cuda_runtime
from edgerun.errors import BadInput, EdgerunError, NoDevice, RunFailed
from edgerun.files import read_json, sha256
from edgerun.tensorrt.library import Gpu, Library, find_gpu, open_library

BUILD_SCHEMA = "edgerun.build/1"
AMPERE = (8, 0)


def check_engine(path: Path) -> Dict[str, Any] | None:
    """Check an engine file against its record, the installed library, and the GPU.

    Returns:
        The record ``edgerun.build/1``; None for an engine without one, made by another program.

    Raises:
        BadInput: there is no such engine; it is truncated or changed; its library is absent; or it
            was built by another version or for another GPU, with both named.
        RunFailed: the library is installed and cannot be loaded.
    """
    record = read_record(path)
    if record is None:
        return None
    _check_bytes(path, record)
    library = open_library(str(record["library"]))
    _check_version(path, record, library)
    gpu = find_gpu()
    if gpu is not None:
        _check_gpu(path, record, gpu)
    return record


def read_record(path: Path) -> Dict[str, Any] | None:
    """The record next to an engine, or None without one.

    Raises:
        BadInput: there is no such engine, or the record is not one.
    """
    if not path.is_file():
        what = "the engine is a folder, not a file" if path.exists() else "there is no such engine"
        raise BadInput(what, str(path), "build it: python -m edgerun build MODEL.onnx --engine OUT")
    beside = record_path(path)
    if not beside.is_file():
        return None
    try:
        record = read_json(beside)
    except (OSError, ValueError) as error:
        raise _bad_record(beside) from error
    if not isinstance(record, dict) or record.get("schema") != BUILD_SCHEMA:
        raise _bad_record(beside)
    return record


def record_path(engine: Path) -> Path:
    """The path of an engine's record."""
    return engine.with_name(engine.name + ".json")


def _bad_record(beside: Path) -> BadInput:
    return BadInput(
        "this is not the record of an engine's build",
        where=str(beside),
        remedy="copy it again with its engine, or build the engine again",
    )


def _check_bytes(path: Path, record: Dict[str, Any]) -> None:
    here, then = path.stat().st_size, int(record["engine"]["bytes"])
    if here < then:
        raise BadInput(
            f"the engine is truncated: {here} bytes, its record says {then}",
            where=str(path),
            remedy="copy it again, or build it again",
        )
    if here > then or sha256(path) != record["engine"]["sha256"]:
        raise BadInput(
            "the engine is not the one that its record describes",
            where=str(path),
            remedy="copy both again, or build it again",
        )


def _check_version(path: Path, record: Dict[str, Any], library: Library) -> None:
    then, here = _numbers(str(record["version"])), _numbers(library.version)
    compatible = bool(record["settings"]["version_compatible"]) and here >= then
    if here != then and not compatible:
        raise BadInput(
            f"{_built(record)}, and here is {library}",
            where=str(path),
            remedy=f"build it again here, or install {record['library']} {record['version']}",
        )


def _check_gpu(path: Path, record: Dict[str, Any], gpu: Gpu) -> None:
    meant: List[str] = list(record["compute_capabilities"])
    device = record["device"]
    if not meant and record["library"] == "tensorrt" and device is not None:
        meant = [device["compute_capability"]]
    above = record["settings"]["hardware_compatible"] and _numbers(gpu.compute_capability) >= AMPERE
    if meant and gpu.compute_capability not in meant and not above:
        raise BadInput(
            f"{_built(record)}, and here is {gpu}",
            where=str(path),
            remedy="build it again here, or with --sm "
            f"{gpu.compute_capability} where tensorrt-rtx has it",
        )


def _built(record: Dict[str, Any]) -> str:
    """The library and the device that an engine was built by and for."""
    sm = ", ".join(record["compute_capabilities"])
    device = record["device"]
    for_device = f" for SM {sm}" if sm else ""
    if not sm and device is not None:
        for_device = f" for {device['name']} (SM {device['compute_capability']})"
    return f"the engine was built by {record['library']} {record['version']}{for_device}"


def _numbers(version: str) -> tuple[int, ...]:
    """The first three numbers of a version: engines are not compatible with other patch
    releases.
    """
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


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
        version_compatible: the engine contains host code, which it may run: only
            for one that is known to be built in that mode.

    Raises:
        BadInput: the file is not a complete engine of this library, it was built for another
            version or device.
        NoDevice: there is no driver or GPU.
        RunFailed: the device's memory does not suffice.
    """
    log = library.log
    begin = time.perf_counter()
    try:
        runtime, engine = _deserialize(library, path.read_bytes(), version_compatible)
    except LIBRARY_ERRORS as error:
        raise _why(path, library, log.last_error() or str(error)) from error
    if engine is None:
        raise _why(path, library, log.last_error() or "it gives no reason")
    return LoadedEngine(library, runtime, engine, (time.perf_counter() - begin) * 1e3)


def _deserialize(library: Library, content: bytes, host_code: bool) -> Tuple[Any, Any]:
    """The library's runtime and the engine, None where it refuses it; the log has the reason."""
    library.log.clear()
    runtime = library.module.Runtime(library.log)
    if host_code and hasattr(runtime, "engine_host_code_allowed"):
        runtime.engine_host_code_allowed = True
    return runtime, runtime.deserialize_cuda_engine(content)


def _why(path: Path, library: Library, reason: str) -> EdgerunError:
    """The error for an engine that does not load."""
    where = f"{path} ({path.stat().st_size} bytes)"
    if any(word in reason for word in _NOT_WHOLE):
        return BadInput(
            f"this is not a complete engine of {library}: {reason}",
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


@dataclass(frozen=True)
class Inspection:
    """The content of an engine.

    Attributes:
        layers: the inspector's layers; None where the engine could not be loaded.
        tensors: its inputs and outputs.
        memory_bytes: device memory of one execution context.
        reason: the reason why it could not be loaded.
    """

    layers: List[Any] | None
    tensors: List[Any]
    memory_bytes: int | None = None
    reason: str | None = None

    def to_json(self) -> Dict[str, Any]:
        """The content of the layers file next to the engine."""
        return {"layers": self.layers, "tensors": self.tensors}


def inspect_engine(library: Library, engine: bytes, version_compatible: bool) -> Inspection:
    """Load an engine that was built just now, whose host code is therefore trusted, and read its
    layers; an engine that does not load here is no error.
    """
    module, log = library.module, library.log
    try:
        # The runtime must live as long as its engine.
        _runtime, loaded = _deserialize(library, engine, version_compatible)
    except (TypeError, RuntimeError) as error:
        return Inspection(None, [], reason=log.last_error() or str(error))
    if loaded is None:
        reason = log.last_error() or f"{library} does not load it and gives no reason"
        if find_gpu() is None:
            reason = "there is no NVIDIA GPU with its driver here"
        return Inspection(None, [], reason=reason)
    inspector = loaded.create_engine_inspector()
    try:
        seen = json.loads(inspector.get_engine_information(module.LayerInformationFormat.JSON))
    except ValueError as error:
        return Inspection(None, [], reason=f"the inspector's output is not JSON: {error}")
    return Inspection(
        layers=list(seen.get("Layers", [])),
        # "I/O Tensors" since 11; the same list.
        tensors=list(seen.get("I/O Tensors") or seen.get("Bindings") or []),
        memory_bytes=_memory(loaded),
    )


def _memory(engine: Any) -> int | None:
    for name in ("device_memory_size_v2", "device_memory_size"):
        size = getattr(engine, name, None)
        if size is not None:
            return int(size)
    return None
