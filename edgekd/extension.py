"""``package.module:name`` anywhere a model, data source, loss, task or scheme is named.

A module that lies beside the pipeline file is found too.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from edgekd.errors import InputError, nearest, unknown_name


def is_reference(name: str) -> bool:
    """Whether a name is a ``package.module:name`` reference and not a built-in name."""
    module, _, attribute = name.partition(":")
    return bool(attribute) and all(part.isidentifier() for part in module.split("."))


@contextmanager
def searching(folder: Path) -> Iterator[None]:
    """Also find modules in ``folder`` (the pipeline file's) while inside."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def import_module(reference: str, where: str | None = None) -> ModuleType:
    """The module of a ``package.module:name`` reference.

    Raises:
        InputError: the module cannot be found, or fails while it is imported.
    """
    module_name = reference.partition(":")[0]
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise InputError(
                f"module {module_name!r} of {reference!r} was not found",
                where=where,
                remedy="put the module beside the pipeline file, or install its package",
            ) from error
        raise InputError(
            f"module {module_name!r} needs {error.name!r}, which is not installed",
            where=where,
            remedy=f"pip install {error.name}",
        ) from error
    except Exception as error:
        raise InputError(
            f"module {module_name!r} fails when imported: {type(error).__name__}: {error}",
            where=where,
            remedy="run it with python alone to see the whole traceback",
        ) from error


def resolve(name: str, registry: Mapping[str, Any], kind: str, where: str | None = None) -> Any:
    """The object a YAML name stands for: a registered one or a ``package.module:name``.

    Args:
        name: a key of ``registry`` or a reference.
        registry: the built-in objects of this kind by their short names.
        kind: what is looked for, for the error ("loss", "model").
        where: the YAML key, for the error.

    Raises:
        InputError: nothing has this name; the nearest known name is suggested.
    """
    if name in registry:
        return registry[name]
    if not is_reference(name):
        raise unknown_name(kind, name, registry, where)
    module = import_module(name, where)
    attribute = name.partition(":")[2]
    if not hasattr(module, attribute):
        guess = nearest(attribute, vars(module))
        raise InputError(
            f"module {module.__name__!r} has no {attribute!r}",
            where=where,
            remedy=f"did you mean {guess!r}?" if guess else "check the name after the colon",
        )
    return getattr(module, attribute)


def source_files(reference: str) -> list[Path]:
    """The files that define a reference: its module and what that imports from beside it.

    Nothing is imported, so a fingerprint costs no start-up time. Empty when the module is
    not found, which :func:`resolve` reports with its own error.
    """
    parts = reference.partition(":")[0].split(".")
    for folder in map(Path, sys.path):
        file = _module_file(folder, parts)
        if file is not None:
            return sorted(_with_neighbours(file, folder, {file}))
    return []


def _module_file(folder: Path, parts: list[str]) -> Path | None:
    stem = folder.joinpath(*parts)
    for file in (stem.with_suffix(".py"), stem / "__init__.py"):
        if file.is_file():
            return file
    return None


def _with_neighbours(file: Path, root: Path, seen: set[Path]) -> set[Path]:
    """Add to ``seen`` the modules under ``root`` that ``file`` imports, and theirs."""
    if "site-packages" in file.parts:
        return seen
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return seen
    for node in ast.walk(tree):
        names: list[str] = []
        start = root
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                start = file.parents[node.level - 1]
            module = [node.module] if node.module else []
            names = module + [".".join([*module, alias.name]) for alias in node.names]
        for name in names:
            found = _module_file(start, name.split("."))
            if found is not None and found not in seen:
                seen.add(found)
                _with_neighbours(found, root, seen)
    return seen
