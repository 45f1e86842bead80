"""Every scheme from the command line to the distilled student, on the scans of digits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.command_line import edgekd as run_edgekd

PIPELINE = """\
name: digits
data: {source: digits}
teacher: {model: convnet-s, train: {epochs: 3, batch_size: 64, learning_rate: 1e-2}}
student: {model: convnet-xs}
distill:
  epochs: 3
  batch_size: 64
  learning_rate: 1e-2
  baseline: false
  scheme: SCHEME
"""

SCHEMES = {
    "online": ("{online: {peers: 3}}", ["student"]),
    "born again": ("{self: {generations: 2}}", ["generation-0", "generation-1", "student"]),
    "exits": ("{self: {exits: [features.layers.0], deepest: features.layers.2}}", ["student"]),
    "assistant": (
        "{assistant: {models: [{model: convnet-xs, args: {widths: [12, 16, 24]}}]}}",
        ["assistant-1", "student"],
    ),
    "ensemble": (
        "{ensemble: {teachers: [{model: convnet-s, train: {epochs: 2, batch_size: 64, "
        "learning_rate: 1e-2}}], combine: confidence}}",
        ["student"],
    ),
}


OWN = """\
from edgekd.config.networks import TeacherConfig


def other(context, train: dict):
    teacher = context.open_teacher(TeacherConfig(model="convnet-s", train=train), "mine")
    assert teacher.digest != context.teacher.digest, "the pipeline's teacher once more"
    return {"student": context.fit(context.student, context.new_objective(), "student", teacher)}
"""


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder with its trained teacher."""
    folder = tmp_path_factory.mktemp("taught")
    (folder / "digits.yaml").write_text(PIPELINE.replace("SCHEME", "offline"))
    run_edgekd("run", "digits.yaml", "--until", "student", cwd=folder)
    return folder


@pytest.fixture
def work(taught: Path, tmp_path: Path) -> Path:
    return shutil.copytree(taught, tmp_path, dirs_exist_ok=True, symlinks=True)


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in load_file(file).items()}


@pytest.mark.parametrize("name", SCHEMES)
def test_a_student_is_trained(name: str, work: Path, edgekd) -> None:
    scheme, histories = SCHEMES[name]
    (work / "digits.yaml").write_text(PIPELINE.replace("SCHEME", scheme))
    edgekd("distill", "digits.yaml")

    artifacts = work / "runs" / "digits" / "artifacts"
    (first,) = artifacts.glob("student/*/first.safetensors")
    (student,) = artifacts.glob("distill/*/student.safetensors")
    # The shipped file is the student's and nothing else's.
    assert shapes(student) == shapes(first)

    found = sorted(path.name for path in student.parent.glob("*-history.json"))
    assert found == [f"{label}-history.json" for label in histories]
    history = json.loads((student.parent / "student-history.json").read_text())
    # Ten classes: guessing gives 0.1.
    assert max(epoch["validation"] for epoch in history["epochs"]) > 0.4


def test_a_scheme_of_ones_own_and_a_second_teacher_that_is_not_the_first(
    work: Path, edgekd
) -> None:
    (work / "mine.py").write_text(OWN)
    own = '{"mine:other": {train: {epochs: 3, batch_size: 64, learning_rate: 1e-2}}}'
    (work / "digits.yaml").write_text(PIPELINE.replace("SCHEME", own))
    edgekd("distill", "digits.yaml")


def test_a_wrong_scheme_is_found_before_the_teacher_is_trained(tmp_path: Path, edgekd) -> None:
    wrong = "{assistant: {models: [convnet-z]}}"
    (tmp_path / "digits.yaml").write_text(PIPELINE.replace("SCHEME", wrong))
    done = edgekd("distill", "digits.yaml", code=2)
    assert "did you mean 'convnet-s'" in done.stderr
    assert not list((tmp_path / "runs").glob("digits/artifacts/*/*"))
