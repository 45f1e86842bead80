"""A bundle's ``manifest.json``: what running its model needs, and whether its files are intact."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Mapping

from edgerun.errors import BadInput
from edgerun.files import sha256

if TYPE_CHECKING:
    import numpy as np

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
    axis: int | None = None

    def apply(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The preprocessed array, float32, of the same shape.

        Raises:
            BadInput: the constants do not fit the array's channels.
        """
        import numpy as np  # verify must work without it

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


@dataclass(frozen=True)
class Verdict:
    """Relative paths of files that are not as the manifest lists them."""

    checked: int
    changed: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]

    @property
    def intact(self) -> bool:
        """Whether every listed file is there unchanged and nothing else is."""
        return not (self.changed or self.missing or self.extra)

    def lines(self) -> list[str]:
        """One line per difference, or one line for an intact bundle."""
        if self.intact:
            return [f"intact: {self.checked} files"]
        return [
            *(f"changed: {name}" for name in self.changed),
            *(f"missing: {name}" for name in self.missing),
            *(f"extra: {name}" for name in self.extra),
        ]


def verify(folder: Path) -> Verdict:
    """Compare the files of a folder with its ``manifest.json``.

    The manifest itself and ``__pycache__`` folders are excluded. A link counts as changed: its
    target is elsewhere and may change there.

    Raises:
        BadInput: no folder, no manifest, or one that cannot be read.
    """
    listed = _listed(folder)
    found = _files(folder)
    changed = [name for name in listed if name in found and not _same(folder / name, listed[name])]
    return Verdict(
        checked=len(listed),
        changed=tuple(sorted(changed)),
        missing=tuple(sorted(set(listed) - found)),
        extra=tuple(sorted(found - set(listed))),
    )


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    if not folder.is_dir():
        raise BadInput("there is no such folder", str(folder), "give the bundle's folder")
    path = folder / MANIFEST
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        listed = {str(k): {"sha256": v["sha256"], "bytes": v["bytes"]} for k, v in files.items()}
    except FileNotFoundError as error:
        raise BadInput(
            f"there is no {MANIFEST}", str(folder), "give the folder that an edgekd bundle made"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"the manifest cannot be read: {type(error).__name__}: {error}",
            where=str(path),
            remedy="get the bundle again",
        ) from error
    for name in listed:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or str(parts) != name:
            raise BadInput(
                f"the manifest lists {name!r}, which is not a plain path inside the bundle",
                where=str(path),
                remedy="do not use this bundle",
            )
    return listed


def _files(folder: Path) -> set[str]:
    found = set()
    for root, folders, names in os.walk(str(folder)):
        links = [name for name in folders if Path(root, name).is_symlink()]
        folders[:] = [name for name in folders if name != "__pycache__" and name not in links]
        for name in [*names, *links]:
            found.add(Path(root, name).relative_to(folder).as_posix())
    found.discard(MANIFEST)
    return found


def _same(path: Path, listed: dict[str, Any]) -> bool:
    if path.is_symlink() or not path.is_file() or path.stat().st_size != listed["bytes"]:
        return False
    return sha256(path) == str(listed["sha256"])
