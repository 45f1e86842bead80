"""Error metrics: sums over any number of batches, and cosines."""

from __future__ import annotations

import math
import zlib

import numpy as np

from edgekd.onnx.samples import Array


class ErrorSums:
    """Sums of error and signal over any number of batches, in constant memory.

    Equal infinities and NaN on both sides are no error and no signal.
    """

    def __init__(self) -> None:
        self.values = 0
        self.error = 0.0
        """Σ (o − p)² over all values that are finite on both sides."""
        self.signal = 0.0
        """Σ p² over the same."""
        self.largest = 0.0
        self.not_finite = 0
        """Rows with a value that is not finite on one side only."""

    def add(self, reference: Array, candidate: Array) -> tuple[Array, Array]:
        """Take (n, values) of both.

        Returns:
            (n,) whether a row is finite wherever the other is, and (n,) its Σ (o − p)².
        """
        p, o = reference.astype(np.float64), candidate.astype(np.float64)
        known = np.isfinite(p) & np.isfinite(o)
        fine: Array = (known | (p == o) | (np.isnan(p) & np.isnan(o))).all(axis=1)
        if not known.all():
            p, o = np.where(known, p, 0.0), np.where(known, o, 0.0)
        self.values += reference.size
        self.signal += float(np.vdot(p, p))
        o -= p
        errors: Array = np.einsum("ij,ij->i", o, o)
        self.error += float(errors.sum())
        self.largest = max(self.largest, float(np.abs(o).max(initial=0.0)))
        self.not_finite += int((~fine).sum())
        return fine, errors

    @property
    def rmse(self) -> float | None:
        """√mean (o − p)²; None when not finite."""
        return None if self.not_finite else math.sqrt(self.error / max(self.values, 1))

    @property
    def relative(self) -> float | None:
        """√(Σ(o − p)² / Σp²); None when not finite, or when there is error without signal."""
        if self.not_finite or (self.error and not self.signal):
            return None
        return math.sqrt(self.error / self.signal) if self.error else 0.0

    @property
    def sqnr_db(self) -> float | None:
        """10·log₁₀(Σp² / Σ(o − p)²); None when not finite, without error, or without signal."""
        if self.not_finite or not self.error or not self.signal:
            return None
        return 10 * math.log10(self.signal / self.error)


def not_finite_places(values: Array) -> Array:
    """(n,) int64 of (n, values): 0 where a row is finite; equal for rows with the same NaN and
    infinite values at the same places, as :meth:`ErrorSums.add` compares them."""
    places = np.zeros(len(values), np.int64)
    if values.dtype.kind != "f":
        return places
    for row in np.flatnonzero(~np.isfinite(values).all(axis=1)):
        kinds = np.select([np.isnan(values[row]), np.isinf(values[row])], [2, np.sign(values[row])])
        places[row] = 1 + zlib.crc32(kinds.astype(np.int8).tobytes())
    return places


def cosines(p: Array, o: Array) -> Array:
    """(n,) of the rows' cosines, from (n, values) of both, over what is finite on both sides."""
    known = np.isfinite(p) & np.isfinite(o)
    p, o = _unit(np.where(known, p, 0.0)), _unit(np.where(known, o, 0.0))
    both_zero = ~p.any(axis=1) & ~o.any(axis=1)
    products = np.clip(np.einsum("ij,ij->i", p, o), -1.0, 1.0)
    result: Array = np.where(both_zero, 1.0, products)
    return result


def _unit(rows: Array) -> Array:
    """Each row divided by its length; rows of zeros are unchanged."""
    # By the largest first, so that squares of very small or large values do not overflow float64.
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0.0)
    rows = rows / np.where(largest > 0, largest, 1.0)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    result: Array = rows / np.where(length > 0, length, 1.0)
    return result
