"""Latency of one query: warm-up until steady, and timed rounds in which two models alternate."""

from __future__ import annotations

import gc
import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any, Sequence

from edgerun.errors import BadInput, RunFailed
from edgerun.inputs import Feeds
from edgerun.model import LoadedModel
from edgerun.percentiles import median_interval, t_interval

WINDOW_QUERIES = 5
WINDOW_SECONDS = 0.05
STEADY_WINDOWS = 3
STEADY_TOLERANCE = 0.05
"""A warm-up window has at least this many queries, unless the time is over, and lasts at least this
long; latency is steady when the medians of the last three are within 5 % of their middle."""

WARM_UP_SHARE = 0.25
LEAST_WARM_UP_SECONDS = 0.2
MOST_WARM_UP_SECONDS = 3.0
"""The warm-ups of all models together may take this share of the time of a process, but each may
take 0.2 s, and none takes more than 3 s; a window is always completed."""

ROUNDS = 30
LEAST_ROUNDS = 6
BLOCK_SECONDS = 0.01
SETTLE_SECONDS = 0.005
"""Thirty rounds, those of all processes together, and at the very least six: fewer have no 95 %
interval of their median. A model's block of queries in one round lasts about 10 ms or more. Before
it, 5 ms of untimed queries bring the model back into the caches that the other one has just used
and let the other one's idle threads go to sleep."""


@dataclass(frozen=True)
class WarmUp:
    """The course of a warm-up: medians of its windows in ms, and whether they became steady."""

    queries: int
    windows: list[float]
    steady: bool

    def to_json(self) -> dict[str, Any]:
        """A plain mapping."""
        return {
            "queries": self.queries,
            "windows": [round(w, 6) for w in self.windows],
            "steady": self.steady,
        }


@dataclass
class Stopwatch:
    """A model with its feeds, timed one query at a time."""

    model: LoadedModel
    feeds: Feeds
    _next: int = field(default=0, init=False)

    def check(self) -> None:
        """Run each feed once, so that one that does not fit is a clear error before any timing."""
        try:
            for feed in self.feeds.feeds:
                self.model.run(feed)
        except RunFailed as error:
            chosen = {name: note for name, note in self.feeds.notes.items() if "=" in note}
            if not chosen:
                raise
            sizes = "; ".join(f"{name}: {note}" for name, note in chosen.items())
            raise BadInput(
                f"{error.what} (sizes were chosen here: {sizes})", error.where, error.remedy
            ) from error

    def block(self, queries: int) -> list[float]:
        """Latencies in ms of this many queries, one after the other.

        Only the model's ``query`` is between the two readings of the clock: for an ONNX file
        ``InferenceSession.run``, for an engine the copies to the GPU and back as well.
        """
        query, clock = self.model.query, time.perf_counter_ns
        feeds, count = self.feeds.feeds, len(self.feeds.feeds)
        start = self._next
        elapsed = [0] * queries
        for i in range(queries):
            feed = feeds[(start + i) % count]
            begin = clock()
            query(feed)
            elapsed[i] = clock() - begin
        self._next = (start + queries) % count
        return [ns / 1e6 for ns in elapsed]

    def warm_up(self, limit_s: float) -> WarmUp:
        """Query until three windows in a row are alike, or until ``limit_s`` seconds are over."""
        deadline = time.perf_counter() + min(limit_s, MOST_WARM_UP_SECONDS)
        queries, windows = 0, []
        while True:
            window = self._window(deadline)
            queries += len(window)
            windows.append(statistics.median(window))
            if is_steady(windows):
                return WarmUp(queries, windows, True)
            if time.perf_counter() > deadline:
                return WarmUp(queries, windows, False)

    def settle(self) -> None:
        """Untimed queries before a block that follows another model's."""
        deadline = time.perf_counter() + SETTLE_SECONDS
        self.block(1)
        while time.perf_counter() < deadline:
            self.block(1)

    def _window(self, limit: float) -> list[float]:
        end = time.perf_counter() + WINDOW_SECONDS
        window = self.block(1)
        while time.perf_counter() < end or len(window) < WINDOW_QUERIES:
            if time.perf_counter() > max(limit, end):
                break
            window += self.block(1)
        return window


