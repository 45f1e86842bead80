"""16-bit models: their outputs, what stays in float32, and that nothing overflows silently.

Bounds are worked out from u, the roundoff of the type (half its eps): storing a number x costs at
most u·|x|.
"""

import math
import weakref
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from edgekd.config.networks import ModelConfig
from edgekd.errors import InputError, StageError
from edgekd.models.build import build_model
from edgekd.onnx.export import export_onnx
from edgekd.onnx.file import describe_onnx
from edgekd.onnx.samples import ArraySamples
from edgekd.quantization import mixed_precision
from edgekd.quantization.mixed_precision import convert_mixed_precision
from edgekd.quantization.mixed_precision_graph import rounded
from edgekd.quantization.mixed_precision_rules import LOW_TYPES
from edgekd.spec import ModelSpec, TensorSpec
from tests.onnx_builders import parse_onnx

U = {"fp16": 2.0**-11, "bf16": 2.0**-8}
NORMAL = {"fp16": 2.0**-14, "bf16": 2.0**-126}
TYPE = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
KINDS = pytest.mark.parametrize("kind", ["fp16", "bf16"])
F = TensorProto.FLOAT


def save(path, text, **weights):
    """Opset 18; a node without a name has its operation's, weights are float32 or integers."""
    arrays = {name: np.asarray(value) for name, value in weights.items()}
    arrays = {n: a.astype(np.float32) if a.dtype == float else a for n, a in arrays.items()}
    model = parse_onnx(text, arrays, opset=18, ir=10)
    for node in model.graph.node:
        node.name = node.name or node.op_type
    onnx.save(model, str(path))
    return path


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run(model, optimization="ORT_ENABLE_ALL", **feeds):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    level = getattr(onnxruntime.GraphOptimizationLevel, optimization)
    options.graph_optimization_level = level
    content = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def answers(path, kind, **feeds):
    """float16 by ONNX Runtime; bfloat16, which it lacks, in float32 with every tensor rounded."""
    if kind == "fp16":
        return run(path, **feeds)  # drops casts between nodes: rounds less often, never more
    return run(rounded(onnx.load(str(path)), LOW_TYPES[kind])[0], "ORT_DISABLE_ALL", **feeds)


def types_of(path):
    """Element type by tensor name, of everything in the main graph."""
    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)), check_type=True)
    graph = model.graph
    types = {t.name: t.data_type for t in graph.initializer}
    values = (*graph.input, *graph.output, *graph.value_info)
    return types | {v.name: v.type.tensor_type.elem_type for v in values}


def parsed_by_tensorrt(path):
    trt = pytest.importorskip("tensorrt_rtx", reason="the extra 'rtx' is not installed")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(path.read_bytes()):
        return [parser.get_error(i).desc() for i in range(parser.num_errors)]
    return {network.get_layer(i).get_output(0).dtype.name for i in range(network.num_layers)}


class Torch(nn.Module):
    def __init__(self, net, inputs, outputs):
        super().__init__()
        self.net, self.spec = net, ModelSpec((inputs,), (outputs,))

    def forward(self, batch):
        (value,) = batch.values()
        return {self.spec.outputs[0].name: self.net(value)}


@pytest.fixture(scope="module")
def convnet(tmp_path_factory):
    torch.manual_seed(0)
    inputs = (TensorSpec("image", ("batch", 1, 28, 28)),)
    outputs = (TensorSpec("logits", ("batch", 10)),)
    model = build_model(ModelConfig(model="convnet-s"), inputs, outputs)
    path = tmp_path_factory.mktemp("convnet") / "convnet.onnx"
    export_onnx(model, path, metadata={"labels": "a,b"})
    return path


