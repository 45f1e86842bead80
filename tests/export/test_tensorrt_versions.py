"""Which calls the builder makes of TensorRT 10 and 11, which do not install here.

A stand-in has the documented Python API and records its calls. It
shows that flags are chosen by name and how an inspector's output is used; that the real
libraries behave so was never run.
"""

from __future__ import annotations

import enum
import json
import sys
from types import SimpleNamespace

import pytest

from edgerun.errors import BadInput, RunFailed
from edgerun.tensorrt import build as tensorrt_build
from edgerun.tensorrt import engine as tensorrt_engine
from edgerun.tensorrt import library as tensorrt_library
from edgerun.tensorrt.build import build
from edgerun.tensorrt.engine import check_engine
from edgerun.tensorrt.library import Gpu
from edgerun.tensorrt.settings import BuildSettings

ORIN = Gpu("Orin", "8.7")
Severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")
DataType = enum.Enum("DataType", "FLOAT HALF BF16 INT8 INT32 INT64")
LayerType = enum.Enum("LayerType", "CONVOLUTION ACTIVATION QUANTIZE DEQUANTIZE CONSTANT")


def tensor(name, dtype="FLOAT", shape=(-1, 4)):
    return SimpleNamespace(
        name=name,
        dtype=DataType[dtype],
        shape=shape,
        is_shape_tensor=False,
        get_dimension_name=lambda axis: "batch" if axis == 0 else "",
    )


class Layer:
    def __init__(self, name, kind, inputs, output):
        self.name, self.type, self.metadata = name, LayerType[kind], f"[ONNX Layer: {name}]"
        self.inputs, self.output, self.precision = inputs, output, None
        self.num_inputs, self.num_outputs = len(inputs), 1

    def get_input(self, index):
        return self.inputs[index]

    def get_output(self, index):
        return self.output


def float_layers():
    x, a, y = tensor("x"), tensor("a"), tensor("y")
    return [Layer("conv", "CONVOLUTION", [x], a), Layer("head", "CONVOLUTION", [a], y)]


def quantized_layers():
    x, q, d = tensor("x"), tensor("q", "INT8"), tensor("d")
    w, wd, y = tensor("w", "INT8"), tensor("wd"), tensor("y")
    return [
        Layer("quantize", "QUANTIZE", [x], q),
        Layer("dequantize", "DEQUANTIZE", [q], d),
        Layer("weights", "DEQUANTIZE", [w], wd),
        Layer("conv", "CONVOLUTION", [d, wd], y),
    ]


