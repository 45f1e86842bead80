"""Random numbers per sample, independent of the batch, so that they are reproducible."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MASK = 2**64 - 1
# Odd constants: the golden ratio and fractional bits of √2, √3 and √5. Each level has its own, so
# that draw n of one view is never the key of view n.
_DRAW = np.uint64(0x9E3779B97F4A7C15)
_SAMPLE = np.uint64(0x6A09E667F3BCC909)
_VIEW = np.uint64(0xBB67AE8584CAA73B)
_BRANCH = np.uint64(0x3C6EF372FE94F82B)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_12, _27, _30, _31, _32, _40 = map(np.uint64, (12, 27, 30, 31, 32, 40))


class SampleRng:
    """Random numbers of a batch of augmented samples.

    Each call returns every sample's next number. The number depends on the seed, the sample, the
    view and how many were drawn before, never on the batch that the sample is in nor on torch's
    or numpy's generators. Counter-based (Salmon et al., 2011): number n is a hash of a key and
    n, with the mixing function of SplitMix64 (Steele, Lea and Flood, 2014).

    Args:
        seed: of all samples.
        samples: (B,) rows of the split, from 0.
        views: (B,) which augmentation of each sample this is, from 0.
    """

    def __init__(self, seed: int, samples: NDArray[np.int64], views: NDArray[np.int64]) -> None:
        start = np.array([(seed * int(_DRAW) + int(_BRANCH)) & _MASK], np.uint64)
        keys = _mixed(start) + samples.astype(np.uint64) * _SAMPLE
        self._keys = _mixed(_mixed(keys) + views.astype(np.uint64) * _VIEW)
        self._drawn = 0

    def __len__(self) -> int:
        """B, the number of samples that numbers are drawn for."""
        return len(self._keys)

    def uniform(self) -> Tensor:
        """(B,) float32 in [0, 1): multiples of 2⁻²⁴."""
        # Via int32, for which there is a fast conversion; 24 bits are exact in float32.
        bits = (self._next() >> _40).astype(np.int32)
        return torch.from_numpy(bits.astype(np.float32) * np.float32(2**-24))

    def integers(self, high: int) -> Tensor:
        """(B,) int64 in [0, high), for a ``high`` up to 2³¹.

        Lemire (2019) without the rejection: no integer's probability is off by more than 2⁻³².
        """
        bits = self._next() >> _32
        return torch.from_numpy(((bits * np.uint64(high)) >> _32).astype(np.int64))

    def normal(self) -> Tensor:
        """(B,) float32 of mean 0 and standard deviation 1."""
        from scipy.special import ndtri

        return torch.from_numpy(ndtri(self._fine()).astype(np.float32))

    def beta(self, alpha: float) -> Tensor:
        """(B,) float32 in [0, 1] of the distribution Beta(alpha, alpha)."""
        from scipy.special import betaincinv

        return torch.from_numpy(betaincinv(alpha, alpha, self._fine()).astype(np.float32))

    def branch(self) -> SampleRng:
        """Independent numbers for the same samples; consumes one number of this stream."""
        keys = _mixed(self._next() + _BRANCH)
        branched = object.__new__(SampleRng)
        branched._keys, branched._drawn = keys, 0
        return branched

    def _next(self) -> NDArray[np.uint64]:
        """(B,) 64 random bits each."""
        self._drawn += 1
        return _mixed(self._keys + np.uint64(self._drawn * int(_DRAW) & _MASK))

    def _fine(self) -> NDArray[np.float64]:
        """(B,) uniform in (0, 1), neither end included: an inverse CDF is finite there."""
        # 52 bits, so that half a step more is still exact.
        bits: NDArray[np.float64] = (self._next() >> _12).astype(np.float64)
        return (bits + 0.5) * 2.0**-52


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A permutation of the 64-bit integers that looks random; ``values`` are overwritten."""
    values ^= values >> _30
    values *= _FIRST
    values ^= values >> _27
    values *= _SECOND
    values ^= values >> _31
    return values
