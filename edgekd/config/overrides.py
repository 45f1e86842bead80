"""``--set key.sub=value``: change a pipeline for one run without editing its file."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from edgekd.config.yaml_source import parse_scalar
from edgekd.errors import InputError


@dataclass(frozen=True)
class Override:
    """One ``--set``: where it goes and what it puts there."""

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
                f"the value {value!r} is not valid YAML", where=f"--set {text}", remedy="quote it"
            ) from error
        return cls(text, tuple(int(p) if p.isdigit() else p for p in parts), parsed)


def apply_overrides(content: dict[str, Any], overrides: Sequence[Override]) -> dict[str, Any]:
    """A copy of ``content`` with every override put in; missing mappings are made.

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