def device_times(watch: Stopwatch, queries: int, limit_s: float) -> list[float] | None:
    """Milliseconds of each query on the GPU alone, by CUDA events; None for an ONNX file.

    A separate pass: the events would lengthen the queries that are timed.
    """
    device_ms, feeds = watch.model.device_ms, watch.feeds.feeds
    if device_ms is None:
        return None
    times: list[float] = []
    deadline = time.perf_counter() + limit_s
    while len(times) < queries and (time.perf_counter() < deadline or not times):
        times.append(device_ms(feeds[len(times) % len(feeds)]))
    return times


def is_steady(windows: Sequence[float]) -> bool:
    """Whether the last three windows' medians are within the tolerance of their middle one."""
    last = sorted(windows[-STEADY_WINDOWS:])
    if len(last) < STEADY_WINDOWS:
        return False
    middle = last[len(last) // 2]
    return max(last[-1] - middle, middle - last[0]) <= STEADY_TOLERANCE * middle


def timed_rounds(
    watches: Sequence[Stopwatch],
    warm_ups: Sequence[WarmUp],
    min_queries: int,
    max_seconds: float,
    min_rounds: int = ROUNDS,
) -> list[list[list[float]]]:
    """Latencies in ms, by model, by round, by query.

    Rounds alternate the models (A B A B …), so that a slow drift of the machine meets both
    alike. There are at least ``min_rounds`` rounds and ``min_queries`` for each model, unless the
    time is over; two models have a fifth of the rounds even then.
    """
    least = 1 if len(watches) == 1 else math.ceil(min_rounds * LEAST_ROUNDS / ROUNDS)
    guesses = [w.windows[-1] / 1e3 for w in warm_ups]
    queries = [
        _block_queries(guess, sum(guesses), min_queries, max_seconds, min_rounds)
        for guess in guesses
    ]
    rounds: list[list[list[float]]] = [[] for _ in watches]
    counts = [0] * len(watches)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + max_seconds
        while min(counts) < min_queries or len(rounds[0]) < min_rounds:
            for i, watch in enumerate(watches):
                if len(watches) > 1:
                    watch.settle()
                rounds[i].append(watch.block(queries[i]))
                counts[i] += queries[i]
            if time.perf_counter() > deadline and len(rounds[0]) >= least:
                break
    finally:
        if collecting:
            gc.enable()
    return rounds


Rounds = Sequence[Sequence[float]]
"""Latencies in ms of one model in one process, by round, by query."""


def compare(first: Sequence[Rounds], second: Sequence[Rounds]) -> dict[str, Any]:
    """How many times slower the second model is: p50 against p50 within each round.

    Of each process the median over its rounds. The ratio is the geometric mean over the processes,
    with the t interval of the logarithms: places in memory differ from process to process, and are
    the same for all rounds of one. A single process has the order-statistic interval of its
    median, which knows its rounds alone.

    Args:
        first: one model's rounds by process.
        second: the other's, in the same order.
    """
    by_process = [
        [statistics.median(other) / statistics.median(one) for one, other in zip(*pair)]
        for pair in zip(first, second)
    ]
    ratios = [statistics.median(of_one) for of_one in by_process]
    if len(ratios) > 1:
        ratio, *interval = t_interval(ratios)
    else:
        ratio, interval = ratios[0], list(median_interval(by_process[0]) or ())
    return {
        "ratio": ratio,
        "interval": interval or None,
        "rounds": sum(map(len, by_process)),
        "processes": [round(each, 6) for each in ratios],
        "confidence": 0.95,
    }


def _block_queries(
    latency_s: float, round_s: float, min_queries: int, max_seconds: float, rounds: int
) -> int:
    """Queries of one block: enough for the goal in all rounds, few enough for all in the time."""
    latency_s = max(latency_s, 1e-7)
    wanted = max(math.ceil(min_queries / rounds), math.ceil(BLOCK_SECONDS / latency_s))
    affordable = math.floor(max_seconds / rounds / max(round_s, 1e-7))
    return max(1, min(wanted, affordable))
