"""Mixup and CutMix against their formulas, image by image."""

import numpy as np
import pytest
import torch

from edgekd.data.augment import SampleRng
from edgekd.data.transforms import (
    cutmix,
    mixed_classes,
    mixed_values,
    mixing,
    mixup,
    partner_rows,
)
from edgekd.errors import InputError

COUNT = 300


def draws(count=COUNT):
    return SampleRng(0, np.arange(count), np.zeros(count, int))


@pytest.fixture(params=[torch.uint8, torch.float32])
def pair(request):
    pixels = np.random.default_rng(0).integers(0, 256, (2, COUNT, 2, 9, 12))
    return torch.from_numpy(pixels).to(request.param)


def test_mixup_is_the_published_formula(pair):
    images, partners = pair
    mixed, share = mixup(images, partners, draws(), alpha=1.0)
    assert mixed.dtype == images.dtype
    assert share.min() < 0.02
    assert share.max() > 0.98
    for i in range(COUNT):
        weight = share[i].item()
        expected = weight * images[i].double() + (1 - weight) * partners[i].double()
        # Half a level of uint8; else the rounding of float32 at 255. Both with float32's λ.
        near = 0.5001 if images.dtype == torch.uint8 else 5e-5
        assert (mixed[i].double() - expected).abs().max() < near


def test_cutmix_replaces_one_box_and_its_share_is_the_area_left(pair):
    images, _ = pair
    # Images without a pixel in common, so that each shows where it is from.
    images, partners = (images // 2 * 2).to(images.dtype), (images // 2 * 2 + 1).to(images.dtype)
    mixed, share = cutmix(images, partners, draws())
    assert mixed.dtype == images.dtype
    foreign = (mixed == partners).all(1)
    assert torch.equal(foreign, (mixed == partners).any(1))
    assert torch.equal(torch.where(foreign[:, None], partners, images), mixed)
    for i in range(COUNT):
        rows, columns = foreign[i].any(1).nonzero(), foreign[i].any(0).nonzero()
        if len(rows):
            box = foreign[i, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert box.all()
            assert box.numel() == foreign[i].sum()
        assert share[i].item() == np.float32(1 - foreign[i].double().mean().item())
    assert foreign.any(0).all()


def test_cutmix_takes_sides_of_the_root_of_the_part_it_replaces():
    """Where the box is not cut off, its sides are √(1 - λ) times the image's."""
    images, partners = torch.zeros(COUNT, 1, 40, 20), torch.ones(COUNT, 1, 40, 20)
    mixed, _ = cutmix(images, partners, draws())
    again = draws()
    side = (1 - again.beta(1.0).double()).sqrt()
    height, width = mixed[:, 0].amax(2).sum(1), mixed[:, 0].amax(1).sum(1)
    inside = ~(mixed[:, 0, [0, -1]].any(2).any(1) | mixed[:, 0][:, :, [0, -1]].any(2).any(1))
    assert inside.sum() > 20
    # Rounded to a pixel.
    assert ((height - side * 40).abs()[inside] <= 0.5).all()
    assert ((width - side * 20).abs()[inside] <= 0.5).all()


def test_the_partner_is_any_other_row_and_equally_likely():
    samples = np.full(30_000, 3)
    partners = partner_rows(samples, SampleRng(0, samples, np.arange(30_000)), 7)
    counts = np.bincount(partners, minlength=7)
    assert counts[3] == 0
    # Binomial: 5000 expected, with a standard deviation of 65.
    assert (abs(counts[[0, 1, 2, 4, 5, 6]] - 5000) < 6 * 65).all()
    assert partner_rows(np.array([0]), draws(1), 1).tolist() == [0]


def test_classes_become_probabilities():
    labels, partners = torch.tensor([0, 2, 1, -1, 2, -1]), torch.tensor([1, 2, 0, 2, -1, -1])
    share = torch.tensor([0.25, 0.3, 1.0, 0.5, 0.5, 0.5])
    expected = [[0.25, 0.75, 0], [0, 0, 1], [0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    found = mixed_classes(labels, partners, share, 3)
    assert found.dtype is torch.float32
    # 0.3 and 1 - 0.3 in float32 need not add up to 1 exactly.
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-7)


def test_continuous_targets_are_mixed_linearly():
    share = torch.tensor([0.25, 1.0])
    one, other = torch.tensor([[[4.0, 0.0]], [[1.0, 2.0]]]), torch.tensor([[[0.0, 8.0]]] * 2)
    assert mixed_values(one, other, share).tolist() == [[[1.0, 6.0]], [[1.0, 2.0]]]
    assert mixed_values(one[:, 0, 0], other[:, 0, 1], share).tolist() == [7.0, 1.0]


@pytest.mark.parametrize("function", [mixup, cutmix])
def test_an_alpha_that_is_none(function):
    images = torch.zeros(2, 1, 3, 3)
    for alpha in (0, -1):
        with pytest.raises(InputError, match="alpha is"):
            function(images, images, draws(2), alpha=alpha)
    with pytest.raises(InputError, match=r"alpha: .* it is 'x'"):
        mixing([{function.__name__: {"alpha": "x"}}])
