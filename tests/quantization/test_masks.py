"""Masks before a softmax, and tensors without elements: the rest of the network is in 8 bits."""

from __future__ import annotations

import numpy as np
import pytest

from edgekd.errors import InputError
from edgekd.onnx.samples import is_mask, open_samples
from edgekd.spec import ModelSpec, TensorSpec
from tests.onnx_builders import Graph, distance, pairs_of, run, save_onnx
from tests.quantization.quantizing import quantized, quantizer

T, WIDTH = 8, 16
CAUSAL = np.triu(np.ones((T, T), bool), 1)
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((40, T, WIDTH)).astype(np.float32)
PRODUCTS = {"query", "key", "value", "scores", "context", "out"}


def attention(path, mask):
    """softmax(q kᵀ / 4, masked by ``mask(graph, scores)``) v W."""
    g = Graph(1)
    for name, short in (("query", "q"), ("key", "k"), ("value", "v")):
        g.add("MatMul", ["x", g.weight(f"w{short}", WIDTH, WIDTH)], short, name)
    g.add("Transpose", ["k"], "kt", "turn", perm=[0, 2, 1])
    g.add("MatMul", ["q", "kt"], "s0", "scores")
    g.add("Mul", ["s0", g.constant("quarter", np.float32(0.25))], "s1", "scale")
    inputs = {"x": ["N", T, WIDTH], **mask(g, "s1")}
    g.add("Softmax", ["s"], "p", "softmax", axis=-1)
    g.add("MatMul", ["p", "v"], "c", "context")
    g.add("MatMul", ["c", g.weight("wo", WIDTH, WIDTH)], "y", "out")
    return g.save(path, inputs, {"y": ["N", T, WIDTH]})


def added_constant(value):
    def mask(g, scores):
        values = np.where(CAUSAL, np.float32(value), np.float32(0))
        g.add("Add", [scores, g.constant("mask", values)], "s", "mask_add")
        return {}

    return mask


def chosen_by_where(value):
    def mask(g, scores):
        g.constant("causal", CAUSAL)
        g.add("Where", ["causal", g.constant("far", np.float32(value)), scores], "s", "mask_where")
        return {}

    return mask


def computed_from_an_input(value):
    """(1 - mask) · value, as BERT's exporters write it."""

    def mask(g, scores):
        g.add("Sub", [g.constant("one", np.float32(1)), "mask"], "inverse", "invert")
        g.add("Mul", ["inverse", g.constant("far", np.float32(value))], "added", "widen")
        g.add("Add", [scores, "added"], "s", "mask_add")
        return {"mask": ["N", 1, T]}

    return mask


def given_as_input(g, scores):
    g.add("Add", [scores, "mask"], "s", "mask_add")
    return {"mask": ["N", T, T]}


def padding():
    """1 for tokens, 0 for what fills a sequence up."""
    lengths = RANDOM.integers(3, T + 1, 40)
    return (np.arange(T) < lengths[:, None]).astype(np.float32)[:, None]


CASES = {
    "causal -inf": (added_constant(-np.inf), {}),
    "causal -1e9": (added_constant(-1e9), {}),
    "causal -3.4e38": (added_constant(np.finfo(np.float32).min), {}),
    "causal -1e4": (added_constant(-1e4), {}),
    "causal -100": (added_constant(-100), {}),
    "where -inf": (chosen_by_where(-np.inf), {}),
    "where -1e9": (chosen_by_where(-1e9), {}),
    "padding -1e4": (computed_from_an_input(-1e4), {"mask": padding()}),
    "padding -1e9": (computed_from_an_input(-1e9), {"mask": padding()}),
    "input -inf": (
        given_as_input,
        {"mask": np.tile(np.where(CAUSAL, -np.inf, 0).astype("f4"), (40, 1, 1))},
    ),
    "input -1e9": (
        given_as_input,
        {"mask": np.tile(np.where(CAUSAL, -1e9, 0).astype("f4"), (40, 1, 1))},
    ),
}


@pytest.mark.parametrize("runtime", ["cpu", "tensorrt"])
@pytest.mark.parametrize("calibration", ["minmax", "percentile"])
@pytest.mark.parametrize("case", CASES)
def test_attention_under_a_mask_is_as_near_as_attention_without(
    tmp_path, case, runtime, calibration
):
    mask, more = CASES[case]
    path, feed = attention(tmp_path / "m.onnx", mask), {"x": X, **more}
    _, out = quantized(path, feed, tmp_path, runtime=runtime, calibration=calibration)
    pairs = pairs_of(out)
    assert all(all(pairs[name]) for name in PRODUCTS)

    assert distance(run(path, feed)["y"], run(out, feed)["y"]) < 0.1


@pytest.mark.parametrize("case", ["causal -inf", "causal -1e9", "padding -1e4", "input -inf"])
def test_the_node_of_the_mask_is_named_and_stays_in_float(tmp_path, case):
    mask, more = CASES[case]
    path = attention(tmp_path / "m.onnx", mask)
    quantizer, out = quantized(path, {"x": X, **more}, tmp_path)
    assert set(quantizer.left_in_float) == {"mask_add"}
    assert "'s'" in quantizer.left_in_float["mask_add"]
    assert "mask_add" not in quantizer.nodes
    assert not any(pairs_of(out)["softmax"])


