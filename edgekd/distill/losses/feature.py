"""Losses on a feature of the student and one of the teacher.

Maps (B, C, H, W), for some also sequences (B, T, F) and vectors (B, F). Each gives a scalar that
does not depend on the order of the samples; over several pairs of layers it is the sum of theirs.
Half precision is widened first. The pure functions compare equal shapes unless they say otherwise;
the classes of the same name adapt the student to the teacher's shape with trained modules.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import log_softmax, mse_loss, normalize, softplus

from edgekd.distill.features import (
    Shape,
    adapter,
    channel_dim,
    check_maps,
    check_same_shape,
    pool_to_smaller,
    regressor,
    resize,
)
from edgekd.distill.losses.response import Temperature
from edgekd.errors import InputError
from edgekd.tasks.losses import at_least_float32

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

Power = Annotated[float, Field(ge=1, allow_inf_nan=False)]
"""From 1 upward: below it the gradient of a feature that is 0 is infinite."""


class Fitnets(nn.Module):
    """:func:`fitnets` of the adapted student; maps are averaged down to the smaller size.

    Args:
        student: the captured shape.
        teacher: the captured shape.
        relu: the adapter of a map ends with a ReLU, as the teacher's layer should; set False for
            a layer with negative values, which the adapter could not reach.
    """

    def __init__(self, student: Shape, teacher: Shape, relu: bool = True) -> None:
        super().__init__()
        self.adapter = adapter(student, teacher, relu=relu)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss, a scalar."""
        student, teacher = _pooled(student, teacher)
        return fitnets(self.adapter(student), teacher)


