"""What a device measured is gated, alone or with the workstation's result."""

import copy
import json

import pytest

from edgekd.config.budgets import Budgets, GateConfig
from edgekd.config.profile import load_profile
from edgekd.errors import InputError
from edgekd.release.build_result import BenchRecord, evidence_of_bench, result_of_bench, with_bench
from edgekd.release.gate import evaluate
from edgekd.release.report_tables import cautions, thread_remark
from edgekd.release.result import Result
from tests.command_line import edgekd


def percentile(value):
    return {"value": value, "interval": [0.9 * value, 1.1 * value], "n": 3000, "note": ""}


def timed(p50, size=147_000):
    names = ("p50", "p90", "p95", "p99")
    return {
        "path": "model.onnx",
        "sha256": "a" * 64,
        "size_bytes": size,
        "providers": {"session": ["CPUExecutionProvider"]},
        "threads": 4,
        "warmup": {"queries": 100, "steady": True},
        "samples_ms": [p50] * 1500 + [2 * p50] * 1200 + [3 * p50] * 150 + [4 * p50] * 150,
        "latency": {name: percentile(k * p50) for k, name in enumerate(names, start=1)},
        "memory": {"above_empty_mb": 11.3},
    }


def record(*arguments, **settings):
    return BenchRecord.from_json(bench(*arguments, **settings), "bench.json")


def bench(machine="aarch64", cpu="Cortex-A76", models=(2.0,), comparison=None):
    environment = {"machine": machine, "cpu": cpu, "cpus_usable": 4, "device": None}
    return {
        "schema": "edgerun.bench/1",
        "models": [timed(p50) for p50 in models],
        "comparison": comparison,
        "environment": environment,
    }


def judge(content, **budgets):
    resolved = Budgets.resolve(GateConfig.model_validate(budgets))
    return {v.rule: v for v in evaluate(content, resolved)}


def by_process(content, count=5, **steadiness):
    """A record as several processes give it."""
    for model in content["models"]:
        n = len(model["samples_ms"])
        cold = {"value": 4.0, "range": [3.0, 9.0], "n": count}
        model |= {"queries_per_process": [n // count] * count, "load": cold, "first": cold}
    return content | {"steadiness": {"steady": True, "reasons": []} | steadiness}


@pytest.fixture
def workstation(result):
    """A result of a stand-in for a Raspberry Pi."""
    text = json.dumps(result).replace("measured-on-target", "measured-on-host")
    return json.loads(text) | {"profile": "raspberry-pi-5"}


def test_a_bench_alone_is_gated_by_what_it_measured(tmp_path):
    (tmp_path / "bench.json").write_text(json.dumps(bench()))
    (tmp_path / "budget.yaml").write_text("latency: {p95_ms: 7}\nsize: {max_mb: 1}\n")
    edgekd("gate", tmp_path / "bench.json", "--budget", tmp_path / "budget.yaml")
    (tmp_path / "budget.yaml").write_text("latency: {p95_ms: 3}\n")
    edgekd("gate", tmp_path / "bench.json", "--budget", tmp_path / "budget.yaml", code=1)


@pytest.mark.parametrize("accuracy", [{"min": 0.5}, {"max": 5.0}, {"max_drop": 0.1}])
def test_a_bench_alone_does_not_show_an_accuracy(accuracy):
    lower = "max" in accuracy
    content = result_of_bench(record(), "bench.json", "measured-on-target", lower)
    (verdict,) = judge(content, accuracy=accuracy).values()
    assert verdict.status == "inconclusive"


def test_the_device_gives_a_result_its_latency_and_leaves_the_accuracy(workstation):
    workstation = Result.from_json(workstation)
    before = judge(workstation, latency={"p95_ms": 8}, accuracy={"min": 0.9})
    assert [v.status for v in before.values()] == ["inconclusive", "inconclusive"]
    assert "evidence: measured-on-host" in before["latency.p95_ms"].reason
    assert "--device bench.json" in before["latency.p95_ms"].reason
    content = with_bench(workstation, record(), "bench.json", "measured-on-target")
    after = judge(content, latency={"p95_ms": 8}, accuracy={"min": 0.9})
    assert after["latency.p95_ms"].status == "pass"
    assert after["latency.p95_ms"].figure.value == 6.0
    assert after["accuracy.min"].status == "inconclusive"
    assert (
        judge(content, latency={"min_speedup": 2})["latency.min_speedup"].status == "inconclusive"
    )


def test_the_devices_own_speed_up_replaces_the_workstations(workstation):
    ratio = {"ratio": 4.0, "rounds": 30, "interval": [3.8, 4.2]}
    measured = record(models=(2.0, 8.0), comparison=ratio)
    content = with_bench(
        Result.from_json(workstation), measured, "bench.json", "measured-on-target"
    )
    assert judge(content, latency={"min_speedup": 3})["latency.min_speedup"].status == "pass"
    assert content.models["teacher"].latency["p50_ms"].value == 8.0


def test_another_file_is_refused(workstation):
    other = bench()
    other["models"][0]["size_bytes"] = 99
    other = BenchRecord.from_json(other, "bench.json")
    with pytest.raises(InputError, match="another file"):
        with_bench(Result.from_json(workstation), other, "bench.json", "measured-on-target")
    workstation["models"]["student"]["sha256"] = "b" * 64
    with pytest.raises(InputError, match="another file"):
        with_bench(Result.from_json(workstation), record(), "bench.json", "measured-on-target")


@pytest.mark.parametrize("key", ["models", "environment", "schema"])
def test_a_damaged_bench_is_an_error_that_names_the_file(tmp_path, key):
    damaged = bench()
    del damaged[key]
    (tmp_path / "bench.json").write_text(json.dumps(damaged))
    (tmp_path / "budget.yaml").write_text("latency: {p95_ms: 7}\n")
    edgekd("gate", tmp_path / "bench.json", "--budget", tmp_path / "budget.yaml", code=2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"value": 9999.0}, "models.student.latency.p95_ms is 9999, outside its interval"),
        ({"n": 1, "interval": None}, "models.student.latency.p95_ms has no interval"),
        ({"value": None, "interval": [1, 2]}, "has an interval and no value"),
        ({"value": "fast"}, "models.0.latency.p95.value is 'fast'"),
    ],
)
def test_a_bench_that_contradicts_itself_is_refused(tmp_path, change, words):
    damaged = bench()
    damaged["models"][0]["latency"]["p95"] |= change
    (tmp_path / "bench.json").write_text(json.dumps(damaged))
    (tmp_path / "budget.yaml").write_text("latency: {p95_ms: 50}\n")
    done = edgekd("gate", tmp_path / "bench.json", "--budget", tmp_path / "budget.yaml", code=2)
    assert words in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("machine", "cpu", "profile", "evidence"),
    [
        ("aarch64", "Cortex-A76", "raspberry-pi-5", "measured-on-target"),
        ("x86_64", "AMD EPYC", "raspberry-pi-5", "measured-on-host"),
        ("x86_64", "AMD EPYC", "intel-n100", "measured-on-host"),
        ("x86_64", "Intel N100", "intel-n100", "measured-on-target"),
        ("x86_64", "AMD EPYC", None, "measured-on-target"),
    ],
)
def test_a_bench_of_another_processor_is_not_the_devices(machine, cpu, profile, evidence):
    device = load_profile(profile) if profile else None
    found, why = evidence_of_bench(record(machine, cpu), device, {"cpu": "AMD EPYC"})
    assert found == evidence
    assert bool(why) == (evidence == "measured-on-host")


