"""From the histogram of a tensor's magnitudes to the range that its 8 bits should cover."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

BINS = 2048
PERCENTILE = 99.999
"""What ONNX Runtime's percentile calibrator keeps."""

_STEP = 8  # candidates are 1/256 of the largest magnitude apart


class MagnitudeHistogram:
    """How often magnitudes occur between 0 and a limit known before, in 2,048 bins.

    As the limit is fixed, the counts do not depend on the batches or on their order.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.counts: npt.NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.zeros = 0

    def add(self, values: npt.NDArray[np.floating]) -> None:
        """Count finite values of any shape; those above the limit fall into the last bin."""
        if self.limit <= 0 or not values.size:
            return
        bins = np.abs(values).ravel()
        # Divided first: BINS / limit leaves float32 where the limit is next to nothing.
        bins /= self.limit
        bins *= BINS
        counted = np.bincount(np.minimum(bins.astype(np.int32), BINS - 1), minlength=BINS)
        self.counts += counted
        self.zeros += values.size - int(np.count_nonzero(values))

    def percentile(self, percent: float = PERCENTILE) -> float:
        """The magnitude below which ``percent`` of all values lie, to a bin's width."""
        total = int(self.counts.sum())
        if not total:
            return self.limit
        inside = np.cumsum(self.counts) >= percent / 100 * total
        return float((int(inside.argmax()) + 1) * self.limit / BINS)

    def entropy(self, levels: int) -> float:
        """The threshold whose ``levels`` equal steps lose least information.

        Least Kullback-Leibler divergence of the clipped distribution from its quantized one (S.
        Migacz, 8-bit inference with TensorRT, GTC 2017). Exact zeros are left out: every scheme
        here represents them exactly, and after a ReLU they would outweigh the rest.
        """
        counts = self.counts.astype(np.float64)
        counts[0] -= self.zeros
        if counts.sum() <= 0:
            return self.limit
        candidates = range(levels, BINS + 1, _STEP)
        divergence = [_divergence(counts, size, levels) for size in candidates]
        return candidates[int(np.argmin(divergence))] * self.limit / BINS


def _divergence(counts: npt.NDArray[np.float64], size: int, levels: int) -> float:
    inside = counts[:size]
    reference = inside.copy()
    reference[-1] += counts[size:].sum()
    present = inside > 0
    starts = np.arange(levels) * size // levels
    sums = np.add.reduceat(inside, starts)
    filled = np.add.reduceat(present.astype(np.float64), starts)
    share = np.divide(sums, filled, out=np.zeros_like(sums), where=filled > 0)
    quantized = np.where(present, np.repeat(share, np.diff(np.append(starts, size))), 0.0)
    if not quantized.any():
        return float("inf")
    p, q = reference / reference.sum(), quantized / quantized.sum()
    # Values that are clipped into an empty bin have no quantized counterpart: improbable, not
    # impossible, else one outlier would rule out every threshold below it.
    q = np.maximum(q, 1e-9)
    some = p > 0
    return float(np.sum(p[some] * np.log(p[some] / q[some])))
