"""Weights on disk: safetensors and state dicts of torch without their code, and class names."""

from __future__ import annotations

import argparse
import ast
import codecs
import json
import pathlib
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from edgekd.errors import InputError
from edgekd.files import require_regular_file, write_whole
from edgekd.models.dict_model import DictModel
from edgekd.models.state_dicts import find_state
from edgerun.limits import limited_memory

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".tar", ".th")
_HARMLESS = [
    argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath, codecs.encode,
    np.dtype, np.ndarray, np.float64(0).__reduce__()[0],
    *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"},
]  # fmt: skip
"""Types that many checkpoints contain besides weights, and whose loading runs no code."""
_UNREADABLE = (
    EOFError, zipfile.BadZipFile, OSError, ValueError, KeyError, IndexError, OverflowError,
    MemoryError, AssertionError, struct.error,
)  # fmt: skip
"""What torch raises for a damaged file, besides UnpicklingError and RuntimeError."""
_UNKNOWN = (ImportError, AttributeError, TypeError)
"""What it raises for a name that is not there."""
_LARGE, _RATIO = 100_000_000, 10
"""An archive of more than these bytes unpacked, and this many times its size, is refused."""
_LARGEST_REST = 1 << 30
"""Bytes that reading a checkpoint may need in addition to three times its file."""
_LARGEST_HEADER = 8 << 20
"""Bytes of the names and shapes in a safetensors file; read, they need thirty times as many."""
_SCALING = ("@output_scale", "@output_offset")


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the weights and buffers as safetensors, at once or not at all.

    The keys are those of the network itself: a :class:`DictModel` is looked into. How it scales
    its output, if any, is stored with them under keys that no network has.

    Raises:
        StageError: the file cannot be written (full disk, no permission).
    """
    tensors = {
        key: tensor.detach().cpu().contiguous().clone()
        for key, tensor in {**_inner(model).state_dict(), **output_scaling(model)}.items()
    }
    write_whole(path, save(tensors, {"format": "pt"}), "the weights")


@dataclass(frozen=True)
class Checkpoint:
    """The content of a file of weights.

    Attributes:
        content: a mapping, possibly nested, or a module.
        metadata: the texts of a safetensors file.
        place: the file with its YAML key, for errors.
        section: the YAML section it is named in.
    """

    content: object
    metadata: Mapping[str, str]
    place: str
    section: str

    def class_names(self) -> ClassNames | None:
        """The classes of the network's outputs, where the file names them."""
        return class_names_in_metadata(self.metadata) or class_names_in(self.content)


def read_checkpoint(path: Path, allow_pickle: bool = False, where: str | None = None) -> Checkpoint:
    """Read ``.safetensors``, or ``.pt``, ``.pth``, ``.bin``, ``.ckpt`` and the like of torch.

    Args:
        path: the file.
        allow_pickle: also run the code that a pickle contains. Only for files you trust.
        where: the YAML key, for errors.

    Raises:
        InputError: no such file, a truncated one, or a pickle that needs code.
    """
    place = f"{where}: {path}" if where else str(path)
    require_regular_file(path, "give a checkpoint")
    if not path.is_file():
        raise InputError("the checkpoint does not exist", where=place, remedy="check the path")
    metadata: dict[str, str] = {}
    content: object
    if path.suffix == ".safetensors":
        content, metadata = _read_safetensors(path, place)
    elif path.suffix in _TORCH_SUFFIXES:
        content = _read_torch(path, allow_pickle, place)
    else:
        raise InputError(
            f"a checkpoint cannot be a {path.suffix or 'file without a suffix'}",
            where=place,
            remedy=f"give .safetensors or {', '.join(_TORCH_SUFFIXES[:4])}",
        )
    section = (where or "teacher.checkpoint").rpartition(".")[0]
    return Checkpoint(content, metadata, place, section)


