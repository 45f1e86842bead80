"""The batch axes of a model's inputs and outputs, and conversion to samples first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnxruntime

from edgekd.errors import InputError, StageError
from edgekd.onnx.file import UNKNOWN_RANK
from edgekd.onnx.samples import Array
from edgekd.spec import TensorSpec
from edgerun.model import BatchLayout, TensorInfo
from edgerun.onnx_session import shape_of

_TRIED = (2, 3)  # batch sizes that identify the batch axis of an output
_MATCHED_ROWS = 2048  # of a sample; the cost of an assignment grows with their cube


def session_layout(session: onnxruntime.InferenceSession) -> BatchLayout:
    """Where the inputs of an open model count samples."""
    return BatchLayout.of(
        [TensorInfo(v.name, v.type, shape_of(v.shape)) for v in session.get_inputs()]
    )


def spec_layout(inputs: Sequence[TensorSpec]) -> BatchLayout:
    """The same for a model that is described but not open."""
    return BatchLayout.of(
        [
            TensorInfo(t.name, t.dtype, (None,) if t.shape == (UNKNOWN_RANK,) else t.shape)
            for t in inputs
        ]
    )


def to_model(layout: BatchLayout, batch: Mapping[str, Array]) -> dict[str, Array]:
    """Inputs as the model expects them, from inputs (n, …) by name.

    A state with another batch axis is transposed; an input that all samples share
    is that of the first.

    Raises:
        InputError: the samples have different values of an input that they would share.
    """
    taken = {}
    for name, array in batch.items():
        axis = layout.axes.get(name, 0)
        if axis is None:
            if len(array) > 1 and not np.array_equal(array[1:], array[:-1]):
                raise InputError(
                    f"the model has one {name!r} for all samples of a batch, and these differ",
                    where=f"samples, {name!r}",
                    remedy="give the same value to all samples, or batches of one sample",
                )
            taken[name] = np.asarray(array[0])
        else:
            taken[name] = array if axis == 0 else np.ascontiguousarray(np.moveaxis(array, 0, axis))
    return taken


def rows_of(layout: BatchLayout, inputs: Mapping[str, Array]) -> int:
    """The number of samples in inputs as the model expects them."""
    counted = ((name, axis) for name, axis in layout.axes.items() if axis is not None)
    return next((inputs[name].shape[axis] for name, axis in counted), 1)


@dataclass(frozen=True)
class OutputAxes:
    """Where each output of a model counts samples.

    Attributes:
        axes: output name → axis; None for an output that does not count them.
        ragged: those of the latter whose size depends on the data, such as the boxes that a
            non-maximum suppression leaves. The samples are run one at a time then.
    """

    axes: Mapping[str, int | None]
    ragged: frozenset[str]

    @property
    def one_by_one(self) -> bool:
        """Whether an output has separate samples only if they are run one at a time."""
        return None in self.axes.values()

    def notes(self) -> dict[str, str]:
        """Notes on outputs that are not one row per sample."""
        said = {}
        for name, axis in self.axes.items():
            if name in self.ragged:
                said[name] = (
                    "its size depends on the data: samples run one at a time, and the rows of "
                    "each compared as a set"
                )
            elif axis is None:
                said[name] = "it has no axis for the samples: run one at a time"
            elif axis > 0:
                said[name] = f"its samples lie along axis {axis}"
        return said

    @classmethod
    def of(
        cls,
        session: onnxruntime.InferenceSession,
        layout: BatchLayout,
        run: Callable[[int], list[Any]],
    ) -> OutputAxes:
        """Read from the declared shapes; where these are ambiguous, found by running the model.

        Args:
            session: the model.
            layout: of its inputs.
            run: its outputs on a number of real samples.
        """
        declared = [
            TensorInfo(v.name, v.type, shape_of(v.shape or ())) for v in session.get_outputs()
        ]
        axes: dict[str, int | None] = {}
        ragged = set()
        unclear = []
        for output in declared:
            named = [i for i, d in enumerate(output.shape) if d in layout.names]
            if named:
                axes[output.name] = named[0]
            elif layout.size is None or not output.shape:
                unclear.append(output.name)
            else:
                axes[output.name], open_size = _in_fixed(output.shape, layout.size)
                if open_size:
                    ragged.add(output.name)
        if unclear:
            tried = _TRIED if layout.size is None else (layout.size,)
            try:
                answers = zip(*map(run, tried), strict=True)
                found = dict(zip((o.name for o in declared), answers, strict=True))
            except (InputError, StageError):
                # The error is reported where the samples themselves are run.
                found = {}
            for name in unclear:
                shapes = [getattr(answer, "shape", None) for answer in found.get(name, (None,))]
                axes[name] = _varying(shapes, tried)
                if axes[name] is None:
                    ragged.add(name)
        return cls({o.name: axes[o.name] for o in declared}, frozenset(ragged))


def _in_fixed(shape: Sequence[int | str | None], size: int) -> tuple[int | None, bool]:
    """The axis of an output that counts samples in a model of fixed batch, and whether its size
    depends on the data."""
    if not shape or shape[0] == size:
        return 0, False
    if size > 1:
        return next((i for i, d in enumerate(shape) if d == size), 0), False
    return None, any(not isinstance(d, int) for d in shape)


def _varying(shapes: Sequence[tuple[int, ...] | None], counts: Sequence[int]) -> int | None:
    """The first axis that has as many elements as there were samples."""
    ranks = {None if shape is None else len(shape) for shape in shapes}
    if None in ranks:
        return 0  # A sequence or similar, which is refused where it is read.
    if len(ranks) > 1:
        return None
    sizes = list(zip(*cast("Sequence[tuple[int, ...]]", shapes), strict=True))
    return next((axis for axis, found in enumerate(sizes) if found == tuple(counts)), None)


def ragged(answers: Sequence[Array]) -> Array:
    """Arrays of different shapes, one per sample, as an array of objects (n,)."""
    found = np.empty(len(answers), object)
    for index, answer in enumerate(answers):
        found[index] = answer
    return found


def is_ragged(values: Array) -> bool:
    """Whether these are outputs as returned by :func:`ragged`."""
    return values.dtype == object and values.ndim == 1 and isinstance(values[0], np.ndarray)


def comparable(
    reference: Mapping[str, Array], candidate: Mapping[str, Array]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Answers of two models with ragged outputs as arrays of one shape, (n, …).

    Floats (K, F): each row of the reference paired with the nearest row of the candidate
    (the assignment of least total distance); rows without a partner are paired with zeros. Anything
    else (indices of boxes, words): for each row that either has, 1 where it is in the sample's
    output and 0 elsewhere. Other outputs are unchanged.
    """
    first, second = dict(reference), dict(candidate)
    for name, expected in reference.items():
        answer = candidate.get(name)
        if answer is None or not len(expected) or not is_ragged(expected):
            continue
        if not is_ragged(answer):
            raise InputError(
                f"output {name!r} has one size for all samples in one model only",
                where="comparison of two models' outputs",
                remedy="derive one from the other, or export both with the same settings",
            )
        pairs = [_pair(p, o) for p, o in zip(expected, answer, strict=True)]
        first[name], second[name] = (_padded([pair[side] for pair in pairs]) for side in (0, 1))
    return first, second


