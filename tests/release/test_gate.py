"""The gate never passes what was not shown."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgekd.config.budgets import Budgets, GateConfig
from edgekd.errors import InputError, printable
from edgekd.measurement import Measurement
from edgekd.release.gate import Verdict, evaluate, passed, read_gate, write_gate, write_junit
from edgekd.release.result import Result
from tests.release.conftest import bare_result


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
    result = bare_result()
    drop = result["comparison"]["drop"]
    drop["value"], drop["interval"] = value, [value - down, value + up]
    verdict = judge(result, accuracy={"max_drop": budget})["accuracy.max_drop"]
    if verdict.status == "pass":
        assert value + up <= budget
    elif verdict.status == "fail":
        assert value - down > budget
    else:
        assert value - down <= budget < value + up


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


def test_a_gate_file_that_is_none_is_refused(tmp_path):
    gate = {"schema": "edgekd.gate/1", "verdicts": [{"rule": "size.max_mb", "status": "passed"}]}
    (tmp_path / "gate.json").write_text(json.dumps(gate))
    with pytest.raises(InputError, match=r"verdicts\.0\.status is 'passed'"):
        read_gate(tmp_path)


def test_a_sampled_figure_without_an_interval_is_inconclusive(result):
    result["models"]["student"]["metric"].update(interval=None, n=1)
    verdict = judge(result, accuracy={"min": 0.5})["accuracy.min"]
    assert (verdict.status, "has no interval (n = 1)" in verdict.reason) == ("inconclusive", True)


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


NAMES = ["<b>&amp;", "]]>", "\x00\x1b[31m", "\x9b2J", "\u202e", "\ud800", "\ufffe\uffff", "\ufdd0"]


@given(*[st.text() | st.sampled_from(NAMES)] * 2)
@example("".join(NAMES), "a\r\n\tb\u2028c")
def test_junit_shows_every_name_and_parses(name, reason):
    figure = Measurement(1.0, "MB", 1, note=reason)
    verdicts = [
        Verdict(f"size.{status}", status, figure, 2.0, reason, origin=f"profile {name}")
        for status in ("pass", "fail")
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "g.xml")
        write_junit(path, name, verdicts)
        suite = ElementTree.parse(path).getroot().find("testsuite")
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    good, bad = suite
    # Nothing is lost and nothing can control a terminal: an escape is as readable as its name.
    assert good.get("classname") == f"edgekd.gate.{suite.get('name')}"
    failure = bad.find("failure")
    for shown, text in (
        (suite.get("name"), name),
        (good.find("system-out").text, reason),
        (failure.get("message"), name),
        (failure.get("message"), reason),
        (failure.text, reason),
    ):
        assert printable(shown) == shown
        escaped = printable(text).replace("\ufffe", r"\ufffe").replace("\uffff", r"\uffff")
        assert escaped in shown
