"""Change a good input so that it is nearly good: bytes, JSON and YAML. Seeded, so repeatable."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

NUMBERS = (0, 1, 2, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1)


def changed_bytes(content: bytes, random_: random.Random) -> bytes:
    """Flip, overwrite, remove, repeat, insert or truncate, once to four times."""
    data = bytearray(content)
    for _ in range(random_.randint(1, 4)):
        at = random_.randrange(len(data) + 1)
        kind = random_.choice(("flip", "byte", "number", "cut", "repeat", "insert", "truncate"))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << random_.randrange(8)
        elif kind == "byte" and at < len(data):
            data[at] = random_.choice((0, 1, 0x20, 0x7F, 0x80, 0xFF))
        elif kind == "number":
            size = random_.choice((4, 8))
            number = random_.choice(NUMBERS) % (1 << 8 * size)
            data[at : at + size] = struct.pack("<I" if size == 4 else "<Q", number)
        elif kind == "cut":
            del data[at : at + random_.randint(1, 64)]
        elif kind == "repeat":
            data[at:at] = data[at : at + random_.randint(1, 64)] * random_.choice((1, 2, 40))
        elif kind == "insert":
            data[at:at] = random_.randbytes(random_.randint(1, 16))
        elif kind == "truncate" and random_.random() < 0.5:
            del data[at:]
    return bytes(data)


class Raw(str):
    """Text that is written into JSON or YAML as it is."""


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e-320, 1e308),
    *(
        "",
        " ",
        "x",
        "a\nb",
        "\x1b[31m[/red]",
        "[bold]",
        "<script>",
        "../../etc/passwd",
        "/dev/zero",
    ),
    *("a\0b", "1", "nan", "x" * 5000, "\u202eabc", "猫"),
    *([], {}, [1], [[]], {"": 1}, {"x": None}, ["a", 1, None], [0] * 1000),
    *(Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("9" * 5000), Raw("0.1.2")),
    *(Raw("[" * 2000 + "]" * 2000), Raw('{"a":' * 300 + "1" + "}" * 300), Raw('"\\ud800"')),
)
"""What is put in the place of a part of a JSON value."""

IN_YAML: tuple[Any, ...] = (
    *(Raw("010"), Raw("1:30"), Raw("0x1F"), Raw("1_000"), Raw("yes"), Raw("~"), Raw("2001-99-99")),
    *(Raw("2001-12-31"), Raw("!!int abc"), Raw("!!float x"), Raw("!!python/name:os.system")),
    *(Raw("!!binary x"), Raw("!!set {a}"), Raw("!!omap [a]"), Raw("!x y"), Raw("&a [*a]")),
    *(Raw("*b"), Raw("&x {<<: *x}"), Raw('"\\U00110000"'), Raw("{? [a] : b}"), Raw("{a: 1, a: 2}")),
    *(Raw("|"), Raw(".nan"), Raw(".inf"), Raw("@x"), Raw("%TAG"), Raw("\t"), Raw("{")),
    Raw("]"),
    Raw("[&a [x,x,x,x,x,x,x,x],&b [*a,*a,*a,*a,*a,*a,*a],&c [*b,*b,*b,*b,*b,*b],&d [*c,*c,*c,*c,*c]"
        ",&e [*d,*d,*d,*d,*d,*d],&f [*e,*e,*e,*e,*e,*e],&g [*f,*f,*f,*f,*f,*f]]"),
)  # fmt: skip
"""Further values of YAML, right and wrong."""


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    entries = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        entries = enumerate(value[:6])
    for key, inner in entries:
        found += _places(inner, (*path, key))
    return found


def changed_value(value: Any, random_: random.Random, values: tuple[Any, ...] = VALUES) -> Any:
    """Replace, remove, repeat, rename or scale parts, once to three times."""
    value = copy.deepcopy(value)
    for _ in range(random_.choice((1, 1, 2, 3))):
        places = _places(value)
        if not places:
            return random_.choice(values)
        *parents, last = random_.choice(places)
        node = value
        for key in parents:
            node = node[key]
        kind = random_.choice(("replace",) * 5 + ("remove", "add", "rename", "scale"))
        if kind == "replace":
            node[last] = random_.choice(values)
        elif kind == "remove":
            del node[last]
        elif kind == "add" and isinstance(node, list):
            node.insert(random_.randrange(len(node) + 1), random_.choice(values))
        elif kind == "add":
            node[random_.choice(("x", "", "a\0", "name", "1", "x" * 300))] = random_.choice(values)
        elif kind == "rename" and isinstance(node, dict):
            name = str(last)
            node[name[:-1] or "x"] = node.pop(last)
        elif isinstance(node[last], (int, float)) and not isinstance(node[last], bool):
            node[last] *= random_.choice((-1, 0, 1e6, 1e-6))
    return value


def as_json(value: Any) -> bytes:
    """A JSON text with its raw parts, which is YAML too."""
    parts: list[str] = []

    def marked(inner: Any) -> Any:
        if isinstance(inner, Raw):
            parts.append(str(inner))
            return f"@raw{len(parts) - 1}@"
        if isinstance(inner, dict):
            return {key: marked(each) for key, each in inner.items()}
        return [marked(each) for each in inner] if isinstance(inner, list) else inner

    text = json.dumps(marked(value), ensure_ascii=False)
    for number, part in enumerate(parts):
        text = text.replace(f'"@raw{number}@"', part)
    return text.encode("utf-8", "surrogatepass")


def changed_json(value: Any, random_: random.Random) -> bytes:
    """A changed JSON file: mostly by its values, at times by its bytes."""
    if random_.random() < 0.2:
        return changed_bytes(as_json(value), random_)
    return as_json(changed_value(value, random_))


def changed_yaml(text: str, value: Any, random_: random.Random) -> bytes:
    """A changed YAML file: by its values in flow style, or by the bytes of its text."""
    if random_.random() < 0.35:
        return changed_bytes(text.encode(), random_)
    return as_json(changed_value(value, random_, VALUES + IN_YAML))
