"""The decision about the nodes of a model: which compute in INT8, which in float32."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

_NAMED = 8  # nodes that a line for a person names


@dataclass(frozen=True)
class NodeSensitivity:
    """One node: how much it costs to quantize it, and what was decided.

    ``sensitivity`` is None where it was not needed, or is not finite. In a large model it is
    that of the node's group.
    """

    node: str
    op: str
    sensitivity: float | None
    kept: bool


@dataclass(frozen=True)
class Decision:
    """Which nodes stay in float32, and the measurements behind it.

    ``drop`` is measured on the very file that was written, ``drop_all`` with every node in INT8;
    None where a measured value is not finite. ``chosen`` is that file, None when not one node
    can be quantized within the budget: then nothing was written and ``drop`` is None too.
    ``quantized`` are the other nodes; a join (Add, Concat) among them computes in
    float all the same where all its neighbours do.

    ``measure`` is the unit of the sensitivities: ``noise`` = Σ(o − p)² / Σp², summed over the
    outputs' parts, with p float32's outputs and o those of a model with this node alone in INT8;
    ``drop`` = the metric's fall with it alone in INT8. For a node that is not quantized alone it
    is the change of either for the complete model when the node stays in float32. ``evaluations``
    counts the files whose drop was measured, ``ranked`` those that were run for ``noise``.
    """

    chosen: Path | None
    kept: tuple[str, ...]
    quantized: tuple[str, ...]
    drop: float | None
    drop_all: float | None
    budget: float
    measure: Literal["noise", "drop"] | None
    evaluations: int
    ranked: int
    rows: tuple[NodeSensitivity, ...]

    def to_json(self) -> dict[str, Any]:
        """A plain mapping for a JSON file; ``chosen`` is the file's name."""
        return {**asdict(self), "chosen": self.chosen.name if self.chosen else None}

    def keeping(self, nodes: Collection[str], chosen: Path, drop: float) -> Decision:
        """The same with more nodes in float32, for another reason than the drop, which
        :meth:`lines` leaves out.

        Args:
            nodes: their names.
            chosen: the file with them in float32.
            drop: measured on it.
        """
        return replace(
            self,
            chosen=chosen,
            kept=(*self.kept, *nodes),
            quantized=tuple(node for node in self.quantized if node not in nodes),
            drop=drop,
            evaluations=self.evaluations + 1,
            rows=tuple(replace(row, kept=True) if row.node in nodes else row for row in self.rows),
        )

    def lines(self) -> tuple[str, ...]:
        """The same in a few lines for a person."""
        total = len(self.rows)
        drop_all = "not finite" if self.drop_all is None else f"{self.drop_all:.4g}"
        if self.chosen is not None and not self.kept:
            said = f"all {total} quantizable nodes in INT8: drop {drop_all}"
            return (f"{said}, budget {self.budget:.4g}",)
        effort = f"found with {self.evaluations} evaluations"
        whole = f"all {total} quantizable nodes in INT8: drop {drop_all}, "
        whole += f"over the budget {self.budget:.4g}"
        if self.chosen is None:
            verdict = "no node can be in INT8 within the budget: the model stays in float32"
            return (whole, f"{verdict} ({effort})")
        kept = [row for row in self.rows if row.kept]
        kept.sort(key=lambda row: -math.inf if row.sensitivity is None else -row.sensitivity)
        names = ", ".join(f"{row.node} ({row.op})" for row in kept[:_NAMED])
        more = f" and {len(kept) - _NAMED} more" if len(kept) > _NAMED else ""
        return (
            whole,
            f"{len(kept)} of {total} stay in float32: drop {self.drop:.4g} ({effort})",
            f"in float32: {names}{more}",
        )