def load_weights(
    model: nn.Module,
    path: Path | Checkpoint,
    allow_pickle: bool = False,
    where: str | None = None,
    *,
    key: str | None = None,
    prefix: str | None = None,
) -> list[str]:
    """Fill a network from a file; see :func:`edgekd.models.state_dicts.find_state`.

    Args:
        model: the network; a :class:`DictModel` is looked into.
        path: the file, or its content.
        allow_pickle: also run the code that a pickle contains. Only for files you trust.
        where: the YAML key, for errors.
        key: the mapping of the file to use, where several have this network's weights.
        prefix: what its keys begin with, where several sets of keys would do.

    Returns:
        Notes on the choice among the file's tensors.

    Raises:
        InputError: as :func:`read_checkpoint`; or weights that do not fit (missing, unexpected
            and mis-shaped keys are listed with their shapes), that are there more than once, or
            that hold NaN or infinity.
    """
    read = path if isinstance(path, Checkpoint) else read_checkpoint(path, allow_pickle, where)
    network, content = _inner(model), read.content
    scaling: dict[str, Tensor] = {}
    if isinstance(content, Mapping):
        scaling = {name: content[name] for name in _SCALING if name in content}
        content = {name: value for name, value in content.items() if name not in scaling}
    state, notes = find_state(content, network.state_dict(), read.place, read.section, key, prefix)
    for name, tensor in state.items():
        if tensor.is_complex() or tensor.layout != torch.strided or tensor.is_quantized:
            raise InputError(
                f"the checkpoint's {name!r} is {tensor.layout} {tensor.dtype}, not plain numbers",
                where=read.place,
                remedy="save it as a dense tensor of float32",
            )
        # torch cannot compare 8-bit floats.
        wide = tensor.float() if tensor.is_floating_point() else tensor
        if not bool(torch.isfinite(wide).all()):
            raise InputError(
                f"the checkpoint's {name!r} holds NaN or infinity",
                where=read.place,
                remedy="give a checkpoint from before the training diverged",
            )
    network.load_state_dict(state, strict=False)
    if isinstance(model, DictModel):
        model.scale_output(*(scaling.get(name) for name in _SCALING))
    return notes


def output_scaling(model: nn.Module) -> dict[str, Tensor]:
    """How a :class:`DictModel` scales its output, by the keys of a file; empty: it does not."""
    if not isinstance(model, DictModel):
        return {}
    values = zip(_SCALING, (model.output_scale, model.output_offset), strict=True)
    return {key: tensor for key, tensor in values if tensor is not None}


def _inner(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DictModel) else model


