"""The user's own data: a function that returns named arrays, by ``package.module:name``."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.data.dataset import Array, Dataset, check_arrays, check_samples
from edgekd.data.source import (
    LABEL_NAMES,
    SHARED_ARGUMENTS,
    SPLITS,
    RawData,
    Request,
)
from edgekd.data.splits import by_split, recognized, split_of
from edgekd.errors import EdgekdError, InputError, unknown_name
from edgekd.extension import parse, source_files
from edgekd.files import file_sha256, hash_path

_LONGEST_PATH = 1024
_RUN = "**/artifacts/*/*/artifact.json"
"""What a run folder has inside."""


def read_function(function: Any, request: Request, seed: int) -> Dataset | RawData:
    """Call the user's function and return its samples.

    It is called with ``data.args``, and with ``path`` (a ``Path``) and ``seed`` if it has
    parameters of these names. It returns a :class:`~edgekd.data.dataset.Dataset`, or
    ``{"train": {"image": …, "label": …}, "test": {…}}``, or ``{"x_train": …, "y_test": …}``, or
    unsplit ``{"image": …, "label": …}``, with numpy arrays, torch tensors or lists of numbers;
    ``"classes"`` next to them may name the classes.

    Raises:
        InputError: it is not callable, its arguments do not fit, it fails, or returns
            something else.
    """
    name = request.config.source
    if not callable(function):
        raise InputError(
            f"{name!r} is {type(function).__name__}, not a function",
            where="data.source",
            remedy="name a function that returns the samples",
        )
    request.refuse("download")
    arguments = _arguments(function, request, seed)
    try:
        result = function(**arguments)
    except EdgekdError:
        raise
    except Exception as error:
        raise InputError(
            f"{name} fails: {type(error).__name__}: {error}",
            where="data.source",
            remedy="call it in python alone to see the complete traceback",
        ) from error
    if isinstance(result, Dataset):
        return _checked(result, name)
    return _raw(result, name)


def fingerprint_function(request: Request, reference: str) -> dict[str, str]:
    """SHA-256 of the function's code, and of the files and folders that it is known to read.

    The code is its module, the packages around it and what these import of the user's own. Known
    are ``data.path``, and what a text of ``data.args`` or of that code names, when it exists: from
    the pipeline file's folder, the module's own or the current one.

    Args:
        request: what the pipeline says of the data.
        reference: the function as ``package.module:name``.
    """
    files = source_files(reference)
    found = {f"module {number} {f.name}": file_sha256(f) for number, f in enumerate(files)}
    if request.path is not None:
        found["path"] = hash_path(request.required_path("what the function reads"))
    texts = [(text, request.base) for text in _texts(request.config.args)]
    for file in files:
        tree = parse(file)
        texts += [
            (node.value, folder)
            for node in (ast.walk(tree) if tree is not None else ())
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
            for folder in (request.base, file.parent)
        ]
    read = {path for text, folder in texts for path in _named_paths(text, folder)}
    for path in sorted(read - set(files)):
        found[f"read {path.name} {len(found)}"] = hash_path(path)
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _texts(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _texts(entry)


def _named_paths(text: str, folder: Path) -> Iterator[Path]:
    """The file or folder of samples that a text names, if it does.

    Not a folder that contains the pipeline, the current folder or a run: these change with every
    run.
    """
    if not 0 < len(text) < _LONGEST_PATH or "\0" in text or "\n" in text:
        return
    for start in (folder, Path.cwd()):
        try:
            path = start / Path(text).expanduser()
            if path.is_file() or (path.is_dir() and _holds_samples(path, folder)):
                yield path
        except (OSError, RuntimeError):  # Not a path: a text too long, or ~ of an unknown user.
            continue


def _holds_samples(path: Path, folder: Path) -> bool:
    real = path.resolve()
    inside = (folder.resolve(), Path.cwd())
    around = any(real == inner or real in inner.parents for inner in inside)
    return not around and not any(path.glob(_RUN))


def _arguments(function: Callable[..., Any], request: Request, seed: int) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    arguments: dict[str, Any] = {}
    for name, value in request.config.args.items():
        if name in parameters or (takes_any and name not in SHARED_ARGUMENTS):
            arguments[name] = value
        elif name not in SHARED_ARGUMENTS:
            raise unknown_name(
                f"argument of {request.config.source}", name, parameters, "data.args"
            )
    if "seed" in parameters:
        arguments.setdefault("seed", seed)
    if "path" in parameters and request.path is not None:
        arguments["path"] = request.required_path("what the function reads")
    elif request.path is not None:
        raise InputError(
            f"data.path is given, but {request.config.source} has no parameter 'path'",
            where="data.path",
            remedy="remove data.path, or add the parameter",
        )
    missing = [
        p.name
        for p in parameters.values()
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and p.name not in arguments
    ]
    if missing:
        raise InputError(
            f"{request.config.source} needs the argument {missing[0]!r}",
            where="data.path" if missing[0] == "path" else "data.args",
            remedy="give it there",
        )
    return arguments


def _checked(dataset: Dataset, name: str) -> Dataset:
    if set(dataset.splits) != set(SPLITS):
        raise InputError(
            f"the dataset of {name} has the splits {', '.join(dataset.splits) or 'none'}",
            where="data.source",
            remedy=f"a Dataset has all of {', '.join(SPLITS)}; return a mapping of arrays "
            "instead to have them split",
        )
    splits = {split: dataset.splits[split].arrays for split in SPLITS}
    check_arrays(splits, name)
    check_samples(splits, name)
    return dataset


def _raw(result: Any, name: str) -> RawData:
    if not isinstance(result, Mapping):
        raise InputError(
            f"{name} returned {type(result).__name__}",
            where="data.source",
            remedy='return {"train": {"image": …, "label": …}, "test": {…}} of arrays',
        )
    content = dict(result)
    labels = content.pop(LABEL_NAMES, None)
    nested = [key for key, value in content.items() if isinstance(value, Mapping)]
    if loose := [key for key in content if split_of(str(key)) and key not in nested]:
        raise InputError(
            f"the split {loose[0]!r} of {name} is {type(content[loose[0]]).__name__}",
            where="data.source",
            remedy='make it a mapping of named arrays: {"image": …, "label": …}',
        )
    if nested and len(nested) < len(content):
        odd = next(key for key in content if key not in nested)
        raise InputError(
            f"{name} returned splits and, next to them, {odd!r}",
            where="data.source",
            remedy=f"put every array into a split; only {LABEL_NAMES!r} may be next to them",
        )
    known = recognized(map(str, nested), name)
    if unknown := [str(key) for key in nested if str(key) not in known]:
        raise unknown_name("split", unknown[0], SPLITS, name)
    splits = (
        {known[str(key)]: arrays for key, arrays in content.items()}
        if nested
        else by_split({str(key): array for key, array in content.items()}, name)
    )
    return RawData(
        splits={
            split: {str(key): _array(value, f"{key!r} of {name}") for key, value in arrays.items()}
            for split, arrays in splits.items()
        },
        where=name,
        description=name,
        labels=None if labels is None else tuple(str(label) for label in labels),
    )


def _array(value: Any, what: str) -> Array:
    # torch is not imported to find out: a value of torch's can only exist when torch is.
    from_torch = type(value).__module__.partition(".")[0] == "torch"
    try:
        return _from_torch(value) if from_torch else np.asarray(value)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{what} is no array: {error}",
            where="data.source",
            remedy="return arrays with one row per sample, all of the same shape",
        ) from error


def _from_torch(tensor: Any) -> Array:
    array: Array = tensor.detach().cpu().numpy()
    return array
