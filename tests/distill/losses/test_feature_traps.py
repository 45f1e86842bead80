"""Losses with trained parts do train them; what public code got wrong stays right here."""

import pytest
import torch

from edgekd.distill.losses import LOSSES
from edgekd.distill.losses.feature import Cwd, Fitnets, Pkd, Vid, nst
from edgekd.distill.losses.multi_layer import Fsp, Ofd, Review
from edgekd.errors import InputError
from edgekd.extension import check_arguments
from tests.distill.losses.samples import LargestTensor

ONE = [Fitnets, Vid, Cwd, Pkd]
MANY = [Fsp, Ofd, Review]
STUDENT = [(4, 3, 8, 8), (4, 4, 4, 4), (4, 6, 2, 2)]
TEACHER = [(4, 5, 8, 8), (4, 7, 4, 4), (4, 8, 2, 2)]


def made(kind, student=STUDENT, teacher=TEACHER, **hyper):
    """A loss, a student's features and a teacher's; of one layer or of all, as it takes them."""
    torch.manual_seed(0)
    loss = (
        kind(student, teacher, **hyper) if kind in MANY else kind(student[0], teacher[0], **hyper)
    )
    features = [[torch.randn(shape) for shape in shapes] for shapes in (student, teacher)]
    return loss, *(features if kind in MANY else (side[0] for side in features))


@pytest.mark.parametrize("kind", ONE + MANY)
def test_every_parameter_is_registered_gets_a_gradient_and_moves(kind):
    loss, student, teacher = made(kind)
    before = {name: p.detach().clone() for name, p in loss.named_parameters()}
    assert before
    optimizer = torch.optim.SGD(loss.parameters(), lr=10.0)
    loss(student, teacher).backward()
    optimizer.step()
    assert [name for name, p in loss.named_parameters() if torch.equal(p, before[name])] == []


@pytest.mark.parametrize("kind", ONE + MANY)
def test_the_student_gets_a_gradient_in_each_layer(kind):
    loss, student, teacher = made(kind)
    student = student if isinstance(student, list) else [student]
    student = [feature.requires_grad_() for feature in student]
    loss(student if kind in MANY else student[0], teacher).backward()
    assert all(feature.grad.abs().max() > 0 for feature in student)


@pytest.mark.parametrize("kind", ONE + MANY)
def test_the_trained_parts_stay_the_same_from_step_to_step(kind):
    """A projector created in each step is never trained: two calls must agree."""
    loss, student, teacher = made(kind)
    # Evaluation: a batch norm in training may note its statistics.
    loss.eval()
    with torch.no_grad():
        assert torch.equal(loss(student, teacher), loss(student, teacher))
    parameters = {id(p) for p in loss.parameters()}
    loss(student, teacher)
    assert {id(p) for p in loss.parameters()} == parameters


@pytest.mark.parametrize("kind", ONE + MANY)
def test_training_the_adapters_alone_lowers_the_loss(kind):
    loss, student, teacher = made(kind)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    values = []
    for _ in range(40):
        optimizer.zero_grad()
        value = loss(student, teacher)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0] - 0.02 * abs(values[0])


@pytest.mark.parametrize("kind", ONE + MANY)
def test_other_sizes_of_the_teacher_are_matched(kind):
    smaller = [(4, 5, 6, 3), (4, 7, 3, 3), (4, 8, 1, 1)]
    larger = [(4, 5, 16, 9), (4, 7, 8, 8), (4, 8, 3, 5)]
    for teacher in (smaller, larger):
        loss, student, features = made(kind, teacher=teacher)
        assert loss(student, features).isfinite()


