"""When is a stage's result still good: hashes of configuration, inputs, code and libraries."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from edgekd.extension import is_reference, source_files
from edgekd.pipeline.dependencies import code_of, files_of


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

    Which that is, :func:`~edgekd.pipeline.dependencies.code_of` reads from their imports.
    """
    digest = hashlib.sha256()
    for module in code_of(modules):
        for file in files_of(module):
            digest.update(f"{module} {file.name}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


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
