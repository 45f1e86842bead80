"""Build a network from a model's name in a pipeline, and check its shapes.

The packages timm and transformers are extras. Their weights are loaded from the package's usual
location; a folder needs no network.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.config.networks import ModelConfig
from edgekd.errors import EdgekdError, InputError, nearest
from edgekd.extension import check_arguments, parameters_of, resolve
from edgekd.models.dict_model import DictModel, fits
from edgekd.models.families import MobileNet, Transformer
from edgekd.models.networks import ConvNet, Mlp, PolicyNetwork
from edgekd.spec import ModelSpec, TensorSpec

MODELS: dict[str, Callable[..., nn.Module]] = {
    "convnet-l": partial(
        ConvNet, widths=(16, 32, 64, 128), blocks=(1, 1, 1), stem_stride=1, residual=True
    ),
    "convnet-m": partial(ConvNet, widths=(16, 32, 64), blocks=(1, 1), stem_stride=1, residual=True),
    "convnet-s": partial(ConvNet, widths=(16, 24, 48), blocks=(0, 1), stem_stride=2),
    "convnet-xs": partial(ConvNet, widths=(8, 12, 24), blocks=(0, 0), stem_stride=2),
    "mlp": Mlp,
    "mobilenet": MobileNet,
    "policy-l": partial(PolicyNetwork, widths=(16, 32, 64), blocks=(1, 1), hidden=128),
    "policy-s": partial(PolicyNetwork, widths=(8, 16, 24), blocks=(0, 0), hidden=24),
    "transformer": Transformer,
}
"""The built-in networks by the names they have in a pipeline."""

_OPEN_DIMENSION = 4
"""The trial size of a symbolic dimension other than the batch."""


SUPPLIED = ("inputs", "outputs", "num_classes")
"""Parameters of a network's constructor that are filled in unless they are given."""


def find_model(name: str, where: str = "model") -> Callable[..., nn.Module]:
    """What makes the network of that name.

    It is a built-in one, ``timm:NAME``, ``transformers:NAME_OR_FOLDER``, an entry point of
    ``edgekd.models`` or a ``package.module:name``.

    Raises:
        InputError: there is none, the nearest name is suggested; or its package is not installed.
    """
    package, _, rest = name.partition(":")
    if package in HUBS and rest:
        return HUBS[package](rest, where)
    maker: Callable[..., nn.Module] = resolve(name, MODELS, "model", where, group="edgekd.models")
    return maker


