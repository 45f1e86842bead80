"""Estimated memory: the peak of a simulated execution with reference counts."""

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
from tests.command_line import python
from tests.onnx_builders import parse_onnx, save_onnx


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
    nodes, names = "", ["x"]
    for index in range(data.draw(st.integers(1, 12))):
        kind = data.draw(st.sampled_from(["Relu", "Concat", "ReduceSum", "Split", "Half"]))
        source, other = (data.draw(st.sampled_from(names)) for _ in range(2))
        out = f"t{index}"
        if kind == "Relu":
            nodes += f"{out} = Relu ({source})\n"
        elif kind == "Concat":
            nodes += f"{out} = Concat <axis = 0> ({source}, {other})\n"
        elif kind == "ReduceSum":
            nodes += f"{out} = ReduceMax <axes = [1], keepdims = 0> ({source})\n"
            nodes += f"{out}u = Unsqueeze ({out}, one)  {out}w = Tile ({out}u, wide)\n"
            out = f"{out}w"
        elif kind == "Split":
            nodes += f"{out}i = ArgMax <axis = 1> ({source})\n"  # dead, int64
            nodes += f"{out} = Neg ({source})\n"
        else:
            nodes += f"{out}h = Cast <to = 10> ({source})  {out} = Cast <to = 1> ({out}h)\n"
        names.append(out)
    shown = data.draw(st.lists(st.sampled_from(names[1:]), min_size=1, max_size=3, unique=True))
    outputs = ", ".join(f"float[] {name}" for name in shown)
    path = save_onnx(
        tmp_path_factory.mktemp("graph") / "m.onnx",
        f"(float[batch,6] x) => ({outputs}) {{ {nodes} }}",
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
    done = python(code, convnet)
    grown = [line.rsplit(" ", 1)[1] for line in done.stderr.splitlines() if "Total alloc" in line]
    if not grown:
        pytest.skip("this ONNX Runtime does not log its arena")
    estimate = estimate_memory(convnet, batch=batch)
    inside = estimate.activations_bytes - batch * 28 * 28 * 4  # the input is the caller's
    assert 0.5 < int(grown[-1]) / inside < 3


def test_a_branch_counts_inside_its_node_and_the_larger_one_decides(tmp_path):
    def branch(name, wide):
        return f"""{name} () => (float[] {name}_y) {{
            [{name}_concat] {name}_c = Concat <axis = 1> ({", ".join(["x"] * wide)})
            {name}_y = ReduceMax <axes = [1], keepdims = 1> ({name}_c)
        }}"""

    text = f"""(float[2,10] x) => (float[] y) {{
        s = ReduceSum <keepdims = 0> (x)
        yes = Greater (s, zero)
        [choose] y = If (yes) <then_branch = {branch("then", 2)},
                               else_branch = {branch("otherwise", 5)}>
    }}"""
    path = save_onnx(tmp_path / "if.onnx", text, {"zero": np.float32(0)})
    estimate = estimate_memory(path)
    # x 80, the condition 1, five times x 400 and its maximum 8; x is still read by no one else.
    assert estimate.activations_bytes == 80 + 1 + 400 + 8
    assert estimate.at_node.startswith("choose / ReduceMax")


def test_a_tensor_read_only_inside_a_branch_lives_until_it(tmp_path):
    text = f"""(float[25] x) => (float[] y) {{
        kept = Concat <axis = 0> (x, x)
        [large] large = Concat <axis = 0> ({", ".join(["x"] * 10)})
        s = ReduceSum <keepdims = 0> (large)
        yes = Greater (s, zero)
        y = If (yes) <then_branch = t () => (float[] t) {{ t = Identity (kept) }},
                      else_branch = e () => (float[] e) {{ e = Neg (kept) }}>
    }}"""
    path = save_onnx(tmp_path / "m.onnx", text, {"zero": np.float32(0)})
    # x, kept and large, and the sum while large is still there.
    assert estimate_memory(path).activations_bytes == 100 + 200 + 1000 + 4


def test_sizes_that_depend_on_values_and_open_sizes_are_listed(tmp_path):
    text = """(float[batch,time] x) => (float[] y)
    { where = NonZero (x)  y = Cast <to = 1> (where) }"""
    path = save_onnx(tmp_path / "m.onnx", text)
    assert estimate_memory(path).unknown == ("where", "x", "y")
    sized = estimate_memory(path, {"x": (2, 50)})
    assert sized.unknown == ("where", "y")
    assert sized.activations_bytes == 2 * 50 * 4
    assert sized.dimensions == {"batch": 2, "time": 50}


def test_four_bit_weights_take_half_a_byte(tmp_path):
    text = """(float[3] x) => (float[3] y) { d = DequantizeLinear (w, scale)  y = Add (x, d) }"""
    model = parse_onnx(text, {"scale": np.float32(1)}, opset=21, ir=10)
    model.graph.initializer.append(helper.make_tensor("w", TensorProto.INT4, [3], [1, 2, 3]))
    onnx.save(model, tmp_path / "m.onnx")
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
    path = save_onnx(tmp_path / "m.onnx", "(float[2,6] x) => (float[] z) { z = Relu (x) }")
    with pytest.raises(InputError, match=message):
        estimate_memory(path, shapes, batch)
