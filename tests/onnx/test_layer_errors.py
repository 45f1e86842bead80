"""Where a model goes wrong: faults put into one known layer, and errors computed in numpy."""

import json

import ml_dtypes
import numpy as np
import pytest

import edgekd.onnx.layer_errors as module
from edgekd.errors import InputError
from edgekd.onnx.layer_errors import layer_errors
from edgekd.onnx.samples import ArraySamples
from edgekd.quantization.mixed_precision import convert_mixed_precision
from edgekd.quantization.mixed_precision_graph import write_rounded
from tests.onnx_builders import save_external, save_onnx
from tests.quantization.quantizing import quantized

RANDOM = np.random.default_rng(0)
SAMPLES = {"x": RANDOM.standard_normal((40, 8)).astype(np.float32)}
WEIGHTS = [RANDOM.standard_normal((8, 8)).astype(np.float32) / 3 for _ in range(4)]


def chain(path, weights=WEIGHTS, batch="batch"):
    """x → (MatMul, Relu) × 3 → MatMul → out, nodes fc0, relu0, fc1, …"""
    nodes, source, last = "", "x", len(weights) - 1
    for i in range(last):
        nodes += f"[fc{i}] t{i} = MatMul ({source}, w{i})  [relu{i}] r{i} = Relu (t{i})\n"
        source = f"r{i}"
    nodes += f"[fc{last}] out = MatMul ({source}, w{last})"
    named = {f"w{i}": weight for i, weight in enumerate(weights)}
    return save_onnx(path, f"(float[{batch},8] x) => (float[{batch},8] out) {{ {nodes} }}", named)


def image_net(path):
    """Conv → BatchNormalization → Relu → Conv → Relu → pool → Gemm, biased images in."""
    r = np.random.default_rng(1)

    def some(*shape):
        return (r.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) or 1)).astype(np.float32)

    weights = {"c1": some(8, 3, 3, 3), "scale": np.abs(some(8)) + 0.5, "shift": some(8),
               "mean": some(8), "var": np.abs(some(8)) + 0.5, "c2": some(8, 8, 3, 3),
               "c2b": some(8), "g": some(8, 5), "gb": some(5)}  # fmt: skip
    text = """(float[b,3,8,8] x) => (float[b,5] out) {
        [conv1] conv1 = Conv <pads = [1, 1, 1, 1]> (x, c1)
        [norm1] norm1 = BatchNormalization (conv1, scale, shift, mean, var)
        [relu1] relu1 = Relu (norm1)
        [conv2] conv2 = Conv <pads = [1, 1, 1, 1]> (relu1, c2, c2b)
        [relu2] relu2 = Relu (conv2)
        [pool] pooled = GlobalAveragePool (relu2)
        [flatten] flat = Flatten (pooled)
        [gemm] out = Gemm (flat, g, gb)
    }"""
    return save_onnx(path, text, weights)


IMAGES = {"x": RANDOM.standard_normal((24, 3, 8, 8)).astype(np.float32)}


def coarse(weight):
    step = np.abs(weight).max() / 4
    return (np.round(weight / step) * step).astype(np.float32)


def by_tensor(rows):
    return {row.tensor: row for row in rows}


@pytest.mark.parametrize("fault", range(4))
def test_the_faulty_layer_is_first_and_largest_in_own_error(tmp_path, fault):
    weights = list(WEIGHTS)
    weights[fault] = coarse(weights[fault])
    rows = layer_errors(
        chain(tmp_path / "a.onnx"), chain(tmp_path / "b.onnx", weights), ArraySamples(SAMPLES)
    )
    assert [row.tensor for row in rows] == ["t0", "r0", "t1", "r1", "t2", "r2", "out"]
    wrong = [row for row in rows if row.relative > 0]
    assert wrong[0].node == f"fc{fault}"
    assert all(row.sqnr_db is None and row.own == 0 for row in rows[: rows.index(wrong[0])])
    assert max(rows, key=lambda row: row.own).node == f"fc{fault}"
    assert wrong[0].own == wrong[0].relative


