"""Kill a pipeline at random moments and see that nothing of it is lost, left over or different.

``python tests/benchmarks/kills.py [KILLS] [--seed 0]`` runs a short pipeline undisturbed. Then it
starts new runs and ends each a few times by SIGKILL, SIGTERM or SIGINT at a random moment, until
one reaches its end. Weights, ONNX files and the gate's rules have to be those of the undisturbed
run; no process may be left, and no file in the folder for temporary files or in the run's own.
Exit code 1: something differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PIPELINE = """\
name: digits
data: {source: digits}
teacher: {model: convnet-m, train: {epochs: 3, batch_size: 64, learning_rate: 3e-3}}
student: {model: convnet-xs}
distill: {epochs: 4, batch_size: 64, learning_rate: 1e-2}
quantize: {int8: weights-only, select: float32}
benchmark: {min_queries: 100, max_seconds: 1}
gate: {size: {max_mb: 1}}
"""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
EXIT_CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
MARK = "EDGEKD_KILLS"


def start(folder: Path, name: str) -> subprocess.Popen[str]:
    """A run in a process group of its own, with a folder of its own for temporary files."""
    temporary = folder / f"{name}-tmp"
    temporary.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "edgekd", "run", "p.yaml", "-o", name, "-q"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"TMPDIR": str(temporary), MARK: str(temporary)},
        start_new_session=True,
    )


def contents(run: Path) -> dict[str, str]:
    """The digests of the weights and ONNX files, and the gate's rules with their status."""
    found = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for pattern in ("*.safetensors", "*.onnx")
        for file in sorted((run / "artifacts").rglob(pattern))
    }
    gate = json.loads(next(run.rglob("gate.json")).read_text(encoding="utf-8"))
    return found | {verdict["rule"]: verdict["status"] for verdict in gate["verdicts"]}


def survivors(run: Path) -> list[int]:
    """Processes that were started by a run (Linux)."""
    marked = f"{MARK}={run}-tmp".encode()
    left = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if marked in variables and state != "Z":
            left.append(int(process.name))
    return left


def main() -> None:
    """Kill, resume, compare; print one line per run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kills", type=int, nargs="?", default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draws = random.Random(options.seed)
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "p.yaml").write_text(PIPELINE)
        begin = time.monotonic()
        whole = start(folder, "whole")
        said = whole.communicate()[0]
        if whole.returncode:
            sys.exit(f"the undisturbed run ended with {whole.returncode}:\n{said}")
        seconds, expected = time.monotonic() - begin, contents(folder / "whole")
        print(f"undisturbed: {seconds:.1f} s, {len(expected)} files and rules", flush=True)
        kills = number = known = 0
        while kills < options.kills:
            name = f"run{number}"
            number += 1
            ended = []
            while True:
                process = start(folder, name)
                chosen = draws.choice(SIGNALS)
                try:
                    process.wait(draws.uniform(0.5, seconds) if len(ended) < 4 else None)
                except subprocess.TimeoutExpired:
                    process.send_signal(chosen)
                said = process.communicate()[0]
                time.sleep(0.3)
                if left := survivors(folder / name):
                    problems.append(f"{name}: processes {left} are left after {chosen.name}")
                if process.returncode == 0:
                    break
                ended.append(chosen.name)
                if process.returncode != EXIT_CODES[chosen]:
                    problems.append(f"{name}: {chosen.name} gives {process.returncode}: {said}")
                if "Traceback" in said:
                    problems.append(f"{name}: {chosen.name}: {said}")
            kills += len(ended)
            found = contents(folder / name)
            for key in sorted(expected.keys() | found.keys()):
                if expected.get(key) != found.get(key):
                    problems.append(f"{name}: {key} differs")
            files = [*(folder / f"{name}-tmp").iterdir(), *(folder / name).glob("tmp/*")]
            problems += [f"{name}: {file.name} is left" for file in files]
            new = problems[known:]
            known = len(problems)
            print(f"{name}: {', '.join(ended) or 'not killed'}; {kills} kills", *new, sep="\n  ")
            sys.stdout.flush()
    print(f"{kills} kills in {number} runs, {len(problems)} problems")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
