"""A folder of image files, one folder per class."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from edgekd.data.dataset import Array, allocate
from edgekd.data.source import SPLITS, UNSPLIT, RawData, Request, Source
from edgekd.data.splits import looks_like_split, recognized
from edgekd.errors import InputError, unknown_name
from edgekd.files import files_in, hash_path, is_litter, require_regular_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
"""Files that count as images; other files in a class's folder are skipped."""

_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""What is decoded, whatever the suffix: Pillow starts Ghostscript for an EPS file."""

_CHANNELS = {"RGB": 3, "L": 1}


def read_image_folder(request: Request) -> RawData:
    """``<path>/train/<class>/*`` and ``<path>/test/<class>/*``, or just ``<path>/<class>/*``.

    The splits may have the names of :mod:`~edgekd.data.splits`, or those that ``data.args:
    {splits: {train: …, test: …}}`` declares; ``splits: false`` means that the folders are the
    classes. Links to folders are followed; hidden files, and such as ``Thumbs.db``, are no images.

    ``image`` is uint8 (N, C, H, W), ``label`` the index of the class in alphabetical order. Files
    are decoded to RGB, or to grey with ``data.args: {mode: L}``; the orientation that a camera
    wrote into EXIF is applied. ``data.image_size`` (height, width) resizes them all.

    Raises:
        InputError: there are no images, one cannot be decoded, or they differ in size and
            ``data.image_size`` is not given.
    """
    request.refuse("download")
    arguments = request.arguments(("mode", "splits"))
    mode = arguments.get("mode", "RGB")
    if mode not in _CHANNELS:
        raise unknown_name("image mode", str(mode), _CHANNELS, "data.args")
    root = _root(request)
    folders, remarks = _split_folders(root, arguments.get("splits"))
    listed = {split: _files(folder) for split, folder in folders.items()}
    classes = sorted(next(iter(listed.values())))
    for split, by_class in listed.items():
        for name in by_class:
            if name not in classes:
                raise InputError(
                    f"the class {name!r} of {split} has no images in train",
                    where=str(folders[split] / name),
                    remedy="give images to train it on, or remove the folder",
                )
    reader = _Reader(mode, request.config.image_size)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        splits = {split: reader.read(by_class, classes) for split, by_class in listed.items()}
    return RawData(
        splits=splits,
        where=str(root),
        description=f"images in {root}",
        labels=tuple(classes),
        layout="nchw",
        remarks=remarks,
    )


def _split_folders(root: Path, given: Any) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The folder of each split, or the root for ``UNSPLIT``; and a remark on the choice.

    Args:
        root: ``data.path``.
        given: ``data.args: {splits: …}``: folders by split, false, or None.

    Raises:
        InputError: folders look like splits, and it is not known of which.
    """
    names = [child.name for child in _folders(root)]
    if given is False:
        return {UNSPLIT: root}, ()
    if given is not None:
        return _splits_given(root, given), ()
    known = recognized(names, str(root))
    others = [name for name in names if name not in known]
    alike = [name for name in others if looks_like_split(name)]
    without_train = bool(known) and "train" not in known.values()
    if (known and alike) or without_train or len(alike) > 1:
        raise InputError(
            f"the folders {', '.join(map(repr, [*known, *alike]))} look like splits, and "
            + (f"it is not known which {alike[0]!r} is" if alike else "none is for training"),
            where=str(root),
            remedy="call them train, validation and test, or declare under data: 'args: {splits: "
            "{train: FOLDER, test: FOLDER}}'; 'args: {splits: false}' when they are classes",
        )
    if not known:
        return {UNSPLIT: root}, ()
    folders = {split: root / name for split in SPLITS for name in known if known[name] == split}
    if not others:
        return folders, ()
    return folders, (f"besides {', '.join(known)} not read: {', '.join(others)}",)


def _splits_given(root: Path, given: Any) -> dict[str, Path]:
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given.values()):
        raise InputError(
            f"splits is {given!r}",
            where="data.args",
            remedy="write splits: {train: FOLDER, validation: FOLDER, test: FOLDER}, or false",
        )
    for split, name in given.items():
        if split not in SPLITS:
            raise unknown_name("split", str(split), SPLITS, "data.args.splits")
        if not (root / name).is_dir():
            raise InputError(
                f"there is no folder {name!r}", where=str(root), remedy="fix data.args.splits"
            )
    if "train" not in given:
        raise InputError("splits names no train", where="data.args", remedy="add train: FOLDER")
    return {split: root / given[split] for split in SPLITS if split in given}


def _folders(folder: Path) -> list[Path]:
    """The folders in a folder, links to folders too, except those of operating systems."""
    return sorted(child for child in folder.iterdir() if child.is_dir() and not is_litter(child))


def _root(request: Request) -> Path:
    root = request.required_path("a folder of images by class")
    if not root.is_dir():
        raise InputError(
            "data.path is no folder", where=str(root), remedy="give a folder of images by class"
        )
    return root


def _files(folder: Path) -> Mapping[str, list[Path]]:
    by_class: dict[str, list[Path]] = {}
    for child in _folders(folder):
        files = [file for file in files_in(child) if file.suffix.lower() in SUFFIXES]
        if not files:
            raise InputError(
                f"the class {child.name!r} has no images",
                where=str(child),
                remedy=f"put images there ({', '.join(SUFFIXES)}), or remove the folder",
            )
        by_class[child.name] = files
    if not by_class:
        raise InputError(
            "there are no class folders with images",
            where=str(folder),
            remedy="lay the images out as <class>/<file>, or train/<class>/<file> and "
            "test/<class>/<file>; write data.args: {splits: false} when a class is called so",
        )
    return by_class


class _Reader:
    """Decodes files to one size: the given one, or else that of the first file."""

    def __init__(self, mode: str, size: tuple[int, int] | None) -> None:
        self.mode = mode
        self.resize = size
        self.size = size
        self.first: Path | None = None

    def read(self, by_class: Mapping[str, list[Path]], classes: list[str]) -> dict[str, Array]:
        rows = [(path, classes.index(name)) for name, paths in by_class.items() for path in paths]
        images: Array | None = None
        for row, (path, _) in enumerate(rows):
            pixels = self._decode(path)
            if images is None:
                shape = (len(rows), _CHANNELS[self.mode], *pixels.shape[1:])
                images = allocate(shape, np.dtype(np.uint8))
            images[row] = pixels
        assert images is not None  # _files() gives no empty class
        return {"image": images, "label": np.array([label for _, label in rows], np.int64)}

    def _decode(self, path: Path) -> Array:
        require_regular_file(path, "replace or remove the file")
        try:
            with Image.open(path, formats=_FORMATS) as file:
                if file.mode.startswith(("I", "F")):
                    raise InputError(
                        f"the image has {file.mode!r} pixels of more than 8 bits",
                        where=str(path),
                        remedy="convert it to 8 bits, or give float32 arrays in an npz file",
                    )
                image = ImageOps.exif_transpose(file).convert(self.mode)
        except InputError:
            raise
        except Exception as error:
            # Pillow's decoders raise errors of many kinds for damaged files.
            raise InputError(
                f"the image cannot be decoded: {error}",
                where=str(path),
                remedy="replace or remove the file",
            ) from error
        size = (image.height, image.width)
        if self.resize is not None and size != self.resize:
            image = image.resize((self.resize[1], self.resize[0]), Image.Resampling.BILINEAR)
        elif self.size is None:
            self.size, self.first = size, path
        elif size != self.size:
            raise InputError(
                f"the images differ in size: {self.first} is {self.size[0]}x{self.size[1]}, "
                f"{path} is {size[0]}x{size[1]} (height x width)",
                where=str(path),
                remedy=f"set data.image_size, e.g. [{self.size[0]}, {self.size[1]}], "
                "to resize them all",
            )
        pixels = np.asarray(image)
        return pixels[None] if self.mode == "L" else pixels.transpose(2, 0, 1)


def fingerprint_image_folder(request: Request) -> dict[str, str]:
    """SHA-256 of the sorted relative paths and their contents; the version of the decoder."""
    return {"images": hash_path(_root(request), litter=False), "pillow": version("pillow")}


IMAGE_FOLDER = Source(read_image_folder, fingerprint_image_folder)
