"""Cross-entropy with labels, with mixtures and with neither."""

import torch
from torch.nn import functional as F

from edgekd.tasks.losses import cross_entropy

LOGITS = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([3, 0, 4, 1])


def test_pure_mixtures_are_labels():
    mixtures = F.one_hot(LABELS, 5).double()
    for smoothing in (0.0, 0.1):
        torch.testing.assert_close(
            cross_entropy(LOGITS, mixtures, smoothing), cross_entropy(LOGITS, LABELS, smoothing)
        )


def test_a_row_of_zeros_is_an_unlabelled_sample():
    mixtures, labels = F.one_hot(LABELS, 5).double(), LABELS.clone()
    mixtures[2], labels[2] = 0, -1
    for smoothing in (0.0, 0.1):
        soft = LOGITS.clone().requires_grad_()
        loss = cross_entropy(soft, mixtures, smoothing)
        torch.testing.assert_close(loss, cross_entropy(LOGITS, labels, smoothing))
        loss.backward()
        assert (soft.grad[2] == 0).all()
        assert (soft.grad[[0, 1, 3]] != 0).all()


def test_no_label_at_all_gives_0_with_a_gradient_of_0():
    logits = LOGITS.clone().requires_grad_()
    loss = cross_entropy(logits, torch.zeros(4, 5, dtype=torch.float64), 0.1)
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()
