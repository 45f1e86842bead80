"""Encoded teacher logits: what is restored, and how exactly."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgekd.distill.cache_store import LogitCodec
from edgekd.spec import TensorSpec


def shortened(logits, top):
    """Logits through a record and back, and the record."""
    logits = torch.as_tensor(logits)
    layout = LogitCodec([TensorSpec("z", ("batch", *logits.shape[1:]))], ["z"], top)
    records = layout.encode({"z": logits})
    return layout.decode(records, torch.device("cpu"))["z"], records


@given(
    arrays(np.float32, (2, 3, 31), elements=st.floats(-30, 30, width=32)),
    st.floats(0.1, 3),
)
def test_the_top_and_the_rest_keep_their_probability(noise, scale):
    logits = noise * np.float32(scale)
    back, records = shortened(logits, 4)
    rows = zip(
        logits.reshape(-1, 31).astype(np.float64),
        back.numpy().reshape(-1, 31).astype(np.float64),
        records["z"]["index"].reshape(-1, 4),
        strict=True,
    )
    for row, returned, top in rows:
        p, q = (np.exp(z - z.max()) / np.exp(z - z.max()).sum() for z in (row, returned))
        assert sorted(row[top]) == sorted(row)[-4:]
        # A distance d is off by d / 2048 at most, and what it weighs by d e^-d / 2048 < 2e-4;
        # the logsumexp of the rest, at most log 27 = 3.3, by 1e-3, and p (1 - p) <= 1 / 4 of it.
        assert abs(p[top].sum() - q[top].sum()) <= 1.1e-3
        np.testing.assert_allclose(p[top], q[top], atol=1.1e-3)


def test_the_rest_is_spread_evenly():
    logits = torch.tensor([[5.0, 4.0, 1.0, 0.0, -1.0, -2.0, *[-3.0] * 14]])
    back, _ = shortened(logits, 2)
    rest = math.log(sum(math.exp(z) for z in logits[0, 2:].tolist()) / 18)
    # The logsumexp is stored as float16: 2.3 below the largest, in steps of 2⁻⁹.
    torch.testing.assert_close(back[0, 2:], torch.full((18,), rest), rtol=0, atol=2**-10 + 1e-6)


@pytest.mark.parametrize(
    "row",
    [
        [1e5, 9.9e4, *[-1e5] * 48],
        [0.0, *[-math.inf] * 49],
        [-1e5, *[-2e5] * 49],
        [*[0.0] * 25, *[-87.3] * 25],
        [1e10, *[-3e38] * 49],
        [-7.0] * 50,
    ],
)
def test_extremes_stay_finite_and_keep_the_decision(row):
    logits = torch.tensor([row])
    back, _ = shortened(logits, 5)
    assert back.isfinite().all()
    assert back.amax() == logits.amax()
    assert logits[0, back.argmax()] == logits.amax()
    top = back.topk(5).indices
    kept, exact = (z.double().softmax(-1).gather(1, top).sum() for z in (back, logits))
    # The rest is up to 45 equal ones: a logsumexp of 3.8 to float16, in steps of 2⁻⁹.
    torch.testing.assert_close(kept, exact, rtol=2**-10, atol=1e-9)


@pytest.mark.parametrize("classes", range(20, 40))
def test_the_rest_never_overtakes_the_top(classes):
    """Some of these sizes have a logsumexp that float16 rounds up."""
    logits = torch.full((1, classes), 2.5)
    back, _ = shortened(logits, 4)
    assert back.amax() == 2.5


@pytest.mark.parametrize("classes", [1, 9, 10, 11])
def test_logits_that_take_no_more_room_are_exact(classes):
    logits = torch.randn(4, classes)
    back, records = shortened(logits, 10)
    assert torch.equal(back, logits)
    assert records.itemsize == 4 * classes


def test_more_classes_than_two_bytes_count():
    logits = torch.zeros(1, 70_000)
    logits[0, 69_999], logits[0, 65_536] = 30.0, 29.0
    back, _ = shortened(logits, 2)
    assert back[0].topk(2).indices.tolist() == [69_999, 65_536]
