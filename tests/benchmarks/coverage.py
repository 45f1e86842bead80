"""Whether the interval of p50 contains the p50 of an independent later run of the same benchmark.

Runs a benchmark N + 1 times, each from its start, and compares each run with the next. A run that
says it is not steady claims nothing::

    python tests/benchmarks/coverage.py 50 [--model MODEL.onnx] [--records FOLDER] [--pause 1]

The processes' samples are in the records, so that other rules for the interval can be tried on
``--records`` without measuring again: ``--read`` prints the figures of what is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from edgekd.measurement import wilson_interval
from edgekd.targets import LocalTarget
from edgerun.percentiles import median_interval, summarize, t_interval
from tests.benchmarks.layers import save_layers

Figure = tuple[float, tuple[float, float]]


def share(count: int, n: int) -> str:
    """``45 of 50: 90 % (79 to 96)`` with Wilson's interval."""
    if n == 0:
        return "0 of 0"
    low, high = wilson_interval(count, n)
    return f"{count} of {n}: {count / n:.0%} ({100 * low:.0f} to {100 * high:.0f})"


def samples_by_process(model: dict[str, Any]) -> list[list[float]]:
    """The latencies of a record's model, by process."""
    found, start = [], 0
    for count in model["queries_per_process"]:
        found.append(model["samples_ms"][start : start + count])
        start += count
    return found


def as_measured(model: dict[str, Any]) -> Figure:
    """The record's own p50 and interval."""
    low, high = model["latency"]["p50"]["interval"]
    return model["latency"]["p50"]["value"], (low, high)


def one_process(model: dict[str, Any]) -> Figure:
    """The order-statistic interval of the first process alone."""
    p50 = summarize(samples_by_process(model)[0])["p50"]
    return p50["value"], tuple(p50["interval"])


def all_samples(model: dict[str, Any]) -> Figure:
    """The order-statistic interval of all samples, without regard to the process."""
    p50 = summarize(model["samples_ms"])["p50"]
    return p50["value"], tuple(p50["interval"])


def of_the_mean(model: dict[str, Any]) -> Figure:
    """Student's interval of the mean of the processes' medians, not of a repetition."""
    mean, low, high = t_interval([statistics.median(part) for part in samples_by_process(model)])
    return mean, (low, high)


def of_a_repetition(model: dict[str, Any]) -> Figure:
    """Student's prediction interval, with the median of the processes' medians as the value."""
    medians = [statistics.median(part) for part in samples_by_process(model)]
    _, low, high = t_interval(medians, repeated=True)
    return statistics.median(medians), (low, high)


def of_the_range(model: dict[str, Any]) -> Figure:
    """The order-statistic interval of the processes' medians, or their range."""
    medians = [statistics.median(part) for part in samples_by_process(model)]
    interval = median_interval(medians) or (min(medians), max(medians))
    return statistics.median(medians), interval


RULES: Sequence[Callable[[dict[str, Any]], Figure]] = (
    as_measured, one_process, all_samples, of_the_mean, of_a_repetition, of_the_range,
)  # fmt: skip


def print_figures(records: Sequence[dict[str, Any]]) -> None:
    """Print the shares of pairs, for the interval as measured and for other rules."""
    pairs = list(pairwise(records))
    steady = [record["steadiness"]["steady"] for record in records]
    inside = [_covers(as_measured, *pair) for pair in pairs]
    either = sum(hit or not said for hit, said in zip(inside, steady, strict=False))
    both = [hit for hit, said in zip(inside, steady, strict=False) if said]
    print(f"runs that say they are steady           {share(sum(steady), len(steady))}")
    print(f"the next p50 inside, or not steady      {share(either, len(pairs))}")
    print(f"the next p50 inside, of steady runs     {share(sum(both), len(both))}")
    for rule in RULES:
        hits = sum(_covers(rule, *pair) for pair in pairs)
        widths = [
            (high - low) / 2 / value
            for value, (low, high) in (rule(record["models"][0]) for record in records)
        ]
        print(
            f"the next p50 inside, {rule.__name__:18} {share(hits, len(pairs))}; "
            f"median half width {statistics.median(widths):.1%}"
        )
    p50s = [as_measured(record["models"][0])[0] for record in records]
    print(f"p50 from {min(p50s):.5f} to {max(p50s):.5f} ms")


def _covers(
    rule: Callable[[dict[str, Any]], Figure], one: dict[str, Any], other: dict[str, Any]
) -> bool:
    (_, (low, high)), (value, _) = rule(one["models"][0]), rule(other["models"][0])
    return low <= value <= high


def main() -> None:
    """Measure, store and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("n", type=int)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--records", type=Path)
    parser.add_argument("--read", action="store_true")
    parser.add_argument("--pause", type=float, default=1.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.records or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        model = options.model or save_layers(Path(scratch) / "model.onnx", 20)
        for number in range(0 if options.read else options.n + 1):
            record = LocalTarget().bench(model, threads=1, max_seconds=20, memory=False)
            (folder / f"{number:03}.json").write_text(json.dumps(record))
            p50 = record["models"][0]["latency"]["p50"]
            reasons = "; ".join(record["steadiness"]["reasons"]) or "steady"
            count = len(record["processes"])
            print(f"{number}: {p50['value']:.5f} {p50['interval']} {count} {reasons}", flush=True)
            time.sleep(options.pause)
        print_figures([json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))])


if __name__ == "__main__":
    main()
