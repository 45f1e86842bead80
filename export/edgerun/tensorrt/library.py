"""TensorRT's Python package on this machine, and the GPU it builds for.

A release's features are found by the names of its attributes and enum members, never by numbers:
members were renumbered and removed between releases. Run so far: tensorrt_rtx 1.7.1 without a
GPU. The paths of tensorrt 10 and 11 follow their documentation and were never run.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Dict, List

from edgerun.errors import BadInput, RunFailed

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
        # No driver, or another library of this name.
        return None
    return Gpu(name.value.decode("utf-8", errors="replace"), f"{major}.{minor}")


def _attribute(driver: Any, device: ctypes.c_int, which: int) -> int:
    value = ctypes.c_int()
    if driver.cuDeviceGetAttribute(ctypes.byref(value), which, device):
        raise OSError("the driver does not know the GPU's compute capability")
    return value.value


MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""The libraries' names, and their modules."""

_INSTALL = {
    "tensorrt": "on a Jetson it comes with JetPack: apt install python3-libnvinfer (a virtual "
    "environment needs --system-site-packages); elsewhere: {python} -m pip install tensorrt; "
    "without a GPU use tensorrt-rtx",
    "tensorrt-rtx": "pip install 'edgekd[rtx]', or without edgekd: "
    "{python} -m pip install tensorrt-rtx",
}


@dataclass(frozen=True)
class Library:
    """An imported TensorRT.

    Attributes:
        name: ``tensorrt`` or ``tensorrt-rtx``.
        module: the imported module.
        log: the logger of all its objects; the library uses the first one it gets.
    """

    name: str
    module: Any
    log: Any

    @property
    def version(self) -> str:
        """For example ``10.3.0`` or ``1.7.1.116``."""
        return str(self.module.__version__)

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    def member(self, enum: str, name: str) -> Any:
        """A member of one of the module's enums, or None where this release lacks either."""
        return getattr(getattr(self.module, enum, None), name, None)

    @property
    def weakly_typed(self) -> bool:
        """Whether precision can be set in the builder; else it is set by the model alone."""
        return self.member("BuilderFlag", "FP16") is not None

    def compute_capabilities(self) -> Dict[str, Any]:
        """``{"8.6": ComputeCapability.SM86, …}``; empty where it builds only for this machine's
        GPU.
        """
        members = getattr(getattr(self.module, "ComputeCapability", None), "__members__", {})
        named = {name[2:]: member for name, member in members.items() if name[:2] == "SM"}
        return {f"{digits[:-1]}.{digits[-1]}": member for digits, member in named.items()}


_OPENED: Dict[str, Library] = {}


def open_library(name: str) -> Library:
    """Import a TensorRT, with an empty log.

    Raises:
        BadInput: it is not installed; the message says what to install.
        RunFailed: it is installed and cannot be loaded.
    """
    if name not in _OPENED:
        module = _import(name)
        _OPENED[name] = Library(name, module, _log(module))
    library = _OPENED[name]
    library.log.clear()
    return library


def is_installed(name: str) -> bool:
    """Whether this interpreter has a library; it is not imported."""
    return find_spec(MODULES[name]) is not None


def installation(name: str) -> str:
    """The remedy for a library that is not installed."""
    return _INSTALL[name].format(python=sys.executable)


def start_builder(library: Library) -> Any:
    """A ``Builder``.

    Raises:
        RunFailed: the library finds no GPU and needs one.
    """
    try:
        builder = library.module.Builder(library.log)
    except (TypeError, RuntimeError) as error:
        # The bindings raise TypeError for a factory that returned None; the log has the reason.
        reason = library.log.last_error() or str(error)
        raise RunFailed(
            f"{library} does not start here: {reason}",
            remedy="it needs an NVIDIA GPU and its driver; tensorrt-rtx builds without one",
        ) from error
    return builder


def _import(name: str) -> Any:
    module = MODULES[name]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            raise BadInput(
                f"{name} is not installed for {sys.executable}", remedy=installation(name)
            ) from error
        raise _unloadable(name, error) from error
    # The packages load their shared libraries on import, and fail with many kinds of errors.
    except (OSError, RuntimeError, AttributeError) as error:
        raise _unloadable(name, error) from error


def _unloadable(name: str, error: Exception) -> RunFailed:
    return RunFailed(
        f"{name} is installed and cannot be loaded: {' '.join(str(error).split())}",
        remedy=f"install it again: {installation(name)}",
    )


def _log(module: Any) -> Any:
    """A logger that collects warnings and errors, each once."""

    class Log(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.warnings: List[str] = []
            self.errors: List[str] = []

        def clear(self) -> None:
            del self.warnings[:], self.errors[:]

        def last_error(self) -> str:
            # Any failure without a GPU ends with a CUDA error; the cause is logged before it.
            return next((e for e in self.errors if "catchCudaError" not in e), "")

        def log(self, severity: Any, message: str) -> None:
            lists = {"WARNING": self.warnings, "ERROR": self.errors, "INTERNAL_ERROR": self.errors}
            messages = lists.get(severity.name)
            text = " ".join(message.split())
            if messages is not None and text not in messages:
                messages.append(text)

    return Log()
