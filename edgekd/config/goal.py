"""Requirements in plain words: "under 5 ms and 20 MB on an Orin Nano, lose at most one point".

A small grammar of quantities with units, device names and wishes, in English and Chinese; no model
and no network. A goal is cut into terms of a fixed table (the longest one first), quantities are
joined with the words around them in their clause, and each becomes a key of a pipeline file. Every
word is part of something understood, a filler of the table, or an error: nothing is ignored.
"""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from edgekd.config.goal_terms import ALIASES, AMBIGUOUS, TERMS, THREADS, VENDORS
from edgekd.config.profile import list_profiles
from edgekd.errors import InputError

LONGEST = 1000
"""Limit of a goal, in characters."""

OBJECTIVES = "student.search.objectives"
"""The key of the wishes "as small as possible", "as fast as possible" and the like."""


@dataclass(frozen=True)
class Wish:
    """One key that a goal sets."""

    key: str
    """Dotted, as for ``--set``."""
    value: Any
    """A JSON value."""
    words: str
    """The words of the goal that it is from."""
    note: str | None = None
    """What was decided where the words leave it open."""
    rate: bool = False
    """Whether a latency was given as samples per second, so that a batch may take longer."""


@dataclass(frozen=True)
class Goal:
    """What a goal was understood as."""

    wishes: tuple[Wish, ...]
    """In the order of the words."""

    def overrides(self, content: Mapping[str, Any]) -> list[str]:
        """The wishes as ``key=value`` for a pipeline file with this content.

        Raises:
            InputError: a wish needs something that the file does not leave open.
        """
        values = {wish.key: wish.value for wish in self.wishes}
        benchmark = content.get("benchmark")
        batch = benchmark.get("batch_size", 1) if isinstance(benchmark, Mapping) else 1
        batch = values.get("benchmark.batch_size", batch)
        lines = []
        for wish in self.wishes:
            key, value = wish.key, wish.value
            if wish.rate and isinstance(batch, int) and batch > 1:
                value = _rounded(value * batch)
            if key == THREADS:
                key, value = _threads(content.get("engines"), value)
            if key == OBJECTIVES:
                student = content.get("student")
                if not isinstance(student, Mapping) or "search" not in student:
                    raise InputError(
                        f"{wish.words!r} asks to choose the student, and the file names one",
                        where="--goal",
                        remedy="write student: {search: {}}, or let 'edgekd advise' write a "
                        "pipeline with a search",
                    )
            lines.append(f"{key}={json.dumps(value, ensure_ascii=False)}")
        return lines

    def lines(self) -> list[str]:
        """One line for each key: its value, the words, and what was decided."""
        shown = [f"{wish.key}: {json.dumps(wish.value)}" for wish in self.wishes]
        width = max(map(len, shown))
        return [
            f"{text:{width}}  from {wish.words!r}" + (f" ({wish.note})" if wish.note else "")
            for text, wish in zip(shown, self.wishes, strict=True)
        ]


def _threads(engines: Any, threads: int) -> tuple[str, Any]:
    """The override of the first engine's threads; a name alone is no mapping to set a key of."""
    if isinstance(engines, list) and engines and isinstance(engines[0], Mapping):
        return THREADS, threads
    first = engines[0] if isinstance(engines, list) and engines else "onnxruntime"
    entry = {"kind": first, "threads": threads}
    if isinstance(engines, list) and len(engines) > 1:
        return "engines.0", entry
    return "engines", [entry]


@dataclass
class _Token:
    kind: str
    value: Any
    start: int
    end: int


@dataclass
class _Quantity(_Token):
    """A number with its unit, and the words of its clause that belong to it."""

    at_most: bool = False
    at_least: bool = False
    topics: set[str] = field(default_factory=set)
    about: bool = False


_SIGNED = re.compile(r"[-+−]\s*\d|\d\s*[-–−]\s*\d")
_COMMA = re.compile(r"\d+,\d+")
_NUMBER = re.compile(r"\d+(?:\.\d+)?|(?<![\d.])\.\d+")
_FRACTION = re.compile(r"1\s*/\s*(\d+)")
_DIGITS = {c: n for n, c in enumerate("零一二三四五六七八九")} | {"两": 2, "俩": 2, "〇": 0}
_NUMERAL = re.compile(r"[零〇一二两三四五六七八九十百]+(?:点[零〇一二三四五六七八九]+(?![零〇一二三四五六七八九]))?|半")
_CHINESE_FRACTION = re.compile(r"([二三四五六七八九十百]+|\d+)分之([一二两三四五六七八九]|\d+)")


