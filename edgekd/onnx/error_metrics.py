"""Error metrics: sums over any number of batches, cosines, and the error of a part of an output."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekd.onnx.output_parts import Part
from edgekd.onnx.samples import Array

SCORE_THRESHOLD = 0.25
"""A score above it is a detection; the threshold that detectors are exported and shipped with."""
SCORE_FLOOR = 0.01
"""Root mean square that scores have at least when an error is divided by it: their scale is that
of [0, 1], also without any score above it."""
_TINY = 1e-30
"""A root mean square below it is that of zeros."""
_VARIES = 1e-3  # of the largest value; 8 bits cannot show smaller differences


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


@dataclass(frozen=True)
class PartError:
    """A part of an output of a candidate against the reference's, over all samples.

    With p the reference's and o the candidate's values of the part in sample i:

    - ``relative``: √(Σ(o − p)² / Σp²) over all samples; the divisor of ``scores`` is that of
      :data:`SCORE_FLOOR` at least. None for decisions, where not finite, and where every p is 0:
      errors are then absolute.
    - ``losses``, (N,): of each sample √Σ(o − p)² over the root mean square over samples of
      √Σp², so that a sample of zeros is divided by the size of the others; where every p is 0
      √mean (o − p)². A sample that is not finite on one side only has 1 at least. For decisions
      the share of values that differ.
    - ``agreement``: of ``decided`` decisions. Scores: of the values above
      :data:`SCORE_THRESHOLD` in either model, the share of those above it in both; None without
      any. Decisions: the share of equal ones.
    - ``one_value``: o is one number in all samples, and p varies.
    - ``drop``: the larger one of the mean of ``losses`` and 1 − ``agreement``.
    """

    output: str
    part: str
    kind: str
    size: int
    max_absolute: float | None
    rmse: float | None
    sqnr_db: float | None
    relative: float | None
    agreement: float | None
    decided: int
    one_value: bool
    drop: float
    by_decision: bool
    """Whether ``drop`` is that of the decisions."""
    losses: Array

    @property
    def label(self) -> str:
        """The output with the part, for a person."""
        return f"{self.output}: {self.part}" if self.part else self.output

    def to_json(self) -> dict[str, Any]:
        """A plain mapping for a JSON file, without the single samples."""
        return {k: v for k, v in vars(self).items() if k != "losses"}


class PartSums:
    """:class:`PartError` over any number of batches; one number per sample is stored."""

    def __init__(self, output: str, part: Part) -> None:
        self._output, self._part = output, part
        self._sums = ErrorSums()
        self._errors: list[Array] = []
        self._broken: list[Array] = []
        self._size = self._both = self._either = 0
        self._span = [math.inf, -math.inf, math.inf, -math.inf]

    def add(self, reference: Array, candidate: Array) -> None:
        """Take (n, values) of both, all values of the output's samples.

        Sets of varying size are compared as one part.
        """
        p, o = reference, candidate
        positions = self._part.positions
        if positions is not None and positions[-1] < p.shape[1]:
            p, o = p[:, positions], o[:, positions]
        self._size = p.shape[1]
        fine, errors = self._sums.add(p, o)
        self._broken.append(~fine)
        if self._part.kind == "decisions":
            counted = ((p != 0) | (o != 0)) if self._part.sets else np.ones(p.shape, bool)
            same, of = ((p == o) & counted).sum(axis=1), counted.sum(axis=1)
            self._both += int(same.sum())
            self._either += int(of.sum())
            self._errors.append(np.where(of == 0, 0.0, 1 - same / np.maximum(of, 1)))
            return
        self._errors.append(errors / max(p.shape[1], 1))
        for index, values in ((0, p), (2, o)):
            finite = values[np.isfinite(values)]
            if finite.size:
                self._span[index] = min(self._span[index], float(finite.min()))
                self._span[index + 1] = max(self._span[index + 1], float(finite.max()))
        if self._part.kind == "scores":
            over, other = p > SCORE_THRESHOLD, o > SCORE_THRESHOLD
            self._both += int((over & other).sum())
            self._either += int((over | other).sum())

    def row(self) -> PartError:
        """The error so far."""
        sums, part = self._sums, self._part
        finite = not sums.not_finite
        losses = np.concatenate(self._errors) if self._errors else np.zeros(0)
        broken = np.concatenate(self._broken) if self._broken else np.zeros(0, bool)
        relative = None
        if part.kind != "decisions":
            mean_square = sums.signal / max(sums.values, 1)
            floor = SCORE_FLOOR if part.kind == "scores" else 0.0
            scale = max(math.sqrt(mean_square), floor)
            if scale > _TINY:
                losses = np.sqrt(losses) / scale
                relative = math.sqrt(sums.error / max(sums.values, 1)) / scale if finite else None
            else:
                losses = np.sqrt(losses)
            losses = np.where(broken, np.maximum(losses, 1.0), losses)
        agreement = self._both / self._either if self._either else None
        mean = float(losses.mean()) if len(losses) else 0.0
        lost = 0.0 if agreement is None else 1 - agreement
        return PartError(
            output=self._output,
            part=part.name,
            kind=part.kind,
            size=self._size,
            max_absolute=sums.largest if finite else None,
            rmse=sums.rmse,
            sqnr_db=None if part.kind == "decisions" else sums.sqnr_db,
            relative=relative,
            agreement=agreement,
            decided=self._either,
            one_value=self._is_one_value(),
            drop=max(mean, lost),
            by_decision=part.kind == "decisions" or lost > mean,
            losses=losses,
        )

    def _is_one_value(self) -> bool:
        low, high, least, most = self._span
        varies = high - low > _VARIES * max(abs(low), abs(high))
        return varies and least == most and math.isfinite(least)