def test_the_errors_are_those_of_numpy(tmp_path):
    weights = [coarse(weight) for weight in WEIGHTS]
    found = by_tensor(
        layer_errors(
            chain(tmp_path / "a.onnx"),
            chain(tmp_path / "b.onnx", weights),
            ArraySamples(SAMPLES),
            batch=7,
        )
    )
    p = o = SAMPLES["x"].astype(np.float64)
    before = 0.0
    for index, (w, q) in enumerate(zip(WEIGHTS, weights, strict=True)):
        p, o = p @ w, o @ q
        after = np.linalg.norm(o - p) / np.linalg.norm(p)
        row = found["out" if index == 3 else f"t{index}"]
        # Float32 against float64, where the errors themselves are some percent.
        assert row.relative == pytest.approx(after, rel=1e-4)
        assert row.sqnr_db == pytest.approx(-20 * np.log10(after), abs=1e-3)
        assert row.own == pytest.approx(np.sqrt(max(0, after**2 - before**2)), rel=1e-3)
        p, o = np.maximum(p, 0), np.maximum(o, 0)
        before = np.linalg.norm(o - p) / np.linalg.norm(p)
    json.dumps([row.to_json() for row in found.values()], allow_nan=False)


@pytest.mark.parametrize("batches", [(1, "b"), ("b", 1), (6, "b"), (8, 8)])
@pytest.mark.parametrize("memory", [1, 700, 1 << 30])
def test_neither_groups_nor_batches_change_the_errors(tmp_path, batches, memory):
    samples = ArraySamples({"x": SAMPLES["x"][:24]})
    coarser = [coarse(weight) for weight in WEIGHTS]
    whole = layer_errors(chain(tmp_path / "a.onnx"), chain(tmp_path / "b.onnx", coarser), samples)
    first = chain(tmp_path / "c.onnx", batch=batches[0])
    second = chain(tmp_path / "d.onnx", coarser, batches[1])
    parts = layer_errors(first, second, samples, memory_bytes=memory)
    assert [row.tensor for row in parts] == [row.tensor for row in whole]
    for one, other in zip(parts, whole, strict=True):
        assert one.relative == pytest.approx(other.relative, rel=1e-5)


def test_a_small_memory_really_makes_groups(tmp_path, monkeypatch):
    measured = []
    real = module._Both.measure
    monkeypatch.setattr(
        module._Both,
        "measure",
        lambda self, names, *rest: measured.append(list(names)) or real(self, names, *rest),
    )
    first, second = chain(tmp_path / "a.onnx"), chain(tmp_path / "b.onnx")
    layer_errors(first, second, ArraySamples(SAMPLES), memory_bytes=200)
    # 64 bytes a tensor and sample, in both models together: 3 of the 7 in 200 bytes.
    assert [len(group) for group in measured] == [3, 3, 1]


def test_no_more_samples_than_the_limit_are_read(tmp_path):
    class Endless(ArraySamples):
        def batches(self, size):
            for number, batch in enumerate(super().batches(size)):
                assert number * size < 10
                yield batch

    path = chain(tmp_path / "a.onnx")
    layer_errors(path, path, Endless(SAMPLES), batch=4, limit=10)


@pytest.mark.parametrize("runtime", ["cpu", "tensorrt"])
def test_a_quantized_model_is_taken_after_dequantization(tmp_path, runtime):
    """Its tensors then have at most 256 values a sample; before it they have any."""
    quantizer, out = quantized(image_net(tmp_path / "m.onnx"), IMAGES, tmp_path, runtime=runtime)
    found = by_tensor(layer_errors(quantizer.prepared, out, ArraySamples(IMAGES)))
    assert found["x"].op == "Input"
    assert found["x"].node == ""
    # 256 uniform steps over at least the ±3 σ that 4,608 normal values span: σ²·12/Δ².
    x = IMAGES["x"]
    step = (np.abs(x).max() * 2 if runtime == "tensorrt" else np.ptp(x)) / 255
    assert found["x"].sqnr_db == pytest.approx(10 * np.log10(x.var() * 12 / step**2), abs=0.5)
    assert all(row.finite and row.relative > 0 for row in found.values())
    assert 15 < found["out"].sqnr_db < 60
    assert "conv2" in {row.node for row in found.values()}


def test_a_folded_batch_norm_is_one_layer_with_the_convolution(tmp_path):
    source = image_net(tmp_path / "m.onnx")
    quantizer, out = quantized(source, IMAGES, tmp_path)
    rows = layer_errors(source, out, ArraySamples(IMAGES))
    folded = next(row for row in rows if "BatchNormalization" in row.op)
    assert folded.node == "conv1"
    assert folded.op.startswith("Conv+BatchNormalization")
    # The float model itself has that layer too, with the rounding of the folding only.
    same = layer_errors(source, quantizer.prepared, ArraySamples(IMAGES))
    assert all(row.relative < 1e-5 for row in same)


