"""An engine loaded: its context, and its tensors on the device.

Deserialising needs a GPU and was never run with one. The errors of TensorRT-RTX 1.7 for complete,
truncated and other files without a GPU were tried.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np

from edgerun.cuda_runtime import load_cuda_runtime
from edgerun.errors import BadInput, EdgerunError, NoDevice, RunFailed
from edgerun.model import TensorInfo, written, written_feed
from edgerun.tensorrt.library import Library

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


DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}
"""numpy's name of each of TensorRT's data types that numpy supports."""

Feed = Mapping[str, "np.ndarray[Any, Any]"]


class EngineTensors:
    """The inputs and outputs of an engine, and its optimization profiles.

    Args:
        path: the engine's file, for messages.
        loaded: the engine.
        names: symbolic names of the dimensions, which an engine does not store.

    Raises:
        BadInput: the engine has a tensor that edgerun cannot feed.
    """

    def __init__(
        self,
        path: Path,
        loaded: LoadedEngine,
        names: Mapping[str, Sequence[int | str | None]] | None = None,
    ) -> None:
        self._path, self._engine, self._module = path, loaded.engine, loaded.library.module
        engine, mode = self._engine, self._module.TensorIOMode
        tensors = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        for name in tensors:
            self._check(name)
        entering = [n for n in tensors if engine.get_tensor_mode(n) == mode.INPUT]
        leaving = [n for n in tensors if engine.get_tensor_mode(n) == mode.OUTPUT]
        self._profiles = [
            {name: self._range(name, index) for name in entering}
            for index in range(engine.num_optimization_profiles)
        ]
        known = names or {}
        self.inputs = tuple(self._tensor(name, known.get(name, ())) for name in entering)
        self.outputs = tuple(self._tensor(name, known.get(name, ())) for name in leaving)

    def batch_range(self) -> tuple[int, int] | None:
        """The smallest and the largest size of an open first dimension; None without one."""
        open_first = [t.name for t in self.inputs if t.shape and not isinstance(t.shape[0], int)]
        if not open_first:
            return None
        ranges = [[profile[name] for name in open_first] for profile in self._profiles]
        return (
            min(max(least[0] for least, _ in each) for each in ranges),
            max(min(most[0] for _, most in each) for each in ranges),
        )

    def profile_for(self, feed: Feed, present: int) -> int:
        """The first profile that contains all shapes; the current one is tried first.

        Raises:
            BadInput: the engine was built for other shapes.
        """
        order = sorted(range(len(self._profiles)), key=lambda i: i != present)
        for index in order:
            if all(_within(feed[n].shape, r) for n, r in self._profiles[index].items()):
                return index
        told = "; or ".join(
            ", ".join(f"{n} {written(low)} to {written(high)}" for n, (low, high) in p.items())
            for p in self._profiles
        )
        raise BadInput(
            f"the engine was not built for {written_feed(feed)}; it takes {told}",
            where=str(self._path),
            remedy="give --batch or --shape within that, or build the engine for these shapes",
        )

    def _check(self, name: str) -> None:
        if self._engine.get_tensor_location(name) == self._module.TensorLocation.HOST:
            raise BadInput(
                f"the values of tensor {name!r} are sizes of other tensors",
                where=str(self._path),
                remedy="export the model with these sizes as constants",
            )
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in DTYPES:
            raise BadInput(
                f"tensor {name!r} is {kind}, which numpy does not have",
                where=str(self._path),
                remedy="keep the model's inputs and outputs in float32 when converting it",
            )

    def _range(self, name: str, profile: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        declared = tuple(self._engine.get_tensor_shape(name))
        if all(size >= 0 for size in declared):
            return declared, declared
        least, _, most = self._engine.get_tensor_profile_shape(name, profile)
        return tuple(least), tuple(most)

    def _tensor(self, name: str, known: Sequence[int | str | None]) -> TensorInfo:
        kind = self._engine.get_tensor_dtype(name).name
        shape: list[int | str | None] = []
        for axis, size in enumerate(self._engine.get_tensor_shape(name)):
            # A dimension of one size in every profile is treated as fixed.
            sizes = {p[name][end][axis] for p in self._profiles if name in p for end in (0, 1)}
            symbol = known[axis] if axis < len(known) else None
            if size >= 0 or len(sizes) == 1:
                shape.append(size if size >= 0 else sizes.pop())
            else:
                shape.append(symbol if isinstance(symbol, str) else None)
        return TensorInfo(name, DTYPES[kind], tuple(shape))


def _within(shape: Sequence[int], bounds: tuple[tuple[int, ...], tuple[int, ...]]) -> bool:
    least, most = bounds
    fits = len(shape) == len(least)
    return fits and all(low <= size <= high for low, size, high in zip(least, shape, most))
