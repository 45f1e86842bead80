"""The report is complete, agrees in its three forms, and cannot be injected into."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekd.config.budgets import Budgets, GateConfig
from edgekd.release.charts import linear_axis, log_axis
from edgekd.release.gate import evaluate
from edgekd.release.report import write_report
from edgekd.release.result import Result
from tests.release.conftest import figure

BUDGETS = Budgets.resolve(
    GateConfig.model_validate({"accuracy": {"max_drop": 0.02}, "size": {"max_mb": 0.01}})
)
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Balanced(HTMLParser):
    """Fails on a tag that is not closed where it was opened."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.scripts = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        self.scripts += tag == "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def written(folder, result, histories, pipeline, extras=None):
    found = Result.from_json(result)
    write_report(folder, found, evaluate(found, BUDGETS), histories, pipeline, extras)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_is_balanced_and_loads_nothing(tmp_path, result, histories, pipeline):
    page = written(tmp_path, result, histories, pipeline)
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.scripts == 0
    assert not [value for name, value in parser.attributes if name in ("src", "href")]
    assert not re.search(r"https?://|@import|url\(", page)


def test_all_three_forms_hold_the_same_figures(tmp_path, result, histories, pipeline):
    page = written(tmp_path, result, histories, pipeline)
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    for text in ("92.51 %", "93.86 %", "91.42 %", "9.81×", "44.70 %"):
        assert text in page
        assert text in summary
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["passed"] is False
    assert report["result"]["comparison"] == json.loads(json.dumps(result["comparison"]))
    assert "samples_ms" not in report["result"]["models"]["student"]


def test_markup_in_names_stays_text(tmp_path, result, histories, pipeline):
    evil = '<script>alert("1")</script>'
    result["name"] = result["profile"] = evil
    result["environment"][evil] = evil
    histories["student"]["epochs"][0]["terms"][evil] = 1.0
    histories["student"]["epochs"][1]["terms"][evil] = 1.0
    page = written(tmp_path, result, histories, {**pipeline, "name": evil}, {evil: {evil: evil}})
    assert "<script" not in page
    assert "<script" not in (tmp_path / "summary.md").read_text(encoding="utf-8")


def test_a_lean_result_still_makes_a_report(tmp_path, result, pipeline):
    # A black-box teacher that was not timed, no baseline, no training here.
    del result["models"]["baseline"]
    for key in ("latency", "samples_ms", "warmup", "peak_memory_mb", "runtime"):
        del result["models"]["teacher"][key]
    for key in ("gap_closed", "baseline_gain", "speedup"):
        del result["comparison"][key]
    page = written(tmp_path, result, {"teacher": None}, pipeline)
    assert "student alone" not in page
    assert "Validation accuracy" not in page


def test_what_weakens_the_figures_is_said(tmp_path, result, histories, pipeline):
    result["evidence"] = "measured-on-host"
    result["models"]["student"]["warmup"]["steady"] = False
    result["comparison"]["gap_closed"].update(value=None, interval=None, note="no gap to close")
    page = written(tmp_path, result, histories, pipeline)
    for words in ("not the device", "never became steady", "no gap to close"):
        assert words in page


def test_processes_and_what_disturbed_them_are_shown(tmp_path, result, histories, pipeline):
    student = result["models"]["student"]
    student["queries_per_process"] = [600] * 5
    student["load_ms"] = figure(7.25, "ms", 5, (6.5, 9.5))
    reason = "other processes used 48 % of the CPU time"
    result["steadiness"] = {"steady": False, "reasons": [reason]}
    page = written(tmp_path, result, histories, pipeline)
    p50 = np.median(student["samples_ms"][600:1200])
    for words in ("queries in 5 processes", "7.25 ms", reason, f"process 2: p50 {p50:.4g} ms"):
        assert words in page


