"""The ONNX Runtime engine: no silent provider, and an optimized file with the same outputs."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest

from edgekd.engines import onnxruntime as engine
from edgekd.engines.onnxruntime import (
    build_engine,
    open_session,
    provider_chain,
    providers_for,
)
from edgekd.errors import InputError, StageError
from edgekd.onnx.file import describe_onnx
from edgekd.onnx.samples import random_inputs
from edgekd.onnx.session import default_options, first_line
from edgekd.spec import ModelSpec, TensorSpec
from tests.onnx_builders import save_onnx

CPU = ("CPUExecutionProvider",)


def test_the_request_goes_before_the_profile():
    assert providers_for(CPU, None) == CPU
    assert providers_for(("CUDAExecutionProvider",), CPU) == CPU


def test_a_provider_that_this_build_lacks_is_an_error_with_its_package():
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this build has CUDA")
    with pytest.raises(InputError, match="has no CUDAExecutionProvider") as caught:
        providers_for(("CUDAExecutionProvider", *CPU), None)
    assert "CPUExecutionProvider" in caught.value.what
    assert "onnxruntime-gpu" in str(caught.value.remedy)


def test_a_misspelt_provider_suggests_the_nearest():
    with pytest.raises(InputError, match="did you mean 'CPUExecutionProvider'"):
        providers_for(CPU, ("CPUExecutionProvder",))
    with pytest.raises(InputError, match="no execution provider"):
        providers_for(CPU, ())


def test_a_provider_that_does_not_start_is_an_error(exported, monkeypatch):
    """ONNX Runtime falls back to the CPU when CUDA's libraries are missing; edgekd does not."""
    real = onnxruntime.InferenceSession

    def without_cuda(path, options, providers):
        return real(path, options, providers=[p for p in providers if p in CPU])

    monkeypatch.setattr(onnxruntime, "InferenceSession", without_cuda)
    with pytest.raises(InputError, match="CUDAExecutionProvider did not start"):
        open_session(exported, ("CUDAExecutionProvider", *CPU), 1, "all")


def test_absent_providers_are_left_out_only_where_a_fallback_is_allowed():
    chain = ("AbsentExecutionProvider", "VitisAIExecutionProvider", *CPU)
    absent = [name for name in chain[1:2] if name not in onnxruntime.get_available_providers()]
    if not absent:
        pytest.skip("this build has VitisAI")
    with pytest.raises(InputError, match="there is no execution provider named 'Absent"):
        provider_chain(chain, None, "allow")
    with pytest.raises(InputError, match="has no VitisAI") as caught:
        provider_chain(chain[1:], None)
    assert "fallback: allow" in str(caught.value.remedy)
    allowed = provider_chain(chain[1:], None, "allow")
    assert (allowed.providers, allowed.left_out) == (CPU, ("VitisAIExecutionProvider",))
    with pytest.raises(InputError, match="has no VitisAI"):
        provider_chain(chain[1:2], None, "allow")


def test_a_provider_that_runs_nothing_is_an_error_unless_allowed(exported, tmp_path):
    """Azure's provider is in every wheel, starts, and takes no node of an ordinary model."""
    chain = ("AzureExecutionProvider", *CPU)
    if chain[0] not in onnxruntime.get_available_providers():
        pytest.skip("this build has no Azure provider")
    out = tmp_path / "engine.onnx"
    with pytest.raises(InputError, match="AzureExecutionProvider ran no node") as caught:
        build_engine(exported, out, chain)
    assert "fallback: allow" in str(caught.value.remedy)
    info = build_engine(exported, out, chain, fallback="allow", left_out=("OneMore",))
    assert info.nodes.keys() == info.placement.keys() == set(CPU)
    assert info.fell_back == info.placement[CPU[0]]
    assert (info.providers_left_out, info.fallback) == (("OneMore",), "allow")


def test_a_provider_that_does_not_start_is_recorded_where_allowed(exported, tmp_path, monkeypatch):
    real = onnxruntime.InferenceSession

    def without_cuda(path, options, providers):
        return real(path, options, providers=[p for p in providers if p in CPU])

    monkeypatch.setattr(onnxruntime, "InferenceSession", without_cuda)
    wanted = ("CUDAExecutionProvider", *CPU)
    info = build_engine(exported, tmp_path / "engine.onnx", wanted, fallback="allow")
    assert info.providers_left_out == ("CUDAExecutionProvider",)
    assert info.providers_session == CPU
    assert info.provider_options["CUDAExecutionProvider"]["arena_extend_strategy"]


