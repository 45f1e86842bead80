"""Races of named arms: promotion, failures, several objectives, kills and several processes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekd.errors import InputError, StageError, TargetError
from edgekd.students import race_storage
from edgekd.students.race import RaceResult, epochs_of, pareto_front, race, ranked, rungs_of
from edgekd.students.race_storage import publish

ARMS = [f"a{number}" for number in range(9)]


class Recorder:
    """A training that counts its calls; the score is the arm's number."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def __call__(self, arm: str, epochs: int) -> float:
        self.calls.append((arm, epochs))
        return float(arm[1:]) + epochs / 100


def run(train: Any, storage: str | None = None, **settings: Any) -> RaceResult:
    values = {"arms": ARMS, "rungs": (1, 3), "reduction": 3, "study": "test", "storage": storage}
    return race(train=train, **(values | settings))


def sqlite(folder: Path) -> str:
    return f"sqlite:///{folder / 'race.sqlite3'}"


@given(st.integers(1, 200), st.integers(1, 60), st.integers(2, 5))
def test_rungs_end_with_all_epochs(arms: int, last: int, reduction: int) -> None:
    rungs = rungs_of(last, arms, reduction)
    assert rungs[-1] == last
    assert list(rungs) == sorted(set(rungs))
    left = arms
    for _ in rungs[:-1]:
        left = math.ceil(left / reduction)
    # No epochs for a rung whose only arm has nothing to be compared with.
    assert left >= min(2, arms)


def test_one_in_three_is_promoted() -> None:
    train = Recorder()
    found = run(train, keep=["a0"])
    assert found.winner == "a8"
    assert [arm for arm, epochs in train.calls if epochs == 3] == ["a0", "a6", "a7", "a8"]
    assert found.order == ("a8", "a7", "a6", "a0", "a5", "a4", "a3", "a2", "a1")
    assert sum(epochs for _, epochs in train.calls) == epochs_of((1, 3), 9, 3, kept=1)


def test_of_equal_arms_the_earlier_wins() -> None:
    assert run(lambda arm, epochs: 0.5).winner == "a0"


def test_a_smaller_error_wins_where_it_is_minimized() -> None:
    found = run(Recorder(), objectives=[("mae", "min")])
    assert found.winner == "a0"
    assert found.rungs["a0"][-1].values == {"mae": 0.03}


def test_an_arm_that_fails_drops_out_with_its_reason() -> None:
    def train(arm: str, epochs: int) -> float:
        if arm == "a8":
            raise StageError("the loss became nan")
        return math.nan if arm == "a7" else float(arm[1:])

    found = run(train)
    assert found.winner == "a6"
    assert "the loss became nan" in found.failed["a8"]
    assert found.failed["a7"] == "its score is nan"
    assert set(found.order[-2:]) == {"a7", "a8"}


def test_arms_that_all_failed_are_tried_again(tmp_path: Path) -> None:
    def fails(arm: str, epochs: int) -> float:
        raise StageError(f"no space for {arm}")

    with pytest.raises(StageError, match=r"no candidate of 9 .*no space for a8"):
        run(fails, sqlite(tmp_path))
    assert run(Recorder(), sqlite(tmp_path)).winner == "a8"


def test_an_error_that_is_no_arms_own_stops_the_race(tmp_path: Path) -> None:
    def unreachable(arm: str, epochs: int) -> float:
        if arm == "a4":
            raise TargetError("no route to host")
        return first(arm, epochs)

    first, second = Recorder(), Recorder()
    with pytest.raises(TargetError):
        run(unreachable, sqlite(tmp_path))
    assert run(second, sqlite(tmp_path)).winner == "a8"
    assert not set(first.calls) & set(second.calls)
    assert ("a4", 1) in second.calls


def test_a_finished_race_trains_nothing(tmp_path: Path) -> None:
    train = Recorder()
    found = run(Recorder(), sqlite(tmp_path))
    assert run(train, sqlite(tmp_path)) == found
    assert train.calls == []


def test_several_objectives_promote_the_front() -> None:
    # Accuracy rises and latency rises with the number; a7 is dominated by a6.
    def train(arm: str, epochs: int) -> dict[str, float]:
        number = int(arm[1:])
        return {"accuracy": number - 2 * (number == 7), "latency": number + (number == 7)}

    found = run(train, objectives=[("accuracy", "max"), ("latency", "min")])
    assert found.winner == "a8"
    assert "a7" not in found.front
    assert {"a0", "a8"} <= set(found.front)


POINTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12)


