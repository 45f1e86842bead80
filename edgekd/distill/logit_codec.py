"""Encode a teacher's outputs for one sample as a record of fixed size, and decode them.

Class logits are stored as the k largest, so that the temperature stays free (FKD and TinyViT fix it
in), and the logsumexp of the others, so that none of the probability is lost.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekd.errors import InputError, StageError
from edgekd.spec import TensorSpec

Records = NDArray[np.void]
Json = dict[str, Any]

_LOWEST = float(np.finfo(np.float16).min)
"""Replaces every logit further than this below the largest: its probability is 0 either way,
and a loss stays finite."""


class LogitCodec:
    """The layout of the outputs in a record, little-endian.

    Class logits (..., C) take, at each position: the ``top`` largest logits as their class
    (uint16, or uint32 above 65,536 classes) and float16 of their distance to the largest;
    float16 of the others' logsumexp, as a distance too; float32 of the largest. With 10 of 1000
    classes that is 46 bytes. Everything else, and logits that are no larger uncompressed (C ≤ top
    among them), is plain float32.

    Args:
        outputs: the outputs to store, batch dimension first, the other dimensions fixed.
        logits: the names of those that are class logits, classes last.
        top: k.

    Raises:
        InputError: a dimension is not fixed, or a name in ``logits`` is not an output.
    """

    def __init__(
        self, outputs: Sequence[TensorSpec], logits: Collection[str] = (), top: int = 10
    ) -> None:
        unknown = sorted(set(logits) - {spec.name for spec in outputs})
        if unknown:
            raise InputError(f"the teacher has no output named {', '.join(unknown)}")
        if top < 1:
            raise InputError(f"{top} is not a number of logits to store", where="distill.cache.top")
        self.outputs = tuple(outputs)
        self.top = top
        self._shapes = {spec.name: _fixed(spec) for spec in outputs}
        top_k = {name: _top_k(self._shapes[name][-1], top) for name in logits}
        self._shortened = {
            name for name, kind in top_k.items() if kind.itemsize < 4 * self._shapes[name][-1]
        }
        self.dtype = np.dtype(
            [
                (name, top_k[name], shape[:-1])
                if name in self._shortened
                else (name, np.dtype("<f4"), shape)
                for name, shape in self._shapes.items()
            ]
        )

    def to_json(self) -> list[Json]:
        """The outputs, their shapes per sample and how they are stored, readable and for the cache
        key.
        """
        return [
            {
                "name": name,
                "shape": list(shape),
                "kept": f"top {self.top}" if name in self._shortened else "float32",
            }
            for name, shape in self._shapes.items()
        ]

    def encode(self, answers: Mapping[str, Tensor], view: int = 0, start: int = 0) -> Records:
        """The records (B,) of a batch's outputs.

        Args:
            answers: outputs by name, (B, ...); other names are ignored.
            view: for error messages, like ``start``, the number of the first sample.

        Raises:
            InputError: an output is missing or has another shape.
            StageError: an output is NaN, or its largest value is infinite.
        """
        count = len(next(iter(answers.values()))) if answers else 0
        records = np.zeros(count, self.dtype)
        for name, shape in self._shapes.items():
            given = list(answers[name].shape) if name in answers else "nothing"
            if given != [count, *shape]:
                raise InputError(
                    f"the teacher outputs {name} as {given}, and the cache stores it as "
                    f"{[count, *shape]}",
                    remedy="declare the outputs that the teacher has",
                )
            values = answers[name].detach().to(torch.float32)
            shortened = name in self._shortened
            # The largest of values with a NaN among them is NaN.
            largest = values.amax(dim=-1) if shortened else values.reshape(count, -1).amax(dim=1)
            bad = ~largest.reshape(count, -1).isfinite().all(dim=1)
            if bad.any():
                sample = start + int(bad.nonzero()[0])
                raise StageError(
                    f"the teacher's {name} for sample {sample} in view {view} is NaN or infinite",
                    remedy="check this sample, and at the teacher's weights and precision",
                )
            if shortened:
                _shorten(values, largest, records[name])
            else:
                records[name] = values.cpu().numpy()
        return records

    def decode(self, records: Records, device: torch.device) -> dict[str, Tensor]:
        """The outputs (B, ...) of records, float32, in newly allocated memory.

        Plain float32 values are restored exactly. Of shortened logits the k largest are restored
        within float16: a relative 2⁻¹¹ of their distance to the largest, which is exact. The
        others share the rest evenly: softmax at T = 1 gives all of them together their
        probability; at another T the share of each is an estimate.
        """
        return {
            name: _lengthen(records[name], shape[-1], device)
            if name in self._shortened
            else torch.from_numpy(np.array(records[name], np.float32)).to(device)
            for name, shape in self._shapes.items()
        }

    def as_tensors(self, records: Records) -> dict[str, Tensor] | None:
        """The outputs (N, ...) of records as float32 tensors that share their memory.

        None where an output is shortened: it has to be decoded.
        """
        if self._shortened:
            return None
        return {name: torch.from_numpy(records[name]) for name in self._shapes}


def _fixed(spec: TensorSpec) -> tuple[int, ...]:
    shape = tuple(size for size in spec.sample_shape if isinstance(size, int))
    if len(shape) != len(spec.sample_shape) or 0 in shape:
        raise InputError(
            f"the teacher's output {spec} has no fixed size, and the cache's records do",
            where="distill.cache",
            remedy="set distill.cache: false",
        )
    return shape


def _top_k(classes: int, top: int) -> np.dtype[np.void]:
    index = "<u2" if classes <= 1 << 16 else "<u4"
    return np.dtype(
        [("index", index, (top,)), ("below", "<f2", (top,)), ("rest", "<f2"), ("largest", "<f4")]
    )


def _shorten(logits: Tensor, largest: Tensor, out: Records) -> None:
    top, index = logits.topk(out.dtype["index"].shape[0], dim=-1)
    # Subtracting the top's share from 1 would cancel where the rest is small.
    rest = logits.scatter(-1, index, -math.inf).logsumexp(dim=-1)
    out["index"] = index.cpu().numpy()
    out["below"] = (top - largest[..., None]).clamp_min(_LOWEST).cpu().numpy()
    out["rest"] = (rest - largest).clamp_min(_LOWEST).cpu().numpy()
    out["largest"] = largest.cpu().numpy()


def _lengthen(records: Records, classes: int, device: torch.device) -> Tensor:
    # The short form is copied to the device and expanded there.
    index = torch.from_numpy(records["index"].astype(np.int64)).to(device)
    below, rest, largest = (
        torch.from_numpy(records[field].astype(np.float32)).to(device)
        for field in ("below", "rest", "largest")
    )
    # Rounded to float16 the rest could overtake the top, and become the teacher's prediction.
    each = torch.minimum(rest - math.log(classes - index.shape[-1]), below.amin(dim=-1))
    dense = (largest + each)[..., None].repeat(*[1] * each.ndim, classes)
    return dense.scatter_(-1, index, largest[..., None] + below)
