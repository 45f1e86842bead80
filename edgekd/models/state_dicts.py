"""Find a network's weights in a checkpoint, however they are wrapped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgekd.errors import InputError, unknown_name

_WRAPPER_SEGMENTS = {
    "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
}  # fmt: skip
"""What DataParallel, torch.compile, FSDP and activation checkpointing insert into a key, at any
position.
"""

_NESTING = 4
_MOST_MAPPINGS = 200_000
_SHOWN = 4
"""Number of keys of a kind that an error lists."""

State = dict[str, Tensor]


@dataclass(frozen=True)
class _Fit:
    """Weights of a checkpoint that fill a network."""

    key: str
    prefix: str
    state: State
    others: int
    """Number of other tensors in the same state dict."""


def find_state(
    content: object,
    expected: Mapping[str, Tensor],
    place: str,
    section: str = "teacher",
    key: str | None = None,
    prefix: str | None = None,
) -> tuple[State, list[str]]:
    """A network's weights in the content of a checkpoint.

    Every mapping with tensors in it is looked at, and in each every prefix behind which all of
    the network's keys are found in their shapes. One of them is used, or several that are equal;
    between different ones the user has to choose.

    Args:
        content: a mapping, nested or not, or a module.
        expected: the network's own state dict.
        place: the file, for errors.
        section: the YAML section with ``checkpoint_key`` and ``prefix``, for errors.
        key: the key of the mapping to use, with dots for nested ones.
        prefix: the prefix to use; empty for none.

    Returns:
        The state dict with the network's keys, and notes on the choice.

    Raises:
        InputError: there is no state dict; none fits (missing, unexpected and mis-shaped keys of
            the nearest are listed); or several different ones fit.
    """
    candidates = dict(_state_dicts(content, place))
    if not candidates:
        raise InputError(
            f"the checkpoint holds no state dict but {_described(content)}",
            where=place,
            remedy="save torch.save(model.state_dict(), …)",
        )
    if key is not None:
        if key not in candidates:
            raise unknown_name("state dict", key, candidates, f"{section}.checkpoint_key")
        candidates = {key: candidates[key]}
    fits = [
        fit for name, state in candidates.items() for fit in _fits(name, state, expected, prefix)
    ]
    different = _different(fits)
    if len(different) > 1:
        raise _ambiguous(different, place, section)
    if not different:
        nearest = max(
            (_nearest(state, expected, prefix) for state in candidates.values()),
            key=lambda state: len(state.keys() & expected.keys()),
        )
        check_fit(nearest, expected, place)
        return nearest, []
    chosen = different[0]
    notes = []
    if len(candidates) > 1:
        others = ", ".join(repr(name) for name in candidates if name != chosen.key)
        notes.append(f"its weights are {chosen.key!r}; not used: {others}")
    if chosen.others:
        tensors = "1 more tensor is" if chosen.others == 1 else f"{chosen.others} more tensors are"
        notes.append(f"its weights begin with {chosen.prefix!r}; {tensors} not used")
    return chosen.state, notes


def _state_dicts(content: object, place: str) -> Iterator[tuple[str, State]]:
    """Every mapping with tensors, by its path.

    Raises:
        InputError: there are more mappings than any checkpoint has. A small file can have any
            number of paths, as mappings may share others.
    """
    left: list[tuple[str, object, int]] = [("", content, 0)]
    visited = 0
    while left:
        path, value, depth = left.pop()
        visited += 1
        if visited > _MOST_MAPPINGS:
            raise InputError(
                f"the checkpoint has more than {_MOST_MAPPINGS:,} mappings in one another",
                where=place,
                remedy="save torch.save(model.state_dict(), …)",
            )
        if isinstance(value, nn.Module):
            yield path, dict(value.state_dict())
            continue
        if not isinstance(value, Mapping) or depth > _NESTING:
            continue
        tensors = {str(k): v for k, v in value.items() if isinstance(v, Tensor)}
        if tensors:
            yield path, tensors
        inner = [
            (f"{path}.{key}".lstrip("."), each, depth + 1)
            for key, each in value.items()
            if isinstance(each, Mapping | nn.Module)
        ]
        left += reversed(inner)


def _fits(key: str, state: State, expected: Mapping[str, Tensor], prefix: str | None) -> list[_Fit]:
    """Each mapping of a state dict to the network's keys."""
    covering = [
        (each, inner)
        for each in (_prefixes(state, expected) if prefix is None else [prefix])
        if _covers(inner := _behind(each, state), expected)
    ]
    # More keys behind the prefix mean another network, unless that prefix was set, or
    # weights are found elsewhere too: then there is a choice.
    exact = [each for each, inner in covering if inner.keys() <= expected.keys()]
    if exact or prefix is not None:
        return [
            _Fit(key, each, own, len(state) - len(own))
            for each, inner in covering
            if (own := {k: v for k, v in inner.items() if k in expected})
        ]
    spread = None if covering else _from_several_prefixes(state, expected)
    return [_Fit(key, "", spread, len(state) - len(spread))] if spread is not None else []


