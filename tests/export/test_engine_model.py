from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

import edgerun as edgerun_package
from edgerun.bench import BenchOptions, bench, engine_precisions, provider_nodes
from edgerun.cuda_runtime import CudaRuntime
from edgerun.errors import BadInput, NoDevice, RunFailed
from edgerun.inputs import make_feeds
from edgerun.model import Settings, TensorInfo
from edgerun.run import open_model, run
from edgerun.tensorrt.engine import LoadedEngine
from edgerun.tensorrt.library import find_gpu, open_library
from edgerun.tensorrt.runner import EngineModel, open_engine
from edgerun.timed_process import time_models
from edgerun.timing import Stopwatch, device_times
from tests.command_line import edgerun, python
from tests.export import models
from tests.export.cuda_library import CudaLibrary

trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx: pip install tensorrt_rtx")
GPU = find_gpu()
WEIGHTS = np.arange(12, dtype=np.float32).reshape(4, 3)


class Engine:
    """y = x · w, and the positive values of x, whose number depends on the data.

    Its methods are those of ``ICudaEngine`` that are used; the enums are the library's.
    """

    def __init__(
        self,
        library,
        profiles=((1, 2, 8),),
        dtype=trt.DataType.FLOAT,
        tensors=("x", "y", "positive"),
    ):
        self.tensors, self.num_io_tensors = tensors, len(tensors)
        self.cuda, self.profiles, self.dtype = library, profiles, dtype
        self.num_optimization_profiles = len(profiles)
        self.context = None

    def create_execution_context(self):
        self.context = Context(self)
        return self.context

    def get_tensor_name(self, index):
        return self.tensors[index]

    def get_tensor_mode(self, name):
        return trt.TensorIOMode.INPUT if name == "x" else trt.TensorIOMode.OUTPUT

    def get_tensor_location(self, name):
        return trt.TensorLocation.DEVICE

    def get_tensor_dtype(self, name):
        return self.dtype if name == "x" else trt.DataType.FLOAT

    def get_tensor_shape(self, name):
        return trt.Dims({"x": (-1, 4), "y": (-1, 3), "positive": (-1,)}[name])

    def get_tensor_profile_shape(self, name, profile_index):
        return [trt.Dims((batch, 4)) for batch in self.profiles[profile_index]]

    def create_engine_inspector(self):
        return Inspector()


class Inspector:
    def get_engine_information(self, format):
        assert format == trt.LayerInformationFormat.JSON
        tensor = {
            "Name": "x",
            "Dimensions": [1, 4],
            "Format/Datatype": "Row major linear FP16 format",
        }
        return json.dumps({"Layers": [{"Name": "l", "LayerType": "gemm", "Inputs": [tensor]}]})


class Context:
    """The methods of ``IExecutionContext``: refuses what was not set, as the library does."""

    def __init__(self, engine):
        self.engine, self.profile, self.shape = engine, 0, None
        self.addresses, self.allocators = {}, {}
        self.bindings, self.fails = 0, False

    def set_optimization_profile_async(self, profile_index, stream_handle):
        self.profile, self.shape = profile_index, None
        return True

    def set_input_shape(self, name, shape):
        self.bindings += 1
        least, _, most = self.engine.profiles[self.profile]
        fits = least <= shape[0] <= most and shape[1:] == (4,)
        self.shape = shape if fits else None
        return fits

    def set_tensor_address(self, name, memory):
        self.addresses[name] = memory
        return True

    def set_output_allocator(self, name, output_allocator):
        assert isinstance(output_allocator, trt.IOutputAllocator)
        self.allocators[name] = output_allocator
        return True

    def infer_shapes(self):
        return [] if self.shape else ["x"]

    def get_tensor_shape(self, name):
        return trt.Dims({"x": self.shape, "y": (self.shape[0], 3), "positive": (-1,)}[name])

    def execute_async_v3(self, stream_handle):
        if self.fails:
            return False
        x = np.frombuffer(self._memory("x", math.prod(self.shape) * 4), np.float32)
        x = x.reshape(self.shape)
        self._memory("y", self.shape[0] * 12)[:] = (x @ WEIGHTS).tobytes()
        self.engine.cuda.now_ms += 0.25
        if "positive" not in self.engine.tensors:
            return True
        positive = x[x > 0]
        allocator = self.allocators["positive"]
        address = allocator.reallocate_output_async("positive", 0, positive.nbytes, 256, 1)
        self.engine.cuda.place(address, positive.nbytes)[:] = positive.tobytes()
        allocator.notify_shape("positive", trt.Dims(positive.shape))
        return True

    def _memory(self, name, size):
        place = self.engine.cuda.place(self.addresses[name], size)
        assert place is not None, f"{name} has less than {size} bytes"
        return place


