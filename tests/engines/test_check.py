"""``edgekd check`` on real models and the real runtimes."""

import importlib.util
import json

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.quantization import CalibrationDataReader, quantize_static

from edgekd.config.profile import load_profile
from edgekd.engines import tensorrt
from edgekd.engines.check import check_model
from edgekd.engines.tensorrt import remedy_for, takes_opset
from edgekd.errors import InputError, StageError, TargetError
from edgekd.targets import open_target
from tests.onnx_builders import save_external, save_onnx

RELU = "(float[batch,16] x) => (float[] y) { y = Relu (x) }"
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason='needs TensorRT\'s parser: pip install "edgekd[rtx]"',
)


def ask(path, **settings):
    return check_model(path, open_target("local").parse, **settings)


def never(path, library):
    raise AssertionError("the parser was asked")


@pytest.fixture
def without_tensorrt(monkeypatch):
    monkeypatch.setattr(tensorrt, "is_installed", lambda name: False)


def findings(report, status):
    return [finding for finding in report.findings if finding.status == status]


@needs_rtx
def test_an_exported_model_passes_everywhere(exported):
    report = ask(exported, engines=["tensorrt-rtx", "onnxruntime"], batch=8)
    assert report.passed
    assert report.tensorrt["supported"] is True
    assert {f.subject.split()[0] for f in findings(report, "ok")} == {
        *("CPU", "tensorrt-rtx", "optimized"),
    }
    assert "batch = 8" in report.findings[-1].detail
    json.dumps(report.to_json(), allow_nan=False)


@needs_rtx
def test_an_operation_tensorrt_lacks_is_named_and_runs_in_onnx_runtime(tmp_path):
    text = """(float[batch,16] x) => (float[] y)
    { [fold] m = Reshape (x, shape)  [volume] y = Det (m) }"""
    path = save_onnx(tmp_path / "det.onnx", text, {"shape": np.array([-1, 4, 4])})
    report = ask(path, engines=["tensorrt-rtx"])
    (refusal,) = findings(report, "fails")
    assert refusal.nodes == ("volume",)
    assert "Det" in refusal.detail
    assert "ONNX Runtime" in refusal.remedy
    # TensorRT was not requested: the same verdict is reported and fails nothing.
    relaxed = ask(path)
    assert relaxed.passed
    assert any("volume" in finding.detail for finding in findings(relaxed, "note"))


@needs_rtx
def test_the_runtimes_default_quantization_is_refused_with_the_remedy(exported, tmp_path):
    class Noise(CalibrationDataReader):
        def __init__(self):
            image = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
            self.left = [{"image": image}]

        def get_next(self):
            return self.left.pop() if self.left else None

    path = tmp_path / "uint8.onnx"
    quantize_static(str(exported), str(path), Noise())
    report = ask(path, engines=["tensorrt-rtx", "onnxruntime"])
    (refusal,) = findings(report, "fails")
    assert "QuantizeLinear" in refusal.detail
    assert "edgekd quantize" in refusal.remedy
    assert "--for tensorrt" in refusal.remedy


@needs_rtx
def test_a_model_with_a_branch_and_one_of_opset_9(tmp_path):
    text = """(float[batch,16] x) => (float[] y) {
        s = ReduceSum <keepdims = 0> (x)
        yes = Greater (s, zero)
        y = If (yes) <then_branch = yes () => (float[] a) { [relu] a = Relu (x) },
                      else_branch = no () => (float[] b) { [neg] b = Neg (x) }>
    }"""
    path = save_onnx(tmp_path / "if.onnx", text, {"zero": np.float32(0)})
    assert ask(path, engines=["tensorrt-rtx", "onnxruntime"]).passed
    old = save_onnx(tmp_path / "old.onnx", RELU, opset=9)
    assert ask(old, engines=["tensorrt-rtx", "onnxruntime"]).passed


