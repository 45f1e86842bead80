"""Requirements in plain words: "under 5 ms and 20 MB on an Orin Nano, lose at most one point".

A small grammar of quantities with units, device names and wishes, in English and Chinese; no model
and no network. A goal is cut into terms of a fixed table (the longest one first), quantities are
joined with the words around them in their clause, and each becomes a key of a pipeline file. Every
word is part of something understood, a filler of the table, or an error: nothing is ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from edgekd.config.goal_terms import THREADS, Token, nearest_term, tokens_of
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
class _Quantity(Token):
    """A number with its unit, and the words of its clause that belong to it."""

    at_most: bool = False
    at_least: bool = False
    topics: set[str] = field(default_factory=set)
    about: bool = False


_COMMA = re.compile(r"\d+,\d+")


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
            f"write decimals with a point ({found[0].replace(',', '.')}), thousands without a "
            "comma, and a space after a comma between wishes",
        )
    tokens, unknown = tokens_of(text)
    if unknown:
        raise _not_understood(unknown)
    wishes: list[Wish] = []
    left: list[Token] = []
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
    hints = [hint for word in named if (hint := nearest_term(word))]
    guess = f"did you mean {', '.join(map(repr, hints))}? " if hints else ""
    return _wrong(
        f"not understood: {', '.join(map(repr, named))}",
        f"{guess}say quantities with what they limit (p99 under 5 ms, 20 MB of memory, lose at "
        "most one point, 3x faster), devices ('edgekd profiles list'), int8, fp16 or float only, "
        "as small as possible",
    )


# Clauses ----------------------------------------------------------------------------------------


def _clauses(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """The tokens between separators, with the quantities put together."""
    clause: list[Token] = []
    for token in (*tokens, Token("separator", None, 0, 0)):
        if token.kind != "separator":
            clause.append(token)
        elif clause:
            yield _with_quantities(clause)
            clause = []


def _with_quantities(tokens: list[Token]) -> list[Token]:
    result: list[Token] = []
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


def _understood(clause: list[Token], text: str) -> tuple[list[Wish], list[Token]]:
    """The wishes of a clause, and its words that belong to nothing."""
    left: list[Token] = []
    spans: dict[int, list[Token]] = {}
    quantities = [token for token in clause if isinstance(token, _Quantity)]
    topics = [token.start for token in clause if token.kind == "topic"]
    topics_first = bool(quantities and topics and topics[0] < quantities[0].start)
    for token in clause:
        if isinstance(token, _Quantity) or token.kind in (
            "filler",
            "article",
            "set",
            "device",
            "objective",
        ):
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
    _check_board(clause, text)
    wishes = [(t.start, w) for t in clause for w in _complete(t, text[t.start : t.end])]
    for quantity in quantities:
        parts = [quantity, *spans.get(quantity.start, [])]
        words = text[min(t.start for t in parts) : max(t.end for t in parts)]
        wishes.append((quantity.start, _wish(quantity, words)))
    return [wish for _, wish in sorted(wishes, key=lambda pair: pair[0])], left


def _check_board(clause: Sequence[Token], text: str) -> None:
    """Refuse the memory of a board behind its name, which is no limit of the model.

    Raises:
        InputError: a device is followed by gigabytes.
    """
    for device, size in pairwise(clause):
        if device.kind != "device" or not isinstance(size, _Quantity) or size.kind != "bytes":
            continue
        if size.value >= 1e9 and not (size.topics or size.at_most):
            raise _wrong(
                f"{text[device.start : size.end]!r}: there is no profile of this size of the board",
                "name a device of 'edgekd profiles list', or say what the gigabytes limit",
            )


def _complete(token: Token, words: str) -> Iterator[Wish]:
    """The wishes of a term that says everything by itself."""
    if token.kind == "set":
        yield from (Wish(key, value, words) for key, value in token.value.items())
    elif token.kind == "objective":
        yield Wish(OBJECTIVES, list(dict.fromkeys((token.value, "accuracy"))), words)
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
    return Wish(
        key,
        value,
        words,
        note,
        rate=quantity.kind in ("rate", "pieces")
        and upper is False
        and key.startswith("gate.latency"),
    )


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
    if "drop" in topics or (
        "teacher" in topics and quantity.at_most and not topics & {"size", "parameters"}
    ):
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
        elif wish.key == OBJECTIVES:
            named = [*before.value, *wish.value]
            if named[1:2] == ["accuracy"]:  # Added to the first, so that it comes last.
                named = [named[0], *wish.value, "accuracy"]
            words = f"{before.words} … {wish.words}"
            result[wish.key] = Wish(OBJECTIVES, list(dict.fromkeys(named)), words)
    return tuple(result.values())