@pytest.fixture
def cuda_library():
    return CudaLibrary()


@pytest.fixture
def make_engine(cuda_library):
    def make(names=None, **settings):
        engine = Engine(cuda_library, **settings)
        loaded = LoadedEngine(open_library("tensorrt-rtx"), None, engine, 1.0)
        return EngineModel(Path("m.engine"), loaded, names, CudaRuntime(cuda_library)), engine

    return make


def batch(size, seed=0):
    return np.random.default_rng(seed).standard_normal((size, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("stand_in", "real"),
    [(Engine, "ICudaEngine"), (Context, "IExecutionContext"), (Inspector, "EngineInspector")],
)
def test_the_stand_ins_have_no_method_that_the_library_lacks(stand_in, real):
    used = {name for name in vars(stand_in) if not name.startswith("_")}
    assert used <= set(dir(getattr(trt, real)))
    for name in ("reallocate_output_async", "notify_shape"):
        assert name in trt.IOutputAllocator.__doc__


def test_answers_are_the_engine_s_for_every_batch_size(make_engine):
    model, _ = make_engine()
    for size in (2, 8, 1, 8, 3):
        x = batch(size, seed=size)
        y, positive = model.run({"x": x})
        np.testing.assert_array_equal(y, x @ WEIGHTS)
        np.testing.assert_array_equal(positive, x[x > 0])


def test_answers_do_not_change_with_the_next_query(make_engine):
    model, _ = make_engine()
    first, other = batch(2, 1), batch(2, 2)
    kept = model.run({"x": first})[0]
    model.run({"x": other})
    np.testing.assert_array_equal(kept, first @ WEIGHTS)


def test_an_array_that_is_not_contiguous_is_fed_as_it_reads(make_engine):
    model, _ = make_engine()
    x = np.asfortranarray(batch(5))
    np.testing.assert_array_equal(model.run({"x": x})[0], np.ascontiguousarray(x) @ WEIGHTS)


def test_shapes_are_set_and_memory_is_taken_only_when_they_change(make_engine, cuda_library):
    model, engine = make_engine()
    for _ in range(5):
        model.run({"x": -np.abs(batch(8))})
    assert engine.context.bindings == 1
    held, allocations = cuda_library.held, cuda_library.allocations
    model.run({"x": -np.abs(batch(3))})
    assert engine.context.bindings == 2
    assert (cuda_library.held, cuda_library.allocations) == (held, allocations)


def test_device_memory_is_given_back_with_the_model(make_engine, cuda_library):
    model, engine = make_engine()
    model.run({"x": batch(8)})
    assert cuda_library.held > 0
    del model
    engine.context = None
    assert cuda_library.held == 0


def test_a_shape_outside_the_profile_is_told_with_its_bounds(make_engine):
    model, _ = make_engine()
    with pytest.raises(
        BadInput, match=r"not built for x \[9, 4\]; it takes x \[1, 4\] to \[8, 4\]"
    ):
        model.run({"x": batch(9)})
    assert model.run({"x": batch(8)})[0].shape == (8, 3)


def test_the_profile_that_fits_is_taken(make_engine):
    model, engine = make_engine(profiles=((1, 1, 2), (3, 4, 16)))
    for size, profile in ((2, 0), (16, 1), (3, 1), (1, 0)):
        x = batch(size)
        np.testing.assert_array_equal(model.run({"x": x})[0], x @ WEIGHTS)
        assert engine.context.profile == profile
    assert model.batch_range == (1, 16)


@pytest.mark.parametrize("feed", [{}, {"x": batch(2).astype(np.float64)}])
def test_a_feed_of_another_name_or_dtype_is_bad_input(make_engine, feed):
    model, _ = make_engine()
    with pytest.raises(BadInput, match="the engine takes x float32"):
        model.run(feed)


def test_an_engine_that_fails_names_the_shapes_and_can_be_asked_again(make_engine):
    model, engine = make_engine()
    engine.context.fails = True
    with pytest.raises(RunFailed, match=r"fails on inputs x \[2, 4\]"):
        model.run({"x": batch(2)})
    engine.context.fails = False
    np.testing.assert_array_equal(model.run({"x": batch(2)})[0], batch(2) @ WEIGHTS)


def test_an_output_too_large_for_the_device_ends_in_an_error(make_engine, cuda_library):
    model, engine = make_engine()
    model.run({"x": -np.abs(batch(1))})
    allocator = engine.context.allocators["positive"]
    cuda_library.room = cuda_library.held
    assert allocator.reallocate_output_async("positive", 0, 10**9, 256, 1) == 0


def test_what_numpy_cannot_hold_is_refused_when_the_engine_is_opened(make_engine):
    with pytest.raises(BadInput, match="'x' is BF16"):
        make_engine(dtype=trt.DataType.BF16)


def test_dimensions_are_open_named_or_fixed_by_the_profile(make_engine):
    model, _ = make_engine()
    assert model.inputs == (TensorInfo("x", "float32", (None, 4)),)
    named, _ = make_engine(names={"x": ["batch", 4], "y": ["batch", 3]})
    assert named.inputs == (TensorInfo("x", "float32", ("batch", 4)),)
    assert named.outputs[0] == TensorInfo("y", "float32", ("batch", 3))
    fixed, _ = make_engine(profiles=((6, 6, 6),))
    assert fixed.inputs == (TensorInfo("x", "float32", (6, 4)),)
    assert fixed.batch_range is None


@pytest.mark.parametrize("profile", [(1, 2, 3), (4, 4, 8), (6, 6, 6)])
def test_a_file_of_samples_is_cut_to_the_batches_that_the_engine_takes(
    make_engine, tmp_path, profile
):
    model, _ = make_engine(profiles=(profile,), tensors=("x", "y"))
    x = batch(11)
    np.savez(tmp_path / "x.npz", x=x)
    outputs = run(model, tmp_path / "x.npz")
    # Products of other sizes may add in another order: a few units in the last place of sums
    # of four terms below 50.
    np.testing.assert_allclose(outputs.arrays["y"], x @ WEIGHTS, rtol=0, atol=1e-5)


def test_the_gpu_s_part_is_timed_by_events_without_copies(make_engine, tmp_path):
    model, _ = make_engine()
    watch = Stopwatch(model, make_feeds(model.inputs, {}, 2))
    # The stand-in's clock moves in execute_async_v3 alone, by a quarter of a millisecond.
    assert device_times(watch, 5, limit_s=60) == [0.25] * 5
    assert len(device_times(watch, 5, limit_s=0)) == 1
    onnx = open_model(models.linear(tmp_path / "m.onnx"), Settings())
    assert device_times(Stopwatch(onnx, make_feeds(onnx.inputs, {})), 5, 60) is None


def test_the_record_of_an_engine_has_the_gpu_s_time_beside_the_latency(
    make_engine, tmp_path, monkeypatch
):
    model, _ = make_engine(tensors=("x", "y"))
    model.path = tmp_path / "m.engine"
    model.path.write_bytes(b"engine")
    for module in ("bench", "timed_process"):
        monkeypatch.setattr(f"edgerun.{module}.open_model", lambda path, settings: model)
    monkeypatch.setattr("edgerun.bench.run_timed_process", time_models)
    record = bench(
        BenchOptions((model.path,), Settings(), min_queries=70, max_seconds=0.4, memory=False)
    )
    (timed,) = record["models"]
    assert timed["device_ms"]["mean_ms"] == 0.25
    assert timed["device_ms"]["copies"] is False
    assert timed["latency"]["n"] == len(timed["samples_ms"]) >= 30
    assert timed["providers"] == {
        "requested": [],
        "session": ["tensorrt-rtx"],
        "options": {},
        "nodes": None,
        "precisions": {"fp16": 1},
    }
    assert timed["size_bytes"] == 6
    assert record["environment"]["versions"]["tensorrt_rtx"] == trt.__version__
    json.dumps(record, allow_nan=False)


def test_an_engine_opens_where_onnx_runtime_is_not(engine):
    script = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from pathlib import Path\n"
        "from edgerun.system import describe_environment\n"
        "from edgerun.errors import EdgerunError\n"
        "from edgerun.model import Settings; from edgerun.run import open_model\n"
        "assert describe_environment()['providers_available'] == []\n"
        "try:\n"
        f"    print(open_model(Path({str(engine)!r}), Settings()).inputs)\n"
        "except EdgerunError as error:\n"
        "    print(error.remedy)\n"
    )
    folder = Path(edgerun_package.__file__).parents[1]
    assert python(script, env={"PYTHONPATH": str(folder)}).stdout.strip()


