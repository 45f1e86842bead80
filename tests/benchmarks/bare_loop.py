"""``edgekd benchmark`` against a bare loop around ``InferenceSession.run``: the ratio of p50s.

Both measure the same file, threads and input, each time in a fresh process, in turn, so that a
drift of the machine meets both alike. The goal is a ratio within 3 % of one::

    python tests/benchmarks/bare_loop.py MODEL.onnx [--threads 1] [--rounds 10]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime

from edgekd.targets import LocalTarget

QUERIES = 1000
WARM_UP = 300

BARE = """
import sys, time
import numpy as np, onnxruntime
model, data, threads, warm_up, queries = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
feed = dict(np.load(data))
for _ in range(warm_up):
    session.run(None, feed)
elapsed = []
for _ in range(queries):
    begin = time.perf_counter()
    session.run(None, feed)
    elapsed.append(time.perf_counter() - begin)
print(1e3 * float(np.median(elapsed)))
"""


def bare_p50(model: Path, data: Path, threads: int) -> float:
    """Median ms of the loop that anybody would write."""
    words = [str(model), str(data), str(threads), str(WARM_UP), str(QUERIES)]
    done = subprocess.run(
        [sys.executable, "-c", BARE, *words], check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def one_query(model: Path, path: Path) -> None:
    """Write one random input of every declared one; open dimensions are 1."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    kinds = {"tensor(float)": "float32", "tensor(int32)": "int32", "tensor(int64)": "int64"}
    arrays = {}
    for node in session.get_inputs():
        shape = [size if isinstance(size, int) else 1 for size in node.shape]
        arrays[node.name] = generator.random(shape).round(3).astype(kinds[node.type])
    np.savez(path, **arrays)


def main() -> None:
    """Measure in turn and print both p50s and their ratio, round by round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--inputs", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = options.inputs or Path(folder) / "query.npz"
        if options.inputs is None:
            one_query(options.model, data)
        ratios = []
        for number in range(options.rounds):
            bare = bare_p50(options.model, data, options.threads)
            record = LocalTarget().bench(
                options.model,
                inputs=data,
                threads=options.threads,
                min_queries=QUERIES,
                memory=False,
            )
            ours = record["models"][0]["latency"]["p50"]["value"]
            ratios.append(ours / bare)
            print(f"{number}: bare {bare:.5f} ms, edgekd {ours:.5f} ms, {ratios[-1]:.4f}")
    print(f"median ratio {statistics.median(ratios):.4f} over {len(ratios)} rounds")


if __name__ == "__main__":
    main()