def test_the_nodes_on_the_cpu_are_named(exported, tmp_path):
    info = build_engine(exported, tmp_path / "engine.onnx", CPU)
    kept = {node.name for node in onnx.load(str(tmp_path / "engine.onnx")).graph.node}
    assert {name.rpartition(" (")[0] for name in info.placement[CPU[0]]} == kept
    assert info.fell_back == ()
    assert info.session_options["intra_op_num_threads"] == 1


OPENVINO = "OpenVINOExecutionProvider"


@pytest.mark.skipif(
    OPENVINO not in onnxruntime.get_available_providers(),
    reason="needs a second provider: pip install onnxruntime-openvino instead of onnxruntime",
)
def test_an_operation_that_openvino_does_not_take_is_named(tmp_path):
    text = """(float[batch,16] x) => (float[] y) {
        [dense] h = MatMul (x, w)
        [fold] m = Reshape (h, shape)
        [det] d = Det (m)
        [relu] y = Relu (d)
    }"""
    weights = {"shape": np.array([-1, 4, 4]), "w": np.eye(16, dtype=np.float32)}
    path, out = save_onnx(tmp_path / "det.onnx", text, weights), tmp_path / "engine.onnx"
    with pytest.raises(InputError, match=r"does not run 1 of 4 nodes .*: det \(Det\)"):
        build_engine(path, out, (OPENVINO, *CPU))
    info = build_engine(path, out, (OPENVINO, *CPU), fallback="allow")
    assert info.placement == {
        OPENVINO: ("dense (MatMul)", "fold (Reshape)", "relu (Relu)"),
        CPU[0]: ("det (Det)",),
    }
    assert info.fell_back == ("det (Det)",)


def test_options_follow_the_model_and_a_cache_only_where_asked(tmp_path):
    chain = ("TensorrtExecutionProvider", "CUDAExecutionProvider", OPENVINO, *CPU)
    plain = default_options(chain, 3, half=False, int8=True)
    assert plain["TensorrtExecutionProvider"] == {
        "trt_fp16_enable": "False",
        "trt_int8_enable": "True",
    }
    assert plain[OPENVINO]["num_of_threads"] == "3"
    assert CPU[0] not in plain
    kept = default_options(chain, 3, half=True, int8=False, cache=tmp_path)
    assert kept["TensorrtExecutionProvider"]["trt_engine_cache_path"] == str(tmp_path)
    assert kept[OPENVINO]["cache_dir"] == str(tmp_path)


def test_an_error_of_the_runtime_is_told_without_its_source():
    error = RuntimeError(
        "[ONNXRuntimeError] : 1 : FAIL : /src/core/graph/model.cc:256 ort::Model::Model(onnx::"
        "ModelProto&&, const std::map<int, f(int)>&) Unsupported model IR version: 14 (max 13)"
    )
    told = "[ONNXRuntimeError] : 1 : FAIL : Unsupported model IR version: 14 (max 13)"
    assert first_line(error) == told
    assert first_line(RuntimeError("cannot read /data/a.onnx")) == "cannot read /data/a.onnx"


@pytest.mark.parametrize("level", ["disabled", "basic", "extended", "all"])
def test_the_saved_model_answers_like_the_exported_one(exported, samples, tmp_path, level):
    out = tmp_path / "engine.onnx"
    images = {"image": samples["image"]}
    info = build_engine(exported, out, CPU, 1, level, images)
    assert info.saved_level == ("extended" if level == "all" else level)
    assert info.run_level == level
    assert info.providers_session == CPU
    assert sum(info.nodes.values()) > 0
    assert set(info.nodes) == set(CPU)
    assert info.size_bytes == out.stat().st_size
    before, after = describe_onnx(exported), describe_onnx(out)
    assert after.spec == before.spec
    assert after.metadata == before.metadata
    expected = open_session(exported, CPU, 1, "disabled").run(None, images)[0]
    answer = open_session(out, CPU, 1, "all").run(None, images)[0]
    np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-5)
    json.dumps(info.to_json(), allow_nan=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["engine.onnx", "student.onnx"]


def test_the_saved_model_holds_no_layout_of_this_processor(tmp_path):
    """A channel count of 16 is blocked (NCHWc) at level all on x86; the file must not have it."""
    text = "(float[batch,16,8,8] x) => (float[] y) { y = Conv (x, w) }"
    path = save_onnx(tmp_path / "conv.onnx", text, {"w": np.ones((16, 16, 3, 3), np.float32)})
    out = tmp_path / "engine.onnx"
    build_engine(path, out, CPU, 1, "all")
    assert {node.domain for node in onnx.load(str(out)).graph.node} <= {"", "com.microsoft"}


@pytest.fixture
def changed_answers(monkeypatch):
    """The optimizer's file has another bias than the model."""
    save = engine._save_optimized

    def broken(onnx_path, out_path, *rest):
        save(onnx_path, out_path, *rest)
        model = onnx.load(str(out_path))
        bias = next(t for t in model.graph.initializer if "4.bias" in t.name)
        values = onnx.numpy_helper.to_array(bias) + 1
        bias.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), bias.name))
        onnx.save(model, str(out_path))

    monkeypatch.setattr(engine, "_save_optimized", broken)


