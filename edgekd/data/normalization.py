"""Normalisation constants, computed from the training split only."""

from __future__ import annotations

import numpy as np

from edgekd.data.dataset import Array, Preprocess, chunks, is_image
from edgekd.data.layout import Layout

CONSTANT_RELATIVE_STD = 1e-6
"""A float32 feature that varies less than this, relative to its mean, varies by rounding only."""


def fit_preprocess(
    array: Array, scale: float, normalize: bool, layout: Layout | None = None
) -> Preprocess | None:
    """The preprocessing of one input, from its training samples.

    Args:
        array: (N, …) raw training samples.
        scale: the factor that brings uint8 images to [0, 1].
        normalize: False leaves floats unchanged and only scales uint8 images.
        layout: what the axes are: a signal's channels are axis 1 of "nct" and the last of "ntc",
            and "nt" is one channel.

    Returns:
        None for integers that are neither image nor signal: they are indices, not quantities.
        Otherwise the mean and standard deviation (of the population) of each channel of images
        (N, C, H, W) and signals, or of each feature on the last axis, after scaling; a constant
        one gets the divisor 1.
    """
    if array.dtype == np.uint8 and is_image(array):
        return _fit_uint8_images(array, scale) if normalize else Preprocess(scale=scale)
    if layout is None and not np.issubdtype(array.dtype, np.floating):
        return None
    return _fit_quantities(array, layout) if normalize else Preprocess()


def _fit_uint8_images(array: Array, scale: float) -> Preprocess:
    # A histogram per channel is exact, for any number of pixels.
    histogram = np.zeros((array.shape[1], 256), np.int64)
    for _, piece in chunks(array):
        for channel in range(array.shape[1]):
            histogram[channel] += np.bincount(piece[:, channel].ravel(), minlength=256)
    values = np.arange(256) * scale
    weights = histogram / histogram.sum(axis=1, keepdims=True)
    mean = weights @ values
    variance = (weights * (values - mean[:, None]) ** 2).sum(axis=1)
    return _preprocess(scale, mean, variance)


def _fit_quantities(array: Array, layout: Layout | None) -> Preprocess:
    channels = 1 if is_image(array) or layout == "nct" else array.ndim - 1
    kept = set() if layout == "nt" or array.ndim == 1 else {channels}
    axes = tuple(axis for axis in range(array.ndim) if axis not in kept)
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
    axis = channels if layout == "nct" else None
    return _preprocess(1.0, np.atleast_1d(mean), np.atleast_1d(squares / count), axis)


def _preprocess(scale: float, mean: Array, variance: Array, axis: int | None = None) -> Preprocess:
    std = np.sqrt(variance)
    constant = std <= CONSTANT_RELATIVE_STD * np.abs(mean)
    std = np.where(constant, 1.0, std)
    return Preprocess(scale, tuple(map(float, mean)), tuple(map(float, std)), axis)
