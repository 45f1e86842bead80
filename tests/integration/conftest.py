"""The command line as a user calls it, and one complete run that several tests read."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from click.testing import Result

from tests import command_line
from tests.integration.pipelines import DIGITS


@pytest.fixture
def edgekd(tmp_path: Path) -> partial[Result]:
    """``edgekd`` in the test's own folder."""
    return partial(command_line.edgekd, cwd=tmp_path)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a complete, short run on digits whose gate passed."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "digits.yaml").write_text(DIGITS)
    command_line.edgekd_process("run", "digits.yaml", cwd=folder)
    return folder / "runs" / "digits"
