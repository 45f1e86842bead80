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
from edgerun.percentiles import median_interval

WINDOW_QUERIES = 5
WINDOW_SECONDS = 0.1
STEADY_WINDOWS = 3
STEADY_TOLERANCE = 0.05
"""A warm-up window has at least this many queries and lasts at least this long; latency is
steady when the medians of the last three are within 5 % of their middle."""

ROUNDS = 30
LEAST_ROUNDS = 6
BLOCK_SECONDS = 0.01
SETTLE_SECONDS = 0.005
"""Thirty rounds, and at the very least six: fewer have no 95 % interval of their median. A
model's block of queries in one round lasts about 10 ms or more. Before it, 5 ms of untimed
queries bring the model back into the caches that the other one has just used and let the other
one's idle threads go to sleep."""


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
        deadline = time.perf_counter() + limit_s
        queries, windows = 0, []
        while True:
            window = self._window()
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

    def _window(self) -> list[float]:
        deadline = time.perf_counter() + WINDOW_SECONDS
        window = self.block(WINDOW_QUERIES)
        while time.perf_counter() < deadline:
            window += self.block(WINDOW_QUERIES)
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
) -> list[list[list[float]]]:
    """Latencies in ms, by model, by round, by query.

    Rounds alternate the models (A B A B …), so that a slow drift of the machine meets both
    alike. There are at least 30 rounds and ``min_queries`` for each model, unless the time is
    over; two models have six rounds even then.
    """
    guesses = [w.windows[-1] / 1e3 for w in warm_ups]
    queries = [_block_queries(guess, sum(guesses), min_queries, max_seconds) for guess in guesses]
    rounds: list[list[list[float]]] = [[] for _ in watches]
    counts = [0] * len(watches)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + max_seconds
        while min(counts) < min_queries or len(rounds[0]) < ROUNDS:
            for i, watch in enumerate(watches):
                if len(watches) > 1:
                    watch.settle()
                rounds[i].append(watch.block(queries[i]))
                counts[i] += queries[i]
            over = time.perf_counter() > deadline
            if over and (len(watches) == 1 or len(rounds[0]) >= LEAST_ROUNDS):
                break
    finally:
        if collecting:
            gc.enable()
    return rounds


def compare(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> dict[str, Any]:
    """How many times slower the second model is: p50 against p50 within each round.

    The ratio is the median over the rounds. Its interval is the median's order-statistic
    interval, distribution-free, with the round as the unit: queries of one round share the
    machine's state, rounds nearly do not.
    """
    ratios = [
        statistics.median(other) / statistics.median(one) for one, other in zip(first, second)
    ]
    interval = median_interval(ratios)
    return {
        "ratio": statistics.median(ratios),
        "interval": list(interval) if interval else None,
        "rounds": len(ratios),
        "confidence": 0.95,
    }


def _block_queries(latency_s: float, round_s: float, min_queries: int, max_seconds: float) -> int:
    """Queries of one block: enough for the goal in 30 rounds, few enough for 30 in the time."""
    latency_s = max(latency_s, 1e-7)
    wanted = max(math.ceil(min_queries / ROUNDS), math.ceil(BLOCK_SECONDS / latency_s))
    affordable = math.floor(max_seconds / ROUNDS / max(round_s, 1e-7))
    return max(1, min(wanted, affordable))
