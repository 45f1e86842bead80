"""A bundle's ``manifest.json``: what running its model needs, and whether its files are intact."""

from __future__ import annotations

import json
import os
import stat
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Mapping, Set, Tuple

from edgerun.errors import BadInput, printable
from edgerun.files import read_json, sha256

if TYPE_CHECKING:
    import numpy as np

MANIFEST = "manifest.json"
BUNDLE_SCHEMA = "edgekd.bundle/1"
MAX_MEMBERS, MAX_BYTES, MAX_MANIFEST, MAX_NAME = 10_000, 16 << 30, 64 << 20, 1024
"""Limits of a bundle, and of the bytes of its manifest and of a name: what is larger is refused
before it takes the time or the memory.
"""


@dataclass(frozen=True)
class InputPreprocessing:
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
    preprocess: Mapping[str, InputPreprocessing] = field(default_factory=dict)
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
        value = read_json(path)
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
    path = Path(os.path.realpath(model)).parent / MANIFEST
    if not path.is_file():
        return None
    try:
        listed = model.name in (read_json(path).get("files") or {})
    except (OSError, ValueError, AttributeError, TypeError):
        # Other programs write a manifest.json too; one that does not list the model is not ours.
        return None
    return read_manifest(path) if listed else None


def _model_file(value: Mapping[str, Any]) -> str | None:
    model = value.get("model")
    name = model.get("file") if isinstance(model, dict) else model
    return None if name is None else str(name)


def _preprocess(constants: Mapping[str, Any]) -> InputPreprocessing:
    def numbers(key: str, default: float) -> tuple[float, ...]:
        value = constants.get(key, default)
        return tuple(map(float, value)) if isinstance(value, (list, tuple)) else (float(value),)

    axis = constants.get("axis")
    return InputPreprocessing(
        float(constants.get("scale", 1.0)),
        numbers("mean", 0.0),
        numbers("std", 1.0),
        None if axis is None else int(axis),
    )


@dataclass(frozen=True)
class Verification:
    """Whether a bundle is what was packed: the number of files listed, and one line a problem."""

    listed: int
    problems: Tuple[str, ...]

    @property
    def intact(self) -> bool:
        """Whether every listed file is there unchanged and nothing else is."""
        return not self.problems


def verify(bundle: Path) -> Verification:
    """Compare a bundle's files with its ``manifest.json``; nothing is unpacked or run.

    Nothing else may be there, byte code and empty folders included, as Python would import it. A
    link, a device, a file that anyone may change or that runs as its owner, and a name that is no
    plain path inside the bundle are problems wherever they are.

    Args:
        bundle: its folder, or its ``.tar.gz``.

    Raises:
        BadInput: there is no bundle.
    """
    if bundle.is_dir():
        found = _in_folder(bundle)
    elif bundle.is_file():
        found = _in_archive(bundle)
    else:
        raise BadInput("there is no such bundle", str(bundle), "give its folder or its .tar.gz")
    listed: Dict[str, Tuple[str, int]] = {}
    problems = found.problems
    try:
        listed = _listed(found.manifest, problems)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problems.append(f"changed: {MANIFEST} cannot be read ({type(error).__name__}: {error})")
    else:
        problems += _differences(listed, found)
    return Verification(
        len(listed), tuple(printable(line).replace("\n", "\\n") for line in problems)
    )


@dataclass
class _Found:
    """What a bundle holds: SHA-256 and bytes by name, None for what is no plain file."""

    manifest: bytes = b""
    files: Dict[str, Tuple[str, int] | None] = field(default_factory=dict)
    folders: Set[str] = field(default_factory=set)
    problems: List[str] = field(default_factory=list)
    total: int = 0

    def add(self, name: str, mode: int, size: int, open_file: Callable[[], IO[bytes]]) -> bool:
        """Check one member and hash it; False when the limits are reached.

        Args:
            mode: type and permissions, as ``stat`` gives them.
            open_file: called only for a plain file.
        """
        self.total += size
        if len(self.files) + len(self.folders) >= MAX_MEMBERS or self.total > MAX_BYTES:
            limits = f"{MAX_MEMBERS:,} members or {MAX_BYTES >> 30} GiB"
            self.problems.append(f"refused: more than {limits}; what follows is not read")
            return False
        if reason := _not_plain(name):
            self.problems.append(f"refused: {name[:80]} ({reason})")
            return True
        if mode & (stat.S_ISUID | stat.S_ISGID) and not stat.S_ISDIR(mode):
            self.problems.append(f"refused: {name} (it is set to run as its owner)")
        if mode & stat.S_IWOTH and not stat.S_ISLNK(mode) and os.name != "nt":
            self.problems.append(f"refused: {name} (anyone may change it)")
        if stat.S_ISDIR(mode):
            self.folders.add(name)
            return True
        if name in self.files or (name == MANIFEST and self.manifest):
            self.problems.append(f"extra: {name} (it is in the archive twice)")
            return True
        if not stat.S_ISREG(mode):
            self.files[name] = None
            return True
        try:
            with open_file() as content:
                if name == MANIFEST:
                    self.manifest = content.read(MAX_MANIFEST)
                else:
                    self.files[name] = sha256(content), size
        except OSError as error:
            self.files[name] = "", size
            self.problems.append(f"unreadable: {name} ({error.strerror or error})")
        return True


