"""Successive halving of named arms, each rung a trial of an Optuna study that survives a kill.

Every arm is trained for a few epochs, one in ``reduction`` is promoted and trained for more, until
the last rung decides (Jamieson & Talwalkar 2016, "Non-stochastic best arm identification";
synchronous: a rung is complete before any arm is promoted). The storage holds all state. A trial
that is finished is never run again, and processes that share a storage divide the trials between
them; since each promotes by the finished trials alone, all end with the same result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from edgekd.errors import EdgekdError, InputError, StageError
from edgekd.students.race_storage import Objectives, RaceTrials, RungScore

_DEFINITION = "edgekd.race/1"


@dataclass(frozen=True)
class RaceResult:
    """The result of a race.

    Attributes:
        rungs: the rungs that each arm finished, in order; none for one that failed at once.
        order: all arms, the best first: by the last rung reached, then by rank on it; failed
            ones last.
        winner: the first of them: of the arms on the last rung, the best in the first objective.
        front: the non-dominated arms of the last rung, in the order of the arms.
        failed: why an arm dropped out, by arm.
    """

    rungs: Mapping[str, tuple[RungScore, ...]]
    order: tuple[str, ...]
    winner: str
    front: tuple[str, ...]
    failed: Mapping[str, str] = field(default_factory=dict)


def rungs_of(last_epochs: int, arms: int, reduction: int) -> tuple[int, ...]:
    """The epochs of each rung, ascending, so that the last one still compares at least two arms.

    Args:
        last_epochs: epochs of the last rung.
        arms: number of arms on the first one.
        reduction: one of so many is promoted, with so many times the epochs.
    """
    if min(last_epochs, arms) < 1 or reduction < 2:
        raise ValueError(f"no race of {arms} arms, {last_epochs} epochs, reduction {reduction}")
    count, left = 1, arms
    while math.ceil(left / reduction) > 1:
        count, left = count + 1, math.ceil(left / reduction)
    epochs = (max(1, round(last_epochs / reduction**at)) for at in reversed(range(count)))
    return tuple(sorted(set(epochs)))


def epochs_of(rungs: Sequence[int], arms: int, reduction: int, kept: int = 0) -> int:
    """An upper bound of the epochs that a race trains, over all arms and rungs.

    ``kept`` is the number of arms that are always promoted.
    """
    total = 0
    for epochs in rungs:
        total += arms * epochs
        arms = min(arms, math.ceil(arms / reduction) + kept)
    return total


def pareto_front(points: Sequence[Sequence[float]], directions: Sequence[str]) -> list[int]:
    """The indices, ascending, of the points that no other dominates.

    Args:
        points: one number per objective.
        directions: ``max`` or ``min`` for each of them. A point dominates another if it is at
            least as good in every objective and better in one; equal points are both kept.
    """
    signed = _signed(points, directions)
    return [
        at
        for at, own in enumerate(signed)
        if not any(
            other != own and all(o >= p for o, p in zip(other, own, strict=True))
            for other in signed
        )
    ]


def ranked(points: Sequence[Sequence[float]], directions: Sequence[str]) -> list[int]:
    """All indices, the best first: by non-dominated rank, then by crowding distance (NSGA-II, Deb
    et al. 2002), then as given. With one objective this is the order of its values.
    """
    left = list(range(len(points)))
    order: list[int] = []
    while left:
        front = [left[at] for at in pareto_front([points[i] for i in left], directions)]
        distance = _crowding([points[i] for i in front])
        order += [front[at] for at in sorted(range(len(front)), key=lambda at: -distance[at])]
        left = [i for i in left if i not in front]
    return order


def race(
    arms: Sequence[str],
    train: Callable[[str, int], Mapping[str, float] | float],
    *,
    rungs: Sequence[int],
    reduction: int,
    storage: str | None,
    study: str,
    objectives: Objectives = (("score", "max"),),
    keep: Sequence[str] = (),
    say: Callable[[str], None] | None = None,
    drops: tuple[type[EdgekdError], ...] = (InputError, StageError),
    where: str = "student.search.storage",
) -> RaceResult:
    """Race the arms; resumes where an earlier call with the same storage and study was stopped.

    Args:
        arms: distinct names; of equal arms the earlier is better.
        train: trains one arm for so many epochs from its initial weights and returns its values by
            objective, or the one value. A value that is not finite makes the arm drop out.
        rungs: epochs of each rung, ascending.
        reduction: one of so many is promoted.
        storage: a URL of SQLAlchemy, such as ``sqlite:///race.sqlite3``; None: in memory.
        study: the name of the race in the storage: another definition needs another name.
        objectives: name and direction; several: promotion by non-dominated rank.
        keep: arms that are promoted to the last rung in any case.
        say: prints a progress message.
        drops: errors with which an arm drops out, with its reason; any other error stops the race.
        where: the YAML position of the storage, for errors.

    Raises:
        InputError: Optuna is missing; the storage cannot be opened, read or written, or holds
            another race under this name.
        StageError: all arms dropped out.
    """
    rungs = tuple(rungs)
    if not arms or len(set(arms)) < len(arms) or not set(keep) <= set(arms):
        raise ValueError(f"arms must be distinct and include those that are kept: {arms}, {keep}")
    if not rungs or rungs[0] < 1 or list(rungs) != sorted(set(rungs)) or reduction < 2:
        raise ValueError(f"rungs must ascend: {rungs}; reduction must be at least 2: {reduction}")
    say = say or (lambda text: None)
    definition = {
        "race": _DEFINITION,
        "arms": list(arms),
        "rungs": list(rungs),
        "reduction": reduction,
        "objectives": [list(objective) for objective in objectives],
        "keep": list(keep),
    }
    trials = RaceTrials(study, storage, definition, objectives, where)
    with trials.open():
        return _run(trials, arms, train, rungs, reduction, keep, say, drops)


def _run(
    trials: RaceTrials,
    arms: Sequence[str],
    train: Callable[[str, int], Mapping[str, float] | float],
    rungs: Sequence[int],
    reduction: int,
    keep: Sequence[str],
    say: Callable[[str], None],
    drops: tuple[type[EdgekdError], ...],
) -> RaceResult:
    directions = [direction for _, direction in trials.objectives]
    entrants = list(arms)
    scores: dict[str, list[RungScore]] = {arm: [] for arm in arms}
    failed: dict[str, str] = {}
    order: list[str] = []
    last: list[str] = []
    for epochs in rungs:
        found = _finish_rung(trials, entrants, epochs, train, say, drops)
        failed |= {arm: reason for arm, reason in found.items() if isinstance(reason, str)}
        last = [arm for arm in entrants if not isinstance(found[arm], str)]
        if not last:
            trials.forget_failures()
            reasons = "; ".join(f"{arm}: {reason}" for arm, reason in failed.items())
            raise StageError(
                f"no candidate of {len(arms)} could be trained: {reasons}",
                where=f"race {trials.study_name}",
                remedy="fix what the reasons name; the next run tries them again",
            )
        for arm in last:
            score = found[arm]
            assert isinstance(score, RungScore)
            scores[arm].append(score)
        points = [_point(scores[arm][-1], trials.objectives) for arm in last]
        best = [last[at] for at in ranked(points, directions)]
        order = best + [arm for arm in order if arm not in best]
        count = math.ceil(len(entrants) / reduction)
        promoted = {*best[:count], *(arm for arm in keep if arm in best)}
        entrants = [arm for arm in arms if arm in promoted]
        if len(entrants) == 1:
            break
    points = [_point(scores[arm][-1], trials.objectives) for arm in last]
    first = dict(zip(last, (own[0] for own in _signed(points, directions)), strict=True))
    finalists = sorted((arm for arm in order if arm in first), key=lambda arm: -first[arm])
    others = [arm for arm in order if arm not in first and arm not in failed]
    lost = [arm for arm in arms if arm in failed]
    return RaceResult(
        {arm: tuple(rows) for arm, rows in scores.items()},
        (*finalists, *others, *lost),
        finalists[0],
        tuple(last[at] for at in pareto_front(points, directions)),
        failed,
    )


def _finish_rung(
    trials: RaceTrials,
    entrants: Sequence[str],
    epochs: int,
    train: Callable[[str, int], Mapping[str, float] | float],
    say: Callable[[str], None],
    drops: tuple[type[EdgekdError], ...],
) -> dict[str, RungScore | str]:
    """Run the rung's trials that no other process runs, wait for the others, and return all."""
    waiting, pause = False, 0.2
    while True:
        trials.release_dead()
        found = trials.finished(epochs)
        if all(arm in found for arm in entrants):
            return {arm: found[arm] for arm in entrants}
        number = trials.claim([arm for arm in entrants if arm not in found], epochs)
        if number is None:
            if not waiting:
                others = ", ".join(arm for arm in entrants if arm not in found)
                say(f"  waiting for another process, which trains {others} for {epochs} epochs")
            waiting = True
            time.sleep(pause)
            pause = min(2.0, 1.5 * pause)
            continue
        pause = 0.2
        arm = trials.arm_of(number)
        started = time.perf_counter()
        with trials.alive(number):
            try:
                value = train(arm, epochs)
            except drops as error:
                trials.tell_failed(number, str(error))
                say(f"  {arm}: drops out: {error}")
                continue
            except BaseException:
                # Interrupted, or the target is gone: it is run again by the next call.
                trials.release(number)
                raise
        names = [name for name, _ in trials.objectives]
        values = value if isinstance(value, Mapping) else {names[0]: value}
        numbers = {name: float(values[name]) for name in names}
        if odd := next((name for name in names if not math.isfinite(numbers[name])), None):
            reason = f"its {odd} is {numbers[odd]:g}"
            trials.tell_failed(number, reason)
            say(f"  {arm}: drops out: {reason}")
            continue
        trials.tell(number, numbers, time.perf_counter() - started)
        shown = ", ".join(f"{name} {each:.4g}" for name, each in numbers.items())
        say(f"  {arm}: {shown} after {epochs} epoch{'s' if epochs > 1 else ''}")


def _point(score: RungScore, objectives: Objectives) -> tuple[float, ...]:
    return tuple(score.values[name] for name, _ in objectives)


def _signed(points: Sequence[Sequence[float]], directions: Sequence[str]) -> list[list[float]]:
    """The points with every objective turned so that higher is better."""
    return [
        [value if way == "max" else -value for value, way in zip(point, directions, strict=True)]
        for point in points
    ]


def _crowding(points: Sequence[Sequence[float]]) -> list[float]:
    """The crowding distance of each point of a front: infinite at the ends of an objective."""
    distance = [0.0] * len(points)
    for values in zip(*points, strict=True):
        order = sorted(range(len(points)), key=lambda at: values[at])
        width = values[order[-1]] - values[order[0]]
        if width == 0:
            continue
        distance[order[0]] = distance[order[-1]] = math.inf
        for before, at, after in zip(order, order[1:], order[2:], strict=False):
            distance[at] += (values[after] - values[before]) / width
    return distance
