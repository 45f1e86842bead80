"""When a stage's result is valid: hashes of configuration, inputs, imported code, libraries.

Nothing is imported for it. From a stage's module on, each name that is used is followed to the
module that defines it, through the imports of modules and of functions alike, and there to what
that definition uses. So ``from edgekd.stages.training import read_json`` brings the file that
defines ``read_json``, and not what the other functions of that file import. A file is hashed
completely.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.errors import StageError
from edgekd.extension import (
    InstalledExtension,
    extensions_named,
    imported_sources,
    is_reference,
    parse,
    source_files,
)
from edgekd.files import edgerun_folder, file_sha256, write_whole

if TYPE_CHECKING:
    from edgekd.pipeline.stage import Job, Stage
    from edgekd.pipeline.store import Artifact

PLUMBING = (
    *("edgekd.pipeline", "edgekd.errors", "edgekd.progress"),
    *("edgekd.extension", "edgekd.extension"),
)
"""Packages and modules that no result depends on, so that they are not followed.

``pipeline`` hands a stage its settings and inputs, which are in the fingerprint by their values;
``errors`` words what failed; ``extension`` and ``entry_points`` find the user's own code, which is
in the fingerprint by its content and its distribution's version; ``progress`` is what is shown.
"""

ROOTS = {"edgekd": Path(__file__).resolve().parents[1], "edgerun": edgerun_folder()}
"""The folders of the two packages."""

_EVERYTHING, _FILE = "*", ""
"""Pseudo-names: everything that a module defines; the file alone, without its imports."""


@dataclass(frozen=True)
class _Module:
    """What a source file defines, uses and imports.

    Attributes:
        uses: by each name defined at its top, the names that its definition mentions.
        always: names mentioned by statements that run whenever the file is imported.
        imports: the target of each local name: a module, and the name in it (None: the module).
        texts: texts that may name a module, by definition; ``python -m`` and lazy imports do.
        dynamic: whether it imports the modules of its own folder, which it finds there.
        files: other files in its folder that its texts name, such as a template.
    """

    uses: dict[str, frozenset[str]] = field(default_factory=dict)
    always: frozenset[str] = frozenset()
    imports: dict[str, tuple[tuple[str, str | None], ...]] = field(default_factory=dict)
    texts: dict[str, frozenset[str]] = field(default_factory=dict)
    dynamic: bool = False
    files: frozenset[Path] = frozenset()


def code_of(modules: Iterable[str]) -> tuple[str, ...]:
    """The modules of edgekd and edgerun that these modules' code depends on, themselves included.

    Args:
        modules: dotted names, such as ``edgekd.stages.data``; modules outside edgekd are ignored.
    """
    return tuple(sorted(_reached(tuple(sorted(modules)))))


def files_of(module: str) -> list[Path]:
    """A module's source file, and the files next to it that it names, such as templates.

    Raises:
        KeyError: there is no such module.
    """
    file = module_file(module)
    if file is None:
        raise KeyError(module)
    return [file, *sorted(_read(module).files)]


@lru_cache
def _reached(modules: tuple[str, ...]) -> frozenset[str]:
    waiting = [(module, _EVERYTHING) for module in modules if module_file(module)]
    seen: set[tuple[str, str]] = set()
    while waiting:
        module, name = waiting.pop()
        if (module, name) in seen or _is_plumbing(module):
            continue
        seen.add((module, name))
        if name == _FILE:
            continue
        waiting += _next(module, name)
    return frozenset(module for module, _ in seen)


def _next(module: str, name: str) -> Iterator[tuple[str, str]]:
    """What one definition of a module uses: definitions here and elsewhere."""
    source = _read(module)
    if module == "edgekd.files" and name == "edgerun_folder":
        # The device-side package is run as a separate program and copied completely.
        yield from ((device, _FILE) for device in _inside("edgerun"))
    if source.dynamic:
        yield from ((inner, _EVERYTHING) for inner in _inside(module))
    names = source.uses if name == _EVERYTHING else (name,)
    mentioned = set(source.always)
    for own in names:
        mentioned |= source.uses.get(own, frozenset())
        for text in source.texts.get(own, ()):
            yield text, _EVERYTHING
        if own not in source.uses and own not in source.imports:
            inner = f"{module}.{own}"
            if module_file(inner):
                yield inner, _EVERYTHING
        mentioned.add(own)
    for used in mentioned:
        if used in source.uses and used != name:
            yield module, used
        for origin, original in source.imports.get(used, ()):
            if original is None:
                yield origin, _EVERYTHING
            elif module_file(f"{origin}.{original}"):
                yield f"{origin}.{original}", _EVERYTHING
            else:
                yield origin, original


def _is_plumbing(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in PLUMBING)


@lru_cache
def module_file(module: str) -> Path | None:
    """The source of a module of edgekd or edgerun; None when there is none."""
    top, *rest = module.split(".")
    if top not in ROOTS:
        return None
    stem = ROOTS[top].joinpath(*rest)
    package = stem / "__init__.py"
    if package.is_file():
        return package
    file = stem.with_suffix(".py")
    return file if rest and file.is_file() else None


def _inside(package: str) -> list[str]:
    """The modules of a package, those of its packages too."""
    file = module_file(package)
    if file is None or file.name != "__init__.py":
        return []
    paths = (p.relative_to(file.parent).with_suffix("") for p in sorted(file.parent.rglob("*.py")))
    return [".".join([package, *(part for part in p.parts if part != "__init__")]) for p in paths]


@lru_cache
def _read(module: str) -> _Module:
    file = module_file(module)
    tree = parse(file) if file is not None else None
    if file is None or tree is None:
        return _Module()
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    imports: dict[str, list[tuple[str, str | None]]] = {}
    uses: dict[str, set[str]] = {}
    texts: dict[str, set[str]] = {}
    always: set[str] = set()
    files: set[Path] = set()
    dynamic = False
    for statement in tree.body:
        mentioned: set[str] = set()
        modules: set[str] = set()
        for node in _executed(statement):
            if isinstance(node, ast.Name):
                mentioned.add(node.id)
            elif isinstance(node, str):
                if module_file(node.partition(":")[0]):
                    modules.add(node.partition(":")[0])
                elif "/" not in node and len(node) < 256 and (file.parent / node).is_file():
                    files.add(file.parent / node)
            else:
                for local, origin in _imported(node, package):
                    mentioned.add(local)
                    dynamic |= local == "pkgutil"
                    if module_file(origin[0]) or module_file(f"{origin[0]}.{origin[1]}"):
                        imports.setdefault(local, []).append(origin)
        defined = _defined(statement)
        if defined is None:
            always |= mentioned
        for name in defined or ():
            uses.setdefault(name, set()).update(mentioned)
            texts.setdefault(name, set()).update(modules)
    return _Module(
        {name: frozenset(names) for name, names in uses.items()},
        frozenset(always),
        {name: tuple(origins) for name, origins in imports.items()},
        {name: frozenset(names) for name, names in texts.items()},
        dynamic,
        frozenset(files),
    )


def _executed(statement: ast.stmt) -> list[ast.Name | ast.Import | ast.ImportFrom | str]:
    """The names, imports and texts with a dot in a statement, except those that are never run.

    Excluded are type-checking blocks and the annotations of functions.
    """
    found: list[ast.Name | ast.Import | ast.ImportFrom | str] = []
    waiting: list[ast.AST] = [statement]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Name, ast.Import, ast.ImportFrom)):
            found.append(node)
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, str) and "." in node.value and "\n" not in node.value:
                found.append(node.value)
        elif not (isinstance(node, ast.If) and _is_type_checking(node)):
            skipped = () if isinstance(node, ast.AnnAssign) else ("returns", "annotation")
            for name in node._fields:
                if name not in skipped:
                    value = getattr(node, name)
                    parts = value if isinstance(value, list) else (value,)
                    waiting += [part for part in parts if isinstance(part, ast.AST)]
    return found


def _imported(
    node: ast.Import | ast.ImportFrom, package: str
) -> Iterator[tuple[str, tuple[str, str | None]]]:
    """Each local name of an import, with its module and the name in it."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.asname or alias.name.partition(".")[0], (alias.name, None)
        return
    parents = package.split(".")
    stem = parents[: len(parents) - node.level + 1] if node.level else []
    origin = ".".join([*stem, *([node.module] if node.module else [])])
    for alias in node.names:
        yield alias.asname or alias.name, (origin, alias.name)


