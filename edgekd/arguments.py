"""Arguments from YAML, checked against the signature of what they are given to.

A loss, a model or a task named in a pipeline is a function or a class. Its own signature says
which keys it takes and of which types; nothing else has to be declared.
"""

from __future__ import annotations

import functools
import inspect
import json
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from edgekd.errors import InputError, nearest

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def parameters_of(
    target: Callable[..., Any], where: str | None = None
) -> dict[str, inspect.Parameter]:
    """The parameters of a function or class that can be given by name, ``**kwargs`` included.

    Raises:
        InputError: the object is not callable or has no readable signature.
    """
    try:
        return dict(inspect.signature(target).parameters)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{target!r} cannot be called with named arguments: {error}",
            where=where,
            remedy="name a function or a class",
        ) from error


def check_arguments(
    target: Callable[..., Any],
    given: Mapping[str, Any],
    *,
    supplied: Collection[str] = (),
    name: str,
    where: str | None = None,
) -> dict[str, Any]:
    """Check arguments against a signature before anything is called.

    Args:
        target: the function or class they are for.
        given: what the user wrote, by name.
        supplied: parameters that the project fills in itself; the user may not give them.
        name: what the target is called in the error, such as ``loss 'soft_labels'``.
        where: the YAML position, for the error.

    Returns:
        The arguments, lists turned into tuples where the signature says so.

    Raises:
        InputError: an unknown, missing or wrongly typed argument; a wrong value.
    """
    parameters = parameters_of(target, where)
    named = {key: p for key, p in parameters.items() if p.kind in _NAMED}
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    own = [key for key in named if key not in supplied]
    for key in given:
        if key in supplied and key in named:
            raise InputError(
                f"{name}: {key!r} is filled in by the project",
                where=where,
                remedy=f"remove {key!r}",
            )
        if key not in named and not takes_any:
            guess = nearest(str(key), own)
            hint = f"did you mean {guess!r}? " if guess else ""
            known = f"it takes {', '.join(own)}" if own else "it takes no arguments"
            raise InputError(f"{name} has no argument {key!r}", where=where, remedy=hint + known)
    missing = [
        key for key in own if named[key].default is inspect.Parameter.empty and key not in given
    ]
    if missing:
        raise InputError(
            f"{name} needs {', '.join(map(repr, missing))}",
            where=where,
            remedy=f"add '{missing[0]}: …'",
        )
    hints = _type_hints(target)
    return {
        key: _checked(value, hints[key], f"{name}: {key}", where) if key in hints else value
        for key, value in given.items()
    }


def _type_hints(target: Callable[..., Any]) -> dict[str, Any]:
    while isinstance(target, functools.partial):
        target = target.func
    annotated = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(annotated, include_extras=True)
    except (NameError, TypeError, AttributeError):
        # A user's annotations may name things that only a type checker imports.
        return {}


def _checked(value: Any, annotation: Any, label: str, where: str | None) -> Any:
    try:
        adapter = TypeAdapter[Any](annotation)
    except (PydanticSchemaGenerationError, PydanticUserError):
        return value
    try:
        # JSON rules: a YAML list is a tuple, 4 is a float, but "4" and true are not.
        if isinstance(value, list | dict):
            return adapter.validate_json(json.dumps(value), strict=True)
        return adapter.validate_python(value, strict=True)
    except TypeError:
        return value
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"][0].lower() + first["msg"][1:]
        guess = None
        if first["type"] == "literal_error":
            guess = nearest(str(value), first["ctx"]["expected"].split("'")[1::2])
        raise InputError(
            f"{label}: {message}; it is {value!r}",
            where=where,
            remedy=f"did you mean {guess!r}?" if guess else "give a value of that kind",
        ) from error
