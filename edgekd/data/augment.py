"""Augmentations: pure functions ``(images, draws, **arguments) -> images`` of a batch.

They see raw images (N, C, H, W) before normalisation, uint8 where the source is, so that what
is shifted in or erased is the image's own zero. They run as batches: no loop over images. What
becomes of an image depends bit-exactly on the image and its draws only: nothing here sums
over a batch, or leaves the order of a sum to the batch's size. The draws are those of a
:class:`SampleRng`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from edgekd.errors import InputError

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


_LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey: ITU-R BT.601."""


def flip(images: Tensor, draws: SampleRng, p: float = 0.5) -> Tensor:
    """Mirror each image left to right with probability ``p``."""
    check_within("p", p, 0, 1)
    chosen = (draws.uniform() < p).nonzero()[:, 0]
    return images.index_copy(0, chosen, images[chosen].flip(-1))


def shift(images: Tensor, draws: SampleRng, pixels: int = 2) -> Tensor:
    """Shift each image by up to ``pixels`` up or down and left or right; zeros move in."""
    check_within("pixels", pixels, 0, min(images.shape[-2:]) - 1)
    if pixels == 0:
        return images
    count, _, height, width = images.shape
    padded = functional.pad(images, (pixels,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    down, right = (draws.integers(2 * pixels + 1) for _ in range(2))
    return windows[torch.arange(count), :, down, right]


def erase(images: Tensor, draws: SampleRng, p: float = 0.5, size: float = 0.3) -> Tensor:
    """Set a rectangle to zero with probability ``p``: Cutout, DeVries and Taylor (2017).

    Its sides are ``size`` times the image's; its place is uniform, wholly inside the image.
    """
    check_within("p", p, 0, 1)
    check_within("size", size, 0, 1)
    height, width = images.shape[-2:]
    chosen = (draws.uniform() < p).nonzero()
    rows = _run(height, size, draws)[chosen]
    columns = _run(width, size, draws)[chosen]
    result = images.clone()
    result[chosen[:, :, None], :, rows.transpose(1, 2), columns] = 0
    return result


def crop(
    images: Tensor,
    draws: SampleRng,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Cut out a part of each image and enlarge it to the full size: Szegedy et al. (2015), section
    6.

    Bilinear; uint8 is rounded. Szegedy et al. take a ``scale`` of 0.08 to 1.

    Args:
        images: (N, C, H, W).
        draws: the random numbers of the same N samples.
        scale: range of the part's area relative to the image's, uniform.
        ratio: range of the part's width over its height, both relative to the image's; uniform
            in its logarithm. A side that would be longer than the image's is as long as it.
    """
    low, high = _bounds("scale", scale, 0.01, 1)
    narrow, wide = np.log(_bounds("ratio", ratio, 0.1, 10))
    area = low + (high - low) * draws.uniform().numpy().astype(np.float64)
    # numpy's exp: torch's rounds the last few values of a batch differently.
    shape = np.exp(narrow + (wide - narrow) * draws.uniform().numpy().astype(np.float64))
    height, width = (
        torch.from_numpy(np.minimum(1, np.sqrt(side)).astype(np.float32))
        for side in (area / shape, area * shape)
    )
    rows = _positions(height, images.shape[2], draws)[:, :, None]
    columns = _positions(width, images.shape[3], draws)[:, None, :]
    plane = (len(images), *images.shape[2:])
    grid = torch.stack([columns.expand(plane), rows.expand(plane)], -1)
    part = functional.grid_sample(
        images.to(torch.float32), grid, padding_mode="border", align_corners=False
    )
    return restored(part, images.dtype)


def colour(
    images: Tensor,
    draws: SampleRng,
    brightness: float = 0.2,
    contrast: float = 0.2,
    saturation: float = 0.2,
) -> Tensor:
    """Change brightness, then contrast, then the saturation of images of three channels.

    Each by a factor uniform in 1 ± its argument: brightness multiplies the image; contrast
    the distance from the image's mean grey; saturation the distance from each pixel's grey. uint8
    is rounded and clipped to 0…255, floats are not clipped: their range is the user's.
    """
    for name, value in (
        ("brightness", brightness), ("contrast", contrast), ("saturation", saturation),
    ):  # fmt: skip
        check_within(name, value, 0, 1)
    brighter, steeper = (_factor(amount, draws) for amount in (brightness, contrast))
    values = images.to(torch.float32).contiguous()
    # numpy sums each row of its last axis by itself; torch may split it as the batch is large.
    means = torch.from_numpy(values.flatten(2).numpy().mean(-1))[:, :, None, None]
    values = values * (brighter * steeper) + _grey(means) * (brighter * (1 - steeper))
    if images.shape[1] == 3:
        grey = _grey(values)
        values = grey + (values - grey) * _factor(saturation, draws)
    return restored(values, images.dtype)


AUGMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "flip": flip,
    "shift": shift,
    "erase": erase,
    "crop": crop,
    "colour": colour,
}


def restored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float images converted back to their dtype: uint8 is rounded and clipped to 0…255."""
    return values.round().clamp(0, 255).to(dtype) if dtype == torch.uint8 else values.to(dtype)


def check_within(name: str, value: float, low: float, high: float) -> None:
    """Raise InputError unless an argument is from ``low`` to ``high``."""
    if not low <= value <= high:
        raise InputError(
            f"{name} is {value!r}", where="data.augment", remedy=f"give {low:g} to {high:g}"
        )


def _bounds(name: str, value: tuple[float, float], low: float, high: float) -> tuple[float, float]:
    """Two numbers in order, each from ``low`` to ``high``."""
    for number in value:
        check_within(name, number, low, high)
    if value[0] > value[1]:
        raise InputError(
            f"{name} is {value!r}, from more to less",
            where="data.augment",
            remedy="give the smaller number first",
        )
    return value


def _run(length: int, size: float, draws: SampleRng) -> Tensor:
    """(N, run): neighbouring places, as many as ``size * length``, inside 0…length - 1."""
    run = round(size * length)
    return draws.integers(length - run + 1)[:, None] + torch.arange(run)


def _positions(part: Tensor, length: int, draws: SampleRng) -> Tensor:
    """(N, length): where the pixels of a part (N,) lie, from -1 to 1 over the full image.

    ``part`` is its length relative to the image's; its place is drawn.
    """
    start = draws.uniform() * (1 - part)
    centres = (torch.arange(length) + 0.5) / length
    return (start[:, None] + part[:, None] * centres) * 2 - 1


def _factor(amount: float, draws: SampleRng) -> Tensor:
    """(N, 1, 1, 1), uniform in 1 ± ``amount``."""
    return (1 + amount * (2 * draws.uniform() - 1))[:, None, None, None]


def _grey(values: Tensor) -> Tensor:
    """(N, 1, H, W) of (N, C, H, W): luma of three channels, else the mean."""
    channels = values.shape[1]
    weights = _LUMA if channels == 3 else (1 / channels,) * channels
    grey = values[:, :1] * weights[0]
    for channel in range(1, channels):
        grey = grey + values[:, channel : channel + 1] * weights[channel]
    return grey