def fitnets(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean (r(f_s) − f_t)²`` (Romero et al. 2015, equation 3; a mean, not half a sum).

    Args:
        student: any shape, adapted.
        teacher: the same shape.
    """
    check_same_shape(student, teacher)
    return mse_loss(at_least_float32(student), at_least_float32(teacher))


def attention(student: Tensor, teacher: Tensor, power: Power = 2.0) -> Tensor:
    """``mean (a_s − a_t)²`` with ``a = A / ‖A‖₂``, ``A = mean_c |f|^power``.

    Attention transfer (Zagoruyko & Komodakis 2017, section 3.1). A mean over samples and
    positions, as in the paper's code. The feature's scale does not matter.

    Args:
        student: a map of any channels and size; the larger is averaged down to the smaller.
        teacher: a map of the same samples, as the student's.
        power: 2 in the paper, at least 1.
    """
    student, teacher = _pooled_maps(student, teacher)
    return mse_loss(_attention_map(student, power), _attention_map(teacher, power))


def _attention_map(feature: Tensor, power: float) -> Tensor:
    return normalize(feature.abs().pow(power).mean(dim=1).flatten(1), dim=1)


def nst(student: Tensor, teacher: Tensor) -> Tensor:
    """``MMD²`` between the two sets of channels, kernel ``(x · y)²`` (Huang & Wang 2017).

    A channel is a sample: its map as a vector of length 1. Biased estimate, mean over the batch:
    never negative but for rounding. The largest tensor made is (B, C, C').

    Args:
        student: a map of any channels and size; the larger is averaged down to the smaller.
        teacher: a map of the same samples, as the student's.
    """
    maps = _pooled_maps(student, teacher)
    s, t = (normalize(feature.flatten(2), dim=2) for feature in maps)
    return _mean_kernel(s, s) + _mean_kernel(t, t) - 2 * _mean_kernel(s, t)


def _mean_kernel(x: Tensor, y: Tensor) -> Tensor:
    """The mean of ``(x_i · y_j)²`` over all pairs of channels and the batch."""
    return torch.bmm(x, y.mT).square().mean()


class Vid(nn.Module):
    """:func:`vid` with its mean from a network and its variance trained, one per channel.

    ``σ² = softplus(scale) + eps``. Maps are averaged down to the smaller size.

    Args:
        student: the captured shape.
        teacher: the captured shape.
        initial_variance: σ² at the start.
        eps: lower bound of σ².

    Raises:
        InputError: the shapes cannot be matched, or the variance would start at or below eps.
    """

    def __init__(
        self,
        student: Shape,
        teacher: Shape,
        initial_variance: Positive = 5.0,
        eps: Positive = 1e-5,
    ) -> None:
        super().__init__()
        self.mean = regressor(student, teacher)
        if initial_variance <= eps:
            raise InputError(
                f"initial_variance {initial_variance} is not above eps {eps}",
                remedy="give a larger initial_variance",
            )
        start = initial_variance - eps
        # The inverse of softplus, in the form that does not overflow.
        scale = start + math.log(-math.expm1(-start))
        self.scale = nn.Parameter(torch.full((teacher[channel_dim(teacher)],), scale))
        self.eps = eps

    @property
    def variance(self) -> Tensor:
        """σ², one per channel of the teacher."""
        return softplus(self.scale) + self.eps

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss, a scalar."""
        student, teacher = _pooled(student, teacher)
        return vid(self.mean(student), teacher, self.variance)


def vid(student: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    """``mean ½[(μ − f_t)² / σ² + log σ²]`` (Ahn et al. 2019, section 2.2).

    The negative log-likelihood of a normal density without its constant: it may be below 0.

    Args:
        student: μ, predicted from the student.
        teacher: the same shape.
        variance: σ², one per channel.
    """
    check_same_shape(student, teacher)
    trailing = (1,) * (teacher.ndim - 2) if channel_dim(teacher) == 1 else ()
    variance = at_least_float32(variance).reshape(-1, *trailing)
    error = (at_least_float32(student) - at_least_float32(teacher)).square()
    return 0.5 * (error / variance + variance.log()).mean()


class Cwd(nn.Module):
    """:func:`cwd` of the adapted student, resized bilinearly to the teacher's size.

    Args:
        student: the captured shape.
        teacher: the captured shape.
        temperature: see :func:`cwd`.
    """

    def __init__(self, student: Shape, teacher: Shape, temperature: Temperature = 1.0) -> None:
        super().__init__()
        self.adapter = adapter(student, teacher, batch_norm=False)
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss, a scalar."""
        check_maps(student, teacher)
        adapted = resize(self.adapter(at_least_float32(student)), teacher)
        return cwd(adapted, teacher, self.temperature)


def cwd(student: Tensor, teacher: Tensor, temperature: Temperature = 1.0) -> Tensor:
    """``T²/C · Σ_c KL(softmax_i(f_t / T) ‖ softmax_i(f_s / T))`` (CWD, Shu et al. 2021).

    The softmax is over a channel's positions i, the mean over samples and channels.

    Args:
        student: a map.
        teacher: a map of the same shape.
        temperature: T, at least 1.
    """
    check_maps(student, teacher)
    check_same_shape(student, teacher)
    log_p = log_softmax(at_least_float32(teacher).flatten(2) / temperature, dim=2)
    log_q = log_softmax(at_least_float32(student).flatten(2) / temperature, dim=2)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim=2).mean()


class Pkd(nn.Module):
    """:func:`pkd` of the adapted student, resized bilinearly to the teacher's size.

    Args:
        student: the captured shape.
        teacher: the captured shape.
    """

    def __init__(self, student: Shape, teacher: Shape) -> None:
        super().__init__()
        self.adapter = adapter(student, teacher, batch_norm=False)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss, a scalar."""
        check_maps(student, teacher)
        return pkd(resize(self.adapter(at_least_float32(student)), teacher), teacher)


def pkd(student: Tensor, teacher: Tensor) -> Tensor:
    """``½ mean (f̂_s − f̂_t)²``, f̂ normalised per channel (Pearson KD, Cao et al. 2022).

    It is ``1 − r``, r the Pearson correlation over samples and positions, mean over the channels:
    from 0 to 2. A channel that is constant has no correlation and counts ½.

    Patient KD (Sun et al. 2019), also called PKD, is another method: its ``Σ ‖ĥ_s − ĥ_t‖²`` of
    hidden states of unit length is twice ``cosine`` with lists of layers, there on the first token
    only.

    Args:
        student: a map.
        teacher: a map of the same shape.
    """
    check_maps(student, teacher)
    check_same_shape(student, teacher)
    return 0.5 * mse_loss(_standardized(student), _standardized(teacher))


def _standardized(feature: Tensor) -> Tensor:
    feature = at_least_float32(feature)
    # correction=0: with n − 1, as in mmrazor, it would not be 1 − r.
    variance, mean = torch.var_mean(feature, dim=(0, 2, 3), correction=0, keepdim=True)
    # Inside the root, since the gradient of a standard deviation of 0 is NaN.
    return (feature - mean) * (variance + 1e-12).rsqrt()


def _pooled(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return pool_to_smaller(at_least_float32(student), at_least_float32(teacher))


def _pooled_maps(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    check_maps(student, teacher)
    return _pooled(student, teacher)
