"""The search's logic with a device that is a formula: what is measured, rejected, proposed."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import pytest

from edgekd.config.networks import StudentConfig
from edgekd.config.pruning import PruneConfig
from edgekd.errors import TargetError
from edgekd.students.candidates import Candidate
from edgekd.students.constraints import Limits
from edgekd.students.costs import Figures, GraphCosts, Prediction, Range
from edgekd.students.race import RaceResult
from edgekd.students.race_storage import RungScore
from edgekd.students.search import (
    Entry,
    measure_in_turn,
    no_candidate,
    propose_assistant,
    take_race,
)

LIMITS = Limits({"latency.p95_ms": 1.0}, {"latency.p95_ms": "gate"}, 0.1)
MS_PER_MAC = 1e-6
OTHERS = {each.name for each in fields(GraphCosts)} - {
    "parameters", "macs", "weights_bytes", "activations_bytes", "traffic_bytes", "nodes",
    "operators",
}  # fmt: skip


def costs(macs: int) -> GraphCosts:
    return GraphCosts(
        parameters=macs // 10, macs=macs, weights_bytes=macs // 2, activations_bytes=1000,
        traffic_bytes=macs, nodes=9, operators=("Conv",), **dict.fromkeys(OTHERS, 0),
    )  # fmt: skip


def entry(name: str, macs: int, origin: str = "family", **student) -> Entry:
    section = StudentConfig(**{"model": "convnet-s", **student})
    return Entry(Candidate(name, origin, section, macs // 10), costs(macs))


def around(value: float, share: float = 0.02) -> Range:
    return Range(value, value * (1 - share), value * (1 + share))


def figures(macs: int) -> Figures:
    latency = macs * MS_PER_MAC
    ranges = {"p50": around(latency * 0.9), "p95": around(latency)}
    return Figures(ranges, around(9.0), macs / 1e6, macs // 10, "float32", 3)


class FakeModel:
    """Latency in proportion to MACs; its first guess is off by ``wrong``."""

    def __init__(self, wrong: float = 1.0, share: float = 0.1) -> None:
        self.factor, self.share = MS_PER_MAC * wrong, share

    def predict(self, given: GraphCosts) -> Prediction:
        latency = around(given.macs * self.factor, self.share)
        size = around(given.macs / 1e6, 0)
        return Prediction({"p50": latency, "p95": latency}, around(9.0), size, given.parameters)

    def correct(self, given: GraphCosts, found: Figures) -> None:
        self.factor, self.share = found.latency_ms["p95"].value / given.macs, 0.05


class Device:
    """Measures; ``fails`` do not run, and after ``dies_after`` others it cannot be reached."""

    def __init__(self, fails: tuple[str, ...] = (), dies_after: int = 1000) -> None:
        self.measured, self.fails, self.dies_after = [], fails, dies_after

    def __call__(self, each: Entry):
        if len(self.measured) == self.dies_after:
            raise TargetError("the board does not answer")
        self.measured.append(each.name)
        if each.name in self.fails:
            return SimpleNamespace(
                figures=None, variants={}, violations=(), reason="Conv is not implemented"
            )
        found = figures(each.costs.macs)
        broken = LIMITS.violations(found)
        return SimpleNamespace(
            figures=found,
            variants={"float32": found},
            violations=broken,
            reason="; ".join(each.text for each in broken),
        )


def measured(entries, model=None, device=None, most=24, several=False):
    device = device or Device()
    measure_in_turn(
        entries,
        model or FakeModel(),
        LIMITS,
        device,
        most=most,
        several=several,
        say=lambda _: None,
    )
    return device.measured


def test_what_surely_breaks_a_limit_is_not_measured() -> None:
    entries = [entry(f"c{macs}", macs) for macs in (100_000, 800_000, 5_000_000)]
    assert set(measured(entries)) == {"c100000", "c800000"}
    assert [each.status for each in entries] == ["feasible", "feasible", "predicted-infeasible"]
    assert "latency.p95_ms" in entries[-1].reason
    assert "predicted" in entries[-1].reason


def test_a_measurement_corrects_a_rejecting_prediction() -> None:
    # The prior thinks everything twenty times slower: only the smallest seems possible.
    entries = [entry(f"c{macs}", macs) for macs in (40_000, 500_000, 800_000, 3_000_000)]
    measured(entries, FakeModel(wrong=20))
    assert [each.status for each in entries] == [*["feasible"] * 3, "predicted-infeasible"]


def test_a_too_optimistic_prior_is_found_out_by_measuring() -> None:
    entries = [entry(f"c{macs}", macs) for macs in (500_000, *range(2_000_000, 3_000_000, 100_000))]
    names = measured(entries, FakeModel(wrong=0.01))
    assert len(names) < 4
    assert entries[0].status == "feasible"
    assert {each.status for each in entries[1:]} == {"infeasible", "predicted-infeasible"}


def test_the_most_promising_are_measured_and_the_rest_named() -> None:
    entries = [entry(f"c{n}", n * 10_000) for n in range(1, 41)]
    names = measured(entries, most=8)
    assert len(names) == 8
    largest = {f"c{n}" for n in range(35, 41)}
    assert len(largest & set(names)) >= 5
    left = [each for each in entries if each.status == "not-measured"]
    assert len(left) == 32
    assert "max_candidates" in left[0].reason


def test_several_objectives_measure_small_ones_too() -> None:
    entries = [entry(f"c{n}", 1000 * 2**n) for n in range(10)]
    names = measured(entries, most=5, several=True)
    assert {"c0", "c9"} <= set(names)


def test_one_that_cannot_run_is_named_and_others_go_on() -> None:
    entries = [entry("bad", 300_000), entry("good", 200_000)]
    measured(entries, device=Device(fails=("bad",)))
    assert [each.status for each in entries] == ["failed", "feasible"]
    assert "not implemented" in entries[0].reason


def test_an_unreachable_target_stops_with_the_rest_known() -> None:
    entries = [entry(f"c{n}", n * 100_000) for n in range(1, 6)]
    with pytest.raises(TargetError):
        measured(entries, device=Device(dies_after=2))
    assert sum(each.figures is not None for each in entries) == 2


def test_no_feasible_candidate_names_the_nearest_budget() -> None:
    entries = [entry("two", 2_000_000), entry("three", 3_000_000)]
    assert measured(entries) == ["two"]  # the nearest, to be certain of its figure
    error = no_candidate(entries, LIMITS)
    assert error.exit_code == 2
    assert "2 break latency.p95_ms" in error.what
    # 2 ms at the upper end of its interval, and a tenth to spare.
    assert "latency.p95_ms = 2.27 ms (two)" in error.remedy


def scores(*values: float, start: int = 2) -> tuple[RungScore, ...]:
    return tuple(RungScore(start * 3**n, {"accuracy": v}, 1.0) for n, v in enumerate(values))


def test_a_race_is_recorded_in_its_entries() -> None:
    entries = [entry(name, 100_000) for name in ("a", "b", "c", "d", "not raced")]
    entries[-1].reject("infeasible", "too slow")
    rungs = {"a": scores(0.8, 0.9), "b": scores(0.7), "c": scores(0.79, 0.85), "d": ()}
    take_race(entries, RaceResult(rungs, ("a", "c", "b", "d"), "a", ("a",), {"d": "no layer 'x'"}))
    statuses = [each.status for each in entries]
    assert statuses == ["finalist", "dropped", "finalist", "failed", "infeasible"]
    assert "2 epoch" in entries[1].reason
    assert "no layer" in entries[3].reason
    assert [each.front for each in entries] == [True, False, False, False, False]
    assert entries[-1].reason == "too slow"


def raced(*sizes_and_agreement: tuple[int, float | None], **more) -> list[Entry]:
    found = []
    for macs, agreement in sizes_and_agreement:
        each = entry(f"net-{macs}", macs, **more)
        each.agreement, each.rungs = agreement, scores(0.8)
        found.append(each)
    return found


TEACHER = costs(100_000_000)


def test_an_assistant_of_the_mean_size_is_proposed_with_figures() -> None:
    winner, *others = raced((1_000_000, 0.8), (5_000_000, 0.88), (9_000_000, None), (80_000, 0.6))
    found = propose_assistant(winner, [winner, *others], TEACHER, True)
    assert found is not None
    assert found["name"] == "net-9000000"  # nearest to the root of 1e6 · 1e8
    assert found["scheme"] == {"assistant": {"models": ["convnet-s"]}}
    for words in ("100 times the parameters", "0.88", "0.8", "net-5000000"):
        assert words in found["text"]


@pytest.mark.parametrize(
    ("winner", "larger"),
    [
        ((20_000_000, 0.8), (50_000_000, 0.9)),  # no large gap
        ((1_000_000, 0.9), (10_000_000, 0.85)),  # the larger one follows the teacher no better
        ((1_000_000, None), (10_000_000, 0.85)),  # nothing is known of the winner
    ],
)
def test_no_assistant_without_a_measured_reason(winner, larger) -> None:
    entries = raced(winner, larger)
    assert propose_assistant(entries[0], entries, TEACHER, True) is None


def test_what_a_scheme_cannot_name_is_no_assistant() -> None:
    winner, larger = raced((1_000_000, 0.8), (10_000_000, 0.9))
    pruned = StudentConfig(model="teacher", prune=PruneConfig(ratio=0.5))
    larger.candidate = Candidate("pruned", "prune", pruned, 1_000_000)
    assert propose_assistant(winner, [winner, larger], TEACHER, True) is None