def test_half_precision_has_errors_of_half_precision(tmp_path):
    source, out = image_net(tmp_path / "m.onnx"), tmp_path / "h.onnx"
    convert_mixed_precision(source, out, "fp16")
    rows = layer_errors(source, out, ArraySamples(IMAGES))
    assert {"conv2", "gemm"} <= {row.node for row in rows}
    # One rounding to 11 bits is 2⁻¹² of a value on average at most; a few add up.
    assert all(0 < row.relative < 8 * 2**-12 for row in rows)


def test_an_overflowing_layer_is_named_and_later_layers_not_blamed(tmp_path):
    weights = list(WEIGHTS)
    weights[1] = weights[1] * np.float32(3e38)
    first, second = chain(tmp_path / "a.onnx"), chain(tmp_path / "b.onnx", weights)
    found = by_tensor(layer_errors(first, second, ArraySamples(SAMPLES)))
    assert found["r0"].finite
    assert not found["t1"].finite
    assert found["t1"].own is None
    assert found["t1"].relative is None
    assert not found["out"].finite
    assert found["out"].own == 0.0
    json.dumps([row.to_json() for row in found.values()], allow_nan=False)


def test_weights_that_are_computed_are_no_layers(tmp_path):
    """A transposed weight is a tensor that both have, but nothing that an input reaches."""
    text = """(float[b,8] x) => (float[b,8] out)
    { [turn] wt = Transpose (w)  [fc] out = MatMul (x, wt) }"""
    path = save_onnx(tmp_path / "m.onnx", text, {"w": WEIGHTS[0]})
    (row,) = layer_errors(path, path, ArraySamples(SAMPLES))
    assert (row.node, row.op, row.relative) == ("fc", "MatMul", 0.0)


def test_external_weights_are_found(tmp_path):
    folder = tmp_path / "big"
    folder.mkdir()
    save_external(chain(tmp_path / "a.onnx"), folder / "m.onnx")
    rows = layer_errors(tmp_path / "a.onnx", folder / "m.onnx", ArraySamples(SAMPLES))
    assert len(rows) == 7
    assert sorted(file.name for file in folder.iterdir()) == ["m.onnx", "w.bin"]


def test_models_with_nothing_in_common_are_refused(tmp_path):
    first = chain(tmp_path / "a.onnx")
    text = "(float[b,8] x) => (float[b,8] other) { [fc] other = MatMul (x, w) }"
    second = save_onnx(tmp_path / "b.onnx", text, {"w": WEIGHTS[0]})
    with pytest.raises(InputError, match=r"no layer of b\.onnx"):
        layer_errors(first, second, ArraySamples(SAMPLES))
    with pytest.raises(InputError, match="batches of 2 only, the other of 3"):
        layer_errors(
            chain(tmp_path / "c.onnx", batch=2),
            chain(tmp_path / "d.onnx", batch=3),
            ArraySamples(SAMPLES),
        )


def test_the_rounding_of_an_input_to_bfloat16_is_a_row_of_its_own(tmp_path):
    """Its file in float32 (half_verify) rounds by casts to bfloat16 and back."""
    reference = chain(tmp_path / "a.onnx")
    samples = ArraySamples(SAMPLES)
    convert_mixed_precision(reference, tmp_path / "b.onnx", "bf16", samples=samples)
    write_rounded(tmp_path / "b.onnx", tmp_path / "r.onnx", "bf16")
    rows = {row.tensor: row for row in layer_errors(reference, tmp_path / "r.onnx", samples)}
    x = SAMPLES["x"].astype(np.float64)
    rounded = SAMPLES["x"].astype(ml_dtypes.bfloat16).astype(np.float64)
    expected = np.sqrt(((rounded - x) ** 2).sum() / (x**2).sum())
    assert rows["x"].op == "Input"
    assert rows["x"].relative == pytest.approx(expected, rel=1e-6)
    # Every layer's tensor is there, as its consumer reads it: rounded.
    assert {"t0", "t1", "t2", "out"} <= set(rows)
    assert all(0 < rows[name].relative < 4 * 2**-8 for name in ("t0", "t1", "t2", "out"))
