"""The files that a model consists of: an engine, or an ONNX file and those with its weights."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

ENGINE_SUFFIXES = (".engine", ".plan", ".trt")

# A tensor names its weight file in an entry {key: "location", value: NAME} of the protobuf:
# field 1 of 8 bytes, then field 2 with the name's length (one byte, or two from 128 on).
_LOCATION = re.compile(rb"\n\x08location\x12([\x01-\x7f]|[\x80-\xff][\x01-\x7f])", re.DOTALL)


def is_engine(path: Path) -> bool:
    """Whether a file is a TensorRT engine, by its suffix."""
    return path.suffix.lower() in ENGINE_SUFFIXES


def model_files(path: Path) -> list[Path]:
    """The model's file, and those beside an ONNX file that hold its weights, in order of use."""
    if is_engine(path):
        return [path]
    content = path.read_bytes()
    found: dict[Path, None] = {path: None}
    for match in _LOCATION.finditer(content):
        length = match.group(1)
        size = length[0] & 0x7F | (length[1] << 7 if len(length) == 2 else 0)
        name = content[match.end() : match.end() + size]
        # The pattern could also occur inside weights; only a file that is there counts.
        beside = path.parent / name.decode("utf-8", errors="replace").replace("\0", "?")
        if beside.is_file():
            found[beside] = None
    return list(found)


def describe_files(path: Path) -> dict[str, Any]:
    """``sha256`` of the model's file, ``size_bytes`` of all, and ``files``, one entry each."""
    parts = model_files(path)
    return {
        "sha256": sha256(path),
        "size_bytes": sum(part.stat().st_size for part in parts),
        "files": [
            {"path": str(part), "sha256": sha256(part), "bytes": part.stat().st_size}
            for part in parts
        ],
    }


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