def test_a_sum_without_a_mask_stays_in_8_bits(tmp_path):
    def bias(g, scores):
        g.add("Add", [scores, g.weight("bias", T, T)], "s", "bias_add")
        return {}

    path = attention(tmp_path / "m.onnx", bias)
    quantizer, _ = quantized(path, {"x": X}, tmp_path)
    assert quantizer.left_in_float == {}
    assert "bias_add" in quantizer.nodes


def test_masked_logits_may_be_answers(tmp_path):
    """-inf for actions that are not allowed: another one in each sample."""
    g = Graph(2)
    g.add("MatMul", ["x", g.weight("w", WIDTH, 5)], "t", "head")
    g.add("Add", ["t", "mask"], "y", "mask_add")
    path = g.save(tmp_path / "m.onnx", {"x": ["N", WIDTH], "mask": ["N", 5]}, {"y": ["N", 5]})
    mask = np.zeros((40, 5), np.float32)
    mask[np.arange(40), RANDOM.integers(0, 5, 40)] = -np.inf
    feed = {"x": X[:, 0], "mask": mask}
    _, out = quantized(path, feed, tmp_path)
    wanted, found = run(path, feed)["y"], run(out, feed)["y"]
    np.testing.assert_array_equal(np.isneginf(wanted), np.isneginf(found))
    finite = np.isfinite(wanted)
    assert distance(wanted[finite], found[finite]) < 0.03


def test_infinities_that_break_an_answer_are_still_the_samples_fault(tmp_path):
    """log 0 in one of forty samples: its output is infinite, those of others are not."""
    g = Graph(3)
    g.add("Log", ["x"], "log", "log")
    g.add("Neg", ["log"], "neg", "neg")
    g.add("MatMul", ["neg", g.constant("w", np.full((WIDTH, 4), -0.1, "f4"))], "y", "mm")
    path = g.save(tmp_path / "m.onnx", {"x": ["N", WIDTH]}, {"y": ["N", 4]})
    x = RANDOM.uniform(0.5, 2, (40, WIDTH)).astype(np.float32)
    quantizer(path, {"x": x}, tmp_path)
    x[7, 3] = 0
    with pytest.raises(InputError, match=r"'neg' .* becomes NaN or infinite on samples 0 to 39"):
        quantizer(path, {"x": x}, tmp_path)


def test_a_mask_in_a_file_is_read_and_broken_data_is_not(tmp_path):
    spec = ModelSpec((TensorSpec("x", ("N", 4)),), ())
    mask = np.array([[0, -np.inf, 0, -np.inf], [0, 0, 0, -1]], np.float32)
    np.savez(tmp_path / "s.npz", x=mask)
    (batch,) = open_samples(tmp_path / "s.npz", spec).batches(2)
    np.testing.assert_array_equal(batch["x"], mask)
    for wrong in ([0, np.inf, 0, 0], [0, -np.inf, 1, 0], [0, np.nan, 0, 0]):
        np.savez(tmp_path / "s.npz", x=np.array([wrong], np.float32))
        with pytest.raises(InputError, match="has a NaN or infinite"):
            list(open_samples(tmp_path / "s.npz", spec).batches(1))
    assert not is_mask(np.array([0, -1j]))


@pytest.mark.parametrize("opset", [13, 18, 21])
@pytest.mark.parametrize("calibration", ["minmax", "entropy", "percentile"])
def test_a_tensor_without_elements_has_no_range(tmp_path, opset, calibration):
    """c and a slice of it that is empty are joined, as exporters of heads without classes do."""
    g = Graph(4)
    g.add("Conv", ["x", g.weight("w", 8, 3, 3, 3)], "c", "first", pads=[1] * 4)
    zero, axis = (g.constant(n, np.array([v], np.int64)) for n, v in (("zero", 0), ("axis", 3)))
    g.add("Slice", ["c", zero, zero, axis], "e", "nothing")
    g.add("Concat", ["c", "e"], "cc", "join", axis=3)
    g.add("Conv", ["cc", g.weight("w2", 4, 8, 3, 3)], "y", "second", pads=[1] * 4)
    path = g.save(tmp_path / "m.onnx", {"x": ["N", 3, 8, 8]}, {"y": ["N", 4, 8, 8]}, opset=opset)
    feed = {"x": RANDOM.standard_normal((20, 3, 8, 8)).astype(np.float32)}
    quantizer, out = quantized(path, feed, tmp_path, calibration=calibration)
    assert quantizer.left_in_float["join"] == "'e' has no elements on the samples"
    assert {"first", "second"} <= set(quantizer.nodes)
    assert distance(run(path, feed)["y"], run(out, feed)["y"]) < 0.1


def test_an_output_without_elements(tmp_path):
    text = """(float[N,16] x) => (float[N,8] y, float[N,k] z)
    { [mm] y = MatMul (x, w)  [nothing] z = Slice (y, a, b, axis) }"""
    ends = {"a": np.array([0]), "b": np.array([0]), "axis": np.array([1])}
    w = np.random.default_rng(5).standard_normal((16, 8)).astype(np.float32) * np.float32(0.3)
    path = save_onnx(tmp_path / "m.onnx", text, {"w": w, **ends})
    feed = {"x": X[:, 0]}
    _, out = quantized(path, feed, tmp_path)
    assert distance(run(path, feed)["y"], run(out, feed)["y"]) < 0.05
