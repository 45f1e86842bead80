"""edgerun's timing against a bare loop around ``InferenceSession.run``: the ratios of p50 and p99.

Both time one session in one process, in turn, so that the machine and the places in memory are
the same for both. The goals are a p50 within 2 % and a p99 within 10 %::

    python tests/benchmarks/bare_loop.py [MODEL.onnx] [--threads 1] [--processes 10]

Each process is fresh; the ratios are those of the pooled percentiles of each process, with the
interval of their median. The complete benchmark is measured beside it in as many processes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from edgekd.targets import LocalTarget
from edgerun.percentiles import median_interval
from tests.benchmarks.layers import save_layers

BOTH = """
import sys, time
from pathlib import Path
import numpy as np
from edgerun.inputs import make_feeds
from edgerun.model import Settings
from edgerun.run import open_model
from edgerun.timing import Stopwatch
model = open_model(Path(sys.argv[1]), Settings(int(sys.argv[2])))
feeds = make_feeds(model.inputs, {})
watch, session, feed = Stopwatch(model, feeds), model.session, feeds.feeds[0]
watch.warm_up(3)
bare, ours = [], []
for _ in range(200):
    for _ in range(50):
        begin = time.perf_counter()
        session.run(None, feed)
        bare.append(1e3 * (time.perf_counter() - begin))
    ours += watch.block(50)
print(*np.percentile(bare, [50, 99]), *np.percentile(ours, [50, 99]))
"""


def main() -> None:
    """Measure in turn and print both percentiles and their ratios, process by process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or save_layers(Path(folder) / "model.onnx", 20)
        ratios: dict[str, list[float]] = {"p50": [], "p99": []}
        bare_p50s = []
        for number in range(options.processes):
            words = [sys.executable, "-c", BOTH, str(model), str(options.threads)]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
            bare50, bare99, ours50, ours99 = map(float, done.stdout.split())
            ratios["p50"].append(ours50 / bare50)
            ratios["p99"].append(ours99 / bare99)
            bare_p50s.append(bare50)
            print(
                f"{number}: bare {bare50:.5f} and {bare99:.5f} ms, edgerun {ours50:.5f} and "
                f"{ours99:.5f} ms, {ours50 / bare50:.4f} and {ours99 / bare99:.4f}",
                flush=True,
            )
        for name, found in ratios.items():
            interval = median_interval(found) or (min(found), max(found))
            print(f"{name}: median ratio {statistics.median(found):.4f} {interval}")
        record = LocalTarget().bench(
            model,
            threads=options.threads,
            processes=options.processes,
            max_processes=options.processes,
            memory=False,
        )
        p50 = record["models"][0]["latency"]["p50"]
        bare = statistics.median(bare_p50s)
        print(f"benchmark p50 {p50['value']:.5f} {p50['interval']}, bare loops {bare:.5f} ms")


if __name__ == "__main__":
    main()
