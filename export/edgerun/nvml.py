"""GPU figures from the driver's NVML: memory of a process, clocks, temperature.

Never run on a GPU: signatures and layouts are those of ``nvml.h`` and were compared with
NVIDIA's own Python binding (nvidia-ml-py 13.615).

A GPU that shares the host's memory (Jetson, GB10) has no memory of its own to be read, and
NVML reports that; memory that its driver allocates for a process does not count in its resident
memory either, so that there the figure is "not known", not zero.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

MB = 1e6
NOT_SUPPORTED = 3
INSUFFICIENT_SIZE = 7
NOT_AVAILABLE = 2**64 - 1
"""Return codes, and the value of a size that the driver does not report."""

TEMPERATURE_OF_GPU = 0
CLOCK_SM = 1
_DEVICE = ctypes.c_void_p
_UINT_OUT = ctypes.POINTER(ctypes.c_uint)


class MemoryInfo(ctypes.Structure):
    """``nvmlMemory_t``: bytes of a device."""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


class ProcessInfo(ctypes.Structure):
    """``nvmlProcessInfo_t`` of the ``_v2`` and ``_v3`` calls: one process on a device."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


SIGNATURES: dict[str, tuple[Any, ...]] = {
    "nvmlInit_v2": (),
    "nvmlSystemGetDriverVersion": (ctypes.c_char_p, ctypes.c_uint),
    "nvmlDeviceGetCount_v2": (_UINT_OUT,),
    "nvmlDeviceGetName": (_DEVICE, ctypes.c_char_p, ctypes.c_uint),
    "nvmlDeviceGetHandleByIndex_v2": (ctypes.c_uint, ctypes.POINTER(_DEVICE)),
    "nvmlDeviceGetHandleByPciBusId_v2": (ctypes.c_char_p, ctypes.POINTER(_DEVICE)),
    "nvmlDeviceGetMemoryInfo": (_DEVICE, ctypes.POINTER(MemoryInfo)),
    "nvmlDeviceGetComputeRunningProcesses_v3": (_DEVICE, _UINT_OUT, ctypes.POINTER(ProcessInfo)),
    "nvmlDeviceGetComputeRunningProcesses_v2": (_DEVICE, _UINT_OUT, ctypes.POINTER(ProcessInfo)),
    "nvmlDeviceGetTemperature": (_DEVICE, ctypes.c_uint, _UINT_OUT),
    "nvmlDeviceGetClockInfo": (_DEVICE, ctypes.c_uint, _UINT_OUT),
    "nvmlDeviceGetCurrentClocksThrottleReasons": (_DEVICE, ctypes.POINTER(ctypes.c_ulonglong)),
}
"""Argument types of each function used; all return ``nvmlReturn_t``, which is 0 on
success. A driver may lack some."""


class Unread(Exception):
    """A figure that NVML does not provide here, with the reason."""


