"""A model that ends the process of the runtime is an error that names it, in every command."""

from __future__ import annotations

import json
import os
import platform
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from edgekd.errors import CrashError
from edgekd.quantization.mixed_precision import convert_mixed_precision
from edgekd.targets import LocalTarget
from tests.command_line import edgekd_process, python
from tests.onnx_builders import save_onnx

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")


def transposed_product(path, dtype):
    """y = transpose(x) @ w: in float16 ONNX Runtime 1.31 at level ``all`` dies of it."""
    weight = np.random.default_rng(0).standard_normal((16, 8)).astype(dtype)
    kind = {"float16": "float16", "float32": "float"}[dtype]
    text = f"""({kind}[b,t,16] x) => ({kind}[t,b,8] y)
    {{ [swap] t = Transpose <perm = [1, 0, 2]> (x)  [fc] y = MatMul (t, w) }}"""
    return save_onnx(path, text, {"w": weight})


def divided(path):
    """y = (n - 2^63) / -1 in whole numbers: where n is 0 that has no result, and x86 kills the
    process."""
    text = "(int64[4] n) => (int64[4] y) { [sum] s = Add (least, n)  [ratio] y = Div (s, minus) }"
    weights = {"least": np.full(4, np.iinfo(np.int64).min), "minus": np.full(4, -1)}
    return save_onnx(path, text, weights)


def dies(path, level):
    code = (
        "import sys, onnxruntime as o; s = o.SessionOptions(); s.graph_optimization_level = "
        f"getattr(o.GraphOptimizationLevel, {level!r}); o.InferenceSession(sys.argv[1], s)"
    )
    return python(code, path, code=None).returncode < 0


@pytest.fixture(scope="module")
def crashing(tmp_path_factory):
    """A float16 model that the default session of this ONNX Runtime dies of."""
    path = transposed_product(tmp_path_factory.mktemp("crash") / "q.onnx", "float16")
    if not dies(path, "ORT_ENABLE_ALL"):
        pytest.skip("this ONNX Runtime opens it")
    assert not dies(path, "ORT_ENABLE_EXTENDED")
    return path


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("check",), 1),
        (("build", "-o", "out.onnx"), 3),
        (("benchmark",), 3),
    ],
)
def test_a_model_that_kills_the_runtime_is_named_with_a_working_level(
    crashing, tmp_path, command, code
):
    done = edgekd_process(command[0], crashing, *command[1:], cwd=tmp_path, code=code)
    said = " ".join((done.stdout + done.stderr).split())
    name = "out.onnx" if command[0] == "build" else crashing.name
    assert f"ONNX Runtime was killed by signal 11 (SIGSEGV) while it opened {name}" in said
    assert "at graph optimization level 'extended' it opens" in said
    assert not any(tmp_path.iterdir())


def test_the_level_that_the_error_names_works(crashing, tmp_path):
    edgekd_process("build", crashing, "-o", "o.onnx", "--optimization", "extended", cwd=tmp_path)
    quick = ("--optimization", "extended", "--max-seconds", "1", "--min-queries", "10")
    edgekd_process("benchmark", crashing, *quick, cwd=tmp_path)


def test_a_killed_build_leaves_the_old_file_and_no_temporary_one(tmp_path):
    # Random integers are 0: the model opens and crashes while it runs.
    model = divided(tmp_path / "m.onnx")
    (tmp_path / "out.onnx").write_bytes(b"from before")
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    build = ("build", "m.onnx", "-o", "out.onnx")
    done = edgekd_process(*build, cwd=tmp_path, code=None, env=environment)
    if done.returncode == 0:
        pytest.skip("this processor has a result")
    assert done.returncode == 3
    assert "killed by signal 8 (SIGFPE) while it ran m.onnx" in done.stderr
    assert (tmp_path / "out.onnx").read_bytes() == b"from before"
    assert {path.name for path in tmp_path.iterdir()} == {model.name, "out.onnx", "tmp"}
    assert not any((tmp_path / "tmp").iterdir())


def test_a_division_by_zero_asks_for_real_inputs(tmp_path):
    model = divided(tmp_path / "m.onnx")
    np.savez(tmp_path / "zeros.npz", n=np.zeros(4, np.int64))
    np.savez(tmp_path / "ones.npz", n=np.ones(4, np.int64))
    assert LocalTarget().probe(model, inputs=tmp_path / "ones.npz")["ran"]
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("other processors have a result")
    with pytest.raises(CrashError, match=r"signal 8 \(SIGFPE\) while it ran m.onnx") as caught:
        LocalTarget().probe(model, inputs=tmp_path / "zeros.npz")
    assert "give real inputs (--inputs DATA.npz)" in caught.value.remedy
    assert caught.value.where == str(model)


@pytest.mark.parametrize("samples", [False, True])
def test_fp16_keeps_what_kills_the_runtime_in_float32(crashing, tmp_path, samples):
    transposed_product(tmp_path / "m.onnx", "float32")
    x = np.random.default_rng(1).standard_normal((4, 4, 16)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x)
    given = ("--calibration", "d.npz") if samples else ()
    quick = ("--method", "fp16", "--no-timing", "--json", "q.json")
    done = edgekd_process("quantize", "m.onnx", "-o", "q.onnx", *quick, *given, cwd=tmp_path)
    half = json.loads((tmp_path / "q.json").read_text())["half"]
    assert len(half["kept"]) == len(half["low"]) == 1
    assert "in float16, ONNX Runtime was killed by signal 11 (SIGSEGV)" in done.stdout
    # A default session opens it, in this process.
    answers = [
        onnxruntime.InferenceSession(tmp_path / name).run(None, {"x": x})[0]
        for name in ("m.onnx", "q.onnx")
    ]
    np.testing.assert_allclose(answers[0], answers[1], atol=0.05)
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "d.npz", "q.onnx", "q.json"}


def test_every_kind_of_node_that_kills_the_runtime_is_found(tmp_path):
    """Whatever nodes they are: here files with a Tanh or an Add in float16 are refused."""
    text = """(float[2] x) => (float[2] y) {
        [Tanh0] t1 = Tanh (x)
        [Relu1] t2 = Relu (t1)
        [Add2] t3 = Add (t2, t2)
        [Neg3] t4 = Neg (t3)
        [Tanh4] t5 = Tanh (t4)
        [Abs5] y = Abs (t5)
    }"""
    model = save_onnx(tmp_path / "m.onnx", text)

    def opens(path):
        typed = onnx.shape_inference.infer_shapes(onnx.load(path))
        types = {v.name: v.type.tensor_type.elem_type for v in typed.graph.value_info}
        for node in typed.graph.node:
            if node.op_type in ("Tanh", "Add") and types.get(node.output[0]) == TensorProto.FLOAT16:
                raise CrashError("it was killed while it opened this", signal=11)

    info = convert_mixed_precision(model, tmp_path / "q.onnx", "fp16", opens=opens)
    assert set(info.kept) >= {"Tanh0", "Add2", "Tanh4"}
    opens(tmp_path / "q.onnx")

    def never(path):
        if path != model:
            raise CrashError("it was killed while it opened this", signal=11)

    (tmp_path / "q.onnx").unlink()
    with pytest.raises(CrashError, match="was killed"):
        convert_mixed_precision(model, tmp_path / "q.onnx", "fp16", opens=never)
    assert not (tmp_path / "q.onnx").exists()
