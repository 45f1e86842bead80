"""A YAML file together with the line of each of its keys, for error messages."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from edgekd.errors import InputError

Location = Sequence[str | int]


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads 1e-3 as the number it looks like."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"the key {key!r} is given twice (also in line {seen[key]})",
                    key_node.start_mark,
                )
            seen[key] = line
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?([eE][-+]?\d+)$"),
    list("-+0123456789"),
)


def parse_scalar(text: str) -> Any:
    """A YAML value given on the command line: ``3``, ``1e-3``, ``[a, b]``, ``true``."""
    return yaml.load(text, Loader=_Loader)


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
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(
            "the file does not exist", where=str(path), remedy="check the path"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the file cannot be read: {error}", where=str(path), remedy="give a text file in YAML"
        ) from error
    try:
        root = yaml.compose(text, Loader=_Loader)
        content = yaml.load(text, Loader=_Loader)
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
