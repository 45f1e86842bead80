"""A/A test of the interleaved comparison, and whether a model that is 5 % slower is found.

Compares a model with itself, and with one of 5 % more layers, N times each; then with busy loops
beside the measurement, where each verdict has to be "not steady"::

    python tests/benchmarks/aa.py 50 [--cases same slower loop pinned two] [--max-seconds 20]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgekd.targets import LocalTarget
from tests.benchmarks.coverage import share
from tests.benchmarks.layers import save_layers

LAYERS, MORE = 40, 42
LOADS = {"loop": (None,), "pinned": (0,), "two": (0, 1)}
"""Busy loops by case, each with the processor that it is pinned to."""


@contextmanager
def busy(processors: tuple[int | None, ...]) -> Iterator[None]:
    """Run busy loops meanwhile."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in processors]
    try:
        for loop, processor in zip(loops, processors, strict=True):
            if processor is not None:
                os.sched_setaffinity(loop.pid, {processor})
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def compared(case: str, first: Path, second: Path, count: int, seconds: float) -> None:
    """Compare two models N times and print how often a difference is claimed."""
    claims, steady, named, claimed_steady, ratios, halves = 0, 0, 0, 0, [], []
    with busy(LOADS.get(case, ())):
        for number in range(count):
            record = LocalTarget().bench(
                first, second, threads=1, max_seconds=seconds, memory=False
            )
            found, state = record["comparison"], record["steadiness"]
            low, high = found["interval"]
            different = not low <= 1 <= high
            claims, steady = claims + different, steady + state["steady"]
            claimed_steady += different and state["steady"]
            named += any("busy" in reason for reason in state["reasons"])
            ratios.append(found["ratio"])
            halves.append((high - low) / 2 / found["ratio"])
            print(
                f"{case} {number}: {found['ratio']:.4f} [{low:.4f}, {high:.4f}] "
                f"{len(record['processes'])} {json.dumps(state['reasons'])}",
                flush=True,
            )
    print(f"{case}: a difference claimed       {share(claims, count)}")
    print(f"{case}: claimed by a steady run    {share(claimed_steady, count)}")
    print(f"{case}: said to be steady          {share(steady, count)}")
    print(f"{case}: the machine called busy    {share(named, count)}")
    print(
        f"{case}: ratio {statistics.median(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f}), "
        f"median half width {statistics.median(halves):.2%}",
        flush=True,
    )


def main() -> None:
    """Run the cases and print their shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("n", type=int)
    cases = ("same", "slower", *LOADS)
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases)
    parser.add_argument("--max-seconds", type=float, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = save_layers(Path(folder) / "model.onnx", LAYERS)
        more = save_layers(Path(folder) / "more.onnx", MORE)
        for case in options.cases:
            other = more if case == "slower" else model
            compared(case, model, other, options.n, options.max_seconds)


if __name__ == "__main__":
    main()
