from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest

from edgerun.bench import BenchOptions, bench
from edgerun.contention import Contention
from edgerun.model import Settings
from edgerun.timed_process import Share, TimedModel, TimedProcess
from tests.command_line import edgerun
from tests.export import models
from tests.onnx_builders import save_external, save_onnx

QUICK = ("--threads", 1, "--min-queries", 70, "--max-seconds", 2)
FEW = (*QUICK, "--max-processes", 2, "--processes", 2)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """One model against a heavier one, measured once for the tests below."""
    folder = tmp_path_factory.mktemp("bench")
    model = models.linear(folder / "light.onnx")
    other = models.heavy(folder / "heavy.onnx")
    edgerun("bench", model, "--against", other, *QUICK, "--json", folder / "out.json")
    return json.loads((folder / "out.json").read_text())


def test_the_record_keeps_every_sample_that_its_figures_rest_on(record):
    assert record["schema"] == "edgerun.bench/1"
    for model in record["models"]:
        samples = np.array(model["samples_ms"])
        assert samples.size == model["latency"]["n"] >= 70
        assert model["latency"]["mean_ms"] == pytest.approx(samples.mean())
        p50 = model["latency"]["p50"]
        assert p50["value"] in samples
        assert p50["interval"][0] <= p50["value"] <= p50["interval"][1]
        assert model["warmup"]["steady"] in (True, False)
        counts = model["queries_per_process"]
        assert len(counts) == len(record["processes"]) >= 5
        assert sum(counts) == samples.size
        for cold in (model["load"], model["first"]):
            assert 0 < cold["range"][0] <= cold["value"] <= cold["range"][1]
    state = record["steadiness"]
    assert state["steady"] == (not state["reasons"])


IDLE = Contention(1.0, 2, others=0.01, waited=0.001)


@dataclass
class Machine:
    """Processes that find the given latency in ms, one after the other, and cost no time."""

    latencies: list[float]
    contention: Contention = IDLE
    shares: list[Share] = field(default_factory=list)

    def __call__(self, config, share):
        ms = self.latencies[len(self.shares) % len(self.latencies)]
        self.shares.append(share)
        warm = {"queries": 9, "windows": [ms], "steady": True}
        rounds = [[ms] * 30, [1.1 * ms] * 10]
        return TimedProcess([TimedModel(5.0, 2 * ms, warm, rounds, None)], self.contention, None)


def timed_on(machine, tmp_path, monkeypatch, **options):
    monkeypatch.setattr("edgerun.bench.run_timed_process", machine)
    model = models.linear(tmp_path / "m.onnx")
    return bench(BenchOptions((model,), Settings(1), memory=False, **options))


def test_processes_are_added_until_the_interval_is_narrow(tmp_path, monkeypatch):
    record = timed_on(Machine([1.0]), tmp_path, monkeypatch)
    assert len(record["processes"]) == 5
    assert record["steadiness"] == {**record["steadiness"], "steady": True, "reasons": []}
    record = timed_on(Machine([1.0, 1.03, 0.97]), tmp_path, monkeypatch)
    low, high = record["models"][0]["latency"]["p50"]["interval"]
    assert 5 <= len(record["processes"]) < 15
    assert (high - low) / 2 <= 0.05 * record["models"][0]["latency"]["p50"]["value"]
    record = timed_on(Machine([1.0, 2.0]), tmp_path, monkeypatch)
    assert len(record["processes"]) == 15
    assert "differs from process to process" in record["steadiness"]["reasons"][0]


def test_a_budget_decides_how_many_processes_there_are(tmp_path, monkeypatch):
    counts = {}
    for limit in (1.04, 1.5):
        budgets = {"p50": limit}
        record = timed_on(Machine([1.0, 1.1, 0.9]), tmp_path, monkeypatch, budgets=budgets)
        counts[limit] = len(record["processes"])
        low, high = record["models"][0]["latency"]["p50"]["interval"]
        assert counts[limit] == 15 or not low <= limit <= high
    assert counts[1.5] == 5 < counts[1.04]


def test_a_busy_machine_is_not_measured_at_length(tmp_path, monkeypatch):
    busy = Contention(1.0, 2, others=0.5, waited=0.0)
    record = timed_on(Machine([1.0, 2.0], busy), tmp_path, monkeypatch)
    assert len(record["processes"]) == 5
    assert "other processes used 50 %" in record["steadiness"]["reasons"][0]


