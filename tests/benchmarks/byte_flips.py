"""Flip single bits in the artifacts of a finished run, and see that no bundle is made of them.

``python tests/benchmarks/byte_flips.py [FLIPS]`` runs a short pipeline, and then, for each flip,
changes one bit of a file (its time stamp and size stay), removes what was made after it and runs
again. The bundle's model has to be the first one's, and the damage has to be reported.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PIPELINE = """\
name: digits
data: {source: digits}
teacher: {model: convnet-m, train: {epochs: 3, batch_size: 64, learning_rate: 3e-3}}
student: {model: convnet-xs}
distill: {epochs: 3, batch_size: 64, learning_rate: 1e-2}
benchmark: {min_queries: 100, max_seconds: 1}
gate: {size: {max_mb: 1}}
"""


def run(folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "edgekd", "run", "p.yaml", "-o", "run"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def flip(file: Path, generator: random.Random) -> None:
    status = file.stat()
    content = bytearray(file.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def bundled(folder: Path) -> str:
    content = (folder / "run/bundle/digits/model.onnx").read_bytes()
    return hashlib.sha256(content).hexdigest()


def main(flips: int) -> int:
    """Print a line for each flip; the number of those that were not found."""
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "p.yaml").write_text(PIPELINE)
        run(folder)
        first = bundled(folder)
        shutil.copytree(folder / "run", folder / "whole", symlinks=True)
        for number in range(flips):
            generator = random.Random(number)
            shutil.rmtree(folder / "run")
            shutil.copytree(folder / "whole", folder / "run", symlinks=True)
            artifacts = folder / "run/artifacts"
            stage = generator.choice(
                ("teacher", "distill", "export", "engines", "benchmark", "gate", "bundle")
            )
            files = [f for f in sorted((artifacts / stage).rglob("*")) if f.is_file()]
            files = [f for f in files if f.name != "artifact.json" and f.stat().st_size]
            victim = generator.choice(files)
            flip(victim, generator)
            if stage != "bundle":
                shutil.rmtree(artifacts / "bundle")
            said = run(folder)
            found = bundled(folder) == first and "damaged on the disk" in said
            missed += not found
            print(f"{'found ' if found else 'MISSED'} {victim.relative_to(artifacts)}", flush=True)
    print(f"{flips - missed} of {flips} found")
    return missed


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 40) > 0)