@KINDS
def test_a_convnet_errs_less_than_roundoff_allows_and_is_half_as_large(convnet, tmp_path, kind):
    image = normal(9, 1, 28, 28)
    out = tmp_path / "half.onnx"
    found = convert_mixed_precision(convnet, out, kind, samples=ArraySamples({"image": image}))
    # Every path from an input or weight to a logit meets at most three roundings a layer (its
    # input, weight and result), and one more at each border. Replacing all by their magnitudes
    # bounds each sum of products; numbers below the smallest normal one err by at most u times it.
    model = onnx.load(str(convnet))
    layers = len(model.graph.node)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(
                numpy_helper.from_array(np.abs(array) + np.float32(NORMAL[kind]), tensor.name)
            )
    (magnitude,) = run(model, image=np.abs(image) + NORMAL[kind])
    bound = ((1 + U[kind]) ** (3 * layers + 2) - 1) * magnitude
    (reference,) = run(convnet, image=image)
    (got,) = answers(out, kind, image=image)
    assert np.all(np.abs(got - reference) <= bound)
    assert 0 < found.max_difference <= bound.max()
    assert not found.kept
    assert found.size_bytes == out.stat().st_size
    before, after = describe_onnx(convnet), describe_onnx(out)
    assert (after.spec, after.metadata) == (before.spec, before.metadata)
    # The graph itself (names, shapes) is not halved; the weights are.
    assert (
        2 * before.parameters <= found.size_bytes <= found.float_bytes - 2 * before.parameters * 0.9
    )
    assert answers(out, kind, image=image[:1])[0].shape == (1, 10)


@KINDS
def test_tensorrt_takes_the_convnet_as_strongly_typed(convnet, tmp_path, kind):
    convert_mixed_precision(convnet, tmp_path / "half.onnx", kind)
    assert {"HALF" if kind == "fp16" else "BF16"} <= parsed_by_tensorrt(tmp_path / "half.onnx")


@KINDS
def test_inputs_and_outputs_become_16_bits_when_asked(convnet, tmp_path, kind):
    out = tmp_path / "half.onnx"
    info_ = convert_mixed_precision(convnet, out, kind, keep_io=False)
    model = onnx.load(str(out))
    values = (*model.graph.input, *model.graph.output)
    assert [v.name for v in values] == ["image", "logits"]
    assert [v.type.tensor_type.elem_type for v in values] == [TYPE[kind]] * 2
    assert not [n for n in model.graph.node if n.op_type == "Cast"]
    assert info_.max_difference is None


