"""Real builds with TensorRT for RTX, which needs no GPU to build."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgerun.errors import BadInput, CannotWrite, RunFailed
from edgerun.tensorrt.build import build
from edgerun.tensorrt.engine import check_engine
from edgerun.tensorrt.library import find_gpu
from edgerun.tensorrt.network import parse
from edgerun.tensorrt.settings import BuildSettings, parse_ranges
from tests.command_line import edgerun
from tests.onnx_builders import save_external, save_onnx

pytest.importorskip("tensorrt_rtx", reason="the extra rtx is not installed")

RTX = "tensorrt-rtx"


def network(path: Path, kind: str = "fp32", sides: tuple[int | str, ...] = (8, 8)) -> Path:
    """image (batch, 1, …) → Conv ``conv`` → Relu → mean → MatMul ``fc`` → y (batch, 3).

    ``fp16``: all in float16 between two casts. ``int8``: symmetric Q/DQ at ``conv`` and ``fc``;
    ``conv-int8``: at ``conv`` alone. ``uint8``: zero points as ONNX Runtime's default has them.
    """
    real = np.float16 if kind == "fp16" else np.float32
    random = np.random.default_rng(0)
    arrays = {
        "conv_w": random.standard_normal((4, 1, 3, 3)),
        "fc_w": random.standard_normal((4, 3)),
    }
    values = {"axes": np.array([2, 3])}
    quantized = {"int8": ("conv", "fc"), "uint8": ("conv",), "conv-int8": ("conv",)}.get(kind, ())

    def layer(op, name, x, output):
        weight = arrays[f"{name}_w"]
        if name not in quantized:
            values[f"{name}_w"] = weight.astype(real)
            return f"[{name}] {output} = {op} ({x}, {name}_w)"
        activation = np.uint8(128) if kind == "uint8" else np.int8(0)
        values.update({"scale": np.float32(0.03), "zero": np.int8(0), "zero_x": activation})
        values[f"{name}_q"] = np.clip(np.rint(weight / 0.03), -127, 127).astype(np.int8)
        return f"""
        [{name}_quantize] {name}_xq = QuantizeLinear ({x}, scale, zero_x)
        [{name}_dequantize] {name}_x = DequantizeLinear ({name}_xq, scale, zero_x)
        [{name}_dqw] {name}_w = DequantizeLinear ({name}_q, scale, zero)
        [{name}] {output} = {op} ({name}_x, {name}_w)"""

    half = kind == "fp16"
    text = f"""(float[batch,1,{sides[0]},{sides[1]}] image) => (float[batch,3] y) {{
        {"[cast_in] half = Cast <to = 10> (image)" if half else ""}
        {layer("Conv", "conv", "half" if half else "image", "c")}
        [relu] r = Relu (c)
        [mean] m = ReduceMean <keepdims = 0> (r, axes)
        {layer("MatMul", "fc", "m", "y16" if half else "y")}
        {"[cast_out] y = Cast <to = 1> (y16)" if half else ""}
    }}"""
    return save_onnx(path, text, values, opset=18, ir=9)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An engine for two GPUs, and its record."""
    folder = tmp_path_factory.mktemp("built")
    shapes = parse_ranges(["image=1x1x8x8:2x1x8x8:8x1x8x8"])
    settings = BuildSettings(RTX, compute_capabilities=("8.6", "8.9"), shapes=shapes)
    engine = folder / "m.engine"
    return engine, build(network(folder / "m.onnx"), engine, settings)


