"""Random numbers that depend on (seed, sample, view, number) and on nothing else."""

import numpy as np
import pytest
import torch
from scipy import stats

from edgekd.data.augment import SampleRng, _mixed

KINDS = {
    "uniform": lambda draws: draws.uniform(),
    "integers": lambda draws: draws.integers(1000),
    "normal": lambda draws: draws.normal(),
    "beta": lambda draws: draws.beta(0.2),
    "branch": lambda draws: draws.branch().uniform(),
}
SURE = 1e-6
"""Below this probability a deviation is a fault and not chance; the draws are always the same."""


def draws(count=1, seed=0, view=0, first=0):
    return SampleRng(seed, np.arange(first, first + count), np.full(count, view))


def test_the_mixing_function_is_that_of_splitmix64():
    # The first numbers of the published generator started at 1234567: Rosetta Code.
    golden = 0x9E3779B97F4A7C15
    states = [(1234567 + n * golden) % 2**64 for n in (1, 2, 3)]
    assert _mixed(np.array(states, np.uint64)).tolist() == [
        6457827717110365317, 3203168211198807973, 9817491932198370423,
    ]  # fmt: skip


def test_numbers_stay_what_they_were():
    """A cache of outputs on disk outlives a version of the code."""
    made = SampleRng(7, np.array([0, 123456]), np.array([0, 3]))
    assert made.uniform().tolist() == [0.854597806930542, 0.3111240267753601]
    assert made.integers(1000).tolist() == [776, 537]
    assert made.branch().uniform().tolist() == [0.645992636680603, 0.043754398822784424]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_draws_the_same_in_any_batch(kind):
    samples = np.random.default_rng(0).permutation(150)
    views = samples % 7
    whole = SampleRng(3, samples, views)
    parts = [SampleRng(3, samples[at], views[at]) for at in (slice(1), slice(1, 4), slice(4, None))]
    for _ in range(3):
        together = KINDS[kind](whole)
        assert torch.equal(together, torch.cat([KINDS[kind](part) for part in parts]))
    assert len(whole) == 150


def test_no_number_of_another_generator_is_taken():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    for kind in KINDS.values():
        kind(draws(5))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()


@pytest.mark.parametrize("along", ["sample", "view", "seed", "draw"])
def test_uniform_and_independent_of_the_neighbour(along):
    one = draws()
    made = {
        "sample": lambda: draws(40_000).uniform(),
        "view": lambda: SampleRng(0, np.zeros(40_000, int), np.arange(40_000)).uniform(),
        "seed": lambda: torch.cat([draws(seed=seed).uniform() for seed in range(8_000)]),
        "draw": lambda: torch.cat([one.uniform() for _ in range(8_000)]),
    }
    values = made[along]().numpy()
    assert values.min() >= 0
    assert values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > SURE
    for distance in (1, 2, 16):
        pairs = np.histogram2d(values[:-distance], values[distance:], bins=12)[0]
        assert stats.chisquare(pairs.ravel()).pvalue > SURE


def test_streams_do_not_meet():
    """No 64-bit number repeats: along samples, views, seeds, draws and branches from 0 on."""
    found = []
    for seed in range(4):
        samples, views = (a.ravel() for a in np.meshgrid(np.arange(60), np.arange(30)))
        made = SampleRng(seed, samples, views)
        found += [made._keys, *(made._next() for _ in range(10))]
        branch = made.branch()
        found += [branch._keys, *(branch._next() for _ in range(10))]
    numbers = np.concatenate(found)
    # 160,000 random numbers would meet with a probability of 1e-9.
    assert len(np.unique(numbers)) == len(numbers)


def test_a_branch_takes_one_number_and_leaves_the_rest():
    one, other = draws(50), draws(50)
    one.branch().uniform()
    other.uniform()
    assert torch.equal(one.uniform(), other.uniform())


@pytest.mark.parametrize("high", [1, 3, 10, 1000])
def test_integers_are_equally_likely(high):
    values = draws(60_000).integers(high)
    assert values.dtype is torch.int64
    counts = torch.bincount(values, minlength=high)
    assert len(counts) == high
    assert high == 1 or stats.chisquare(counts.numpy()).pvalue > SURE


def test_integers_reach_up_to_2_to_the_31():
    values = draws(10_000).integers(2**31).double() / 2**31
    assert stats.kstest(values.numpy(), "uniform").pvalue > SURE


def test_normal_is_normal():
    values = draws(40_000).normal()
    assert values.dtype is torch.float32
    assert stats.kstest(values.numpy(), "norm").pvalue > SURE
    # The largest of 40,000 is beyond 3.5 but for a probability of 1e-4: the tails are there.
    assert 3.5 < values.abs().max() < 6


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_beta_is_beta(alpha):
    values = draws(40_000).beta(alpha).double().numpy()
    # Bins and no finer test: within 3e-8 of 1, which for 0.2 is 2 % of it, float32 rounds to 1.
    bins = stats.beta(alpha, alpha).ppf(np.linspace(0, 1, 21))
    assert stats.chisquare(np.histogram(values, bins)[0]).pvalue > SURE
    # The variance 1 / (4 (2 alpha + 1)); five standard errors of it are below 2 %.
    assert values.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.04)
