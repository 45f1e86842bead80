"""Reading ONNX files of any origin: counts, shapes, and every way a file can be broken."""

import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from edgekd.errors import InputError
from edgekd.onnx.file import ENGINE_SUFFIXES, check_onnx, describe_onnx
from edgerun import files
from tests.onnx_builders import Graph, parse_onnx, save_external, save_onnx


@pytest.fixture
def linear(tmp_path):
    """x (batch, 4) @ w (4, 3) with an unused opset import of another domain."""
    domains = {"com.microsoft": 1, "ai.onnx.ml": 2}
    text = "(float[batch,4] x) => (float[] y) { y = MatMul (x, w) }"
    weights = {"w": np.ones((4, 3), np.float32)}
    return save_onnx(tmp_path / "linear.onnx", text, weights, opset=18, domains=domains)


def test_a_missing_output_shape_is_inferred_and_a_stale_opset_accepted(linear):
    check_onnx(linear)
    info = describe_onnx(linear)
    assert str(info.spec.inputs[0]) == "x float32[batch, 4]"
    assert str(info.spec.outputs[0]) == "y float32[batch, 3]"
    assert (info.parameters, info.opset) == (12, 18)


def test_weights_in_constants_and_subgraphs_are_counted(tmp_path):
    def ones(shape):
        return f"float{list(shape)} {{{', '.join(['1'] * math.prod(shape))}}}"

    def branch(name, size):
        return f"""{name}_g () => (float {name}) <float[2] {name}_i = {{1, 1}}> {{
            {name}_w = Constant <value = {ones([size])}> ()
            {name} = ReduceSum <keepdims = 0> ({name}_w)
        }}"""

    text = f"""(bool c) => (float z) {{
        w = Constant <value = {ones([5, 2])}> ()
        eps = Constant <value = float {{1}}> ()
        axes = Constant <value = int64[3] {{1, 1, 1}}> ()
        z = If (c) <then_branch = {branch("a", 7)}, else_branch = {branch("b", 11)}>
    }}"""
    weights = {"shape": np.ones(4, np.int64), "quantized": np.ones(6, np.int8)}
    path = save_onnx(tmp_path / "if.onnx", text, weights, opset=18)
    info = describe_onnx(path)
    assert info.parameters == (5 * 2) + 7 + 2 + 11 + 2 + 6
    assert str(info.spec.inputs[0]) == "c bool[]"


def test_nameless_dimensions_are_not_taken_for_one_another(tmp_path):
    model = parse_onnx("(float16 x) => (float16 y) { y = Identity (x) }")
    for value, shape in (
        (model.graph.input[0], ["-1", 3, "?", None]),
        (model.graph.output[0], ["n", 3, "?", "?"]),
    ):
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, TensorProto.FLOAT16, shape))
    onnx.save(model, tmp_path / "m.onnx")
    spec = describe_onnx(tmp_path / "m.onnx").spec
    assert spec.inputs[0].shape == ("x.0", 3, "x.2", "x.3")
    assert spec.outputs[0].shape == ("n", 3, "y.2", "y.3")
    assert spec.inputs[0].dtype == "float16"


def test_old_files_list_their_weights_as_inputs(linear):
    model = onnx.load(str(linear))
    model.ir_version = 3
    model.graph.input.append(onnx.helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3]))
    onnx.save(model, str(linear))
    assert [t.name for t in describe_onnx(linear).spec.inputs] == ["x"]


def test_an_output_that_is_no_tensor_is_refused(tmp_path):
    text = "(float[1] x) => (seq(float) y) { y = SequenceConstruct (x) }"
    path = save_onnx(tmp_path / "m.onnx", text)
    with pytest.raises(InputError, match="'y' is a sequence, not a tensor"):
        describe_onnx(path)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.6, 0.95])
def test_a_truncated_file_is_refused(linear, share):
    whole = linear.read_bytes()
    linear.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError) as caught:
        check_onnx(linear)
    assert str(linear) in str(caught.value)