def _behind(prefix: str, state: State) -> State:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _prefixes(state: State, expected: Mapping[str, Tensor]) -> list[str]:
    """Everything before one of the network's keys, that which most keys have first."""
    probe = max(expected, key=len, default="")
    ends = [k[: -len(probe)] for k in state if k == probe or k.endswith(f".{probe}")]
    return sorted(set(ends), key=len)


def _covers(state: State, expected: Mapping[str, Tensor]) -> bool:
    """Whether all of a network's keys are there in their shapes."""
    return not _missing(state, expected) and all(
        tensor.shape == expected[k].shape for k, tensor in state.items() if k in expected
    )


def _missing(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """The network's missing keys, excluding those stored under the name of a shared tensor."""
    present = {_storage(expected[k]) for k in state if k in expected}
    return [
        k
        for k, tensor in expected.items()
        if k not in state
        # A count of batches that nothing reads; files from before torch had it lack it.
        and not k.endswith("num_batches_tracked")
        and (tensor.numel() == 0 or _storage(tensor) not in present)
    ]


def _storage(tensor: Tensor) -> tuple[object, ...]:
    """The same for two tensors that are one in memory, as tied weights are."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _from_several_prefixes(state: State, expected: Mapping[str, Tensor]) -> State | None:
    """Keys with removed prefixes or wrapper segments, if the match is certain."""
    plain = {_unwrapped(k): v for k, v in state.items()}
    names = {_unwrapped(k): k for k in expected}
    if len(plain) == len(state) and len(names) == len(expected):
        for prefix in _prefixes(plain, dict.fromkeys(names, torch.empty(0))):
            inner = {names.get(k, k): v for k, v in _behind(prefix, plain).items()}
            if _covers(inner, expected) and inner.keys() <= expected.keys():
                return inner
    chosen: State = {}
    used = set()
    heads = set()
    for name, tensor in expected.items():
        ends = [k for k in state if k == name or k.endswith(f".{name}")]
        ends = [k for k in ends if state[k].shape == tensor.shape]
        if len(ends) == 1 and "." in name:
            chosen[name] = state[ends[0]]
            used.add(ends[0])
            heads.add(ends[0].partition(".")[0])
        elif not name.endswith("num_batches_tracked"):
            return None
    others = {k.partition(".")[0] for k in state.keys() - used}
    return chosen if len(used) == len(chosen) and not heads & others else None


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPER_SEGMENTS)


def _different(fits: list[_Fit]) -> list[_Fit]:
    """Those that differ in a value; of equal ones the first."""
    distinct: list[_Fit] = []
    for fit in fits:
        if not any(_equal(fit.state, other.state) for other in distinct):
            distinct.append(fit)
    return distinct


def _equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[k]) for k, tensor in one.items()
    )


def _ambiguous(fits: list[_Fit], place: str, section: str) -> InputError:
    keys = list(dict.fromkeys(fit.key for fit in fits))
    named, choices = "checkpoint_key", keys
    if len(keys) == 1:
        named, choices = "prefix", sorted(fit.prefix for fit in fits)
    listed = ", ".join(repr(choice) for choice in choices)
    return InputError(
        f"the checkpoint holds this network's weights more than once, and they differ: {listed}",
        where=place,
        remedy=f"choose one under {section}: '{named}: {choices[-1]}'",
    )


def _nearest(state: State, expected: Mapping[str, Tensor], prefix: str | None) -> State:
    """A state dict behind the prefix with which most keys are the network's."""
    parts = [k.split(".") for k in state]
    heads = {".".join(p[:n]) + "." for p in parts for n in (1, 2, 3) if len(p) > n}
    prefixes = ["", *sorted(heads)] if prefix is None else [prefix]
    views = [_behind(each, state) for each in prefixes]
    return max(views, key=lambda view: len(view.keys() & expected.keys()))


def check_fit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], place: str) -> None:
    """Compare a checkpoint's keys and shapes with a network's.

    Raises:
        InputError: they differ; what is missing, unexpected or of another shape is listed.
    """
    missing = _missing(state, expected)
    unexpected = [key for key in state if key not in expected]
    misshaped = [k for k in expected if k in state and state[k].shape != expected[k].shape]
    if not (missing or unexpected or misshaped):
        return
    lines = [
        _listed("missing", [f"{k} {list(expected[k].shape)}" for k in missing]),
        _listed("unexpected", [f"{k} {list(state[k].shape)}" for k in unexpected]),
        _listed(
            "of another shape",
            [
                f"{k} {list(state[k].shape)}, the model has {list(expected[k].shape)}"
                for k in misshaped
            ],
        ),
    ]
    raise InputError(
        "the checkpoint does not fit the model:" + "".join(lines),
        where=place,
        remedy="give the model and arguments it was trained with; a last layer of another size "
        "means another number of classes (a teacher's outputs are named by teacher.classes)"
        if misshaped and not missing and not unexpected
        else "give the model and arguments it was trained with",
    )


def _listed(kind: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f"; and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"\n  {len(keys)} {kind}: {'; '.join(keys[:_SHOWN])}{more}"


def _described(content: object) -> str:
    if isinstance(content, Mapping):
        return f"a mapping with {', '.join(map(str, list(content)[:6])) or 'nothing in it'}"
    return f"a {type(content).__name__}"