def test_an_engine_for_two_gpus_holds_code_for_both(built):
    engine, record = built
    content = engine.read_bytes()
    # The compiler names the architecture of each kernel in it.
    assert set(re.findall(rb"sm\d+", content)) == {b"sm86", b"sm89"}
    assert record["engine"]["bytes"] == len(content)
    assert record["engine"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert record["profile"] == {
        "image": {"min": [1, 1, 8, 8], "usual": [2, 1, 8, 8], "max": [8, 1, 8, 8]}
    }
    assert json.loads((engine.parent / "m.engine.json").read_text()) == record


def test_without_a_gpu_the_record_says_why_the_engine_was_not_inspected(built):
    engine, record = built
    if find_gpu() is not None:
        pytest.skip("this machine has a GPU")
    assert (record["inspected"], record["device"]) == (False, None)
    assert "no NVIDIA GPU" in record["reason"]
    assert not engine.with_name("m.engine.layers.json").exists()


@pytest.mark.parametrize(
    ("kind", "precision", "matrix"),
    [
        ("fp32", "fp32", {"fp32": ["conv", "fc"]}),
        ("fp16", "fp16", {"fp16": ["conv", "fc"]}),
        ("int8", "int8", {"int8": ["conv", "fc"]}),
        # Narrower than requested is not less than requested.
        ("int8", "fp16", {"int8": ["conv", "fc"]}),
    ],
)
def test_layers_compute_in_what_the_model_says(tmp_path, kind, precision, matrix):
    model = network(tmp_path / "m.onnx", kind)
    record = build(model, tmp_path / "m.engine", BuildSettings(RTX, precision=precision))
    assert record["layers"]["matrix"] == matrix
    assert record["layers"]["certain"]


@pytest.mark.parametrize(
    ("kind", "precision", "message"),
    [
        ("fp32", "int8", r"INT8 was asked for.* 2 of 2 in FP32: conv, fc"),
        ("fp32", "fp16", r"FP16 was asked for.* 2 of 2 in FP32: conv, fc"),
        ("fp16", "int8", r"INT8 was asked for.* 2 of 2 in FP16: conv, fc"),
        ("fp16", "fp32", r"FP32 was asked for.* 2 of 2 in FP16"),
        ("fp16", "bf16", r"BF16 was asked for.* 2 of 2 in FP16"),
        ("conv-int8", "int8", r"INT8 was asked for.* 1 of 2 in FP32: fc$"),
    ],
)
def test_a_precision_that_the_layers_do_not_have_is_an_error(tmp_path, kind, precision, message):
    model = network(tmp_path / "m.onnx", kind)
    with pytest.raises(BadInput) as caught:
        build(model, tmp_path / "m.engine", BuildSettings(RTX, precision=precision))
    assert re.search(message, caught.value.what)
    assert list(tmp_path.iterdir()) == [model]


def test_layers_kept_on_purpose_are_no_error_and_unknown_ones_are(tmp_path):
    model = network(tmp_path / "m.onnx", "conv-int8")
    kept = BuildSettings(RTX, precision="int8", keep=("fc",))
    record = build(model, tmp_path / "m.engine", kept)
    assert record["layers"]["matrix"] == {"int8": ["conv"], "fp32": ["fc"]}
    with pytest.raises(BadInput, match="no layer 'fd'"):
        build(model, tmp_path / "m.engine", BuildSettings(RTX, precision="int8", keep=("fd",)))


def test_quantized_weights_alone_are_not_int8(tmp_path):
    # The product is then computed in float: what was requested is not what runs.
    weights = numpy_helper.from_array(np.ones((4, 3), np.int8), "q")
    scale = numpy_helper.from_array(np.float32(0.1), "s")
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
    ]
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size])
        for name, size in (("x", 4), ("y", 3))
    )
    graph = helper.make_graph(nodes, "g", [x], [y], [weights, scale])
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    with pytest.raises(BadInput, match="1 of 1 in FP32: product"):
        build(path, tmp_path / "m.engine", BuildSettings(RTX, precision="int8"))


def test_what_the_parser_refuses_is_named_with_node_and_remedy(tmp_path):
    model = network(tmp_path / "m.onnx", "uint8")
    verdict = parse(model, RTX)
    assert not verdict["supported"]
    problem = verdict["problems"][0]
    assert problem["op"] in ("QuantizeLinear", "DequantizeLinear")
    assert problem["node"].startswith("conv_")
    assert "--for tensorrt" in verdict["remedy"]
    # CUDA's complaint about the missing GPU is not the reason.
    assert "cudaError" not in problem["message"]
    with pytest.raises(BadInput, match=problem["node"]) as caught:
        build(model, tmp_path / "m.engine", BuildSettings(RTX))
    assert "--for tensorrt" in caught.value.remedy


def test_all_unknown_operators_are_listed(tmp_path):
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 4]) for n in "xy")
    nodes = [
        helper.make_node("Foo", ["x"], ["a"], name="first", domain="mine"),
        helper.make_node("Relu", ["a"], ["b"], name="fine"),
        helper.make_node("Bar", ["b"], ["y"], name="last", domain="mine"),
    ]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=opsets)
    onnx.save(model, tmp_path / "m.onnx")
    verdict = parse(tmp_path / "m.onnx", RTX)
    found = {(problem["node"], problem["op"]) for problem in verdict["problems"]}
    assert {("first", "Foo"), ("last", "Bar")} <= found


def test_a_model_that_is_taken_is_judged_so(tmp_path):
    verdict = parse(network(tmp_path / "m.onnx", "int8"), RTX)
    assert (verdict["supported"], verdict["problems"]) == (True, [])
    assert verdict["schema"] == "edgerun.parse/1"


