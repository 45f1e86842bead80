from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXPORT = Path(__file__).resolve().parents[2] / "export"


@pytest.fixture(scope="session")
def edgerun():
    """Start ``python -m edgerun`` as a user does."""

    def start(*words, cwd=None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(EXPORT), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-m", "edgerun", *map(str, words)],
            env=environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
        )

    return start
