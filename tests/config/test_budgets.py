"""Every budget is resolved once: the section's value, else the profile's limit."""

from __future__ import annotations

import pytest

from edgekd.config.budgets import Budgets, GateConfig
from edgekd.config.profile import load_profile
from edgekd.errors import InputError


@pytest.fixture
def profile():
    return load_profile("raspberry-pi-5")


def test_the_section_wins_over_the_profile(profile):
    gate = GateConfig.model_validate({"latency": {"p95_ms": 3}, "accuracy": {"min": 0.9}})
    budgets = Budgets.resolve(gate, profile)
    assert (budgets["latency.p95_ms"], budgets.origin("latency.p95_ms")) == (3, "gate")
    assert budgets["memory.peak_mb"] == profile.budget.memory_mb.value
    assert budgets.origin("memory.peak_mb") == "profile raspberry-pi-5"
    assert list(budgets.given) == [
        "accuracy.min",
        "size.max_mb",
        "latency.p95_ms",
        "memory.peak_mb",
    ]


def test_there_are_no_budgets_without_both_and_no_other_keys():
    budgets = Budgets.resolve()
    assert budgets.given == {}
    assert budgets["size.max_mb"] is None
    with pytest.raises(KeyError):
        budgets["size.max"]
    with pytest.raises(InputError, match="no rule"):
        budgets.require_any()


def test_a_profile_or_a_constant_makes_a_rule(profile):
    Budgets.resolve(profile=profile).require_any()
    gate = GateConfig.model_validate({"accuracy": {"beat_constant": True}})
    Budgets.resolve(gate).require_any()
