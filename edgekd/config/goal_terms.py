"""The terms of a goal: its words cut into what ``goal_terms.yaml`` lists, numbers and devices."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edgekd.config.profile import list_profiles
from edgekd.config.yaml_source import read_yaml

THREADS = "engines.0.threads"
"""The key of a number of threads."""


@dataclass
class Token:
    """A term: what kind it is, what it means, and where it is in the text."""

    kind: str
    value: Any
    start: int
    end: int


_SIGNED = re.compile(r"[-+−]\s*\d|\d\s*[-–−]\s*\d")
_NUMBER = re.compile(r"\d+(?:\.\d+)?|(?<![\d.])\.\d+")
_FRACTION = re.compile(r"1\s*/\s*(\d+)")
_DIGITS = {c: n for n, c in enumerate("零一二三四五六七八九")} | {"两": 2, "俩": 2, "〇": 0}
_NUMERAL = re.compile(
    r"[零〇一二两三四五六七八九十百]+(?:点[零〇一二三四五六七八九]+(?![零〇一二三四五六七八九]))?|半"
)
_CHINESE_FRACTION = re.compile(r"([二三四五六七八九十百]+|\d+)分之([一二两三四五六七八九十]+|\d+)")


@cache
def _table() -> dict[str, Any]:
    return read_yaml(Path(__file__).with_name("goal_terms.yaml")).content


@cache
def _devices() -> dict[str, str | tuple[str, ...]]:
    """Every name of a device: its profile, or the profiles that it may be."""
    table = _table()
    names: dict[str, str | tuple[str, ...]] = {
        name: tuple(row["profiles"]) for row in table["ambiguous"] for name in row["names"]
    }
    for profile in list_profiles():
        for alias in (profile.replace("-", " "), *table["devices"].get(profile, ())):
            names |= {f"{vendor} {alias}".strip(): profile for vendor in ("", *table["vendors"])}
    return names


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], str, Any], ...]:
    rows = [
        (_pattern(phrase, r"\s+", row["kind"] == "unit"), row["kind"], row.get("value"))
        for row in _table()["terms"]
        for phrase in (*row.get("en", ()), *row.get("zh", ()))
    ]
    rows += [(_pattern(name, r"\s*", False), "device", value) for name, value in _devices().items()]
    return tuple(rows)


def _pattern(phrase: str, space: str, unit: bool) -> re.Pattern[str]:
    """A phrase as a pattern; one of letters must be words of its own, a unit may follow a digit."""
    body = space.join(map(re.escape, phrase.split()))
    if re.match(r"[a-z0-9]", phrase):
        body = (r"(?<![a-z])" if unit else r"(?<![a-z0-9])") + body
    if re.search(r"[a-z0-9]$", phrase):
        body += r"(?![a-z0-9])"
    return re.compile(body)


def _plain(text: str) -> str:
    """The text in lower case, with full-width forms and hyphens between letters replaced; of the
    same length, so that positions are those of the text.
    """
    parts = (unicodedata.normalize("NFKC", c).lower() for c in text)
    plain = "".join(p if len(p) == 1 else c for p, c in zip(parts, text, strict=True))
    return re.sub(r"(?<=[a-z])-(?=[a-z0-9])|(?<=[0-9])-(?=[a-z])", " ", plain.replace("’", "'"))


def tokens_of(text: str) -> tuple[list[Token], list[str]]:
    """The terms of a goal, and the words that are none."""
    plain, position = _plain(text), 0
    tokens: list[Token] = []
    unknown: list[str] = []
    broken = -1
    while position < len(plain):
        if plain[position].isspace():
            position += 1
            continue
        token = _term_at(plain, position)
        if token is not None:
            tokens.append(token)
            position = token.end
            continue
        word = re.compile(r"[a-z0-9_]+|.").match(plain, position)
        end = word.end() if word else position + 1
        if broken == position and unknown:
            unknown[-1] += text[position:end]
        else:
            unknown.append(text[position:end])
        position = broken = end
    return tokens, unknown


def _term_at(plain: str, start: int) -> Token | None:
    if _SIGNED.match(plain, start):
        return None
    best: Token | None = None
    for pattern, kind, value in _patterns():
        found = pattern.match(plain, start)
        if found and (best is None or found.end() > best.end):
            best = Token(kind, value, start, found.end())
    for token in _numbers_at(plain, start):
        if best is None or token.end > best.end:
            best = token
    return best


def _numbers_at(plain: str, start: int) -> Iterator[Token]:
    if found := _FRACTION.match(plain, start):
        if int(found[1]) > 1:
            yield Token("fraction", 1 / int(found[1]), start, found.end())
    elif (
        (found := _NUMBER.match(plain, start))
        and not plain[start - 1 : start].isalpha() | (plain[start - 1 : start] == ".")
    ) or (start and plain[start - 1] >= "一" and (found := _NUMBER.match(plain, start))):
        yield Token("number", float(found[0]), start, found.end())
    if found := _CHINESE_FRACTION.match(plain, start):
        below, above = _numeral(found[1]), _numeral(found[2])
        if 0 < above < below:
            value, kind = (above, "percent") if below == 100 else (above / below, "fraction")
            yield Token(kind, float(value), start, found.end())
    if found := _NUMERAL.match(plain, start):
        yield Token("number", _numeral(found[0]), start, found.end())


def _numeral(text: str) -> float:
    """A Chinese numeral below a thousand, with decimals, or digits."""
    if text.isdigit() and text.isascii():
        return float(text)
    if text == "半":
        return 0.5
    whole, _, decimals = text.partition("点")
    total = digit = 0
    for c in whole:
        if c in "十百":
            total, digit = total + (digit or 1) * (10 if c == "十" else 100), 0
        else:
            digit = 10 * digit + _DIGITS[c]
    return float(f"{total + digit}.{''.join(str(_DIGITS[c]) for c in decimals) or 0}")


def nearest_term(word: str) -> str | None:
    """The term that an unknown word is a misspelling of, or None."""
    if len(word) < 4 or not word.isascii():
        return None
    known = {
        phrase for row in _table()["terms"] for phrase in row.get("en", ())
    } | _devices().keys()
    found = difflib.get_close_matches(word.lower(), sorted(known), n=1, cutoff=0.8)
    return found[0] if found and found[0] != word.lower() else None