def parse_goal(text: str) -> Goal:
    """The keys that a goal asks for.

    Args:
        text: words, English or Chinese, such as ``延迟低于 5 毫秒, 20 MB 以内, 树莓派 5``.

    Raises:
        InputError: a word is not understood, a quantity can mean several things, two wishes
            contradict each other, or there is no wish. The error quotes the words.
    """
    if len(text) > LONGEST:
        raise _wrong(f"the goal has more than {LONGEST} characters", "say it shorter")
    if found := _COMMA.search(text):
        raise _wrong(
            f"{found[0]!r} has a comma between its digits",
            f"write decimals with a point ({found[0].replace(',', '.')}) and thousands without "
            f"anything ({found[0].replace(',', '')}); a space follows a comma between wishes",
        )
    tokens, unknown = _tokens(text)
    if unknown:
        raise _not_understood(unknown)
    wishes: list[Wish] = []
    left: list[_Token] = []
    for clause in _clauses(tokens):
        found_here, rest = _understood(clause, text)
        wishes += found_here
        left += rest
    if left:
        raise _not_understood([text[token.start : token.end] for token in left])
    if not wishes:
        raise _wrong("the goal has no wish in it", 'say for example "under 5 ms and 20 MB"')
    return Goal(_consistent(wishes))


def _wrong(what: str, remedy: str) -> InputError:
    return InputError(what, where="--goal", remedy=remedy)


def _not_understood(words: Iterable[str]) -> InputError:
    named = list(dict.fromkeys(word.strip() for word in words))
    hints = [hint for word in named if (hint := _nearest(word))]
    guess = f"did you mean {', '.join(map(repr, hints))}? " if hints else ""
    return _wrong(
        f"not understood: {', '.join(map(repr, named))}",
        f"{guess}say quantities with what they limit (p99 under 5 ms, 20 MB of memory, lose at "
        "most one point, 3x faster), devices ('edgekd profiles list'), int8, fp16 or float only, "
        "as small as possible",
    )


def _nearest(word: str) -> str | None:
    if len(word) < 4 or not word.isascii():
        return None
    known = {phrase for _, _, phrases in TERMS for phrase in phrases.split("|")} | _devices().keys()
    found = difflib.get_close_matches(word.lower(), sorted(known), n=1, cutoff=0.75)
    return found[0] if found and found[0] != word.lower() else None


# Terms ------------------------------------------------------------------------------------------


