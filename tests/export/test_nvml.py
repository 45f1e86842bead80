from __future__ import annotations

import ctypes
import os
from ctypes import CFUNCTYPE, POINTER, Structure, c_char, c_int, c_uint, c_ulonglong, c_void_p
from pathlib import Path

import pytest

from edgerun import memory, nvml
from edgerun.memory import MemoryWatch
from edgerun.nvml import MemoryInfo, Nvml, ProcessInfo, Unread, open_nvml
from edgerun.tensorrt.library import find_gpu

NOT_SUPPORTED, INSUFFICIENT_SIZE, NOT_AVAILABLE = 3, 7, (1 << 64) - 1
DEVICE = 0x7F00_0000_1000


class Memory(Structure):
    """As nvml.h has it: three unsigned long longs."""

    _fields_ = [("total", c_ulonglong), ("free", c_ulonglong), ("used", c_ulonglong)]


class Process(Structure):
    _fields_ = [("pid", c_uint), ("used", c_ulonglong), ("gi", c_uint), ("ci", c_uint)]


class Library:
    """A stand-in for libnvidia-ml with the prototypes of nvml.h."""

    def __init__(self, used=1000, processes=(), memory_code=0):
        self.used, self.processes, self.memory_code = used, list(processes), memory_code
        for name, prototype, function in (
            ("nvmlInit_v2", CFUNCTYPE(c_int), lambda: 0),
            ("nvmlDeviceGetHandleByIndex_v2", CFUNCTYPE(c_int, c_uint, POINTER(c_void_p)), self.at),
            (
                "nvmlDeviceGetHandleByPciBusId_v2",
                CFUNCTYPE(c_int, ctypes.c_char_p, POINTER(c_void_p)),
                lambda bus, device: self.at(0 if bus == b"0000:01:00.0" else 9, device),
            ),
            (
                "nvmlDeviceGetMemoryInfo",
                CFUNCTYPE(c_int, c_void_p, POINTER(Memory)),
                self.memory,
            ),
            (
                "nvmlDeviceGetComputeRunningProcesses_v3",
                CFUNCTYPE(c_int, c_void_p, POINTER(c_uint), POINTER(Process)),
                self.running,
            ),
            (
                "nvmlSystemGetDriverVersion",
                CFUNCTYPE(c_int, POINTER(c_char), c_uint),
                lambda text, size: ctypes.memmove(text, b"580.95.05\0", 10) and 0,
            ),
            (
                "nvmlDeviceGetTemperature",
                CFUNCTYPE(c_int, c_void_p, c_uint, POINTER(c_uint)),
                lambda device, sensor, out: out.__setitem__(0, 61) or sensor,
            ),
            (
                "nvmlDeviceGetClockInfo",
                CFUNCTYPE(c_int, c_void_p, c_uint, POINTER(c_uint)),
                lambda device, clock, out: NOT_SUPPORTED,
            ),
        ):
            setattr(self, name, prototype(function))

    def at(self, index, device):
        device[0] = DEVICE
        return 0 if index == 0 else 6

    def memory(self, device, out):
        assert device == DEVICE
        out[0] = Memory(24_000, 24_000 - self.used, self.used)
        return self.memory_code

    def running(self, device, count, out):
        room, count[0] = count[0], len(self.processes)
        if room < len(self.processes):
            return INSUFFICIENT_SIZE
        for i, (pid, used) in enumerate(self.processes):
            out[i] = Process(pid, used, 0xFFFF, 0xFFFF)
        return 0


def test_structures_have_the_layout_of_the_header():
    # sizeof and offsetof by the C rules for 8-byte integers: checked against nvidia-ml-py 13.615.
    assert ctypes.sizeof(MemoryInfo) == ctypes.sizeof(Memory) == 24
    assert ctypes.sizeof(ProcessInfo) == ctypes.sizeof(Process) == 24
    assert [getattr(ProcessInfo, name).offset for name, _ in ProcessInfo._fields_] == [0, 8, 16, 20]


def test_figures_are_those_of_the_device_and_the_process():
    others = [(pid, 1) for pid in range(1, 40)]
    nvml = Nvml(Library(used=5000, processes=[*others, (77, 1 << 33)]), "0000:01:00.0")
    assert (nvml.total(), nvml.used(), nvml.driver()) == (24_000, 5000, "580.95.05")
    # More processes than the first buffer holds, and more bytes than 32 bits represent.
    assert nvml.used_by(77) == 1 << 33


def test_a_process_that_is_not_listed_or_not_told_is_unread():
    nvml = Nvml(Library(processes=[(77, NOT_AVAILABLE), (78, 5)]))
    for pid in (77, 99):
        with pytest.raises(Unread, match="does not list"):
            nvml.used_by(pid)


def test_a_device_that_is_not_there_is_unread():
    with pytest.raises(Unread, match="error 6"):
        Nvml(Library(), "0000:02:00.0")


def test_a_reading_that_a_device_lacks_is_none():
    # The stand-in gives a temperature, refuses the clock, and lacks the last function.
    assert Nvml(Library()).conditions() == {
        "temperature_c": 61.0,
        "clock_mhz": None,
        "throttle_reasons": None,
    }


def test_the_peak_is_that_of_this_process_where_the_driver_tells_it():
    library = Library(processes=[(os.getpid(), 300_000_000)])
    watch = MemoryWatch(Nvml(library))
    watch.look()
    library.processes = [(os.getpid(), 700_000_000)]
    watch.look()
    library.processes = [(os.getpid(), 200_000_000)]
    watch.look()
    assert watch.result()["device_mb"] == 700.0
    assert "this process" in watch.result()["device_note"]


def test_else_it_is_how_far_the_device_s_memory_rose():
    library = Library(used=1_000_000_000)
    watch = MemoryWatch(Nvml(library))
    for used in (1_200_000_000, 1_450_000_000, 1_100_000_000):
        library.used = used
        watch.look()
    assert watch.result()["device_mb"] == 450.0
    assert "other processes included" in watch.result()["device_note"]


def test_memory_shared_with_the_host_is_not_known_and_not_zero():
    watch = MemoryWatch(
        Nvml(Library(memory_code=NOT_SUPPORTED)), "the GPU shares the host's memory"
    )
    watch.look()
    told = watch.result()
    assert told["device_mb"] is None
    assert "shares the host's memory" in told["device_note"]
    assert "nvmlDeviceGetMemoryInfo" in told["device_note"]


@pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")
def test_the_gpu_is_watched_for_models_that_use_it_alone():
    assert memory._watch(Path("m.onnx"), ["CPUExecutionProvider"]) is None
    for path, providers in (("m.onnx", ["CUDAExecutionProvider"]), ("m.engine", [])):
        told = memory._watch(Path(path), providers).result()
        assert told["device_mb"] is None
        assert "no NVML" in told["device_note"]


def test_without_nvml_the_figure_is_not_known(monkeypatch):
    monkeypatch.setattr(nvml.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError))
    with pytest.raises(Unread, match="no NVML"):
        open_nvml()
    assert nvml.read_gpus() is None
    assert MemoryWatch(None, "no NVML").result() == {
        "device_mb": None,
        "device_note": "not known; no NVML",
    }