@pytest.mark.parametrize("content", [b"", b"hello", None], ids=["empty", "text", "truncated"])
def test_a_file_that_is_no_model_is_not_taken_for_an_empty_one(tmp_path, content):
    path = network(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    with pytest.raises(BadInput, match="not a complete ONNX model"):
        parse(path, RTX)


@pytest.mark.parametrize("left", [None, b"abc"], ids=["missing", "truncated"])
def test_weights_that_cannot_be_read_are_named(tmp_path, left):
    path = network(tmp_path / "m.onnx")
    save_external(path, path, "m.data")
    assert parse(path, RTX)["supported"]
    (tmp_path / "m.data").unlink()
    if left is not None:
        (tmp_path / "m.data").write_bytes(left)
    with pytest.raises(BadInput, match=r"weights are in another file.*m\.data"):
        parse(path, RTX)


def test_open_sides_need_a_shape_and_the_batch_does_not(tmp_path):
    model = network(tmp_path / "m.onnx", sides=("height", "width"))
    with pytest.raises(BadInput, match=r"axis 2 \(height\) of input 'image' is open"):
        build(model, tmp_path / "m.engine", BuildSettings(RTX))
    shapes = parse_ranges(["image=1x1x8x8:1x1x16x16:2x1x32x32"])
    record = build(model, tmp_path / "m.engine", BuildSettings(RTX, shapes=shapes))
    assert record["profile"]["image"]["max"] == [2, 1, 32, 32]
    fixed = network(tmp_path / "f.onnx")
    record = build(fixed, tmp_path / "f.engine", BuildSettings(RTX, batch=4))
    assert record["profile"]["image"]["usual"] == [4, 1, 8, 8]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (BuildSettings(RTX, compute_capabilities=("8.7",)), BadInput, "no compute capability 8.7"),
        (BuildSettings(RTX, hardware_compatible=True), BadInput, "hardware compatibility"),
        (BuildSettings(RTX, dla=0), BadInput, "FP16 and INT8 alone"),
        (BuildSettings(RTX, dla=0, precision="fp16"), BadInput, "no DLA cores"),
        (BuildSettings(RTX, workspace_mb=0.001), RunFailed, "within workspace limit"),
    ],
)
def test_what_cannot_be_set_is_said(tmp_path, settings, error, message):
    model = network(tmp_path / "m.onnx", "fp16")
    with pytest.raises(error, match=message) as caught:
        build(model, tmp_path / "m.engine", settings)
    assert caught.value.remedy
    assert not (tmp_path / "m.engine").exists()


def test_an_unknown_gpu_lists_the_known_ones_and_the_jetson_remedy(tmp_path):
    with pytest.raises(BadInput) as caught:
        build(
            network(tmp_path / "m.onnx"),
            tmp_path / "m.engine",
            BuildSettings(RTX, compute_capabilities=("8.7",)),
        )
    assert "8.6, 8.9" in caught.value.remedy
    assert "built on the Jetson" in caught.value.remedy


def test_a_timing_cache_is_said_to_be_unused(tmp_path):
    cache = tmp_path / "cache"
    settings = BuildSettings(RTX, timing_cache=cache)
    record = build(network(tmp_path / "m.onnx"), tmp_path / "m.engine", settings)
    assert record["timing_cache"]["state"] == "unused"
    assert "ignores timing caches" in record["timing_cache"]["reason"]
    assert not cache.exists()


def test_an_engine_is_held_against_its_record(built, tmp_path):
    engine, record = built
    copy = tmp_path / "m.engine"
    beside = tmp_path / "m.engine.json"

    def restore(**changes):
        copy.write_bytes(engine.read_bytes())
        beside.write_text(json.dumps({**record, **changes}))

    restore()
    if find_gpu() is None:
        assert check_engine(copy) == record
    restore()
    copy.write_bytes(engine.read_bytes()[:-1000])
    size = record["engine"]["bytes"]
    with pytest.raises(BadInput, match=rf"truncated: {size - 1000} bytes, its record says {size}"):
        check_engine(copy)
    changed = bytearray(engine.read_bytes())
    changed[-1] ^= 1
    copy.write_bytes(changed)
    with pytest.raises(BadInput, match="not the one that its record describes"):
        check_engine(copy)
    restore(version="1.6.0.9")
    with pytest.raises(BadInput, match=r"built by tensorrt-rtx 1\.6\.0\.9 for SM 8\.6, 8\.9.*here"):
        check_engine(copy)
    restore(library="tensorrt")
    beside.write_text("{}")
    with pytest.raises(BadInput, match="not the record"):
        check_engine(copy)
    beside.unlink()
    assert check_engine(copy) is None
    with pytest.raises(BadInput, match="no such engine"):
        check_engine(tmp_path / "none.engine")