def check_model(config: ModelConfig, where: str) -> None:
    """Check a network's name and arguments before there are data to build it for.

    Args:
        config: nothing is checked where it names no model.
        where: the YAML section (``teacher``, ``student``), for errors.

    Raises:
        InputError: no such model, or arguments that it does not take.
    """
    if config.model is None:
        return
    maker = find_model(config.model, f"{where}.model")
    supplied = [name for name in SUPPLIED if name not in config.args]
    name = f"model {config.model!r}"
    check_arguments(maker, config.args, supplied=supplied, name=name, where=f"{where}.args")


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
    inputs = ", ".join(str(spec) for spec in model.spec.inputs)
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            outputs: Mapping[str, Tensor] = model(batch)
    except EdgekdError:
        raise
    except Exception as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        raise InputError(
            f"{name} cannot take {inputs}: {type(error).__name__}: {first_line}",
            remedy="make its layers fit these shapes, or change the data (data.image_size, "
            "data.args: {layout: …})",
        ) from error
    finally:
        model.train(training)
    for spec in model.spec.outputs:
        shape = outputs[spec.name].shape
        if not fits(shape, spec) or shape[0] != 2:
            given = ", ".join(["batch", *map(str, shape[1:])]) if len(shape) else "one number"
            raise InputError(
                f"{name} gives {spec.name} [{given}] for {inputs}, and the task needs "
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


Maker = Callable[..., nn.Module]


def timm_model(name: str, where: str) -> Maker:
    """What makes a network with ``timm.create_model``.

    The arguments of a pipeline are ``pretrained`` (false) and all other arguments of the network,
    such as ``drop_rate`` or ``img_size``. Channels and classes are those of the data.

    Raises:
        InputError: timm is not installed, or has no such network.
    """
    timm = _package("timm", where)
    if ":" not in name and not timm.is_model(name):
        guess = nearest(name, timm.list_models())
        raise InputError(
            f"timm has no model {name!r}",
            where=where,
            remedy=f"did you mean 'timm:{guess}'?" if guess else "see timm.list_models()",
        )

    def create(
        inputs: Sequence[TensorSpec], num_classes: int, pretrained: bool = False, **args: Any
    ) -> nn.Module:
        image = _image(inputs)
        if image is None or len(inputs) != 1:
            raise InputError(
                f"a network of timm takes one image, and the data give {_listed(inputs)}",
                remedy="choose another model",
            )
        made: nn.Module = timm.create_model(
            name, pretrained=pretrained, num_classes=num_classes, in_chans=image.shape[1], **args
        )
        return made

    return create


def transformers_model(name: str, where: str) -> Maker:
    """What makes a classifier with the Auto classes of transformers.

    ``name`` is a folder with a ``config.json`` (absolute, or next to the pipeline file) or a name
    that the package knows. Images make it an ``AutoModelForImageClassification``, integer tokens
    (B, T), ``input_ids`` and perhaps ``attention_mask``, an
    ``AutoModelForSequenceClassification``. The arguments of a pipeline are ``pretrained`` (true:
    with the weights in that folder) and keys of its configuration, such as ``image_size``. The
    classes are those of the data; a head for another number of them is newly initialised.

    Raises:
        InputError: transformers is not installed.
    """
    transformers = _package("transformers", where)
    folder = find_folder(name)
    source = name if folder is None else str(folder)
    local = folder is not None

    def create(
        inputs: Sequence[TensorSpec], num_classes: int, pretrained: bool = True, **args: Any
    ) -> nn.Module:
        image = _image(inputs)
        # Its progress bar would overwrite the stage's.
        transformers.utils.logging.disable_progress_bar()
        channels: dict[str, Any] = {}
        tokens = [s for s in inputs if len(s.shape) == 2 and s.dtype.startswith("int")]
        if image is not None:
            auto = transformers.AutoModelForImageClassification
            channels = {"num_channels": image.shape[1]}
        elif tokens:
            auto = transformers.AutoModelForSequenceClassification
        else:
            raise InputError(
                "a network of transformers takes images or integer tokens, and the data give "
                f"{_listed(inputs)}",
                remedy="name the tokens input_ids and attention_mask",
            )
        try:
            config, unknown = transformers.AutoConfig.from_pretrained(
                source,
                local_files_only=local,
                return_unused_kwargs=True,
                num_labels=num_classes,
                **channels | args,
            )
            if odd := sorted(set(unknown) & set(args)):
                raise InputError(
                    f"the configuration of {name!r} has no {odd[0]!r}",
                    remedy=f"it has {', '.join(sorted(config.to_dict()))}",
                )
            if pretrained:
                made, report = auto.from_pretrained(
                    source,
                    config=config,
                    local_files_only=local,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
                _check_only_head_differs(report["mismatched_keys"], num_classes, name)
            else:
                made = auto.from_config(config)
        except OSError as error:
            first = str(error).strip().splitlines()[0]
            raise InputError(
                f"transformers cannot load {name!r}: {first}",
                remedy="give a folder with config.json and model.safetensors; or "
                "args: {pretrained: false} for fresh weights",
            ) from error
        network: nn.Module = made.float()
        return network

    return create


HUBS: Mapping[str, Callable[[str, str], Maker]] = {
    "timm": timm_model,
    "transformers": transformers_model,
}
"""By the word before the colon: from a name and its YAML key to what makes the network."""


def find_folder(name: str) -> Path | None:
    """The folder of a name: as given, or found next to the pipeline file, as modules are."""
    path = Path(name).expanduser()
    places = [path] if path.is_absolute() else [Path(entry) / path for entry in sys.path if entry]
    return next((place for place in places if (place / "config.json").is_file()), None)


def _package(name: str, where: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"the package {error.name!r} is not installed",
            where=where,
            remedy=f"pip install 'edgekd[{name}]'",
        ) from error
    except Exception as error:
        raise InputError(
            f"the package {name!r} fails when imported: {type(error).__name__}: {error}",
            where=where,
            remedy="install versions of it, torch and torchvision that belong together",
        ) from error


def _check_only_head_differs(
    mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]], classes: int, name: str
) -> None:
    """Raise InputError where weights of another shape than those stored are no head's."""
    for key, stored, needed in mismatched:
        if needed[0] != classes or list(stored[1:]) != list(needed[1:]):
            raise InputError(
                f"the weights of {name!r} do not fit: {key!r} is {list(stored)} there, and "
                f"{list(needed)} is needed",
                remedy="give data of the size and the channels it was trained for, or "
                "args: {pretrained: false}",
            )


def _image(inputs: Sequence[TensorSpec]) -> TensorSpec | None:
    return next((spec for spec in inputs if len(spec.shape) == 4), None)


def _listed(inputs: Sequence[TensorSpec]) -> str:
    return ", ".join(map(str, inputs))
