"""Regression and policies: continuous targets, masked, per step of an action chunk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgekd.errors import InputError
from edgekd.spec import TensorSpec
from edgekd.tasks.task import (
    Arrays,
    DatasetLike,
    check_finite,
    check_inputs,
    check_outputs_finite,
    required,
    target_arrays,
)

if TYPE_CHECKING:
    from torch import Tensor

_NARROWEST, _WIDEST = 0.1, 3.0
"""Range of target deviations and means that needs no scaling of a network's outputs."""


class ContinuousTask:
    """Continuous outputs against targets of the same shape; the metric is the mean absolute error
    (``mae``) or the mean squared one (``mse``).

    Where the data have ``<target>_mask``, elements with a zero there (the padding at the end of
    an action chunk) count neither in the loss nor in the metric. A mask has the target's shape
    or that of its leading dimensions.

    Args:
        target: the name of the target array; its mask is ``<target>_mask``.
        output: the name of the model's output.
        loss: the hard loss. ``mae`` is less drawn to rare, large values than ``mse``.
        metric: the mean absolute or the mean squared error.
        standardize: train in units of the targets' deviation, from their mean: ``auto`` where
            their range requires it. A network's outputs are always in the user's units.
    """

    name: str
    default_target = "target"
    default_output = "prediction"
    metric = "mae"
    higher_is_better = False
    unit = 1.0
    """The divisor of outputs and targets in every loss; see :meth:`fit_unit`."""
    offset: np.ndarray[Any, Any] | None = None
    """The mean of the training targets, in the shape of one; None: outputs are not scaled."""

    def __init__(
        self,
        target: str | None = None,
        output: str | None = None,
        loss: Literal["mse", "mae", "huber"] = "mse",
        metric: Literal["mae", "mse"] = "mae",
        standardize: bool | Literal["auto"] = "auto",
    ) -> None:
        self.target = target or self.default_target
        self.output = output or self.default_output
        self.loss = loss
        self.standardize = standardize
        self._squared = metric == "mse"
        if self._squared:
            self.metric = "mse"

    def fit_unit(self, targets: Arrays) -> None:
        """Use the training targets' mean and deviation as unit, if their range requires it.

        Losses then compare in units of the deviation over all elements, and networks that are
        trained from fresh weights output ``raw · unit + offset``. One unit for all elements: the
        objective is the same but for a factor, and so is what it weighs.

        Args:
            targets: the targets of the training split (and their mask); at least one sample.
        """
        self.unit, self.offset = 1.0, None
        if self.standardize is False:
            return
        values = np.asarray(targets[self.target], np.float64)
        selected = np.ones(values.shape, bool)
        if self.mask in targets:
            selected = _expand(np.asarray(targets[self.mask]), values.shape)
        count = np.maximum(selected.sum(axis=0), 1)
        mean = np.where(selected, values, 0.0).sum(axis=0) / count
        deviation = math.sqrt(np.square((values - mean)[selected]).mean())
        # A deviation of rounding alone is none.
        unit = deviation if deviation > 1e-6 * float(np.abs(mean).max()) else 1.0
        wide = not _NARROWEST <= unit <= _WIDEST or float(np.abs(mean).max()) > _WIDEST
        if wide or self.standardize is True:
            self.unit, self.offset = unit, mean

    @property
    def mask(self) -> str:
        """The name that the mask has in a batch."""
        return f"{self.target}_mask"

    def check(self, dataset: DatasetLike) -> None:
        """Check that the data fit the task; raises InputError."""
        arrays = target_arrays(dataset, self.target, self.name)
        delivered = {spec.name for spec in dataset.targets}
        shape = arrays["train"].shape[1:]
        for split, values in arrays.items():
            where = f"split {split}, {self.target!r}"
            if values.dtype.kind not in "fiu":
                raise InputError(
                    f"targets are of type {values.dtype}, not numbers",
                    where=where,
                    remedy="save them as float32",
                )
            if values.shape[1:] != shape:
                raise InputError(
                    f"a target has the shape {list(values.shape[1:])}, and {list(shape)} in train",
                    where=where,
                    remedy="every split needs targets of one shape",
                )
            mask = dataset.splits[split].arrays.get(self.mask)
            if mask is None:
                check_finite(values, f"the target {self.target!r}", split)
            else:
                self._check_masked(values, mask, split, self.mask in delivered)
        check_inputs(dataset)

    def outputs(self, dataset: DatasetLike) -> tuple[TensorSpec, ...]:
        """The output in the target's shape; (batch, 1) for targets that are single numbers."""
        values = target_arrays(dataset, self.target, self.name)["train"]
        sample = tuple(map(int, values.shape[1:])) or (1,)
        return (TensorSpec(self.output, ("batch", *sample), "float32"),)

    def hard_loss(
        self,
        outputs: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """The distance to the target over the unmasked elements, in units of
        :attr:`unit`."""
        from edgekd.tasks.losses import distance

        if label_smoothing:
            raise InputError(
                f"label_smoothing has no meaning for the task {self.name}",
                remedy="remove it: there are no labels to smooth",
            )
        target, mask = batch[self.target], batch.get(self.mask)
        output = outputs[self.output]
        if self.unit != 1.0:
            # Widened before the division: a large target overflows float16.
            output, target = output.float() / self.unit, target.float() / self.unit
        return distance(output, target, self.loss, mask)

    def scores(self, outputs: Arrays, targets: Arrays) -> np.ndarray[Any, Any]:
        """The mean error of each sample over the unmasked elements: absolute for
        ``mae``, squared for ``mse``."""
        predicted = required(outputs, self.output, "output")
        target = required(targets, self.target, "target")
        if predicted.shape == (*target.shape, 1):
            target = target[..., None]
        if predicted.shape != target.shape:
            raise InputError(
                f"output {list(predicted.shape)} does not fit target {list(target.shape)}",
                remedy="the model's output must have the shape of the target",
            )
        check_outputs_finite(predicted, self.output)
        error = np.abs(predicted.astype(np.float64) - target.astype(np.float64))
        if self._squared:
            error = np.square(error)
        rows = error.reshape(len(error), -1)
        scores: np.ndarray[Any, Any]
        if self.mask not in targets:
            scores = rows.mean(axis=1)
            return scores
        selected = _expand(np.asarray(targets[self.mask]), error.shape).reshape(rows.shape)
        scores = np.where(selected, rows, 0.0).sum(axis=1) / np.maximum(selected.sum(axis=1), 1)
        return scores

    def labelled(self, targets: Arrays) -> np.ndarray[Any, Any]:
        """(N,) bool, all true: every sample has a target."""
        return np.ones(len(required(targets, self.target, "target")), bool)

    def pseudo_targets(self, outputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """The outputs themselves as targets, float32."""
        predicted = required(outputs, self.output, "output")
        return {self.target: predicted.astype(np.float32, copy=False)}

    def constant(self, targets: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """The median of each element over the samples, for ``mse`` the mean: no constant has a
        lower error.

        With a mask, over the unmasked elements; 0 where there are none.
        """
        target = required(targets, self.target, "target").astype(np.float64)
        if self.mask in targets:
            selected = _expand(np.asarray(targets[self.mask]), target.shape)
            elements = np.ma.masked_array(target, ~selected)
            masked = (
                elements.mean(axis=0) if self._squared else np.ma.median(elements, axis=0)  # type: ignore[no-untyped-call]
            )
            best = np.ma.filled(masked, 0.0)
        else:
            best = target.mean(axis=0) if self._squared else np.median(target, axis=0)
        return {self.output: np.broadcast_to(best, target.shape)}

    def _check_masked(
        self,
        values: np.ndarray[Any, Any],
        mask: np.ndarray[Any, Any],
        split: str,
        delivered: bool,
    ) -> None:
        where = f"split {split}, {self.mask!r}"
        if not delivered:
            raise InputError(
                f"the data have a mask {self.mask!r}, but it is not among the targets",
                where=where,
                remedy=f"name it too: data.targets: [{self.target}, {self.mask}]",
            )
        if mask.shape != values.shape[: mask.ndim]:
            raise InputError(
                f"the mask has the shape {list(mask.shape)}, the target {list(values.shape)}",
                where=where,
                remedy="a mask has the shape of the target, or of its leading dimensions",
            )
        selected = _expand(mask, values.shape)
        empty = np.logical_not(np.any(selected.reshape(len(selected), -1), axis=1))
        if empty.any():
            raise InputError(
                f"the mask of sample {int(np.argmax(empty))} selects nothing "
                f"({int(empty.sum())} of {len(empty)} samples)",
                where=where,
                remedy="remove samples that have no target at all",
            )
        # Masked elements may be NaN; they are never read.
        check_finite(np.where(selected, values, 0), f"the target {self.target!r}", split)


def _expand(mask: np.ndarray[Any, Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """A mask over the leading dimensions as a boolean mask over every element."""
    trailing = (1,) * (len(shape) - mask.ndim)
    return np.broadcast_to((mask != 0).reshape(*mask.shape, *trailing), shape)


class Regression(ContinuousTask):
    """A prediction (B, ...) against a target of the same shape."""

    name = "regression"


class Policy(ContinuousTask):
    """Actions (B, A), or a chunk (B, T, A), imitating recorded ones.

    ``target`` and ``output`` are ``action`` by default.
    """

    name = "policy"
    default_target = default_output = "action"
