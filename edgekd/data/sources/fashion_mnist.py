"""Fashion-MNIST: from a package's folder, a cache, or a mirror; IDX files.

It is read from ``data.path``, else from the folder of the Debian package, else from the user's
cache, which ``data.download: true`` fills from the authors' repository.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import math
import os
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekd.data.dataset import Array
from edgekd.data.source import RawData, Request, Source
from edgekd.errors import InputError
from edgekd.files import file_sha256, require_regular_file, write_errors
from edgerun.files import write_whole

_UNSIGNED_BYTE = 0x08
_MOST_BYTES = 500_000_000


def read_bytes(path: Path) -> bytes:
    """The content of a file, decompressed when its name ends in ``.gz``.

    Raises:
        InputError: the file cannot be read, or the gzip stream is corrupt, truncated or a
            decompression bomb.
    """
    require_regular_file(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"the file cannot be read: {error.strerror}", where=str(path), remedy="check it"
        ) from error
    return _decompressed(content, str(path)) if path.suffix == ".gz" else content


def _decompressed(content: bytes, where: str) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
            unpacked = stream.read(_MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"the gzip file is corrupt or truncated after {len(content)} bytes: {error}",
            where=where,
            remedy="get the file again",
        ) from error
    if len(unpacked) > _MOST_BYTES:
        raise InputError(
            f"the gzip file holds more than {_MOST_BYTES / 1e6:.0f} MB",
            where=where,
            remedy="give a data set of this format; Fashion-MNIST has 47 MB",
        )
    return unpacked


def parse_idx(content: bytes, dimensions: int, where: str) -> NDArray[np.uint8]:
    """The array of an IDX file of unsigned bytes.

    Args:
        content: the decompressed file.
        dimensions: how many axes there must be: 3 for images (N, H, W), 1 for labels (N,).
        where: the file, for the error.

    Raises:
        InputError: no IDX file of bytes, another number of axes, or another length than in its
        header.
    """
    header = 4 + 4 * dimensions
    magic = bytes([0, 0, _UNSIGNED_BYTE, dimensions])
    if content[:4] != magic:
        raise InputError(
            f"this is no IDX file of bytes with {dimensions} axes: it starts with "
            f"{content[:4].hex() or 'nothing'}, not {magic.hex()}",
            where=where,
            remedy="check that images and labels are not exchanged, or get the file again",
        )
    shape = tuple(int(n) for n in np.frombuffer(content[4:header], ">u4", min(
        dimensions, max(0, len(content) - 4) // 4)))  # fmt: skip
    expected = header + math.prod(shape)
    if len(shape) < dimensions or len(content) != expected:
        size = " x ".join(map(str, shape))
        raise InputError(
            f"the IDX file holds {len(content)} bytes, but "
            + (f"{size} values need {expected}" if len(shape) == dimensions else
               f"its header alone needs {header}"),
            where=where,
            remedy="get the file again: it is truncated or damaged",
        )  # fmt: skip
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


PACKAGE = "dataset-fashion-mnist"

PACKAGE_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package of the same name installs the files."""

URL = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"

URL_VARIABLE = "EDGEKD_FASHION_MNIST_URL"
"""Names another address that serves the four files, for a mirror."""

LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

# Of the decompressed files: the Debian package has the same data, compressed differently.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

_TRAIN_LABELS = "train-labels-idx1-ubyte"

_TIMEOUT_SECONDS = 60


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/edgekd/fashion-mnist``, by default in ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "edgekd" / "fashion-mnist"


