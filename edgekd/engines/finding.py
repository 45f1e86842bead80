"""What a check of a model says about one thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "fails", "not shown", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at: ``fails`` and ``not shown`` keep the model from passing.

    ``note`` is for the reader, and for what nobody asked for. ``nodes`` are those concerned.
    """

    subject: str
    status: Status
    detail: str
    remedy: str = ""
    nodes: tuple[str, ...] = ()
