"""What a user must be told about a quantized model although nothing failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LEAST_SQNR_DB = 10.0
"""Below it the error has more than a tenth of the signal's power."""
LEAST_AGREEMENT = 0.9
_NAMED = 5


def remarks_on_errors(errors: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which outputs have little in common with float32's.

    Args:
        errors: rows of :class:`edgekd.engines.compare.OutputError`, as JSON.
    """
    said = []
    for row in errors:
        faults = []
        if row["not_finite"]:
            faults.append(f"{row['not_finite']} of {row['samples']} samples are not finite")
        if row["sqnr_db"] is not None and row["sqnr_db"] < LEAST_SQNR_DB:
            faults.append(f"SQNR {row['sqnr_db']:.1f} dB, cosine {row['cosine']:.2f}")
        agreement = row["argmax_agreement"]
        if agreement is not None and agreement < LEAST_AGREEMENT:
            faults.append(f"the same class for {agreement:.1%} of the samples only")
        if faults:
            said.append(f"{row['name']}: {'; '.join(faults)}")
    if not said:
        return []
    return [f"the answers have little in common with float32's: {', '.join(said)}"]


def remarks_on_ranges(constant: Sequence[str]) -> list[str]:
    """Which activations did not vary while they were calibrated.

    Args:
        constant: their names.
    """
    if not constant:
        return []
    more = f" and {len(constant) - _NAMED} more" if len(constant) > _NAMED else ""
    return [
        f"these tensors have one value only on all calibration samples, so that their 8 bits cover "
        f"nothing else: {', '.join(constant[:_NAMED])}{more}; are the samples real inputs?"
    ]
