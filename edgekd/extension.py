"""Extensions: a user's own code by ``package.module:name``, and entry points of distributions.

A module next to the pipeline file is found too. A distribution's ``pyproject.toml`` may have a
table such as ``[project.entry-points."edgekd.losses"]`` with lines
``name = "package.module:function"``: the name then works in a pipeline wherever a built-in one
does. A built-in name always means the built-in object.

What a pipeline names is a function or a class; its signature declares the keys and their types.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import sys
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from edgekd.errors import InputError, nearest, unknown_name

GROUPS = (
    "edgekd.engines",
    "edgekd.losses",
    "edgekd.models",
    "edgekd.schemes",
    "edgekd.sources",
    "edgekd.targets",
    "edgekd.tasks",
)


@dataclass(frozen=True)
class InstalledExtension:
    """One entry point.

    Attributes:
        name: what a pipeline names it by.
        reference: the ``package.module:name`` it stands for, as the distribution gives it.
        distribution: the name of the distribution, as pip knows it.
        version: that distribution's version.
    """

    name: str
    reference: str
    distribution: str
    version: str


def installed_extensions(group: str) -> Mapping[str, tuple[InstalledExtension, ...]]:
    """The entry points of a group by name; those of one name are of different distributions."""
    return _read(_import_path())[group]


def find_extension(
    name: str, group: str, kind: str, where: str | None = None
) -> InstalledExtension | None:
    """The entry point of that name; None when no installed distribution has one.

    Args:
        name: what the pipeline names.
        group: one of :data:`GROUPS`.
        kind: what is looked for, for the error ("loss", "model").
        where: the YAML key, for the error.

    Raises:
        InputError: two distributions have one of this name.
    """
    found = installed_extensions(group).get(name, ())
    if len(found) > 1:
        owners = " and ".join(f"{each.distribution} {each.version}" for each in found)
        raise InputError(
            f"the {kind} {name!r} is an entry point of {owners}",
            where=where,
            remedy=f"uninstall all but one, or write the one that is meant: "
            f"{' or '.join(repr(each.reference) for each in found)}",
        )
    return found[0] if found else None


def extensions_named(name: str) -> tuple[InstalledExtension, ...]:
    """The entry points of that name in all groups."""
    groups = _read(_import_path())
    return tuple(each for group in GROUPS for each in groups[group].get(name, ()))


def _import_path() -> tuple[tuple[str, int], ...]:
    """Where distributions are looked for; an installation changes a folder's time of change."""
    return tuple((entry, _changed(entry)) for entry in sys.path)


def _changed(entry: str) -> int:
    try:
        return os.stat(entry or os.curdir).st_mtime_ns  # noqa: PTH116 - sys.path holds texts
    except OSError:
        return 0


@lru_cache(maxsize=8)
def _read(
    search_path: tuple[tuple[str, int], ...],
) -> Mapping[str, Mapping[str, tuple[InstalledExtension, ...]]]:
    """All groups, read once per process as long as nothing is installed."""
    groups = {}
    for group in GROUPS:
        names: dict[str, dict[str, InstalledExtension]] = {}
        for point in importlib.metadata.entry_points(group=group):
            if point.dist is not None:
                reference = re.sub(r"\s|\[.*", "", point.value)  # "module : name [extra]"
                owner, version = str(point.dist.name), str(point.dist.version)
                made = InstalledExtension(point.name, reference, owner, version)
                names.setdefault(point.name, {})[owner] = made
        groups[group] = {name: tuple(owners.values()) for name, owners in names.items()}
    return groups


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
        digests = {} if module_name in sys.modules else _source_digests(reference)
        module = importlib.import_module(module_name)
        if digests:
            files = {getattr(each, "__file__", None) for each in list(sys.modules.values())}
            sources = {file: (sha, str(file) in files) for file, sha in digests.items()}
            module.__dict__[_SOURCES] = sources
        return module
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise InputError(
                f"module {module_name!r} of {reference!r} was not found",
                where=where,
                remedy="put the module next to the pipeline file, or install its package",
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
            remedy="run it with python alone to see the complete traceback",
        ) from error


_SOURCES = "__edgekd_sources__"


def imported_sources(reference: str) -> dict[Path, tuple[str, bool]]:
    """The files of a reference's own code, as they were when this process imported it.

    Returns:
        By file, its SHA-256 then, and whether it was imported with the reference; False is a file
        that a function imports when it is called. Empty when the module was not imported here.
    """
    module = sys.modules.get(reference.partition(":")[0])
    found: dict[Path, tuple[str, bool]] = getattr(module, _SOURCES, {})
    return found


def _source_digests(reference: str) -> dict[Path, str]:
    return {file: sha256(file.read_bytes()).hexdigest() for file in source_files(reference)}


