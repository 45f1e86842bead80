"""Read a bundle's ``manifest.json``: its model's inputs and outputs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping, Optional

import numpy as np

from edgerun.errors import BadInput

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Preprocess:
    """``(x * scale - mean) / std`` in float32.

    ``mean`` and ``std`` contain one value for all, or one per channel or feature, along
    ``axis`` of the batch; without it along axis 1 of images (N, C, H, W) and the last of others.
    The steps and their order are those of training, so that the values are
    bit-exact.
    """

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    axis: Optional[int] = None

    def apply(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The preprocessed array, float32, of the same shape.

        Raises:
            BadInput: the constants do not fit the array's channels.
        """
        axis = self.axis or (1 if array.ndim == 4 else array.ndim - 1)
        tail = (1,) * (array.ndim - 1 - axis)
        values = array.astype(np.float32)
        values *= np.float32(self.scale)
        try:
            values -= np.asarray(self.mean, np.float32).reshape(-1, *tail)
            values /= np.asarray(self.std, np.float32).reshape(-1, *tail)
        except ValueError as error:
            raise BadInput(
                f"preprocessing for {len(self.mean)} channels does not fit data of shape "
                f"{array.shape}",
                where=MANIFEST,
                remedy="give samples in the layout that the manifest declares",
            ) from error
        return values


@dataclass(frozen=True)
class Manifest:
    """The part of a manifest that running the model needs."""

    path: Path
    model: str | None = None
    preprocess: Mapping[str, Preprocess] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    files: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model_path(self) -> Path | None:
        """The model file, next to the manifest."""
        return self.path.parent / self.model if self.model else None


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        BadInput: it is missing or not a manifest.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(
            path=path,
            model=_model_file(value),
            preprocess={
                str(name): _preprocess(constants)
                for name, constants in (value.get("preprocess") or {}).items()
            },
            labels=tuple(map(str, value["labels"])) if value.get("labels") else None,
            files=dict(value.get("files") or {}),
        )
    except FileNotFoundError as error:
        raise BadInput("there is no manifest", str(path), "give a bundle's folder") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"the manifest cannot be read: {type(error).__name__}: {error}",
            where=str(path),
            remedy="unpack the bundle again",
        ) from error


def manifest_beside(model: Path) -> Manifest | None:
    """The manifest of the bundle that contains the model, if it lists the model."""
    path = model.resolve().parent / MANIFEST
    if not path.is_file():
        return None
    try:
        listed = model.name in (json.loads(path.read_text(encoding="utf-8")).get("files") or {})
    except (OSError, ValueError, AttributeError, TypeError):
        # Other programs write a manifest.json too; one that does not list the model is not ours.
        return None
    return read_manifest(path) if listed else None


def _model_file(value: Mapping[str, Any]) -> str | None:
    model = value.get("model")
    name = model.get("file") if isinstance(model, dict) else model
    return None if name is None else str(name)


def _preprocess(constants: Mapping[str, Any]) -> Preprocess:
    def numbers(key: str, default: float) -> tuple[float, ...]:
        value = constants.get(key, default)
        return tuple(map(float, value)) if isinstance(value, (list, tuple)) else (float(value),)

    axis = constants.get("axis")
    return Preprocess(
        float(constants.get("scale", 1.0)),
        numbers("mean", 0.0),
        numbers("std", 1.0),
        None if axis is None else int(axis),
    )
