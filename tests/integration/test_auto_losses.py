"""``distill.losses: auto`` and ``distill.keep: better``, from the command line to the artifact."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from edgekd.config.pipeline import PipelineConfig
from edgekd.config.profile import load_profile
from edgekd.config.recipes import recipe_text
from edgekd.errors import InputError
from edgekd.pipeline.stage import Job
from edgekd.stages import preflight
from edgekd.stages.quantize import qat_objective
from edgekd.stages.recipes import trained_config
from edgekd.tasks import get_task
from tests.command_line import edgekd as run_edgekd

pytest.importorskip("optuna", reason="a race needs the extra search")

# The teacher has hardly begun to learn; the student alone is better.
PIPELINE = """\
name: digits
data: {source: digits}
teacher: {model: convnet-xs, train: {epochs: 1, batch_size: 64, learning_rate: 1e-2}}
student: {model: convnet-xs}
distill: {epochs: 4, batch_size: 64, learning_rate: 1e-2, DISTILL}
"""

# Hard labels alone win against this teacher; the third cannot be computed.
THIRD = '[{dkd: {}}, {"own:broken": {}}]'
RACE = f"""\
losses: {{auto: {{epochs: 2, reduction: 2, recipes: [
  [hard_labels], [{{soft_labels: {{temperature: 1}}}}], {THIRD}]}}}}"""

BROKEN = "def broken(student, teacher):\n    return (student - teacher).mean() * float('nan')\n"


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder with its trained teacher."""
    folder = tmp_path_factory.mktemp("taught")
    write(folder, "baseline: false")
    run_edgekd("run", "digits.yaml", "--until", "student", cwd=folder)
    return folder


@pytest.fixture
def work(taught: Path, tmp_path: Path) -> Path:
    return shutil.copytree(taught, tmp_path, dirs_exist_ok=True, symlinks=True)


def write(folder: Path, distill: str) -> None:
    text = PIPELINE.replace("DISTILL", distill.replace("\n", "\n    "))
    (folder / "digits.yaml").write_text(text)


def artifact(folder: Path) -> Path:
    (found,) = (folder / "runs" / "digits" / "artifacts" / "distill").iterdir()
    return found


def record(folder: Path, name: str) -> Any:
    return json.loads((artifact(folder) / name).read_text())


def test_the_best_recipe_is_trained(work: Path, edgekd) -> None:
    (work / "own.py").write_text(BROKEN)
    write(work, f"baseline: false, {RACE}")
    done = edgekd("distill", "digits.yaml")
    assert "4 recipes are raced on validation data, for 1, then 2 epochs each" in done.output

    found = record(work, "recipes.json")
    rows = {row["name"]: row for row in found["recipes"]}
    assert "the loss became nan" in rows["dkd + own:broken"]["failed"]
    default = rows["0.1 hard_labels + 0.9 soft_labels (temperature 4)"]
    assert [rung["epochs"] for rung in default["rungs"]] == [1, 2]
    assert found["winner"] == "hard_labels"
    assert rows["hard_labels"]["rungs"][-1]["score"] > default["rungs"][-1]["score"]

    history = record(work, "student-history.json")
    assert len(history["epochs"]) == 4
    assert set(history["epochs"][0]["terms"]) == {"hard_labels"}

    # What is trained later, such as INT8, takes the winner from the artifact.
    section = {"epochs": 4, "losses": {"auto": {}}}
    values = {"name": "n", "data": {"source": "digits"}, "student": {"model": "convnet-xs"}}
    config = PipelineConfig.model_validate(
        {**values, "teacher": {"model": "mlp", "train": {}}, "distill": section}
    )
    chosen = trained_config(config, artifact(work))
    assert recipe_text(chosen.loss_terms) == "hard_labels"
    pytest.importorskip("torchao", reason="quantization-aware training needs the extra qat")
    from edgekd.config.pipeline import QatConfig

    objective, _ = qat_objective(chosen, QatConfig(), get_task("classification", {}))
    assert objective.labels == ("hard_labels",)


def test_a_stopped_race_resumes(work: Path, edgekd) -> None:
    write(work, f"baseline: false, {RACE.replace(', ' + THIRD, '')}")
    words = [sys.executable, "-u", "-m", "edgekd", "distill", "digits.yaml"]
    with subprocess.Popen(
        words, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as stopped:
        assert stopped.stdout is not None
        lines = []
        for line in stopped.stdout:
            lines.append(line)
            if "after 1 epoch" in line:
                break
        os.kill(stopped.pid, signal.SIGKILL)
    assert "after 1 epoch" in lines[-1], lines
    name = lines[-1].partition(": accuracy")[0]
    done = edgekd("distill", "digits.yaml")
    again = [line for line in done.output.splitlines() if "after 1 epoch" in line]
    assert again
    assert not any(line.startswith(f"{name}: accuracy") for line in again)
    assert record(work, "recipes.json")["winner"] == "hard_labels"


def test_the_better_student_is_kept(work: Path, edgekd) -> None:
    write(work, "losses: [{soft_labels: {temperature: 4}}], keep: better")
    done = edgekd("distill", "digits.yaml")
    found = record(work, "comparison.json")
    assert found["outcome"] == "worse"
    assert found["kept"] == "baseline"
    assert found["student"] < found["alone"]
    assert "the distilled student is worse than the student alone" in done.output
    assert any("the teacher is worse" in row["cause"] for row in found["causes"])

    folder = artifact(work)
    shipped, alone, distilled = (
        load_file(folder / f"{name}.safetensors") for name in ("student", "baseline", "distilled")
    )
    assert all((shipped[key] == alone[key]).all() for key in alone)
    assert any((shipped[key] != distilled[key]).any() for key in alone)


def test_without_keep_the_distilled_student_is_shipped(work: Path, edgekd) -> None:
    write(work, "losses: [{soft_labels: {temperature: 4}}]")
    edgekd("distill", "digits.yaml")
    found = record(work, "comparison.json")
    assert (found["outcome"], found["kept"]) == ("worse", "student")
    assert not (artifact(work) / "distilled.safetensors").exists()


def job(folder: Path, distill: dict[str, Any], **changes: Any) -> Job:
    values = {
        "name": "n",
        "data": {"source": "digits"},
        "teacher": {"model": "mlp", "train": {}},
        "student": {"model": "convnet-xs"},
        "distill": distill,
    }
    return Job(PipelineConfig.model_validate(values | changes), folder, load_profile("host"))


def test_every_recipe_is_checked_before_the_teacher_is_trained(tmp_path: Path) -> None:
    preflight(job(tmp_path, {"losses": "auto"}), gated=False)
    recipes = [[{"soft_labels": {"temprature": 2}}]]
    with pytest.raises(InputError, match="temprature"):
        preflight(job(tmp_path, {"losses": {"auto": {"recipes": recipes}}}), gated=False)
    mixed = {"augment": [{"mixup": {}}], "losses": {"auto": {"recipes": [["wsld"]]}}}
    with pytest.raises(InputError, match="wsld needs one class per sample"):
        preflight(job(tmp_path, mixed), gated=False)
    # Of the built-in recipes those that mixing excludes are left out.
    preflight(job(tmp_path, {"augment": [{"mixup": {}}], "losses": "auto"}), gated=False)
