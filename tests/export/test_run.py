from __future__ import annotations

import json

import numpy as np
import pytest

from tests.command_line import edgerun
from tests.export import models
from tests.onnx_builders import save_onnx


def write_manifest(folder, model="m.onnx", labels=None, **constants):
    manifest = {
        "model": {"file": model},
        "preprocess": {"x": constants} if constants else {},
        "labels": labels,
        "files": {model: {"sha256": "", "bytes": 0}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def answers(folder, *words):
    done = edgerun("run", *words, "--inputs", folder / "d.npz", "--output", folder / "y.npz")
    return dict(np.load(folder / "y.npz")), done.stdout


@pytest.mark.parametrize(("batch", "samples"), [("batch", 1), ("batch", 200), (4, 10), (1, 3)])
def test_every_sample_is_answered_in_order_whatever_the_batch(tmp_path, batch, samples):
    model = models.linear(tmp_path / "m.onnx", batch)
    x = np.random.default_rng(0).random((samples, 4), dtype=np.float32)
    np.savez(tmp_path / "d.npz", x=x, label=np.zeros(samples))
    got, _ = answers(tmp_path, model)
    # Sums of four float32 products: the order of addition may differ.
    np.testing.assert_allclose(got["y"], models.linear_answer(x), rtol=1e-6)


def test_raw_data_is_preprocessed_and_named_by_the_manifest_beside(tmp_path):
    models.linear(tmp_path / "m.onnx")
    constants = {"scale": 0.5, "mean": [1, 2, 3, 4], "std": [1, 2, 4, 8]}
    write_manifest(tmp_path, labels=["a", "b", "c"], **constants)
    raw = np.random.default_rng(0).integers(0, 255, (7, 4), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", x=raw)
    x = (raw * 0.5 - np.array(constants["mean"])) / np.array(constants["std"])
    expected = x @ np.arange(12).reshape(4, 3)
    for words in ([tmp_path / "m.onnx"], ["--bundle", tmp_path]):
        got, printed = answers(tmp_path, *words)
        np.testing.assert_allclose(got["y"], expected, rtol=1e-5)
        assert got["label"].tolist() == [["a", "b", "c"][i] for i in expected.argmax(1)]
        assert "labels: " in printed


def test_float_data_is_taken_as_prepared_unless_it_is_said_to_be_raw(tmp_path):
    models.linear(tmp_path / "m.onnx")
    write_manifest(tmp_path, scale=2.0, mean=[0.0], std=[1.0])
    x = np.ones((2, 4), np.float32)
    np.savez(tmp_path / "d.npz", x=x)
    prepared, _ = answers(tmp_path, "--bundle", tmp_path)
    raw, _ = answers(tmp_path, "--bundle", tmp_path, "--raw")
    np.testing.assert_allclose(raw["y"], 2 * prepared["y"])


def test_a_manifest_that_does_not_list_the_model_is_another_programs(tmp_path):
    models.linear(tmp_path / "m.onnx")
    (tmp_path / "manifest.json").write_text('{"name": "a web page", "icons": []}')
    np.savez(tmp_path / "d.npz", x=np.ones((2, 4), np.float32))
    answers(tmp_path, tmp_path / "m.onnx")


def test_answers_that_change_their_shape_are_an_error_and_leave_no_file(tmp_path):
    # The output has as many rows as there are values above 0: another number in each batch.
    text = "(float[batch,4] x) => (int64[2,found] y) { y = NonZero (x) }"
    model = save_onnx(tmp_path / "m.onnx", text)
    np.savez(tmp_path / "d.npz", x=(np.eye(4)[[0, 1]] * [[1], [0]]).astype(np.float32))
    done = edgerun(
        *("run", model, "--batch", 1),
        *("--inputs", tmp_path / "d.npz", "--output", tmp_path / "y.npz"),
        code=3,
    )
    assert "changes its shape" in done.stderr
    assert not (tmp_path / "y.npz").exists()


def test_one_initial_state_serves_every_sample(tmp_path):
    model = models.stateful_if(tmp_path / "m.onnx")
    x = np.arange(9, dtype=np.float32).reshape(3, 3)
    state = np.full((1, 1, 3), 5, np.float32)
    np.savez(tmp_path / "d.npz", input=x, state=state, rate=np.int64(16000))
    got, _ = answers(tmp_path, model, "--batch", 1)
    np.testing.assert_array_equal(got["y"], 2 * x)
    np.testing.assert_array_equal(got["next"].reshape(3, 3), 5 + 2 * x)


@pytest.mark.parametrize(
    "words",
    [
        ("run", "m.onnx", "--inputs", "d.npz", "--output", "m.onnx"),
        ("run", "m.onnx", "--inputs", "d.npz", "--output", "d.npz"),
        ("bench", "m.onnx", "--json", "m.onnx"),
        ("info", "m.onnx", "--json", "m.onnx"),
    ],
)
def test_an_output_never_overwrites_what_is_read(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    models.linear(tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=np.zeros((2, 4), np.float32))
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert "would overwrite another file" in edgerun(*words, code=2).stderr
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_terminal_without_unicode_gets_escapes(tmp_path, monkeypatch):
    save_onnx(tmp_path / "m.onnx", '(float[2] "é") => (float[2] y) { y = Relu ("é") }')
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = edgerun("info", tmp_path / "m.onnx")
    assert "\\xe9" in done.stdout


def test_too_many_threads_are_refused(tmp_path):
    done = edgerun("bench", "m.onnx", "--threads", 99999999, code=2)
    assert "more than 1,024 threads" in done.stderr
