"""Verify a bundle against its manifest: no file changed, missing or added.

Standard library only, so that it works before numpy or a runtime is installed.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from edgerun.errors import BadInput
from edgerun.files import sha256

MANIFEST = "manifest.json"


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