@cache
def _devices() -> dict[str, str | tuple[str, ...]]:
    """Every name of a device: its profile, or the profiles that it may be."""
    names: dict[str, str | tuple[str, ...]] = dict(AMBIGUOUS)
    for profile in list_profiles():
        for alias in (profile.replace("-", " "), *ALIASES.get(profile, "").split("|")):
            if alias:
                names |= {f"{vendor} {alias}".strip(): profile for vendor in ("", *VENDORS)}
    return names


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], str, Any], ...]:
    rows = [
        (_pattern(phrase, r"\s+", kind == "unit"), kind, value)
        for kind, value, phrases in TERMS
        for phrase in phrases.split("|")
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


def _tokens(text: str) -> tuple[list[_Token], list[str]]:
    """The terms of a goal, and the words that are none."""
    plain, position = _plain(text), 0
    tokens: list[_Token] = []
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


def _term_at(plain: str, start: int) -> _Token | None:
    if _SIGNED.match(plain, start):
        return None
    best: _Token | None = None
    for pattern, kind, value in _patterns():
        found = pattern.match(plain, start)
        if found and (best is None or found.end() > best.end):
            best = _Token(kind, value, start, found.end())
    for token in _numbers_at(plain, start):
        if best is None or token.end > best.end:
            best = token
    return best


def _numbers_at(plain: str, start: int) -> Iterator[_Token]:
    if found := _FRACTION.match(plain, start):
        if int(found[1]) > 1:
            yield _Token("fraction", 1 / int(found[1]), start, found.end())
    elif (found := _NUMBER.match(plain, start)) and not plain[start - 1 : start].isalpha() | (
        plain[start - 1 : start] == "."
    ):
        yield _Token("number", float(found[0]), start, found.end())
    elif start and "一" <= plain[start - 1] and (found := _NUMBER.match(plain, start)):
        yield _Token("number", float(found[0]), start, found.end())
    if found := _CHINESE_FRACTION.match(plain, start):
        below, above = _numeral(found[1]), _numeral(found[2])
        if 0 < above < below:
            value, kind = (above, "percent") if below == 100 else (above / below, "fraction")
            yield _Token(kind, float(value), start, found.end())
    if found := _NUMERAL.match(plain, start):
        yield _Token("number", _numeral(found[0]), start, found.end())


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


# Clauses ----------------------------------------------------------------------------------------


def _clauses(tokens: Sequence[_Token]) -> Iterator[list[_Token]]:
    """The tokens between separators, with the quantities put together."""
    clause: list[_Token] = []
    for token in (*tokens, _Token("separator", None, 0, 0)):
        if token.kind != "separator":
            clause.append(token)
        elif clause:
            yield _with_quantities(clause)
            clause = []


def _with_quantities(tokens: list[_Token]) -> list[_Token]:
    result: list[_Token] = []
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        article = token.kind == "article"
        if token.kind in ("fraction", "percent", "times"):
            token = _Quantity(token.kind, token.value, token.start, token.end)
        elif token.kind == "number" or (article and rest and rest[0].kind == "unit"):
            number = 1.0 if article else token.value
            if rest[1:] and rest[0].kind == "article" and rest[1].kind == "unit":
                rest.pop(0)  # "half a point"
            kind, factor, end = "count", 1.0, token.end
            if rest and rest[0].kind == "unit":
                unit = rest.pop(0)
                (kind, factor), end = unit.value, unit.end
            elif not article and number == 0.5:
                kind = "fraction"
            token = _Quantity(kind, number * factor, token.start, end)
        result.append(token)
    return result


_TOPICS = {
    "time": {"latency", "p50", "p90", "p95", "p99", "faster"},
    "rate": {"latency", "p50", "p90", "p95", "p99", "faster"},
    "bytes": {"memory", "size", "smaller"},
    "mega": {"memory", "size", "smaller", "parameters"},
    "percent": {"drop", "accuracy", "teacher", "gain", "faster", "smaller", "size", "parameters"},
    "points": {"drop", "accuracy", "teacher", "gain"},
    "times": {"faster", "smaller", "size", "parameters", "teacher"},
    "fraction": {"faster", "latency", "smaller", "size", "parameters", "teacher"},
    "count": {"batch", "parameters", "accuracy", "error", "drop", "faster"},
    "pieces": {"batch", "faster"},
    "threads": set(),
}
"""What the words around a quantity may be about, by its unit."""


def _understood(clause: list[_Token], text: str) -> tuple[list[Wish], list[_Token]]:
    """The wishes of a clause, and its words that belong to nothing."""
    left: list[_Token] = []
    spans: dict[int, list[_Token]] = {}
    quantities = [token for token in clause if isinstance(token, _Quantity)]
    topics = [token.start for token in clause if token.kind == "topic"]
    topics_first = bool(quantities and topics and topics[0] < quantities[0].start)
    for token in clause:
        if isinstance(token, _Quantity) or token.kind in ("filler", "article", "set", "device",
                                                          "objective"):  # fmt: skip
            continue
        before = [q for q in quantities if q.start < token.start][-1:]
        after = [q for q in quantities if q.start > token.start][:1]
        backwards = token.kind.endswith("-after") or (token.kind == "topic" and not topics_first)
        order = before + after if backwards else after + before
        if token.kind == "topic":
            order = [q for q in order if token.value in _TOPICS[q.kind]]
        if token.kind in ("unit", "number") or not order:
            left.append(token)
            continue
        owner = order[0]
        spans.setdefault(owner.start, []).append(token)
        if token.kind == "topic":
            owner.topics.add(token.value)
        owner.at_most |= token.kind.startswith("at-most")
        owner.at_least |= token.kind.startswith("at-least")
        owner.about |= token.kind == "about"
    wishes = [(t.start, w) for t in clause for w in _complete(t, text[t.start : t.end])]
    for quantity in quantities:
        parts = [quantity, *spans.get(quantity.start, [])]
        words = text[min(t.start for t in parts) : max(t.end for t in parts)]
        wishes.append((quantity.start, _wish(quantity, words)))
    return [wish for _, wish in sorted(wishes, key=lambda pair: pair[0])], left


def _complete(token: _Token, words: str) -> Iterator[Wish]:
    """The wishes of a term that says everything by itself."""
    if token.kind == "set":
        yield from (Wish(key, value, words) for key, value in token.value.items())
    elif token.kind == "objective":
        yield Wish(OBJECTIVES, [token.value], words)
    elif token.kind == "device":
        if not isinstance(token.value, str):
            raise _wrong(f"{words!r} can be {' or '.join(token.value)}", "name one of them")
        yield Wish("profile", token.value, words)


# Quantities -------------------------------------------------------------------------------------


def _rounded(value: float) -> float:
    return float(f"{value:.9g}")


def _wish(quantity: _Quantity, words: str) -> Wish:
    """The key of a quantity with the words that belong to it."""
    if quantity.at_most and quantity.at_least:
        raise _wrong(f"{words!r} is both at most and at least", "say one of them")
    if quantity.value <= 0 and "drop" not in quantity.topics:
        raise _wrong(f"{words!r} asks for nothing: it is 0", "give a number above 0")
    key, value, upper, note = _key(quantity, words)
    if (quantity.at_least and upper) or (quantity.at_most and upper is False):
        limit, asked = ("an upper", "at least") if upper else ("a lower", "at most")
        raise _wrong(
            f"{words!r}: {key} has {limit} limit, and this asks for {asked}",
            f"say {'at most' if upper else 'at least'}",
        )
    if quantity.about:
        note = "; ".join(filter(None, (note, "taken as the limit")))
    return Wish(key, value, words, note, rate=quantity.kind in ("rate", "pieces") and upper is False
                and key.startswith("gate.latency"))  # fmt: skip


_Found = tuple[str, Any, bool | None, str | None]
"""A key, its value, whether it is an upper limit (None: neither), and a note."""


def _key(quantity: _Quantity, words: str) -> _Found:
    kind, value, topics = quantity.kind, quantity.value, quantity.topics
    if kind == "pieces" and "faster" in topics:
        kind = "rate"
    if kind in ("time", "rate"):
        percentiles = sorted(topics & {"p50", "p90", "p95", "p99"})
        if len(percentiles) > 1:
            raise _wrong(f"{words!r} names two percentiles", "give each its own limit")
        key = f"gate.latency.{percentiles[0] if percentiles else 'p95'}_ms"
        if kind == "time":
            return key, _rounded(value), True, None
        return key, _rounded(1000 / value), False, f"1000 / {value:g} ms for one sample"
    if kind == "threads":
        return THREADS, _whole(value, words), None, None
    if kind in ("bytes", "mega"):
        return _bytes(quantity, words)
    if kind in ("percent", "points"):
        return _share(quantity, words)
    if kind in ("times", "fraction"):
        return _ratio(kind, value, topics, words)
    return _number(quantity, words)


def _whole(value: float, words: str) -> int:
    if not value.is_integer():
        raise _wrong(f"{words!r}: it is a whole number", "leave the decimals out")
    return int(value)


def _bytes(quantity: _Quantity, words: str) -> _Found:
    topics, value = quantity.topics, quantity.value
    if "parameters" in topics:
        return "gate.parameters.max", _whole(_rounded(value), words), True, None
    if {"memory", "size"} <= topics:
        raise _wrong(f"{words!r} can be the memory or the file", "give each its own limit")
    if quantity.kind == "mega" and not topics:
        shown = f"{value / 1e6:g}"
        raise _wrong(
            f"{words!r} can be megabytes or millions of parameters",
            f"write {shown} MB, or {shown} M parameters",
        )
    megabytes = _rounded(value / 1e6)
    if "memory" in topics:
        return "gate.memory.peak_mb", megabytes, True, None
    note = None if topics else "the file; 'of memory' for the running process"
    return "gate.size.max_mb", megabytes, True, note


def _share(quantity: _Quantity, words: str) -> _Found:
    """A percentage, or percentage points."""
    topics, value, percent = quantity.topics, quantity.value, quantity.kind == "percent"
    share = _rounded(value / 100)
    if "gain" in topics:
        return "gate.accuracy.min_gain", share, False, None
    if "drop" in topics or ("teacher" in topics and quantity.at_most and not topics & {"size", "parameters"}):
        note = "percent taken as percentage points" if percent else None
        return "gate.accuracy.max_drop", share, True, note
    if not percent and topics <= {"accuracy"} and not quantity.at_least:
        note = None if topics else "points of the metric, against the teacher"
        return "gate.accuracy.max_drop", share, True, note
    if percent and "faster" in topics:
        return "gate.latency.min_speedup", _rounded(1 + share), False, None
    if percent and "smaller" in topics and share < 1:
        return "gate.size.min_ratio", _rounded(1 / (1 - share)), False, None
    if percent and topics & {"size", "parameters"}:
        return _ratio("fraction", share, topics, words)
    if percent and topics == {"accuracy"}:
        return "gate.accuracy.min", share, False, None
    raise _wrong(
        f"{words!r}: it is open what this is a share of",
        "say 'accuracy above 90 %', 'lose at most 1 point', '20 % faster' or '10 % of the "
        "teacher's size'",
    )


def _ratio(kind: str, value: float, topics: set[str], words: str) -> _Found:
    """Against the teacher: ``times`` better, or a ``fraction`` of it."""
    times = value if kind == "times" else 1 / value
    note = "against the teacher"
    if topics & {"faster", "latency"} and not topics & {"smaller", "size", "parameters"}:
        return "gate.latency.min_speedup", _rounded(times), False, note
    if "parameters" in topics:
        return "gate.parameters.max_ratio", _rounded(1 / times), None, note
    if topics & {"smaller", "size"} and not topics & {"faster", "latency"}:
        return "gate.size.min_ratio", _rounded(times), None, note
    raise _wrong(
        f"{words!r}: it is open what of the teacher this compares",
        "say '3x faster', '10x smaller', 'half the size of the teacher'",
    )


def _number(quantity: _Quantity, words: str) -> _Found:
    """A number without a unit."""
    topics, value = quantity.topics, quantity.value
    if topics == {"batch"}:
        return "benchmark.batch_size", _whole(value, words), None, None
    if topics == {"parameters"}:
        return "gate.parameters.max", _whole(value, words), True, None
    if "drop" in topics and value < 1:
        return "gate.accuracy.max_drop", value, True, None
    if topics == {"accuracy"} and value <= 1:
        return "gate.accuracy.min", value, False, None
    if topics == {"error"}:
        return "gate.accuracy.max", value, True, None
    raise _wrong(
        f"{words!r}: the number has no unit",
        "write 5 ms, 20 MB, 1 %, 1 point, 3x, batch 8, 2 threads, 100k parameters",
    )


def _consistent(wishes: Sequence[Wish]) -> tuple[Wish, ...]:
    """The wishes, each key once.

    Raises:
        InputError: two of them contradict each other.
    """
    result: dict[str, Wish] = {}
    for wish in wishes:
        for other in result.values():
            same, one_of = wish.key == other.key, (wish.key, other.key)
            if same and wish.key == OBJECTIVES:
                continue
            clash = (same and wish.value != other.value) or (
                not same and "quantize" in one_of and all(k.startswith("quantize") for k in one_of)
            )
            if clash:
                raise _wrong(
                    f"{other.words!r} and {wish.words!r} contradict each other: both are "
                    f"{wish.key if same else 'quantize'}",
                    "say one of them",
                )
        before = result.get(wish.key)
        if before is None:
            result[wish.key] = wish
        elif wish.key == OBJECTIVES and wish.value[0] not in before.value:
            words = f"{before.words} … {wish.words}"
            result[wish.key] = Wish(OBJECTIVES, [*before.value, *wish.value], words)
    return tuple(result.values())
