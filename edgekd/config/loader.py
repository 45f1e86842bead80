"""Read a YAML file, apply overrides, validate; errors name the line."""

from __future__ import annotations

import copy
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from edgekd.config.yaml_source import YamlSource, parse_scalar, read_yaml
from edgekd.errors import InputError, nearest


@dataclass(frozen=True)
class Override:
    """One ``--set``: a key and its new value."""

    text: str
    location: tuple[str | int, ...]
    value: Any

    @classmethod
    def parse(cls, text: str) -> Override:
        """Read ``distill.losses.0.weight=0.5``.

        Raises:
            InputError: there is no ``=``, an empty key, or the value is not YAML.
        """
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise InputError(
                f"{text!r} sets nothing",
                where="--set",
                remedy="write key.sub=value, for example --set distill.epochs=5",
            )
        try:
            parsed = parse_scalar(value)
        except yaml.YAMLError as error:
            raise InputError(
                f"the value is not valid YAML: {getattr(error, 'problem', None) or error}",
                where=f"--set {text}",
                remedy="quote it",
            ) from error
        return cls(text, tuple(int(p) if _is_index(p) else p for p in parts), parsed)


def _is_index(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) < 10


def apply_overrides(content: dict[str, Any], overrides: Sequence[Override]) -> dict[str, Any]:
    """A copy of ``content`` with every override applied; missing mappings are created.

    Raises:
        InputError: an override goes through a value that has no keys, or past a list's end.
    """
    result = copy.deepcopy(content)
    for override in overrides:
        node: Any = result
        for part, following in zip(override.location, (*override.location[1:], None), strict=True):
            last = following is None
            if isinstance(node, dict):
                if last:
                    node[str(part)] = override.value
                else:
                    if node.get(str(part)) is None:
                        node[str(part)] = {}
                    node = node[str(part)]
            elif isinstance(node, list) and isinstance(part, int) and part < len(node):
                if last:
                    node[part] = override.value
                else:
                    node = node[part]
            else:
                raise InputError(
                    f"there is nothing named {part!r} to set",
                    where=f"--set {override.text}",
                    remedy="list entries are numbered from 0; see the keys in the file",
                )
    return result


Model = TypeVar("Model", bound=BaseModel)


def load_section(
    path: Path, model: type[Model], key: str | None = None, overrides: Sequence[str] = ()
) -> Model:
    """Read and validate a YAML file, or one section of it.

    Args:
        path: the YAML file.
        model: the pydantic model of the content.
        key: take this top-level key's value; None takes the complete file.
        overrides: ``key.sub=value`` strings that replace values of the file (``--set``).

    Raises:
        InputError: anything in the file or the overrides is wrong; all problems are named.
    """
    source = read_yaml(path)
    parsed = [Override.parse(text) for text in overrides]
    content: Any = apply_overrides(source.content, parsed)
    if key is None:
        return _validate(model, content, source, (), parsed)
    if key not in content:
        raise InputError(
            f"the file has no key {key!r}", where=str(path), remedy=f"add a '{key}:' section"
        )
    return _validate(model, content[key], source, (key,), parsed)


def _validate(
    model: type[Model],
    content: Any,
    source: YamlSource,
    prefix: tuple[str, ...],
    overrides: Sequence[Override],
) -> Model:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = [
            _explain(model, details, source, prefix, overrides) for details in error.errors()
        ]
    if len(problems) == 1:
        what, where, remedy = problems[0]
        raise InputError(what, where=where, remedy=remedy or "change this key")
    rows = [
        f"{where}: {what}" + (f" ({remedy})" if remedy else "") for what, where, remedy in problems
    ]
    raise InputError(
        f"{len(problems)} things are wrong:\n  " + "\n  ".join(rows),
        where=str(source.path),
        remedy="fix each of them",
    )


