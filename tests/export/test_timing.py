from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from edgerun.timing import LEAST_ROUNDS, ROUNDS, WarmUp, compare, is_steady, timed_rounds


@dataclass
class Recorded:
    """A stopwatch that records the order of calls and returns given latencies."""

    name: str
    order: list[str]
    ms: float
    drift: float = 0.0
    calls: int = field(default=0)

    def settle(self) -> None:
        self.order.append(f"settle {self.name}")

    def block(self, queries: int) -> list[float]:
        self.order.append(self.name)
        self.calls += 1
        return [self.ms * (1 + self.drift * self.calls)] * queries


def warm(ms: float) -> WarmUp:
    return WarmUp(10, [ms] * 3, True)


def test_three_windows_alike_are_steady_and_the_latest_count():
    assert not is_steady([1.0, 1.0])
    assert is_steady([9.0, 1.0, 1.04, 0.97])
    assert not is_steady([1.0, 1.0, 1.0, 1.2])
    assert not is_steady([1.0, 1.0, 0.8])


def test_two_models_alternate_and_each_settles_before_its_block():
    order: list[str] = []
    watches = [Recorded("A", order, 1.0), Recorded("B", order, 2.0)]
    timed_rounds(watches, [warm(1.0), warm(2.0)], min_queries=30, max_seconds=60)
    assert order == ["settle A", "A", "settle B", "B"] * ROUNDS


def test_every_model_gets_its_queries_however_fast_the_other_is():
    watches = [Recorded("A", [], 0.001), Recorded("B", [], 5.0)]
    rounds = timed_rounds(watches, [warm(0.001), warm(5.0)], min_queries=1000, max_seconds=60)
    assert all(sum(map(len, model)) >= 1000 for model in rounds)
    assert len(rounds[0]) == len(rounds[1])


def test_when_the_time_is_over_a_comparison_still_has_an_interval():
    watches = [Recorded("A", [], 1.0), Recorded("B", [], 2.0)]
    rounds = timed_rounds(watches, [warm(1e5), warm(1e5)], min_queries=1000, max_seconds=1e-9)
    assert len(rounds[0]) == LEAST_ROUNDS
    assert compare(*([model] for model in rounds))["interval"] is not None


def test_a_drift_that_both_models_share_leaves_the_ratio():
    watches = [Recorded("A", [], 1.0, drift=0.1), Recorded("B", [], 3.0, drift=0.1)]
    rounds = timed_rounds(watches, [warm(1.0), warm(3.0)], 30, 60)
    for processes in (1, 3):
        result = compare(*([model] * processes for model in rounds))
        assert result["ratio"] == pytest.approx(3.0)
        assert result["interval"] == pytest.approx([3.0, 3.0])


def test_a_ratio_that_differs_by_process_is_only_as_sure_as_they_agree():
    # Within each process every round agrees.
    first = [[[1.0]] * 30] * 3
    second = [[[ms]] * 30 for ms in (0.9, 1.0, 1.1)]
    result = compare(first, second)
    assert result["interval"][0] < 0.9 < 1.1 < result["interval"][1]
    assert result["processes"] == [0.9, 1.0, 1.1]
