"""The gate never passes what was not shown."""

import json
from dataclasses import dataclass
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from edgekd.cli import main
from edgekd.config.budgets import Budgets, GateConfig
from edgekd.errors import InputError
from edgekd.release.gate import evaluate, passed, read_gate, write_gate
from edgekd.release.result import Result, read_result, recipe_sha256


@dataclass
class Limit:
    value: float


@dataclass
class Limits:
    latency_ms: Limit | None = None
    memory_mb: Limit | None = None
    storage_mb: Limit | None = None


@dataclass
class Device:
    name: str
    budget: Limits


def judge(result, profile=None, **budgets):
    resolved = Budgets.resolve(GateConfig.model_validate(budgets), profile)
    verdicts = evaluate(Result.from_json(result), resolved)
    return {verdict.rule: verdict for verdict in verdicts}


def as_mae(result):
    """The same figures as errors."""
    text = json.dumps(result).replace('"unit": "accuracy"', '"unit": "mae"')
    changed = json.loads(text.replace('"unit": "points"', '"unit": "mae"'))
    changed["task"].update(metric="mae", higher_is_better=False)
    return changed


def test_the_whole_interval_decides(result):
    # drop 0.0135 with interval 0.0088 to 0.0182
    assert judge(result, accuracy={"max_drop": 0.02})["accuracy.max_drop"].status == "pass"
    assert judge(result, accuracy={"max_drop": 0.005})["accuracy.max_drop"].status == "fail"
    near = judge(result, accuracy={"max_drop": 0.015})["accuracy.max_drop"]
    assert near.status == "inconclusive"
    assert "more test samples" in near.reason
    assert not passed([near])


def test_the_gain_over_the_student_alone_is_gated(result):
    # gain 0.0109 with interval 0.0059 to 0.0159
    assert judge(result, accuracy={"min_gain": 0.005})["accuracy.min_gain"].status == "pass"
    assert judge(result, accuracy={"min_gain": 0.01})["accuracy.min_gain"].status == "inconclusive"
    assert judge(result, accuracy={"min_gain": 0.02})["accuracy.min_gain"].status == "fail"
    del result["comparison"]["baseline_gain"]
    assert judge(result, accuracy={"min_gain": 0})["accuracy.min_gain"].status == "inconclusive"


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1), st.floats(-1, 1))
def test_pass_and_fail_exclude_each_other_and_agree_with_the_value(value, down, up, budget):
    result = FIXED()
    drop = result["comparison"]["drop"]
    drop["value"], drop["interval"] = value, [value - down, value + up]
    verdict = judge(result, accuracy={"max_drop": budget})["accuracy.max_drop"]
    if verdict.status == "pass":
        assert value + up <= budget
    elif verdict.status == "fail":
        assert value - down > budget
    else:
        assert value - down <= budget < value + up


def FIXED():  # noqa: N802 - stands for a fixture where hypothesis cannot take one
    figure = {"value": 0.0, "unit": "points", "n": 100, "interval": None, "confidence": 0.95,
              "evidence": "measured-on-target", "note": ""}  # fmt: skip
    return {
        "schema": "edgekd.result/1", "name": "x", "profile": "host", "target": "local",
        "evidence": "measured-on-target",
        "task": {"name": "classification", "metric": "accuracy", "higher_is_better": True},
        "models": {"student": {"file": "s.onnx", "metric": {**figure, "unit": "accuracy"}}},
        "comparison": {"drop": dict(figure)},
        "environment": {}, "versions": {}, "fingerprints": {},
    }  # fmt: skip


def test_figures_without_sampling_error_are_compared_plainly(result):
    rules = judge(result, size={"max_mb": 0.147, "min_ratio": 20}, parameters={"max_ratio": 0.1})
    assert rules["size.max_mb"].status == "pass"
    assert rules["size.min_ratio"].status == "fail"
    assert rules["parameters.max_ratio"].status == "pass"


def test_a_percentile_without_enough_queries_is_not_shown(result):
    p99 = result["models"]["student"]["latency"]["p99_ms"]
    p99.update(value=None, interval=None, n=50, note="n too small: 50 of 662 queries")
    verdict = judge(result, latency={"p99_ms": 1000})["latency.p99_ms"]
    assert verdict.status == "inconclusive"
    assert "662" in verdict.reason


