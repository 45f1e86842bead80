"""Policy: an action vector, or a chunk of them, from observations."""

from __future__ import annotations

from typing import Literal

from edgekd.tasks.continuous import ContinuousTask


class Policy(ContinuousTask):
    """Actions (B, A), or a chunk (B, T, A), imitating recorded ones; see :class:`ContinuousTask`.

    Args:
        target: the name of the recorded actions; their mask is ``<target>_mask``.
        output: the name of the model's actions.
        loss: the hard loss. ``mae`` is less drawn to rare, large actions than ``mse``.
        metric: the mean absolute or the mean squared error.
        standardize: train in units of the targets' deviation, from their mean: ``auto`` where
            their range asks for it. What a network answers is always in the user's units.
    """

    name = "policy"

    def __init__(
        self,
        target: str = "action",
        output: str = "action",
        loss: Literal["mse", "mae", "huber"] = "mse",
        metric: Literal["mae", "mse"] = "mae",
        standardize: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__(target, output, loss, metric, standardize)
