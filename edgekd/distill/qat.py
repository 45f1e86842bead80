"""Quantization-aware distillation: training continued with simulated 8-bit rounding.

Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference"; by torchao's pt2e flow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from edgekd.config.host import world_size
from edgekd.config.training import LossTerm, TrainConfig
from edgekd.distill.checkpoint import History
from edgekd.distill.qat_model import PreparedStudent
from edgekd.distill.qat_quantizer import QatRuntime, check_torchao
from edgekd.errors import InputError
from edgekd.models.dict_model import DictModel


@dataclass(frozen=True)
class QatResult:
    """The result of quantization-aware training.

    Attributes:
        history: the history of its training.
        prepared: the trained network that rounds in float32; in evaluation it has the outputs
            of ``model``, but for float32 noise at the edges between two steps.
        model: the network with int8 weights, to be exported as any other.
    """

    history: History
    prepared: PreparedStudent
    model: DictModel


def quantization_aware(
    model: DictModel,
    runtime: QatRuntime,
    fit: Callable[[nn.Module], History],
    reduce_range: bool = False,
) -> QatResult:
    """Continue the training of a float32 network with simulated int8 rounding, and convert it.

    Args:
        model: trained; it is not changed.
        runtime: ``tensorrt`` rounds activations to symmetric int8, ``cpu`` to uint8 with a zero
            point; weights are int8 per output channel for both.
        fit: the training loop; it trains its argument in place, which takes and returns
            mappings as ``model`` does.
        reduce_range: weights of 7 bits, for processors that would overflow otherwise.

    Raises:
        InputError: torchao is missing, several processes train together, or the network has
            nothing to quantize or does not fit in a graph.
        StageError: torch cannot trace the network.
    """
    check_torchao()
    if world_size() > 1:
        raise InputError(
            "quantization-aware training is for one process: the ranges of activations are not "
            "shared between several",
            where="quantize.int8",
            remedy="start one process, or set int8: static",
        )
    prepared = PreparedStudent(model, runtime, reduce_range)
    history = fit(prepared)
    return QatResult(history, prepared, prepared.convert())


def check_training(config: TrainConfig, where: str = "quantize.qat") -> None:
    """Refuse what a graph with fake quantization cannot be trained with.

    Raises:
        InputError: half precision, or a compiled network.
    """
    if config.precision != "float32":
        raise InputError(
            f"8-bit rounding is simulated in float32, and {config.precision} is requested",
            where=f"{where}.precision",
            remedy="set precision: float32",
        )
    if config.compile:
        raise InputError(
            "the graph is switched in the middle of the training, which a compiled one is not",
            where=f"{where}.compile",
            remedy="set compile: false",
        )


def terms_of_outputs(
    terms: Sequence[LossTerm], own: Sequence[LossTerm] | None
) -> tuple[tuple[LossTerm, ...], tuple[str, ...]]:
    """The loss terms of the training, and the names of those that are left out.

    Args:
        terms: those of the distillation; terms that name layers of the student are left out,
        because the
            prepared graph does not have them.
        own: the explicitly configured ones (``quantize.qat.losses``), if any.

    Raises:
        InputError: none is left, or one of ``own`` names layers of the student.
    """
    if own is not None:
        for index, term in enumerate(own):
            if term.args.get("student") is not None:
                raise InputError(
                    f"{term.name!r} compares the student's layers {term.args['student']}, and "
                    "the graph that is trained for int8 has no layers",
                    where=f"quantize.qat.losses[{index}].{term.name}",
                    remedy="use losses on the outputs",
                )
        return tuple(own), ()
    kept = tuple(term for term in terms if term.args.get("student") is None)
    left_out = tuple(term.name for term in terms if term not in kept)
    if not any(term.weight for term in kept):
        raise InputError(
            f"all losses compare layers of the student ({', '.join(left_out)}), and the graph "
            "that is trained for int8 has no layers",
            where="distill.losses",
            remedy="name losses on the outputs (quantize.qat.losses), or set int8: static",
        )
    return kept, left_out
