"""What measuring over SSH costs beyond measuring: on loopback, the first time and later.

    python -m tests.benchmarks.ssh_overhead [RUNS]

Needs an SSH server's program (Debian: openssh-server), which is started for it on a free port.
The benchmark itself is timed on the device, from the start of edgerun to its end there; what
remains of the time of ``Target.bench`` is the overhead.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from edgekd.targets.remote import Job
from tests.onnx_builders import save_onnx
from tests.targets.conftest import Board, start_server

SETTINGS = {"threads": 1, "min_queries": 200, "max_seconds": 0.5, "memory": False}
TIMED = """\
import os, subprocess, sys, time
os.environ["EDGERUN_PARENT"] = str(os.getpid())
begin = time.time()
code = subprocess.call(sys.argv[1:])
open("../out/seconds", "w").write(str(time.time() - begin))
sys.exit(code)
"""


def overhead(board: Board, model: Path) -> tuple[float, float]:
    """Seconds of one bench by a new target, and those of them that edgerun did not run."""
    target = board.target()
    inside: list[float] = []
    start, run_job = time.perf_counter(), target.run_job

    def timed(job: Job, fetch):
        job.words = ["{python}", "-c", TIMED, *job.words]

        def fetch_all():
            inside.append(float(target.ask("read", job=job.id, path="out/seconds", offset=0)))
            (board.work / "jobs" / job.id / "out" / "seconds").unlink()
            fetch()

        return run_job(job, fetch_all)

    target.run_job = timed
    target.bench(model, **SETTINGS)
    seconds = time.perf_counter() - start
    target.close()
    return seconds, seconds - inside[0]


def main(runs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = save_onnx(
            place / "m.onnx", "(float[batch,2] x) => (float[batch,2] y) { y = Add (x, x) }"
        )
        (place / "sshd").mkdir()
        with start_server(place / "sshd") as board:
            first, later = [], []
            for _ in range(runs):
                shutil.rmtree(board.work, ignore_errors=True)
                first.append(overhead(board, model)[1])
                later.append(overhead(board, model)[1])
    for name, figures, limit in (("first time", first, 3.0), ("later", later, 1.5)):
        print(
            f"{name:11} median {statistics.median(figures):.2f} s, {min(figures):.2f} to "
            f"{max(figures):.2f} of {runs} (below {limit:g} s)"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