class StandIn:
    """``tensorrt`` of one version; ``asked`` records the builder's calls."""

    def __init__(self, version, layers, seen=None, cores=0, key="Bindings"):
        self.__version__ = version
        self.asked = SimpleNamespace(flags=set(), network=None, cache=[], profile=None, limits={})
        old = version.startswith("10")
        weak = "FP16 BF16 INT8 OBEY_PRECISION_CONSTRAINTS " if old else ""
        self.BuilderFlag = enum.Enum("BuilderFlag", weak + "GPU_FALLBACK VERSION_COMPATIBLE")
        # STRONGLY_TYPED was renumbered when EXPLICIT_BATCH went.
        names = {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1} if old else {"STRONGLY_TYPED": 0}
        self.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", names)
        levels = "NONE AMPERE_PLUS"
        self.HardwareCompatibilityLevel = enum.Enum("HardwareCompatibilityLevel", levels)
        self.MemoryPoolType = enum.Enum("MemoryPoolType", "WORKSPACE")
        self.ProfilingVerbosity = enum.Enum("ProfilingVerbosity", "DETAILED")
        self.DeviceType = enum.Enum("DeviceType", "GPU DLA")
        self.LayerInformationFormat = enum.Enum("LayerInformationFormat", "JSON")
        self.DataType = DataType
        self.ILogger = type("ILogger", (), {"__init__": lambda self: None})
        self.layers, self.seen, self.cores, self.key = layers, seen, cores, key
        self.refuses_cache = False
        self.Builder, self.OnnxParser, self.Runtime = self.builder, self.parser, self.runtime

    def builder(self, log):
        return SimpleNamespace(
            create_network=self.create_network,
            create_builder_config=self.create_config,
            create_optimization_profile=self.create_profile,
            build_serialized_network=lambda network, config: b"engine",
            num_DLA_cores=self.cores,
        )

    def create_network(self, flags):
        self.asked.network = flags
        return SimpleNamespace(
            num_layers=len(self.layers),
            num_inputs=1,
            num_outputs=1,
            get_layer=lambda index: self.layers[index],
            get_input=lambda index: tensor("x"),
            get_output=lambda index: tensor("y"),
        )

    def create_profile(self):
        def set_shape(name, *shapes):
            self.asked.profile = (name, shapes)

        return SimpleNamespace(set_shape=set_shape)

    def create_config(self):
        def set_cache(cache, ignore_mismatch):
            self.asked.cache.append((cache, ignore_mismatch))
            return not (self.refuses_cache and cache)

        self.config = SimpleNamespace(
            set_flag=lambda flag: self.asked.flags.add(flag.name),
            set_memory_pool_limit=lambda pool, size: self.asked.limits.update({pool.name: size}),
            add_optimization_profile=lambda profile: 0,
            create_timing_cache=bytes,
            set_timing_cache=set_cache,
            get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"timings"),
        )
        return self.config

    def parser(self, network, log):
        return SimpleNamespace(parse_from_file=lambda path: True, num_errors=0)

    def runtime(self, log):
        answer = json.dumps({"Layers": self.seen, self.key: ["x", "y"]})
        inspector = SimpleNamespace(get_engine_information=lambda form: answer)
        engine = SimpleNamespace(create_engine_inspector=lambda: inspector, device_memory_size=7)
        loaded = None if self.seen is None else engine
        return SimpleNamespace(deserialize_cuda_engine=lambda content: loaded)


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Put a stand-in where ``import tensorrt`` finds it, on a Jetson; and a model's file."""
    (tmp_path / "m.onnx").write_bytes(b"the stand-in reads nothing")
    for module in (tensorrt_build, tensorrt_engine):
        monkeypatch.setattr(module, "find_gpu", lambda: ORIN)

    def put(version, layers, **more):
        library = StandIn(version, layers, **more)
        monkeypatch.setitem(sys.modules, "tensorrt", library)
        monkeypatch.setattr(tensorrt_library, "_OPENED", {})
        return library

    return put


@pytest.fixture
def build_with(tmp_path):
    def run(**settings):
        model, engine = tmp_path / "m.onnx", tmp_path / "m.engine"
        return build(model, engine, BuildSettings(**settings))

    return run


def seen_as(**types):
    return [
        {
            "Name": f"{name} + relu",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "x", "Format/Datatype": words}],
            "Metadata": f"[ONNX Layer: {name}]\x1e[ONNX Layer: relu]",
        }
        for name, words in types.items()
    ]


def test_tensorrt_10_gets_fp16_flags_and_the_engine_reports_the_result(install, build_with):
    layers = float_layers()
    seen = seen_as(conv="Row major linear FP16 format", head="Float")
    library = install("10.3.0", layers, seen=seen)
    record = build_with(precision="fp16", keep=("head",), workspace_mb=64.0, batch=8)
    assert library.asked.network == 1 << library.NetworkDefinitionCreationFlag.EXPLICIT_BATCH
    assert library.asked.flags == {"FP16", "OBEY_PRECISION_CONSTRAINTS"}
    assert [layer.precision for layer in layers] == [DataType.HALF, DataType.FLOAT]
    assert library.asked.limits == {"WORKSPACE": 64_000_000}
    assert library.asked.profile == ("x", ((1, 4), (8, 4), (8, 4)))
    assert record["layers"] == {
        "source": "engine",
        "by_precision": {"fp16": 1, "fp32": 1},
        "matrix": {"fp16": ["conv"], "fp32": ["head"]},
        "certain": True,
    }
    assert (record["inspected"], record["memory_bytes"]) == (True, 7)


