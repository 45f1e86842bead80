"""``edgekd`` and ``edgerun`` as a user calls them: in this process, or in one of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from edgekd.cli import main

EXPORT = Path(__file__).resolve().parents[1] / "export"


def edgekd(
    *words: object, cwd: Path | None = None, code: int | None = 0, columns: int | None = None
) -> Result:
    """Run a command in this process and check its exit code, unless ``code`` is None.

    A traceback is raised. Modules of the user's that it imported from ``cwd`` are forgotten.
    """
    before, modules = os.getcwd(), set(sys.modules)  # noqa: PTH109 - put back with os.chdir
    os.chdir(cwd or before)
    try:
        env = {"COLUMNS": str(columns)} if columns else None
        done = CliRunner().invoke(main, [*map(str, words)], env=env, prog_name="edgekd")
    finally:
        os.chdir(before)
        for name in set(sys.modules) - modules if cwd else ():
            if str(getattr(sys.modules[name], "__file__", None)).startswith(str(cwd.resolve())):
                del sys.modules[name]
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert code is None or done.exit_code == code, done.output
    return done


def edgekd_process(
    *words: object, cwd: Path, code: int | None = 0, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own and check its exit code, unless ``code`` is None."""
    return _process("-m", "edgekd", *words, cwd=cwd, code=code, env=env)


def edgerun(
    *words: object, cwd: Path | None = None, code: int | None = 0
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m edgerun`` and check its exit code, unless ``code`` is None."""
    environment = {**os.environ, "PYTHONPATH": str(EXPORT)}
    return _process("-m", "edgerun", *words, cwd=cwd, code=code, env=environment)


def python(
    source: str, *words: object, code: int | None = 0, **settings: Any
) -> subprocess.CompletedProcess[str]:
    """Run Python source in a process of its own and check its exit code, unless it is None."""
    return _process("-c", source, *words, code=code, **settings)


def check_not_imported(modules: set[str], source: str) -> None:
    """Run Python source in a process of its own; it must import none of the modules."""
    python(f"{source}\nimport sys\nassert not {modules!r} & set(sys.modules)")


def _process(*words: object, code: int | None, **settings: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        **settings,
    )
    assert code is None or done.returncode == code, done.stdout + done.stderr
    return done
