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
    """

    name = "regression"

    def __init__(
        self,
        target: str = "target",
        output: str = "prediction",
        loss: Literal["mse", "mae", "huber"] = "mse",
        metric: Literal["mae", "mse"] = "mae",
    ) -> None:
        super().__init__(target, output, loss, metric)
