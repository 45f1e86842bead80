"""The NVIDIA GPU of this machine, asked of its driver. Nothing but the driver is needed."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any, Dict

_MAJOR, _MINOR = 75, 76
"""``CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…`` of the driver's stable C interface."""


@dataclass(frozen=True)
class Gpu:
    """The first GPU; ``compute_capability`` as ``"8.7"``."""

    name: str
    compute_capability: str

    def to_json(self) -> Dict[str, Any]:
        """A plain mapping for a JSON file."""
        return {"name": self.name, "compute_capability": self.compute_capability}

    def __str__(self) -> str:
        return f"{self.name} (SM {self.compute_capability})"


def find_gpu() -> Gpu | None:
    """The GPU that an engine would run on, or None without a driver or a GPU."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        device = ctypes.c_int()
        if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
            return None
        name = ctypes.create_string_buffer(256)
        if driver.cuDeviceGetName(name, len(name), device):
            return None
        major, minor = (_attribute(driver, device, which) for which in (_MAJOR, _MINOR))
    except (OSError, AttributeError):
        # No driver, or a library of this name that is none.
        return None
    return Gpu(name.value.decode("utf-8", errors="replace"), f"{major}.{minor}")


def _attribute(driver: Any, device: ctypes.c_int, which: int) -> int:
    value = ctypes.c_int()
    if driver.cuDeviceGetAttribute(ctypes.byref(value), which, device):
        raise OSError("the driver does not know the GPU's compute capability")
    return value.value
