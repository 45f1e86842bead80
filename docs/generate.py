"""Write the reference pages of ``docs/reference`` from the code: run by ``make docs``.

A test compares the files with what this gives, so that they never lag behind. With a folder as
argument the pages are written there. It is also the hook of mkdocs for the pages with docstrings.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

FOLDER = Path(__file__).parent / "reference"
NOTE = "<!-- Written by docs/generate.py; change the code and run make docs. -->\n"


def pages() -> dict[str, str]:
    """The content of each page by its file name."""
    return {
        "pipeline.md": pipeline(),
        "cli.md": command_line(),
        "losses.md": losses(),
        "devices.md": devices(),
    }


def on_page_content(html: str, **_: Any) -> str:
    """A hook of mkdocs: roles in docstrings, ``:func:`run```, become plain code."""
    return re.sub(r":\w+:<code>~?(?:[\w.]*\.)?(\w+)</code>", r"<code>\1</code>", html)


def _markdown(text: str) -> str:
    """A docstring's text: roles and double backticks as Markdown code."""
    text = inspect.cleandoc(text)
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    return re.sub(r"``(.+?)``", r"`\1`", text, flags=re.DOTALL)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


# The pipeline file ------------------------------------------------------------------------------


def pipeline() -> str:
    """All keys of a pipeline file and of a device profile, from the pydantic models."""
    from edgekd.config.pipeline import PipelineConfig
    from edgekd.config.profile import Profile

    parts = [
        NOTE,
        "# Pipeline reference\n",
        "All keys of a pipeline file with their types and defaults; `edgekd init --schema "
        "pipeline.json` writes the same as a JSON schema for editors. A key in bold must be given. "
        "Unknown keys are errors. MB are 10⁶ bytes.\n",
        *_sections(PipelineConfig, "", "Top level"),
        "# Device profile\n",
        "Keys of a [profile](../devices.md). A quantity is written `{value: 4000, source: "
        "third-party}`; `verified: false` marks one that nobody looked up.\n",
        *_sections(Profile, "", "Profile"),
    ]
    return "\n".join(parts)


def _sections(
    model: type[BaseModel], path: str, title: str, seen: set[type[BaseModel]] | None = None
) -> Iterator[str]:
    """A heading and a table for a model, then those of the models inside it, each once."""
    seen = set() if seen is None else seen
    seen.add(model)
    schema = model.model_json_schema()
    required = schema.get("required", ())
    yield f"## {title}\n"
    if model.__doc__:
        text = re.sub(r"^Section ``[\w.]+``[:.]?\s*", "", inspect.cleandoc(model.__doc__))
        yield _markdown(text[:1].upper() + text[1:]) + "\n"
    rows = []
    for key, about in schema["properties"].items():
        name = f"**`{key}`**" if key in required else f"`{key}`"
        default = "" if key in required else _default(about)
        text = _markdown(about.get("description", ""))
        rows.append((name, _type(about), default, text))
    yield _table(("key", "type", "default", ""), rows)
    for key, field in model.model_fields.items():
        for inner in _models(field.annotation):
            if inner not in seen:
                name = f"{path}.{key}".lstrip(".")
                yield from _sections(inner, name, _title(name, inner), seen)


def _title(path: str, model: type[BaseModel]) -> str:
    kind = model.model_fields.get("kind")
    kinds = typing.get_args(kind.annotation) if kind else ()
    return f"`{path}`" + (f": {' or '.join(kinds)}" if kinds else "")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in an annotation that have a section of their own."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        if set(annotation.model_fields) - {"value", "source", "verified", "note"}:
            yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from _models(argument)


def _default(about: dict[str, Any]) -> str:
    value = about.get("default")
    if isinstance(value, dict) or value in ([], None) or "$ref" in about:
        return ""
    if isinstance(value, list) and isinstance(value[0], dict):
        value = [item.get("kind", item) for item in value]
    text = str(value).lower() if isinstance(value, bool) else str(value).replace("'", "")
    return f"`{text}`"


_LIMITS = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
_NAMES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false"}


