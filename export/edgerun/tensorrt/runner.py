"""Run a TensorRT engine as a model.

Never run on a GPU. It is written against the Python bindings of TensorRT 10 and 11 and of
TensorRT-RTX 1.7 (whose names are checked in the tests) and tested with stand-ins for the
engine and for libcudart.
"""

from __future__ import annotations

import time
import weakref
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import numpy as np

from edgerun.cuda_runtime import CudaRuntime, DeviceBuffers, load_cuda_runtime
from edgerun.errors import BadInput, EdgerunError, NoDevice, RunFailed
from edgerun.model import TensorInfo, check_file, written, written_feed
from edgerun.tensorrt.engine import LIBRARY_ERRORS, LoadedEngine, check_engine, load_engine
from edgerun.tensorrt.library import MODULES, installation, is_installed, open_library

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
        accepted = "; or ".join(
            ", ".join(f"{n} {written(low)} to {written(high)}" for n, (low, high) in p.items())
            for p in self._profiles
        )
        raise BadInput(
            f"the engine was not built for {written_feed(feed)}; it takes {accepted}",
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


class EngineModel:
    """A deserialised engine with one execution context and one stream.

    One call at a time: the device's buffers are shared by all calls.

    Args:
        path: the engine's file, for messages.
        loaded: from :func:`edgerun.tensorrt.engine.load_engine`.
        names: symbolic names of the inputs' and outputs' dimensions, which an engine does not
            store; from the record next to it.

    Raises:
        BadInput: the engine has tensors that edgerun cannot feed.
        NoDevice: there is no CUDA runtime.
        RunFailed: the device's memory does not suffice.
    """

    def __init__(
        self,
        path: Path,
        loaded: LoadedEngine,
        names: Mapping[str, Sequence[int | str | None]] | None = None,
        cuda: CudaRuntime | None = None,
    ) -> None:
        self.path = path
        begin = time.perf_counter()
        self.providers: tuple[str, ...] = (loaded.library.name,)
        self._loaded, self._engine = loaded, loaded.engine
        self._cuda = cuda or load_cuda_runtime()
        self._buffers = DeviceBuffers(self._cuda)
        # Not at exit: the driver frees everything then, and may be unloaded already.
        weakref.finalize(self, self._buffers.release).atexit = False
        self._stream = self._cuda.create_stream()
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise RunFailed(
                f"the engine cannot be initialised: {self._reason()}",
                where=str(path),
                remedy="the GPU's memory may not suffice: end what else runs on it",
            )
        self.load_ms = loaded.load_ms + (time.perf_counter() - begin) * 1e3
        self._tensors = EngineTensors(path, loaded, names)
        self.inputs, self.outputs = self._tensors.inputs, self._tensors.outputs
        self._allocators: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._bound: list[tuple[int, ...]] | None = None
        self._profile = 0
        self._events: tuple[int, int] | None = None
        loaded.library.log.clear()

    @property
    def query(self) -> Callable[[Feed], Any]:
        """Copies in, the engine, copies out, and the wait for them; the feed must fit."""
        return self._query

    @property
    def batch_range(self) -> tuple[int, int] | None:
        """The smallest and the largest size of an open first dimension; None without one."""
        return self._tensors.batch_range()

    def run(self, feed: Feed) -> list[Any]:
        """The outputs in declared order for one feed.

        Raises:
            BadInput: the feed does not fit what the engine was built for.
            RunFailed: the engine fails; the message names the shapes fed.
        """
        ready = {}
        for tensor in self.inputs:
            array = feed.get(tensor.name)
            if array is None or str(array.dtype) != tensor.dtype:
                given = "missing" if array is None else f"{array.dtype}{written(array.shape)}"
                raise BadInput(
                    f"input {tensor.name!r} is {given}; the engine takes {tensor}",
                    where=str(self.path),
                    remedy=f"give {', '.join(map(str, self.inputs))}",
                )
            # ascontiguousarray would give a scalar a dimension.
            ready[tensor.name] = array if array.flags.c_contiguous else array.copy(order="C")
        return self._query(ready)

    def device_ms(self, feed: Feed) -> float:
        """Milliseconds on the GPU for one feed, by CUDA events, without the copies.

        The time between two events in the stream right before and after the engine. Where its
        kernels are shorter than the time to launch them, the GPU's waiting is in it.
        """
        if self._events is None:
            self._events = (self._cuda.create_event(), self._cuda.create_event())
        self._launch(feed, self._events)
        return self._cuda.elapsed_ms(*self._events)

    def information(self) -> str:
        """The layers from the library's inspector, as JSON."""
        inspector = self._engine.create_engine_inspector()
        kind = self._loaded.library.module.LayerInformationFormat.JSON
        return str(inspector.get_engine_information(kind))

    def _query(self, feed: Feed) -> list[Any]:
        self._launch(feed)
        outputs: list[Any] = []
        for tensor in self.outputs:
            name = tensor.name
            allocator = self._allocators.get(name)
            shape = self._shapes[name] if allocator is None else allocator.shape
            output = np.empty(shape, tensor.dtype)
            if output.nbytes:
                self._cuda.copy_out(output, self._buffers.address(name), self._stream)
            outputs.append(output)
        self._cuda.synchronize(self._stream)
        return outputs

    def _launch(self, feed: Feed, events: tuple[int, int] | None = None) -> None:
        shapes = [feed[tensor.name].shape for tensor in self.inputs]
        if shapes != self._bound:
            self._bind(feed)
        for tensor in self.inputs:
            if feed[tensor.name].nbytes:
                address = self._buffers.address(tensor.name)
                self._cuda.copy_in(address, feed[tensor.name], self._stream)
        if events:
            self._cuda.record(events[0], self._stream)
        started = self._context.execute_async_v3(self._stream)
        if events:
            self._cuda.record(events[1], self._stream)
        if not started:
            self._bound = None
            raise self._failed(feed)

    def _bind(self, feed: Feed) -> None:
        """Choose the profile, set the shapes, and assign each tensor's memory."""
        self._bound = None
        profile = self._tensors.profile_for(feed, self._profile)
        if profile != self._profile:
            self._context.set_optimization_profile_async(profile, self._stream)
            self._cuda.synchronize(self._stream)
            self._profile = profile
        for tensor in self.inputs:
            name, array = tensor.name, feed[tensor.name]
            good = self._context.set_input_shape(name, tuple(array.shape))
            address = self._buffers.reserve(name, array.nbytes)
            if not (good and self._context.set_tensor_address(name, address)):
                raise self._failed(feed)
        try:
            open_inputs = self._context.infer_shapes()
        except LIBRARY_ERRORS as error:
            raise self._failed(feed, str(error)) from error
        if open_inputs:
            raise self._failed(feed, f"the shapes of {', '.join(open_inputs)} remain open")
        for tensor in self.outputs:
            self._place(tensor, feed)
        self._bound = [feed[tensor.name].shape for tensor in self.inputs]

    def _place(self, tensor: TensorInfo, feed: Feed) -> None:
        """Memory for one output, or an allocator where its size is known only afterwards."""
        name = tensor.name
        shape = tuple(self._context.get_tensor_shape(name))
        self._shapes[name] = shape
        if any(size < 0 for size in shape):
            if name not in self._allocators:
                self._allocators[name] = _allocator(self._loaded.library.module, self._buffers)
            self._context.set_output_allocator(name, self._allocators[name])
            return
        size = int(np.prod(shape)) * np.dtype(tensor.dtype).itemsize
        address = self._buffers.reserve(name, size)
        if not self._context.set_tensor_address(name, address):
            raise self._failed(feed)

    def _failed(self, feed: Feed, reason: str = "") -> RunFailed:
        return RunFailed(
            f"the engine fails on inputs {written_feed(feed)}: {reason or self._reason()}",
            where=str(self.path),
            remedy="give the shapes it was built for (--shape NAME=1x3x224x224) or real inputs "
            "(--inputs data.npz)",
        )

    def _reason(self) -> str:
        """The library's last error."""
        log = self._loaded.library.log
        reason = str(log.last_error())
        log.clear()
        return reason or "TensorRT gives no reason"


def _allocator(module: Any, buffers: DeviceBuffers) -> Any:
    """The library's allocator for an output whose shape depends on values."""

    class Growing(module.IOutputAllocator):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IOutputAllocator.__init__(self)
            self.shape: tuple[int, ...] = ()

        def reallocate_output(self, name: str, memory: int, size: int, alignment: int) -> int:
            try:
                # cudaMalloc aligns to 256 bytes, more than any tensor asks for.
                return buffers.reserve(name, size)
            except RunFailed:
                # An exception cannot pass through the library, which takes 0 for "no memory".
                return 0

        def reallocate_output_async(
            self, name: str, memory: int, size: int, alignment: int, stream: int
        ) -> int:
            return self.reallocate_output(name, memory, size, alignment)

        def notify_shape(self, name: str, shape: Any) -> None:
            self.shape = tuple(shape)

    return Growing()


def open_engine(path: Path) -> EngineModel:
    """Open an engine with the library that built it.

    The library is in its record; an engine without one is tried with each installed library.

    Raises:
        BadInput: there is no such file, it is truncated, it was built by or for another library or
        device,
            or its library is absent.
        NoDevice: there is no driver or GPU.
        RunFailed: the library or the device's memory fails.
    """
    check_file(path)
    record = check_engine(path)
    if record is not None:
        library = open_library(str(record["library"]))
        loaded = load_engine(path, library, bool(record["settings"]["version_compatible"]))
        return EngineModel(path, loaded, _dimension_names(record))
    installed = [name for name in MODULES if is_installed(name)]
    if not installed:
        raise BadInput(
            "no TensorRT is installed",
            where=str(path),
            remedy="; or ".join(f"{name}: {installation(name)}" for name in MODULES),
        )
    refusals: list[EdgerunError] = []
    for name in installed:
        try:
            return EngineModel(path, load_engine(path, open_library(name)))
        except EdgerunError as error:
            refusals.append(error)
    raise refusals[0] if len(refusals) == 1 else _refused(path, installed, refusals)


def _refused(
    path: Path, libraries: Sequence[str], refusals: Sequence[EdgerunError]
) -> EdgerunError:
    reasons = "; ".join(f"{name}: {error.what}" for name, error in zip(libraries, refusals))
    # A library that lacks only the GPU has not rejected the file.
    kind = NoDevice if any(isinstance(error, NoDevice) for error in refusals) else BadInput
    return kind(
        f"no library here takes the engine: {reasons}", str(path), remedy=refusals[-1].remedy
    )


def _dimension_names(record: Mapping[str, Any]) -> dict[str, Sequence[int | str | None]]:
    tensors = [*record.get("inputs", ()), *record.get("outputs", ())]
    return {tensor["name"]: tensor["shape"] for tensor in tensors}
