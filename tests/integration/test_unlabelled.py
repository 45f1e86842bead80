"""Labels are optional: runs without any, trainings with few, and teachers no better than chance."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from edgekd.config.pipeline import DataConfig, PipelineConfig
from edgekd.config.profile import load_profile
from edgekd.config.training import LossTerm, TrainConfig
from edgekd.data.build_dataset import build_dataset
from edgekd.data.source import RawData
from edgekd.distill.objective import Objective, TaskLoss
from edgekd.distill.teacher import ModuleTeacher
from edgekd.errors import InputError
from edgekd.models.dict_model import DictModel
from edgekd.pipeline.stage import Job
from edgekd.spec import ModelSpec
from edgekd.stages.benchmark import BenchmarkStage
from edgekd.stages.task_data import TaskData
from edgekd.stages.teacher import check_teacher
from edgekd.stages.training import fit, pseudo_labelled_validation
from edgekd.tasks import get_task
from tests import onnx_builders
from tests.command_line import edgekd
from tests.progress import RecordedProgress

PIPELINE = """\
name: bare
data: {source: npz, path: d.npz}
task_args: {classes: 10}
teacher: {model: mlp, args: {hidden: [64]}, checkpoint: t.pt}
student: {model: mlp, args: {hidden: [16]}}
distill: {epochs: 12, learning_rate: 1e-2, batch_size: 64}
benchmark: {min_queries: 100, max_seconds: 2}
gate: {accuracy: {min: 0.6, max_drop: 0.4}}
"""


def run(*arguments: str, **settings):
    return edgekd("run", "p.yaml", *arguments, **settings)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Digits without labels, and a teacher that was trained on them with labels."""
    digits = load_digits()
    image = digits.images.astype(np.float32)[:, None]
    np.savez(tmp_path / "d.npz", train_image=image[:1200], test_image=image[1200:])
    from edgekd.config.networks import ModelConfig
    from edgekd.models import build_model
    from edgekd.spec import TensorSpec

    torch.manual_seed(0)
    teacher = build_model(
        ModelConfig(model="mlp", args={"hidden": [64]}),
        [TensorSpec("image", ("batch", 1, 8, 8))],
        [TensorSpec("logits", ("batch", 10))],
    ).train()
    # The pipeline normalizes by the training split, so the teacher is trained on such images.
    inputs = torch.tensor((image - image[:1200].mean()) / image[:1200].std())
    labels = torch.tensor(digits.target)
    optimizer = torch.optim.Adam(teacher.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        logits = teacher({"image": inputs[:1200]})["logits"]
        nn.functional.cross_entropy(logits, labels[:1200]).backward()
        optimizer.step()
    torch.save(teacher.module.state_dict(), tmp_path / "t.pt")
    (tmp_path / "p.yaml").write_text(PIPELINE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_without_any_label_is_gated_by_agreement_with_the_teacher(work: Path) -> None:
    outcome = run()
    folder = work / "runs" / "bare"
    result = json.loads((folder / "benchmark" / "result.json").read_text())
    assert result["task"]["metric"] == "agreement"
    assert result["models"].keys() == {"teacher", "student"}
    assert result["models"]["teacher"]["metric"]["value"] == 1.0
    data = next((folder / "artifacts" / "data").iterdir())
    raw = np.load(data / "test" / "image.npy")
    constants = json.loads((data / "dataset.json").read_text())["preprocess"]["image"]
    image = (raw - np.float32(constants["mean"])) / np.float32(constants["std"])
    answers = {}
    for role in ("teacher", "student"):
        file = next((folder / "artifacts" / "export").glob(f"*/{role}.onnx"))
        answers[role] = onnx_builders.run(file, {"image": image})["logits"].argmax(1)
    agreement = (answers["teacher"] == answers["student"]).mean()
    # Optimization may turn a tie of float32 logits in a sample or two.
    found = result["models"]["student"]["metric"]
    assert found["value"] == pytest.approx(agreement, abs=2 / len(raw))
    assert found["n"] == len(raw)
    checked = next((folder / "artifacts" / "teacher").glob("*/validation.json"))
    assert json.loads(checked.read_text()) == {
        "schema": "edgekd.teacher-validation/1", "accuracy": None, "chance": None, "labelled": 0
    }  # fmt: skip
    history = next((folder / "artifacts" / "distill").glob("*/student-history.json"))
    assert json.loads(history.read_text())["metric"] == "agreement"
    assert "the student alone is not trained" in outcome.output
    assert "not checked" in outcome.output


def test_without_labels_no_teacher_can_be_trained(work: Path) -> None:
    outcome = run("--set", "teacher={model: mlp, train: {epochs: 1}}", code=2)
    assert "nothing to train on: no sample has a label" in outcome.output
    assert "checkpoint or onnx" in outcome.output


@pytest.mark.parametrize("wrong", ["labels in another order", "upside down", "not normalized"])
def test_a_teacher_that_does_not_know_the_task_is_refused(work: Path, wrong: str) -> None:
    digits = load_digits()
    image, label = digits.images.astype(np.float32)[:, None], digits.target
    if wrong == "labels in another order":
        label = (label + 1) % 10
    elif wrong == "upside down":
        weights = torch.load(work / "t.pt")
        last = [key for key in weights if key.endswith("weight")][-1]
        weights[last] = -weights[last]
        torch.save(weights, work / "t.pt")
    else:
        image = 1000 * (image == 0) - image
    np.savez(
        work / "d.npz", train_image=image[:1200], train_label=label[:1200],
        test_image=image[1200:], test_label=label[1200:],
    )  # fmt: skip
    outcome = run("--until", "teacher", code=2)
    if wrong == "labels in another order":
        names = ", ".join(f'"{(output + 1) % 10}"' for output in range(10))
        assert f"classes: [{names}]" in outcome.output
    if wrong == "not normalized":
        assert "the teacher is no better than chance: accuracy 0" in outcome.output
    assert "normalisation" in outcome.output


COUNT = 260


def task_data(
    label: np.ndarray, task: str = "classification", name: str = "label", **data
) -> TaskData:
    """Images whose first pixel is their row, and their targets."""
    image = np.random.default_rng(0).random((COUNT, 1, 4, 4), np.float32)
    image[:, 0, 0, 0] = np.arange(COUNT)
    arrays = {"image": image, name: label}
    config = PipelineConfig.model_validate(
        {
            "name": "n",
            "task": task,
            "data": {"source": "npz", "test": 0.2, "validation": 0.3, **data},
            "teacher": {"model": "mlp", "train": {}},
            "student": {"model": "mlp"},
        }
    )
    raw = RawData(splits={"all": arrays}, where="here", description="a test")
    unscaled = config.data.model_copy(update={"args": {"normalize": False}})
    return TaskData(build_dataset(raw, DataConfig(**dict(unscaled))), "d", get_task(task), config)


class Watched(nn.Module):
    """A network that notes which rows it was given while it was trained."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.last = nn.Linear(16, outputs)
        self.rows: list[list[int]] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.rows.append([round(row) for row in image[:, 0, 0, 0].tolist()])
        return self.last(image.flatten(1) * 1e-2)


class Noting(TaskLoss):
    """The supervised loss, which records the label weight of each sample."""

    def forward(self, student, teacher, batch, part):
        target = batch["label"]
        taught = target.sum(1) if target.is_floating_point() else (target >= 0).float()
        self.taught = [*getattr(self, "taught", []), *taught.tolist()]
        return super().forward(student, teacher, batch, part)


def trained(on: TaskData, folder: Path, terms=None, teacher=None):
    torch.manual_seed(0)
    spec = ModelSpec(on.dataset.inputs, on.task.outputs(on.dataset))
    model = DictModel(Watched(3), spec)
    noting = Noting(on.task, 0.0)
    objective = Objective(terms, on.task) if terms else Objective.of([noting])
    context = SimpleNamespace(scratch=folder, cache=folder, progress=RecordedProgress(), job=None)
    train = on.config.distill.model_copy(update={"epochs": 3, "batch_size": 16, "cache": None})
    history = fit(on, model, objective, train, "student", context, teacher)
    # Mixed probabilities sum to 1 within rounding, and to 0 where a label is missing.
    assert all(taught > 0.999 for taught in getattr(noting, "taught", []))
    return model.module.rows, history


@pytest.mark.parametrize("augment", [[], ["mixup"]])
def test_a_supervised_training_never_sees_an_unlabelled_row(tmp_path: Path, augment) -> None:
    whole, few = (task_data(np.arange(COUNT) % 3, augment=augment, labelled=s) for s in (1.0, 0.1))
    images = few.dataset.splits["train"].arrays["image"][:, 0, 0, 0]
    allowed = set(np.round(images[few.labelled_rows("train")]).astype(int).tolist())
    seen, _ = trained(few, tmp_path / "few")
    if not augment:
        assert {row for batch in seen for row in batch} == allowed
    all_seen, _ = trained(whole, tmp_path / "whole")
    assert [len(batch) for batch in seen] == [len(batch) for batch in all_seen]


def test_a_distillation_sees_the_unlabelled_rows_too(tmp_path: Path) -> None:
    few = task_data(np.arange(COUNT) % 3, labelled=0.1)
    spec = ModelSpec(few.dataset.inputs, few.task.outputs(few.dataset))
    teacher = ModuleTeacher(DictModel(Watched(3), spec))
    terms = [LossTerm(name="hard_labels"), LossTerm(name="soft_labels")]
    seen, history = trained(few, tmp_path, terms, teacher)
    assert len({row for batch in seen for row in batch}) > 130
    assert history.metric == "agreement"


def test_the_student_has_its_share_of_the_labels_and_the_teacher_all(tmp_path: Path) -> None:
    on = task_data(np.arange(COUNT) % 3)
    few = on.keep_labels(0.1)
    assert few.keep_labels(1) is few
    allowed = set(few.labelled_rows("train").tolist())
    assert 0 < len(allowed) < 0.2 * len(on.labelled_rows("train"))
    assert len(few.labelled_rows("test")) == len(on.labelled_rows("test"))
    images = on.dataset.splits["train"].arrays["image"][:, 0, 0, 0].round().astype(int)
    share = on.config.distill.model_copy(update={"labelled": 0.1})
    student = replace(on, config=on.config.model_copy(update={"distill": share}))
    seen, _ = trained(student, tmp_path / "student")
    assert {row for batch in seen for row in batch} == {int(images[row]) for row in allowed}
    # A teacher's training has a TrainConfig, which has no share of labels.
    spec = ModelSpec(on.dataset.inputs, on.task.outputs(on.dataset))
    model = DictModel(Watched(3), spec)
    config = TrainConfig(epochs=1, batch_size=16)
    context = SimpleNamespace(
        scratch=tmp_path / "teacher", cache=tmp_path, progress=RecordedProgress(), job=None
    )
    fit(student, model, Objective.supervised(on.task), config, "teacher", context)
    assert len({row for batch in model.module.rows for row in batch}) > 100


def test_a_share_of_the_labels_needs_one_class_per_sample() -> None:
    values = np.random.default_rng(0).random(COUNT).astype(np.float32)
    with pytest.raises(InputError, match="one class per sample") as error:
        task_data(values, "regression", "target").keep_labels(0.5)
    assert error.value.where == "distill.labelled"


def test_the_teacher_answers_for_validation_samples_without_a_label_only() -> None:
    few = task_data(np.arange(COUNT) % 3, labelled=0.5)
    spec = ModelSpec(few.dataset.inputs, few.task.outputs(few.dataset))

    class Two(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[0.0, 0.0, 9.0]]).expand(len(image), 3)

    teacher = ModuleTeacher(DictModel(Two(), spec))
    loader, task = pseudo_labelled_validation(few, teacher, False, "student")
    given = np.asarray(few.dataset.splits["validation"].arrays["label"])
    filled = loader.split.arrays["label"]
    assert 0 < (given == -1).sum() < len(given)
    np.testing.assert_array_equal(filled, np.where(given == -1, 2, given))
    assert filled.dtype == given.dtype
    assert task.metric == "agreement"


def test_unlabelled_validation_is_scored_by_the_teachers_answers(tmp_path: Path) -> None:
    bare = task_data(np.where(np.arange(COUNT) < 3, np.arange(COUNT), -1))
    arrays = bare.dataset.splits["validation"].arrays
    arrays["label"][:] = -1
    spec = ModelSpec(bare.dataset.inputs, bare.task.outputs(bare.dataset))

    class Third(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return nn.functional.one_hot(image[:, 0, 0, 0].long() % 3, 3) * 9.0

    teacher = ModuleTeacher(DictModel(Third(), spec))
    terms = [LossTerm(name="soft_labels", weight=1)]
    _, history = trained(bare, tmp_path, terms, teacher)
    assert history.metric == "agreement"
    with pytest.raises(InputError, match="no validation sample has a label"):
        trained(bare, tmp_path)


class Answers:
    """A teacher that computes its outputs from the rows of the images."""

    def __init__(self, name, function) -> None:
        self.name, self.function, self.digest = name, function, "d"

    def predict(self, batch):
        return {self.name: self.function(batch["image"][:, 0, 0, 0].round().long())}


def checked(on: TaskData, answer) -> dict:
    context = SimpleNamespace(progress=RecordedProgress())
    return check_teacher(Answers(on.task.output, answer), on, context)


def test_chance_in_regression_is_the_best_constant() -> None:
    target = np.random.default_rng(0).gamma(1.0, 1.0, COUNT).astype(np.float32)
    on = task_data(target, "regression", "target")
    noise = torch.tensor(np.random.default_rng(1).normal(0, 0.3, COUNT), dtype=torch.float32)
    found = checked(on, lambda rows: (torch.tensor(target) + noise)[rows][:, None])
    assert found["mae"] < found["chance"]
    with pytest.raises(InputError, match=r"mae .* always predicting the same"):
        checked(on, lambda rows: torch.tensor(target).roll(9)[rows][:, None])


def test_a_frequent_class_is_no_knowledge_and_a_little_above_it_is() -> None:
    label = (np.arange(COUNT) % 10 == 0).astype(np.int64)
    on = task_data(label)

    def frequent(rows: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0]]).repeat(len(rows), 1)

    with pytest.raises(InputError, match=r"accuracy 0\.8\d* .*gives 0\.8\d*|accuracy 0\.9"):
        checked(on, frequent)
    truth = torch.tensor(label)
    assert checked(on, lambda rows: nn.functional.one_hot(truth[rows], 2) * 1.0)["accuracy"] == 1


def test_few_labels_are_shown_and_not_judged() -> None:
    on = task_data(np.arange(COUNT) % 3, labelled=0.1)
    found = checked(on, lambda rows: torch.zeros(len(rows), 3))
    assert 3 <= found["labelled"] < 20
    assert found["accuracy"] <= found["chance"] + 1e-9


class Machine:
    """A target whose models give the stated logits."""

    name = "machine"

    def __init__(self, logits: dict[str, np.ndarray]) -> None:
        self.logits = logits

    def bench(self, *_, **__):
        none = {"value": None, "interval": None, "n": 0, "note": "not timed"}
        model = {
            **{"path": "student.onnx", "sha256": "", "size_bytes": 9, "memory": None},
            "latency": dict.fromkeys(("p50", "p90", "p95", "p99"), none),
            **{"samples_ms": [], "warmup": {}, "providers": {}, "threads": 1},
        }
        return {"models": [model], "comparison": None, "environment": {}}

    def run(self, file: Path, samples: Path, outputs: Path, **_) -> None:
        np.savez(outputs, logits=self.logits[file.stem])


@pytest.mark.parametrize("labelled", [15, 0])
def test_the_benchmark_scores_what_is_labelled_or_else_agreement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labelled: int
) -> None:
    on = task_data(np.arange(COUNT) % 3)
    label = on.dataset.splits["test"].arrays["label"]
    label[labelled:] = -1
    count = len(label)
    rng = np.random.default_rng(0)
    logits = {role: rng.random((count, 3)) for role in ("teacher", "student", "baseline")}
    monkeypatch.setattr("edgekd.stages.benchmark.open_task_data", lambda *_: on)
    monkeypatch.setattr("edgekd.targets.open_target", lambda _: Machine(logits))
    settings = {"providers_requested": [], "threads": 1, "run_level": "all", "parameters": 5}
    rows = {role: settings | {"file": f"{role}.onnx"} for role in logits}
    (tmp_path / "engines.json").write_text(json.dumps(rows))
    for role in logits:
        (tmp_path / f"{role}.onnx").write_bytes(b"a network")
    job = Job(on.config, tmp_path, load_profile("host"))
    context = SimpleNamespace(
        job=job, out=tmp_path, scratch=tmp_path, progress=RecordedProgress(), fingerprints={}
    )
    BenchmarkStage().run(context, {"data": tmp_path, "engines": tmp_path})

    result = json.loads((tmp_path / "result.json").read_text())
    picked = {role: answer.argmax(1) for role, answer in logits.items()}
    truth = label[:labelled] if labelled else picked["teacher"]
    assert result["task"]["metric"] == ("accuracy" if labelled else "agreement")
    for role, model in result["models"].items():
        assert model["metric"]["n"] == len(truth)
        right = (picked[role][: len(truth)] == truth).mean()
        assert model["metric"]["value"] == pytest.approx(right, abs=1e-12)
    drop = result["comparison"]["drop"]["value"]
    of = {role: model["metric"]["value"] for role, model in result["models"].items()}
    assert drop == pytest.approx(of["teacher"] - of["student"], abs=1e-12)
