"""When is a stage's result still good: hashes of configuration, inputs, code and libraries."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from edgekd.extension import is_reference, source_files
from edgekd.pipeline.dependencies import ROOTS, code_of, files_of


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def json_sha256(value: Any) -> str:
    """The SHA-256 of a JSON value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache
def code_sha256(modules: tuple[str, ...]) -> str:
    """The SHA-256 over the source of these modules and of all code that theirs depends on.

    Which that is, :func:`~edgekd.pipeline.dependencies.code_of` reads from their imports. To read
    all of it takes a second, so the result is cached for as long as no file has changed.
    """
    name = " ".join(modules)
    state = all_code_sha256()
    cached = _cached_hashes(state)
    if name not in cached:
        digest = hashlib.sha256()
        for module in code_of(modules):
            for file in files_of(module):
                digest.update(f"{module} {file.name}\0".encode())
                digest.update(file.read_bytes())
        cached[name] = digest.hexdigest()
        _cache_hashes(state, cached)
    return cached[name]


@lru_cache
def all_code_sha256() -> str:
    """The SHA-256 of every file of edgekd and edgerun, and of the Python that reads them."""
    digest = hashlib.sha256(sys.version.encode())
    for root in ROOTS.values():
        for file in sorted(root.rglob("*")):
            if file.is_file() and file.suffix != ".pyc":
                digest.update(f"{file.relative_to(root)}\0".encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _hashes_file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "edgekd" / "code.json"


def _cached_hashes(state: str) -> dict[str, str]:
    """The hashes noted for this state of the code; empty when there are none to be read."""
    try:
        noted = json.loads(_hashes_file().read_text(encoding="utf-8"))
        hashes = noted["hashes"] if noted["state"] == state else {}
        return {str(name): str(value) for name, value in hashes.items()}
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _cache_hashes(state: str, hashes: Mapping[str, str]) -> None:
    """Note the hashes where that is possible; they are only there to save time."""
    with suppress(OSError, RuntimeError):
        file = _hashes_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{os.getpid()}-{file.name}")
        partial.write_text(json.dumps({"state": state, "hashes": hashes}), encoding="utf-8")
        partial.replace(file)


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """Installed versions by distribution name, read without importing anything."""
    return {name: importlib.metadata.version(name) for name in names}


def references_sha256(value: Any) -> dict[str, str]:
    """Hashes of the user's own source files named by ``package.module:name`` inside a value."""
    hashes: dict[str, str] = {}
    for text in _texts(value):
        if is_reference(text):
            for file in source_files(text):
                hashes[f"{text} {file.name}"] = file_sha256(file)
    return hashes


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _texts(key)
            yield from _texts(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _texts(entry)
