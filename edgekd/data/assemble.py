"""From a source's raw arrays to a dataset: names, targets, splits, checks, normalisation."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgekd.config.data import DataConfig
from edgekd.data.checks import check_alike, check_arrays, check_finite
from edgekd.data.dataset import Array, Dataset, Preprocess, Split, is_image
from edgekd.data.labelled import fill_labels, keep_share, without_labels
from edgekd.data.memory import take
from edgekd.data.normalization import fit_preprocess
from edgekd.data.source import SPLITS, UNSPLIT, RawData
from edgekd.data.splitting import cut
from edgekd.errors import InputError, unknown_name
from edgekd.spec import TensorSpec

DEFAULT_TARGETS = ("label", "labels", "y", "target", "action")
"""The arrays that are targets when ``data.targets`` does not name any."""

LABEL = "label"
"""The target of samples that come without any."""

_IMAGE_NAMES = ("image", "images", "x")

Arrays = Mapping[str, Array]


def assemble(raw: RawData, config: DataConfig) -> Dataset:
    """Make a dataset of a source's arrays.

    In this order:

    1. Labels: a split without any target, where others have integer ones, has -1 for each. So
       have all where no array is a target (and none is shaped as one), or ``data.targets`` is [].
       Names: ``x`` and ``images`` become ``image`` when they have three or more axes; ``labels``
       becomes ``label``; ``y`` becomes ``label`` when it holds integers, else ``target``. An
       array keeps its name when the new one is taken. ``data.targets`` may use either name.
    2. ``image`` of shape (N, H, W) gets a channel axis; inputs (N, H, W, C) are transposed when
       ``data.args: {layout: nhwc}`` says so (it is asked for, never guessed). Floats
       become float32, integer targets int64 (and (N, 1) integer targets (N,)); other inputs
       keep their integers.
    3. ``test`` is cut off when the source has none, then ``validation`` from what is left to
       train on, unless the source brings its own (``data.validation`` then has no use).
       Both are the same for every training seed, and stratified when there is an integer target.
    4. Of train's and validation's labels only the share ``data.labelled`` stays
       (:func:`~edgekd.data.labelled.keep_share`).
    5. Normalisation constants from the training split only. ``data.args: {normalize: false}``
       leaves floats as they are and only scales uint8 images to [0, 1].

    Raises:
        InputError: the arrays do not fit together or hold what cannot be trained on.
    """
    splits: dict[str, Arrays] = dict(raw.splits)
    if UNSPLIT in splits:
        splits = {"train": splits.pop(UNSPLIT), **splits}
    if unknown := sorted(set(splits) - set(SPLITS)):
        raise unknown_name("split", unknown[0], SPLITS, raw.where)
    if "train" not in splits:
        raise InputError(
            f"there is no training split, only {', '.join(splits) or 'nothing'}",
            where=raw.where,
            remedy="give train, or unsplit samples",
        )
    splits = fill_labels(splits, config.targets or DEFAULT_TARGETS)
    if _is_unlabelled(splits["train"], config):
        splits = without_labels(splits, LABEL)
        config = config.model_copy(update={"targets": (LABEL,)})
    check_arrays(splits, raw.where)
    renamed = _clean_names(splits["train"])
    targets = _target_names(splits["train"], renamed, config, raw.where)
    splits = {
        split: {renamed[n]: _convert(renamed[n], a, renamed[n] in targets, raw, config)
                for n, a in arrays.items()}
        for split, arrays in splits.items()
    }  # fmt: skip
    check_alike(splits, raw.where)
    # Before the cut, so that a sample is named by the index it has in the user's own array.
    for split, arrays in splits.items():
        for name, array in arrays.items():
            check_finite(split, name, array, raw.where)
    splits = keep_share(_split(splits, targets, raw, config), config.labelled, targets)
    train = splits["train"]
    inputs = [name for name in train if name not in targets]
    if config.image_size is not None and not any(is_image(train[name]) for name in inputs):
        raise InputError(
            f"data.image_size is given, but no input is an image: {', '.join(inputs)}",
            where=raw.where,
            remedy="remove data.image_size",
        )
    normalize = _normalize(config)
    fitted = {name: fit_preprocess(train[name], raw.image_scale, normalize) for name in inputs}
    preprocess = {name: value for name, value in fitted.items() if value is not None}
    return Dataset(
        splits={split: Split(splits[split]) for split in SPLITS},
        inputs=tuple(_input_spec(name, train[name], preprocess.get(name)) for name in inputs),
        targets=tuple(_spec(name, train[name]) for name in train if name in targets),
        labels=raw.labels,
        preprocess=preprocess,
        source=raw.description,
    )


def _normalize(config: DataConfig) -> bool:
    value = config.args.get("normalize", True)
    if not isinstance(value, bool):
        raise InputError(
            f"normalize is {value!r}, not true or false", where="data.args", remedy="mend it"
        )
    return value


def _is_unlabelled(arrays: Arrays, config: DataConfig) -> bool:
    """Whether there is no target, and no array that may be one under another name.

    Raises:
        InputError: ``data.targets`` says that there is none, and an array has a target's name.
    """
    named = [name for name in arrays if name in DEFAULT_TARGETS]
    if config.targets is None:
        shaped = any(array.ndim < 2 or array.size == len(array) for array in arrays.values())
        return bool(arrays) and not named and not shaped
    if not config.targets and named:
        raise InputError(
            f"data.targets is [], and {named[0]!r} is the name of a target",
            where="data.targets",
            remedy="remove data.targets, or rename the array",
        )
    return not config.targets


def _clean_names(arrays: Arrays) -> dict[str, str]:
    names = {name: name for name in arrays}
    for name, array in arrays.items():
        new = name
        if name in _IMAGE_NAMES and array.ndim >= 3:
            new = "image"
        elif name == "labels" or (name == "y" and array.dtype.kind in "biu"):
            new = "label"
        elif name == "y":
            new = "target"
        if new not in names.values():
            names[name] = new
    return names


def _target_names(
    arrays: Arrays, renamed: Mapping[str, str], config: DataConfig, where: str
) -> set[str]:
    known = {*renamed.values(), *renamed}
    if config.targets is not None:
        for name in config.targets:
            if name not in known:
                raise unknown_name("target", name, renamed.values(), "data.targets")
        targets = {renamed.get(name, name) for name in config.targets}
    else:
        targets = {new for new in renamed.values() if new in DEFAULT_TARGETS}
        # A mask says which parts of a target count; it is never an input.
        targets |= {f"{name}_mask" for name in targets} & set(renamed.values())
    found = ", ".join(arrays)
    if not targets:
        raise InputError(
            f"none of the arrays is a target: {found}",
            where=where,
            remedy=f"name it in data.targets, or call it one of {', '.join(DEFAULT_TARGETS)}; "
            "write data.targets: [] when there are no labels",
        )
    if not set(renamed.values()) - targets:
        raise InputError(
            f"every array is a target, none is an input: {found}",
            where=where,
            remedy="give the samples too, or name fewer arrays in data.targets",
        )
    return targets


def _convert(name: str, array: Array, target: bool, raw: RawData, config: DataConfig) -> Array:
    if target:
        if array.dtype.kind == "f":
            return array.astype(np.float32, copy=False)
        if array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        return array.astype(np.int64, copy=False)
    if name == "image" and array.ndim == 3:
        array = array[:, None]
    if array.dtype.kind == "f":
        array = array.astype(np.float32, copy=False)
    elif array.dtype.kind == "u" and array.dtype != np.uint8:
        # torch has no arithmetic on the wider unsigned integers.
        array = array.astype(np.int32 if array.dtype.itemsize == 2 else np.int64)
    return _order_image(name, array, raw, config) if is_image(array) else array


def _order_image(name: str, array: Array, raw: RawData, config: DataConfig) -> Array:
    if array.dtype not in (np.uint8, np.float32):
        raise InputError(
            f"the images {name!r} are {array.dtype}",
            where=raw.where,
            remedy="give uint8 from 0 to 255, or float32",
        )
    layout = config.args.get("layout", raw.layout)
    if layout not in (None, "nchw", "nhwc"):
        raise InputError(
            f"layout is {layout!r}", where="data.args", remedy="write layout: nchw or nhwc"
        )
    if layout is None and array.shape[3] in (1, 3):
        raise InputError(
            f"the images {name!r} of shape {array.shape} may be (N, H, W, C) or (N, C, H, W)",
            where=raw.where,
            remedy="say which under data: 'args: {layout: nhwc}' or 'args: {layout: nchw}'",
        )
    if layout == "nhwc":
        array = np.ascontiguousarray(array.transpose(0, 3, 1, 2))
    height, width = array.shape[2:]
    if config.image_size is not None and (height, width) != config.image_size:
        raise InputError(
            f"the images {name!r} are {height}x{width}, but data.image_size says "
            f"{config.image_size[0]}x{config.image_size[1]} (height x width)",
            where=raw.where,
            remedy="remove data.image_size, or resize the arrays; only image files are resized",
        )
    return array


def _split(
    splits: dict[str, Arrays], targets: set[str], raw: RawData, config: DataConfig
) -> dict[str, Arrays]:
    if "test" in splits and config.test is not None:
        raise InputError(
            "data.test asks for a fraction, but the source brings its own test split",
            where="data.test",
            remedy="remove data.test",
        )
    if "test" not in splits:
        if UNSPLIT not in raw.splits and config.test is None:
            raise InputError(
                "there is a training split but no test split",
                where=raw.where,
                remedy="give the test samples, or a fraction in data.test to cut off",
            )
        fraction = config.test or raw.test_fraction
        splits = _cut(splits, "test", fraction, targets, raw.where)
    if "validation" not in splits:
        splits = _cut(splits, "validation", config.validation, targets, raw.where)
    return splits


def _cut(
    splits: dict[str, Arrays], name: str, fraction: float, targets: set[str], where: str
) -> dict[str, Arrays]:
    train = splits["train"]
    candidates = [
        array
        for target, array in train.items()
        if target in targets and array.ndim == 1 and array.dtype.kind == "i"
    ]
    labels = train.get("label") if "label" in targets else None
    if labels is None or labels.ndim != 1 or labels.dtype.kind != "i":
        labels = candidates[0] if candidates else None
    count = len(next(iter(train.values())))
    keep, chosen = cut(count, fraction, labels, name, where)
    return {
        **splits,
        "train": {n: take(array, keep) for n, array in train.items()},
        name: {n: take(array, chosen) for n, array in train.items()},
    }


def _spec(name: str, array: Array) -> TensorSpec:
    return TensorSpec(name, ("batch", *array.shape[1:]), array.dtype.name)


def _input_spec(name: str, array: Array, preprocess: Preprocess | None) -> TensorSpec:
    dtype = array.dtype.name if preprocess is None else "float32"
    return TensorSpec(name, ("batch", *array.shape[1:]), dtype)