def test_more_threads_than_cores_are_said(result):
    result["environment"]["cpus_usable"] = 2
    assert not any("threads" in line for line in cautions(Result.from_json(result)))
    many = copy.deepcopy(result)
    many["models"]["student"]["runtime"]["threads"] = 4
    assert any("4 threads on 2 usable cores" in line for line in cautions(Result.from_json(many)))
    assert thread_remark(2, 2) == thread_remark(None, 2) == thread_remark(4, None) == ""


def test_processes_and_cold_starts_reach_the_result(workstation):
    read = BenchRecord.from_json(by_process(bench()), "bench.json")
    merged = with_bench(Result.from_json(workstation), read, "bench.json", "measured-on-target")
    again = Result.from_json(merged.to_json())
    assert again.student.queries_per_process == (600,) * 5
    assert again.student.load_ms.value == 4.0
    assert again.student.first_ms.interval == (3.0, 9.0)
    assert again.steadiness.steady
    content = by_process(bench())
    content["models"][0]["queries_per_process"] = [600, 600]
    read = BenchRecord.from_json(content, "b")
    with pytest.raises(InputError, match="queries_per_process are 1200, and samples_ms has 3000"):
        result_of_bench(read, "b", "measured-on-target")


@pytest.mark.parametrize(
    ("limit", "status"),
    # The p50 is 2 ms, from 1.8 to 2.2: by a factor of 1.5 it is from 1.2 to 3.3.
    [(3.5, "pass"), (3.0, "inconclusive"), (1.5, "inconclusive"), (1.1, "fail")],
)
def test_an_unsteady_latency_decides_only_by_a_wide_margin(limit, status):
    reason = "the machine is busy: other processes used 50 % of the CPU time"
    content = by_process(bench(), steady=False, reasons=[reason])
    result = result_of_bench(BenchRecord.from_json(content, "b"), "b", "measured-on-target")
    verdict = judge(result, latency={"p50_ms": limit})["latency.p50_ms"]
    assert verdict.status == status
    if status == "inconclusive":
        assert reason in verdict.reason
    assert any(reason in caution for caution in cautions(result))
    # Memory is not a matter of steadiness.
    assert judge(result, memory={"peak_mb": 12})["memory.peak_mb"].status == "pass"
