"""What a graph costs, against the formulas; predictions that learn from measurements."""

import math

import numpy as np
import pytest

from edgekd.config.profile import load_profile
from edgekd.students.cost_model import CostModel
from edgekd.students.costs import Figures, GraphCosts, Range, graph_costs
from tests.onnx_builders import save_onnx

CONV = """(float[b,3,32,32] x) => (float[b,8,16,16] y)
{ c = Conv <pads=[1,1,1,1], strides=[2,2]> (x, w)  y = Relu (c) }"""


def conv(tmp_path, batch=1, text=CONV):
    path = save_onnx(tmp_path / "c.onnx", text, {"w": np.zeros((8, 3, 3, 3), np.float32)})
    return graph_costs(path, batch)


@pytest.mark.parametrize(
    ("text", "weights", "macs"),
    [
        (CONV, {"w": (8, 3, 3, 3)}, 8 * 16 * 16 * 27),
        ("(float[b,6,9] x) => (float[b,6,9] y) { y = Conv <group=6, pads=[1,1]> (x, w) }",
         {"w": (6, 1, 3)}, 6 * 9 * 3),
        ("(float[b,4,5,5] x) => (float[b,2,10,10] y) { y = ConvTranspose <strides=[2,2]> (x, w) }",
         {"w": (4, 2, 2, 2)}, 4 * 25 * 2 * 4),
        ("(float[b,7] x) => (float[b,3] y) { y = Gemm <transB=1> (x, w) }", {"w": (3, 7)}, 21),
        ("(float[b,2,7] x) => (float[b,2,3] y) { y = MatMul (x, w) }", {"w": (7, 3)}, 2 * 21),
        ("(float[4,b,5] x) => (float[4,1,b,6] y) { y = GRU <hidden_size=6> (x, w, r) }",
         {"w": (1, 18, 5), "r": (1, 18, 6)}, 4 * 18 * 11),
        ("(float[b,5] x) => (float[b,6] y) { y = Einsum <equation=\"bi,io->bo\"> (x, w) }",
         {"w": (5, 6)}, 30),
    ],
)  # fmt: skip
def test_multiply_accumulates_are_those_of_the_formulas(tmp_path, text, weights, macs):
    arrays = {name: np.zeros(shape, np.float32) for name, shape in weights.items()}
    if "GRU" in text:
        text = text.replace("b,5", "1,5").replace("b,6", "1,6")
    found = graph_costs(save_onnx(tmp_path / "m.onnx", text, arrays))
    assert found.macs == macs
    assert found.parameters == sum(math.prod(shape) for shape in weights.values())


def test_quantized_kernels_cost_what_their_layer_does(tmp_path):
    zero, one = "z", "s"
    text = f"""(uint8[b,3,8,8] x) => (uint8[b,4,8,8] y)
    {{ y = QLinearConv <pads=[1,1,1,1]> (x, {one}, {zero}, w, {one}, {zero}, {one}, {zero}) }}"""
    arrays = {"w": np.zeros((4, 3, 3, 3), np.uint8), "s": np.float32(1), "z": np.uint8(0)}
    assert graph_costs(save_onnx(tmp_path / "q.onnx", text, arrays)).macs == 4 * 64 * 27


def test_a_batch_multiplies_work_and_activations_but_not_weights(tmp_path):
    one, eight = conv(tmp_path), conv(tmp_path, 8)
    assert eight.macs == 8 * one.macs
    assert eight.activations_bytes == 8 * one.activations_bytes
    assert eight.weights_bytes == one.weights_bytes == 4 * 216


def test_an_activation_after_a_layer_costs_nothing(tmp_path):
    plain = conv(tmp_path, text=CONV.replace("c = Conv", "y = Conv").replace("y = Relu (c)", ""))
    assert vars(conv(tmp_path)) | {"operators": ()} == vars(plain) | {"operators": ()}


