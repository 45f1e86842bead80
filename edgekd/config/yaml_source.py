"""A YAML file together with the line of each of its keys, for error messages."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from edgekd.errors import InputError
from edgekd.files import require_regular_file

Location = Sequence[str | int]


LARGEST = 1 << 19
"""Size limit of a file, in bytes: a list of 20,000 class names has 400 kB."""

DEEPEST = 64
"""Limit of nesting."""

MOST_VALUES = 100_000
"""Limit of values and keys, each counted as often as an alias repeats it."""

_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")
)
_OTHER_BASE = re.compile(r"[-+]?0[\d_]+|.*:.*")
"""Octal and sexagesimal numbers of YAML 1.1."""
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as the number it looks like, and a date as text.

    It refuses duplicate keys, other tags than those of JSON's values, control characters, deep
    nesting, and integers of more than 64 bits.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if parent is not None and self.depth > DEEPEST:
            raise _wrong(f"it is nested more than {DEEPEST} levels deep", parent)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag not in _TAGS:
            raise _wrong(f"the tag {node.tag!r} is not supported", node)
        try:
            value = super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            kind = node.tag.rpartition(":")[2]
            raise _wrong(f"{_shortened(node.value)} is no valid {kind}", node) from error
        if isinstance(value, str) and _UNPRINTABLE.search(value):
            raise _wrong(f"{_shortened(value)} has a control character in it", node)
        if isinstance(value, int | float) and _OTHER_BASE.fullmatch(str(node.value)):
            raise _wrong(
                f"{_shortened(node.value)} is not a plain decimal number, YAML reads it as "
                f"{value:g}: write {value:g}, or the text in quotes",
                node,
            )
        if isinstance(value, int) and value.bit_length() > 64:
            raise _wrong(f"the integer {_shortened(node.value)} is too large", node)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                raise _wrong("a key cannot be a list or a mapping", key_node)
            if key in seen:
                raise _wrong(f"the key {key!r} is given twice (also in line {seen[key]})", key_node)
            seen[key] = line
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?([eE][-+]?\d+)$"),
    list("-+0123456789"),
)
_Loader.yaml_implicit_resolvers = {
    first: [each for each in resolvers if each[0] != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def _wrong(what: str, place: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, what, place.start_mark)


def _shortened(text: object) -> str:
    shown = repr(text)
    return shown if len(shown) <= 60 else f"{shown[:50]}… ({len(shown):,} characters)"


def _check_aliases(root: yaml.Node) -> None:
    """Refuse aliases of what they are in, and those that multiply a small file's content."""
    sizes: dict[yaml.Node, int | None] = {}

    def size(node: yaml.Node) -> int:
        if node in sizes:
            known = sizes[node]
            if known is None:
                raise _wrong("an alias names what it is itself a part of", node)
            return known
        sizes[node] = None
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        nodes = (each for part in parts for each in (part if isinstance(part, tuple) else (part,)))
        count = sizes[node] = 1 + sum(map(size, nodes))
        if count > MOST_VALUES:
            raise _wrong(f"it has more than {MOST_VALUES:,} values, aliases included", node)
        return count

    size(root)


def _parse(text: str) -> tuple[yaml.Node | None, Any]:
    """The nodes of a document and its value.

    Raises:
        yaml.YAMLError: it is not YAML, or something that :class:`_Loader` refuses.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None, None
        _check_aliases(root)
        return root, loader.construct_document(root)
    except (ValueError, OverflowError) as error:
        # The scanner's escapes, such as "\\U00110000".
        raise yaml.scanner.ScannerError(None, None, str(error), loader.get_mark()) from error
    finally:
        loader.dispose()


def parse_scalar(text: str) -> Any:
    """A YAML value given on the command line: ``3``, ``1e-3``, ``[a, b]``, ``true``.

    Raises:
        yaml.YAMLError: it is not YAML, or nothing that a file may have.
    """
    return _parse(text)[1]


@dataclass
class YamlSource:
    """The content of a YAML file, and the line of each key."""

    path: Path
    content: dict[str, Any]
    root: yaml.Node

    def line(self, location: Location) -> int:
        """The 1-based line of a key; if the file lacks it, of its nearest parent."""
        node, line = self.root, self.root.start_mark.line + 1
        for part in location:
            if isinstance(node, yaml.MappingNode):
                found = next(((k, v) for k, v in node.value if k.value == str(part)), None)
                if found is None:
                    return line
                line, node = found[0].start_mark.line + 1, found[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
                if part >= len(node.value):
                    return line
                node = node.value[part]
                line = node.start_mark.line + 1
        return line

    def at(self, location: Location) -> str:
        """``file:line`` of a key."""
        return f"{self.path}:{self.line(location)}"


def read_yaml(path: Path) -> YamlSource:
    """Read a YAML file whose top level is a mapping.

    Raises:
        InputError: the file is missing, unreadable, not YAML, or not a mapping.
    """
    require_regular_file(path, "give a text file in YAML")
    try:
        with path.open("rb") as stream:
            data = stream.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise InputError(
                f"the file has more than {LARGEST >> 10} kB",
                where=str(path),
                remedy="give a pipeline, a profile or budgets; these have a few kB",
            )
        text = data.decode("utf-8")
    except FileNotFoundError as error:
        raise InputError(
            "the file does not exist", where=str(path), remedy="check the path"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the file cannot be read: {error}", where=str(path), remedy="give a text file in YAML"
        ) from error
    try:
        root, content = _parse(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise InputError(
            f"this is not valid YAML: {error.problem}",
            where=f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path),
            remedy="fix the line; indentation is by spaces",
        ) from error
    except yaml.YAMLError as error:
        raise InputError(
            f"this is not valid YAML: {error}", where=str(path), remedy="give a text file in YAML"
        ) from error
    if root is None or not isinstance(content, dict):
        raise InputError(
            "the file is not a mapping of keys",
            where=str(path),
            remedy="write 'key: value' lines; 'edgekd init' writes an example",
        )
    return YamlSource(path, content, root)
