"""``edgekd advise`` and ``--goal``: what is understood, YAML that runs, no silent change."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from edgekd.api import open_job
from edgekd.config.pipeline import load_pipeline
from edgekd.files import pipelines_folder
from edgekd.stages import preflight
from tests.command_line import edgekd
from tests.onnx_builders import save_onnx

GOAL = "under 5 ms and 20 MB on an Orin Nano, lose at most one point"
CHINESE = "树莓派 5, 延迟低于 5 毫秒, 20 MB 以内, 准确率下降不超过 1 个点"
SHIPPED = [pipelines_folder() / f"{name}.yaml" for name in ("digits", "fashion-mnist")]

OWN = """name: own
data: {source: npz, path: data/scans.npz}
teacher: {model: "mine:Teacher", checkpoint: teacher.safetensors}
student: {model: convnet-xs}
"""


@pytest.mark.parametrize("goal", [None, GOAL, CHINESE])
@pytest.mark.parametrize("pipeline", SHIPPED, ids=lambda path: path.stem)
def test_the_printed_yaml_runs(pipeline: Path, goal: str | None, tmp_path: Path) -> None:
    words = ["advise", pipeline, *(["--goal", goal] if goal else [])]
    printed = edgekd(*words, cwd=tmp_path).output
    assert edgekd(*words, cwd=tmp_path).output == printed
    path = tmp_path / "advised.yaml"
    path.write_text(printed)
    job = open_job(path)
    preflight(job)
    if goal is not None:
        assert job.config.gate.latency.p95_ms == 5
        assert job.config.gate.size.max_mb == 20
        assert job.config.gate.accuracy.max_drop == 0.01
        assert "understood" in printed


def test_what_the_file_sets_is_changed_only_with_its_value_shown(tmp_path: Path) -> None:
    printed = edgekd("advise", SHIPPED[1], "--latency-ms", "3", cwd=tmp_path).output
    before = yaml.safe_load(SHIPPED[1].read_text())
    after = yaml.safe_load(printed)
    text = " ".join(line.strip("# ") for line in printed.splitlines())
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"student", "distill", "gate"}  # A scheme is added to distill.
    assert after["distill"] == before["distill"] | {"scheme": "offline"}
    assert "yours: {model: convnet-s, args: {widths: [32, 32, 48]}}, advised: as below" in text
    assert "yours: {p95_ms: 1, min_speedup: 5}, advised: as below" in text


def test_an_option_is_a_requirement_as_a_goal_is(tmp_path: Path) -> None:
    by_option = edgekd("advise", SHIPPED[0], "--size-mb", "0.05", cwd=tmp_path).output
    by_goal = edgekd("advise", SHIPPED[0], "--goal", "a file of 50 kB", cwd=tmp_path).output
    assert by_goal.endswith(by_option)


@pytest.mark.parametrize("command", ["advise", "run", "plan"])
@pytest.mark.parametrize(("goal", "says"), [
    ("under 5 ms, cheap and cheerful", "'cheap', 'cheerful'"),
    ("延迟低于 5 毫秒，便宜", "'便宜'"),
    ("under 5 ms, at most 8 ms", "contradict"),
    ("0,5 ms", "comma"),
])  # fmt: skip
def test_a_bad_goal_is_refused(command: str, goal: str, says: str, tmp_path: Path) -> None:
    outcome = edgekd(command, SHIPPED[0], "--goal", goal, cwd=tmp_path, code=2)
    assert says in outcome.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--latency-ms", "3"], ["--set", "gate.latency.p95_ms=3"]])
def test_a_goal_and_an_option_must_not_set_the_same(words: list[str], tmp_path: Path) -> None:
    for command in ("advise", "plan"):
        outcome = edgekd(command, SHIPPED[0], "--goal", "5 ms", *words, cwd=tmp_path, code=2)
        assert "the goal sets gate.latency.p95_ms" in outcome.output


def test_plan_shows_the_goal_and_the_advice_first(tmp_path: Path) -> None:
    outcome = edgekd("plan", SHIPPED[0], "--goal", "within 3 ms", cwd=tmp_path).output
    lines = outcome.splitlines()
    assert lines[0] == "understood:"
    assert lines[1].split() == ["gate.latency.p95_ms:", "3.0", "from", "'within", "3", "ms'"]
    assert lines[2].startswith("advise ")
    assert not list(tmp_path.iterdir())


def test_a_goal_reaches_the_run(tmp_path: Path) -> None:
    words = ("run", SHIPPED[0], "--until", "data", "-o", "out")
    assert "understood:" in edgekd(*words, "--goal", "2 threads, 7 ms", cwd=tmp_path).output
    below = edgekd(*words, "--goal", "p99 under 1 ms", cwd=tmp_path, code=2)  # p95 is 2 ms.
    assert "contradicts itself" in below.output


def test_a_fixed_student_cannot_be_chosen(tmp_path: Path) -> None:
    goal = ("--goal", "as small as possible")
    assert "edgekd advise" in edgekd("run", SHIPPED[0], *goal, cwd=tmp_path, code=2).output
    printed = edgekd("advise", SHIPPED[0], *goal, cwd=tmp_path).output
    search = yaml.safe_load(printed)["student"]["search"]
    assert search["objectives"] == ["size", "accuracy"]


def test_a_file_is_written_once_and_its_paths_still_resolve(tmp_path: Path) -> None:
    source = tmp_path / "a" / "own.yaml"
    source.parent.mkdir()
    save_onnx(source.parent / "t.onnx", "(float[b,4] x) => (float[b,4] y) { y = Relu (x) }")
    text = OWN.replace('model: "mine:Teacher", checkpoint: teacher.safetensors', "onnx: t.onnx")
    source.write_text(text)
    target = tmp_path / "b" / "advised.yaml"
    edgekd("advise", source, "-o", target, cwd=tmp_path)
    job = open_job(target)
    assert job.path(str(job.config.data.path)).resolve() == source.parent / "data" / "scans.npz"
    assert job.existing_file(str(job.config.teacher.onnx), "teacher.onnx").is_file()
    again = edgekd("advise", source, "-o", target, cwd=tmp_path, code=2)
    assert "exists already" in again.output
    edgekd("advise", source, "-o", target, "--force", cwd=tmp_path)


def test_own_modules_must_stay_next_to_the_file(tmp_path: Path) -> None:
    source = tmp_path / "a" / "own.yaml"
    source.parent.mkdir()
    source.write_text(OWN)
    (source.parent / "mine.py").write_text(
        "from torch import nn\n\n\nclass Teacher(nn.Sequential):\n    pass\n"
    )
    outcome = edgekd("advise", source, "-o", tmp_path / "b.yaml", cwd=tmp_path, code=2)
    assert "'mine:Teacher'" in outcome.output
    edgekd("advise", source, "-o", source.parent / "b.yaml", cwd=tmp_path)
    assert load_pipeline(source.parent / "b.yaml").teacher.model == "mine:Teacher"


def test_an_absent_file_is_an_error_without_a_traceback(tmp_path: Path) -> None:
    assert "absent.yaml" in edgekd("advise", "absent.yaml", cwd=tmp_path, code=2).output