def resolve(
    name: str,
    registry: Mapping[str, Any],
    kind: str,
    where: str | None = None,
    group: str | None = None,
) -> Any:
    """The object a YAML name stands for: built in, an entry point or a ``package.module:name``.

    Args:
        name: a key of ``registry``, an entry point of ``group``, or a reference.
        registry: the built-in objects of this kind by their short names.
        kind: the kind of object, for the error ("loss", "model").
        where: the YAML key, for the error.
        group: the group of entry points; None: there are none of this kind.

    Raises:
        InputError: nothing has this name, the nearest known name is suggested; two distributions
            have it; or what has it cannot be imported.
    """
    if name in registry:
        return registry[name]
    if is_reference(name):
        return _load(name, where)
    reference = find_reference(name, registry, kind, where, group)
    try:
        return _load(reference, where)
    except InputError as error:
        owner = find_extension(name, group or "", kind, where)
        of = f" of {owner.distribution} {owner.version}" if owner else ""
        raise InputError(
            f"the {kind} {name!r}{of} cannot be loaded: {error.what}",
            where=where,
            remedy=f"repair or update {owner.distribution}" if owner else error.remedy,
        ) from error


def find_reference(
    name: str,
    registry: Collection[str],
    kind: str,
    where: str | None = None,
    group: str | None = None,
) -> str:
    """The ``package.module:name`` of a name that is not built in; nothing is imported for it.

    Arguments as in :func:`resolve`.

    Raises:
        InputError: nothing has this name, or two distributions have it.
    """
    if is_reference(name):
        return name
    found = find_extension(name, group, kind, where) if group else None
    if found is not None:
        if not is_reference(found.reference):
            raise InputError(
                f"the {kind} {name!r} of {found.distribution} {found.version} is the entry point "
                f"{found.reference!r}, which names nothing in a module",
                where=where,
                remedy='it must have the form "package.module:name"',
            )
        return found.reference
    known = {*registry, *(installed_extensions(group) if group else ())}
    raise unknown_name(kind, name, known, where)


def _load(reference: str, where: str | None) -> Any:
    """Import what a ``package.module:name`` names; the name may be an attribute's attribute."""
    found: Any = import_module(reference, where)
    path = reference.partition(":")[0]
    for attribute in reference.partition(":")[2].split("."):
        if not hasattr(found, attribute):
            guess = nearest(attribute, vars(found) if hasattr(found, "__dict__") else ())
            raise InputError(
                f"{'module ' if inspect.ismodule(found) else ''}{path!r} has no {attribute!r}",
                where=where,
                remedy=f"did you mean {guess!r}?" if guess else "check the name after the colon",
            )
        found = getattr(found, attribute)
        path = attribute
    return found


def source_files(reference: str) -> list[Path]:
    """The files that define a reference: its module, the packages around it, and what it imports.

    Imports are followed into the user's own files; installed packages are covered by
    their version, and edgekd's own code by the stage. Nothing is imported, so a
    fingerprint costs no start-up time. Empty when the module is not found, which
    :func:`resolve` reports with its own error.
    """
    parts = reference.partition(":")[0].split(".")
    found: set[Path] = set()
    for folder in _search_path(parts[0]):
        files = _module_files(folder, parts)
        if files:
            for file in files:
                _follow(file, folder, found)
            break
    return sorted(found)


def _search_path(top: str) -> Iterator[Path]:
    """The import path, including the folders of editable installations."""
    yield from (Path(entry) for entry in sys.path)
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # A module such as __main__ has no spec.
        spec = None
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent
        yield folder.parent if spec.submodule_search_locations else folder


def _module_files(folder: Path, parts: list[str]) -> list[Path]:
    """A module's file, after those of the packages around it; empty when it does not exist."""
    stem = folder.joinpath(*parts)
    file = next((f for f in (stem / "__init__.py", stem.with_suffix(".py")) if f.is_file()), None)
    if file is None:
        return []
    packages = [folder.joinpath(*parts[:depth], "__init__.py") for depth in range(1, len(parts))]
    return [*(package for package in packages if package.is_file()), file]


def _follow(file: Path, root: Path, seen: set[Path]) -> None:
    """Add a user's file and its imports, recursively, to ``seen``.

    Args:
        file: a module found in ``root``.
        root: the entry of the search path.
        seen: the files found so far.
    """
    if file in seen:
        return
    seen.add(file)
    if _is_installed(file.resolve()):
        return
    # A package linked into site-packages is the user's own; its neighbours are not.
    linked = file.relative_to(root).parts[0] if _is_installed(file) else None
    folders = [root] if linked else [root, *map(Path, sys.path)]
    for level, name in imported_names(file):
        if level:
            if level <= len(file.parents):
                for found in _module_files(file.parents[level - 1], name.split(".")):
                    _follow(found, root, seen)
            continue
        top = name.partition(".")[0]
        if top in _NOT_FOLLOWED or (linked and top != linked):
            continue
        for folder in folders:
            files = _module_files(folder, name.split("."))
            if files and (linked or not _is_installed(files[-1])):
                for found in files:
                    _follow(found, folder, seen)
            if files:
                break