def test_an_engine_s_layers_are_counted_by_precision(make_engine, tmp_path):
    model, _ = make_engine()
    assert engine_precisions(model) == {"fp16": 1}
    assert provider_nodes(Path("m.engine"), Settings(), {}) is None
    assert engine_precisions(open_model(models.linear(tmp_path / "m.onnx"), Settings())) is None


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A real engine with its record, for GPUs of another kind than any that may be here."""
    folder = tmp_path_factory.mktemp("engine")
    model = models.linear(folder / "m.onnx")
    edgerun(
        *("build", model, "--engine", folder / "m.engine", "--library", "tensorrt-rtx"),
        *("--sm", "8.6" if GPU is None or GPU.compute_capability != "8.6" else "8.9"),
    )
    return folder / "m.engine"


@pytest.fixture
def engine(built, tmp_path):
    """A copy to be spoiled."""
    shutil.copy(built, tmp_path / "m.engine")
    shutil.copy(f"{built}.json", tmp_path / "m.engine.json")
    return tmp_path / "m.engine"


def refused(engine, code=2):
    """The message with which ``edgerun bench`` ends, in a process that could have crashed."""
    done = edgerun("bench", engine, "--no-memory", code=code)
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.skipif(GPU is not None, reason="this machine has a GPU")
def test_a_whole_engine_without_a_gpu_is_told_to_run_on_the_device(engine):
    for record in (True, False):
        if not record:
            engine.with_name("m.engine.json").unlink()
        # Nothing is wrong with what was given.
        message = refused(engine, code=3)
        assert "no CUDA driver" in message or "libcudart" in message
        assert "run it on the device" in message


@pytest.mark.skipif(GPU is None, reason="needs an NVIDIA GPU and its driver")
def test_an_engine_of_another_gpu_names_both(engine):
    message = refused(engine)
    assert "built by tensorrt-rtx" in message
    assert GPU.compute_capability in message


@pytest.mark.skipif(GPU is not None, reason="this machine has a GPU")
def test_without_a_gpu_an_engine_is_described_by_its_record(engine, tmp_path):
    out = tmp_path / "info.json"
    done = edgerun("info", engine, "--json", out)
    assert f"engine of tensorrt-rtx {trt.__version__} for SM 8.6" in done.stdout
    assert "input  x [batch, 4]" in done.stdout
    assert "cannot be loaded here" in done.stdout
    model = json.loads(out.read_text())["model"]
    assert model["compute_capabilities"] == ["8.6"]
    assert [tensor["name"] for tensor in model["outputs"]] == ["y"]
    assert model["size_bytes"] == engine.stat().st_size
    engine.with_name("m.engine.json").unlink()
    edgerun("info", engine, code=3)


def test_a_library_that_lacks_only_the_gpu_does_not_blame_the_file(monkeypatch, tmp_path):
    (tmp_path / "m.engine").write_bytes(b"of tensorrt-rtx")

    def load(path, library):
        raise BadInput("another library's") if library == "tensorrt" else NoDevice("no GPU")

    monkeypatch.setattr("edgerun.tensorrt.runner.is_installed", lambda name: True)
    monkeypatch.setattr("edgerun.tensorrt.runner.open_library", lambda name: name)
    monkeypatch.setattr("edgerun.tensorrt.runner.load_engine", load)
    with pytest.raises(NoDevice, match="tensorrt-rtx: no GPU"):
        open_engine(tmp_path / "m.engine")


def test_a_truncated_engine_is_told_by_its_record(engine):
    size = engine.stat().st_size
    engine.write_bytes(engine.read_bytes()[:-1])
    message = refused(engine)
    assert f"{size - 1} bytes" in message
    assert str(size) in message


@pytest.mark.parametrize("content", ["half", "header", "garbage", "empty", "onnx"])
def test_what_is_no_whole_engine_is_told_by_the_library(engine, content):
    engine.with_name("m.engine.json").unlink()
    whole = engine.read_bytes()
    engine.write_bytes(
        {
            "half": whole[: len(whole) // 2],
            "header": whole[:40],
            "garbage": np.random.default_rng(0).bytes(5000),
            "empty": b"",
            "onnx": (b"\x08\x09" + bytes(300)),
        }[content]
    )
    message = refused(engine)
    assert "not a complete engine of tensorrt-rtx" in message
    assert f"({engine.stat().st_size} bytes)" in message


def test_an_engine_of_another_version_names_both(engine):
    beside = engine.with_name("m.engine.json")
    record = json.loads(beside.read_text())
    beside.write_text(json.dumps({**record, "version": "1.2.0.54"}))
    message = refused(engine)
    assert "1.2.0.54" in message
    assert trt.__version__ in message


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is not None, reason="tensorrt is installed here"
)
def test_an_engine_of_a_library_that_is_absent_says_what_to_install(engine):
    beside = engine.with_name("m.engine.json")
    record = json.loads(beside.read_text())
    beside.write_text(json.dumps({**record, "library": "tensorrt"}))
    message = refused(engine)
    assert "tensorrt is not installed" in message
    assert "JetPack" in message


def test_a_machine_without_any_tensorrt_says_what_to_install(monkeypatch, engine):
    engine.with_name("m.engine.json").unlink()
    monkeypatch.setattr("edgerun.tensorrt.runner.is_installed", lambda name: False)
    with pytest.raises(BadInput, match="no TensorRT is installed") as caught:
        open_engine(engine)
    assert "tensorrt-rtx" in caught.value.remedy


@pytest.mark.parametrize("name", ["missing.engine", "folder.plan"])
def test_a_path_that_is_no_file_is_bad_input(tmp_path, name):
    (tmp_path / "folder.plan").mkdir()
    message = refused(tmp_path / name)
    assert "no such model file" in message or "a folder, not a file" in message


@pytest.mark.skipif(GPU is None, reason="needs an NVIDIA GPU and its driver")
def test_a_real_engine_answers_like_the_model_and_is_measured(tmp_path):
    model = models.linear(tmp_path / "m.onnx")
    path = tmp_path / "here.engine"
    words = ("build", model, "--engine", path, "--library", "tensorrt-rtx", "--batch", 8)
    edgerun(*words)
    engine = open_model(path, Settings())
    x = batch(5)
    # TF32, which a GPU may use for float32 products, keeps 10 bits of each factor.
    np.testing.assert_allclose(
        engine.run({"x": x})[0], models.linear_answer(x), rtol=4e-3, atol=0.1
    )
    edgerun("bench", path, "--min-queries", 70, "--json", tmp_path / "out.json")
    record = json.loads((tmp_path / "out.json").read_text())
    timed = record["models"][0]
    assert 0 < timed["device_ms"]["mean_ms"] < timed["latency"]["mean_ms"]
    assert timed["memory"]["device_note"]
    assert record["environment"]["gpu"]["compute_capability"] == GPU.compute_capability