@needs_rtx
def test_words_as_integers_and_a_dynamic_length(tmp_path):
    """As magika: integers in, an open length, without which the memory is unknown."""
    text = """(int64[batch,length] x) => (float[] y) {
        [look_up] words = Gather (table, x)
        [mean] y = ReduceMean <axes = [1], keepdims = 0> (words)
    }"""
    path = save_onnx(tmp_path / "m.onnx", text, {"table": np.ones((257, 64), np.float32)})
    profile = load_profile("jetson-orin-nano-8gb")
    unknown = ask(path, profile=profile)
    (gap,) = findings(unknown, "inconclusive")
    assert gap.subject == "memory"
    assert gap.remedy.startswith("give open sizes")
    assert gap.detail.startswith("at least ")
    assert "tensors of unknown size: " in gap.detail
    assert "x int64[batch, length]" in unknown.findings[1].detail
    known = ask(path, profile=profile, shapes={"x": (1, 2048)})
    assert known.passed
    assert known.memory.activations_bytes == 2048 * 8 + 2048 * 64 * 4 + 64 * 4


def test_without_tensorrt_a_device_of_tensorrt_is_not_shown(exported, without_tensorrt):
    report = check_model(exported, never, profile=load_profile("jetson-orin-nano-8gb"))
    assert not report.passed
    (gap,) = findings(report, "inconclusive")
    assert "not checked" in gap.detail
    assert "edgekd[rtx]" in gap.remedy
    assert check_model(exported, never).passed


def test_tensorrt_rtx_stands_in_for_tensorrt_and_says_so(exported, monkeypatch):
    monkeypatch.setattr(tensorrt, "is_installed", lambda name: name == "tensorrt-rtx")
    asked = []

    def parse(path, library):
        asked.append(library)
        return {"library": library, "version": "1.7", "supported": True, "problems": []}

    report = check_model(exported, parse, profile=load_profile("jetson-orin-nano-8gb"))
    assert asked == ["tensorrt-rtx"]
    assert any("stands in for TensorRT 10.3" in finding.detail for finding in report.findings)
    monkeypatch.setattr(tensorrt, "is_installed", lambda name: True)
    check_model(exported, parse, engines=["tensorrt"])
    check_model(exported, parse, engines=["tensorrt-rtx"])
    assert asked[1:] == ["tensorrt", "tensorrt-rtx"]


@pytest.mark.parametrize("supported", [True, False])
def test_tensorrt_stands_in_for_tensorrt_rtx_and_says_so(exported, monkeypatch, supported):
    monkeypatch.setattr(tensorrt, "is_installed", lambda name: name == "tensorrt")

    def parse(path, library):
        return {"library": library, "version": "10.3", "supported": supported, "problems": []}

    report = check_model(exported, parse, engines=["tensorrt-rtx"])
    assert report.passed is supported
    (told,) = [finding for finding in report.findings if finding.subject == "tensorrt 10.3"]
    assert "stands in for TensorRT for RTX, which may differ" in told.detail
    (told,) = [f for f in check_model(exported, parse).findings if f.subject == "tensorrt 10.3"]
    assert "stands in" not in told.detail


@pytest.mark.parametrize("kind", [InputError, StageError, TargetError])
def test_a_tensorrt_that_cannot_be_asked_matters_only_to_who_asked_for_it(
    exported, monkeypatch, kind
):
    monkeypatch.setattr(tensorrt, "is_installed", lambda name: name == "tensorrt")

    def parse(path, library):
        raise kind("tensorrt 10.3 does not start here", remedy="it needs a GPU")

    report = check_model(exported, parse)
    assert report.passed
    (told,) = [finding for finding in report.findings if finding.subject == "tensorrt"]
    assert (told.status, told.remedy) == ("note", "it needs a GPU")
    assert "tensorrt 10.3 does not start here" in told.detail
    (gap,) = findings(check_model(exported, parse, engines=["tensorrt"]), "inconclusive")
    assert gap.subject == "tensorrt"


