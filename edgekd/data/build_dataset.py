"""From a source's raw arrays to a dataset: names, targets, splits, checks, normalisation."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from edgekd.config.pipeline import DataConfig
from edgekd.data.classes import LABEL_CLASSES, ClassTarget, read_classes
from edgekd.data.dataset import (
    Array,
    Arrays,
    Dataset,
    Preprocess,
    Split,
    check_arrays,
    check_axes,
    check_samples,
    is_image,
    take,
)
from edgekd.data.preprocessing import IMAGE_NAMES, Layout, fit_preprocess, layout_of, layouts_given
from edgekd.data.source import SPLITS, UNSPLIT, RawData
from edgekd.data.splits import choose_split, fill_labels, keep_share, without_labels
from edgekd.errors import InputError, unknown_name
from edgekd.spec import TensorSpec

DEFAULT_TARGETS = ("label", "labels", "y", "target", "action")
"""The arrays that are targets when ``data.targets`` does not name any."""

LABEL = "label"
"""The target of samples without one."""

_CLASS_NAMES = ("label", "labels", "y")
"""Arrays that are the target ``label`` where they hold classes."""

_IMAGE_LAYOUTS = ("nchw", "nhwc", "nhw")


def build_dataset(
    raw: RawData, config: DataConfig, classes: ClassTarget | None = LABEL_CLASSES
) -> Dataset:
    """Make a dataset of a source's arrays.

    In this order:

    1. The target that holds classes, given as ``classes``, becomes class numbers from 0, whatever
       its form: :func:`~edgekd.data.classes.read_classes`. The usual names may be capitalised.
    2. Labels: a split without any target, where others have integer ones, has -1 for each. So
       have all where no array is a target (and none is shaped as one), or ``data.targets`` is [].
       Names: ``x`` and ``images`` become ``image`` when they are images; ``labels`` becomes
       ``label``; ``y`` becomes ``label`` when it holds integers, else ``target``. An array keeps
       its name when the new one is in use. ``data.targets`` may use either name.
    3. The axes of an input: by ``data.args: {layout: …}``, else by the rule of
       :mod:`~edgekd.data.preprocessing`. Images (N, H, W) get a channel axis, (N, H, W, C) are
       transposed. Floats become float32, integer targets int64 (and (N, 1) integer targets
       (N,)); other inputs keep their integers.
    4. ``test`` is split off when the source has none, then ``validation`` from the rest of
       ``train``, unless the source has its own (``data.validation`` is then unused).
       Both are the same for every training seed, and stratified when there is an integer target.
    5. Of train's and validation's labels only the share ``data.labelled`` is used
       (:func:`~edgekd.data.splits.keep_share`).
    6. Normalisation constants from the training split only. ``data.args: {normalize: false}``
       leaves floats unchanged and only scales uint8 images to [0, 1].

    Raises:
        InputError: the arrays are inconsistent or contain values that cannot be trained on.
    """
    given, config = _lower_usual_names(_given_splits(raw), config)
    with_classes, labels, remarks = _read_classes(given, raw, config, classes)
    labelled = fill_labels(with_classes, config.targets or DEFAULT_TARGETS)
    if _is_unlabelled(labelled["train"], config):
        labelled = without_labels(labelled, LABEL)
        config = config.model_copy(update={"targets": (LABEL,)})
    check_arrays(labelled, raw.where)
    layouts, layout_remarks = _layouts(labelled["train"], raw, config)
    renamed = _clean_names(labelled["train"], layouts)
    targets = _target_names(labelled["train"], renamed, config, raw.where)
    splits: dict[str, Arrays] = {
        split: {renamed[n]: _convert(renamed[n], a, renamed[n] in targets, layouts.get(n), raw,
                                     config)
                for n, a in arrays.items()}
        for split, arrays in labelled.items()
    }  # fmt: skip
    # Before splitting, so that messages give a sample's index in the user's own array.
    check_samples(splits, raw.where)
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
    by_name = {renamed[name]: layout for name, layout in layouts.items()}
    fitted = {
        name: fit_preprocess(train[name], raw.image_scale, normalize, by_name.get(name))
        for name in inputs
    }
    preprocess = {name: value for name, value in fitted.items() if value is not None}
    return Dataset(
        splits={split: Split(splits[split]) for split in SPLITS},
        inputs=tuple(_input_spec(name, train[name], preprocess.get(name)) for name in inputs),
        targets=tuple(_spec(name, train[name]) for name in train if name in targets),
        labels=labels,
        preprocess=preprocess,
        source=raw.description,
        remarks=(
            *raw.remarks,
            *remarks,
            *(layout_remarks[name] for name in layout_remarks if renamed[name] in inputs),
        ),
    )


def _given_splits(raw: RawData) -> dict[str, Arrays]:
    """The source's splits, with unsplit samples as ``train``; checked."""
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
    check_axes(splits, raw.where)
    return splits


def _lower_usual_names(
    splits: dict[str, Arrays], config: DataConfig
) -> tuple[dict[str, Arrays], DataConfig]:
    """Lower-case the names that have a meaning: ``X`` and ``Y`` are common."""
    usual = {*IMAGE_NAMES, *DEFAULT_TARGETS}

    def lower(name: str, names: Collection[str]) -> str:
        return name.lower() if name.lower() in usual and name.lower() not in names else name

    splits = {
        split: {lower(name, arrays): array for name, array in arrays.items()}
        for split, arrays in splits.items()
    }
    if config.targets is not None:
        known = {name for arrays in splits.values() for name in arrays}
        targets = tuple(n if n in known else lower(n, ()) for n in config.targets)
        config = config.model_copy(update={"targets": targets})
    return splits, config