def test_every_cut_is_refused_or_leaves_the_graph_whole(linear):
    """A cut between two fields at the end is still protobuf: nothing of the graph may be lost."""
    whole = linear.read_bytes()
    before = describe_onnx(linear)
    for length in range(len(whole)):
        linear.write_bytes(whole[:length])
        try:
            check_onnx(linear)
        except InputError:
            continue
        assert describe_onnx(linear).spec == before.spec
        assert describe_onnx(linear).parameters == before.parameters


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04 a zip file", b"\x80\x04\x95pickle", b"name: x\n", b"\x00" * 64]
)
def test_what_is_not_onnx_is_refused(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not ONNX"):
        check_onnx(path)


@pytest.mark.parametrize("name", ["m.engine", "m.PLAN", "m.trt"])
def test_an_engine_is_called_one(tmp_path, linear, name):
    path = tmp_path / name
    path.write_bytes(b"ftrt" + bytes(range(256)))
    with pytest.raises(InputError, match="this is a TensorRT engine, not an ONNX model"):
        check_onnx(path)
    # What is inside counts: a model may have any name.
    path.write_bytes(linear.read_bytes())
    check_onnx(path)


def test_engines_are_told_by_the_same_names_on_the_device():
    assert ENGINE_SUFFIXES == files.ENGINE_SUFFIXES


def test_missing_files_and_folders_are_told_apart(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        check_onnx(tmp_path / "m.onnx")
    with pytest.raises(InputError, match="folder"):
        check_onnx(tmp_path)


def test_a_graph_that_breaks_the_rules_is_refused(tmp_path):
    text = "(float[1] x) => (float[1] y) { y = NoSuchOperation (x) }"
    path = save_onnx(tmp_path / "m.onnx", text)
    with pytest.raises(InputError, match="NoSuchOperation"):
        check_onnx(path)


@pytest.fixture
def external(linear, tmp_path):
    """The linear model with its weights in a second file."""
    path = tmp_path / "apart" / "m.onnx"
    path.parent.mkdir()
    return save_external(linear, path, "weights.bin")


def located(path, location):
    model = onnx.load(str(path), load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(model.SerializeToString())


def test_external_data_counts_in_the_size(external):
    check_onnx(external)
    data = external.parent / "weights.bin"
    assert describe_onnx(external).size_bytes == external.stat().st_size + data.stat().st_size
    assert describe_onnx(external).parameters == 12


def test_missing_and_short_external_data_is_refused(external):
    data = external.parent / "weights.bin"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"'weights\.bin' is truncated"):
        check_onnx(external)
    data.unlink()
    with pytest.raises(InputError, match=r"'weights\.bin', which is missing"):
        check_onnx(external)


@pytest.mark.parametrize("location", ["../secret.bin", "a/../../secret.bin", "ABSOLUTE", ""])
def test_external_data_outside_the_models_folder_is_refused(external, tmp_path, location):
    secret = tmp_path / "secret.bin"
    secret.write_bytes(b"\0" * 100)
    located(external, str(secret) if location == "ABSOLUTE" else location)
    with pytest.raises(InputError, match="outside the model's folder"):
        check_onnx(external)


def test_a_link_out_of_the_folder_is_refused(external, tmp_path):
    secret = tmp_path / "secret.bin"
    secret.write_bytes(b"\0" * 100)
    (external.parent / "weights.bin").unlink()
    (external.parent / "weights.bin").symlink_to(secret)
    with pytest.raises(InputError, match="outside the model's folder"):
        check_onnx(external)


LOOP = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[2] x) => (float[2] y)
    <int64 m = {ROUNDS}, bool c = {1}>
    { y = Loop (m, c, x) <body = b (int64 i, bool go, float[2] a) => (bool on, float[2] o)
        { on = CONDITION o = Add (a, a) }> }
"""


@pytest.mark.parametrize(
    ("rounds", "condition", "ends"),
    [
        (2**62, "Identity (go)", False),
        (2**62, "Constant <value = bool {1}> ()", False),
        (2**62, "Not (go)", True),
        (1000, "Identity (go)", True),
    ],
)
def test_a_loop_that_never_ends_is_refused(tmp_path, rounds, condition, ends):
    text = LOOP.replace("ROUNDS", str(rounds)).replace("CONDITION", condition)
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    if ends:
        check_onnx(tmp_path / "m.onnx")
        return
    with pytest.raises(InputError, match=r"loop 'y' has 4,611,686,018,427,387,904 rounds"):
        check_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data.replace(b"Relu", b"Re\xff\xfe"), "is not UTF-8"),
        (lambda data: data.replace(b"inner", b"inn\xff\xfe"), "is not UTF-8"),
        (lambda data: data.replace(b"key", b"k\xff\xfe"), "is not UTF-8"),
    ],
)
def test_names_that_are_no_text_are_refused(tmp_path, change, says):
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17], metadata_props: ["key" : "b"]>
        g (float[2] x) => (float[2] y) { inner = Relu (x) y = Relu (inner) }""")
    (tmp_path / "m.onnx").write_bytes(change(model.SerializeToString()))
    with pytest.raises(InputError, match=says):
        describe_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("unknown", [-1, 255])
@pytest.mark.parametrize("place", ["weight", "constant", "input"])
def test_a_type_that_onnx_does_not_have_is_refused(tmp_path, unknown, place):
    text = "(float[2] x) => (float[2] y) { c = Constant <value = float {1}> () y = Mul (c, w) }"
    model = parse_onnx(text, {"w": np.ones(2, np.float32)})
    if place == "weight":
        model.graph.initializer[0].data_type = unknown
    elif place == "constant":
        model.graph.node[0].attribute[0].t.data_type = unknown
    else:
        model.graph.input[0].type.tensor_type.elem_type = unknown
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(InputError, match=f"the type {unknown}, which ONNX does not have"):
        describe_onnx(tmp_path / "m.onnx")


def test_functions_that_call_each_other_are_refused(tmp_path):
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        g (float[2] x) => (float[2] y) { y = own.f (x) }
        <domain: "own", opset_import: ["" : 17, "own" : 1]> f (a) => (b) { b = own.h (a) }
        <domain: "own", opset_import: ["" : 17, "own" : 1]> h (a) => (b) { b = own.f (a) }""")
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(InputError, match="calls itself"):
        describe_onnx(tmp_path / "m.onnx")


def test_a_graph_of_too_many_nodes_is_refused_soon(tmp_path):
    graph = Graph()
    for number in range(20_001):
        graph.add("Relu", [f"t{number}"], f"t{number + 1}", "n")
    graph.save(tmp_path / "m.onnx", {"t0": [2]}, {"t20001": [2]})
    with pytest.raises(InputError, match="20,001 nodes, more than 20,000"):
        describe_onnx(tmp_path / "m.onnx")


def test_external_data_at_an_impossible_name_is_refused(tmp_path):
    graph = Graph()
    graph.add("Add", ["x", graph.weight("w", 2)], "y")
    model = onnx.load(graph.save(tmp_path / "m.onnx", {"x": [2]}, {"y": [2]}))
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="w\0.bin")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="outside the model's folder"):
        check_onnx(tmp_path / "m.onnx")
