"""Build a network from a model's name in a pipeline, and check its shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.config.networks import ModelConfig
from edgekd.errors import EdgekdError, InputError
from edgekd.extension import check_arguments, parameters_of, resolve
from edgekd.models.dict_model import DictModel, fits
from edgekd.models.hub import HUBS
from edgekd.models.networks import ConvNet, Mlp, Policy
from edgekd.spec import ModelSpec, TensorSpec

MODELS: dict[str, Callable[..., nn.Module]] = {
    "convnet-l": partial(
        ConvNet, widths=(16, 32, 64, 128), blocks=(1, 1, 1), stem_stride=1, residual=True
    ),
    "convnet-m": partial(ConvNet, widths=(16, 32, 64), blocks=(1, 1), stem_stride=1, residual=True),
    "convnet-s": partial(ConvNet, widths=(16, 24, 48), blocks=(0, 1), stem_stride=2),
    "convnet-xs": partial(ConvNet, widths=(8, 12, 24), blocks=(0, 0), stem_stride=2),
    "mlp": Mlp,
    "policy-l": partial(Policy, widths=(16, 32, 64), blocks=(1, 1), hidden=128),
    "policy-s": partial(Policy, widths=(8, 16, 24), blocks=(0, 0), hidden=24),
}
"""The built-in networks by the names they have in a pipeline."""

_OPEN_DIMENSION = 4
"""The trial size of a symbolic dimension other than the batch."""


def find_model(name: str, where: str = "model") -> Callable[..., nn.Module]:
    """What makes the network of that name.

    It is a built-in one, ``timm:NAME``, ``transformers:NAME_OR_FOLDER`` (:mod:`edgekd.models.hub`),
    an entry point of ``edgekd.models`` or a ``package.module:name``.

    Raises:
        InputError: there is none, the nearest name is suggested; or its package is not installed.
    """
    package, _, rest = name.partition(":")
    if package in HUBS and rest:
        return HUBS[package](rest, where)
    maker: Callable[..., nn.Module] = resolve(name, MODELS, "model", where, group="edgekd.models")
    return maker


def build_model(
    config: ModelConfig,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    where: str = "model",
    remedy: str = "",
) -> DictModel:
    """Build a network for given inputs and outputs, and run it once.

    Args:
        config: a name that :func:`find_model` knows, ``package.module:name`` being a class or
            function that returns a module, and its arguments. A parameter called ``inputs``,
            ``outputs`` or ``num_classes`` is filled in unless the arguments set it.
        inputs: what the data deliver.
        outputs: the outputs that the task needs.
        where: the YAML section (``teacher``, ``student``), for errors.
        remedy: what to do about another number of outputs; empty: the usual.

    Raises:
        InputError: no such model, wrong arguments, or the network cannot take these inputs or
            does not have these outputs; both shapes are named.
    """
    if config.model is None:
        raise InputError("no model is named", where=where, remedy="add 'model: …'")
    position = f"{where}.model"
    maker = find_model(config.model, position)
    spec = ModelSpec(tuple(inputs), tuple(outputs))
    parameters = parameters_of(maker, position)
    available: dict[str, Any] = {"inputs": spec.inputs, "outputs": spec.outputs}
    if spec.outputs and spec.outputs[0].shape and isinstance(spec.outputs[0].shape[-1], int):
        available["num_classes"] = spec.outputs[0].shape[-1]
    filled = {
        key: value
        for key, value in available.items()
        if key in parameters and key not in config.args
    }
    name = f"model {config.model!r}"
    given = check_arguments(
        maker, config.args, supplied=tuple(filled), name=name, where=f"{where}.args"
    )
    try:
        module = maker(**filled, **given)
    except EdgekdError as error:
        raise InputError(error.what, where=error.where or position, remedy=error.remedy) from error
    except Exception as error:
        raise InputError(
            f"{name} fails when built: {type(error).__name__}: {error}",
            where=position,
            remedy="check its arguments",
        ) from error
    if not isinstance(module, nn.Module):
        raise InputError(
            f"{name} returns a {type(module).__name__}, not a torch module",
            where=position,
            remedy="name a subclass of torch.nn.Module, or a function that returns one",
        )
    try:
        model = DictModel(module, spec)
        probe(model, name, remedy)
    except EdgekdError as error:
        raise InputError(error.what, where=error.where or position, remedy=error.remedy) from error
    return model


def probe(model: DictModel, name: str = "the model", remedy: str = "") -> None:
    """Run a network on two empty samples; the network and the random state are unchanged.

    Raises:
        InputError: it cannot take its inputs, or an output has another shape than its spec.
    """
    batch = example_batch(model.spec.inputs)
    training = model.training
    taken = ", ".join(str(spec) for spec in model.spec.inputs)
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            answers: Mapping[str, Tensor] = model(batch)
    except EdgekdError:
        raise
    except Exception as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        raise InputError(
            f"{name} cannot take {taken}: {type(error).__name__}: {first_line}",
            remedy="make its layers fit these shapes, or change the data (data.image_size, "
            "data.args: {layout: …})",
        ) from error
    finally:
        model.train(training)
    for spec in model.spec.outputs:
        shape = answers[spec.name].shape
        if not fits(shape, spec) or shape[0] != 2:
            given = ", ".join(["batch", *map(str, shape[1:])]) if len(shape) else "one number"
            raise InputError(
                f"{name} gives {spec.name} [{given}] for {taken}, and the task needs "
                f"[{', '.join(map(str, spec.shape))}]",
                remedy=remedy
                or "give its last layer that size (a parameter named num_classes or outputs is "
                "filled in)",
            )


def example_batch(inputs: Sequence[TensorSpec]) -> dict[str, Tensor]:
    """Two empty samples of these inputs.

    Raises:
        InputError: an input has a type or a size that no tensor can have.
    """
    return {spec.name: _zeros(spec) for spec in inputs}


def _zeros(spec: TensorSpec) -> Tensor:
    sizes = [2, *(size if isinstance(size, int) else _OPEN_DIMENSION for size in spec.shape[1:])]
    dtype = getattr(torch, spec.dtype, None)
    if not isinstance(dtype, torch.dtype) or math.prod(sizes) == 0:
        raise InputError(
            f"no network can take {spec}", remedy="give the input a numeric type and a size"
        )
    return torch.zeros(sizes, dtype=dtype)