def test_weak_evidence_shows_nothing_but_the_facts_of_the_file(result):
    for model in result["models"].values():
        for figure in [model["metric"], model["size_mb"], *model.get("latency", {}).values()]:
            figure["evidence"] = "measured-on-host"
    budgets = {"accuracy": {"min": 0.5}, "latency": {"p95_ms": 100}, "size": {"max_mb": 10}}
    rules = judge(result, **budgets)
    assert rules["accuracy.min"].status == "inconclusive"
    assert rules["latency.p95_ms"].status == "inconclusive"
    assert rules["size.max_mb"].status == "pass"
    relaxed = judge(result, evidence="measured-on-host", **budgets)
    assert {verdict.status for verdict in relaxed.values()} == {"pass"}


def test_a_figure_that_was_not_measured_is_not_shown(result):
    del result["comparison"]["speedup"]
    verdict = judge(result, latency={"min_speedup": 2})["latency.min_speedup"]
    assert verdict.status == "inconclusive"
    assert "not measured" in verdict.reason


def test_profile_limits_hold_where_the_pipeline_is_silent(result):
    device = Device("board", Limits(Limit(0.001), Limit(1.0), Limit(100.0)))
    rules = judge(result, device, latency={"p95_ms": 2})
    assert rules["latency.p95_ms"].status == "pass"
    assert rules["latency.p95_ms"].origin == "gate"
    assert rules["memory.peak_mb"].status == "fail"
    assert rules["memory.peak_mb"].origin == "profile board"
    assert rules["size.max_mb"].status == "pass"


def test_a_gate_without_a_rule_is_an_error(result):
    with pytest.raises(InputError, match="no rule"):
        judge(result)
    with pytest.raises(InputError, match="no rule"):
        judge(result, Device("board", Limits()))
    assert not passed([])


@pytest.mark.parametrize("rule", [{"min": 93}, {"max_drop": 2}, {"min": 0.9, "max_drop": 1.5}])
def test_percents_for_an_accuracy_are_an_error(result, rule):
    with pytest.raises(InputError, match="ranges from 0 to 1") as caught:
        judge(result, accuracy=rule)
    name, value = list(rule.items())[-1]
    assert caught.value.where == f"gate.accuracy.{name}"
    assert f"{value / 100:g}" in caught.value.remedy
    result = as_mae(result)
    assert judge(result, accuracy={"max": 93, "max_drop": 2})


def test_a_floor_for_a_loss_contradicts_itself(result):
    result = as_mae(result)
    with pytest.raises(InputError, match="better when lower"):
        judge(result, accuracy={"min": 0.1})
    assert judge(result, accuracy={"max": 1.0})["accuracy.max"].status == "pass"


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda r: r.update(schema="other/1"), "schema"),
        (lambda r: r["models"].pop("student"), "models.student"),
        (lambda r: r.pop("comparison"), "comparison"),
        (lambda r: r["models"]["student"].pop("metric"), "models.student.metric"),
        (lambda r: r["models"]["student"]["metric"].update(value=float("nan")), "finite"),
        (lambda r: r["models"]["student"]["metric"].update(interval=[2, 1]), "turned"),
        (lambda r: r["models"]["student"]["metric"].update(interval=[2]), "two ends"),
        (lambda r: r["models"]["student"]["metric"].update(evidence="guessed"), "evidence"),
        (lambda r: r["models"]["student"]["metric"].update(extra=1), "not a figure"),
        (lambda r: r.update(task=[]), "task"),
    ],
)
def test_a_damaged_result_is_named(result, damage, word, tmp_path):
    damage(result)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    with pytest.raises(InputError, match=word):
        read_result(path)


