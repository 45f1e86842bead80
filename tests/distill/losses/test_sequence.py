"""Losses between transformer layers against loops over tokens, with padding of any content."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.distill.losses import LOSSES
from edgekd.distill.losses.sequence import HiddenStates, attention_maps, cosine, hidden_states
from edgekd.errors import InputError
from tests.distill.losses.samples import normal

STATES, MAPS = (3, 4, 5), (3, 2, 4, 4)
LOSS_AND_SHAPE = [(hidden_states, STATES), (attention_maps, MAPS), (cosine, STATES)]
MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]])


def kept_tokens(mask):
    return [(b, i) for b in range(3) for i in range(4) if mask is None or mask[b, i]]


@pytest.mark.parametrize("mask", [None, MASK, MASK.bool(), MASK.double()])
def test_hidden_states_are_the_published_formula(mask):
    s, t = normal(STATES, STATES)
    expected = np.mean([(s[b, i] - t[b, i]).square().mean() for b, i in kept_tokens(mask)])
    assert hidden_states(s, t, mask).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("mask", [None, MASK])
def test_cosine_is_the_published_formula(mask):
    s, t = normal(STATES, STATES)
    expected = np.mean(
        [
            1 - float(s[b, i] @ t[b, i]) / math.hypot(*s[b, i]) / math.hypot(*t[b, i])
            for b, i in kept_tokens(mask)
        ]
    )
    assert cosine(s, t, mask).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("heads", [(2, 2), (2, 3), (4, 1)])
def test_attention_maps_are_the_published_formula(mask, heads):
    s, t = normal(*((3, h, 4, 4) for h in heads))
    errors = []
    for b, i in kept_tokens(mask):
        for c, j in kept_tokens(mask):
            if b == c and heads[0] == heads[1]:
                errors += [(s[b, h, i, j] - t[b, h, i, j]) ** 2 for h in range(heads[0])]
            elif b == c:
                errors.append(
                    (np.mean(s[b, :, i, j].numpy()) - np.mean(t[b, :, i, j].numpy())) ** 2
                )
    assert attention_maps(s, t, mask).item() == pytest.approx(np.mean(errors), rel=1e-12)


@pytest.mark.parametrize(("loss", "shape"), LOSS_AND_SHAPE)
@pytest.mark.parametrize("mask", [None, MASK])
def test_gradient(loss, shape, mask):
    s, t = normal(shape, shape)
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, t, mask), s)


@pytest.mark.parametrize(("loss", "shape"), LOSS_AND_SHAPE)
@pytest.mark.parametrize("mask", [None, MASK])
def test_equal_layers_are_the_minimum_without_a_gradient(loss, shape, mask):
    s = normal(shape)[0].requires_grad_()
    value = loss(s, s.detach().clone(), mask)
    value.backward()
    # A unit vector's square is 1 up to rounding; the squared errors are exactly 0.
    assert abs(value.item()) <= (1e-15 if loss is cosine else 0)
    assert s.grad.abs().max() < 1e-15
    assert loss(s.detach(), normal(shape, seed=1)[0], mask) > 0


@pytest.mark.parametrize(("loss", "shape"), LOSS_AND_SHAPE)
def test_the_order_of_the_batch_does_not_matter(loss, shape):
    s, t = normal(shape, shape)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        loss(s[order], t[order], MASK[order]), loss(s, t, MASK), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize(("loss", "shape"), LOSS_AND_SHAPE)
@pytest.mark.parametrize("content", [0.0, 1e30, math.inf, math.nan])
def test_the_content_of_the_padding_does_not_matter(loss, shape, content):
    s, t = normal(shape, shape)
    expected = loss(s, t, MASK)
    padding = MASK == 0
    for x in (s, t):
        if loss is attention_maps:
            x.mT[padding[:, None].expand(3, 2, 4)] = content
            x[padding[:, None].expand(3, 2, 4)] = content
        else:
            x[padding] = content
    s.requires_grad_()
    value = loss(s, t, MASK)
    value.backward()
    assert value.item() == expected.item()
    assert s.grad.isfinite().all()


@pytest.mark.parametrize(("loss", "shape"), LOSS_AND_SHAPE)
def test_a_batch_of_padding_alone_gives_0(loss, shape):
    s, t = normal(shape, shape)
    s.requires_grad_()
    value = loss(s, t, torch.zeros(3, 4))
    value.backward()
    assert value.item() == 0.0
    assert not s.grad.any()


def test_cosine_ignores_the_length_of_any_state_and_spans_0_to_2():
    s, t = normal(STATES, STATES)
    lengths = torch.arange(1, 13, dtype=torch.float64).reshape(3, 4, 1)
    torch.testing.assert_close(cosine(s * lengths, t / lengths), cosine(s, t), rtol=1e-12, atol=0)
    assert cosine(s, -s).item() == pytest.approx(2, rel=1e-12)


def test_a_state_of_zeros_has_cosine_0_and_no_gradient():
    s, t = normal(STATES, STATES)
    s[:] = 0
    s.requires_grad_()
    value = cosine(s, t)
    value.backward()
    assert value.item() == 1.0
    assert not s.grad.any()


@pytest.mark.parametrize("heads", [(2, 2), (2, 3)])
def test_scores_behind_a_causal_mask_are_left_out(heads):
    s, t = normal(*((3, h, 4, 4) for h in heads))
    seen = torch.ones(4, 4, dtype=torch.bool).tril()
    difference = s - t if heads == (2, 2) else s.mean(1) - t.mean(1)
    expected = difference[..., seen].square().mean()
    s, t = (x.masked_fill(~seen, -math.inf).requires_grad_() for x in (s, t))
    value = attention_maps(s, t)
    value.backward()
    torch.testing.assert_close(value.detach(), expected, rtol=1e-12, atol=0)
    assert s.grad.isfinite().all()


@pytest.mark.parametrize(("loss", "shape"), LOSS_AND_SHAPE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_where_its_squares_overflow(loss, shape, dtype):
    s, t = ((x * 5000).to(dtype) for x in normal(shape, shape))
    s.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        value = loss(s, t, MASK)
    value.backward()
    assert value.dtype is torch.float32
    assert value.isfinite()
    assert s.grad.isfinite().all()


@pytest.mark.parametrize(("loss", "shape"), LOSS_AND_SHAPE)
def test_shapes_that_broadcast_are_refused(loss, shape):
    s, t = normal(shape, (1, *shape[1:]))
    with pytest.raises(InputError, match=r"differ in shape"):
        loss(s, t)
    with pytest.raises(InputError, match=r"mask \[3, 1\]"):
        loss(s, s, MASK[:, :1])


def test_attention_without_heads_is_refused():
    with pytest.raises(InputError, match=r"of the teacher are \[3, 4, 4\]"):
        attention_maps(*normal(MAPS, (3, 4, 4)))


def test_hidden_states_of_a_narrower_student_go_through_a_trained_adapter():
    s, t = normal(STATES, (3, 4, 7))
    module = HiddenStates(STATES, (3, 4, 7)).double()
    assert isinstance(module.adapter, nn.Linear)
    brought = s @ module.adapter.weight.detach().T + module.adapter.bias.detach()
    # Content of the padding must reach the loss no more than the adapter's weights.
    s[MASK == 0] = math.nan
    s.requires_grad_()
    value = module(s, t, MASK)
    value.backward()
    torch.testing.assert_close(value.detach(), hidden_states(brought, t, MASK), rtol=1e-12, atol=0)
    for parameter in module.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


def test_hidden_states_of_equal_width_have_no_parameters():
    s, t = normal(STATES, STATES)
    module = HiddenStates(STATES, STATES)
    assert not list(module.parameters())
    assert torch.equal(module(s, t, MASK), hidden_states(s, t, MASK))


def test_the_adapter_takes_half_states():
    module = HiddenStates((3, 4, 5), (3, 4, 7))
    s, t = normal(STATES, (3, 4, 7))
    assert module(s.half(), t.bfloat16()).isfinite()


def test_they_are_losses_of_a_pipeline():
    assert LOSSES["hidden_states"] is HiddenStates
    assert LOSSES["attention_maps"] is attention_maps
    assert LOSSES["cosine"] is cosine
