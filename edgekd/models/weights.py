"""Weights on disk: safetensors, and state dicts of torch without their code."""

from __future__ import annotations

import contextlib
import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from edgekd.errors import InputError, StageError
from edgekd.models.named import NamedModel

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights", "params")
_PREFIXES = ("module.", "model.", "_orig_mod.", "net.")
_SCALING = ("@output_scale", "@output_offset")
_SHOWN = 4
"""How many keys of a kind an error lists."""


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the weights and buffers as safetensors, at once or not at all.

    The keys are those of the network itself: a :class:`NamedModel` is looked into. How it scales
    its output, if it does, is beside them under keys that no network has.

    Raises:
        StageError: the file cannot be written (full disk, no permission).
    """
    tensors = {
        key: tensor.detach().cpu().contiguous().clone()
        for key, tensor in {**_inner(model).state_dict(), **output_scaling(model)}.items()
    }
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(save(tensors, {"format": "pt"}))
        os.replace(partial, path)  # noqa: PTH105 - os.replace says that it is atomic
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise StageError(
            f"the weights cannot be written: {error.strerror or error}",
            where=str(path),
            remedy="make room on the disk, or give a folder that can be written to",
        ) from error


def load_weights(
    model: nn.Module, path: Path, allow_pickle: bool = False, where: str | None = None
) -> None:
    """Fill a network from a file.

    Takes ``.safetensors``, and ``.pt``/``.pth``/``.bin``/``.ckpt`` files of tensors. A state dict
    inside a mapping (``state_dict``, ``model``, …) is found, and a prefix that all keys have
    from a wrapper (``module.``, ``model.``, ``_orig_mod.``) is taken off.

    Args:
        model: the network; a :class:`NamedModel` is looked into.
        path: the file.
        allow_pickle: also run the code that a pickle contains. Only for files you trust.
        where: the YAML key, for errors.

    Raises:
        InputError: no such file, a truncated one, a pickle that needs code, or weights that do
            not fit: missing, unexpected and mis-shaped keys are listed with their shapes.
    """
    place = f"{where}: {path}" if where else str(path)
    if not path.is_file():
        raise InputError("the checkpoint does not exist", where=place, remedy="check the path")
    if path.suffix == ".safetensors":
        state = _read_safetensors(path, place)
    elif path.suffix in _TORCH_SUFFIXES:
        state = _state_dict_in(_read_torch(path, allow_pickle, place), place)
    else:
        raise InputError(
            f"a checkpoint cannot be a {path.suffix or 'file without a suffix'}",
            where=place,
            remedy=f"give .safetensors or {', '.join(_TORCH_SUFFIXES[:4])}",
        )
    scaling = [state.pop(key, None) for key in _SCALING]
    network = _inner(model)
    wanted = network.state_dict()
    state = _without_prefix(state, wanted)
    _check_fit(state, wanted, place)
    for key, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"the checkpoint's {key!r} holds NaN or infinity",
                where=place,
                remedy="give a checkpoint from before the training diverged",
            )
    network.load_state_dict(state, strict=False)
    if isinstance(model, NamedModel):
        model.scale_output(*scaling)


def output_scaling(model: nn.Module) -> dict[str, Tensor]:
    """How a :class:`NamedModel` scales its output, by the keys of a file; empty: it does not."""
    if not isinstance(model, NamedModel):
        return {}
    values = zip(_SCALING, (model.output_scale, model.output_offset), strict=True)
    return {key: tensor for key, tensor in values if tensor is not None}


def _inner(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, NamedModel) else model


def _read_safetensors(path: Path, place: str) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise InputError(
            f"this is not a whole safetensors file: {error}",
            where=place,
            remedy="copy or download it again; it may have been cut off",
        ) from error
    return state


def _read_torch(path: Path, allow_pickle: bool, place: str) -> object:
    try:
        with warnings.catch_warnings():
            # What torch warns of here is what the errors below say more clearly.
            warnings.simplefilter("ignore", UserWarning)
            content: object = torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        if allow_pickle or not _needs_code(path, error):
            raise _damaged(error, place) from error
        raise InputError(
            "this checkpoint is a pickle that would run code when it is loaded; refused",
            where=place,
            remedy="save tensors only: torch.save(model.state_dict(), …) or safetensors; if you "
            "trust the file, write 'allow_pickle: true'",
        ) from error
    except (EOFError, zipfile.BadZipFile, OSError, ValueError, KeyError, IndexError) as error:
        raise _damaged(error, place) from error
    except RuntimeError as error:
        if "TorchScript" in str(error):
            raise InputError(
                "this is a TorchScript archive, not a state dict",
                where=place,
                remedy="save torch.jit.load(…).state_dict(), or export it to ONNX",
            ) from error
        raise _damaged(error, place) from error
    except (ImportError, AttributeError, TypeError) as error:
        raise InputError(
            f"this pickle needs code that is not here: {error}",
            where=place,
            remedy="save its state dict where that code is, and give that",
        ) from error
    return content


def _needs_code(path: Path, error: pickle.UnpicklingError) -> bool:
    """Whether loading failed because of code, and not because the file is damaged."""
    return "Unsupported" in str(error) or "GLOBAL" in str(error) or zipfile.is_zipfile(path)


def _damaged(error: Exception, place: str) -> InputError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return InputError(
        f"the checkpoint cannot be read: {reason[:200]}",
        where=place,
        remedy="copy or download it again; it may have been cut off",
    )


def _state_dict_in(content: object, place: str) -> dict[str, Tensor]:
    """The state dict in what a file held, out of its wrapper if it has one."""
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if isinstance(content, Mapping):
        for key in _WRAPPERS:
            inner = content.get(key)
            if isinstance(inner, nn.Module):
                return dict(inner.state_dict())
            if isinstance(inner, Mapping) and inner:
                return _state_dict_in(inner, place)
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return {str(key): value for key, value in content.items()}
        held = f"a mapping with {', '.join(map(str, list(content)[:6])) or 'nothing in it'}"
    else:
        held = f"a {type(content).__name__}"
    raise InputError(
        f"the checkpoint holds no state dict but {held}",
        where=place,
        remedy="save torch.save(model.state_dict(), …)",
    )


def _without_prefix(state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off wrappers' prefixes for as long as every key has one and none is wanted so."""
    while state and not state.keys() & wanted.keys():
        prefix = next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            return state
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def _check_fit(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], place: str) -> None:
    # A count of batches that nothing reads; files from before torch had it lack it.
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in wanted]
    misshaped = [k for k in wanted if k in state and state[k].shape != wanted[k].shape]
    if not (missing or unexpected or misshaped):
        return
    lines = [
        _listed("missing", [f"{k} {list(wanted[k].shape)}" for k in missing]),
        _listed("unexpected", [f"{k} {list(state[k].shape)}" for k in unexpected]),
        _listed(
            "of another shape",
            [
                f"{k} {list(state[k].shape)}, the model has {list(wanted[k].shape)}"
                for k in misshaped
            ],
        ),
    ]
    raise InputError(
        "the checkpoint does not fit the model:" + "".join(lines),
        where=place,
        remedy="give the model and arguments it was trained with; a last layer of another size "
        "means another number of classes"
        if misshaped and not missing and not unexpected
        else "give the model and arguments it was trained with",
    )


def _listed(kind: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f"; and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"\n  {len(keys)} {kind}: {'; '.join(keys[:_SHOWN])}{more}"