def test_the_engine_loads_and_is_inspected_on_a_gpu(tmp_path):
    gpu = find_gpu()
    if gpu is None:
        pytest.skip("no NVIDIA GPU with its driver: the inspector was never run")
    record = build(network(tmp_path / "m.onnx"), tmp_path / "m.engine", BuildSettings(RTX))
    assert record["inspected"], record["reason"]
    assert json.loads((tmp_path / "m.engine.layers.json").read_text())["layers"]


def test_the_commands_end_with_the_right_codes(tmp_path):
    model = network(tmp_path / "m.onnx")
    bad = network(tmp_path / "u8.onnx", "uint8")
    out = tmp_path / "out.json"
    done = edgerun(
        *("build", model, "--engine", tmp_path / "m.engine", "--library", RTX, "--sm", "8.6"),
        *("--sm", "8.9", "--shape", "image=1x1x8x8:1x1x8x8:8x1x8x8", "--json", out),
    )
    assert "for SM 8.6, 8.9" in done.stdout
    assert json.loads(out.read_text())["schema"] == "edgerun.build/1"
    done = edgerun("build", bad, "--engine", tmp_path / "b.engine", "--library", RTX, code=2)
    assert done.stdout == ""
    assert "does not take the model" in done.stderr
    done = edgerun("parse", bad, "--library", RTX, "--json", out)
    assert not json.loads(out.read_text())["supported"]
    done = edgerun(
        "build", model, "--engine", tmp_path / "none" / "m.engine", "--library", RTX, code=2
    )
    assert "a folder that does not exist" in done.stderr


@pytest.mark.parametrize("length", [244, 246, 252, 256])  # too long with .layers.json, .json, alone
def test_a_name_too_long_for_what_lies_beside_it_is_told_before_the_work(
    tmp_path, monkeypatch, length
):
    monkeypatch.setattr("edgerun.tensorrt.build.open_library", lambda name: 1 / 0)
    with pytest.raises(CannotWrite, match="File name too long"):
        build(tmp_path / "m.onnx", tmp_path / ("e" * length), BuildSettings(RTX))


def test_a_name_may_be_as_long_as_a_name_can_be(tmp_path):
    engine = tmp_path / ("e" * 243)
    build(network(tmp_path / "m.onnx"), engine, BuildSettings(RTX, compute_capabilities=("8.6",)))
    assert engine.stat().st_size > 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] == "e") == [
        engine.name,
        f"{engine.name}.json",
    ]


@pytest.mark.parametrize("option", ["engine", "cache"])
@pytest.mark.parametrize("name", ["pipe", "folder", "none/file"])
def test_a_file_that_cannot_stand_there_is_told_before_the_work(
    tmp_path, monkeypatch, option, name
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo("pipe")
    paths = {"engine": Path("m.engine"), "cache": None, option: Path(name)}
    monkeypatch.setattr("edgerun.tensorrt.build.open_library", lambda name: 1 / 0)
    with pytest.raises(BadInput, match=r"device or a pipe|a folder") as caught:
        build(Path("m.onnx"), paths["engine"], BuildSettings(RTX, timing_cache=paths["cache"]))
    assert caught.value.where == name
    assert Path("pipe").is_fifo()


def test_building_needs_no_other_runtime(tmp_path):
    # As on a Jetson with TensorRT and numpy alone; a module that cannot be imported stands before.
    for name in ("onnxruntime", "onnx", "torch"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name}', name={name!r})")
    model = network(tmp_path / "m.onnx")
    edgerun("build", model, "--engine", tmp_path / "m.engine", "--library", RTX, cwd=tmp_path)
    assert (tmp_path / "m.engine").stat().st_size > 0


@pytest.mark.parametrize("names", [("?", "?"), ("unk__3", "unk__3"), ("None", "?")])
def test_sides_that_an_exporter_did_not_name_may_differ(tmp_path, names):
    model = network(tmp_path / "m.onnx", sides=names)
    shapes = parse_ranges(["image=1x1x48x192:1x1x48x192:1x1x48x192"])
    settings = BuildSettings(RTX, compute_capabilities=("8.6",), shapes=shapes)
    record = build(model, tmp_path / "m.engine", settings)
    assert record["inputs"][0]["shape"] == ["batch", 1, None, None]
