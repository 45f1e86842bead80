"""Whether a bundle still is what was packed. Nothing is unpacked and nothing in it is run."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any

from edgekd.errors import InputError

SCHEMA = "edgekd.bundle/1"
MANIFEST = "manifest.json"
_CHUNK = 1 << 20
_MANIFEST_BYTES = 64 << 20
"""More than any manifest: an archive must not fill the memory before it is found wrong."""


def verify_bundle(path: Path) -> list[str]:
    """Find every file of a bundle that is changed, missing or extra.

    In a folder, Python's own byte-code caches (``__pycache__``) are not extra: running the
    bundle makes them.

    Args:
        path: a bundle's folder, or its ``.tar.gz``.

    Returns:
        One line per problem; empty when the bundle is intact.

    Raises:
        InputError: there is no bundle at ``path``.
    """
    if path.is_dir():
        return _verify_folder(path)
    if not path.exists():
        raise InputError(
            "the bundle does not exist", where=str(path), remedy="give its folder or .tar.gz"
        )
    return _verify_archive(path)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return _digest(file)[0]


def _verify_folder(folder: Path) -> list[str]:
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise InputError(
            "this folder is not a bundle: it has no manifest.json",
            where=str(folder),
            remedy="give the folder that holds manifest.json, or the .tar.gz",
        )
    found: dict[str, tuple[str, int]] = {}
    problems = []
    for file in _walk(folder):
        name = file.relative_to(folder).as_posix()
        if file.is_symlink():
            problems.append(f"extra: {name} (a link, which a bundle never has)")
        elif not file.is_file():
            problems.append(f"extra: {name} (not a file)")
        elif name != MANIFEST:
            try:
                with file.open("rb") as content:
                    found[name] = _digest(content)
            except OSError as error:
                found[name] = ("", 0)
                problems.append(f"unreadable: {name} ({error.strerror})")
    return problems + _compare(manifest.read_bytes(), found)


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        linked = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in sorted([*files, *linked]):
            yield Path(parent) / name


def _verify_archive(path: Path) -> list[str]:
    manifest: bytes | None = None
    found: dict[str, tuple[str, int]] = {}
    problems: list[str] = []
    tops: set[str] = set()
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                if member.name.startswith("/") or ".." in parts:
                    problems.append(f"extra: {member.name} (it would be unpacked elsewhere)")
                    continue
                tops.update(parts[:1])
                if member.isdir():
                    continue
                name = "/".join(parts[1:])
                content = tar.extractfile(member) if member.isreg() else None
                if content is None or not name:
                    problems.append(f"extra: {member.name} (not a plain file in the bundle)")
                elif name in found or (name == MANIFEST and manifest is not None):
                    problems.append(f"extra: {name} (it is in the archive twice)")
                elif name == MANIFEST:
                    manifest = content.read(_MANIFEST_BYTES)
                else:
                    found[name] = _digest(content)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        if not found and manifest is None:
            raise InputError(
                f"this is not a .tar.gz bundle: {error}",
                where=str(path),
                remedy="give a bundle's folder or its .tar.gz",
            ) from error
        return [f"damaged: the archive breaks off or is corrupt ({error})"]
    if manifest is None:
        raise InputError(
            "this archive is not a bundle: it has no manifest.json",
            where=str(path),
            remedy="give the .tar.gz that the bundle stage wrote",
        )
    if len(tops) > 1:
        problems.append(f"extra: the archive has several folders: {', '.join(sorted(tops))}")
    return problems + _compare(manifest, found)


def _digest(content: IO[bytes]) -> tuple[str, int]:
    """The SHA-256 and the number of bytes of a stream."""
    digest, size = hashlib.sha256(), 0
    while chunk := content.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
    return digest.hexdigest(), size


def _compare(manifest: bytes, found: Mapping[str, tuple[str, int]]) -> list[str]:
    """Problems of the files found against those that the manifest lists."""
    try:
        content = json.loads(manifest)
        schema = content["schema"]
        listed = {name: _entry(entry) for name, entry in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"changed: {MANIFEST} cannot be read ({type(error).__name__}: {error})"]
    if schema != SCHEMA:
        return [f"changed: the schema of {MANIFEST} is {schema!r}, not {SCHEMA!r}"]
    problems = [] if listed else [f"changed: {MANIFEST} lists no file"]
    for name in sorted({*listed, *found}):
        if name not in found:
            problems.append(f"missing: {name}")
        elif name not in listed:
            problems.append(f"extra: {name}")
        elif found[name] != listed[name]:
            was, now = listed[name][1], found[name][1]
            sizes = f"{was:,} bytes, now {now:,}" if was != now else "same size, other content"
            problems.append(f"changed: {name} ({sizes})")
    return problems


def _entry(entry: Mapping[str, Any]) -> tuple[str, int]:
    return str(entry["sha256"]), int(entry["bytes"])
