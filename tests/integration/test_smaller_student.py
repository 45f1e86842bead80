"""The teacher with fewer blocks, fewer channels and smaller images, and a student that was found
by a search, through the stages.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file

from edgekd.api import execute, open_job
from edgekd.cli.layers import layers_of_pipeline
from edgekd.config.networks import StudentConfig
from edgekd.errors import InputError
from edgekd.models import load_weights
from edgekd.pipeline.stage import Job
from edgekd.stages.build_student import (
    FIRST_WEIGHTS,
    SECTION,
    build_student,
    resolved_student,
    with_student,
    write_student,
)
from edgekd.stages.distill import training_settings
from edgekd.stages.task_data import TaskData, open_task_data, some_samples
from tests.command_line import edgekd

PIPELINE = """\
name: digits
data: {source: npz, path: images.npz, test: 0.2}
teacher: {model: convnet-l, args: {widths: [8, 12, 16, 20]}, train: {epochs: 2, batch_size: 64}}
student:
  model: teacher
  drop_layers: {keep: 0.5}
  prune: {ratio: 0.5, ratios: {features.layers.0: 0.25}}
  resolution: 8
distill: {epochs: 2, batch_size: 64, learning_rate: 1e-2, baseline: false}
quantize: {int8: static, samples: 100, max_drop: 0.2}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline that ran up to its quantized student."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("smaller")
    images, labels = load_digits(return_X_y=True)
    image = np.kron(images.reshape(-1, 1, 8, 8), np.ones((2, 2))).astype(np.uint8) * 15
    np.savez(folder / "images.npz", image=image, label=labels)
    (folder / "digits.yaml").write_text(PIPELINE)
    edgekd("run", "digits.yaml", "--until", "quantize", cwd=folder)
    return folder


def artifact(run: Path, stage: str) -> Path:
    (found,) = (run / "runs" / "digits" / "artifacts" / stage).iterdir()
    return found


def test_what_was_removed_is_recorded_and_exported(run: Path) -> None:
    about = json.loads((artifact(run, "student") / "model.json").read_text())
    assert about["dropped"] == ["features.layers.4"]
    widths = {row["name"]: (row["from"], row["to"]) for row in about["pruned"]["layers"]}
    assert widths["features.layers.0.0"] == (8, 6)
    assert widths["features.layers.1.0"] == (12, 6)
    weights = load_file(artifact(run, "distill") / "student.safetensors")
    assert not any(name.startswith("features.layers.4.") for name in weights)
    teacher = load_file(artifact(run, "teacher") / "teacher.safetensors")
    first = load_file(artifact(run, "student") / FIRST_WEIGHTS)
    bias = "features.layers.6.first.1.weight"
    assert first[bias].size == teacher[bias].size / 2


def test_the_onnx_file_takes_the_datas_images_and_resizes_them(run: Path) -> None:
    exported = artifact(run, "export") / "student.onnx"
    for file in (exported, *artifact(run, "quantize").rglob("*.onnx")):
        graph = onnx.load(file).graph
        sizes = [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim]
        assert sizes[1:] == [1, 16, 16], file
    assert "AveragePool" in {node.op_type for node in onnx.load(exported).graph.node}


@pytest.fixture
def opened(run: Path) -> tuple[Job, TaskData, Path]:
    """The job, its data, and the teacher's artifact."""
    job = open_job(run / "digits.yaml")
    outcome = execute(job, run / "runs" / "digits", "teacher")
    return job, open_task_data(outcome.folder("data"), job.config), outcome.folder("teacher")


SEARCH = StudentConfig.model_validate({"search": {}})


@pytest.mark.parametrize(
    "section",
    [
        {"model": "teacher", "prune": {"ratio": 0.5, "inherit": False}},
        {"model": "teacher", "drop_layers": {"keep": 2}, "resolution": [10, 12]},
        {"model": "mobilenet", "args": {"width": 0.25, "depth": 0.5}, "resolution": 12},
    ],
)
def test_later_stages_build_the_winner_of_a_search(
    opened: tuple[Job, TaskData, Path], tmp_path: Path, section: dict[str, object]
) -> None:
    job, task_data, teacher = opened
    student = StudentConfig.model_validate(section)
    first, _ = write_student(with_student(task_data, student), job, teacher, tmp_path, print)
    (tmp_path / SECTION).write_text(student.model_dump_json())

    searched = with_student(task_data, SEARCH)
    assert resolved_student(searched.config, tmp_path) == student
    found = build_student(searched, tmp_path)
    load_weights(found, tmp_path / FIRST_WEIGHTS, where="student")
    batch = some_samples(task_data)
    with torch.no_grad():
        expected = first.eval()(batch)["logits"]
        assert torch.equal(found.eval()(batch)["logits"], expected)
    listed = layers_of_pipeline(searched, tmp_path)
    assert set(listed) == {"student, chosen by the search", "teacher"}


def test_fresh_weights_are_drawn_for_the_narrow_layers(
    opened: tuple[Job, TaskData, Path], tmp_path: Path
) -> None:
    job, task_data, teacher = opened
    spread = {}
    for inherit in (True, False):
        pruned = {"model": "teacher", "prune": {"ratio": 0.75, "inherit": inherit}}
        out = tmp_path / str(inherit)
        out.mkdir()
        student = with_student(task_data, StudentConfig.model_validate(pruned))
        model, _ = write_student(student, job, teacher, out, print)
        spread[inherit] = model.state_dict()
    shapes = [{name: t.shape for name, t in state.items()} for state in spread.values()]
    assert shapes[0] == shapes[1]
    name = "module.features.layers.6.first.0.weight"
    assert not torch.equal(spread[True][name], spread[False][name])
    # Uniform within 1 / sqrt(inputs), and the layer has 5 · 9 of them now.
    bound = (5 * 9) ** -0.5
    assert 0.8 * bound < spread[False][name].abs().max() <= bound


def test_without_a_search_that_was_run_there_is_no_student(
    opened: tuple[Job, TaskData, Path], tmp_path: Path
) -> None:
    searched = with_student(opened[1], SEARCH)
    for folder in (None, tmp_path):
        with pytest.raises(InputError, match="chosen by a search, which has not been run"):
            build_student(searched, folder)
    assert set(layers_of_pipeline(searched)) == {"teacher"}


def test_the_searchs_settings_are_not_the_trainings(opened: tuple[Job, TaskData, Path]) -> None:
    wide = StudentConfig.model_validate({"search": {"margin": 0.3}})
    settings = [
        training_settings(with_student(opened[1], student).config) for student in (SEARCH, wide)
    ]
    assert settings[0] == settings[1]