@pytest.mark.parametrize(
    ("part", "change", "where"),
    [
        ("latency.p95_ms", {"value": 9999.0}, "p95_ms is 9999, outside its interval"),
        ("latency.p95_ms", {"n": 1, "interval": None}, "p95_ms has no interval"),
        ("latency.p95_ms", {"n": 2999}, "p95_ms.n is 2999, and samples_ms has 3000"),
        ("latency.p95_ms", {"value": -1.0, "interval": [-2.0, 1.0]}, "p95_ms is -1, which is not"),
        ("latency.p95_ms", {"unit": "s"}, "p95_ms.unit is 's', not 'ms'"),
        ("latency.p95_ms", {"value": 0.02, "interval": [0.01, 0.05]}, "and that of samples_ms"),
        ("latency.p95_ms", {"value": True}, "p95_ms.value is True"),
        ("latency.p95_ms", {"value": None}, "p95_ms has an interval and no value"),
        ("latency.p95_ms", {"n": -1}, "p95_ms.n is -1"),
        ("metric", {"value": 5.0, "interval": [4.9, 5.1]}, "metric is 5, which is not from 0 to 1"),
        ("metric", {"n": 0}, "metric.n is 0, and it has a value"),
        ("metric", {"confidence": 95}, "metric.confidence is 95"),
        ("size_mb", {"value": -0.1}, "size_mb is -0.1"),
        ("size_mb", {"unit": "KB"}, "size_mb.unit is 'KB', not 'MB'"),
        ("samples_ms", [0.03, -0.01], "samples_ms.1 is -0.01"),
        ("samples_ms", ["0.03"], "samples_ms.0 is '0.03'"),
        ("samples_ms", 3, "samples_ms is 3"),
    ],
)
def test_a_result_that_contradicts_itself_is_refused(result, part, change, where, tmp_path):
    owner = result["models"]["student"]
    *parents, last = part.split(".")
    for parent in parents:
        owner = owner[parent]
    if isinstance(change, dict):
        owner[last].update(change)
    else:
        owner[last] = change
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    (tmp_path / "budget.yaml").write_text("latency: {p95_ms: 50}\n")
    command = ["gate", str(path), "--budget", str(tmp_path / "budget.yaml")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2, done.output
    assert f"models.student.{part if 'samples' in part else part.partition('.')[0]}" in done.output
    assert where in " ".join(done.output.split())
    assert str(path) in done.output


def test_comparisons_and_gate_files_are_validated(result, tmp_path):
    result["comparison"]["speedup"].update(value=-3.0)
    with pytest.raises(InputError, match=r"comparison\.speedup is -3"):
        Result.from_json(result)
    gate = {"schema": "edgekd.gate/1", "verdicts": [{"rule": "size.max_mb", "status": "passed"}]}
    (tmp_path / "gate.json").write_text(json.dumps(gate))
    with pytest.raises(InputError, match=r"verdicts\.0\.status is 'passed'"):
        read_gate(tmp_path)


def test_a_result_is_written_as_it_was_read(result):
    result = json.loads(json.dumps(result))
    assert Result.from_json(result).to_json() == result
    # The first results had neither a recipe nor a seed nor the files' hashes.
    first = FIXED()
    assert Result.from_json(first).to_json() == first


def test_a_sampled_figure_without_an_interval_is_inconclusive(result):
    result["models"]["student"]["metric"].update(interval=None, n=1)
    verdict = judge(result, accuracy={"min": 0.5})["accuracy.min"]
    assert (verdict.status, "has no interval (n = 1)" in verdict.reason) == ("inconclusive", True)


def test_missing_and_broken_result_files(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_result(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"schema": ')
    with pytest.raises(InputError, match="JSON"):
        read_result(tmp_path / "cut.json")
    for content in ("[]", "[" * 100_000, f'{{"schema": {"9" * 5000}}}'):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(InputError):
            read_result(tmp_path / "other.json")


def test_a_gate_file_of_before_inconclusive_is_read(result, tmp_path):
    budgets = GateConfig.model_validate({"accuracy": {"max_drop": 0.015}})
    verdicts = evaluate(Result.from_json(result), Budgets.resolve(budgets))
    write_gate(tmp_path, "x", verdicts)
    text = (tmp_path / "gate.json").read_text()
    assert '"inconclusive"' in text
    old = text.replace("inconclusive", "not shown").replace("edgekd.gate/2", "edgekd.gate/1")
    (tmp_path / "gate.json").write_text(old)
    assert read_gate(tmp_path) == verdicts


def test_verdicts_come_back_and_junit_counts_what_did_not_pass(result, tmp_path):
    budgets = GateConfig.model_validate(
        {"accuracy": {"max_drop": 0.015}, "size": {"max_mb": 0.01}, "latency": {"p95_ms": 2}}
    )
    verdicts = evaluate(Result.from_json(result), Budgets.resolve(budgets))
    write_gate(tmp_path, "a <b> \x00 & c", verdicts)
    assert read_gate(tmp_path) == verdicts
    suite = ElementTree.parse(tmp_path / "gate.xml").getroot().find("testsuite")
    assert (suite.get("tests"), suite.get("failures")) == ("3", "2")
    types = sorted(failure.get("type") for failure in suite.iter("failure"))
    assert types == ["fail", "inconclusive"]


def test_recipe_is_the_same_for_all_seeds_and_names():
    one = {"name": "a", "seed": 0, "student": {"model": "m"}}
    assert recipe_sha256(one) == recipe_sha256({**one, "name": "b", "seed": 3})
    assert recipe_sha256(one) != recipe_sha256({**one, "student": {"model": "n"}})


def test_result_knows_its_optional_parts(result):
    del result["models"]["baseline"], result["comparison"]["gap_closed"]
    parsed = Result.from_json(result)
    assert "baseline" not in parsed.models
    assert parsed.student.latency["p95_ms"].unit == "ms"
