"""The CUDA runtime library by ctypes: device memory, copies, streams, events, device properties.

Never run on a GPU: signatures and constants are those of ``cuda_runtime_api.h`` of CUDA 13.0,
which have not changed since CUDA 11. Without a driver, the real library was tried.
"""

from __future__ import annotations

import ctypes
import glob
import os
import sys
from ctypes.util import find_library
from dataclasses import dataclass
from typing import Any, Iterator

import numpy as np

from edgerun.errors import NoDevice, RunFailed

OUT_OF_MEMORY = 2
INSUFFICIENT_DRIVER = 35
NO_DEVICE = 100
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
STREAM_NON_BLOCKING = 1
EVENT_DEFAULT = 0
INTEGRATED, CAPABILITY_MAJOR, CAPABILITY_MINOR = 18, 75, 76
PROPERTIES_BYTES = 8192
"""Buffer size for ``cudaDeviceProp``, about 1 KB: its layout differs between releases, but it has
begun with the name, 256 bytes, in all of them."""

_VERSIONS = (13, 12, 11)
_INT, _POINTER, _SIZE, _UNSIGNED = ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
_HANDLE = ctypes.POINTER(ctypes.c_void_p)
_INT_OUT = ctypes.POINTER(ctypes.c_int)

SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cudaGetDeviceCount": (_INT_OUT,),
    "cudaGetDevice": (_INT_OUT,),
    "cudaDriverGetVersion": (_INT_OUT,),
    "cudaRuntimeGetVersion": (_INT_OUT,),
    "cudaDeviceGetAttribute": (_INT_OUT, _INT, _INT),
    "cudaDeviceGetPCIBusId": (ctypes.c_char_p, _INT, _INT),
    "cudaGetDeviceProperties": (_POINTER, _INT),
    "cudaMalloc": (_HANDLE, _SIZE),
    "cudaFree": (_POINTER,),
    "cudaMemcpyAsync": (_POINTER, _POINTER, _SIZE, _INT, _POINTER),
    "cudaStreamCreateWithFlags": (_HANDLE, _UNSIGNED),
    "cudaStreamSynchronize": (_POINTER,),
    "cudaEventCreateWithFlags": (_HANDLE, _UNSIGNED),
    "cudaEventRecord": (_POINTER, _POINTER),
    "cudaEventSynchronize": (_POINTER,),
    "cudaEventElapsedTime": (ctypes.POINTER(ctypes.c_float), _POINTER, _POINTER),
}
"""Argument types of each function used; all return ``cudaError_t``."""


@dataclass(frozen=True)
class CudaDevice:
    """The GPU that this process uses; ``integrated``: it shares the host's memory (Jetson)."""

    name: str
    compute_capability: str
    integrated: bool
    pci_bus_id: str
    driver: str
    runtime: str


