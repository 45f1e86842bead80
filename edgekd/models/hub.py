"""Networks of the packages timm and transformers, by name: ``timm:resnet18``.

Both packages are extras. Weights are loaded from the package's usual location; a folder needs no
network.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from edgekd.errors import InputError, nearest
from edgekd.spec import TensorSpec

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
    for key, stored, wanted in mismatched:
        if wanted[0] != classes or list(stored[1:]) != list(wanted[1:]):
            raise InputError(
                f"the weights of {name!r} do not fit: {key!r} is {list(stored)} there, and "
                f"{list(wanted)} is needed",
                remedy="give data of the size and the channels it was trained for, or "
                "args: {pretrained: false}",
            )


def _image(inputs: Sequence[TensorSpec]) -> TensorSpec | None:
    return next((spec for spec in inputs if len(spec.shape) == 4), None)


def _listed(inputs: Sequence[TensorSpec]) -> str:
    return ", ".join(map(str, inputs))