def test_what_depends_on_weights_alone_is_not_computed(tmp_path):
    text = """(float[b,7] x) => (float[b,3] y)
    { t = Transpose <perm=[1,0]> (w)  y = MatMul (x, t) }"""
    found = graph_costs(save_onnx(tmp_path / "m.onnx", text, {"w": np.zeros((3, 7), np.float32)}))
    assert (found.nodes, found.activations_bytes) == (1, 4 * 10)
    assert found.product_bytes == 4 * 21


def test_blocks_of_channels_take_memory(tmp_path):
    found = conv(tmp_path)
    assert found.blocked_bytes - found.activations_bytes == 4 * 8 * 16 * 16  # 8 of 16 are used


HOST = load_profile("intel-n100")


def network(random):
    """A drawn network's costs."""
    weights, moving = (int(math.exp(random.uniform(*r))) for r in ((9, 17), (9, 16)))
    return GraphCosts(
        weights // 4, int(weights * random.uniform(1, 200)), weights, weights, 0, 0, weights // 4,
        0, 0, moving // 4, moving, moving, weights + 3 * moving, int(random.uniform(3, 80)), (),
    )  # fmt: skip


def measured(costs, random, noise=0.1, slower=4.0):
    """Figures of another machine than the profile's, with an influence that no part has."""
    cached = 1 + 0.5 * math.tanh(costs.weights_bytes / 1e6 - 1)
    latency = 0.02 + costs.nodes * 0.004 + costs.macs / 6e6 * cached + costs.traffic_bytes / 9e6
    latency *= slower * math.exp(random.normal(0, noise))
    memory = (11 + 3.2 * costs.weights_bytes / 1e6 + 2 * costs.activations_bytes / 1e6) * math.exp(
        random.normal(0, 0.05)
    )
    exactly = {name: Range(v, v, v) for name, v in (("p50", latency), ("p95", 1.2 * latency))}
    return Figures(exactly, Range(memory, memory, memory), 1.0, 1, "float32", 3)


@pytest.mark.parametrize("seed", range(4))
def test_bands_contain_what_is_measured_next(seed):
    random = np.random.default_rng(seed)
    model, inside, count = CostModel(HOST), [], 30
    for _ in range(count):
        costs = network(random)
        found, predicted = measured(costs, random), model.predict(costs)
        inside += [predicted.latency_ms["p50"].low <= found.latency_ms["p50"].value
                   <= predicted.latency_ms["p50"].high,
                   predicted.memory_mb.low <= found.memory_mb.value <= predicted.memory_mb.high]  # fmt: skip
        model.correct(costs, found)
    assert sum(inside) >= 0.85 * 2 * count


def test_measurements_correct_the_prediction():
    random = np.random.default_rng(0)
    model, errors = CostModel(HOST), []
    for _ in range(25):
        costs = network(random)
        found = measured(costs, random, noise=0.02, slower=6.0)
        value, true = model.predict(costs).latency_ms["p50"].value, found.latency_ms["p50"].value
        errors.append(abs(math.log(true / value)))
        model.correct(costs, found)
    assert np.median(errors[12:]) < 0.25 < np.median(errors[:2])
    error = model.error()
    assert error["measured"] == 25
    assert error["latency_error"] == pytest.approx(np.median(errors[12:]), abs=0.15)


def test_a_band_spans_all_precisions_that_may_be_shipped():
    costs = network(np.random.default_rng(1))
    both, alone = CostModel(HOST, ("fp32", "int8")), CostModel(HOST)
    int8 = CostModel(HOST, ("int8",)).predict(costs)
    assert both.predict(costs).memory_mb.high == alone.predict(costs).memory_mb.high
    assert (
        both.predict(costs).memory_mb.low == int8.memory_mb.low < alone.predict(costs).memory_mb.low
    )
    assert both.predict(costs).size_mb.low < 0.3 * both.predict(costs).size_mb.high
