"""The command line: quick to start, honest in its exit codes, without tracebacks."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from edgekd.api import open_job
from edgekd.cli import _COMMANDS
from edgekd.cli.options import requirement_options
from edgekd.files import pipelines_folder
from tests.command_line import check_not_imported, edgekd


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["benchmark", "--help"]])
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    code = f"from edgekd.cli import main\nmain({arguments!r}, standalone_mode=False)"
    check_not_imported({"torch"}, code)


@pytest.mark.parametrize("command", list(_COMMANDS))
def test_every_command_has_help(command: str) -> None:
    outcome = edgekd(command, "--help")
    assert "Usage:" in outcome.output


def test_misspelt_command_is_suggested() -> None:
    outcome = edgekd("distil", code=2)
    assert "'distill'" in outcome.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "absent.yaml"], "absent.yaml"),
        (["run", "PIPELINE", "--set", "profile=raspbery-pi-5"], "raspberry-pi-5"),
        (["run", "PIPELINE", "--set", "distill.losses=[soft_label]"], "soft_labels"),
        (["run", "PIPELINE", "--set", "student.model=convnet-x"], "convnet-xs"),
        (["run", "PIPELINE", "--set", "data.source=digit"], "digits"),
        (["run", "PIPELINE", "--set", "data.augment=[flop]"], "flip"),
        (["run", "PIPELINE", "--set", "task=clasification"], "classification"),
        (["run", "PIPELINE", "--set", "student.model=absent_module:net"], "absent_module"),
        (["run", "PIPELINE", "--until", "distil"], "distill"),
        (["plan", "PIPELINE", "--memory-mb", "8", "--set", "gate.memory.peak_mb=9"], "--memory-mb"),
        (["run", "PIPELINE", "--latency-ms", "1", "--set", "gate.latency.p50_ms=2"], "p95_ms"),
        (["run", "PIPELINE", "-o", "/proc/edgekd"], "--output"),
    ],
)
def test_wrong_input_is_explained(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline = str(pipelines_folder() / "digits.yaml")
    outcome = edgekd(*(pipeline if word == "PIPELINE" else word for word in arguments), code=2)
    assert says in outcome.output
    assert "to do:" in outcome.output
    assert "Traceback" not in outcome.output


def test_requirements_are_budgets_of_the_gate() -> None:
    options = ["--memory-mb", "64", "--latency-ms", "5", "--size-mb", "1e-3", "--max-drop", "0"]
    found: list[str] = []

    @click.command()
    @click.option("--set", "overrides", multiple=True)
    @requirement_options
    def command(overrides: tuple[str, ...]) -> None:
        found.extend(overrides)

    command([*options, "--set", "profile=raspberry-pi-5"], standalone_mode=False)
    budgets = open_job(pipelines_folder() / "digits.yaml", found).budgets
    keys = ("memory.peak_mb", "latency.p95_ms", "size.max_mb", "accuracy.max_drop")
    assert [budgets[key] for key in keys] == [64, 5, 1e-3, 0]
    assert budgets.profile == "raspberry-pi-5"


def test_init_writes_an_example_and_never_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    edgekd("init", str(path))
    assert path.read_text() == (pipelines_folder() / "digits.yaml").read_text()
    edgekd("init", str(path), code=2)
    edgekd("init", str(tmp_path / "other.yaml"), "--example", "digit", code=2)


@pytest.mark.parametrize("file", sorted(pipelines_folder().glob("*.yaml")), ids=lambda f: f.stem)
def test_shipped_pipelines_are_valid(file: Path, tmp_path: Path) -> None:
    outcome = edgekd("plan", str(file), "-o", str(tmp_path / "run"), code=None)
    assert outcome.exit_code in (0, 2)
    if outcome.exit_code == 2:
        assert "dataset-fashion-mnist" in outcome.output, "only the data may be missing"