class CudaRuntime:
    """One loaded libcudart and the current device.

    Args:
        library: the loaded library (``ctypes.CDLL``), or a stand-in for tests.

    Raises:
        NoDevice: there is no driver, it is too old for this library, or there is no GPU.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        for name, arguments in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
        library.cudaGetErrorString.argtypes = (ctypes.c_int,)
        library.cudaGetErrorString.restype = ctypes.c_char_p
        count = ctypes.c_int()
        code = library.cudaGetDeviceCount(ctypes.byref(count))
        if code or count.value == 0:
            raise self._absent(code)

    def device(self) -> CudaDevice:
        """The current device; ``CUDA_VISIBLE_DEVICES`` chooses it."""
        current = self._number("cudaGetDevice")
        properties = ctypes.create_string_buffer(PROPERTIES_BYTES)
        self._call("cudaGetDeviceProperties", properties, current)
        bus = ctypes.create_string_buffer(32)
        self._call("cudaDeviceGetPCIBusId", bus, len(bus), current)
        major, minor, integrated = (
            self._number("cudaDeviceGetAttribute", attribute, current)
            for attribute in (CAPABILITY_MAJOR, CAPABILITY_MINOR, INTEGRATED)
        )
        return CudaDevice(
            name=properties.raw[:256].split(b"\0")[0].decode("utf-8", errors="replace"),
            compute_capability=f"{major}.{minor}",
            integrated=bool(integrated),
            pci_bus_id=bus.value.decode("ascii"),
            driver=_version(self._number("cudaDriverGetVersion")),
            runtime=_version(self._number("cudaRuntimeGetVersion")),
        )

    def allocate(self, size: int) -> int:
        """The address of ``size`` bytes of device memory.

        Raises:
            RunFailed: not enough memory is free.
        """
        address = ctypes.c_void_p()
        code = self._library.cudaMalloc(ctypes.byref(address), size)
        if code == OUT_OF_MEMORY:
            raise RunFailed(
                f"the GPU's memory ran out: {size / 1e6:.1f} MB more were requested",
                remedy="a smaller --batch, or end what else runs on the GPU",
            )
        self._check("cudaMalloc", code)
        return int(address.value or 0)

    def free(self, address: int) -> None:
        """Free device memory; waits for the work on it."""
        self._call("cudaFree", address)

    def copy_in(self, address: int, array: np.ndarray[Any, Any], stream: int) -> None:
        """Copy a contiguous array to the device; it must live until the stream is done."""
        where = array.ctypes.data
        self._call("cudaMemcpyAsync", address, where, array.nbytes, HOST_TO_DEVICE, stream)

    def copy_out(self, array: np.ndarray[Any, Any], address: int, stream: int) -> None:
        """Fill a contiguous array from the device; its values are there once the stream is done."""
        where = array.ctypes.data
        self._call("cudaMemcpyAsync", where, address, array.nbytes, DEVICE_TO_HOST, stream)

    def create_stream(self) -> int:
        """A stream that does not wait for the default one."""
        return self._handle("cudaStreamCreateWithFlags", STREAM_NON_BLOCKING)

    def synchronize(self, stream: int) -> None:
        """Wait until all work of a stream is done.

        Raises:
            RunFailed: some of that work failed.
        """
        self._call("cudaStreamSynchronize", stream)

    def create_event(self) -> int:
        """An event that records its time."""
        return self._handle("cudaEventCreateWithFlags", EVENT_DEFAULT)

    def record(self, event: int, stream: int) -> None:
        """Record the time at which the stream reaches this point."""
        self._call("cudaEventRecord", event, stream)

    def elapsed_ms(self, start: int, end: int) -> float:
        """Milliseconds between two recorded events, to about 0.5 µs; waits for the second."""
        self._call("cudaEventSynchronize", end)
        elapsed = ctypes.c_float()
        self._call("cudaEventElapsedTime", ctypes.byref(elapsed), start, end)
        return elapsed.value

    def _handle(self, function: str, flags: int) -> int:
        handle = ctypes.c_void_p()
        self._call(function, ctypes.byref(handle), flags)
        return int(handle.value or 0)

    def _number(self, function: str, *arguments: int) -> int:
        number = ctypes.c_int()
        self._call(function, ctypes.byref(number), *arguments)
        return number.value

    def _call(self, function: str, *arguments: Any) -> None:
        self._check(function, getattr(self._library, function)(*arguments))

    def _check(self, function: str, code: int) -> None:
        if code:
            raise RunFailed(
                f"{function} failed: {self._reason(code)} (CUDA error {code})",
                remedy="an error of an earlier call may show only here; 'nvidia-smi' (on a Jetson "
                "'dmesg') may show more",
            )

    def _reason(self, code: int) -> str:
        text: bytes | None = self._library.cudaGetErrorString(code)
        return (text or b"unknown").decode("utf-8", errors="replace")

    def _absent(self, code: int) -> NoDevice:
        """The error for a missing device, with a remedy."""
        version = ctypes.c_int()
        self._library.cudaDriverGetVersion(ctypes.byref(version))
        if code == INSUFFICIENT_DRIVER and version.value:
            runtime = _version(self._number("cudaRuntimeGetVersion"))
            return NoDevice(
                f"the GPU's driver is too old: it has CUDA {_version(version.value)}, and the "
                f"CUDA runtime here is {runtime}",
                remedy="update the driver, or install an older CUDA runtime",
            )
        if code == INSUFFICIENT_DRIVER:
            return NoDevice(
                "this machine has no CUDA driver",
                remedy="run it on the device, or install NVIDIA's driver if there is a GPU",
            )
        if code in (0, NO_DEVICE):
            return NoDevice(
                "CUDA finds no GPU",
                remedy="run it on the device; in a container the GPU must be passed through "
                "(docker run --gpus all), and CUDA_VISIBLE_DEVICES must not hide it",
            )
        return NoDevice(
            f"CUDA cannot start: {self._reason(code)} (CUDA error {code})",
            remedy="'nvidia-smi' shows whether the driver works; restart after updating it",
        )


class DeviceBuffers:
    """Device memory by name, allocated when first needed, grown when more is, reused otherwise."""

    def __init__(self, cuda: CudaRuntime) -> None:
        self._cuda = cuda
        self._held: dict[str, tuple[int, int]] = {}

    def reserve(self, name: str, size: int) -> int:
        """The address of at least ``size`` bytes; its content is lost when it grows."""
        address, capacity = self._held.get(name, (0, 0))
        if address and size <= capacity:
            return address
        # Freed first: both at once may not fit.
        self.release(name)
        # An address is needed for an empty tensor, too.
        address = self._cuda.allocate(max(size, 1))
        self._held[name] = (address, max(size, 1))
        return address

    def address(self, name: str) -> int:
        """The address of the reserved memory of a name."""
        return self._held[name][0]

    def release(self, name: str | None = None) -> None:
        """Free the memory of one name, or of all."""
        for each in [name] if name is not None else list(self._held):
            address, _ = self._held.pop(each, (0, 0))
            if address:
                self._cuda.free(address)


def load_cuda_runtime() -> CudaRuntime:
    """The newest libcudart found here that the driver can serve.

    Raises:
        NoDevice: no driver, no GPU, or no such library.
    """
    failure: NoDevice | None = None
    for name in _candidates():
        try:
            return CudaRuntime(ctypes.CDLL(name))
        except (OSError, AttributeError):
            continue
        except NoDevice as error:
            failure = failure or error
    raise failure or NoDevice(
        "the CUDA runtime library (libcudart) is not installed",
        remedy="run it on the device; on a Jetson it is part of JetPack, elsewhere: "
        "pip install nvidia-cuda-runtime",
    )


def _candidates() -> Iterator[str]:
    """Names and paths under which the library may be found, newest first."""
    windows = sys.platform == "win32"
    for version in _VERSIONS:
        if windows:
            yield f"cudart64_{110 if version == 11 else version}.dll"
        else:
            # CUDA 11 alone has a minor version in its name.
            yield "libcudart.so.11.0" if version == 11 else f"libcudart.so.{version}"
    found = find_library("cudart")
    if found:
        yield found
    pattern = "cudart64_*.dll" if windows else "libcudart.so.*"
    folders = [os.path.join(path, "nvidia", "*") for path in sys.path]  # noqa: PTH118
    folders += ["/usr/local/cuda", os.environ.get("CUDA_PATH", "/usr/local/cuda")]
    for folder in folders:
        for part in ("lib", "lib64", "bin"):
            yield from sorted(glob.glob(f"{folder}/{part}/{pattern}"), reverse=True)  # noqa: PTH207


def _version(number: int) -> str:
    """13020 → ``13.2``."""
    return f"{number // 1000}.{number % 1000 // 10}"
