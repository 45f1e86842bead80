"""A shipped pipeline on every kind of processor at hand: does its gate pass, and by how much?

    python tests/benchmarks/pipeline_matrix.py pipelines/digits.yaml -o matrix

Runs the pipeline for each seed, number of threads, ``ATEN_CPU_CAPABILITY`` (the vector instructions
that PyTorch uses: other ones give slightly other weights) and with the other core idle or busy. The
table has a line for each run; below it stands, for each rule of the gate, the worst figure of all
runs with its interval, the budget, and the distance between them: figures that scale (latency,
size, ratios) as a factor, accuracies in widths of the interval. A budget of a shipped pipeline is
to lie 1.5 times, or one width, beyond the worst. Training is bit-exact for a seed, a number of
threads and a capability, so that the second state of the other core starts from the first one's
weights and only builds, measures and gates again (``--train-again`` trains too). What is done
is kept: run it again to resume, or with ``--table`` to print the table only. Exit code 1: a run did
not pass.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

CAPABILITIES = ("default", "avx2", "avx512")
MEASURING = ("engines", "benchmark", "gate", "report", "bundle")
"""The stages that do not train: what is removed to run them again."""
BUSY = """
import os
os.sched_setaffinity(0, {core})
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(10**6):
        pass
"""


def capabilities() -> list[str]:
    """The values of ``ATEN_CPU_CAPABILITY`` that this processor can follow."""
    best = torch.backends.cpu.get_cpu_capability().lower()
    if best not in CAPABILITIES:
        return ["default"]
    return list(CAPABILITIES[: CAPABILITIES.index(best) + 1])


@contextmanager
def other_core(busy: bool) -> Iterator[None]:
    """Keep the last core busy with a loop, or leave it."""
    if not busy:
        yield
        return
    core = {max(os.sched_getaffinity(0))}
    loop = subprocess.Popen([sys.executable, "-c", BUSY.format(core=core)])
    try:
        yield
    finally:
        loop.kill()
        loop.wait()


def run(options: argparse.Namespace, case: tuple[int, int, str, bool]) -> dict[str, Any] | None:
    """One run: its exit code, seconds, accuracies, comparison and verdicts.

    None when it was not run and is not to be.
    """
    seed, threads, capability, busy = case
    name = f"seed{seed}-{threads}thread-{capability}-{'busy' if busy else 'idle'}"
    record = options.output / f"{name}.json"
    if record.is_file():
        found: dict[str, Any] = json.loads(record.read_text())
        return found
    if options.table:
        return None
    folder = options.output / name
    other = options.output / name.replace("busy" if busy else "idle", "idle" if busy else "busy")
    if other.with_suffix(".json").is_file() and not folder.exists() and not options.train_again:
        shutil.copytree(other, folder, symlinks=True)
        for stage in MEASURING:
            shutil.rmtree(folder / "artifacts" / stage)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "ATEN_CPU_CAPABILITY": capability}
    words = ["run", str(options.pipeline), "-o", str(folder), "--set", f"seed={seed}"]
    words += [part for override in options.set for part in ("--set", override)]
    began = time.perf_counter()
    with other_core(busy):
        done = subprocess.run(
            [sys.executable, "-m", "edgekd", *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    seconds = time.perf_counter() - began
    if done.returncode not in (0, 1):
        raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    result = json.loads((folder / "benchmark" / "result.json").read_text())
    (verdicts,) = folder.glob("artifacts/gate/*/gate.json")
    found = {
        "case": case,
        "exit": done.returncode,
        "seconds": seconds,
        "accuracy": {role: model["metric"] for role, model in result["models"].items()},
        "comparison": result["comparison"],
        "verdicts": json.loads(verdicts.read_text())["verdicts"],
    }
    record.write_text(json.dumps(found))
    return found


def ends(figure: dict[str, Any]) -> tuple[float, float, float]:
    """A figure's value, low and high end."""
    low, high = figure["interval"] or (figure["value"], figure["value"])
    return figure["value"], low, high


def table(rows: list[dict[str, Any]]) -> bool:
    """Print a line for each run and the worst figure of each rule; whether all passed."""
    print(
        "| seed | threads | capability | other core | exit | teacher | alone | distilled | gain "
        "| speed-up | seconds |\n|" + "---|" * 11
    )
    for row in rows:
        seed, threads, capability, busy = row["case"]
        accuracy = [
            f"{100 * row['accuracy'][role]['value']:.1f} %" if role in row["accuracy"] else "–"
            for role in ("teacher", "baseline", "student")
        ]
        compared = []
        for name, scale in (("baseline_gain", 100), ("speedup", 1)):
            if row["comparison"].get(name, {}).get("value") is None:
                compared.append("–")
                continue
            value, low, high = (scale * end for end in ends(row["comparison"][name]))
            compared.append(f"{value:.1f} ({low:.1f} to {high:.1f})")
        core = "busy" if busy else "idle"
        cells = [seed, threads, capability, core, row["exit"], *accuracy, *compared]
        print(f"| {' | '.join(map(str, cells))} | {row['seconds']:.0f} |")
    print("\n| rule | worst of all runs | budget | distance |\n|---|---|---|---|")
    by_rule: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        for verdict in row["verdicts"]:
            by_rule.setdefault(verdict["rule"], []).append(verdict)
    for rule, verdicts in by_rule.items():
        sign = 1 if verdicts[0]["side"] == "at most" else -1
        worst = max(verdicts, key=lambda v: max(sign * end for end in ends(v["figure"])))
        value, low, high = ends(worst["figure"])
        budget = worst["budget"]
        if rule.startswith("accuracy"):
            distance = f"{sign * (budget - value) / (high - low):.1f} interval widths"
        else:
            end = high if sign > 0 else low
            distance = f"{(budget / end) ** sign:.2f}×"
        print(f"| {rule} | {value:.4g} ({low:.4g} to {high:.4g}) | {budget:g} | {distance} |")
    passed = sum(row["exit"] == 0 for row in rows)
    gains = [row["comparison"].get("baseline_gain") for row in rows]
    shown = sum(gain is not None and ends(gain)[1] > 0 for gain in gains)
    print(f"\n{passed} of {len(rows)} passed; distilled shown above alone in {shown}")
    return passed == len(rows)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("matrix"))
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--capabilities", nargs="+", default=capabilities())
    parser.add_argument("--other-core", nargs="+", default=["idle", "busy"])
    parser.add_argument("--set", nargs="+", default=[], help="overrides, as of edgekd run")
    parser.add_argument("--train-again", action="store_true", help="for the other core's state too")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    cases = itertools.product(
        options.seeds,
        options.threads,
        options.capabilities,
        [state == "busy" for state in options.other_core],
    )
    rows = []
    for case in cases:
        row = run(options, case)
        if row is None:
            continue
        rows.append(row)
        print(f"{len(rows)}: {case}: exit {row['exit']}", file=sys.stderr, flush=True)
    if not table(rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