def _read_safetensors(path: Path, place: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with path.open("rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    if _LARGEST_HEADER < header < path.stat().st_size:
        raise InputError(
            f"the file's header has {header:,} bytes, and {_LARGEST_HEADER:,} are the most",
            where=place,
            remedy="save fewer tensors: the largest networks need a tenth of that",
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = dict(file.metadata() or {})
            names: list[str] = file.keys()
            state: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, *_UNREADABLE, *_UNKNOWN) as error:
        raise InputError(
            f"this is not a complete safetensors file: {error}",
            where=place,
            remedy="copy or download it again; it may be truncated",
        ) from error
    # safetensors stores tensors that share their memory once, and notes the other names.
    shared = {k: state[v] for k, v in metadata.items() if v in state and k not in state}
    return state | shared, metadata


def _read_torch(path: Path, allow_pickle: bool, place: str) -> object:
    _refuse_bomb(path, place)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_HARMLESS):
            # Suppresses torch's warnings: the errors below are clearer.
            warnings.simplefilter("ignore", UserWarning)
            # A pickle of few bytes may ask for any number of them; what it holds besides its
            # tensors, which are not packed, is small.
            most = None if allow_pickle else _LARGEST_REST + 3 * path.stat().st_size
            with limited_memory("the checkpoint", place, InputError, most):
                content: object = torch.load(
                    path, map_location="cpu", weights_only=not allow_pickle
                )
    except pickle.UnpicklingError as error:
        if allow_pickle or not _needs_code(path, error):
            raise _damaged(error, place) from error
        raise InputError(
            "this checkpoint is a pickle that would run code when it is loaded; refused",
            where=place,
            remedy="save tensors only: torch.save(model.state_dict(), …) or safetensors; if you "
            "trust the file, write 'allow_pickle: true'",
        ) from error
    except _UNREADABLE as error:
        raise _damaged(error, place) from error
    except RuntimeError as error:
        if "TorchScript" in str(error):
            raise InputError(
                "this is a TorchScript archive, not a state dict",
                where=place,
                remedy="save torch.jit.load(…).state_dict(), or export it to ONNX",
            ) from error
        raise _damaged(error, place) from error
    except _UNKNOWN as error:
        raise InputError(
            f"this pickle needs code that is not here: {error}",
            where=place,
            remedy="save its state dict where that code is, and give that",
        ) from error
    return content


def _refuse_bomb(path: Path, place: str) -> None:
    """Refuse an archive that is far larger unpacked; torch does not compress its own."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return  # A pickle, or a damaged archive, which torch reports.
    if size > _LARGE and size > _RATIO * path.stat().st_size:
        raise InputError(
            f"the checkpoint has {path.stat().st_size:,} bytes, and {size:,} unpacked",
            where=place,
            remedy="save it again with torch.save, which does not compress",
        )


def _needs_code(path: Path, error: pickle.UnpicklingError) -> bool:
    """Whether loading failed because of code, and not because the file is damaged."""
    return "Unsupported" in str(error) or "GLOBAL" in str(error) or zipfile.is_zipfile(path)


def _damaged(error: Exception, place: str) -> InputError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return InputError(
        f"the checkpoint cannot be read: {reason[:200]}",
        where=place,
        remedy="copy or download it again; it may be truncated",
    )


_KEYS = (
    "class_to_idx", "idx_to_class", "id2label", "label2id", "classes", "class_names", "names",
    "labels", "label_names", "classnames", "categories", "CLASSES", "class_labels",
)  # fmt: skip
_CONTAINERS = (
    "hyper_parameters", "hparams", "config", "cfg", "args", "opt", "meta", "metadata",
    "dataset_meta", "info", "extra", "data",
)  # fmt: skip
"""Keys under which trainers store them; the first one found is used."""

_NESTING = 3


@dataclass(frozen=True)
class ClassNames:
    """The classes of a network's outputs in their order, and where that is written."""

    names: tuple[str, ...]
    source: str


def class_names_in(content: object, nesting: int = _NESTING) -> ClassNames | None:
    """The class names in a checkpoint's content next to its weights; None without any."""
    held = content if isinstance(content, Mapping) else getattr(content, "__dict__", None)
    if not isinstance(held, Mapping):
        return None
    for key in _KEYS:
        names = _as_names(held.get(key))
        if names is not None:
            return ClassNames(names, key)
    for key in _CONTAINERS if nesting else ():
        found = class_names_in(held.get(key), nesting - 1)
        if found is not None:
            return ClassNames(found.names, f"{key}.{found.source}")
    return None


def class_names_in_metadata(metadata: Mapping[str, str]) -> ClassNames | None:
    """The class names in the texts of an ONNX or safetensors file: JSON, a Python literal (as
    Ultralytics writes them), one to a line, or separated by commas."""
    for key in _KEYS:
        names = _as_names(_parsed(metadata[key])) if key in metadata else None
        if names is not None:
            return ClassNames(names, key)
    return None


def _as_names(value: Any) -> tuple[str, ...] | None:
    """Names in their order: of a list, or of a mapping from or to numbers 0 to K - 1."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        pairs = list(value.items())
        if all(isinstance(v, int) for _, v in pairs):
            pairs = [(v, k) for k, v in pairs]
        try:
            numbered = {int(number): name for number, name in pairs}
        except (TypeError, ValueError):
            return None
        if sorted(numbered) != list(range(len(pairs))):
            return None
        value = [numbered[number] for number in range(len(pairs))]
    if not isinstance(value, list | tuple) or len(value) < 2:
        return None
    if not all(isinstance(name, str) for name in value) or len(set(value)) < len(value):
        return None
    # The placeholder names of transformers.
    if all(re.fullmatch(r"LABEL_\d+", name) for name in value):
        return None
    return tuple(value)


def _parsed(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    lines = [line.strip() for line in text.strip().splitlines()]
    return lines if len(lines) > 1 else [part.strip() for part in text.split(",")]
