"""The objective: its sum, and everything that is wrong found when it is made."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from edgekd.config.training import LossTerm
from edgekd.distill.losses.response import hard_labels, soft_labels
from edgekd.distill.objective import Objective
from edgekd.errors import InputError
from edgekd.tasks import Classification, Policy

TASK = Classification()
STUDENT = {"logits": torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 4.0]])}
TEACHER = {"logits": torch.tensor([[0.0, 3.0, 1.0], [2.0, 1.0, 5.0]])}
BATCH = {"image": torch.zeros(2, 1), "label": torch.tensor([1, 0])}


def terms(*rows):
    return [LossTerm.model_validate(row) for row in rows]


def test_the_sum_and_each_terms_value():
    objective = Objective(
        terms({"hard_labels": {}, "weight": 0.1}, {"soft_labels": {"temperature": 2}, "weight": 3}),
        TASK,
    )
    assert objective.needs_teacher
    total, values = objective(STUDENT, TEACHER, BATCH)
    hard = hard_labels(STUDENT["logits"], BATCH["label"])
    soft = soft_labels(STUDENT["logits"], TEACHER["logits"], 2.0)
    torch.testing.assert_close(total, 0.1 * hard + 3 * soft)
    torch.testing.assert_close(values, {"hard_labels": hard, "soft_labels": soft})


def test_the_same_loss_twice_keeps_both_values():
    objective = Objective(
        terms({"soft_labels": {"temperature": 1}}, {"soft_labels": {"temperature": 8}}), TASK
    )
    _, values = objective(STUDENT, TEACHER, BATCH)
    assert list(values) == ["soft_labels", "soft_labels 2"]


def test_a_term_of_weight_zero_is_watched_and_cannot_spoil_the_sum(users_code):
    users_code.infinite = lambda student: student.sum() * float("inf")
    objective = Objective(terms("hard_labels", {"users_code:infinite": {}, "weight": 0}), TASK)
    total, values = objective(STUDENT, None, BATCH)
    assert total.isfinite()
    assert values["infinite"].isinf()


def test_label_smoothing_goes_to_the_terms_that_do_not_say_otherwise():
    given = Objective(terms("hard_labels"), TASK, label_smoothing=0.2)
    own = Objective(terms({"hard_labels": {"label_smoothing": 0.0}}), TASK, label_smoothing=0.2)
    smoothed = hard_labels(STUDENT["logits"], BATCH["label"], 0.2)
    assert torch.equal(given(STUDENT, None, BATCH)[0], smoothed)
    assert not torch.equal(own(STUDENT, None, BATCH)[0], smoothed)


def test_supervised_is_the_tasks_own_loss():
    objective = Objective.supervised(TASK, 0.1)
    assert not objective.needs_teacher
    total, values = objective(STUDENT, None, BATCH)
    assert torch.equal(total, TASK.hard_loss(STUDENT, BATCH, 0.1))
    assert list(values) == ["hard"]


def test_misspelt_loss():
    with pytest.raises(
        InputError, match=r"losses\[1\]\.soft_label[\s\S]*did you mean 'soft_labels'"
    ):
        Objective(terms("hard_labels", "soft_label"), TASK)


def test_unknown_argument():
    with pytest.raises(
        InputError,
        match=r"no argument 'temprature'[\s\S]*losses\[0\]\.soft_labels[\s\S]*'temperature'",
    ):
        Objective(terms({"soft_labels": {"temprature": 4}}), TASK)


@pytest.mark.parametrize("value", ["4", "hot", True, [4], None, 0.5, 0, -1])
def test_wrong_temperatures(value):
    with pytest.raises(InputError, match=r"temperature: [\s\S]*losses\[0\]\.soft_labels"):
        Objective(terms({"soft_labels": {"temperature": value}}), TASK)


def test_misspelt_choice():
    with pytest.raises(InputError, match="did you mean 'huber'"):
        Objective(terms({"target_regression": {"kind": "hubert"}}), Policy())


def test_tensors_cannot_come_from_yaml():
    with pytest.raises(InputError, match="'teacher' is 3, and not a layer"):
        Objective(terms({"soft_labels": {"teacher": 3}}), TASK)


def test_class_losses_in_a_task_without_classes():
    with pytest.raises(InputError, match="use target_regression"):
        Objective(terms("hard_labels"), Policy())
    with pytest.raises(InputError, match="use output_regression"):
        Objective(terms("soft_labels"), Policy())


def test_all_weights_zero():
    with pytest.raises(InputError, match="no loss term has a weight above zero"):
        Objective(terms({"hard_labels": {}, "weight": 0}), TASK)


def test_infinite_weight():
    with pytest.raises(ValidationError, match="finite"):
        terms({"hard_labels": {}, "weight": float("inf")})
    with pytest.raises(ValidationError, match="finite"):
        terms({"hard_labels": {}, "weight": {"start": 1, "end": float("inf")}})


def test_a_loss_of_ones_own(users_code):
    def logit_matching(student: Tensor, teacher: Tensor, power: int = 2) -> Tensor:
        return (student - teacher).abs().pow(power).mean()

    users_code.logit_matching = logit_matching
    objective = Objective(terms({"users_code:logit_matching": {"power": 1}}), TASK)
    total, values = objective(STUDENT, TEACHER, BATCH)
    assert total.item() == pytest.approx(1.0)
    assert list(values) == ["logit_matching"]
    with pytest.raises(InputError, match="no argument 'powr'"):
        Objective(terms({"users_code:logit_matching": {"powr": 1}}), TASK)


def test_a_loss_that_gives_no_single_number(users_code):
    users_code.rows = lambda student: student.sum(1)
    objective = Objective(terms("users_code:rows"), TASK)
    with pytest.raises(InputError, match=r"not \[2\][\s\S]*losses\[0\]"):
        objective(STUDENT, None, BATCH)


def test_something_that_is_no_loss(users_code):
    users_code.other = lambda prediction: prediction.sum()
    with pytest.raises(InputError, match="no parameter 'student'"):
        Objective(terms("users_code:other"), TASK)


def test_shapes_that_differ_point_at_the_term():
    objective = Objective(terms("hard_labels", "soft_labels"), TASK)
    with pytest.raises(InputError, match=r"\[2, 3\].*\[2, 4\][\s\S]*losses\[1\]\.soft_labels"):
        objective(STUDENT, {"logits": torch.zeros(2, 4)}, BATCH)


def test_a_policy_mask_reaches_the_losses():
    objective = Objective(terms("output_regression", "target_regression"), Policy())
    batch = {"action": torch.tensor([[1.0], [9.0]]), "action_mask": torch.tensor([1.0, 0.0])}
    total, _ = objective({"action": torch.zeros(2, 1)}, {"action": torch.ones(2, 1)}, batch)
    assert total.item() == 2.0
