"""The commands and the Python code of the pages are run, and so are the examples."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgekd.api import load_result
from tests.cli.quantizing import classifier, samples
from tests.docs.blocks import PAGES, ROOT, Block, blocks

BUDGET = "accuracy: {min: 0.05}\nsize: {max_mb: 1}\n"
PAGES_WITH_COMMANDS = [
    page for page in PAGES if any(not block.left_out for block in blocks("sh", page))
]


def command(block: Block) -> str:
    """The text of a block, with the settings that its page adds for the test."""
    settings = block.mark.removeprefix("run with:").split() if block.mark else []
    added = "".join(f" --set {setting}" for setting in settings)
    return re.sub(r"^(edgekd run \S+)", rf"\1{added}", block.text, flags=re.MULTILINE)


def run(text: str, folder: Path, tools: Path) -> None:
    done = subprocess.run(
        ["bash", "-euc", text],
        cwd=folder,
        env=os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "100"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the PATH: ``edgekd`` and ``python`` are those of the test."""
    folder = tmp_path_factory.mktemp("tools")
    for name, arguments in (("edgekd", "-m edgekd "), ("python", ""), ("python3", "")):
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
        path.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tools: Path) -> Path:
    """A folder with what the pages take as given: pipelines, models, samples and a run."""
    folder = tmp_path_factory.mktemp("pages")
    shutil.copytree(ROOT / "pipelines", folder / "pipelines")
    classifier(folder / "model.onnx")
    classifier(folder / "other.onnx")
    samples(folder / "data.npz")
    samples(folder / "other.npz")
    (folder / "budget.yaml").write_text(BUDGET)
    demo = next(block for block in blocks("sh", Path("README.md")) if "edgekd run" in block.text)
    run(command(demo), folder, tools)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS, ids=str)
def test_the_commands_of_a_page(page: Path, workspace: Path, tools: Path, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    shutil.copytree(workspace, folder, symlinks=True)
    for kind in ("python", "yaml"):
        for block in blocks(kind, page):
            if block.file is not None:
                (folder / block.file).write_text(block.text)
    for block in blocks("sh", page):
        if not block.left_out:
            run(command(block), folder, tools)


@pytest.mark.parametrize(
    "block",
    [block for block in blocks("python") if not block.left_out],
    ids=lambda block: f"{block.page}:{block.line}",
)
def test_python_of_a_page(block: Block) -> None:
    exec(compile(block.text, str(block.page), "exec"), {"__name__": "page"})


def test_a_block_that_is_not_run_says_why() -> None:
    marked = [block for kind in ("sh", "python", "yaml") for block in blocks(kind) if block.mark]
    for block in marked:
        known = re.match(r"(not run|not a pipeline|run with): \S+", block.mark)
        assert known, f"{block.page}:{block.line}: {block.mark}"


@pytest.mark.slow
def test_own_teacher_example(tools: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own-teacher"
    shutil.copytree(
        ROOT / "examples/own-teacher", folder, ignore=shutil.ignore_patterns("runs", "*.npz")
    )
    settings = ("distill.baseline=false", "benchmark.max_seconds=2", "benchmark.min_queries=200")
    quick = " ".join(f"--set {setting}" for setting in settings)
    run(f"python prepare.py && edgekd run pipeline.yaml -q {quick}", folder, tools)
    result = load_result(folder / "runs/own-teacher")
    assert result.models["teacher"].metric.value > 0.9
    assert result.student.metric.value > 0.8


def test_the_notebook_runs(workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(workspace)
    notebook = json.loads((ROOT / "examples/run.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    for number, cell in enumerate(cells):
        exec(compile(cell, f"run.ipynb cell {number}", "exec"), names)
    printed = capsys.readouterr().out
    value = load_result("runs/digits").student.metric.value
    assert value is not None
    assert f"{np.float64(value):.4g}" in printed
