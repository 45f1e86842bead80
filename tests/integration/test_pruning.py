"""The student as the teacher's own network with half of its channels, distilled back, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from edgekd.config.pipeline import PipelineConfig
from edgekd.config.profile import load_profile
from edgekd.errors import InputError
from edgekd.pipeline.stage import Job
from edgekd.stages import preflight
from edgekd.stages.student import StudentStage
from tests.command_line import edgekd as run_edgekd
from tests.onnx_builders import save_onnx

PIPELINE = """\
name: digits
data: {source: digits}
teacher: {model: convnet-s, train: {epochs: 6, batch_size: 64, learning_rate: 1e-2}}
student: {model: teacher, prune: {ratio: 0.5}}
distill: {epochs: 4, batch_size: 64, learning_rate: 1e-2}
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a pipeline that ran up to its export, and its output."""
    folder = tmp_path_factory.mktemp("pruned")
    (folder / "digits.yaml").write_text(PIPELINE)
    done = run_edgekd("run", "digits.yaml", "--until", "export", cwd=folder)
    return folder, done.stdout + done.stderr


def one(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(f"runs/digits/artifacts/{pattern}")
    return found


def planned(folder: Path, *arguments: str) -> dict[str, str]:
    done = run_edgekd("plan", "digits.yaml", "--until", "export", *arguments, cwd=folder)
    rows = [line.split()[:2] for line in done.stdout.splitlines()]
    return dict(row for row in rows if len(row) == 2)


def test_the_file_is_that_of_the_pruned_network(exported: tuple[Path, str]) -> None:
    folder, said = exported
    model = json.loads(one(folder, "student/*/model.json").read_text())
    pruned = model["pruned"]
    before, after = pruned["from_parameters"], pruned["to_parameters"]
    assert f"pruned: {before:,} → {after:,} parameters" in said
    assert model["parameters"] == after < before / 2
    assert pruned["ratio"] == 0.5
    assert all(row["to"] == row["from"] / 2 for row in pruned["layers"])

    weights = load_file(one(folder, "distill/*/student.safetensors"))
    teacher = load_file(one(folder, "teacher/*/teacher.safetensors"))
    assert weights.keys() == teacher.keys()
    sizes = {
        role: sum(
            int(np.prod(tensor.dims))
            for tensor in onnx.load(one(folder, f"export/*/{role}.onnx")).graph.initializer
            if tensor.data_type == onnx.TensorProto.FLOAT
        )
        for role in ("student", "baseline", "teacher")
    }
    assert sizes["student"] == sizes["baseline"] < sizes["teacher"] / 2


def test_student_and_baseline_start_from_the_teachers_weights(exported: tuple[Path, str]) -> None:
    folder, _ = exported
    first = load_file(one(folder, "student/*/first.safetensors"))
    teacher = load_file(one(folder, "teacher/*/teacher.safetensors"))
    bias = "features.layers.0.1.bias"
    assert set(first[bias]) < set(teacher[bias])
    for history in ("student", "baseline"):
        epochs = json.loads(one(folder, f"distill/*/{history}-history.json").read_text())["epochs"]
        # Ten classes: fresh weights are at about 0.1 before the first epoch.
        assert max(epoch["validation"] for epoch in epochs) > 0.8


def test_second_run_has_nothing_to_do(exported: tuple[Path, str]) -> None:
    folder, _ = exported
    done = run_edgekd("run", "digits.yaml", "--until", "export", cwd=folder)
    assert "Nothing to do" in done.stdout


def test_plan_names_what_a_changed_key_reruns(exported: tuple[Path, str]) -> None:
    folder, _ = exported
    for override, first in (
        ("student.prune.ratio=0.4", "student"),
        ("student.prune.importance=lamp", "student"),
        ("teacher.train.epochs=7", "teacher"),
        ("distill.epochs=5", "distill"),
    ):
        actions = planned(folder, "--set", override)
        order = ["data", "teacher", "student", "distill", "export"]
        for number, name in enumerate(order):
            assert actions[name] == ("run" if number >= order.index(first) else "cached"), override


def test_layers_are_listed_as_they_are_before(exported: tuple[Path, str]) -> None:
    folder, _ = exported
    done = run_edgekd("layers", "digits.yaml", cwd=folder)
    assert "before it is pruned" in done.stdout


def test_taylor_a_kept_layer_and_a_scheme_with_further_students(tmp_path: Path, edgekd) -> None:
    pruning = "{ratio: 0.5, importance: taylor, keep: [features.layers.1]}"
    (tmp_path / "digits.yaml").write_text(PIPELINE.replace("{ratio: 0.5}", pruning))
    edgekd(
        *("distill", "digits.yaml", "--set", "distill.baseline=false"),
        *("--set", "distill.epochs=1", "--set", "distill.scheme={online: {peers: 2}}"),
    )
    weights = load_file(one(tmp_path, "distill/*/student.safetensors"))
    assert weights["features.layers.0.0.weight"].shape == (8, 1, 3, 3)
    assert weights["features.layers.1.0.weight"].shape == (24, 8, 3, 3)


def job(tmp_path: Path, **changes: Any) -> Job:
    values = {
        "name": "n",
        "data": {"source": "digits"},
        "teacher": {"model": "mlp", "train": {}},
        "student": {"model": "teacher"},
    }
    config = PipelineConfig.model_validate(values | changes)
    return Job(config, tmp_path, load_profile("host"))


def test_an_onnx_teacher_has_no_network_of_its_own(tmp_path: Path) -> None:
    preflight(job(tmp_path), gated=False)
    save_onnx(tmp_path / "t.onnx", "(float[b,64] x) => (float[b,64] y) { y = Relu (x) }")
    with pytest.raises(InputError, match=r"ONNX file[\s\S]*student.model"):
        preflight(job(tmp_path, teacher={"onnx": "t.onnx"}), gated=False)


def test_the_teachers_arguments_are_the_students(tmp_path: Path) -> None:
    stage = StudentStage()
    narrow = {"model": "mlp", "args": {"hidden": [8]}, "train": {}}
    assert stage.config_slice(job(tmp_path)) != stage.config_slice(job(tmp_path, teacher=narrow))