def test_a_slow_model_has_fewer_processes_and_no_fewer_than_two(tmp_path, monkeypatch):
    machine = Machine([1.0])
    timed_on(machine, tmp_path, monkeypatch, max_seconds=1e-9)
    assert len(machine.shares) == 2
    assert [share.turned for share in machine.shares] == [False, True]
    assert sum(share.queries for share in machine.shares) >= 1000


def test_the_ratio_is_that_of_the_second_to_the_first(record):
    # More than a thousand times the arithmetic: the sign of the ratio is beyond any noise.
    comparison = record["comparison"]
    assert comparison["interval"][0] > 1
    assert comparison["interval"][0] <= comparison["ratio"] <= comparison["interval"][1]
    assert comparison["rounds"] >= 6


def test_providers_are_those_of_each_node(record):
    providers = record["models"][0]["providers"]
    assert providers["session"] == ["CPUExecutionProvider"]
    assert providers["nodes"] == {"CPUExecutionProvider": 1}


def test_a_sensor_that_is_missing_is_null(record):
    environment = record["environment"]
    for moment in ("before", "after"):
        for value in environment[moment].values():
            assert value is None or value or isinstance(value, float)
    assert environment["versions"].keys() == {"edgerun", "numpy", "onnxruntime"}


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_peak_memory_grows_with_what_the_model_holds(tmp_path):
    peaks = []
    for size in (16, 2048):
        model = models.heavy(tmp_path / f"{size}.onnx", size)
        edgerun("bench", model, *FEW, "--json", tmp_path / "out.json")
        peaks.append(json.loads((tmp_path / "out.json").read_text())["models"][0]["memory"])
    small, large = peaks
    assert small["above_empty_mb"] == pytest.approx(small["peak_mb"] - small["empty_mb"])
    # The weights alone are 2048² · 4 bytes = 16.8 MB.
    assert large["above_empty_mb"] - small["above_empty_mb"] > 16


def test_weights_outside_the_file_count_in_its_size(tmp_path):
    save_external(models.heavy(tmp_path / "m.onnx"), tmp_path / "split.onnx")
    done = edgerun("info", tmp_path / "split.onnx", "--json", tmp_path / "out.json")
    described = json.loads((tmp_path / "out.json").read_text())["model"]
    parts = [tmp_path / "split.onnx", tmp_path / "w.bin"]
    assert described["size_bytes"] == sum(p.stat().st_size for p in parts)

    (tmp_path / "w.bin").unlink()
    done = edgerun("bench", tmp_path / "split.onnx", code=2)
    assert "weights are in another file" in done.stderr


def test_a_model_of_branches_states_and_constants_is_measured(tmp_path):
    model = models.stateful_if(tmp_path / "m.onnx")
    done = edgerun("bench", model, *FEW, "--batch", 2, "--no-memory")
    assert "state float32 1x2x3" in done.stdout
    assert "rate int64 scalar" in done.stdout


@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_a_file_that_is_not_a_whole_model_is_bad_input(tmp_path, content):
    path = models.heavy(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[:1000] if content is None else content)
    done = edgerun("bench", path, code=2)
    assert "not a complete ONNX model" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--shape", "z=1x4"), "there is no input 'z'"),
        (("--shape", "x=1x5"), "does not fit input x"),
        (("--shape", "x"), "is not a shape"),
        (("--providers", "cuda"), "has no CUDAExecutionProvider"),
        (("--providers", "none"), "has no none"),
        (("--inputs", "missing.npz"), "there is no such file"),
        (("--threads", "0"), "not a whole number"),
        (("--max-seconds", "nan"), "not a number of seconds"),
    ],
)
def test_a_wrong_option_is_bad_input(tmp_path, words, message):
    done = edgerun("bench", models.linear(tmp_path / "m.onnx"), *words, code=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_size_that_was_chosen_and_does_not_run_is_told(tmp_path):
    text = "(float[n] x) => (float[?,2] y) { y = Reshape (x, pairs) }"
    model = save_onnx(tmp_path / "m.onnx", text, {"pairs": np.array([-1, 2])})
    done = edgerun("bench", model, code=2)
    assert "axis 0 (n) = 1 (batch)" in done.stderr
    edgerun("bench", model, "--shape", "x=4", *FEW, "--no-memory")
