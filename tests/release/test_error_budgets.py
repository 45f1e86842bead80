"""Errors as metrics: a constant is their chance, budgets are shares, signs follow the direction."""

from types import SimpleNamespace

import numpy as np
import pytest

from edgekd.config.budgets import Budgets, GateConfig
from edgekd.errors import InputError
from edgekd.measurement import metric_change
from edgekd.release.build_result import Measured, RunInfo, build_result
from edgekd.release.gate import evaluate
from edgekd.release.report_tables import cautions

MAE = SimpleNamespace(name="regression", metric="mae", higher_is_better=False)
ACCURACY = SimpleNamespace(name="classification", metric="accuracy", higher_is_better=True)
LATENCY = {"value": 1.0, "n": 1000, "interval": [0.9, 1.1], "note": ""}
BENCH = {
    "models": [
        {
            "latency": dict.fromkeys(("p50", "p90", "p95", "p99"), LATENCY),
            "memory": {"above_empty_mb": 1.0},
            "samples_ms": [1.0] * 1000,
            "path": "model.onnx",
            "sha256": "a" * 64,
            "size_bytes": 1000,
            "warmup": {},
            "providers": {},
            "threads": 1,
        }
    ],
    "comparison": None,
    "environment": {},
}


def made(tmp_path, task, constant, **scores):
    """A result whose models have these scores per sample."""
    origin = RunInfo(
        name="x",
        seed=0,
        recipe="a",
        profile="host",
        target="local",
        evidence="measured-on-target",
        versions={},
        fingerprints={},
    )
    file = tmp_path / "model.onnx"
    file.write_bytes(b"1" * 1000)
    measured = {role: Measured(file, 10, values) for role, values in scores.items()}
    return build_result(origin, task, measured, BENCH, constant)


def budgets(**accuracy):
    return Budgets.resolve(GateConfig.model_validate({"accuracy": accuracy}))


def judged(result, **accuracy):
    budgets = {"accuracy": accuracy, "size": {"max_mb": 1}}
    resolved = Budgets.resolve(GateConfig.model_validate(budgets))
    return {v.rule: v for v in evaluate(result, resolved)}


@pytest.fixture
def errors():
    """Scores around 1 of 200 samples."""
    return np.random.default_rng(0).gamma(4.0, 0.25, 200)


@pytest.mark.parametrize(
    ("times", "status"), [(0.5, "pass"), (1.5, "fail"), (1.0, "fail"), (0.999, "pass")]
)
def test_an_error_no_smaller_than_a_constants_fails_whatever_else_is_met(
    tmp_path, errors, times, status
):
    result = made(tmp_path, MAE, 1e5 * errors, student=times * 1e5 * errors)
    verdict = judged(result)["accuracy.beat_constant"]
    assert verdict.status == status
    if status == "fail":
        assert "beat_constant: false" in verdict.reason
        assert any("not better than a constant" in line for line in cautions(result))
    else:
        assert not any("constant" in line for line in cautions(result))
    assert "accuracy.beat_constant" not in judged(result, beat_constant=False)


def test_a_gain_that_the_samples_do_not_show_does_not_pass(tmp_path, errors):
    other = np.random.default_rng(1).permutation(errors)
    result = made(tmp_path, MAE, errors, student=other - 0.001)
    assert judged(result)["accuracy.beat_constant"].status == "inconclusive"


def test_an_accuracy_is_held_against_a_constant_only_when_asked(tmp_path):
    right = np.repeat([1.0, 0.0], 50)
    result = made(tmp_path, ACCURACY, right, student=right)
    assert list(judged(result)) == ["size.max_mb"]
    assert judged(result, beat_constant=True)["accuracy.beat_constant"].status == "inconclusive"
    assert any("not better than a constant" in line for line in cautions(result))


@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e6])
def test_a_drop_of_an_error_is_a_share_whatever_the_unit(tmp_path, errors, unit):
    scores = {"teacher": 0.2 * unit * errors, "student": 0.25 * unit * errors}
    result = made(tmp_path, MAE, unit * np.ones(200), **scores)
    share = 0.05 * errors.mean()
    figure = result.comparison["relative_drop"]
    assert figure.value == pytest.approx(share)
    assert judged(result, max_drop=1.2 * share)["accuracy.max_drop"].status == "pass"
    assert judged(result, max_drop=0.8 * share)["accuracy.max_drop"].status == "fail"


def test_a_result_without_the_constant_says_what_is_missing(tmp_path, errors):
    result = made(tmp_path, MAE, None, teacher=errors, student=errors)
    verdict = judged(result, max_drop=0.1)["accuracy.max_drop"]
    assert (verdict.status, "benchmark stage again" in verdict.reason) == ("inconclusive", True)
    assert "accuracy.beat_constant" not in judged(result)


def test_the_sign_of_a_change_follows_the_direction_of_the_metric():
    assert metric_change(0.01, higher_is_better=True) == -0.01
    assert metric_change(133.6, higher_is_better=False) == 133.6
    assert metric_change(-133.6, higher_is_better=False) == -133.6


def test_budgets_of_an_error_are_named_as_they_are_written():
    with pytest.raises(InputError) as caught:
        budgets(min=5).check_metric("mae", False)
    assert "accuracy.max: …, the largest mae" in caught.value.remedy
    with pytest.raises(InputError) as caught:
        budgets(max_drop=500).check_metric("mae", False)
    assert "accuracy.max: …" in caught.value.remedy
    with pytest.raises(InputError) as caught:
        budgets().require_any(higher_is_better=False)
    assert "accuracy: {max: …}" in caught.value.remedy


@pytest.mark.parametrize("beat", [None, False])
def test_what_nobody_asked_for_makes_no_gate(tmp_path, errors, beat):
    with pytest.raises(InputError, match="no rule"):
        evaluate(made(tmp_path, MAE, errors, student=0.5 * errors), budgets(beat_constant=beat))
    with pytest.raises(InputError, match="no rule"):
        budgets(beat_constant=beat).require_any(higher_is_better=False)