class Attention(nn.Module):
    """One head with residuals and norms; each operation's result is noted, as each is rounded."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.ParameterList(nn.Parameter(torch.randn(16, 16) / 4) for _ in range(3))
        self.out = nn.Parameter(torch.randn(96, 3) / 10)
        self.noted = None

    def note(self, value):
        if self.noted is not None:
            value.retain_grad()
            self.noted.append(value)
        return value

    def forward(self, tokens):
        x = self.note(self.embed(tokens))
        y = self.note(self.norm(x))
        q, k, v = (self.note(y @ w) for w in self.qkv)
        scores = self.note(self.note(q @ k.transpose(1, 2)) * 0.25)
        mixed = self.note(self.note(scores.softmax(-1)) @ v)
        x = self.note(x + mixed)
        return self.note(x.flatten(1) @ self.out)


def first_order(module, net, value, u):
    """Σ |∂y/∂t|·u·|t| over the weights and noted tensors t, for each element of y = net(value)."""
    bounds = []
    size = net(value).numel()
    for element in range(size):
        module.zero_grad()
        module.noted = []
        net(value).reshape(-1)[element].backward()
        tensors = [*module.parameters(), *module.noted]
        bounds.append(
            sum(float((t.grad * t).detach().abs().sum()) for t in tensors if t.grad is not None)
        )
    module.noted = None
    return u * np.array(bounds)


@pytest.fixture(scope="module")
def attention(tmp_path_factory):
    torch.manual_seed(0)
    net = Attention().eval()
    path = tmp_path_factory.mktemp("attention") / "attention.onnx"
    tokens = TensorSpec("tokens", ("batch", 6), "int64")
    export_onnx(Torch(net, tokens, TensorSpec("logits", ("batch", 3))), path)
    return SimpleNamespace(net=net, path=path)


@KINDS
def test_attention_errs_less_than_its_gradients_allow(attention, tmp_path, kind):
    tokens = np.random.default_rng(1).integers(0, 40, (2, 6))
    out = tmp_path / "half.onnx"
    found = convert_mixed_precision(
        attention.path, out, kind, samples=ArraySamples({"tokens": tokens})
    )
    low = {n.op_type for n in onnx.load(str(out)).graph.node if n.name in found.low}
    assert {"Softmax", "LayerNormalization", "MatMul", "Gather"} <= low
    (reference,) = run(attention.path, tokens=tokens)
    (got,) = answers(out, kind, tokens=tokens)
    bound = first_order(attention.net, attention.net, torch.from_numpy(tokens), U[kind])
    assert np.all(np.abs(got - reference).ravel() <= bound)
    assert types_of(out)["tokens"] == TensorProto.INT64
    assert isinstance(parsed_by_tensorrt(out), set)


@pytest.mark.parametrize("seed", range(6))
@KINDS
def test_any_choice_of_kept_nodes_gives_a_graph_of_right_types(attention, tmp_path, kind, seed):
    names = convert_mixed_precision(attention.path, tmp_path / "all.onnx", kind).low
    keep = set(np.random.default_rng(seed).choice(names, len(names) // 2, replace=False).tolist())
    out = tmp_path / "half.onnx"
    found = convert_mixed_precision(attention.path, out, kind, keep=keep, keep_io=seed % 2 == 0)
    assert keep <= found.kept.keys()
    assert not keep & set(found.low)
    types = types_of(out)
    model = onnx.load(str(out))
    casts = []
    for each in model.graph.node:
        touched = {types[v] for v in (*each.input, *each.output) if v}
        if each.name in found.kept:
            assert not touched & {TYPE[kind]}, each.name
        elif each.name in found.low:
            assert not touched & {F}, each.name
        elif each.op_type == "Cast":
            casts.append(each.input[0])
    assert len(casts) == len(set(casts))  # a tensor is cast once, whoever needs it
    tokens = np.random.default_rng(1).integers(0, 40, (2, 6))
    (reference,) = run(attention.path, tokens=tokens)
    (got,) = answers(out, kind, tokens=tokens)
    bound = first_order(attention.net, attention.net, torch.from_numpy(tokens), U[kind])
    # Twice: at a border between the types a value that was never rounded may be.
    assert np.all(np.abs(got - reference).ravel() <= 2 * bound)


@KINDS
def test_an_lstm_errs_less_than_its_gradients_allow(tmp_path, kind):
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.noted = nn.LSTM(5, 4, batch_first=True), None

        def forward(self, x):
            if self.noted is None:
                return self.lstm(x)[0]
            x = x.clone().requires_grad_()
            y = self.lstm(x)[0]
            y.retain_grad()
            self.noted = [x, y]
            return y

    net = Net().eval()
    x = torch.randn(2, 4, 5)
    source, out = tmp_path / "lstm.onnx", tmp_path / "half.onnx"
    sequence = TensorSpec("x", ("batch", 4, 5))
    export_onnx(Torch(net, sequence, TensorSpec("y", ("batch", 4, 4))), source)
    feeds = {"x": x.numpy()}
    found = convert_mixed_precision(source, out, kind, samples=ArraySamples(feeds))
    low = [n.op_type for n in onnx.load(str(out)).graph.node if n.name in found.low]
    assert "LSTM" in low
    bound = first_order(net, net, x, U[kind]).reshape(2, 4, 4)
    (reference,), (got,) = run(source, **feeds), answers(out, kind, **feeds)
    # Runtimes keep an LSTM's state in float32 or round it each step; here it is in float32.
    assert np.all(np.abs(got - reference) <= bound)


def test_bfloat16_agrees_with_onnx_reference_evaluator(tmp_path):
    a, b = normal(6, 8), normal(8, 3, seed=1)
    text = """(float[n,6] x) => (float[n,3] y)
    { h = MatMul (x, a)  r = Relu (h)  [last] y = MatMul (r, b) }"""
    path = save(tmp_path / "m.onnx", text, a=a, b=b)
    convert_mixed_precision(path, tmp_path / "half.onnx", "bf16")
    x = normal(2, 6, seed=2)
    (got,) = ReferenceEvaluator(str(tmp_path / "half.onnx")).run(None, {"x": x})
    assert got.dtype == np.float32
    # Its products are added up in bfloat16: a rounding for each term besides the three of a layer.
    bound = ((1 + U["bf16"]) ** (6 + 8 + 2 * 4) - 1) * (np.abs(x) @ np.abs(a) @ np.abs(b))
    assert np.all(np.abs(got - np.maximum(x @ a, 0) @ b) <= bound)


@KINDS
def test_bodies_stay_in_float32_and_take_what_they_capture_in_float32(tmp_path, kind):
    text = """(float[n,4] x, bool c) => (float[n,4] y, float[n,4] k) {
        h = Relu (x)
        z = If (c) <then_branch = yes () => (float[] a) { a = Mul (h, s) },
                    else_branch = no () => (float[] b) { b = Add (h, s) }>
        y = MatMul (z, w)
        [scaled] k = Mul (h, s)
    }"""
    path = save(tmp_path / "m.onnx", text, w=np.eye(4), s=[0.1])
    out = tmp_path / "half.onnx"
    found = convert_mixed_precision(path, out, kind)
    assert "kept in float32 completely" in found.kept["If"]
    assert set(found.low) == {"Relu", "MatMul", "scaled"}
    x = normal(3, 4)
    for condition in (True, False):
        got = answers(out, kind, x=x, c=np.array(condition))
        h = np.maximum(x, 0)
        z = h * 0.1 if condition else h + np.float32(0.1)
        # x and z are rounded once each, the results once; the body itself is exact.
        assert np.all(np.abs(got[0] - z) <= ((1 + U[kind]) ** 3 - 1) * np.abs(z))
    types = types_of(out)
    assert types["s"] == F  # what the body takes; the other node has its own copy
    assert sorted(types[n] for n in types if n.startswith("s")) == sorted([F, TYPE[kind]])


@KINDS
def test_weights_in_constants_are_stored_in_16_bits(tmp_path, kind):
    w = normal(64, 64)
    path = tmp_path / "m.onnx"
    model = parse_onnx("""(float[n,64] x) => (float[n,64] y) {
        w = Constant ()
        s = Constant <value_float = 0.5> ()
        h = MatMul (x, w)
        y = Mul (h, s)
    }""", opset=18)  # fmt: skip
    model.graph.node[0].attribute.add(name="value", type="TENSOR", t=numpy_helper.from_array(w))
    onnx.save(model, path)
    convert_mixed_precision(path, tmp_path / "half.onnx", kind)
    stored = {t.name: t for t in onnx.load(str(tmp_path / "half.onnx")).graph.initializer}
    assert {t.data_type for t in stored.values()} == {TYPE[kind]}
    back = numpy_helper.to_array(stored["w"]).astype(np.float32)
    assert np.all(np.abs(back - w) <= U[kind] * np.abs(w) + U[kind] * NORMAL[kind])


@pytest.fixture
def loud(tmp_path):
    """x (n, 2) → ·10⁵ → relu → ·10⁻⁵: the output is relu(x), through activations of 10⁵."""
    text = """(float[n,2] x) => (float[n,2] y) {
        [up1] h = MatMul (x, a)
        [up2] k = MatMul (h, b)
        [between] r = Relu (k)
        [down1] m = MatMul (r, c)
        [down2] y = MatMul (m, d)
    }"""
    eye = np.eye(2)
    scales = {"a": 1e3, "b": 1e2, "c": 1e-2, "d": 1e-3}
    return save(tmp_path / "loud.onnx", text, **{name: eye * s for name, s in scales.items()})


def test_activations_beyond_the_range_are_found_and_stay_in_float32(loud, tmp_path):
    out = tmp_path / "half.onnx"
    x = np.array([[1.0, -2.0], [3.0, 0.5], [0.1, 1.7]], np.float32)
    found = convert_mixed_precision(loud, out, "fp16", samples=ArraySamples({"x": x}))
    assert set(found.kept) == {"up2", "between", "down1"}
    assert "3e+05 on the samples" in found.kept["up2"]
    (got,) = run(out, x=x)
    # Five values and four weights on the path, each rounded at most once.
    assert np.all(np.abs(got - np.maximum(x, 0)) <= ((1 + U["fp16"]) ** 9 - 1) * np.abs(x))
    assert found.max_difference >= np.abs(got - run(loud, x=x)[0]).max()
    assert found.max_difference <= ((1 + U["fp16"]) ** 9 - 1) * np.abs(x).max()
    # bfloat16 has the range of float32.
    assert not convert_mixed_precision(loud, out, "bf16", samples=ArraySamples({"x": x})).kept


@pytest.mark.parametrize("kept", [(), ("up2",)])
def test_an_overflow_names_the_first_node_and_is_not_written(loud, tmp_path, monkeypatch, kept):
    monkeypatch.setattr(
        mixed_precision, "_ranges", lambda *_: {}
    )  # as if the samples had shown nothing
    samples = ArraySamples({"x": np.full((2, 2), 3, np.float32)})
    out = tmp_path / "half.onnx"
    with pytest.raises(StageError) as caught:
        convert_mixed_precision(loud, out, "fp16", samples=samples, keep=kept)
    # Kept alone, its float32 output overflows in the cast for the node that takes it.
    assert f"--keep {'between' if kept else 'up2'}" in str(caught.value)
    assert not out.exists()
    convert_mixed_precision(loud, out, "fp16", samples=samples, keep=("up2", "between", "down1"))
    np.testing.assert_allclose(run(out, x=np.full((2, 2), 3, np.float32))[0], 3, rtol=9 * U["fp16"])


def test_weights_beyond_the_range_never_become_infinite(tmp_path):
    w = np.array([[1e6, 0.0], [0.0, -70000.0]], np.float32)
    text = """(float[n,2] x) => (float[n,2] y) {
        [first] x2 = MatMul (x, z)
        [large] h = MatMul (x2, w)
        [next] y = MatMul (h, v)
    }"""
    path = save(tmp_path / "m.onnx", text, w=w, v=np.eye(2) * 1e-4, z=np.eye(2))
    out = tmp_path / "half.onnx"
    found = convert_mixed_precision(path, out, "fp16")
    assert "'w' reaches 1e+06" in found.kept["large"]
    assert "'large'" in found.kept["next"]  # its input is as large
    assert found.low == ("first",)
    for tensor in onnx.load(str(out)).graph.initializer:
        assert np.all(np.isfinite(numpy_helper.to_array(tensor).astype(np.float32)))
    x = normal(5, 2)
    exact = x @ w @ (np.eye(2, dtype=np.float32) * 1e-4)
    (got,) = run(out, x=x)
    assert np.all(np.abs(got - exact) <= ((1 + U["fp16"]) ** 3 - 1) * np.abs(exact))
    # On samples that show that the result is small, the next node may be converted.
    tiny = ArraySamples({"x": x * 1e-3})
    assert "large" in convert_mixed_precision(path, out, "fp16", samples=tiny).kept


def test_a_mask_of_the_smallest_float_keeps_fully_masked_rows_from_nan(tmp_path):
    lowest = np.finfo(np.float32).min
    text = """(float[n,4] x, float[n,4] m) => (float[n,4] y) {
        s = MatMul (x, w)
        inverse = Sub (one, m)
        bias = Mul (inverse, lowest)
        masked = Add (s, bias)
        p = Softmax (masked)
        [mix] y = MatMul (p, w)
    }"""
    path = save(tmp_path / "m.onnx", text, w=np.eye(4), one=[1.0], lowest=[float(lowest)])
    x, mask = normal(2, 4), np.array([[1, 1, 0, 1], [0, 0, 0, 0]], np.float32)
    for kind in ("fp16", "bf16"):  # it rounds to −∞ in bfloat16 too
        found = convert_mixed_precision(path, tmp_path / "half.onnx", kind)
        assert {"Mul", "Add", "Softmax"} <= found.kept.keys()
        assert "mix" in found.low
        (got,) = answers(tmp_path / "half.onnx", kind, x=x, m=mask)
        (reference,) = run(path, x=x, m=mask)
        # A score of at most 3 errs by 3u·3, which is its probability's relative error; two more.
        assert np.all(np.abs(got - reference) <= 1.1 * (2 * 9 + 3) * U[kind])


@KINDS
def test_a_weight_shared_with_a_float32_node_stays_exact_there(tmp_path, kind):
    w = normal(3, 3) / 3
    text = """(float[n,3] x) => (float[n,3] a, float[n,3] b)
    { [low] a = MatMul (x, w)  [high] b = MatMul (x, w) }"""
    path = save(tmp_path / "m.onnx", text, w=w)
    convert_mixed_precision(path, tmp_path / "half.onnx", kind, keep=("high",))
    x = normal(4, 3)
    got, reference = answers(tmp_path / "half.onnx", kind, x=x), run(path, x=x)
    np.testing.assert_array_equal(got[1], reference[1])
    assert np.abs(got[0] - reference[0]).max() > 0
    assert np.all(np.abs(got[0] - reference[0]) <= 3.1 * U[kind] * (np.abs(x) @ np.abs(w)))


@KINDS
@pytest.mark.parametrize("keep_io", [True, False])
def test_outputs_that_are_also_taken_and_inputs_that_both_take(tmp_path, kind, keep_io):
    # a is an output and taken by both; c is one of a float32 node, taken by a low one.
    text = """(float[n,3] x) => (float[n,3] a, float[n,3] b, float[n,3] c, float[n,3] d) {
        [low] a = Relu (x)
        [low2] b = Neg (a)
        [high] c = Mul (a, x)
        [low3] d = Sigmoid (c)
    }"""
    path = save(tmp_path / "m.onnx", text)
    out = tmp_path / "half.onnx"
    convert_mixed_precision(path, out, kind, keep=("high",), keep_io=keep_io)
    model = onnx.load(str(out))
    assert [v.name for v in (*model.graph.input, *model.graph.output)] == list("xabcd")
    wanted = F if keep_io else TYPE[kind]
    assert {types_of(out)[name] for name in "xabcd"} == {wanted}
    x = normal(2, 3)
    fed = x.astype(np.float16) if kind == "fp16" and not keep_io else x
    got, reference = answers(out, kind, x=fed), run(path, x=x)
    for ours, theirs in zip(got, reference, strict=True):
        # At most four values are rounded on the path to any of them, and x·x has two of them.
        bound = ((1 + U[kind]) ** 5 - 1) * np.maximum(np.abs(theirs), NORMAL[kind])
        assert np.all(np.abs(ours.astype(np.float32) - theirs) <= bound)


def test_squares_in_a_norm_written_out_do_not_overflow(tmp_path):
    text = """(float[n,8] x) => (float[n,8] y) {
        h = MatMul (x, w)
        [square] q = Mul (h, h)
        v = ReduceMean (q, axes)
        e = Add (v, eps)
        r = Sqrt (e)
        y = Div (h, r)
    }"""
    path = save(tmp_path / "m.onnx", text, w=np.eye(8), eps=[1e-12], axes=[-1])
    x = 2000 * normal(3, 8)  # squares of 4·10⁶
    found = convert_mixed_precision(path, tmp_path / "half.onnx", "fp16")
    assert {"square", "ReduceMean", "Add", "Sqrt"} <= found.kept.keys()
    assert "Div" in found.low
    (got,) = run(tmp_path / "half.onnx", x=x)
    exact = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
    # x, its product with w, the root and the quotient are rounded; the root errs like its terms.
    assert np.all(np.abs(got - exact) <= ((1 + U["fp16"]) ** 7 - 1) * np.abs(exact))


def test_an_epsilon_below_the_type_keeps_its_node(tmp_path):
    text = "(float[n] x) => (float[n] y) { [safe] s = Add (x, eps)  y = Div (x, s) }"
    path = save(tmp_path / "m.onnx", text, eps=[1e-8])
    found = convert_mixed_precision(path, tmp_path / "half.onnx", "fp16")
    assert "1e-08" in found.kept["safe"]


def test_angles_of_positions_are_not_rounded(tmp_path):
    """Rotary angles: cos(position · frequency) for positions that 16 bits do not distinguish."""
    text = """(int64[n] t, float[n] x) => (float[n] y) {
        f = Cast <to = 1> (t)
        angle = Mul (f, w)
        moved = Identity (angle)
        c = Cos (moved)
        [turn] y = Mul (c, x)
    }"""
    path = save(tmp_path / "m.onnx", text, w=[0.5])
    positions = np.arange(3000, 3016)
    for kind in ("fp16", "bf16"):
        found = convert_mixed_precision(path, tmp_path / "half.onnx", kind)
        assert set(found.kept) == {"Cast", "Mul", "Identity", "Cos"}
        (got,) = answers(tmp_path / "half.onnx", kind, t=positions, x=np.ones(16, np.float32))
        exact = np.cos(positions * 0.5)
        # The cosine and the product are rounded; float32 gives the cosine to 1e-6.
        assert np.all(np.abs(got - exact) <= ((1 + U[kind]) ** 2 - 1) * np.abs(exact) + 1e-6)


@KINDS
@pytest.mark.parametrize("dynamic", [False, True])
def test_sums_that_16_bits_cannot_hold_stay(tmp_path, kind, dynamic):
    limit = {"fp16": 2048, "bf16": 256}[kind]
    one, term = np.ones((), LOW_TYPES[kind].dtype.numpy()), 0
    total = one * 0
    while total + one != total:  # the property behind the limit: a running sum of ones stops
        total, term = total + one, term + 1
    assert term == limit
    for length in (limit, limit + 1):
        text = f"""(float[n,{"length" if dynamic else length}] x) => (float[n] y)
        {{ h = Sigmoid (x)  y = ReduceSum <keepdims = 0> (h, axes) }}"""
        path = save(tmp_path / "m.onnx", text, axes=[1])
        found = convert_mixed_precision(path, tmp_path / "half.onnx", kind)
        assert ("ReduceSum" in found.kept) == (dynamic or length > limit)


def test_positions_that_onnx_fixes_to_float32_stay(tmp_path):
    """Resize takes its scales in float32 only; what it resizes may be in 16 bits."""
    text = """(float[1,1,2,2] x) => (float[1,1,4,4] y)
    { y = Resize <mode = "nearest"> (x, , scales) }"""
    path = save(tmp_path / "m.onnx", text, scales=[1.0, 1.0, 2.0, 2.0])
    found = convert_mixed_precision(path, tmp_path / "half.onnx", "fp16")
    assert found.low == ("Resize",)
    assert types_of(tmp_path / "half.onnx")["scales"] == F
    x = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
    (got,) = run(tmp_path / "half.onnx", x=x)
    np.testing.assert_array_equal(got, x.repeat(2, 2).repeat(2, 3))


def test_what_the_schema_does_not_allow_stays_with_that_reason(tmp_path):
    text = "(float[n] x) => (float[n] y) { h = Sigmoid (x)  y = Celu (h) }"
    path = save(tmp_path / "m.onnx", text)
    found = convert_mixed_precision(path, tmp_path / "half.onnx", "fp16")
    assert found.kept == {"Celu": "ONNX has no Celu in float16 at opset 18"}


@KINDS
def test_a_quantized_model_becomes_int8_and_16_bits_only(tmp_path, kind):
    text = """(float[1,2,6,6] x) => (float[1,3,6,6] y) {
        q = QuantizeLinear (x, s, zero)
        d = DequantizeLinear (q, s, zero)
        [weights] w = DequantizeLinear <axis = 0> (codes, scales, zeros)
        y = Conv <pads = [1, 1, 1, 1]> (d, w)
    }"""
    codes = np.random.default_rng(0).integers(-127, 128, (3, 2, 3, 3)).astype(np.int8)
    path = save(tmp_path / "m.onnx", text, codes=codes, scales=[0.01, 0.02, 0.005], s=0.03,
                zero=np.int8(0), zeros=np.zeros(3, np.int8))  # fmt: skip
    out = tmp_path / "half.onnx"
    found = convert_mixed_precision(path, out, kind)
    assert not found.kept
    assert found.opset == {"fp16": 19, "bf16": 22}[kind]
    assert types_of(out)["d"] == TYPE[kind]
    assert types_of(out)["codes"] == TensorProto.INT8
    assert {"INT8", "HALF" if kind == "fp16" else "BF16"} <= parsed_by_tensorrt(out)


def test_measuring_holds_no_more_than_two_batches(loud):
    alive = []

    class Tracked(ArraySamples):
        def batches(self, size):
            for batch in super().batches(size):
                copied = {name: array.copy() for name, array in batch.items()}
                alive.append(weakref.ref(copied["x"]))
                assert sum(ref() is not None for ref in alive) <= 2
                yield copied
                del copied

    x = normal(200, 2)
    found = mixed_precision.measure_ranges(onnx.load(str(loud)), ["x", "h"], Tracked({"x": x}))
    assert len(alive) == math.ceil(200 / mixed_precision.BATCH)
    assert found["x"] == np.abs(x).max()
    assert found["h"] == pytest.approx(1e3 * np.abs(x).max(), rel=1e-6)


def test_a_fixed_batch_size_is_kept_to(tmp_path):
    path = save(tmp_path / "m.onnx", "(float[4,2] x) => (float[4,2] y) { y = Sigmoid (x) }")
    samples = ArraySamples({"x": normal(10, 2)})
    assert convert_mixed_precision(path, tmp_path / "half.onnx", "fp16", samples=samples).low == (
        "Sigmoid",
    )
    few = ArraySamples({"x": normal(3, 2)})
    assert convert_mixed_precision(path, tmp_path / "half.onnx", "fp16", samples=few).low == (
        "Sigmoid",
    )
    with pytest.raises(InputError, match="there are no samples"):
        convert_mixed_precision(
            path, tmp_path / "half.onnx", "fp16", samples=ArraySamples({"x": normal(0, 2)})
        )


@KINDS
def test_sequences_and_optionals_of_tensors_are_no_tensors(tmp_path, kind):
    """t is split into a sequence and joined again; an optional is made of it and read."""
    text = """(float[n,16] x) => (float[n,4] y) {
        [first] t = MatMul (x, w)
        [split] seq = SplitToSequence <axis = 1> (t)
        [wrap] maybe = Optional (seq)
        [unwrap] seq2 = OptionalGetElement (maybe)
        [join] c = ConcatFromSequence <axis = 1> (seq2)
        [second] y = MatMul (c, v)
    }"""
    path = save(tmp_path / "m.onnx", text, w=normal(16, 16), v=normal(16, 4))
    samples = ArraySamples({"x": normal(20, 16)})
    found = convert_mixed_precision(path, tmp_path / "half.onnx", kind, samples=samples)
    assert {"first", "second"} <= set(found.low)
    assert {"split", "join"} <= set(found.kept)
    # Two products of 16 terms near 1, 4 after the first: each rounds its factors and its result.
    assert found.max_difference < 16 * 16 * 4 * U[kind]


def test_a_tensor_without_elements_reaches_nothing(tmp_path):
    text = """(float[n,16] x) => (float[n,8] y) {
        [first] t = MatMul (x, w)
        [nothing] e = Slice (t, zero, zero, axis)
        [join] y = Concat <axis = 1> (t, e)
    }"""
    path = save(tmp_path / "m.onnx", text, w=normal(16, 8), zero=[0], axis=[1])
    samples = ArraySamples({"x": normal(20, 16)})
    found = convert_mixed_precision(path, tmp_path / "half.onnx", "fp16", samples=samples)
    assert set(found.low) == {"first", "nothing", "join"}


def test_wrong_input_is_told(loud, tmp_path):
    out = tmp_path / "half.onnx"
    with pytest.raises(InputError, match="did you mean 'between'"):
        convert_mixed_precision(loud, out, "fp16", keep=("betwen",))
    with pytest.raises(InputError, match="the samples lack the model's input 'x'"):
        convert_mixed_precision(loud, out, "fp16", samples=ArraySamples({"z": normal(2, 2)}))
    every = ("up1", "up2", "between", "down1", "down2")
    with pytest.raises(InputError, match="no node of the model can compute in float16"):
        convert_mixed_precision(loud, out, "fp16", keep=every)
    huge = ArraySamples({"x": np.full((2, 2), 1e5, np.float32)})
    with pytest.raises(InputError, match="the input 'x' reaches 1e"):
        convert_mixed_precision(loud, out, "fp16", samples=huge, keep_io=False)
    assert not out.exists()
    with pytest.raises(StageError, match="cannot be written"):
        convert_mixed_precision(loud, tmp_path / "nowhere" / "half.onnx", "fp16")
    convert_mixed_precision(loud, out, "fp16")
    with pytest.raises(InputError, match="computes in float16 already"):
        convert_mixed_precision(out, tmp_path / "again.onnx", "bf16")


def test_the_record_is_plain_json(loud, tmp_path):
    found = convert_mixed_precision(loud, tmp_path / "half.onnx", "bf16", keep=("between",))
    record = found.to_json()
    assert record["kept"] == {"between": "listed in --keep"}
    assert record["kind"] == "bf16"
    assert record["size_bytes"] == (tmp_path / "half.onnx").stat().st_size
