"""Adapt a teacher with other preprocessing, class order or output form to the data."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from edgekd.config.networks import OutputForm, PreprocessConfig
from edgekd.errors import InputError, nearest
from edgekd.models.dict_model import DictModel
from edgekd.models.weights import ClassNames
from edgekd.spec import Dimension, ModelSpec, TensorSpec

_LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601, as Pillow's conversion to grey."""


class Normalization(Protocol):
    """What was subtracted from an input and what it was divided by, as in a dataset."""

    @property
    def mean(self) -> tuple[float, ...]:
        """One number for all, or one for each channel or feature."""
        ...

    @property
    def std(self) -> tuple[float, ...]:
        """Likewise."""
        ...


@dataclass(frozen=True)
class InputAdaptation:
    """The preprocessing from the student's batch to a teacher's input, by
    :class:`PreprocessConfig`.

    Attributes:
        name: the input.
        config: the teacher's preprocessing.
        normalization: what the data were normalised with; None: they were not.
        resolution: height and width of images, instead of the teacher's.
    """

    name: str
    config: PreprocessConfig
    normalization: Normalization | None
    resolution: tuple[int, int] | None = None

    def spec(self, given: TensorSpec) -> TensorSpec:
        """The input as the teacher expects it."""
        if len(given.shape) != 4:
            return given
        channels, *size = given.shape[1:]
        channels = self.config.channels or channels
        size = list(self.resolution or self.config.image_size or size)
        shape: tuple[Dimension, ...] = (given.shape[0], channels, *size)
        if self.config.layout == "nhwc":
            shape = (given.shape[0], *size, channels)
        return TensorSpec(given.name, shape, given.dtype)

    def __call__(self, values: Tensor) -> Tensor:
        """The input for the teacher; the student's tensor is unchanged."""
        config, image = self.config, values.ndim == 4
        if config.normalizes and self.normalization is not None:
            std, mean = self.normalization.std, self.normalization.mean
            values = values * _constant(std, values) + _constant(mean, values)
        if image and config.channels is not None and config.channels != values.shape[1]:
            if config.channels == 3:
                values = values.expand(-1, 3, -1, -1)
            else:
                values = (values * _constant(_LUMA, values)).sum(dim=1, keepdim=True)
        if image and config.channel_order == "bgr":
            values = torch.cat([values[:, 2:3], values[:, 1:2], values[:, 0:1]], dim=1)
        if image and self.resolution is not None:
            values = resize(values, self.resolution)
        elif image and config.image_size is not None:
            align = None if config.interpolation == "nearest" else False
            values = F.interpolate(
                values, config.image_size, mode=config.interpolation, align_corners=align
            )
        if config.normalizes:
            mean, std = config.mean or (0.0,), config.std or (1.0,)
            values = values * (config.scale or 1.0) - _constant(mean, values)
            values = values / _constant(std, values)
        return values.permute(0, 2, 3, 1) if image and config.layout == "nhwc" else values


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) to (B, C, *size): means of blocks for whole factors, else bilinear.

    Bilinear interpolation alone skips pixels when it shrinks by more than two.
    """
    height, width = image.shape[2:]
    if height % size[0] == 0 and width % size[1] == 0:
        return F.avg_pool2d(image, (height // size[0], width // size[1]))
    return F.interpolate(image, size, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Adaptation:
    """The adaptation between the pipeline's data and a teacher's network.

    Attributes:
        output: the primary output's name.
        order: ``order[i]`` is the network's output for the data's class i; None: the same order.
        outputs: how many outputs the network has; None: as many as there are classes.
        form: the form of its outputs. Probabilities p are returned as log p, which is a valid set
        of
            logits: softmax(log p) = p; those of a sigmoid as log(p / (1 - p)).
        input: its preprocessing, where it differs from the data's.
    """

    output: str = "logits"
    order: tuple[int, ...] | None = None
    outputs: int | None = None
    form: OutputForm = "logits"
    input: InputAdaptation | None = None

    @property
    def is_identity(self) -> bool:
        """Whether the network is used unchanged."""
        return self == Adaptation(self.output)

    def network_spec(self, spec: ModelSpec) -> ModelSpec:
        """The inputs and outputs of the network itself, from those of the pipeline."""
        own = self.input
        inputs = tuple(own.spec(s) if own and s.name == own.name else s for s in spec.inputs)
        outputs = tuple(
            replace(s, shape=(*s.shape[:-1], self.outputs))
            if s.name == self.output and self.outputs is not None
            else s
            for s in spec.outputs
        )
        return ModelSpec(inputs, outputs)

    def prepare(self, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The batch as the network expects it."""
        if self.input is None or self.input.name not in batch:
            return batch
        return {**batch, self.input.name: self.input(batch[self.input.name])}

    def finish(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The network's outputs as logits in the order of the data's classes."""
        values = as_logits(outputs[self.output], self.form)
        if self.order is not None:
            order = torch.tensor(self.order, device=values.device)
            values = values.index_select(-1, order)
        return {**outputs, self.output: values}


class AdaptedModel(DictModel):
    """A network behind an :class:`Adaptation`; its weights and layers are the network's own.

    Args:
        model: the network with the inputs and outputs of :meth:`Adaptation.network_spec`.
        spec: the pipeline's inputs and outputs.
        adaptation: its preprocessing and output conversion.
    """

    def __init__(self, model: DictModel, spec: ModelSpec, adaptation: Adaptation) -> None:
        super().__init__(model.module, spec)
        self.adaptation = adaptation

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the network: inputs by name to outputs by name."""
        return self.adaptation.finish(super().forward(self.adaptation.prepare(batch)))


def adapt(model: DictModel, spec: ModelSpec, adaptation: Adaptation) -> DictModel:
    """The network behind an adaptation; itself where there is nothing to adapt."""
    return model if adaptation.is_identity else AdaptedModel(model, spec, adaptation)


def as_logits(values: Tensor, form: OutputForm) -> Tensor:
    """Numbers of any form as logits (..., C), finite."""
    if form == "logits":
        return values
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    tiny = torch.finfo(values.dtype).tiny
    if form == "log_probabilities":
        return values.clamp_min(torch.tensor(tiny, dtype=values.dtype).log().item())
    log_p = values.clamp_min(tiny).log()
    if form == "probabilities":
        return log_p
    # 1 - p is exactly 0 from rounding on; it is replaced there by the smallest step below 1.
    rest = (1 - values).clamp_min(torch.finfo(values.dtype).eps / 2)
    return log_p - rest.log()


def recognized_form(values: Tensor) -> OutputForm:
    """Detect the form of a classifier's outputs on real samples.

    Probabilities lie in [0, 1] and sum to 1; their logarithms are at most 0 and the sum of their
    exponentials is 1; those of a sigmoid lie in [0, 1], on both sides of a half.

    Args:
        values: the outputs (N, ..., C), C at least 2.
    """
    # A softmax in 16 bits is rounded in each of its summands.
    tolerance = 2e-3 if values.dtype in (torch.float32, torch.float64) else 2e-2
    rows = values.detach().double().reshape(-1, values.shape[-1])
    small = 1e-6
    if bool((rows >= -small).all() and (rows <= 1 + small).all()):
        if bool(((rows.sum(dim=-1) - 1).abs() <= tolerance).all()):
            return "probabilities"
        return "sigmoid" if bool((rows > 0.5).any() and (rows < 0.5).any()) else "logits"
    if bool((rows <= small).all() and (rows.logsumexp(dim=-1).abs() <= tolerance).all()):
        return "log_probabilities"
    return "logits"


def check_form(values: Tensor, form: OutputForm, where: str) -> None:
    """Refuse a form that a teacher's outputs cannot have.

    Raises:
        InputError: they are outside what the form allows.
    """
    low, high = float(values.min()), float(values.max())
    possible = {
        "logits": True,
        "probabilities": low >= -1e-3 and high <= 1 + 1e-3,
        "sigmoid": low >= -1e-3 and high <= 1 + 1e-3,
        "log_probabilities": high <= 1e-3,
    }
    if not possible[form]:
        raise InputError(
            f"the teacher's outputs are configured as {form}, but lie between {low:.4g} and "
            f"{high:.4g}",
            where=where,
            remedy=f"remove it: they look like {recognized_form(values)}",
        )


def input_adaptation(
    config: PreprocessConfig | None,
    inputs: Sequence[TensorSpec],
    normalizations: Mapping[str, Normalization],
    where: str,
) -> InputAdaptation | None:
    """The preprocessing of the input it applies to: the image, or the only input.

    Raises:
        InputError: the input is ambiguous, or the keys do not fit it.
    """
    if config is None:
        return None
    images = [spec for spec in inputs if len(spec.shape) == 4]
    candidates = images or list(inputs)
    if len(candidates) != 1:
        raise InputError(
            f"the data have {len(candidates)} inputs that it may apply to: "
            f"{', '.join(spec.name for spec in candidates)}",
            where=where,
            remedy="put the preprocessing into the teacher's forward",
        )
    spec = candidates[0]
    if spec.dtype != "float32":
        raise InputError(
            f"the input {spec}, which is not normalised, cannot be preprocessed",
            where=where,
            remedy="remove it",
        )
    of_images = config.model_dump(exclude={"scale", "mean", "std"}, exclude_defaults=True)
    if not images and of_images:
        raise InputError(
            f"{', '.join(of_images)} is for images, and the input is {spec}",
            where=where,
            remedy="give scale, mean and std only",
        )
    channels = (config.channels or spec.shape[1]) if images else spec.shape[-1]
    if images and config.channels is not None and spec.shape[1] not in (1, 3):
        raise InputError(
            f"images of {spec.shape[1]} channels cannot be made {config.channels}",
            where=f"{where}.channels",
            remedy="remove it",
        )
    if images and config.channel_order == "bgr" and channels != 3:
        raise InputError(
            f"images of {channels} channel{'s' if channels != 1 else ''} have no order bgr",
            where=f"{where}.channel_order",
            remedy="remove it, or give channels: 3",
        )
    for key in ("mean", "std"):
        values = getattr(config, key)
        if values is not None and len(values) not in (1, channels):
            raise InputError(
                f"there are {len(values)} numbers for {channels} channels",
                where=f"{where}.{key}",
                remedy="give one for all, or one for each",
            )
    return InputAdaptation(spec.name, config, normalizations.get(spec.name))


def input_resolution(
    resolution: int | tuple[int, int],
    inputs: Sequence[TensorSpec],
    own: InputAdaptation | None,
    where: str,
) -> InputAdaptation | None:
    """The adaptation that resizes the image inside the network.

    Args:
        resolution: the shorter side, the other one in proportion; or height and width.
        inputs: what the data deliver.
        own: the teacher's preprocessing, for its network; None: there is none.
        where: the YAML section, for errors.

    Returns:
        None where the images have that size.

    Raises:
        InputError: there is no image, or several, or it is none of floats.
    """
    place = f"{where}.resolution"
    images = [spec for spec in inputs if len(spec.shape) == 4]
    if len(images) != 1:
        raise InputError(
            f"resolution resizes one image (batch, channels, height, width), and the data give "
            f"{', '.join(map(str, inputs))}",
            where=place,
            remedy="remove it",
        )
    spec = images[0]
    height, width = spec.shape[2:]
    if not (spec.dtype == "float32" and isinstance(height, int) and isinstance(width, int)):
        raise InputError(
            f"the image {spec} cannot be resized: it needs floats and a fixed size",
            where=place,
            remedy="remove it",
        )
    if isinstance(resolution, int):
        shorter = min(height, width)
        size = (round(height * resolution / shorter), round(width * resolution / shorter))
    else:
        size = resolution
    if own is not None:
        return replace(own, resolution=size)
    if size == (height, width):
        return None
    return InputAdaptation(spec.name, PreprocessConfig(), None, size)


def _constant(numbers: Sequence[float], like: Tensor) -> Tensor:
    """Numbers per channel or feature, shaped to broadcast over an input."""
    constant = torch.tensor(tuple(numbers), dtype=torch.float32, device=like.device)
    return constant.reshape(-1, 1, 1) if like.ndim == 4 else constant


_SIGNIFICANCE = 1e-3
_CLEARLY = 2.0
"""How many times as many samples another order must have right."""


def output_order(
    found: ClassNames, labels: Sequence[str], where: str, stated: bool
) -> tuple[int, ...] | None:
    """Which output is each of the data's classes.

    Args:
        found: the outputs' names.
        labels: the data's class names in their order.
        where: the YAML key, for errors.
        stated: the user wrote the names; those of a file may be another language's.

    Returns:
        A position for each label; None when names of a file are none of the data's.

    Raises:
        InputError: some of the data's classes are named and some are not.
    """
    positions = _positions(found.names, labels)
    lacking = [label for label, at in zip(labels, positions, strict=True) if at is None]
    if not lacking:
        return tuple(at for at in positions if at is not None)
    if len(lacking) == len(labels) and not stated:
        return None
    guess = nearest(lacking[0], found.names)
    raise InputError(
        f"{found.source} names {len(found.names)} outputs of the teacher, and none of them is the "
        f"class {lacking[0]!r}"
        + (f" ({len(lacking)} of the data's {len(labels)} are missing)" if lacking[1:] else ""),
        where=where,
        remedy=(f"is it {guess!r}? " if guess else "")
        + "name the outputs in their order as the data name their classes: "
        f"teacher.classes: [{', '.join(labels[:4])}{', …' if labels[4:] else ''}]",
    )


def class_list(names: Sequence[str]) -> str:
    """Names as a line of YAML."""
    return f"classes: {json.dumps(list(names), ensure_ascii=False)}"


def fitting_permutation(
    labels: NDArray[np.int64], predictions: NDArray[np.int64], classes: int
) -> tuple[int, ...] | None:
    """The order of outputs in which a classifier would be right far more often.

    The permutation is found on one half of the samples (Kuhn 1955, on the matrix of confusions)
    and tested on the other, and vice versa, so that a good fit by chance does not count:
    a one-sided sign test of the samples that only one order has right must be below 0.001. Only
    cycles count that have most samples right, at least twice as many as before, and in which no
    class clearly fits better unmoved; all other classes keep their position.

    Args:
        labels: (N,) the right classes.
        predictions: (N,) the largest outputs.
        classes: how many there are.

    Returns:
        For each class the index of its output; None when the order is correct, or
        the samples are inconclusive.
    """
    # By class, so that each half has samples of every one.
    order = np.argsort(labels, kind="stable")
    halves = [_confusion(labels[order[i::2]], predictions[order[i::2]], classes) for i in (0, 1)]
    gained = lost = 0
    for found_on, tried_on in (halves, halves[::-1]):
        permutation = _clear_cycles(found_on)
        moved = permutation != np.arange(classes)
        rows = np.arange(classes)[moved]
        gained += int(tried_on[rows, permutation[moved]].sum())
        lost += int(tried_on[rows, rows].sum())
    if gained <= _CLEARLY * lost or _sign_test(gained, lost) >= _SIGNIFICANCE:
        return None
    best = _clear_cycles(halves[0] + halves[1])
    return None if (best == np.arange(classes)).all() else tuple(map(int, best))


def _clear_cycles(confusion: NDArray[np.int64]) -> NDArray[np.int64]:
    """The best assignment of outputs to classes, without its cycles that are hardly better."""
    from scipy.optimize import linear_sum_assignment

    classes = len(confusion)
    # Of equally good assignments the one that moves least.
    _, best = linear_sum_assignment(confusion + 0.5 * np.eye(classes), maximize=True)
    assigned = np.arange(classes)
    seen: set[int] = set()
    for start in range(classes):
        cycle, at = [], start
        while at not in seen:
            seen.add(at)
            cycle.append(at)
            at = int(best[at])
        moved, stay = confusion[cycle, best[cycle]], confusion[cycle, cycle]
        better_off = (stay - moved > 2 * np.sqrt(stay + moved)) & (
            2 * stay > confusion[cycle].sum(axis=1)
        )
        # A network without skill, such as one with wrongly preprocessed inputs, is not right
        # most of the time in any order.
        knows = 2 * moved.sum() > confusion[cycle].sum()
        clearly = moved.sum() >= _CLEARLY * stay.sum() and not better_off.any()
        if len(cycle) > 1 and knows and clearly:
            assigned[cycle] = best[cycle]
    return assigned


def _confusion(
    labels: NDArray[np.int64], predictions: NDArray[np.int64], classes: int
) -> NDArray[np.int64]:
    """How often each class (row) got each output (column) as the largest."""
    counts = np.bincount(labels * classes + predictions, minlength=classes * classes)
    return counts.reshape(classes, classes)


def _sign_test(gained: int, lost: int) -> float:
    """The chance of so many gains or more if gains and losses were equally likely."""
    from scipy.special import bdtrc

    return float(bdtrc(gained - 1, gained + lost, 0.5)) if gained else 1.0


def _positions(names: Sequence[str], labels: Sequence[str]) -> list[int | None]:
    exact = {name.strip(): at for at, name in enumerate(names)}
    if all(label.strip() in exact for label in labels):
        return [exact[label.strip()] for label in labels]
    loose = {_plain(name): at for at, name in enumerate(names)}
    if len(loose) < len(names) or len(set(map(_plain, labels))) < len(labels):
        return [exact.get(label.strip()) for label in labels]
    return [loose.get(_plain(label)) for label in labels]


def _plain(name: str) -> str:
    """A name without case, spaces, hyphens and underscores."""
    return re.sub(r"[\s_\-/]+", "", name).casefold()
