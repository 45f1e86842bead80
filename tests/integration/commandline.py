"""The command line as a user calls it, and a short pipeline."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

Edgekd = Callable[..., subprocess.CompletedProcess[str]]

DIGITS = """\
name: digits
data: {source: digits}
teacher: {model: convnet-m, train: {epochs: 6, batch_size: 64, learning_rate: 3e-3}}
student: {model: convnet-xs}
distill: {epochs: 8, batch_size: 64, learning_rate: 1e-2}
benchmark: {min_queries: 200, max_seconds: 5}
gate:
  accuracy: {min: 0.5}
  size: {max_mb: 1}
  memory: {peak_mb: 500}
"""


def call(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgekd", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
