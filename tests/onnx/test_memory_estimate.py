"""Estimated memory: what a simulated execution with reference counts holds at most."""

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekd.config.networks import ModelConfig
from edgekd.errors import InputError
from edgekd.models.build import build_model
from edgekd.onnx.export import export_onnx
from edgekd.onnx.memory_estimate import estimate_memory
from edgekd.spec import TensorSpec

FLOAT = TensorProto.FLOAT
node = helper.make_node


def save(path, nodes, inputs, outputs, weights=(), opset=17):
    """``inputs`` and ``outputs``: (name, element type, shape)."""
    declared = [[helper.make_tensor_value_info(*v) for v in side] for side in (inputs, outputs)]
    held = [numpy_helper.from_array(value, name) for name, value in dict(weights).items()]
    graph = helper.make_graph(nodes, "g", *declared, held)
    opsets = [helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(path))
    return path


@pytest.fixture(scope="module")
def convnet(tmp_path_factory):
    path = tmp_path_factory.mktemp("convnet") / "convnet.onnx"
    image, logits = TensorSpec("image", ("batch", 1, 28, 28)), TensorSpec("logits", ("batch", 10))
    model = build_model(ModelConfig(model="convnet-s"), [image], [logits]).eval()
    export_onnx(model, path)
    return path


def simulated_peak(path, feeds):
    """Run the model with every tensor shown, then replay it: free what nobody will read again."""
    model = onnx.load(str(path))
    graph = model.graph
    asked = {value.name for value in graph.output}
    made = [name for n in graph.node for name in n.output]
    kinds = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in [*kinds.value_info, *kinds.output]}
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    for name in made:
        if name not in asked:
            value = helper.make_tensor_value_info(name, types[name], None)
            shown.graph.output.append(value)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        shown.SerializeToString(), options, ["CPUExecutionProvider"]
    )
    values = dict(zip(made, session.run(made, feeds), strict=True))
    bytes_of = {name: np.asarray(value).nbytes for name, value in (values | feeds).items()}
    waiting = dict.fromkeys(bytes_of, 0)
    for n in graph.node:
        for name in n.input:
            if name in waiting:
                waiting[name] += 1
    for name in [*asked, *feeds]:
        waiting[name] += 1
    held = sum(bytes_of[name] for name in feeds)
    peak = held
    for n in graph.node:
        held += sum(bytes_of[name] for name in n.output)
        peak = max(peak, held)
        for name in n.input:
            if name in waiting:
                waiting[name] -= 1
                if waiting[name] == 0:
                    held -= bytes_of[name]
        held -= sum(bytes_of[name] for name in n.output if waiting[name] == 0)
    return peak, sum(numpy_helper.to_array(tensor).nbytes for tensor in graph.initializer)


@pytest.mark.parametrize("batch", [1, 7])
def test_the_exported_convnet_holds_what_a_simulated_run_holds(convnet, batch):
    feeds = {"image": np.zeros((batch, 1, 28, 28), np.float32)}
    estimate = estimate_memory(convnet, batch=batch)
    assert (estimate.activations_bytes, estimate.weights_bytes) == simulated_peak(convnet, feeds)
    assert sum(estimate.alive.values()) == estimate.activations_bytes
    assert estimate_memory(convnet, {"image": (batch, 1, 28, 28)}) == estimate
    assert not estimate.unknown


@settings(max_examples=25)
@given(st.data())
def test_any_graph_holds_what_a_simulated_run_holds(tmp_path_factory, data):
    """Random graphs of growing, shrinking, dead, twice used and shown tensors of three types."""
    nodes, names = [], ["x"]
    for index in range(data.draw(st.integers(1, 12))):
        kind = data.draw(st.sampled_from(["Relu", "Concat", "ReduceSum", "Split", "Half"]))
        source, other = (data.draw(st.sampled_from(names)) for _ in range(2))
        out = f"t{index}"
        if kind == "Relu":
            nodes.append(node("Relu", [source], [out]))
        elif kind == "Concat":
            nodes.append(node("Concat", [source, other], [out], axis=0))
        elif kind == "ReduceSum":
            nodes.append(node("ReduceMax", [source], [out], axes=[1], keepdims=0))
            nodes.append(node("Unsqueeze", [out, "one"], [f"{out}u"]))
            nodes.append(node("Tile", [f"{out}u", "wide"], [f"{out}w"]))
            out = f"{out}w"
        elif kind == "Split":
            nodes.append(node("ArgMax", [source], [f"{out}i"], axis=1))  # dead, int64
            nodes.append(node("Neg", [source], [out]))
        else:
            nodes.append(node("Cast", [source], [f"{out}h"], to=TensorProto.FLOAT16))
            nodes.append(node("Cast", [f"{out}h"], [out], to=FLOAT))
        names.append(out)
    shown = data.draw(st.lists(st.sampled_from(names[1:]), min_size=1, max_size=3, unique=True))
    path = save(
        tmp_path_factory.mktemp("graph") / "m.onnx",
        nodes,
        [("x", FLOAT, ["batch", 6])],
        [(name, FLOAT, None) for name in shown],
        {"one": np.array([1]), "wide": np.array([1, 6])},
    )
    estimate = estimate_memory(path, batch=3)
    peak, weights = simulated_peak(path, {"x": np.zeros((3, 6), np.float32)})
    assert estimate.activations_bytes == peak
    assert estimate.weights_bytes == weights
    assert not estimate.unknown