@pytest.mark.parametrize("key", ["Bindings", "I/O Tensors"])
def test_fp16_asked_and_fp32_got_names_the_layer_and_leaves_no_engine(
    install, build_with, tmp_path, key
):
    install("10.3.0", float_layers(), seen=seen_as(conv="Half", head="Float"), key=key)
    with pytest.raises(BadInput, match="1 of 2 in FP32: head"):
        build_with(precision="fp16")
    assert not (tmp_path / "m.engine").exists()


def test_where_the_inspector_gives_no_type_the_kernel_does(install, build_with):
    seen = seen_as(conv="N/A due to dynamic shapes", head="N/A due to dynamic shapes")
    seen[0]["TacticName"] = "sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc"
    seen[1]["TacticName"] = "ampere_scudnn_128x64_relu_medium_nn_v1"
    install("10.3.0", float_layers(), seen=seen)
    record = build_with(precision="fp16")
    assert record["layers"]["matrix"] == {"fp16": ["conv"], "unknown": ["head"]}


def test_an_engine_that_was_not_inspected_is_not_certain(install, build_with):
    install("10.3.0", float_layers())
    assert not build_with(precision="fp16")["layers"]["certain"]


def test_tensorrt_10_takes_the_models_own_types_when_nothing_is_asked(install, build_with):
    library = install("10.3.0", float_layers())
    record = build_with()
    assert library.asked.network == 0b11  # EXPLICIT_BATCH and STRONGLY_TYPED
    assert library.asked.flags == set()
    assert record["layers"]["certain"]


def test_tensorrt_11_has_precision_in_the_model_alone(install, build_with):
    library = install("11.0.0", float_layers())
    with pytest.raises(BadInput, match="2 of 2 in FP32"):
        build_with(precision="fp16")
    assert library.asked.network == 1 << library.NetworkDefinitionCreationFlag.STRONGLY_TYPED == 1
    install("11.0.0", quantized_layers())
    assert build_with(precision="int8")["layers"]["matrix"] == {"int8": ["conv"]}


def test_int8_of_tensorrt_10_still_needs_a_quantized_model(install, build_with):
    library = install("10.3.0", quantized_layers(), seen=seen_as(conv="Int8"))
    build_with(precision="int8")
    assert library.asked.flags == {"INT8"}
    install("10.3.0", float_layers(), seen=seen_as(conv="Int8"))
    with pytest.raises(BadInput, match="2 of 2 in FP32"):
        build_with(precision="int8")


@pytest.mark.parametrize("fallback", [True, False])
def test_a_dla_runs_int8_or_fp16_with_or_without_the_gpu(install, build_with, fallback):
    library = install("10.3.0", quantized_layers(), cores=2)
    build_with(precision="int8", dla=1, gpu_fallback=fallback)
    assert (library.config.default_device_type.name, library.config.DLA_core) == ("DLA", 1)
    assert library.asked.flags == {"INT8", "FP16"} | ({"GPU_FALLBACK"} if fallback else set())
    with pytest.raises(BadInput, match="finds 2 DLA cores here; core 2"):
        build_with(precision="int8", dla=2)


def test_compatibility_is_set_by_name(install, build_with):
    library = install("10.3.0", float_layers())
    build_with(version_compatible=True, hardware_compatible=True)
    assert library.asked.flags == {"VERSION_COMPATIBLE"}
    assert library.config.hardware_compatibility_level.name == "AMPERE_PLUS"


def test_other_gpus_are_for_tensorrt_rtx(install, build_with):
    install("10.3.0", float_layers())
    with pytest.raises(BadInput, match="builds for the GPU it runs on alone"):
        build_with(compute_capabilities=("8.6",))


def test_a_library_that_does_not_start_says_what_it_logged(install, build_with):
    library = install("10.3.0", float_layers())

    def refuse(log):
        log.log(Severity.WARNING, "CUDA initialization failure with error: 35")
        log.log(Severity.ERROR, "no CUDA device")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    library.Builder = refuse
    with pytest.raises(RunFailed, match="does not start here: no CUDA device"):
        build_with()


