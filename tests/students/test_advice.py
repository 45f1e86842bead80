"""The rules of the advice: what is known decides, and what the file sets stands unless refuted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgekd.config.pipeline import PipelineConfig
from edgekd.config.profile import load_profile
from edgekd.pipeline.stage import Job
from edgekd.release.result import Result
from edgekd.stages import preflight
from edgekd.students.advice import advise, advised_content
from edgekd.students.advice_facts import Advice, Facts, Known
from tests.release.conftest import figure, make_result

BASE: dict[str, Any] = {
    "name": "n",
    "data": {"source": "digits"},
    "teacher": {"model": "convnet-l", "train": {}},
    "student": {"model": "convnet-xs"},
}


def facts(content: dict[str, Any] | None = None, profile: str = "host", **known: Any) -> Facts:
    written = {**BASE, **(content or {})}
    settings: dict[str, Any] = {
        "wished": frozenset(),
        "objectives": None,
        "providers": ("CPUExecutionProvider",),
        "saturates": False,
        "rtx_installed": False,
        "higher_is_better": True,
        "metric": "accuracy",
        "original": written,
    }
    config = PipelineConfig.model_validate(written)
    return Facts(config=config, content=written, profile=load_profile(profile), **settings | known)


def result(**changes: Any) -> Result:
    content = make_result()
    for key, value in changes.items():
        section, _, name = key.partition("__")
        content[section][name] = value
    return Result.from_json(content)


def of(known: Facts, key: str) -> Advice:
    return next(one for one in advise(known) if one.key == key)


def limited(**gate: Any) -> dict[str, Any]:
    return {"gate": gate}


SITUATIONS = {
    "plain": facts(),
    "own losses": facts({"distill": {"losses": ["soft_labels"], "epochs": 3, "cache": False}}),
    "two classes": facts(classes=2),
    "few labels": facts({"distill": {"labelled": 0.05}}),
    "mixup": facts({"data": {"source": "digits", "augment": ["mixup"]}}),
    "regression": facts({"task": "regression"}, higher_is_better=False, metric="mae"),
    "jetson": facts({"profile": "jetson-orin-nano-8gb"}, "jetson-orin-nano-8gb"),
    "rtx": facts({"profile": "rtx-4090"}, "rtx-4090"),
    "pi": facts({"profile": "raspberry-pi-4"}, "raspberry-pi-4"),
    "smallest": facts(objectives=("size", "accuracy"), inputs=((1, 8, 8),)),
    "limit": facts(
        limited(size={"max_mb": 0.02}),
        wished=frozenset({"gate.size.max_mb"}),
        teacher_parameters=Known(480_000, "t"),
    ),
    "measured": facts(result=result(), result_file="result.json"),
    "large gap": facts(teacher_parameters=Known(5e5, "t"), student_parameters=Known(4e3, "s")),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_the_advice_is_a_pipeline_that_passes_preflight(name: str, tmp_path: Path) -> None:
    known = SITUATIONS[name]
    content = advised_content(known.content, advise(known))
    config = PipelineConfig.model_validate(content)
    preflight(Job(config, tmp_path, load_profile(config.profile)), gated=known.higher_is_better)


@pytest.mark.parametrize("name", SITUATIONS)
def test_every_line_has_a_reason_and_its_evidence(name: str) -> None:
    known = SITUATIONS[name]
    keys = [one.key for one in advise(known)]
    assert len(keys) == len(set(keys))
    for one in advise(known):
        assert one.reason
        assert one.evidence
        assert one.evidence.split(":")[0] in {
            "measured", "published", "device", "yours", "asked for", "limits", "target",
            "convention", "default; device", "yours; device", "asked for; device",
        }  # fmt: skip
        assert "measured: " not in one.evidence or "measured: ;" not in one.evidence


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_changed_key_shows_what_the_file_has(name: str) -> None:
    known = SITUATIONS[name]
    for one in advise(known):
        written = known.written(one.key)
        if written is not None and one.value != written:
            assert one.yours == written
            assert "yours: " in one.comment
            assert "advised: " in one.comment


def test_a_student_measured_within_the_limits_stays() -> None:
    known = facts(limited(size={"max_mb": 0.2}), result=result(), result_file="runs/n/result.json")
    advice = of(known, "student")
    assert advice.value == BASE["student"]
    assert advice.evidence == "measured: runs/n/result.json"
    assert "1.35 points" in advice.reason


@pytest.mark.parametrize(("gate", "figure_named"), [
    ({"size": {"max_mb": 0.1}}, "size.max_mb"),
    ({"accuracy": {"max_drop": 0.01}}, "accuracy.max_drop"),
    ({"latency": {"p95_ms": 0.02}}, "latency.p95_ms"),
    ({"memory": {"peak_mb": 8}}, "memory.peak_mb"),
])  # fmt: skip
def test_a_student_measured_beyond_a_limit_is_searched_for(
    gate: dict[str, Any], figure_named: str
) -> None:
    advice = of(facts(limited(**gate), result=result(), result_file="r"), "student")
    assert "search" in advice.value
    assert BASE["student"] in advice.value["search"]["candidates"]
    assert advice.yours == BASE["student"]
    assert figure_named in advice.reason


def test_latency_of_another_device_is_no_evidence() -> None:
    gate = limited(latency={"p95_ms": 0.02})
    content = {**gate, "profile": "raspberry-pi-5"}
    known = facts(content, "raspberry-pi-5", result=result(), result_file="r")
    assert of(known, "student").value == BASE["student"]


@pytest.mark.parametrize("limit", [0.01, 0.05, 0.2, 1])
def test_pruning_starts_where_the_size_limit_can_hold(limit: float) -> None:
    known = facts(
        limited(size={"max_mb": limit}),
        wished=frozenset({"gate.size.max_mb"}),
        teacher_parameters=Known(480_000, "t"),
    )
    ratios = of(known, "student").value["search"]["candidates"][0]["prune"]["ratio"]
    assert len(ratios) == len(set(ratios)) > 1
    assert all(0 < ratio < 1 for ratio in ratios)
    assert 480_000 * 4 * (1 - ratios[-1]) ** 2 < limit * 1e6 or limit < 0.0075


@pytest.mark.parametrize(("entropy", "temperature"), [(0.02, 4), (0.2, 2), (0.7, 1)])
def test_a_softer_teacher_gets_a_lower_temperature(entropy: float, temperature: float) -> None:
    advice = of(facts(teacher_entropy=Known(entropy, "validation.json")), "distill.losses")
    assert advice.value[1]["dkd"]["temperature"] == temperature
    assert "validation.json" in advice.reason


def test_losses_that_harmed_are_raced_against_others() -> None:
    pytest.importorskip("optuna")
    harm = result(comparison__baseline_gain=figure(-0.02, "points", 1000, (-0.03, -0.01)))
    own = {"distill": {"losses": ["soft_labels"]}}
    known = facts(own, result=harm, result_file="r")
    assert of(known, "distill.losses").value == "auto"
    assert of(known, "distill.losses").yours == ["soft_labels"]
    assert of(known, "distill.keep").value == "better"
    fine = result(comparison__baseline_gain=figure(0.001, "points", 1000, (-0.01, 0.02)))
    kept = of(facts(own, result=fine, result_file="r"), "distill.losses")
    assert kept.value == ["soft_labels"]
    assert "not shown to harm" in kept.reason


def test_without_a_good_teacher_students_teach_each_other() -> None:
    content = make_result()
    content["models"]["teacher"]["metric"] = figure(0.9, "accuracy", 10000, (0.89, 0.91))
    weak = Result.from_json(content)
    known = facts({"distill": {"losses": "auto"}}, result=weak, result_file="r")
    assert of(known, "distill.scheme").value == {"online": {"peers": 2}}
    assert of(known, "distill.losses").value != "auto"  # A race compares with a teacher.
    PipelineConfig.model_validate(advised_content(known.content, advise(known)))


def test_an_assistant_only_across_a_large_gap() -> None:
    large = SITUATIONS["large gap"]
    assert of(large, "distill.scheme").value == {"assistant": {"models": ["convnet-m"]}}
    small = replace(large, student_parameters=Known(1e5, "s"))
    assert of(small, "distill.scheme").value == "offline"


@pytest.mark.parametrize(("profile", "quantize", "engines"), [
    ("host", {"int8": "static", "calibration": "percentile"}, ["onnxruntime"]),
    ("raspberry-pi-5", {"int8": "static", "calibration": "percentile"}, ["onnxruntime"]),
    ("raspberry-pi-4", None, ["onnxruntime"]),
    ("jetson-agx-orin-64gb", {"precision": "fp16", "select": "half"},
     [{"kind": "onnxruntime", "providers": ["CPUExecutionProvider"]}, {"kind": "tensorrt"}]),
])  # fmt: skip
def test_precision_and_engine_follow_the_device(
    profile: str, quantize: Any, engines: list[Any]
) -> None:
    content = advised_content(BASE, advise(facts({"profile": profile}, profile)))
    assert content.get("quantize") == quantize
    assert content["engines"] == engines


def test_a_file_without_an_accuracy_limit_gets_one() -> None:
    assert of(facts(), "gate.accuracy").value == {"max_drop": 0.01}
    own = facts(limited(accuracy={"min": 0.5}))
    assert of(own, "gate.accuracy").value == {"min": 0.5}


def test_class_numbers_stay_numbers() -> None:
    content = {"data": {"source": "digits", "classes": {1: "cat", 2: "dog"}}}
    advised = advised_content({**BASE, **content}, ())
    assert advised["data"]["classes"] == {1: "cat", 2: "dog"}
