"""The training loop: determinism, resuming to the very same weights, and stopping on NaN."""

import pytest
import torch

from edgekd.config.training import LossTerm, TrainConfig
from edgekd.distill.checkpoint import NAME
from edgekd.distill.objective import Objective
from edgekd.distill.teacher import ModuleTeacher
from edgekd.distill.trainer import Trainer, score
from edgekd.errors import InputError, StageError
from tests.distill.small_training import DISTILL, TASK, Source, fit, network, same
from tests.progress import RecordedProgress


def last_weights(folder):
    return torch.load(folder / NAME, weights_only=True)["model"]


OPTIMIZERS = [
    {"optimizer": "adamw"},
    {"optimizer": "sgd", "learning_rate": 0.05, "clip_norm": 1.0},
    {"optimizer": "adamw", "channels_last": False, "schedule": "cosine"},
    {"schedule": "constant", "warm_up": 0.2, "ema": 0.9, "accumulate": 4, "clip_norm": 0.5},
    {"precision": "bfloat16"},
]


@pytest.mark.parametrize("keys", OPTIMIZERS)
def test_stopped_and_gone_on_with_gives_the_very_same_weights(tmp_path, keys):
    distil = {"objective": Objective(DISTILL, TASK), "teacher": ModuleTeacher(network(9))}
    whole, history = fit(tmp_path / "whole", **distil, **keys)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", source=Source(stop_in=3), **distil, **keys)
    progress = RecordedProgress()
    resumed, again = fit(tmp_path / "parts", progress=progress, **distil, **keys)
    assert progress.messages == ["training: resuming after epoch 2 of 4"]
    assert same(whole, resumed)
    first, second = last_weights(tmp_path / "whole"), last_weights(tmp_path / "parts")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert [(r.loss, r.terms, r.validation) for r in history.epochs] == [
        (r.loss, r.terms, r.validation) for r in again.epochs
    ]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path):
    first, _ = fit(tmp_path / "a")
    torch.rand(7)
    second, _ = fit(tmp_path / "b")
    other, _ = fit(tmp_path / "c", seed=1)
    assert same(first, second)
    assert not same(first, other)