_NOT_FOLLOWED = {*sys.stdlib_module_names, "edgekd", "edgerun"}


def _is_installed(file: Path) -> bool:
    return "site-packages" in file.parts or "dist-packages" in file.parts


@cache
def parsed(file: Path, stamp: tuple[int, int]) -> ast.Module | None:
    """The syntax tree of a file, read once per process; None when it is not valid Python.

    ``stamp`` (its size and time of change) invalidates the cache for an edited file.
    """
    try:
        return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return None


def parse(file: Path) -> ast.Module | None:
    """The syntax tree of the file's current content; see :func:`parsed`."""
    status = file.stat()
    return parsed(file, (status.st_size, status.st_mtime_ns))


def imported_names(file: Path) -> list[tuple[int, str]]:
    """The modules that a file's import statements may name, with the level of relative ones.

    Those inside functions count, and ``from a import b`` may mean the module ``a.b`` too.
    """
    tree = parse(file)
    names: list[tuple[int, str]] = []
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.Import):
            names += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = [node.module] if node.module else []
            names += [(node.level, ".".join([*module, alias.name])) for alias in node.names]
            names += [(node.level, name) for name in module]
    return names


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def parameters_of(
    target: Callable[..., Any], where: str | None = None
) -> dict[str, inspect.Parameter]:
    """The parameters of a function or class that can be given by name, ``**kwargs`` included.

    Raises:
        InputError: the object is not callable or has no readable signature.
    """
    try:
        return dict(inspect.signature(target).parameters)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{target!r} cannot be called with named arguments: {error}",
            where=where,
            remedy="name a function or a class",
        ) from error


def check_arguments(
    target: Callable[..., Any],
    given: Mapping[str, Any],
    *,
    supplied: Collection[str] = (),
    name: str,
    where: str | None = None,
) -> dict[str, Any]:
    """Check arguments against a signature before anything is called.

    Args:
        target: the function or class they are for.
        given: what the user wrote, by name.
        supplied: parameters that the project fills in itself; the user may not give them.
        name: the target's name in the error, such as ``loss 'soft_labels'``.
        where: the YAML position, for the error.

    Returns:
        The arguments, lists turned into tuples where the signature says so.

    Raises:
        InputError: an unknown, missing or wrongly typed argument; a wrong value.
    """
    parameters = parameters_of(target, where)
    named = {key: p for key, p in parameters.items() if p.kind in _NAMED}
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    own = [key for key in named if key not in supplied]
    for key in given:
        if key in supplied and key in named:
            raise InputError(
                f"{name}: {key!r} is filled in by the project",
                where=where,
                remedy=f"remove {key!r}",
            )
        if key not in named and not takes_any:
            guess = nearest(str(key), own)
            hint = f"did you mean {guess!r}? " if guess else ""
            known = f"it takes {', '.join(own)}" if own else "it takes no arguments"
            raise InputError(f"{name} has no argument {key!r}", where=where, remedy=hint + known)
    missing = [
        key for key in own if named[key].default is inspect.Parameter.empty and key not in given
    ]
    if missing:
        raise InputError(
            f"{name} needs {', '.join(map(repr, missing))}",
            where=where,
            remedy=f"add '{missing[0]}: …'",
        )
    hints = _type_hints(target)
    return {
        key: _checked(value, hints[key], f"{name}: {key}", where) if key in hints else value
        for key, value in given.items()
    }


def _type_hints(target: Callable[..., Any]) -> dict[str, Any]:
    while isinstance(target, functools.partial):
        target = target.func
    annotated = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(annotated, include_extras=True)
    except (NameError, TypeError, AttributeError):
        # A user's annotations may name things that only a type checker imports.
        return {}


def _checked(value: Any, annotation: Any, label: str, where: str | None) -> Any:
    try:
        adapter = TypeAdapter[Any](annotation)
    except (PydanticSchemaGenerationError, PydanticUserError):
        return value
    try:
        # JSON rules: a YAML list is a tuple, 4 is a float, but "4" and true are not.
        if isinstance(value, list | dict):
            return adapter.validate_json(json.dumps(value), strict=True)
        return adapter.validate_python(value, strict=True)
    except TypeError:
        return value
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"][0].lower() + first["msg"][1:]
        guess = None
        if first["type"] == "literal_error":
            guess = nearest(str(value), first["ctx"]["expected"].split("'")[1::2])
        raise InputError(
            f"{label}: {message}; it is {value!r}",
            where=where,
            remedy=f"did you mean {guess!r}?" if guess else "give a value of that kind",
        ) from error
