"""Which engine of the student is shipped."""

from __future__ import annotations

import pytest

from edgekd.config.budgets import Budgets, GateConfig
from edgekd.config.profile import load_profile
from edgekd.engines.selection import FLOAT, Candidate, choose
from edgekd.errors import StageError

SPEEDS = {"faster": (1.5, (1.4, 1.6)), "slower": (0.8, (0.7, 0.9)), "unclear": (1.1, (0.9, 1.3))}


def plain(size: int = 100_000, p50: float = 1.0) -> Candidate:
    return Candidate(FLOAT, size, 0.0, None, {"p50": p50})


def int8(speed: str = "faster", size: int = 30_000, drop: float = 0.001) -> Candidate:
    ratio, interval = SPEEDS[speed]
    return Candidate("int8", size, drop, (-0.001, 0.003), {"p50": 1 / ratio}, ratio, interval)


def gate(**sections: object) -> Budgets:
    return Budgets.resolve(GateConfig.model_validate(sections))


def test_faster_smaller_and_within_the_drop_is_taken():
    assert choose([plain(), int8()], gate(), 0.002).chosen == "int8"


@pytest.mark.parametrize(
    ("candidate", "said"),
    [
        (int8(drop=0.01), "drops by 0.0100"),
        (int8("slower"), "slower than float32: 0.80×"),
        (int8("unclear"), "not shown to be faster: 1.10× (0.90 to 1.30)"),
        (int8(size=100_000), "not smaller"),
        (Candidate("int8", 1, 0.0, None, {}), "not timed"),
    ],
)
def test_float32_stays_and_the_reason_names_what_is_against_the_other(candidate, said):
    choice = choose([plain(), candidate], gate(), 0.002)
    assert choice.chosen == FLOAT
    assert said in choice.reason


def test_a_slower_one_is_taken_when_only_it_meets_a_budget():
    budgets = gate(size={"min_ratio": 25})
    choice = choose([plain(), int8("slower")], budgets, 0.002, teacher_bytes=1_000_000)
    assert choice.chosen == "int8"
    assert "size.min_ratio = 25" in choice.reason


def test_a_budget_does_not_excuse_the_drop():
    budgets = gate(size={"max_mb": 0.05})
    assert choose([plain(), int8(drop=0.01)], budgets, 0.002).chosen == FLOAT


def test_meeting_only_size_does_not_beat_meeting_only_latency():
    budgets = gate(size={"max_mb": 0.05}, latency={"p50_ms": 1.1})
    choice = choose([plain(), int8("slower")], budgets, 0.002)
    assert choice.chosen == FLOAT
    assert [row.misses for row in choice.rows] == [
        ("size.max_mb = 0.05",),
        ("latency.p50_ms = 1.1",),
    ]


def test_the_speedup_over_the_teacher_counts_for_each_candidate():
    budgets = gate(latency={"min_speedup": 10})
    choice = choose([plain(), int8(size=200_000)], budgets, 0.002, teacher_speedup=8)
    assert [row.misses for row in choice.rows] == [("latency.min_speedup = 10",), ()]
    assert choice.chosen == "int8"


def test_the_fastest_of_the_eligible_is_taken():
    quicker = Candidate("fp16", 50_000, 0.0, None, {"p50": 0.5}, 2.0, (1.9, 2.1))
    assert choose([plain(), int8(), quicker], gate(), 0.002).chosen == "fp16"


def test_the_profiles_limits_count_where_the_gate_says_nothing():
    pi = load_profile("raspberry-pi-5")
    assert pi.budget.storage_mb is not None
    assert pi.budget.latency_ms is not None
    own = Budgets.resolve(GateConfig(), pi)
    assert own["size.max_mb"] == pi.budget.storage_mb.value
    assert own["latency.p95_ms"] == pi.budget.latency_ms.value
    too_large = plain(int(own["size.max_mb"] * 2e6))
    assert choose([too_large, int8("slower")], own, 0.002).chosen == "int8"
    gated = Budgets.resolve(GateConfig.model_validate({"size": {"max_mb": 1e6}}), pi)
    assert choose([too_large, int8("slower")], gated, 0.002).chosen == FLOAT


def test_a_way_that_was_refused_is_named():
    choice = choose([plain()], gate(), 0.002, refused={"int8-cpu": "drops by 0.1 at best"})
    assert "int8-cpu: drops by 0.1 at best" in choice.reason
    assert choice.to_json()["refused"] == {"int8-cpu": "drops by 0.1 at best"}


def test_alone_float32_is_chosen():
    choice = choose([plain()], gate(), 0.002)
    assert (choice.chosen, choice.reason) == (FLOAT, "no other variant was requested")


@pytest.mark.parametrize("speed", ["faster", "slower", "unclear"])
def test_who_insists_on_int8_gets_it_and_is_told_what_speaks_against_it(speed):
    candidates = [plain(), int8(speed)]
    made = choose(candidates, gate(), 0.002, select="int8")
    assert made.chosen == candidates[1].name
    assert "quantize.select: int8" in made.reason
    assert ("although" in made.reason) == (speed != "faster")
    assert choose(candidates, gate(), 0.002, select="float32").chosen == FLOAT


def test_the_smallest_is_taken_however_slow():
    candidates = [plain(size=100), int8("slower", size=30)]
    assert choose(candidates, gate(), 0.002, select="smallest").chosen == candidates[1].name
    candidates = [plain(size=100), int8("faster", size=130)]
    assert choose(candidates, gate(), 0.002, select="smallest").chosen == FLOAT


@pytest.mark.parametrize("select", ["int8", "half"])
def test_insisting_does_not_excuse_the_drop(select):
    with pytest.raises(StageError, match="is within a drop") as caught:
        choose([plain(), int8(drop=0.01)], gate(), 0.002, select=select)
    assert "max_drop" in caught.value.remedy