def _read_classes(
    splits: dict[str, Arrays], raw: RawData, config: DataConfig, classes: ClassTarget | None
) -> tuple[dict[str, Arrays], tuple[str, ...] | None, tuple[str, ...]]:
    """The splits with the class target as class numbers, the class names, and remarks."""
    keys = ("classes", "label_format")
    given = [key for key in keys if getattr(config, key) is not None]
    name = None if classes is None else _class_array(splits, config, classes.name)
    if classes is None or name is None:
        if given and config.targets != ():
            raise InputError(
                f"data.{given[0]} is given, and there are no labels that are classes",
                where=f"data.{given[0]}",
                remedy=f"remove it, or see that the array's name is one of "
                f"{', '.join(_CLASS_NAMES)} or that of task_args: {{target: …}}",
            )
        return splits, raw.labels, ()
    found = read_classes(
        {split: arrays[name] for split, arrays in splits.items() if name in arrays},
        config,
        array=name,
        names=raw.labels,
        count=classes.count,
        where=raw.where,
    )
    if found is None:
        return splits, raw.labels, ()
    read = {
        split: {**arrays, name: found.arrays[split]} if split in found.arrays else arrays
        for split, arrays in splits.items()
    }
    return read, found.names, found.remarks


def _class_array(splits: Mapping[str, Arrays], config: DataConfig, target: str) -> str | None:
    """The source's name of the target that the task reads as classes; None when there is none."""
    names: tuple[str, ...] = (target, *_CLASS_NAMES) if target == LABEL else (target,)
    if config.targets is not None:
        names = tuple(name for name in names if name in config.targets or LABEL in config.targets)
    return next((n for n in names for arrays in splits.values() if n in arrays), None)


def _layouts(
    arrays: Arrays, raw: RawData, config: DataConfig
) -> tuple[dict[str, Layout | None], dict[str, str]]:
    """The layout of each array that is no target, and a remark on it, by the source's name."""
    targets = {*(DEFAULT_TARGETS if config.targets is None else config.targets)}
    targets |= {f"{name}_mask" for name in targets}
    inputs = {name: array for name, array in arrays.items() if name not in targets}
    requested = config.args.get("layout")
    if isinstance(requested, Mapping):
        image = next((name for name in IMAGE_NAMES if name in inputs), "image")
        requested = {image if n == "image" else n: layout for n, layout in requested.items()}
    layouts: dict[str, Layout | None] = {}
    remarks = {}
    given = layouts_given(requested, {name: array.ndim for name, array in inputs.items()})
    for name, array in inputs.items():
        if name in given:
            layouts[name] = given[name]
        elif raw.layout is not None and array.ndim == len(raw.layout):
            layouts[name] = raw.layout
        else:
            layouts[name], remark = layout_of(name, array, raw.where)
            if remark is not None:
                remarks[name] = remark
    return layouts, remarks


def _normalize(config: DataConfig) -> bool:
    value = config.args.get("normalize", True)
    if not isinstance(value, bool):
        raise InputError(
            f"normalize is {value!r}, not true or false",
            where="data.args",
            remedy="set normalize: true or false",
        )
    return value


def _is_unlabelled(arrays: Arrays, config: DataConfig) -> bool:
    """Whether there is no target, and no array that may be one under another name.

    Raises:
        InputError: ``data.targets`` declares no target, but an array has a target's name.
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


def _clean_names(arrays: Arrays, layouts: Mapping[str, Layout | None]) -> dict[str, str]:
    names = {name: name for name in arrays}
    for name, array in arrays.items():
        new = name
        if name in IMAGE_NAMES and layouts.get(name) in _IMAGE_LAYOUTS:
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


def _convert(
    name: str,
    array: Array,
    target: bool,
    layout: Layout | None,
    raw: RawData,
    config: DataConfig,
) -> Array:
    if target:
        if array.dtype.kind == "f":
            return array.astype(np.float32, copy=False)
        if array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        return array.astype(np.int64, copy=False)
    if layout == "nhw":
        array = array[:, None]
    if array.dtype.kind == "f":
        array = array.astype(np.float32, copy=False)
    if not is_image(array):
        if array.dtype.kind == "u" and array.dtype != np.uint8:
            # torch has no arithmetic on the wider unsigned integers.
            array = array.astype(np.int32 if array.dtype.itemsize == 2 else np.int64)
        return array
    if array.dtype not in (np.uint8, np.float32):
        raise InputError(
            f"the images {name!r} are {array.dtype}",
            where=raw.where,
            remedy="give uint8 from 0 to 255, or float32",
        )
    if layout == "nhwc":
        array = np.ascontiguousarray(array.transpose(0, 3, 1, 2))
    height, width = array.shape[2:]
    if config.image_size is not None and (height, width) != config.image_size:
        raise InputError(
            f"the images {name!r} are {height}x{width}, but data.image_size is "
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
            "data.test sets a fraction, but the source has its own test split",
            where="data.test",
            remedy="remove data.test",
        )
    if "test" not in splits:
        if UNSPLIT not in raw.splits and config.test is None:
            raise InputError(
                "there is a training split but no test split",
                where=raw.where,
                remedy="give the test samples, or a fraction in data.test to split off",
            )
        fraction = config.test or raw.test_fraction
        splits = _split_off(splits, "test", fraction, targets, raw.where)
    if "validation" not in splits:
        splits = _split_off(splits, "validation", config.validation, targets, raw.where)
    return splits


def _split_off(
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
    keep, chosen = choose_split(count, fraction, labels, name, where)
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
