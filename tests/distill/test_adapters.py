"""Adapters: the teacher's shape is reached, nothing is made where nothing has to change."""

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.distill.features import (
    adapter,
    check_maps,
    check_same_shape,
    pool_to_smaller,
    regressor,
    resize,
)
from edgekd.distill.losses.multi_layer import AttentionFusion
from edgekd.errors import InputError

KINDS = [
    ((3, 8, 5, 7), (3, 12, 5, 7)),
    ((3, 6, 8), (3, 6, 12)),
    ((3, 8), (3, 12)),
]


@pytest.mark.parametrize("make", [adapter, regressor])
@pytest.mark.parametrize(("student", "teacher"), KINDS)
def test_the_teachers_shape_is_reached_and_all_parameters_take_part(make, student, teacher):
    module = make(student, teacher)
    # What is trained must depend on the batch it sees, not on the batch its shape was taken from.
    out = module(torch.randn(5, *student[1:]))
    assert out.shape == (5, *teacher[1:])
    # A plain sum behind a batch norm has no gradient.
    (out * torch.randn_like(out)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


@pytest.mark.parametrize(("student", "teacher"), KINDS)
def test_adapters_treat_every_position_alike(student, teacher):
    """A 1x1 convolution and a linear layer see one position; they commute with moving them."""
    module = adapter(student, teacher).eval()
    feature = torch.randn(student)
    for dim in {"4": (2, 3), "3": (1,), "2": ()}[str(len(student))]:
        moved = module(feature.roll(1, dim))
        torch.testing.assert_close(moved, module(feature).roll(1, dim))


@pytest.mark.parametrize("shape", [(3, 8, 5, 7), (3, 6, 8), (3, 8)])
def test_equal_channels_need_no_adapter(shape):
    feature = torch.randn(shape)
    assert not list(adapter(shape, shape, relu=True).parameters())
    assert torch.equal(adapter(shape, shape, relu=True)(feature), feature)
    assert list(adapter(shape, shape, always=True).parameters())


def test_height_and_width_and_batch_do_not_matter_to_an_adapter():
    assert isinstance(adapter((3, 8, 5, 7), (4, 8, 10, 3)), nn.Identity)


def test_batch_norm_and_relu_are_there_when_asked_for():
    shapes = ((8, 3, 5, 5), (8, 6, 5, 5))
    feature = 50 + 20 * torch.randn(shapes[0])
    plain = adapter(*shapes, batch_norm=False)
    torch.testing.assert_close(
        plain(3 * feature) - plain(feature),
        2 * (plain[0](feature) - plain[0].bias[:, None, None]),
        rtol=1e-4,
        atol=1e-3,
    )
    normed = adapter(*shapes)(feature)
    torch.testing.assert_close(normed.mean((0, 2, 3)), torch.zeros(6), rtol=0, atol=1e-4)
    assert normed.min() < 0
    assert adapter(*shapes, relu=True)(feature).min() == 0


@pytest.mark.parametrize("make", [adapter, regressor])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((3, 8, 5, 5), (3, 8)),
        ((3, 8), (3, 4, 8)),
        ((3, 6, 8), (3, 7, 8)),
        ((3, 8, 2, 2, 2), (3, 8, 2, 2, 2)),
        ((3,), (3,)),
    ],
)
def test_shapes_that_cannot_be_matched_are_both_named(make, student, teacher):
    with pytest.raises(InputError) as error:
        make(student, teacher)
    assert str(list(student)) in error.value.what
    assert str(list(teacher)) in error.value.what
    assert error.value.remedy


def test_checks_name_both_shapes():
    maps, others = torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    for check in (check_maps, check_same_shape):
        with pytest.raises(InputError, match=r"student \[2, 3, 4, 4\].*teacher \[1, 3, 4, 4\]"):
            check(maps, others)
    with pytest.raises(InputError, match="to do: give others"):
        check_same_shape(maps, others, "give others")
    with pytest.raises(InputError, match="are not two maps"):
        check_maps(maps, torch.zeros(2, 3))


def test_pooling_takes_the_smaller_of_each_dimension_and_keeps_the_mean():
    first, second = torch.randn(2, 3, 8, 2), torch.randn(2, 5, 4, 6)
    small_first, small_second = pool_to_smaller(first, second)
    assert small_first.shape == (2, 3, 4, 2)
    assert small_second.shape == (2, 5, 4, 2)
    expected = first.numpy().reshape(2, 3, 4, 2, 2).mean(3)
    np.testing.assert_allclose(small_first.numpy(), expected, rtol=1e-5, atol=1e-6)
    vector = torch.randn(2, 9)
    assert pool_to_smaller(vector, vector)[0] is vector


def test_resizing_keeps_a_constant_and_does_nothing_to_equal_sizes():
    like = torch.zeros(2, 9, 7, 5)
    assert resize(torch.full((2, 3, 3, 4), 2.5), like).eq(2.5).all()
    assert resize(like, like) is like


def test_fusion_is_the_published_formula():
    torch.manual_seed(0)
    batch, channels, width, out = 2, 3, 4, 5
    level = AttentionFusion(channels, out, width, deepest=False).double().eval()
    feature = torch.randn(batch, channels, 4, 4, dtype=torch.float64)
    deeper = torch.randn(batch, width, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        answer, left = (t.numpy() for t in level(feature, deeper, (4, 4)))
    weights = {name: value.detach().numpy() for name, value in level.state_dict().items()}
    # An untrained batch norm divides by the root of 1 + its eps.
    norm = 1 / np.sqrt(1 + 1e-5)
    x = np.einsum("oc,bchw->bohw", weights["narrow.0.weight"][:, :, 0, 0], feature) * norm
    y = deeper.numpy().repeat(2, axis=2).repeat(2, axis=3)
    z = np.einsum(
        "oc,bchw->bohw", weights["attend.0.weight"][:, :, 0, 0], np.concatenate([x, y], 1)
    )
    z = 1 / (1 + np.exp(-z - weights["attend.0.bias"][:, None, None]))
    fused = z[:, :1] * x + z[:, 1:] * y
    np.testing.assert_allclose(left, fused, rtol=1e-12)
    padded = np.pad(fused, ((0, 0), (0, 0), (1, 1), (1, 1)))
    expected = np.zeros((batch, out, 4, 4))
    for row in range(4):
        for column in range(4):
            window = padded[:, :, row : row + 3, column : column + 3]
            expected[:, :, row, column] = norm * np.einsum(
                "ocij,bcij->bo", weights["widen.0.weight"], window
            )
    np.testing.assert_allclose(answer, expected, rtol=1e-9, atol=1e-12)


def test_fusion_gives_the_teachers_size():
    answer, left = AttentionFusion(3, 5, 4, deepest=True)(torch.randn(2, 3, 4, 4), None, (6, 8))
    assert answer.shape == (2, 5, 6, 8)
    assert left.shape == (2, 4, 6, 8)