@given(POINTS)
def test_the_front_is_what_nothing_dominates(points: list[tuple[int, int]]) -> None:
    front = pareto_front(points, ["max", "min"])

    def dominates(one: tuple[int, int], other: tuple[int, int]) -> bool:
        return one != other and one[0] >= other[0] and one[1] <= other[1]

    for at, point in enumerate(points):
        assert (at in front) != any(dominates(other, point) for other in points)
    order = ranked(points, ["max", "min"])
    assert sorted(order) == list(range(len(points)))
    assert set(order[: len(front)]) == set(front)


def test_the_study_is_what_optuna_shows(tmp_path: Path) -> None:
    import optuna

    run(Recorder(), sqlite(tmp_path), objectives=[("accuracy", "max")])
    study = optuna.load_study(study_name="test", storage=sqlite(tmp_path))
    assert study.best_trial.params == {"arm": "a8", "epochs": 3}
    assert len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE])) == 12
    assert study.metric_names == ["accuracy"]


WORKER = """
import json, os, sys, time
from pathlib import Path
from edgekd.students.race import race

folder, seconds = Path(sys.argv[1]), float(sys.argv[2])

def train(arm, epochs):
    with open(folder / "calls", "a") as file:
        file.write(f"{arm} {epochs} {os.getpid()}\\n")
    time.sleep(seconds)
    with open(folder / "done", "a") as file:
        file.write(f"{arm} {epochs}\\n")
    return float(arm[1:])

found = race([f"a{n}" for n in range(9)], train, rungs=(1, 3), reduction=3, study="test",
             storage=f"sqlite:///{folder / 'race.sqlite3'}")
print(json.dumps([found.order, found.winner, {a: len(r) for a, r in found.rungs.items()}]))
"""


def start(folder: Path, seconds: float) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", WORKER, str(folder), str(seconds)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.is_file() else []


def test_a_killed_race_resumes_with_what_is_missing(tmp_path: Path) -> None:
    worker = start(tmp_path, 0.3)
    while len(lines(tmp_path / "calls")) < 4:
        assert worker.poll() is None, worker.communicate()
        time.sleep(0.02)
    os.kill(worker.pid, signal.SIGKILL)
    worker.communicate()
    before = lines(tmp_path / "done")
    resumed = start(tmp_path, 0)
    out, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    assert err == ""
    assert json.loads(out)[1] == "a8"
    again = Counter(lines(tmp_path / "done"))
    # The kill may have hit between the end of a training and its record.
    assert all(again[line] == 1 for line in before[:-1])
    assert len(again) == 12


def test_two_processes_divide_a_race(tmp_path: Path) -> None:
    workers = [start(tmp_path, 0.2), start(tmp_path, 0.2)]
    outputs = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    calls = [line.split() for line in lines(tmp_path / "calls")]
    assert len(calls) == len({(arm, epochs) for arm, epochs, _ in calls}) == 12
    assert len({process for _, _, process in calls}) == 2


def test_a_trial_without_a_heartbeat_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(arm: str, epochs: int) -> float:
        raise KeyboardInterrupt

    # A process of another machine that ended without a word.
    monkeypatch.setattr(race_storage, "_this_process", lambda: "elsewhere 1 1")
    monkeypatch.setattr(race_storage.RaceTrials, "release", lambda self, number: None)
    monkeypatch.setattr(race_storage, "GRACE_SECONDS", 1)
    with pytest.raises(KeyboardInterrupt):
        run(interrupted, sqlite(tmp_path))
    train = Recorder()
    assert run(train, sqlite(tmp_path)).winner == "a8"
    assert ("a0", 1) in train.calls


def test_an_unusable_storage_is_the_users_error(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("no database\n" * 1000)
    cases = {
        "nosuch://x": "cannot be used",
        "postgresql+nodriver://me:secret@host/db": "cannot be used",
        "no url at all": "cannot be used",
        f"sqlite:///{file}": "cannot be read or written: .*not a database",
        f"sqlite:///{file}/below": "cannot be read or written",
    }
    for url, says in cases.items():
        with pytest.raises(InputError, match=says) as error:
            run(Recorder(), url)
        assert "secret" not in str(error.value)
        assert error.value.remedy


def test_a_study_of_other_arms_is_refused(tmp_path: Path) -> None:
    run(Recorder(), sqlite(tmp_path))
    with pytest.raises(InputError, match="of other candidates or settings: a0, a1"):
        run(Recorder(), sqlite(tmp_path), arms=["a1", "a2"])


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"edgekd\[search\]"):
        run(Recorder())


def test_workers_take_what_the_first_published(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.sqlite3'}"
    assert publish(["a", "b"], url, "feasible") == ["a", "b"]
    assert publish(["b", "c"], url, "feasible") == ["a", "b"]
    assert publish(["c"], url, "another search") == ["c"]
