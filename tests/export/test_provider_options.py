"""Options of providers: each session of a measurement is opened with them, and the record has them.

The CPU provider takes any option and ignores it, so that what ONNX Runtime is given is looked at.
"""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pytest

from edgerun import memory, onnx_session
from edgerun.bench import BenchOptions, bench
from edgerun.model import Settings
from edgerun.timed_process import _options, _plain, time_models
from tests.command_line import edgerun
from tests.export import models
from tests.onnx_builders import save_onnx

CPU = "CPUExecutionProvider"
OPTIONS = {CPU: {"arena_extend_strategy": "kSameAsRequested"}}


@pytest.fixture
def opened(monkeypatch):
    """What real sessions were given, one list of providers each."""
    seen = []
    real = onnxruntime.InferenceSession

    def spy(*words, providers, **settings):
        seen.append(providers)
        return real(*words, providers=providers, **settings)

    monkeypatch.setattr(onnx_session.onnxruntime, "InferenceSession", spy)
    return seen


def in_process(config, share):
    return time_models(_options(json.loads(json.dumps(_plain(config)))), share)


def test_every_session_of_a_benchmark_has_the_options(opened, tmp_path, monkeypatch):
    def child(job):
        memory._main(json.loads(json.dumps(job)))
        return {"peak_mb": 1.0, "device": memory.NO_GPU}

    monkeypatch.setattr(memory, "_child", child)
    monkeypatch.setattr("edgerun.bench.run_timed_process", in_process)
    monkeypatch.setattr(memory, "empty_memory", lambda runtime: 1.0)
    path = models.linear(tmp_path / "m.onnx")
    settings = Settings(1, (CPU,), "all", OPTIONS)
    record = bench(BenchOptions((path,), settings, min_queries=70, max_seconds=0.4))
    # The described one, one in each process that times it, the profiled one, and one in each
    # process that measures memory.
    count = 2 + len(record["processes"]) + memory.PROCESSES
    assert opened == [[(CPU, OPTIONS[CPU])]] * count
    assert record["models"][0]["providers"]["options"] == OPTIONS


def test_two_models_are_each_opened_with_their_own(opened, tmp_path, monkeypatch):
    monkeypatch.setattr("edgerun.bench.run_timed_process", in_process)
    path = models.linear(tmp_path / "m.onnx")
    other = {CPU: {"arena_extend_strategy": "kNextPowerOfTwo"}}
    plan = BenchOptions(
        (path, path),
        Settings(1, (CPU,), "all", OPTIONS),
        min_queries=70,
        max_seconds=0.4,
        memory=False,
        processes=2,
        max_processes=2,
        against_settings=Settings(1, (CPU,), "all", other),
    )
    record = bench(plan)
    pairs = [[(CPU, OPTIONS[CPU])], [(CPU, other[CPU])]]
    # Described, timed in two processes, the second of them in the other order, and profiled.
    assert opened == [*pairs, *pairs, *pairs[::-1], *pairs]
    assert [m["providers"]["options"] for m in record["models"]] == [OPTIONS, other]


def test_a_provider_without_options_is_named_alone(opened, tmp_path):
    onnx_session.OrtSession(models.linear(tmp_path / "m.onnx"), Settings(1))
    assert opened == [[CPU]]


def test_options_are_typed_as_json_or_read_from_a_file(tmp_path):
    path = models.linear(tmp_path / "m.onnx")
    (tmp_path / "o.json").write_text(json.dumps(OPTIONS))
    short = json.dumps({"cpu": OPTIONS[CPU]})
    for given in (short, tmp_path / "o.json"):
        edgerun(
            *("bench", path, "--provider-options", given, "--json", tmp_path / "r.json"),
            *("--min-queries", 20, "--max-seconds", 1, "--no-memory"),
        )
        record = json.loads((tmp_path / "r.json").read_text())
        assert record["models"][0]["providers"]["options"] == OPTIONS


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ('{"cpu": {"a": 1}}', "option a of cpu is no text: 1"),
        ('{"cpu": "a"}', "the options of cpu are no mapping"),
        ("{", "cannot be read"),
        ("no-such-file.json", "cannot be read"),
        ('{"cuda": {"device_id": "0"}}', "options for CUDAExecutionProvider, which is not among"),
    ],
)
def test_wrong_options_are_wrong_input(tmp_path, given, message):
    np.savez(tmp_path / "d.npz", x=np.ones((1, 4), np.float32))
    done = edgerun(
        *("run", models.linear(tmp_path / "m.onnx"), "--provider-options", given),
        *("--inputs", tmp_path / "d.npz", "--output", tmp_path / "y.npz"),
        code=2,
    )
    assert message in done.stderr
    assert not (tmp_path / "y.npz").exists()


def test_weights_in_8_bits_leave_the_activations_in_float(tmp_path):
    """Left to itself, ONNX Runtime rounds both: outputs up to 0.25 off here."""
    random = np.random.default_rng(0)
    steps = random.integers(-127, 128, (128, 64), dtype=np.int8)
    scales = random.uniform(0.01, 0.02, 64).astype(np.float32)
    text = """(float[batch,128] x) => (float[batch,64] y)
    { w = DequantizeLinear <axis = 1> (steps, scales)  y = MatMul (x, w) }"""
    path = save_onnx(tmp_path / "m.onnx", text, {"steps": steps, "scales": scales})
    x = random.standard_normal((4, 128)).astype(np.float32)
    expected = x.astype(np.float64) @ (steps * scales.astype(np.float64))
    (answer,) = onnx_session.OrtSession(path, Settings(1)).run({"x": x})
    # Sums of 128 float32 products of up to 8.
    np.testing.assert_allclose(answer, expected, atol=1e-4)