def test_budgets_of_the_profile_count(exported, without_tensorrt):
    profile = load_profile("raspberry-pi-5")
    assert check_model(exported, never, profile=profile).passed
    tight = profile.budget.model_copy(
        update={
            "memory_mb": profile.budget.memory_mb.model_copy(update={"value": 0.0001}),
            "storage_mb": profile.budget.memory_mb.model_copy(update={"value": 0.0001}),
        }
    )
    report = check_model(exported, never, profile=profile.model_copy(update={"budget": tight}))
    assert {finding.subject for finding in findings(report, "fails")} == {"memory", "size"}


def test_every_node_of_an_operation_without_a_kernel_is_named(tmp_path, without_tensorrt):
    text = """(float[batch,16] x) => (float[] y) {
        [first] a = maker.Foo (x)
        [between] b = Relu (a)
        [second] y = maker.Foo (b)
    }"""
    path = save_onnx(tmp_path / "m.onnx", text, domains={"maker": 1})
    report = check_model(path, never)
    (refusal,) = findings(report, "fails")
    assert refusal.nodes == ("first", "second")
    assert "replace the operation" in refusal.remedy


def test_what_only_onnx_runtime_cannot_read_is_a_verdict(tmp_path, without_tensorrt):
    """The checker takes a model whose axes lie in another file; ONNX Runtime does not."""
    text = "(float[batch,16] x) => (float[] y) { y = ReduceMax <keepdims = 0> (x, axes) }"
    path = save_onnx(tmp_path / "m.onnx", text, {"axes": np.array([1])}, opset=18)
    save_external(path, path)
    (refusal,) = findings(check_model(path, never), "fails")
    assert "constants that shapes and axes depend on (here 'axes')" in refusal.detail
    assert "size_threshold=1024" in refusal.remedy
    assert "opset" not in refusal.remedy


def test_an_opset_that_the_runtime_does_not_take_is_a_verdict(tmp_path, without_tensorrt):
    path = save_onnx(tmp_path / "m.onnx", RELU, opset=99)
    (refusal,) = findings(check_model(path, never), "fails")
    assert "opset" in refusal.detail.lower()
    assert "/onnxruntime_src" not in refusal.detail


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this build has CUDA"
)
def test_an_absent_provider_is_not_shown_and_says_what_to_install(exported, without_tensorrt):
    chain = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    report = check_model(exported, never, providers=chain)
    (gap,) = findings(report, "inconclusive")
    assert (gap.subject, "onnxruntime-gpu" in gap.detail) == ("CUDA", True)
    with pytest.raises(InputError, match="did you mean 'CUDAExecutionProvider'"):
        check_model(exported, never, providers=["CUDAExecutionProvder"])


def test_broken_files_are_wrong_input_and_no_verdict(exported, tmp_path, without_tensorrt):
    model = onnx.load(str(exported))
    apart = tmp_path / "apart.onnx"
    onnx.save(model, str(apart), save_as_external_data=True, location="w.bin")
    report = check_model(apart, never)
    assert report.passed
    assert any("external: w.bin" in finding.detail for finding in report.findings)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(InputError, match=r"w\.bin.* missing"):
        check_model(apart, never)
    exported.write_bytes(exported.read_bytes()[:-500])
    with pytest.raises(InputError, match="truncated"):
        check_model(exported, never)


@pytest.mark.parametrize(
    ("version", "opset", "takes"),
    [
        ("10.3", 18, True),
        ("10.3", 22, None),  # between the documented 20 of 10.0 and 24 of 10.15
        ("10.3", 25, False),
        ("10.3", 8, False),
        ("10.15.1", 24, True),
        ("11.4", 25, True),
        ("11.4", 26, None),
        ("8.6", 17, None),
        ("8.6", 21, False),
    ],
)
def test_only_documented_opsets_of_tensorrt_are_claimed(version, opset, takes):
    assert takes_opset(version, opset) is takes


def test_an_operation_is_not_mistaken_for_another_by_its_beginning():
    assert "TopK" in remedy_for("NonZero", "")
    assert remedy_for("IfNotKnown", "false") == remedy_for("Det", "false")
