"""The ONNX Runtime engine: no silent provider, and an optimized file that answers the same."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from edgekd.engines import onnxruntime as engine
from edgekd.engines.onnx import describe_onnx
from edgekd.engines.onnxruntime import build_engine, made_up_inputs, open_session, providers_for
from edgekd.errors import InputError, StageError
from edgekd.spec import ModelSpec, TensorSpec

CPU = ("CPUExecutionProvider",)


@pytest.fixture
def exported(exported_bytes, tmp_path):
    path = tmp_path / "student.onnx"
    path.write_bytes(exported_bytes)
    return path


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
    """ONNX Runtime goes on with the CPU when CUDA's libraries are missing; edgekd does not."""
    real = onnxruntime.InferenceSession

    def without_cuda(path, options, providers):
        return real(path, options, providers=[p for p in providers if p in CPU])

    monkeypatch.setattr(onnxruntime, "InferenceSession", without_cuda)
    with pytest.raises(InputError, match="CUDAExecutionProvider did not start"):
        open_session(exported, ("CUDAExecutionProvider", *CPU), 1, "all")


def test_a_preferred_provider_that_ran_nothing_is_an_error(tmp_path):
    wanted = ("CUDAExecutionProvider", *CPU)
    with pytest.raises(InputError, match="ran no node"):
        engine.check_providers_used(wanted, {"CPUExecutionProvider": 5}, tmp_path)
    engine.check_providers_used(wanted, {"CUDAExecutionProvider": 1}, tmp_path)
    engine.check_providers_used(CPU, {"CPUExecutionProvider": 5}, tmp_path)


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
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    w = onnx.numpy_helper.from_array(np.ones((16, 16, 3, 3), np.float32), "w")
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "g", [x], [y], [w])
    path, out = tmp_path / "conv.onnx", tmp_path / "engine.onnx"
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(path))
    build_engine(path, out, CPU, 1, "all")
    assert {node.domain for node in onnx.load(str(out)).graph.node} <= {"", "com.microsoft"}


def test_an_optimization_that_changes_the_answers_is_an_error(exported, tmp_path, monkeypatch):
    save = engine._save_optimized

    def broken(onnx_path, out_path, *rest):
        save(onnx_path, out_path, *rest)
        model = onnx.load(str(out_path))
        bias = next(t for t in model.graph.initializer if "4.bias" in t.name)
        values = onnx.numpy_helper.to_array(bias) + 1
        bias.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), bias.name))
        onnx.save(model, str(out_path))

    monkeypatch.setattr(engine, "_save_optimized", broken)
    with pytest.raises(StageError, match="answers differently: output 'logits'"):
        build_engine(exported, tmp_path / "engine.onnx", CPU)


def test_a_folder_that_cannot_be_written_and_a_bad_model(exported, tmp_path):
    with pytest.raises(StageError, match="cannot be written"):
        build_engine(exported, tmp_path / "missing" / "m.onnx", CPU)
    exported.write_bytes(exported.read_bytes()[:100])
    with pytest.raises(InputError):
        build_engine(exported, tmp_path / "engine.onnx", CPU)


def test_samples_of_a_wrong_shape_are_named(exported, tmp_path):
    wrong = {"image": np.zeros((1, 3, 9, 9), np.float32)}
    with pytest.raises(StageError, match=r"does not run on image \(1, 3, 9, 9\)"):
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
    inputs = made_up_inputs(spec, 16)
    assert {k: (v.shape, v.dtype.name) for k, v in inputs.items()} == {
        "audio": ((1, 16), "float32"),
        "state": ((2, 1, 1), "float16"),
        "rate": ((), "int64"),
        "mask": ((1, 16), "bool"),
    }
    with pytest.raises(InputError, match="no input can be made up"):
        made_up_inputs(ModelSpec((TensorSpec("text", ("n",), "string"),), ()))


def test_a_size_that_the_model_can_run_is_searched(tmp_path):
    """Reflect padding by 4 needs at least 5 values: a made-up length of 1 does not run."""
    pads = onnx.numpy_helper.from_array(np.array([0, 4, 0, 4]), "pads")
    graph = helper.make_graph(
        [helper.make_node("Pad", ["x", "pads"], ["y"], mode="reflect")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "time"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [pads],
    )
    path = tmp_path / "pad.onnx"
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(path))
    assert build_engine(path, tmp_path / "engine.onnx", CPU).max_difference == 0
