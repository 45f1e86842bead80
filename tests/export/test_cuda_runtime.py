from __future__ import annotations

import ctypes

import numpy as np
import pytest

from edgerun import cuda_runtime
from edgerun.cuda_runtime import CudaRuntime, DeviceBuffers, load_cuda_runtime
from edgerun.errors import NoDevice, RunFailed
from edgerun.tensorrt.library import find_gpu
from tests.export.cuda_library import CudaLibrary


@pytest.fixture
def library():
    return CudaLibrary()


@pytest.mark.parametrize(
    ("state", "message", "remedy"),
    [
        ({"code": 35, "driver": 0, "count": 0}, "no CUDA driver", "run it on the device"),
        ({"code": 35, "driver": 12020, "runtime": 13000}, "CUDA 12.2.*runtime here is 13.0", "up"),
        ({"code": 100, "count": 0}, "finds no GPU", "--gpus all"),
        ({"code": 0, "count": 0}, "finds no GPU", "--gpus all"),
        ({"code": 804}, r"so it is \(CUDA error 804\)", "nvidia-smi"),
    ],
)
def test_what_is_missing_for_cuda_is_said(state, message, remedy):
    with pytest.raises(NoDevice, match=message) as caught:
        CudaRuntime(CudaLibrary(**state))
    assert remedy in caught.value.remedy


def test_the_device_is_described(library):
    device = CudaRuntime(library).device()
    assert (device.name, device.compute_capability) == ("Orin", "8.7")
    assert (device.integrated, device.pci_bus_id) == (True, "0000:01:00.0")
    assert (device.driver, device.runtime) == ("12.6", "12.6")


def test_an_array_comes_back_from_the_device_as_it_went(library):
    cuda = CudaRuntime(library)
    stream = cuda.create_stream()
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    address = cuda.allocate(array.nbytes)
    cuda.copy_in(address, array, stream)
    back = np.empty_like(array)
    cuda.copy_out(back, address, stream)
    cuda.synchronize(stream)
    np.testing.assert_array_equal(back, array)
    with pytest.raises(RunFailed, match=r"cudaMemcpyAsync failed: so it is"):
        cuda.copy_in(address + 1, array, stream)


def test_an_address_above_4_gb_keeps_all_of_its_bits(library):
    seen = []
    high = 0x7F12_3456_7890
    library.cudaFree = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(
        lambda address: seen.append(address) or 0
    )
    CudaRuntime(library).free(high)
    assert seen == [high]


def test_the_device_s_memory_running_out_says_how_much_was_asked_for():
    cuda = CudaRuntime(CudaLibrary(room=1000))
    with pytest.raises(RunFailed, match=r"0\.5 MB more"):
        cuda.allocate(500_000)


def test_work_that_failed_shows_when_it_is_waited_for(library):
    cuda = CudaRuntime(library)
    stream = cuda.create_stream()
    library.code = 700
    with pytest.raises(RunFailed, match=r"CUDA error 700"):
        cuda.synchronize(stream)


def test_events_give_the_milliseconds_between_them(library):
    cuda = CudaRuntime(library)
    stream, start, end = cuda.create_stream(), cuda.create_event(), cuda.create_event()
    library.now_ms = 2.0
    cuda.record(start, stream)
    library.now_ms = 2.75
    cuda.record(end, stream)
    assert cuda.elapsed_ms(start, end) == 0.75


def test_buffers_grow_when_they_must_and_are_reused_otherwise(library):
    buffers = DeviceBuffers(CudaRuntime(library))
    first = buffers.reserve("x", 100)
    assert buffers.reserve("x", 40) == first
    assert (library.allocations, library.held) == (1, 100)
    buffers.reserve("x", 101)
    buffers.reserve("y", 0)
    assert library.held == 101 + 1
    buffers.release()
    assert library.held == 0


def test_a_buffer_that_could_not_grow_is_not_used_again():
    library = CudaLibrary(room=150)
    buffers = DeviceBuffers(CudaRuntime(library))
    buffers.reserve("x", 100)
    with pytest.raises(RunFailed):
        buffers.reserve("x", 200)
    assert library.place(buffers.reserve("x", 100), 100) is not None


def test_a_library_that_lacks_a_function_is_passed_over(monkeypatch):
    monkeypatch.setattr(cuda_runtime, "_candidates", lambda: iter(["libc.so.6", "no-such.so"]))
    with pytest.raises(NoDevice, match="libcudart"):
        load_cuda_runtime()


@pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")
def test_without_a_driver_the_real_library_leads_to_the_same_message():
    # Either libcudart is here and finds no driver, or it is not here at all.
    with pytest.raises(NoDevice, match=r"no CUDA driver|libcudart\) is not installed"):
        load_cuda_runtime()


@pytest.mark.skipif(find_gpu() is None, reason="needs an NVIDIA GPU and its driver")
def test_memory_streams_and_events_on_a_real_gpu():
    cuda = load_cuda_runtime()
    stream, start, end = cuda.create_stream(), cuda.create_event(), cuda.create_event()
    array = np.random.default_rng(0).random((1000, 1000))
    address = cuda.allocate(array.nbytes)
    back = np.empty_like(array)
    cuda.record(start, stream)
    cuda.copy_in(address, array, stream)
    cuda.copy_out(back, address, stream)
    cuda.record(end, stream)
    assert cuda.elapsed_ms(start, end) > 0
    np.testing.assert_array_equal(back, array)
    cuda.free(address)
    assert cuda.device().compute_capability == find_gpu().compute_capability