class Nvml:
    """One GPU as NVML sees it.

    Args:
        library: the loaded library, or a stand-in for tests.
        pci_bus_id: the device, as CUDA names it; None is the one of ``index``.
        index: in NVML's order, which need not be CUDA's.

    Raises:
        Unread: NVML does not start or has no such device.
    """

    def __init__(self, library: Any, pci_bus_id: str | None = None, index: int = 0) -> None:
        self._library = library
        self._call("nvmlInit_v2")
        self._device = _DEVICE()
        if pci_bus_id is None:
            self._call("nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(self._device))
        else:
            name = pci_bus_id.encode("ascii")
            self._call("nvmlDeviceGetHandleByPciBusId_v2", name, ctypes.byref(self._device))

    def driver(self) -> str:
        """The driver's version, such as ``580.95.05``; raises Unread."""
        return self._text("nvmlSystemGetDriverVersion")

    def count(self) -> int:
        """How many GPUs there are; raises Unread."""
        number = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(number))
        return number.value

    def name(self) -> str:
        """The product's name; raises Unread."""
        return self._text("nvmlDeviceGetName", self._device)

    def total(self) -> int:
        """Bytes of the device's memory; raises Unread."""
        return int(self._memory().total)

    def used(self) -> int:
        """Bytes that all processes and the driver use on the device; raises Unread."""
        return int(self._memory().used)

    def used_by(self, pid: int) -> int:
        """Bytes that one process uses on the device; raises Unread.

        In a container the driver may have another number for the process; it is then not found.
        """
        name = "nvmlDeviceGetComputeRunningProcesses_v3"
        if not hasattr(self._library, name):
            name = "nvmlDeviceGetComputeRunningProcesses_v2"
        code, count = INSUFFICIENT_SIZE, ctypes.c_uint(0)
        while code == INSUFFICIENT_SIZE:
            # More processes may start in between.
            count.value += 16
            entries = (ProcessInfo * count.value)()
            code = self._code(name, self._device, ctypes.byref(count), entries)
        self._check(name, code)
        known = [e.used for e in entries[: count.value] if e.pid == pid and e.used != NOT_AVAILABLE]
        if not known:
            raise Unread("the driver does not list this process")
        return int(sum(known))

    def conditions(self) -> dict[str, float | str | None]:
        """``temperature_c``, ``clock_mhz`` (of the SMs), ``throttle_reasons``.

        The last are the bits of NVML's ``nvmlClocksThrottleReason…`` in hexadecimal: 0x1 idle,
        0x4 power cap, 0x8 hardware slow-down, 0x20 software thermal, 0x40 hardware thermal. What
        the device does not report is None.
        """
        reasons = ctypes.c_ulonglong()
        arguments = (self._device, ctypes.byref(reasons))
        code = self._code("nvmlDeviceGetCurrentClocksThrottleReasons", *arguments)
        return {
            "temperature_c": self._reading("nvmlDeviceGetTemperature", TEMPERATURE_OF_GPU),
            "clock_mhz": self._reading("nvmlDeviceGetClockInfo", CLOCK_SM),
            "throttle_reasons": None if code else hex(reasons.value),
        }

    def _text(self, function: str, *device: Any) -> str:
        text = ctypes.create_string_buffer(96)
        self._call(function, *device, text, len(text))
        return text.value.decode("utf-8", errors="replace")

    def _reading(self, function: str, which: int) -> float | None:
        value = ctypes.c_uint()
        code = self._code(function, self._device, which, ctypes.byref(value))
        return None if code else float(value.value)

    def _memory(self) -> MemoryInfo:
        info = MemoryInfo()
        self._call("nvmlDeviceGetMemoryInfo", self._device, ctypes.byref(info))
        return info

    def _code(self, function: str, *arguments: Any) -> int:
        called = getattr(self._library, function, None)
        if called is None:
            return NOT_SUPPORTED
        called.argtypes, called.restype = SIGNATURES[function], ctypes.c_int
        code: int = called(*arguments)
        return code

    def _call(self, function: str, *arguments: Any) -> None:
        self._check(function, self._code(function, *arguments))

    def _check(self, function: str, code: int) -> None:
        if code == NOT_SUPPORTED:
            raise Unread(f"this device has no {function}")
        if code:
            raise Unread(f"{function} failed with NVML error {code}")


def read_gpus() -> dict[str, dict[str, float | str | None]] | None:
    """``"0 NVIDIA RTX A2000"`` → its :meth:`Nvml.conditions`; None where there is no NVML."""
    try:
        devices = [open_nvml(index=index) for index in range(open_nvml().count())]
        return {f"{i} {device.name()}": device.conditions() for i, device in enumerate(devices)}
    except Unread:
        return None


def open_nvml(pci_bus_id: str | None = None, index: int = 0) -> Nvml:
    """NVML of this machine's driver.

    Raises:
        Unread: there is no NVML here, or it does not start.
    """
    try:
        library = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    except OSError:
        raise Unread("this machine has no NVML (it comes with NVIDIA's driver)") from None
    return Nvml(library, pci_bus_id, index)