@pytest.mark.parametrize("epochs", [1, 2])
def test_short_or_diverged_trainings_are_drawn(tmp_path, result, histories, pipeline, epochs):
    history = histories["student"]
    history["epochs"] = history["epochs"][:epochs]
    history["epochs"][0]["loss"] = float("nan")
    history["best_epoch"] = epochs
    assert "nan" not in written(tmp_path, result, {"student": history}, pipeline)


def test_equal_latencies_are_drawn(tmp_path, result, histories, pipeline):
    student = result["models"]["student"]
    student["samples_ms"] = [0.05] * 100
    for percentile in student["latency"].values():
        percentile.update(value=0.05, interval=[0.05, 0.05], n=100)
    assert "NaN" not in written(tmp_path, result, histories, pipeline)


@given(st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=5))
def test_linear_axes_hold_their_values_and_a_readable_number_of_ticks(values):
    values = [value if abs(value) > 1e-6 else 0.0 for value in values]
    axis = linear_axis(values)
    assert axis.low <= min(values) <= max(values) <= axis.high
    assert 2 <= len(axis.ticks) <= 9
    assert len({label for _, label in axis.ticks}) == len(axis.ticks)
    steps = np.diff([mark for mark, _ in axis.ticks])
    assert np.allclose(steps, steps[0], rtol=1e-3)


@given(st.floats(1e-4, 1e4), st.floats(1.5, 1e4))
def test_log_axes_hold_their_values(low, ratio):
    axis = log_axis([low, low * ratio])
    assert axis.low < low < low * ratio < axis.high
    positions = [axis.position(mark) for mark, _ in axis.ticks]
    assert positions == sorted(positions)
    assert all(float(label.replace(",", "")) == pytest.approx(m) for m, label in axis.ticks)


@pytest.mark.parametrize(
    ("value", "interval", "words"),
    [
        (-0.344, (-0.3817, -0.3054), "istillation harmed by 34.40 points (30.54 to 38.17)"),
        (-0.004, (-0.011, 0.003), "not shown: −0.40 points (−1.10 to 0.30)"),
        (0.004, (-0.003, 0.011), "not shown: +0.40 points (−0.30 to 1.10)"),
        (
            0.02,
            (0.01, 0.03),
            "2.00 points (1.00 to 3.00) better than the same student without the teacher",
        ),
    ],
)
def test_what_distillation_did_is_said(
    tmp_path, result, histories, pipeline, value, interval, words
):
    result["comparison"]["baseline_gain"].update(value=value, interval=interval)
    page = written(tmp_path, result, histories, pipeline)
    assert words in page
    assert words in (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert ("ship the student trained alone" in page) == (interval[1] < 0)


def test_the_teachers_harm_and_the_race_are_shown(tmp_path, result, histories, pipeline):
    hostile = "<script>x</script>"
    extras = {
        "comparison": {
            "outcome": "worse",
            "sentence": "the distilled student is worse than the student alone: −3 points",
            "causes": [{"cause": hostile, "evidence": "0.1 %", "try": "distill: {keep: better}"}],
            "kept": "baseline",
            "kept_why": "the student alone is better on validation data, and is shipped",
        },
        "recipes": {
            "metric": "accuracy",
            "winner": "soft_labels",
            "why": "accuracy 0.9000 after 4 epochs",
            "recipes": [
                {
                    "name": "soft_labels",
                    "rungs": [{"epochs": 1, "score": 0.5}, {"epochs": 4, "score": 0.9}],
                    "failed": None,
                },
                {"name": "own", "rungs": [], "failed": "the loss became nan"},
            ],
        },
    }
    page = written(tmp_path, result, histories, pipeline, extras)
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.scripts == 0
    for text in ("is worse than the student alone", "the loss became nan", "90.00 %", "4 epochs"):
        assert text in page
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    for form in (page, summary):
        assert "no teacher trained it" in form
        assert "student shipped (alone)" in form
    # The column is not that of a distilled student.
    assert "student distilled" not in summary
