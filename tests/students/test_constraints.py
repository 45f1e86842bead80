"""A limit holds only where the whole measured interval holds it, and fails only as a whole."""

import pytest

from edgekd.config.budgets import Budgets, GateConfig
from edgekd.config.profile import load_profile
from edgekd.errors import InputError
from edgekd.students.constraints import Limits, operator_violations
from edgekd.students.costs import Figures, Footprint, Prediction, Range


def limits(margin=0.1, **values):
    keyed = {key.replace("__", "."): value for key, value in values.items()}
    return Limits(keyed, dict.fromkeys(keyed, "gate"), margin)


def figures(p95=(1.0, 0.9, 1.1), memory=20.0, size=1.0, parameters=1000, speedup=None):
    return Figures(
        {"p50": Range(p95[0] / 2, p95[1] / 2, p95[2] / 2), "p95": Range(*p95)},
        memory and Range(memory, memory, memory), size, parameters, "float32", 3, speedup,
    )  # fmt: skip


def prediction(p95=(1.0, 0.9, 1.1), memory=(20.0, 18.0, 22.0)):
    return Prediction({"p50": Range(*p95), "p95": Range(*p95)}, Range(*memory), Range(1, 1, 1), 9)


def keys(found):
    return [each.key for each in found]


@pytest.mark.parametrize(
    ("limit", "breaks"), [(1.05, True), (1.15, True), (1.21, True), (1.23, False)]
)
def test_a_measured_interval_holds_with_the_margin(limit, breaks):
    # 1.1 is its upper end; 1.1 / 0.9 is 1.222.
    assert bool(limits(latency__p95_ms=limit).violations(figures())) == breaks


@pytest.mark.parametrize(("limit", "breaks"), [(0.89, True), (0.91, False), (1.05, False)])
def test_a_prediction_fails_only_with_its_whole_band(limit, breaks):
    assert bool(limits(latency__p95_ms=limit).violations(prediction())) == breaks


def test_every_broken_limit_is_named_with_its_figure():
    gate = GateConfig.model_validate({"latency": {"p95_ms": 0.5}, "size": {"max_mb": 0.9}})
    budgets = Budgets.resolve(gate, load_profile("raspberry-pi-4"))
    found = Limits.of(budgets).violations(figures(memory=300.0))
    assert keys(found) == ["size.max_mb", "latency.p95_ms", "memory.peak_mb"]
    assert "1 ms (0.9 to 1.1), measured, is above the limit of 0.5 ms" in found[1].text
    assert "profile raspberry-pi-4" in found[2].text


def test_a_figure_that_could_not_be_measured_holds_nothing():
    (broken,) = limits(memory__peak_mb=64).violations(figures(memory=None))
    assert "could not be measured" in broken.text
    assert keys(limits(latency__p99_ms=9).violations(figures())) == ["latency.p99_ms"]


def test_ratios_are_to_the_teacher():
    asked = limits(size__min_ratio=4, parameters__max_ratio=0.5, latency__min_speedup=2)
    teacher = figures(size=3.0, parameters=1500, p95=(1.5, 1.5, 1.5))
    assert keys(asked.violations(figures(), teacher)) == list(asked.values)
    assert asked.violations(figures(size=0.5, parameters=700, p95=(0.2, 0.2, 0.2)), teacher) == ()
    # Interleaved rounds with the teacher count more than two separate timings.
    slow = asked.violations(figures(size=0.5, parameters=700, speedup=Range(2, 1.9, 2.1)), teacher)
    assert keys(slow) == ["latency.min_speedup"]


def test_the_nearest_budget_makes_a_candidate_feasible():
    asked = limits(latency__p95_ms=1.0, memory__peak_mb=21)
    candidates = {
        "slow": figures(p95=(2, 2, 2), memory=15),
        "faster": figures(p95=(1.2, 1.2, 1.2), memory=15),
        "large": figures(p95=(0.1, 0.1, 0.1), memory=40),
        "both": figures(p95=(1.01, 1.01, 1.01), memory=22),
    }
    found = {tuple(each.limits): each for each in asked.nearest(candidates)}
    assert found["latency.p95_ms",].candidate == "faster"
    assert found["memory.peak_mb",].candidate == "large"
    assert len(found) == 2
    for each in found.values():
        raised = Limits({**asked.values, **each.limits}, asked.origins, asked.margin)
        assert raised.violations(candidates[each.candidate]) == ()
    (both,) = asked.nearest({"both": candidates["both"]})
    assert set(both.limits) == set(asked.values)


def test_more_measuring_is_for_intervals_that_are_too_wide():
    asked = limits(latency__p95_ms=1.2)
    assert asked.undecided(figures(p95=(1.0, 0.9, 1.3)))
    assert not asked.undecided(figures(p95=(1.1, 1.1, 1.1)))  # within the margin
    assert not asked.undecided(figures(p95=(1.0, 0.9, 1.05)))  # holds
    assert not limits(size__max_mb=0.5, latency__p95_ms=1.2).undecided(figures(p95=(1, 0.9, 1.3)))


def test_limits_below_the_runtimes_own_needs_are_refused():
    with pytest.raises(InputError, match=r"8 MB is not above .* 9.94 MB") as caught:
        limits(memory__peak_mb=8).check(Footprint(9.94, 0.01))
    assert "gate.memory.peak_mb above 9.94 MB" in (caught.value.remedy or "")
    with pytest.raises(InputError, match="p50_ms"):
        limits(latency__p50_ms=0.005).check(Footprint(9.94, 0.01))
    limits(memory__peak_mb=12, latency__p50_ms=0.1).check(Footprint(9.94, 0.01))


def test_an_operator_that_is_missing_is_named():
    assert "NonMaxSuppression" in operator_violations(["NonMaxSuppression"])[0].text
