"""What the axes of an input are: an image's, a signal's or a row of features.

The rule, where neither ``data.args: {layout: …}`` nor the source declares it:

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

from edgekd.data.dataset import Array
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


def _remark(name: str, array: Array, taken: str, others: str) -> str:
    shape = ", ".join(map(str, ("N", *array.shape[1:])))
    return f"{name} ({shape}) is read as {taken}; data.args: {{layout: {others}}} overrides this"


def _refuse_unclear(name: str, array: Array, where: str) -> None:
    first, second, last = array.shape[1:]
    unclear = last in (1, 3) or (last < first and (last <= 4 or first == second))
    if unclear:
        raise InputError(
            f"the images {name!r} of shape {array.shape} may be (N, H, W, C) or (N, C, H, W)",
            where=where,
            remedy="declare it under data: 'args: {layout: nhwc}' or 'args: {layout: nchw}'",
        )
