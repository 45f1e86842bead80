"""A stand-in for libcudart whose functions have the prototypes of ``cuda_runtime_api.h``.

Calls go through ctypes as they would to the real library. Device memory is host memory that only
its own copies may touch, and only inside what was allocated.
"""
# ruff: noqa: N802 - the functions are named after those they replace.

from __future__ import annotations

import ctypes
from ctypes import CFUNCTYPE, POINTER, c_char, c_float, c_int, c_size_t, c_uint, c_void_p

SUCCESS, INVALID_VALUE, OUT_OF_MEMORY = 0, 1, 2
PROTOTYPES = {
    "cudaGetDeviceCount": CFUNCTYPE(c_int, POINTER(c_int)),
    "cudaGetDevice": CFUNCTYPE(c_int, POINTER(c_int)),
    "cudaDriverGetVersion": CFUNCTYPE(c_int, POINTER(c_int)),
    "cudaRuntimeGetVersion": CFUNCTYPE(c_int, POINTER(c_int)),
    "cudaDeviceGetAttribute": CFUNCTYPE(c_int, POINTER(c_int), c_int, c_int),
    "cudaDeviceGetPCIBusId": CFUNCTYPE(c_int, POINTER(c_char), c_int, c_int),
    "cudaGetDeviceProperties": CFUNCTYPE(c_int, c_void_p, c_int),
    "cudaMalloc": CFUNCTYPE(c_int, POINTER(c_void_p), c_size_t),
    "cudaFree": CFUNCTYPE(c_int, c_void_p),
    "cudaMemcpyAsync": CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t, c_int, c_void_p),
    "cudaStreamCreateWithFlags": CFUNCTYPE(c_int, POINTER(c_void_p), c_uint),
    "cudaStreamSynchronize": CFUNCTYPE(c_int, c_void_p),
    "cudaEventCreateWithFlags": CFUNCTYPE(c_int, POINTER(c_void_p), c_uint),
    "cudaEventRecord": CFUNCTYPE(c_int, c_void_p, c_void_p),
    "cudaEventSynchronize": CFUNCTYPE(c_int, c_void_p),
    "cudaEventElapsedTime": CFUNCTYPE(c_int, POINTER(c_float), c_void_p, c_void_p),
    "cudaGetErrorString": CFUNCTYPE(c_void_p, c_int),
}
ATTRIBUTES = {75: 8, 76: 7, 18: 1}


class CudaLibrary:
    def __init__(self, count=1, code=SUCCESS, driver=12060, runtime=12060, room=1 << 24):
        self.count, self.code, self.driver, self.runtime, self.room = (
            count, code, driver, runtime, room,
        )  # fmt: skip
        self.memory = {}
        self.allocations = 0
        self.now_ms = 0.0
        self.events = {}
        self.handles = 100
        self.message = ctypes.create_string_buffer(b"so it is")
        for name, prototype in PROTOTYPES.items():
            setattr(self, name, prototype(getattr(self, f"on_{name}")))

    @property
    def held(self):
        return sum(ctypes.sizeof(block) for block in self.memory.values())

    def place(self, address, size):
        """The bytes at a device address, or None where they are not all allocated."""
        for start, block in self.memory.items():
            if start <= address and address + size <= start + ctypes.sizeof(block):
                return (ctypes.c_char * size).from_address(address)
        return None

    def on_cudaGetDeviceCount(self, count):
        count[0] = self.count
        return self.code

    def on_cudaGetDevice(self, device):
        device[0] = 0
        return SUCCESS

    def on_cudaDriverGetVersion(self, version):
        version[0] = self.driver
        return SUCCESS

    def on_cudaRuntimeGetVersion(self, version):
        version[0] = self.runtime
        return SUCCESS

    def on_cudaDeviceGetAttribute(self, value, attribute, device):
        value[0] = ATTRIBUTES[attribute]
        return SUCCESS

    def on_cudaDeviceGetPCIBusId(self, text, length, device):
        for i, byte in enumerate(b"0000:01:00.0\0"):
            text[i] = byte
        return SUCCESS

    def on_cudaGetDeviceProperties(self, properties, device):
        # The name's 256 bytes, then about a thousand more.
        ctypes.memset(properties, 0x7F, 1032)
        ctypes.memmove(properties, b"Orin\0", 5)
        return SUCCESS

    def on_cudaMalloc(self, address, size):
        if self.held + size > self.room:
            return OUT_OF_MEMORY
        block = (ctypes.c_char * size)()
        self.memory[ctypes.addressof(block)] = block
        self.allocations += 1
        address[0] = ctypes.addressof(block)
        return SUCCESS

    def on_cudaFree(self, address):
        return SUCCESS if self.memory.pop(address, None) is not None else INVALID_VALUE

    def on_cudaMemcpyAsync(self, to, source, size, kind, stream):
        device = to if kind == 1 else source
        if self.place(device, size) is None:
            return INVALID_VALUE
        ctypes.memmove(to, source, size)
        return SUCCESS

    def on_cudaStreamCreateWithFlags(self, stream, flags):
        self.handles += 1
        stream[0] = self.handles
        return SUCCESS

    def on_cudaStreamSynchronize(self, stream):
        return self.code

    def on_cudaEventCreateWithFlags(self, event, flags):
        # Bit 1 would be "without time": such an event has no elapsed time.
        if flags & 2:
            return INVALID_VALUE
        return self.on_cudaStreamCreateWithFlags(event, flags)

    def on_cudaEventRecord(self, event, stream):
        self.events[event] = self.now_ms
        return SUCCESS

    def on_cudaEventSynchronize(self, event):
        return SUCCESS if event in self.events else INVALID_VALUE

    def on_cudaEventElapsedTime(self, elapsed, start, end):
        elapsed[0] = self.events[end] - self.events[start]
        return SUCCESS

    def on_cudaGetErrorString(self, code):
        return ctypes.addressof(self.message)