def _pair(expected: Array, answer: Array) -> tuple[Array, Array]:
    """(values,) of both sides of one sample."""
    if expected.dtype.kind != "f":
        return _memberships(expected, answer)
    p, o = (_as_rows(a) for a in (expected, answer))
    columns = max(p.shape[1], o.shape[1])
    p, o = (np.pad(a, ((0, 0), (0, columns - a.shape[1]))).astype(np.float64) for a in (p, o))
    if p.shape[0] != 1 or o.shape[0] != 1:
        p, o = _matched(p, o)
    return p.ravel(), o.ravel()


def _as_rows(values: Array) -> Array:
    """(K, F) of any number of dimensions and elements."""
    if not values.ndim:
        return values.reshape(1, 1)
    return values.reshape(len(values), math.prod(values.shape[1:]))


def _matched(p: Array, o: Array) -> tuple[Array, Array]:
    """Pair rows with their nearest ones."""
    if max(len(p), len(o)) <= _MATCHED_ROWS and len(p) and len(o):
        # Imported here: it takes longer than the rest of the command line's imports.
        from scipy.optimize import linear_sum_assignment
        from scipy.spatial.distance import cdist

        known = [np.nan_to_num(a, posinf=0.0, neginf=0.0) for a in (p, o)]
        rows, partners = linear_sum_assignment(cdist(*known))
        rest = [np.setdiff1d(np.arange(len(a)), i) for a, i in ((p, rows), (o, partners))]
        p, o = (
            np.concatenate([p[rows], p[rest[0]], np.zeros((len(rest[1]), p.shape[1]))]),
            np.concatenate([o[partners], np.zeros((len(rest[0]), o.shape[1])), o[rest[1]]]),
        )
    longest = max(len(p), len(o))
    first, second = (np.pad(a, ((0, longest - len(a)), (0, 0))) for a in (p, o))
    return first, second


def _memberships(expected: Array, answer: Array) -> tuple[Array, Array]:
    """Of each row that either has, whether it is in the one and in the other; of a list of
    numbers, each with its place."""

    def rows(values: Array) -> list[tuple[Any, ...]]:
        if values.ndim < 2:
            return list(enumerate(values.ravel().tolist()))
        return [tuple(row.tolist()) for row in _as_rows(values)]

    ours, theirs = set(rows(expected)), set(rows(answer))
    union = sorted(ours | theirs, key=repr)
    return (
        np.array([row in ours for row in union], np.float64),
        np.array([row in theirs for row in union], np.float64),
    )


def _padded(values: Sequence[Array]) -> Array:
    longest = max((len(each) for each in values), default=0)
    return np.stack([np.pad(each, (0, longest - len(each))) for each in values])