def read_fashion_mnist(request: Request) -> RawData:
    """``image`` uint8 (N, 1, 28, 28) and ``label`` uint8 of train and test.

    ``data.path`` may contain another set of the same format and file names (MNIST, KMNIST): it then
    has no class names.

    Raises:
        InputError: the files are nowhere, damaged, or could not be downloaded.
    """
    request.arguments(())
    files = _find(request)
    if files is None:
        folder = cache_folder()
        for name, checksum in SHA256.items():
            _download(name, checksum, folder)
        files = {name: folder / f"{name}.gz" for name in SHA256}
    published = _digest(read_bytes(files[_TRAIN_LABELS])) == SHA256[_TRAIN_LABELS]
    train = _read_pair(files, "train")
    test = _read_pair(files, "t10k")
    folder = next(iter(files.values())).parent
    return RawData(
        splits={"train": train, "test": test},
        where=str(folder),
        description=f"Fashion-MNIST from {folder}",
        labels=LABELS if published else None,
        layout="nchw",
    )


def fingerprint_fashion_mnist(request: Request) -> dict[str, str]:
    """SHA-256 of the files; the expected one, when they are (to be) downloaded."""
    files = _find(request)
    if files is None or next(iter(files.values())).parent == cache_folder():
        return dict(SHA256)
    return {name: file_sha256(path) for name, path in files.items()}


def _find(request: Request) -> dict[str, Path] | None:
    """The four files; None when they are to be downloaded."""
    if request.path is not None:
        folder = request.required_path("the folder of the four IDX files")
        found = _files_in(folder)
        missing = [name for name in SHA256 if name not in found]
        if missing:
            raise InputError(
                f"the folder lacks {', '.join(missing)} (with .gz or without)",
                where=str(folder),
                remedy="give the folder of the four IDX files as data.path",
            )
        return found
    for folder in (PACKAGE_FOLDER, cache_folder()):
        found = _files_in(folder)
        if len(found) == len(SHA256):
            return found
    if request.config.download:
        return None
    raise InputError(
        "the Fashion-MNIST files are not on this machine",
        where=f"{PACKAGE_FOLDER} and {cache_folder()}",
        remedy=f"one of: install the Debian/Ubuntu package (apt install {PACKAGE}); "
        "give the folder of the four IDX files as data.path; "
        "or let them be downloaded (31 MB) with data.download: true",
    )


def _files_in(folder: Path) -> dict[str, Path]:
    choices = {name: (folder / f"{name}.gz", folder / name) for name in SHA256}
    found = {name: [p for p in paths if p.is_file()] for name, paths in choices.items()}
    return {name: paths[0] for name, paths in found.items() if paths}


def _read_pair(files: dict[str, Path], prefix: str) -> dict[str, Array]:
    images, labels = f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"
    return {
        "image": parse_idx(_content(files[images], images), 3, str(files[images]))[:, None],
        "label": parse_idx(_content(files[labels], labels), 1, str(files[labels])),
    }


def _content(path: Path, name: str) -> bytes:
    content = read_bytes(path)
    # Only the cache must have exactly these bytes; data.path may contain another set.
    if path.parent == cache_folder() and _digest(content) != SHA256[name]:
        raise InputError(
            "the cached file is not what was downloaded",
            where=str(path),
            remedy="delete it and run again with data.download: true",
        )
    return content


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _download(name: str, checksum: str, folder: Path) -> None:
    path = folder / f"{name}.gz"
    if path.exists():
        return
    url = os.environ.get(URL_VARIABLE, URL).rstrip("/") + f"/{name}.gz"
    remedy = f"try again, or apt install {PACKAGE}, or give data.path"
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            compressed = response.read()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InputError(f"the download failed: {error}", where=url, remedy=remedy) from error
    found = _digest(_decompressed(compressed, url))
    if found != checksum:
        raise InputError(
            f"the downloaded file is not the published one: SHA-256 {found}, not {checksum}",
            where=url,
            remedy=remedy,
        )
    what, space = "the download", "free space or set XDG_CACHE_HOME to a folder you may write to"
    with write_errors(folder, what, space, InputError):
        folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, compressed, what, space, InputError)


FASHION_MNIST = Source(read_fashion_mnist, fingerprint_fashion_mnist)
