import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekd.data.splits import cut
from edgekd.errors import InputError


@given(
    members=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    fraction=st.floats(0.05, 0.95),
    what=st.sampled_from(["test", "validation"]),
)
def test_every_class_gives_its_share_to_within_one(members, fraction, what):
    labels = np.repeat(np.arange(len(members)) * 7 - 3, members)
    count = len(labels)
    if not 0 < round(count * fraction) < count:
        return
    keep, chosen = cut(count, fraction, labels, what, "here")
    np.testing.assert_array_equal(np.sort(np.concatenate([keep, chosen])), np.arange(count))
    assert len(chosen) == round(count * fraction)
    taken = np.array([(labels[chosen] == label).sum() for label in np.unique(labels)])
    assert (np.abs(taken - np.array(members) * fraction) <= 1 + 1e-9).all()


def test_the_choice_is_the_same_again_and_differs_for_test_and_validation():
    labels = np.arange(200) % 4
    first, again = (cut(200, 0.2, labels, "test", "here")[1] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert set(first) != set(cut(200, 0.2, labels, "validation", "here")[1])


def test_sorted_classes_are_cut_at_random_within_each_class():
    labels = np.repeat([0, 1], 500)
    _, chosen = cut(1000, 0.1, labels, "validation", "here")
    # Taking the first of each class would be the classic mistake on sorted files.
    assert chosen[labels[chosen] == 0].max() > 250
    assert chosen[labels[chosen] == 1].max() > 750


@pytest.mark.parametrize(("count", "fraction"), [(3, 0.1), (1, 0.5), (3, 0.9), (1, 0.9)])
def test_a_split_without_samples_is_an_error(count, fraction):
    with pytest.raises(InputError, match="sample"):
        cut(count, fraction, None, "validation", "here")
