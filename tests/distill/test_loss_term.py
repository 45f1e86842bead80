"""Named losses: layers, pairs, schedules, and losses with trained parts."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from edgekd.config.training import LossTerm
from edgekd.distill.features import layer_key
from edgekd.distill.losses import LOSSES
from edgekd.distill.losses.relation import sp
from edgekd.distill.losses.response import soft_labels
from edgekd.distill.objective import Objective
from edgekd.errors import InputError
from edgekd.spec import SAMPLE
from edgekd.tasks import Classification, Policy

TASK = Classification()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


STUDENT = {
    "logits": random(6, 3, seed=1),
    layer_key("a"): random(6, 4, 8, 8, seed=2),
    layer_key("b"): random(6, 8, 4, 4, seed=3),
}
TEACHER = {
    "logits": random(6, 3, seed=4),
    layer_key("x"): random(6, 16, 8, 8, seed=5),
    layer_key("y"): random(6, 32, 4, 4, seed=6),
}
BATCH = {"label": torch.tensor([0, 1, 2, 0, 1, 2]), SAMPLE: torch.arange(6)}


def objective(*rows, task=TASK):
    return Objective([LossTerm.model_validate(row) for row in rows], task)


def test_a_named_pair_of_layers_is_compared():
    made = objective({"sp": {"student": "a", "teacher": "y"}, "weight": 2})
    assert [*made.student_layers, *made.teacher_layers] == ["a", "y"]
    total, _ = made(STUDENT, TEACHER, BATCH)
    expected = sp(STUDENT[layer_key("a")], TEACHER[layer_key("y")])
    torch.testing.assert_close(total, 2 * expected)


def test_several_pairs_are_summed():
    made = objective({"sp": {"student": ["a", "b"], "teacher": ["x", "y"]}})
    total, _ = made(STUDENT, TEACHER, BATCH)
    expected = sum(sp(STUDENT[layer_key(s)], TEACHER[layer_key(t)]) for s, t in ("ax", "by"))
    torch.testing.assert_close(total, expected)


def test_a_loss_of_sequences_gets_all_layers_at_once(users_code):
    seen = []

    def stages(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        seen.append((len(student), len(teacher)))
        return student[0].sum() - teacher[0].sum()

    users_code.stages = stages
    made = objective({"users_code:stages": {"student": ["a", "b"], "teacher": ["x", "y"]}})
    made(STUDENT, TEACHER, BATCH)
    assert seen == [(2, 2)]


def test_a_layer_is_placed_where_it_is_first_named():
    made = objective(
        "hard_labels",
        {"sp": {"student": ["a", "b", "a"], "teacher": "x"}},
        {"rkd": {"student": "b", "teacher": "y"}},
    )
    first = "distill.losses[1].sp"
    assert made.student_layers == {"a": f"{first}.student", "b": f"{first}.student"}
    assert made.teacher_layers == {"x": f"{first}.teacher", "y": "distill.losses[2].rkd.teacher"}


def test_layers_that_cannot_be_paired():
    with pytest.raises(InputError, match="2 layers of the student cannot be paired with 3"):
        objective({"sp": {"student": ["a", "b"], "teacher": ["x", "y", "z"]}})


def test_a_layer_of_the_teacher_for_a_loss_without_one():
    with pytest.raises(InputError, match="no parameter 'teacher'"):
        objective({"hard_labels": {"teacher": "x"}})


@pytest.mark.parametrize("name", ["fitnets", "vid"])
def test_adapters_are_made_once_and_trained(name):
    made = objective({name: {"student": "a", "teacher": "x"}})
    assert made.needs_shapes
    assert not list(made.parameters())
    torch.manual_seed(0)
    made.prepare(STUDENT, TEACHER, samples=6)
    parameters = list(made.parameters())
    assert parameters
    made.prepare(STUDENT, TEACHER, samples=6)
    assert [id(p) for p in made.parameters()] == [id(p) for p in parameters]
    total, _ = made(STUDENT, TEACHER, BATCH)
    total.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)


def test_two_pairs_have_adapters_of_their_own():
    made = objective({"fitnets": {"student": ["a", "b"], "teacher": ["x", "y"]}})
    made.prepare(STUDENT, TEACHER, samples=6)
    shapes = [tuple(p.shape) for p in made.parameters() if p.ndim == 4]
    assert shapes == [(16, 4, 1, 1), (32, 8, 1, 1)]


def test_shapes_that_cannot_be_matched_name_both_layers_and_shapes():
    made = objective({"fitnets": {"student": "a", "teacher": "x"}})
    teacher = {**TEACHER, layer_key("x"): random(6, 16)}
    with pytest.raises(InputError, match=r"student a \[6, 4, 8, 8\]; teacher x \[6, 16\]"):
        made.prepare(STUDENT, teacher, samples=6)


def test_a_users_module_with_trained_parts(users_code):
    class Mine(nn.Module):
        def __init__(self, student: tuple[int, ...], teacher: tuple[int, ...], width: int = 2):
            super().__init__()
            self.one = nn.Linear(student[1], width)
            self.other = nn.Linear(teacher[1], width)

        def forward(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
            return (self.one(student) - self.other(teacher)).square().mean() + 0 * target.sum()

    users_code.Mine = Mine
    made = objective({"users_code:Mine": {"width": 5}, "weight": 0.5}, "hard_labels")
    made.prepare(STUDENT, TEACHER, samples=6)
    assert {tuple(p.shape) for p in made.parameters()} == {(5, 3), (5,)}
    total, values = made(STUDENT, TEACHER, BATCH)
    torch.testing.assert_close(total, 0.5 * values["Mine"] + values["hard_labels"])
    with pytest.raises(InputError, match="no argument 'depth'"):
        objective({"users_code:Mine": {"depth": 5}})


def test_the_weight_follows_its_schedule():
    warm_up = {"start": 0, "end": 8, "over": 0.5}
    made = objective("hard_labels", {"soft_labels": {}, "weight": warm_up})
    for part, weight in ((0, 0), (0.25, 4), (0.5, 8), (1, 8)):
        total, values = made(STUDENT, TEACHER, BATCH, part)
        torch.testing.assert_close(total, values["hard_labels"] + weight * values["soft_labels"])


def test_the_temperature_follows_its_schedule():
    cooling = {"start": 8, "end": 2, "shape": "cosine"}
    made = objective({"soft_labels": {"temperature": cooling}})
    for part, temperature in ((0, 8.0), (0.5, 5.0), (1, 2.0)):
        total, _ = made(STUDENT, TEACHER, BATCH, part)
        expected = soft_labels(STUDENT["logits"], TEACHER["logits"], temperature)
        torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("end", [0.5, "warm"])
def test_a_schedule_that_ends_in_a_wrong_value(end):
    with pytest.raises(InputError, match="temperature"):
        objective({"soft_labels": {"temperature": {"start": 4, "end": end}}})


def test_a_schedule_in_a_loss_with_trained_parts():
    with pytest.raises(InputError, match="cannot change over the training"):
        objective({"vid": {"eps": {"start": 1, "end": 2}, "student": "a", "teacher": "x"}})


def test_a_term_that_never_weighs():
    with pytest.raises(InputError, match="no loss term has a weight above zero"):
        objective({"hard_labels": {}, "weight": {"start": 0, "end": 0}})


def test_crd_is_told_the_size_of_the_split_and_the_rows():
    made = objective({"crd": {"negatives": 4, "bank": 16}})
    torch.manual_seed(0)
    made.prepare(STUDENT, TEACHER, samples=10)
    total, _ = made(STUDENT, TEACHER, BATCH)
    assert total.isfinite()


CLASSES_ONLY = {"soft_labels", "dkd", "dist", "logit_standardization", "wsld", "jsd", "mlkd"}


@pytest.mark.parametrize("name", sorted(CLASSES_ONLY))
def test_losses_over_classes_are_refused_where_there_are_none(name):
    with pytest.raises(InputError, match="use output_regression"):
        objective(name, task=Policy())


def test_every_method_of_the_readme_has_its_name():
    expected = CLASSES_ONLY | {
        *("hard_labels", "hard_distillation", "multi_label", "output_regression"),
        *("fitnets", "attention", "nst", "fsp", "vid", "ofd", "review", "cwd", "pkd"),
        *("rkd", "sp", "pkt", "correlation", "crd"),
        *("hidden_states", "attention_maps", "cosine"),
    }
    assert expected <= set(LOSSES)


@pytest.mark.parametrize(
    ("rows", "labels"),
    [
        (["hard_labels", "soft_labels"], ()),
        (
            ["output_regression", "logit_standardization"],
            ("output_regression", "logit_standardization"),
        ),
        ([{"fitnets": {"student": "a", "teacher": "x"}}], ()),
    ],
)
def test_which_terms_the_largest_logits_alone_would_mislead(rows, labels):
    assert objective(*rows).needs_full_logits == labels


def test_a_users_loss_is_taken_to_read_every_logit(users_code):
    users_code.mine = lambda student, teacher: (student - teacher).square().mean()
    assert objective("users_code:mine").needs_full_logits == ("mine",)


def test_a_weight_below_zero_is_refused():
    with pytest.raises(ValueError, match="away from the teacher"):
        LossTerm.model_validate({"soft_labels": {}, "weight": {"start": 1, "end": -1}})


def test_a_layer_is_masked_by_its_tokens_and_the_output_by_its_target(users_code):
    seen = []

    def masked(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        seen.append(mask)
        return (student.sum() - teacher.sum()) * 0

    users_code.masked = masked
    tokens, target = torch.ones(6, 8), torch.ones(6, 3)
    batch = {**BATCH, "attention_mask": tokens, "label_mask": target}
    hidden = {"logits": STUDENT["logits"], layer_key("h"): random(6, 8, 4)}
    made = objective("users_code:masked", {"users_code:masked": {"student": "h", "teacher": "h"}})
    made(hidden, hidden, batch)
    assert seen[0] is target
    assert seen[1] is tokens
    other = objective({"users_code:masked": {"student": "a", "teacher": "x"}})
    other(STUDENT, TEACHER, {**batch, "attention_mask": torch.ones(6, 5)})
    assert seen[2] is None


@pytest.mark.parametrize("name", ["output_regression", "target_regression"])
def test_a_distance_of_outputs_is_taken_in_the_unit_of_the_task(name):
    values = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)).double()
    plain, large = Policy(standardize=False), Policy()
    large.fit_unit({"action": (1e5 * values).numpy()})
    found = []
    for task, unit in ((plain, 1.0), (large, large.unit)):
        objective = Objective([LossTerm(name=name, args={"kind": "huber"})], task)
        own, other = {"action": unit * (values + 0.5)}, {"action": unit * values}
        total, _ = objective(own, other, {"action": unit * values})
        found.append((float(total), objective.fingerprint))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] != found[1][1]


def test_a_users_own_loss_gets_the_users_units(users_code):
    users_code.off = lambda student, teacher: (student - teacher).abs().mean()
    task = Policy()
    task.fit_unit({"action": (1e5 * torch.randn(8, 2)).numpy()})
    objective = Objective([LossTerm(name="users_code:off")], task)
    total, _ = objective({"action": torch.full((2, 2), 7.0)}, {"action": torch.zeros(2, 2)}, {})
    assert float(total) == 7.0


def test_independent_outputs_of_a_task_without_classes_may_be_logits():
    logits = {"action": torch.randn(4, 3)}
    objective = Objective([LossTerm(name="multi_label")], Policy())
    assert float(objective(logits, logits, {})[0]) == pytest.approx(0.0, abs=1e-6)
