"""A term that cannot teach the student anything is found before the training starts."""

import pytest
import torch
from torch import nn

from edgekd.config.training import LossTerm, TrainConfig
from edgekd.distill.objective import Objective
from edgekd.distill.teacher import ModuleTeacher
from edgekd.distill.trainer import Trainer
from edgekd.errors import InputError
from edgekd.models import DictModel
from edgekd.spec import ModelSpec, TensorSpec
from edgekd.tasks import Classification
from tests.distill.small_training import SPEC, TASK, Source, fit, network
from tests.progress import RecordedProgress


class Binary(Source):
    """The same blobs, with two classes."""

    def __init__(self, *args, **keys):
        super().__init__(*args, **keys)
        self.label = self.label % 2


def binary(seed):
    torch.manual_seed(seed)
    spec = ModelSpec(SPEC.inputs, (TensorSpec("logits", ("batch", 2)),))
    return DictModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), spec)


def train_binary(folder, losses, progress, batch=16):
    task = Classification(classes=2)
    return Trainer(
        binary(0),
        Objective([LossTerm.model_validate(loss) for loss in losses], task),
        Binary(batch=batch),
        Binary(50, seed=1),
        task,
        TrainConfig(epochs=1, batch_size=batch),
        0,
        checkpoint_folder=folder,
        progress=progress,
        teacher=ModuleTeacher(binary(1)),
    ).fit()


@pytest.mark.parametrize(
    "loss",
    [
        {"logit_standardization": {}},
        {"dkd": {"alpha": 0, "beta": 8}},
        {"dkd": {"alpha": 0, "beta": 0}},
        {"dist": {"gamma": 0}},
        {"dist": {"beta": 0, "gamma": 0}},
    ],
)
def test_losses_without_a_gradient_for_two_classes_are_refused(tmp_path, loss):
    losses = [{"hard_labels": {}}, loss]
    with pytest.raises(InputError, match="no gradient") as caught:
        train_binary(tmp_path, losses, RecordedProgress())
    assert next(iter(loss)) in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "loss", ["dkd", "dist", "wsld", "mlkd", "jsd", "soft_labels", "rkd", "sp", "pkt"]
)
def test_losses_that_teach_two_classes_are_trained_with(tmp_path, loss):
    history = train_binary(tmp_path, [loss], RecordedProgress())
    assert len(history.epochs) == 1


@pytest.mark.parametrize("loss", ["rkd", "correlation", {"dist": {"beta": 0}}])
def test_relations_within_a_batch_of_one_are_refused(tmp_path, loss):
    objective = Objective([LossTerm.model_validate(loss)], TASK)
    with pytest.raises(InputError, match=r"no gradient|at least|sample"):
        fit(
            tmp_path,
            objective=objective,
            teacher=ModuleTeacher(network(9)),
            source=Source(8, batch=1),
            batch_size=1,
        )


def test_a_users_loss_that_detaches_or_decides_is_refused(tmp_path, users_code):
    users_code.cut = lambda student, teacher: (student.detach() - teacher).square().mean()
    users_code.decides = lambda student, teacher: (
        (student.argmax(-1) != teacher.argmax(-1)).float().mean()
    )
    for name in ("cut", "decides"):
        objective = Objective([LossTerm(name=f"users_code:{name}")], TASK)
        with pytest.raises(InputError, match=f"{name!r} has no gradient"):
            fit(tmp_path / name, objective=objective, teacher=ModuleTeacher(network(9)))


def test_a_users_loss_that_counts_no_sample_yet_is_trained_with_and_said(tmp_path, users_code):
    users_code.sure = lambda student, teacher: (
        (teacher.softmax(-1).amax(-1, keepdim=True) > 2).float() * (student - teacher).square()
    ).mean()
    objective = Objective([LossTerm(name="hard_labels"), LossTerm(name="users_code:sure")], TASK)
    progress = RecordedProgress()
    fit(tmp_path, objective=objective, teacher=ModuleTeacher(network(9)), progress=progress)
    assert any("'sure' is 0 on the first" in text for text in progress.messages)


def test_a_student_that_begins_as_its_teacher_is_trained(tmp_path):
    objective = Objective([LossTerm(name="soft_labels")], TASK)
    _, history = fit(tmp_path, objective=objective, teacher=ModuleTeacher(network()), epochs=1)
    assert history.epochs[0].loss >= 0


def test_batches_without_a_label_do_not_count_against_a_term(tmp_path):
    source = Source()
    source.label[:] = -1
    source.label[:3] = 1
    objective = Objective(
        [LossTerm(name="hard_labels", weight=0.1), LossTerm(name="soft_labels")], TASK
    )
    _, history = fit(
        tmp_path, objective=objective, source=source, teacher=ModuleTeacher(network(9)), epochs=1
    )
    assert len(history.epochs) == 1