def _in_folder(bundle: Path) -> _Found:
    found = _Found()
    if not (bundle / MANIFEST).is_file():
        raise BadInput(
            f"this folder is not a bundle: there is no {MANIFEST}",
            where=str(bundle),
            remedy=f"give the folder that holds {MANIFEST}, or the .tar.gz",
        )

    def unread(error: OSError) -> None:
        found.problems.append(f"unreadable: {error.filename} ({error.strerror})")

    for parent, folders, files in os.walk(str(bundle), onerror=unread):
        folders.sort()
        for child in sorted([*files, *folders]):
            path = Path(parent, child)
            status = path.lstat()
            size = status.st_size if stat.S_ISREG(status.st_mode) else 0
            name = path.relative_to(bundle).as_posix()
            if not found.add(name, status.st_mode, size, partial(_open, path)):
                return found
    return found


class _Header(tarfile.TarInfo):
    """A header of an archive; one that would be read into memory has a limit."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> _Header:
        header = super().frombuf(buf, encoding, errors)
        if header.type not in (*tarfile.REGULAR_TYPES, tarfile.DIRTYPE) and header.size > 1 << 20:
            raise tarfile.ReadError("a header is longer than 1 MiB")
        return header


_KINDS = {
    **dict.fromkeys(tarfile.REGULAR_TYPES, stat.S_IFREG),
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
}


def _in_archive(bundle: Path) -> _Found:
    found = _Found()
    tops: Set[str] = set()
    try:
        with tarfile.open(str(bundle), "r:gz", tarinfo=_Header) as tar:
            for member in tar:
                whole = member.name[2:] if member.name.startswith("./") else member.name
                top, _, name = whole.partition("/")
                tops.add(top)
                if member.isdir() and not name:
                    continue
                mode = member.mode & 0o7777 | _KINDS.get(member.type, stat.S_IFIFO)
                # A name that is refused is shown whole.
                name = whole if _not_plain(whole) or not name else name
                if not found.add(name, mode, member.size, partial(_extract, tar, member)):
                    return found
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        if not found.files and not found.manifest:
            raise BadInput(
                f"this is not a .tar.gz bundle: {error}",
                where=str(bundle),
                remedy="give a bundle's folder or its .tar.gz",
            ) from error
        found.problems.append(f"damaged: the archive breaks off or is corrupt ({error})")
    if not found.manifest and not found.problems:
        raise BadInput(
            f"this archive is not a bundle: it has no {MANIFEST}",
            where=str(bundle),
            remedy="give the .tar.gz that the bundle stage wrote",
        )
    if len(tops) > 1:
        found.problems.append(f"extra: the archive has several folders: {', '.join(sorted(tops))}")
    return found


def _open(path: Path) -> IO[bytes]:
    return path.open("rb")


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(member)
    if content is None:
        raise OSError("it has no content")
    return content


def _not_plain(name: str) -> str | None:
    """Why a name is not a plain path inside the bundle; None where it is one."""
    parts = name.split("/")
    if len(os.fsencode(name)) > MAX_NAME or any(len(os.fsencode(part)) > 255 for part in parts):
        return "its name is too long"
    if not all(parts) or set(parts) & {".", ".."} or "\\" in name or name[1:2] == ":":
        return "it is not a plain path inside the bundle"
    return None if name.isprintable() else "its name has control characters"


def _listed(manifest: bytes, problems: List[str]) -> Dict[str, Tuple[str, int]]:
    """The files that a manifest lists.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError: it is not a manifest.
    """
    content = json.loads(manifest.decode("utf-8"), object_pairs_hook=_each_once)
    if content["schema"] != BUNDLE_SCHEMA:
        raise ValueError(f"its schema is {content['schema']!r}, not {BUNDLE_SCHEMA!r}")
    listed = {}
    for name, entry in content["files"].items():
        if reason := _not_plain(name):
            problems.append(f"changed: {MANIFEST} lists {name[:80]!r}, and {reason}")
        elif type(entry["bytes"]) is not int:
            raise ValueError(f"the size of {name!r} is {entry['bytes']!r:.40}, not an integer")
        else:
            listed[name] = str(entry["sha256"]), entry["bytes"]
    if not listed:
        raise ValueError("it lists no file")
    return listed


def _each_once(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice!r} stands there twice")
    return seen


def _differences(listed: Mapping[str, Tuple[str, int]], found: _Found) -> Iterator[str]:
    needed = {str(parent) for name in listed for parent in PurePosixPath(name).parents}
    for name in sorted({*listed, *found.files, *(found.folders - needed)}):
        there = found.files.get(name)
        known = "changed" if name in listed else "extra"
        if name in found.folders:
            yield f"{known}: {name} (a folder)"
        elif name not in found.files:
            yield f"missing: {name}"
        elif there is None:
            yield f"{known}: {name} (a link, a device or a pipe, which a bundle never has)"
        elif name not in listed:
            yield f"extra: {name}"
        elif there != listed[name]:
            before, now = listed[name][1], there[1]
            sizes = f"{before:,} bytes, now {now:,}"
            what = "same size, other content" if before == now else sizes
            yield f"changed: {name} ({what})"
