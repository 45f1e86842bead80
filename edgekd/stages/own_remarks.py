"""What a user must be told about a quantized model although nothing failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LEAST_SQNR_DB = 10.0
"""Below it the error has more than a tenth of the signal's power."""
LEAST_AGREEMENT = 0.9
_NAMED = 5


def remarks_on_errors(errors: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which outputs, and which parts of them, have little in common with float32's.

    Args:
        errors: rows of :class:`edgekd.engines.compare.OutputError`, as JSON.
    """
    said = []
    for row in errors:
        parts = row["parts"]
        # Where there are parts, the whole says nothing that they do not.
        faults = [] if parts else _faults_of_classes(row)
        if row["not_finite"] and parts:
            faults.append(f"{row['not_finite']} of {row['samples']} samples are not finite")
        if faults:
            said.append(f"{row['name']}: {'; '.join(faults)}")
        for part in parts:
            if faults := _faults_of_part(part, row["cosine"] if len(parts) == 1 else None):
                name = f"{row['name']} ({part['part']})" if part["part"] else row["name"]
                said.append(f"{name}: {'; '.join(faults)}")
    if not said:
        return []
    return [f"the answers have little in common with float32's: {', '.join(said)}"]


def _faults_of_classes(row: Mapping[str, Any]) -> list[str]:
    faults = []
    if row["not_finite"]:
        faults.append(f"{row['not_finite']} of {row['samples']} samples are not finite")
    if row["sqnr_db"] is not None and row["sqnr_db"] < LEAST_SQNR_DB:
        faults.append(f"SQNR {row['sqnr_db']:.1f} dB, cosine {row['cosine']:.2f}")
    agreement = row["argmax_agreement"]
    if agreement is not None and agreement < LEAST_AGREEMENT:
        faults.append(f"the same class for {agreement:.1%} of the samples only")
    return faults


def _faults_of_part(part: Mapping[str, Any], cosine: float | None) -> list[str]:
    faults = []
    relative, agreement = part["relative"], part["agreement"]
    if relative is not None and relative > 10 ** (-LEAST_SQNR_DB / 20):
        sqnr = "" if part["sqnr_db"] is None else f"SQNR {part['sqnr_db']:.1f} dB"
        faults.append(sqnr + ("" if cosine is None else f", cosine {cosine:.2f}"))
    if part["one_value"]:
        faults.append("one value only on all samples, where float32's vary")
    if agreement is not None and agreement < LEAST_AGREEMENT:
        what = "values" if part["kind"] == "decisions" else "scores above the threshold"
        faults.append(f"{agreement:.1%} of {part['decided']:,} {what} are the same")
    return faults


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