def _explain(
    model: type[BaseModel],
    details: ErrorDetails,
    source: YamlSource,
    prefix: tuple[str, ...],
    overrides: Sequence[Override],
) -> tuple[str, str, str | None]:
    """One pydantic error as (what, where, remedy)."""
    found, untagged = _sections_at(model, details["loc"])
    location: tuple[str | int, ...] = (*prefix, *untagged)
    key = ".".join(map(str, location))
    where = source.at(location)
    for override in overrides:
        if location[: len(override.location)] == override.location:
            where = f"--set {override.text}"
    kind, given = details["type"], details["input"]
    if kind == "extra_forbidden":
        known = sorted({field for section in found for field in section.model_fields})
        guess = nearest(str(location[-1]), known)
        hint = f"did you mean {guess!r}? " if guess else ""
        return f"unknown key {key!r}", where, f"{hint}known: {', '.join(known)}"
    if kind == "union_tag_invalid":
        choices = _quoted(details["ctx"]["expected_tags"])
        guess = nearest(str(details["ctx"]["tag"]), choices)
        hint = f"did you mean {guess!r}? " if guess else ""
        what = f"{key}: there is none named {details['ctx']['tag']!r}"
        return what, where, f"{hint}known: {', '.join(choices)}"
    if kind == "missing":
        return f"the key {key!r} is missing", where, f"add '{location[-1]}: …'"
    if kind == "value_error":
        return (
            f"{key}: {details['ctx']['error']}" if key else str(details["ctx"]["error"]),
            where,
            None,
        )
    if kind == "string_type" and isinstance(given, dict):
        return _name_with_arguments(key, str(location[-1]), given, found, where)
    message = details["msg"][0].lower() + details["msg"][1:]
    shown = "" if isinstance(given, dict | list) else f"; it is {given!r}"
    if kind == "literal_error":
        guess = nearest(str(given), _quoted(details["ctx"]["expected"]))
        remedy = f"did you mean {guess!r}?" if guess else None
        return f"{key}: {message}{shown}", where, remedy
    return f"{key}: {message}{shown}", where, None


def _name_with_arguments(
    key: str, last: str, given: dict[Any, Any], found: list[type[BaseModel]], where: str
) -> tuple[str, str, str]:
    """The error for a name that is written as a mapping of the name to its arguments."""
    fields = {field for section in found for field in section.model_fields}
    arguments = next((name for name in (f"{last}_args", "args") if name in fields), None)
    what = f"{key}: it takes a name alone, and this is a mapping"
    name = str(next(iter(given), "NAME")) if len(given) == 1 else "NAME"
    quoted = f'"{name}"' if ":" in name else name
    suffix = f" and its arguments next to it: '{arguments}: {{…}}'" if arguments else ""
    return what, where, f"write '{last}: {quoted}'{suffix}"


def _quoted(expected: str) -> list[str]:
    return expected.split("'")[1::2]


def _sections_at(
    model: type[BaseModel], location: tuple[str | int, ...]
) -> tuple[list[type[BaseModel]], tuple[str | int, ...]]:
    """The section classes that a location's last key may belong to, and the keys as written.

    Where a section is one of several kinds, pydantic adds the kind, or the tag ``<Class>``, to
    the location.
    """
    current: list[type[BaseModel]] = [model]
    written: list[str | int] = []
    for index, part in enumerate(location):
        if isinstance(part, str) and part.startswith("<"):
            current = [section for section in current if part == f"<{section.__name__}>"]
            continue
        tagged = [section for section in current if len(current) > 1 and part in _kinds(section)]
        if tagged:
            current = tagged
            continue
        written.append(part)
        if isinstance(part, int) or index == len(location) - 1:
            continue
        fields = [section.model_fields[part] for section in current if part in section.model_fields]
        current = [inner for field in fields for inner in _sections_in(field.annotation)]
    return current, tuple(written)


def _kinds(section: type[BaseModel]) -> tuple[Any, ...]:
    field = section.model_fields.get("kind")
    return typing.get_args(field.annotation) if field is not None else ()


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The section classes inside an annotation such as ``tuple[LossTerm, ...]`` or ``X | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in typing.get_args(annotation) for found in _sections_in(argument)]