def test_training_gives_the_callers_random_numbers_back(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    model = network()
    torch.manual_seed(5)
    Trainer(
        model,
        Objective.supervised(TASK),
        Source(),
        Source(50),
        TASK,
        TrainConfig(epochs=1),
        0,
        checkpoint_folder=tmp_path,
        progress=RecordedProgress(),
    ).fit()
    assert torch.equal(torch.rand(3), expected)


def test_it_learns_and_keeps_the_best_weights(tmp_path):
    model, history = fit(tmp_path, epochs=6, learning_rate=1e-2)
    metrics = [row.validation for row in history.epochs]
    best = max(metrics)
    assert best > 0.7
    assert history.best_epoch == max(i for i, m in enumerate(metrics, 1) if m == best)
    assert not model.training
    assert score(model, Source(50, seed=1), TASK).mean() == pytest.approx(best)
    assert history.epochs[-1].loss < history.epochs[0].loss


def test_history_is_plain_json_and_comes_back(tmp_path):
    import json

    _, history = fit(tmp_path, epochs=2)
    rows = json.loads(json.dumps(history.to_json()))
    assert type(history).from_json(rows) == history
    assert set(rows["epochs"][0]) == {
        *("epoch", "loss", "terms", "validation"),
        *("learning_rate", "seconds", "samples_per_second"),
    }


def test_a_finished_training_is_not_done_again(tmp_path):
    first, _ = fit(tmp_path)
    before = (tmp_path / NAME).stat().st_mtime_ns
    second, history = fit(tmp_path, source=Source(stop_in=1))
    assert same(first, second)
    assert len(history.epochs) == 4
    assert (tmp_path / NAME).stat().st_mtime_ns == before


@pytest.mark.parametrize("part", [0.0, 0.2, 0.99])
def test_a_damaged_checkpoint_is_said_and_the_training_starts_again(tmp_path, part):
    whole, _ = fit(tmp_path / "whole")
    fit(tmp_path / "cut")
    path = tmp_path / "cut" / NAME
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    progress = RecordedProgress()
    again, history = fit(tmp_path / "cut", progress=progress)
    assert "cannot be read" in progress.messages[0]
    assert "starting again" in progress.messages[0]
    assert same(whole, again)
    assert len(history.epochs) == 4


def test_a_checkpoint_of_another_training_is_not_gone_on_with(tmp_path):
    fit(tmp_path, learning_rate=1e-3)
    progress = RecordedProgress()
    model, _ = fit(tmp_path, learning_rate=2e-3, progress=progress)
    assert "another training" in progress.messages[0]
    assert same(model, fit(tmp_path / "fresh", learning_rate=2e-3)[0])


def test_a_stop_while_the_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    import os

    calls = []

    def replace(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    original = os.replace
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts")
    monkeypatch.undo()
    progress = RecordedProgress()
    resumed, _ = fit(tmp_path / "parts", progress=progress)
    assert progress.messages == ["training: resuming after epoch 2 of 4"]
    assert same(resumed, fit(tmp_path / "whole")[0])


def test_a_checkpoint_that_cannot_be_written_is_a_stage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StageError, match="cannot be written"):
        fit(tmp_path / "file" / "folder")


def test_nan_names_epoch_step_and_terms(tmp_path):
    objective = Objective(DISTILL, TASK)
    with pytest.raises(
        StageError,
        match=r"became nan in epoch 2, step 4; its terms: hard_labels nan, soft_labels nan",
    ):
        fit(
            tmp_path,
            source=Source(poison=(2, 4)),
            objective=objective,
            teacher=ModuleTeacher(network(9)),
        )
    assert len(torch.load(tmp_path / NAME, weights_only=True)["history"]["epochs"]) == 1


def test_progress_adds_up(tmp_path):
    progress = RecordedProgress()
    fit(tmp_path, progress=progress)
    assert progress.done == progress.total == 4 * 6
    assert progress.finished == 1


def test_progress_is_finished_when_stopped(tmp_path):
    progress = RecordedProgress()
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, source=Source(stop_in=1), progress=progress)
    assert progress.finished == 1


def test_an_objective_that_needs_a_teacher_must_have_one(tmp_path):
    with pytest.raises(InputError, match="there is none"):
        fit(tmp_path, objective=Objective(DISTILL, TASK))


def test_images_of_another_size_name_both(tmp_path):
    source = Source()
    source.image = torch.zeros(96, 1, 9, 9)
    with pytest.raises(InputError, match=r"batch, 1, 8, 8\], and 'image' is \[16, 1, 9, 9\]"):
        fit(tmp_path, source=source)


def test_the_teacher_is_not_changed(tmp_path):
    teacher_model, untouched = network(9), network(9)
    fit(tmp_path, objective=Objective(DISTILL, TASK), teacher=ModuleTeacher(teacher_model))
    assert same(teacher_model, untouched)
    assert all(p.grad is None for p in teacher_model.parameters())


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_layer_that_does_not_exist_points_at_the_term(tmp_path, role):
    layers = {"student": "4", "teacher": "4", role: "44"}
    terms = [LossTerm(name="hard_labels"), LossTerm(name="fitnets", args=layers)]
    objective, teacher = Objective(terms, TASK), ModuleTeacher(network(9))

    def begin():
        teacher.capture(objective.teacher_layers)
        fit(tmp_path, objective=objective, teacher=teacher)

    with pytest.raises(InputError) as error:
        begin()
    assert error.value.what == "there is no layer named '44'"
    assert error.value.where == f"distill.losses[1].fitnets.{role}"
    assert error.value.remedy.startswith("did you mean '4'?")


def test_layers_are_captured_from_the_network_that_is_trained(tmp_path):
    terms = [
        LossTerm(name="hard_labels"),
        LossTerm(name="fitnets", args={"student": "4", "teacher": "4"}),
    ]
    teacher = ModuleTeacher(network(9))
    objective = Objective(terms, TASK)
    teacher.capture(objective.teacher_layers)
    _, history = fit(tmp_path, objective=objective, teacher=teacher, ema=0.9, epochs=2)
    assert history.epochs[1].terms["fitnets"] < history.epochs[0].terms["fitnets"]