def _type(about: dict[str, Any]) -> str:
    """A JSON schema's type in words."""
    if "anyOf" in about:
        kinds = [_type(kind) for kind in about["anyOf"] if kind.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "oneOf" in about:
        return " or ".join(dict.fromkeys(map(_type, about["oneOf"])))
    if "enum" in about:
        return ", ".join(f"`{value}`" for value in about["enum"])
    if "const" in about:
        return f"`{about['const']}`"
    if "$ref" in about:
        named = about["$ref"].rsplit("/", 1)[-1]
        return {"Quantity": "quantity", "Text": "text with source"}.get(named, "section")
    kind = about.get("type", "any value")
    if kind == "array":
        inner = about.get("items") or next(iter(about.get("prefixItems", ())), {})
        count = f"{about['minItems']} × " if "prefixItems" in about else ""
        return f"list of {count}{_type(inner)}" if inner else "list"
    if kind == "object":
        return "mapping"
    limits = [
        f"{sign} {'2³¹' if about[key] == 2**31 else format(about[key], 'g')}"
        for key, sign in _LIMITS
        if key in about
    ]
    return ", ".join([_NAMES.get(kind, kind), *limits])


# The command line -------------------------------------------------------------------------------


def command_line() -> str:
    """Every command with its arguments and options, from click."""
    from edgekd.cli import main

    parts = [
        NOTE,
        "# Command line\n",
        "Exit codes: 0 done and the gate passed, 1 the gate failed (or what was checked does not "
        "hold), 2 the input is wrong, 3 a stage failed, 4 the target could not be reached, 130 "
        "interrupted (143 by SIGTERM). Errors say what is wrong, where, and what to do. An "
        "unexpected one writes its traceback to a file in `~/.cache/edgekd/errors`; `edgekd "
        "--debug COMMAND …` or `EDGEKD_DEBUG=1` shows it.\n",
    ]
    context = click.Context(main, info_name="edgekd")
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        parts += _command(command, f"edgekd {name}", context, "##")
    return "\n".join(parts)


def _command(command: click.Command, name: str, parent: click.Context, level: str) -> Iterator[str]:
    context = click.Context(command, info_name=name.split()[-1], parent=parent)
    yield f"{level} {name}\n"
    yield "```text"
    yield " ".join([name, *command.collect_usage_pieces(context)])
    yield "```\n"
    yield _markdown((command.help or "").replace("\b", "")) + "\n"
    rows = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if isinstance(parameter, click.Option) and record and "--help" not in parameter.opts:
            flags, text = record
            text = re.sub(r"\[(default: [^\]]*?)\]", r"(\1)", text).replace("<", "&lt;")
            rows.append((f"`{flags}`", text))
    if rows:
        yield _table(("option", ""), rows)
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            found = command.get_command(context, inner)
            assert found is not None
            yield from _command(found, f"{name} {inner}", context, level + "#")


# Losses -----------------------------------------------------------------------------------------


def losses() -> str:
    """Every built-in loss with its equation, source and arguments, by module."""
    from edgekd.distill.loss_term import TENSORS
    from edgekd.distill.losses import LOSSES

    parts = [
        NOTE,
        "# Losses\n",
        "What a term of `distill.losses` can name. Arguments are the keys of the loss's mapping; "
        "any number among them may be a [schedule](pipeline.md#distilllossesweight). Without "
        "`student` and `teacher` (paths of layers) a loss compares the primary outputs. *Labels* "
        "marks losses that need labels, *adapter* those with trained parts, which are not "
        "exported.\n",
    ]
    by_module: dict[str, list[str]] = {}
    for name, loss in LOSSES.items():
        by_module.setdefault(loss.__module__, []).append(name)
    for module_name, names in by_module.items():
        module = importlib.import_module(module_name)
        parts.append(f"## {module_name.rsplit('.', 1)[-1].replace('_', ' ').capitalize()}\n")
        parts.append(_markdown(module.__doc__ or "").split("\n\n")[0] + "\n")
        for name in names:
            loss = LOSSES[name]
            trained = inspect.isclass(loss)
            function = getattr(module, name, loss)
            called = inspect.signature(function).parameters
            given = inspect.signature(loss.__init__ if trained else loss).parameters
            marks = ["labels"] * ("target" in called) + ["adapter"] * trained
            parts.append(f"### `{name}`" + (f" — {', '.join(marks)}" if marks else "") + "\n")
            parts.append(_markdown(function.__doc__ or "").split("\n\nArgs:")[0] + "\n")
            supplied = (*TENSORS, "self", "samples")
            arguments = [
                f"`{key}: {_value(parameter.default)}`"
                for key, parameter in given.items()
                if key not in supplied
            ]
            if arguments:
                parts.append("Arguments with their defaults: " + ", ".join(arguments) + "\n")
    return "\n".join(parts)


def _value(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "none"}[value]
    return f"{value:g}" if isinstance(value, int | float) else str(value)


# Devices ----------------------------------------------------------------------------------------


def devices() -> str:
    """The shipped profiles side by side."""
    from edgekd.config.profile import Quantity, list_profiles, load_profile

    def of(quantity: Quantity | None, unit: str = "") -> str:
        if quantity is None:
            return "–"
        text = f"{quantity.value:,.0f}" if quantity.value >= 100 else f"{quantity.value:g}"
        return f"{text}{unit}" + ("" if quantity.verified else " (?)")

    rows = []
    for name in list_profiles():
        if name == "host":
            continue
        profile = load_profile(name)
        memory, budget = profile.memory, profile.budget
        rows.append(
            (
                f"`{name}`",
                profile.device,
                profile.runtime.engine,
                ", ".join(profile.precisions),
                of(memory.usable_mb) if memory else "–",
                of(budget.latency_ms),
                of(budget.memory_mb),
                of(budget.storage_mb),
            )
        )
    heads = ("profile", "device", "engine", "precisions", "usable MB")
    budgets = ("budget, ms", "budget, MB", "budget, file MB")
    return "\n".join(
        (
            NOTE,
            "# Shipped profiles\n",
            "`host` is the machine that edgekd runs on. A figure with (?) was recalled and not "
            "looked up. Budgets are conventions, not facts about the devices: what one model may "
            "cost there when the pipeline says nothing else.\n",
            _table((*heads, *budgets), rows),
            "`edgekd profiles show NAME` gives each figure with its source.\n",
        )
    )


def main(folder: Path = FOLDER) -> None:
    """Write all pages."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
