"""The command line as a user calls it, and one whole run that several tests look at."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from commandline import DIGITS, Edgekd, call


@pytest.fixture
def edgekd(tmp_path: Path) -> Edgekd:
    """``edgekd`` in the test's own folder."""

    def run(*arguments: str | Path, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        return call(*arguments, cwd=cwd)

    return run


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a whole, short run on digits whose gate passed."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "digits.yaml").write_text(DIGITS)
    done = call("run", "digits.yaml", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "digits"
