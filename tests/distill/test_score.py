"""Scores of a source whose samples have labels only in part."""

import numpy as np
import pytest
import torch

from edgekd.distill.trainer import score
from edgekd.errors import InputError
from edgekd.tasks import Classification

LOGITS = torch.eye(4)[[0, 1, 2, 3, 0, 1, 2]]


class Source:
    """Seven samples in batches of three; ``label`` (7,)."""

    def __init__(self, label, count=7):
        self.label, self.count = torch.tensor(label), count

    def ordered(self):
        for start in range(0, self.count, 3):
            rows = slice(start, start + 3)
            yield {"logits": LOGITS[rows], "label": self.label[rows]}


def scored(label, count=7):
    return score(lambda batch: {"logits": batch["logits"]}, Source(label, count), Classification())


def test_only_labelled_samples_are_scored_also_where_a_batch_has_none():
    assert scored([0, -1, 3, -1, -1, -1, 2]).tolist() == [1.0, 0.0, 1.0]


def test_what_is_unlabelled_does_not_move_the_metric():
    whole = [0, 1, 3, 3, 1, 1, 2]
    some = [*whole[:5], -1, -1]
    np.testing.assert_array_equal(scored(some), scored(whole)[:5])


def test_no_label_and_no_sample_are_told_apart():
    with pytest.raises(InputError, match="no labelled samples"):
        scored([-1] * 7)
    with pytest.raises(InputError, match=r"no samples to score[\s\S]*more data"):
        scored([-1] * 7, count=0)
