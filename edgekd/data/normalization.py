"""Normalisation constants, computed from the training split only."""

from __future__ import annotations

import numpy as np

from edgekd.data.dataset import Array, Preprocess, is_image
from edgekd.data.memory import chunks

CONSTANT_RELATIVE_STD = 1e-6
"""A float32 feature that varies less than this, relative to its mean, varies by rounding only."""


def fit_preprocess(array: Array, scale: float, normalize: bool) -> Preprocess | None:
    """The preprocessing of one input, from its training samples.

    Args:
        array: (N, …) raw training samples.
        scale: the factor that brings uint8 images to [0, 1].
        normalize: False leaves floats alone and only scales uint8 images.

    Returns:
        None for integers that are no image: they are indices, not quantities. Otherwise the
        mean and standard deviation (of the population) of each channel of images (N, C, H, W),
        or of each feature on the last axis, after scaling; a constant one gets the divisor 1.
    """
    if array.dtype == np.uint8 and is_image(array):
        return _fit_uint8_images(array, scale) if normalize else Preprocess(scale=scale)
    if not np.issubdtype(array.dtype, np.floating):
        return None
    return _fit_floats(array) if normalize else Preprocess()


def _fit_uint8_images(array: Array, scale: float) -> Preprocess:
    # A histogram per channel is exact, whatever the number of pixels.
    histogram = np.zeros((array.shape[1], 256), np.int64)
    for _, piece in chunks(array):
        for channel in range(array.shape[1]):
            histogram[channel] += np.bincount(piece[:, channel].ravel(), minlength=256)
    values = np.arange(256) * scale
    weights = histogram / histogram.sum(axis=1, keepdims=True)
    mean = weights @ values
    variance = (weights * (values - mean[:, None]) ** 2).sum(axis=1)
    return _preprocess(scale, mean, variance)


def _fit_floats(array: Array) -> Preprocess:
    axes = (0, 2, 3) if is_image(array) else tuple(range(max(1, array.ndim - 1)))
    count, mean, squares = 0, np.zeros(()), np.zeros(())
    for _, piece in chunks(array):
        values = piece.astype(np.float64)
        piece_mean = values.mean(axis=axes, keepdims=True)
        n = values.size // piece_mean.size
        piece_squares = ((values - piece_mean) ** 2).sum(axis=axes)
        # Chan, Golub and LeVeque (1979): merging the moments of two samples without cancellation.
        delta = piece_mean.reshape(piece_squares.shape) - mean
        squares = squares + piece_squares + delta**2 * count * n / (count + n)
        mean = mean + delta * n / (count + n)
        count += n
    return _preprocess(1.0, np.atleast_1d(mean), np.atleast_1d(squares / count))


def _preprocess(scale: float, mean: Array, variance: Array) -> Preprocess:
    std = np.sqrt(variance)
    constant = std <= CONSTANT_RELATIVE_STD * np.abs(mean)
    std = np.where(constant, 1.0, std)
    return Preprocess(scale, tuple(map(float, mean)), tuple(map(float, std)))