def _defined(statement: ast.stmt) -> list[str] | None:
    """The names that a statement at the top of a file defines; None when it has side effects."""
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [statement.name]
        case ast.Assign():
            parts = [part for target in statement.targets for part in ast.walk(target)]
            if any(isinstance(part, (ast.Attribute, ast.Subscript)) for part in parts):
                return None
            return [part.id for part in parts if isinstance(part, ast.Name)]
        case ast.AnnAssign():
            return [statement.target.id] if isinstance(statement.target, ast.Name) else None
        case ast.Import() | ast.ImportFrom():
            return []
        case ast.Expr(value=ast.Constant()):
            return []
        case ast.If() if _is_type_checking(statement):
            return []
    return None


def _is_type_checking(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@lru_cache
def code_sha256(modules: tuple[str, ...]) -> str:
    """The SHA-256 over the source of these modules and of all code they depend on.

    The dependencies are found by :func:`~edgekd.pipeline.fingerprint.code_of`. Reading
    all of them takes a second, so the result is cached for as long as no file has changed.
    """
    name = " ".join(modules)
    state = all_code_sha256()
    cached = _cached_hashes(state)
    if name not in cached:
        digest = hashlib.sha256()
        for module in code_of(modules):
            for file in files_of(module):
                digest.update(f"{module} {file.name}\0".encode())
                digest.update(file.read_bytes())
        cached[name] = digest.hexdigest()
        _cache_hashes(state, cached)
    return cached[name]


@lru_cache
def all_code_sha256() -> str:
    """The SHA-256 of every file of edgekd and edgerun, and of the Python version."""
    digest = hashlib.sha256(sys.version.encode())
    for root in ROOTS.values():
        for file in sorted(root.rglob("*")):
            if file.is_file() and file.suffix != ".pyc":
                digest.update(f"{file.relative_to(root)}\0".encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _hashes_file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "edgekd" / "code.json"


def _cached_hashes(state: str) -> dict[str, str]:
    """The cached hashes for this state of the code; empty without a readable cache."""
    try:
        noted = json.loads(_hashes_file().read_text(encoding="utf-8"))
        hashes = noted["hashes"] if noted["state"] == state else {}
        return {str(name): str(value) for name, value in hashes.items()}
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _cache_hashes(state: str, hashes: Mapping[str, str]) -> None:
    """Cache the hashes; a failure to write is ignored, because they only save time."""
    with suppress(OSError, RuntimeError, StageError):
        file = _hashes_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({"state": state, "hashes": hashes}))


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """Installed versions by distribution name, read without importing anything.

    One that is not installed is left out: what needs it says so.
    """
    found = {}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def references_sha256(value: Any) -> dict[str, str]:
    """Hashes of the source files of what is not edgekd's own inside a value.

    It is named there by ``package.module:name``, or by the name of an entry point.
    """
    hashes: dict[str, str] = {}
    for text in _texts(value):
        for reference in _own(text):
            for file in source_files(reference):
                name = f"{reference} {file.name}"
                while name in hashes:  # the __init__.py of two packages
                    name += "'"
                hashes[name] = file_sha256(file)
    return hashes


def edited_sources(value: Any) -> dict[Path, bool]:
    """Own code named inside a value that was edited after this process imported it.

    Returns:
        By file, whether its old form is what runs; False: which form runs is not known.
    """
    edited: dict[Path, bool] = {}
    for text in _texts(value):
        for reference in _own(text):
            for file, (digest, loaded) in imported_sources(reference).items():
                if not file.is_file() or file_sha256(file) != digest:
                    edited[file] = loaded
    return edited


def is_imported(value: Any, references: Mapping[str, str]) -> bool:
    """Whether own code named inside a value was imported in the form that has these hashes."""
    own = (reference for text in _texts(value) for reference in _own(text))
    known = set(references.values())
    return all(sha in known for name in own for sha, _ in imported_sources(name).values())


def _own(text: str) -> list[str]:
    return [text] if is_reference(text) else [each.reference for each in _extensions(text)]


def extension_versions(value: Any) -> dict[str, str]:
    """The versions, by distribution, of what is named inside a value by an entry point."""
    found = (each for text in _texts(value) for each in _extensions(text))
    return {each.distribution: each.version for each in found}


def _extensions(text: str) -> Iterable[InstalledExtension]:
    """The entry points of that name, whatever they are: one too many only makes a stage run."""
    return () if is_reference(text) else extensions_named(text)


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


def fingerprint_inputs(stage: Stage, job: Job, done: Mapping[str, Artifact]) -> dict[str, Any]:
    """Everything that a stage's result depends on."""
    chosen = stage.config_slice(job)
    return {
        "stage": stage.name,
        "config": chosen,
        "references": references_sha256(chosen),
        "inputs": {name: done[name].digest for name in stage.inputs},
        "code": code_sha256((type(stage).__module__,)),
        "libraries": {**library_versions(stage.libraries), **extension_versions(chosen)},
    }


def why_outdated(now: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    """A short reason why a stage is run again."""
    if before is None:
        return "not made yet"
    changes = _changes(now["config"], before.get("config", {}), "")
    if changes:
        return "changed: " + "; ".join(changes[:3]) + (" …" if len(changes) > 3 else "")
    inputs = _changed_keys(now["inputs"], before.get("inputs", {}))
    if inputs:
        return f"new input from {', '.join(inputs)}"
    libraries = _changed_keys(now["libraries"], before.get("libraries", {}))
    if libraries:
        return f"other version of {', '.join(libraries)}"
    if now["references"] != before.get("references"):
        return "your own source changed"
    if now["code"] != before.get("code"):
        return "edgekd's own code changed"
    return "its files were damaged or removed"


def _changed_keys(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    return [key for key, value in now.items() if before.get(key) != value]


def _changes(now: Any, before: Any, key: str) -> list[str]:
    if isinstance(now, Mapping) and isinstance(before, Mapping):
        names = sorted({*now, *before})
        return [
            change
            for name in names
            for change in _changes(now.get(name), before.get(name), f"{key}.{name}".lstrip("."))
        ]
    if isinstance(now, Sequence) and not isinstance(now, str):
        now = list(now)
    return [] if now == before else [f"{key} {_short(before)} → {_short(now)}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "…"