@pytest.mark.parametrize("kind", ONE + MANY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_meet_float32_adapters(kind, dtype):
    loss, student, teacher = made(kind)
    student, teacher = (
        [f.to(dtype) for f in side] if kind in MANY else side.to(dtype)
        for side in (student, teacher)
    )
    value = loss(student, teacher)
    value.backward()
    assert value.dtype is torch.float32
    assert value.isfinite()


@pytest.mark.parametrize("kind", ONE + MANY)
def test_shapes_of_other_rank_are_refused_when_it_is_made(kind):
    wrong = [(4, 5)] * 3
    with pytest.raises(InputError, match=r"student \[4, 3, 8, 8\] and teacher \[4, 5\]"):
        made(kind, teacher=wrong)


@pytest.mark.parametrize("kind", [Fitnets, Vid])
@pytest.mark.parametrize(
    ("student", "teacher"), [((4, 6, 8), (4, 6, 5)), ((4, 8), (4, 5)), ((4, 8), (4, 8))]
)
def test_sequences_and_vectors(kind, student, teacher):
    loss, s, t = made(kind, [student], [teacher])
    assert loss(s, t).isfinite()


def test_other_sequence_lengths_are_refused():
    with pytest.raises(InputError, match=r"\[4, 6, 8\] and teacher \[4, 7, 8\].*sequence length"):
        Fitnets((4, 6, 8), (4, 7, 8))


def test_fitnets_finds_the_map_there_is():
    """A teacher that is a linear image of the student: only a trained adapter gets to 0."""
    torch.manual_seed(0)
    student = torch.randn(64, 4)
    teacher = student @ torch.randn(4, 6) + 1
    loss = Fitnets((64, 4), (64, 6))
    optimizer = torch.optim.LBFGS(loss.parameters(), line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(student, teacher)
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(closure)
    assert loss(student, teacher) < 1e-6


def test_equal_shapes_leave_fitnets_nothing_to_train():
    loss = Fitnets((4, 3, 8, 8), (4, 3, 8, 8))
    assert not list(loss.parameters())
    feature = torch.randn(4, 3, 8, 8)
    assert loss(feature, feature) == 0


def test_ofd_has_its_adapter_even_for_equal_shapes():
    loss, student, teacher = made(Ofd, teacher=STUDENT)
    loss(student, teacher).backward()
    assert sum(p.grad is not None and p.ndim == 4 for p in loss.parameters()) == 3


def test_the_variance_starts_at_5_and_is_a_parameter_of_the_state():
    loss, _, _ = made(Vid)
    torch.testing.assert_close(loss.variance, torch.full((5,), 5.0))
    assert "scale" in loss.state_dict()
    for start in (1e-3, 1.0, 500.0):
        made_so = Vid((2, 3), (2, 4), initial_variance=start)
        torch.testing.assert_close(made_so.variance, torch.full((4,), start), rtol=1e-4, atol=0)
    with pytest.raises(InputError, match="not above eps"):
        Vid((2, 3), (2, 4), initial_variance=1e-6)


def test_the_variance_learns_the_error_of_its_channel():
    """Where the loss is least, σ² of a channel is its mean squared error."""
    torch.manual_seed(0)
    loss, student, teacher = made(Vid)
    teacher = teacher * torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0])[:, None, None]
    optimizer = torch.optim.Adam([loss.scale], lr=0.3)
    for _ in range(300):
        optimizer.zero_grad()
        loss(student, teacher).backward()
        optimizer.step()
    errors = (loss.mean(student) - teacher).square().mean((0, 2, 3))
    torch.testing.assert_close(loss.variance, errors, rtol=1e-2, atol=0)


def test_the_variance_never_reaches_0():
    loss = Vid((2, 3), (2, 4))
    with torch.no_grad():
        loss.scale.fill_(-1e4)
    value = loss(torch.randn(2, 3), torch.randn(2, 4))
    assert loss.variance.min() >= 1e-5 * (1 - 1e-6)
    assert value.isfinite()


def test_nst_never_makes_all_pairs_of_channels_at_all_positions():
    batch, channels, others, side = 2, 48, 64, 8
    student = torch.randn(batch, channels, side, side, requires_grad=True)
    teacher = torch.randn(batch, others, side, side)
    with LargestTensor() as largest:
        nst(student, teacher).backward()
    assert largest.bytes <= 4 * batch * others * max(others, side * side)
    # What the naive broadcast would make is far above it: the bound is meaningful.
    assert largest.bytes * 4 < batch * channels * others * side * side


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("fitnets", {"relu": False}),
        ("attention", {"power": 2}),
        ("vid", {"initial_variance": 5, "eps": 1e-5}),
        ("cwd", {"temperature": 4}),
        ("review", {"width": 64}),
        ("fsp", {}),
        ("ofd", {}),
        ("pkd", {}),
        ("nst", {}),
    ],
)
def test_hyper_parameters_come_from_yaml(name, args):
    supplied = ("student", "teacher")
    assert check_arguments(LOSSES[name], args, supplied=supplied, name=name).keys() == args.keys()


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("fitnets", {"relu": 3}),
        ("attention", {"power": 0.5}),
        ("vid", {"initial_variance": -1.0}),
        ("vid", {"initial_variance": float("inf")}),
        ("cwd", {"temperature": 0.5}),
        ("review", {"width": 0}),
        ("review", {"widht": 64}),
    ],
)
def test_wrong_hyper_parameters_are_refused(name, args):
    with pytest.raises(InputError):
        check_arguments(LOSSES[name], args, supplied=("student", "teacher"), name=name)
