"""Regression: continuous numbers from named inputs."""

from __future__ import annotations

from typing import Literal

from edgekd.tasks.continuous import ContinuousTask


class Regression(ContinuousTask):
    """A prediction (B, ...) against a target of the same shape; see :class:`ContinuousTask`.

    Args:
        target: the name of the target array.
        output: the name of the model's prediction.
        loss: the hard loss.
        metric: the mean absolute or the mean squared error.
        standardize: train in units of the targets' deviation, from their mean: ``auto`` where
            their range asks for it. What a network answers is always in the user's units.
    """

    name = "regression"

    def __init__(
        self,
        target: str = "target",
        output: str = "prediction",
        loss: Literal["mse", "mae", "huber"] = "mse",
        metric: Literal["mae", "mse"] = "mae",
        standardize: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__(target, output, loss, metric, standardize)