def test_the_runtimes_arena_is_of_the_same_order(convnet):
    """ONNX Runtime logs how far its arena grew. It fuses (less) and grows by doubling (more)."""
    batch = 512
    code = (
        "import sys, numpy as np, onnxruntime as o\n"
        "options = o.SessionOptions()\n"
        "options.log_severity_level, options.intra_op_num_threads = 0, 1\n"
        "o.set_default_logger_severity(0)\n"
        "s = o.InferenceSession(sys.argv[1], options, ['CPUExecutionProvider'])\n"
        f"s.run(None, {{'image': np.zeros(({batch}, 1, 28, 28), np.float32)}})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(convnet)], capture_output=True, text=True, check=True
    )
    grown = [line.rsplit(" ", 1)[1] for line in done.stderr.splitlines() if "Total alloc" in line]
    if not grown:
        pytest.skip("this ONNX Runtime does not log its arena")
    estimate = estimate_memory(convnet, batch=batch)
    inside = estimate.activations_bytes - batch * 28 * 28 * 4  # the input is the caller's
    assert 0.5 < int(grown[-1]) / inside < 3


def test_a_branch_counts_inside_its_node_and_the_larger_one_decides(tmp_path):
    def branch(name, wide):
        outs = [helper.make_tensor_value_info(f"{name}_y", FLOAT, None)]
        parts = [node("Concat", ["x"] * wide, [f"{name}_c"], axis=1, name=f"{name}_concat")]
        parts.append(node("ReduceMax", [f"{name}_c"], [f"{name}_y"], axes=[1], keepdims=1))
        return helper.make_graph(parts, name, [], outs)

    nodes = [
        node("ReduceSum", ["x"], ["s"], keepdims=0),
        node("Greater", ["s", "zero"], ["yes"]),
        node("If", ["yes"], ["y"], name="choose", then_branch=branch("then", 2),
             else_branch=branch("otherwise", 5)),
    ]  # fmt: skip
    path = save(
        tmp_path / "if.onnx", nodes, [("x", FLOAT, [2, 10])], [("y", FLOAT, None)],
        {"zero": np.float32(0).reshape(())},
    )  # fmt: skip
    estimate = estimate_memory(path)
    # x 80, the condition 1, five times x 400 and its maximum 8; x is still read by no one else.
    assert estimate.activations_bytes == 80 + 1 + 400 + 8
    assert estimate.at_node.startswith("choose / ReduceMax")


def test_a_tensor_read_only_inside_a_branch_lives_until_it(tmp_path):
    value = helper.make_tensor_value_info
    same = helper.make_graph(
        [node("Identity", ["kept"], ["t"])], "t", [], [value("t", FLOAT, None)]
    )
    other = helper.make_graph([node("Neg", ["kept"], ["e"])], "e", [], [value("e", FLOAT, None)])
    nodes = [
        node("Concat", ["x", "x"], ["kept"], axis=0),
        node("Concat", ["x"] * 10, ["large"], axis=0, name="large"),
        node("ReduceSum", ["large"], ["s"], keepdims=0),
        node("Greater", ["s", "zero"], ["yes"]),
        node("If", ["yes"], ["y"], then_branch=same, else_branch=other),
    ]
    path = save(tmp_path / "m.onnx", nodes, [("x", FLOAT, [25])], [("y", FLOAT, None)],
                {"zero": np.float32(0).reshape(())})  # fmt: skip
    # x, kept and large, and the sum while large is still there.
    assert estimate_memory(path).activations_bytes == 100 + 200 + 1000 + 4


def test_sizes_that_depend_on_values_and_open_sizes_are_listed(tmp_path):
    nodes = [node("NonZero", ["x"], ["where"]), node("Cast", ["where"], ["y"], to=FLOAT)]
    path = save(tmp_path / "m.onnx", nodes, [("x", FLOAT, ["batch", "time"])], [("y", FLOAT, None)])
    assert estimate_memory(path).unknown == ("where", "x", "y")
    sized = estimate_memory(path, {"x": (2, 50)})
    assert sized.unknown == ("where", "y")
    assert sized.activations_bytes == 2 * 50 * 4
    assert sized.dimensions == {"batch": 2, "time": 50}


def test_four_bit_weights_take_half_a_byte(tmp_path):
    packed = helper.make_tensor("w", TensorProto.INT4, [3], [1, 2, 3])
    graph = helper.make_graph(
        [node("DequantizeLinear", ["w", "scale"], ["d"]), node("Add", ["x", "d"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, [3])],
        [helper.make_tensor_value_info("y", FLOAT, [3])],
        [packed, numpy_helper.from_array(np.float32(1), "scale")],
    )
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(
        helper.make_model(graph, opset_imports=opsets, ir_version=10), str(tmp_path / "m.onnx")
    )
    assert estimate_memory(tmp_path / "m.onnx").weights_bytes == 2 + 4


@pytest.mark.parametrize(
    ("shapes", "batch", "message"),
    [
        ({"y": (1, 6)}, None, "there is no input 'y'"),
        ({"x": (1, 5)}, None, "1x5 does not fit"),
        ({"x": (6,)}, None, "does not fit"),
        ({}, 4, "built for batch size 2, not 4"),
    ],
)
def test_sizes_that_contradict_the_model_are_errors(tmp_path, shapes, batch, message):
    path = save(
        tmp_path / "m.onnx", [node("Relu", ["x"], ["z"])], [("x", FLOAT, [2, 6])],
        [("z", FLOAT, None)],
    )  # fmt: skip
    with pytest.raises(InputError, match=message):
        estimate_memory(path, shapes, batch)