@pytest.mark.parametrize("before", [None, b"a good engine"])
@pytest.mark.usefixtures("changed_answers")
def test_an_optimization_that_changes_the_answers_leaves_what_was_there(exported, tmp_path, before):
    out = tmp_path / "engine.onnx"
    if before is not None:
        out.write_bytes(before)
    with pytest.raises(StageError, match=r"outputs differ, whichever.*output 'logits'") as caught:
        build_engine(exported, out, CPU)
    assert caught.value.where == str(out)
    assert (out.read_bytes() if out.exists() else None) == before
    kept = {"student.onnx"} | ({"engine.onnx"} if before is not None else set())
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_no_unfinished_engine_is_ever_under_the_final_name(exported, tmp_path, monkeypatch):
    """Whenever a model is opened or run the process may be killed."""
    out = tmp_path / "engine.onnx"
    out.write_bytes(b"a good engine")
    seen = []

    def watched(call):
        def run(*args, **settings):
            seen.append(out.read_bytes())
            return call(*args, **settings)

        return run

    for name in ("open_session", "outputs_of", "check_fallback", "_difference"):
        monkeypatch.setattr(engine, name, watched(getattr(engine, name)))
    build_engine(exported, out, CPU)
    assert len(seen) >= 4
    assert set(seen) == {b"a good engine"}
    assert onnx.load(str(out)).graph.node


def test_a_folder_that_cannot_be_written_and_a_bad_model(exported, tmp_path):
    with pytest.raises(StageError, match="cannot be written"):
        build_engine(exported, tmp_path / "missing" / "m.onnx", CPU)
    exported.write_bytes(exported.read_bytes()[:100])
    with pytest.raises(InputError):
        build_engine(exported, tmp_path / "engine.onnx", CPU)


def test_samples_of_a_wrong_shape_are_named(exported, tmp_path):
    wrong = {"image": np.zeros((1, 3, 9, 9), np.float32)}
    with pytest.raises(InputError, match=r"does not run on image float32\(1, 3, 9, 9\)"):
        build_engine(exported, tmp_path / "engine.onnx", CPU, samples=wrong)


def test_inputs_are_made_up_for_every_dtype_with_batch_one():
    spec = ModelSpec(
        (
            TensorSpec("audio", ("n", "time")),
            TensorSpec("state", (2, "n", "other"), "float16"),
            TensorSpec("rate", (), "int64"),
            TensorSpec("mask", ("n", "time"), "bool"),
        ),
        (),
    )
    inputs = random_inputs(spec, 16)
    assert {k: (v.shape, v.dtype.name) for k, v in inputs.items()} == {
        "audio": ((1, 16), "float32"),
        "state": ((2, 1, 1), "float16"),
        "rate": ((), "int64"),
        "mask": ((1, 16), "bool"),
    }
    with pytest.raises(InputError, match="no random input for"):
        random_inputs(ModelSpec((TensorSpec("text", ("n",), "string"),), ()))


def test_a_size_that_the_model_can_run_is_searched(tmp_path):
    """Reflect padding by 4 needs at least 5 values: a random length of 1 does not run."""
    text = """(float[batch,time] x) => (float[] y) { y = Pad <mode = "reflect"> (x, pads) }"""
    path = save_onnx(tmp_path / "pad.onnx", text, {"pads": np.array([0, 4, 0, 4])})
    assert build_engine(path, tmp_path / "engine.onnx", CPU).max_difference == 0