def test_warnings_are_recorded_once(install, build_with):
    library = install("10.3.0", float_layers())
    parser = library.OnnxParser

    def warn(network, log):
        for _ in range(3):
            log.log(Severity.WARNING, "a weight\n  is subnormal")
        return parser(network, log)

    library.OnnxParser = warn
    assert build_with()["warnings"] == ["a weight is subnormal"]


def test_a_timing_cache_is_kept_and_reused(install, build_with, tmp_path):
    library = install("10.3.0", float_layers())
    cache = tmp_path / "cache"
    assert build_with(timing_cache=cache)["timing_cache"]["state"] == "new"
    record = build_with(timing_cache=cache)["timing_cache"]
    assert (record["state"], record["bytes_before"]) == ("reused", len(b"timings"))
    # Never with mismatches ignored: those are another device's timings.
    assert library.asked.cache == [(b"", False), (b"timings", False)]


def _other_version(path, install, monkeypatch):
    install("10.7.0", float_layers())
    return "10.3.0, not 10.7.0"


def _other_device(path, install, monkeypatch):
    monkeypatch.setattr(tensorrt_build, "find_gpu", lambda: Gpu("Thor", "11.0"))
    return "Orin, not Thor"


def _damaged(path, install, monkeypatch):
    path.write_bytes(path.read_bytes()[:-1])
    return "damaged"


def _cut_in_its_header(path, install, monkeypatch):
    path.write_bytes(path.read_bytes()[:30])
    return "damaged"


def _refused(path, install, monkeypatch):
    install("10.3.0", float_layers()).refuses_cache = True
    return "refuses it"


@pytest.mark.parametrize(
    "spoil", [_other_version, _other_device, _damaged, _cut_in_its_header, _refused]
)
def test_a_timing_cache_that_does_not_fit_is_said_and_replaced(
    install, build_with, tmp_path, monkeypatch, spoil
):
    install("10.3.0", float_layers())
    cache = tmp_path / "cache"
    build_with(timing_cache=cache)
    message = spoil(cache, install, monkeypatch)
    record = build_with(timing_cache=cache)["timing_cache"]
    assert (record["state"], record["bytes_before"]) == ("replaced", 0)
    assert message in record["reason"]
    if spoil is not _refused:
        assert build_with(timing_cache=cache)["timing_cache"]["state"] == "reused"


def test_a_file_that_is_no_timing_cache_is_not_overwritten(install, build_with, tmp_path):
    install("10.3.0", float_layers())
    before = (tmp_path / "m.onnx").read_bytes()
    with pytest.raises(BadInput, match="would be overwritten"):
        build_with(timing_cache=tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == before


def test_an_engine_for_another_gpu_or_version_names_both(
    install, build_with, tmp_path, monkeypatch
):
    install("10.3.0", float_layers())
    build_with()
    engine = tmp_path / "m.engine"
    assert check_engine(engine) is not None
    monkeypatch.setattr(tensorrt_engine, "find_gpu", lambda: Gpu("Thor", "11.0"))
    with pytest.raises(BadInput, match=r"built by tensorrt 10\.3\.0 for Orin.*here is Thor"):
        check_engine(engine)
    build_with(hardware_compatible=True, version_compatible=True)
    install("11.0.0", float_layers())
    assert check_engine(engine) is not None
    # A patch release is another version, and an older library never loads a newer engine.
    install("10.2.9", float_layers())
    with pytest.raises(BadInput, match=r"10\.3\.0 for Orin.*here is tensorrt 10\.2\.9"):
        check_engine(engine)


@pytest.mark.parametrize(
    ("name", "remedy"), [("tensorrt", "JetPack"), ("tensorrt-rtx", "edgekd[rtx]")]
)
def test_an_absent_library_says_what_to_install(monkeypatch, name, remedy):
    monkeypatch.setattr(tensorrt_library, "_OPENED", {})
    monkeypatch.setitem(tensorrt_library.MODULES, name, "a_module_that_is_not_there")
    with pytest.raises(BadInput, match=f"{name} is not installed") as caught:
        tensorrt_library.open_library(name)
    assert remedy in caught.value.remedy
