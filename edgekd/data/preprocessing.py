"""How an input is read: the layout of its axes, and its normalization constants.

The layout, where neither ``data.args: {layout: …}`` nor the source declares it:

* four axes: an image (N, C, H, W); where it may be (N, H, W, C), an error asks for it.
* three axes, uint8, named ``image``, ``images`` or ``x``; or named ``image`` or ``images``; or
  floats named ``x`` of as many rows as columns: grey images (N, H, W).
* any other three axes of floats, of 8 or 16 bit signed integers, or named ``x``: a signal, whose
  channels are the shorter axis, (N, C, T) or (N, T, C).
* two axes: features (N, F); a signal (N, T) of one channel when they are 8 or 16 bit signed
  integers, or floats under a name such as ``audio`` or ``waveform``.
* all other integers are indices, such as tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np

from edgekd.data.dataset import Array, Preprocess, chunks, is_image
from edgekd.errors import InputError

Layout = Literal["nchw", "nhwc", "nhw", "nct", "ntc", "nt", "nf"]

IMAGE_NAMES = ("image", "images", "x")
_SIGNAL_NAMES = (
    "audio", "ecg", "eeg", "emg", "imu", "pcm", "ppg", "sensor", "sensors",
    "series", "signal", "signals", "sound", "timeseries", "wave", "waveform", "waveforms",
)  # fmt: skip
_MANY_FEATURES = 128
"""Row length from which a row may also be a signal, so that the choice is reported."""


def layouts_given(value: Any, ranks: Mapping[str, int]) -> dict[str, Layout]:
    """The layouts of ``data.args: {layout: …}``, by input.

    Args:
        value: None, one layout for all inputs with as many axes, or a mapping by input name.
        ranks: how many axes each input has.

    Raises:
        InputError: a layout is unknown, or fits no input.
    """
    known = get_args(Layout)
    if value is None:
        return {}
    by_name = value if isinstance(value, Mapping) else dict.fromkeys(ranks, value)
    given: dict[str, Layout] = {}
    for name, layout in by_name.items():
        if name not in ranks or layout not in known:
            raise InputError(
                f"layout is {layout!r}" if name in ranks else
                f"layout names {name!r}, which is no input: {', '.join(ranks)}",
                where="data.args",
                remedy="write layout: nchw or nhwc for images, nhw for grey ones, nct or ntc for "
                "signals (channels, time), nt for one channel, nf for features; or a mapping by "
                "input name",
            )  # fmt: skip
        if ranks[name] == len(layout):
            given[name] = layout
    unfit = [name for name in by_name if name not in given]
    if unfit and (isinstance(value, Mapping) or not given):
        raise InputError(
            f"layout {by_name[unfit[0]]} has {len(by_name[unfit[0]])} axes, and the input "
            f"{unfit[0]!r} has {ranks[unfit[0]]}",
            where="data.args",
            remedy="remove it, or write the layout of these axes (N counts as one)",
        )
    return given


def layout_of(name: str, array: Array, where: str) -> tuple[Layout | None, str | None]:
    """The axes of an input by the rule above, and a remark on the choice.

    Args:
        name: as the source calls it.
        array: (N, …), of one split.
        where: the file or function, for errors.

    Returns:
        The layout, None for integers that are indices and for other ranks; and a remark where
        another reading makes sense too.

    Raises:
        InputError: the channel axis of images is ambiguous.
    """
    short = name.lower()
    kind, size = array.dtype.kind, array.dtype.itemsize
    small = kind == "i" and size <= 2
    if array.ndim == 4:
        _refuse_unclear(name, array, where)
        return "nchw", None
    if array.ndim == 3:
        rows, columns = array.shape[1:]
        if short in ("image", "images") or (short == "x" and array.dtype in (np.uint8, bool)):
            return "nhw", None
        if not (kind == "f" or small or (short == "x" and kind in "iu")):
            return None, None
        if short == "x" and kind == "f" and rows == columns:
            return "nhw", _remark(name, array, f"grey images {rows}x{columns}", "nct or ntc")
        if rows <= columns:
            return "nct", _remark(name, array, _signal(rows, columns), "ntc or nhw")
        return "ntc", _remark(name, array, _signal(columns, rows), "nct or nhw")
    if array.ndim == 2 and (kind == "f" or small):
        steps = array.shape[1]
        if small or short in _SIGNAL_NAMES:
            return "nt", _remark(name, array, _signal(1, steps), "nf")
        if steps >= _MANY_FEATURES:
            return "nf", _remark(name, array, f"{steps} features", "nt")
        return "nf", None
    return None, None


def _signal(channels: int, steps: int) -> str:
    return (
        f"a signal of {channels} channel{'' if channels == 1 else 's'} (each normalized over "
        f"samples and time) and {steps} time steps"
    )


def _remark(name: str, array: Array, reading: str, others: str) -> str:
    shape = ", ".join(map(str, ("N", *array.shape[1:])))
    return f"{name} ({shape}) is read as {reading}; data.args: {{layout: {others}}} overrides this"


def _refuse_unclear(name: str, array: Array, where: str) -> None:
    first, second, last = array.shape[1:]
    unclear = last in (1, 3) or (last < first and (last <= 4 or first == second))
    if unclear:
        raise InputError(
            f"the images {name!r} of shape {array.shape} may be (N, H, W, C) or (N, C, H, W)",
            where=where,
            remedy="declare it under data: 'args: {layout: nhwc}' or 'args: {layout: nchw}'",
        )


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
    separate = set() if layout == "nt" or array.ndim == 1 else {channels}
    axes = tuple(axis for axis in range(array.ndim) if axis not in separate)
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
