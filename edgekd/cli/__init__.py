"""The command line: parse, call, print. A command's module is imported when it is used.

The two shortest commands, ``init`` and ``verify``, are here.
"""

from __future__ import annotations

import errno
import importlib
import json
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import click

from edgekd import crashes
from edgekd.cli.options import is_pipeline
from edgekd.errors import (
    InputError,
    StageError,
    edgerun_errors,
    is_utf8,
    nearest,
    printable,
    unknown_name,
)
from edgerun.errors import EdgerunError
from edgerun.limits import call_seconds, is_limited, is_out_of_memory, limit_memory, too_large

_COMMANDS = {
    "init": ("edgekd.cli:init", "Write an example pipeline to start from."),
    "run": ("edgekd.cli.run:run", "Run a pipeline: from the teacher to the gated bundle."),
    "advise": (
        "edgekd.cli.advise:advise",
        "Advise student, losses, precision and engine, as YAML.",
    ),
    "plan": ("edgekd.cli.run:plan", "Show what a run would do, without doing it."),
    "students": ("edgekd.cli.students:students", "Measure the candidates for a student."),
    "distill": ("edgekd.cli.run:distill", "Run a pipeline up to the distilled student."),
    "export": ("edgekd.cli.run:export", "Run a pipeline up to the checked ONNX files."),
    "quantize": ("edgekd.cli.quantize:quantize", "Make an ONNX model INT8 or FP16, and compare."),
    "build": ("edgekd.cli.build:build", "Build an engine from an ONNX model, or a pipeline's."),
    "benchmark": ("edgekd.cli.benchmark:benchmark", "Measure an ONNX model, or a pipeline's."),
    "check": ("edgekd.cli.check:check", "Check whether an ONNX model will run on a device."),
    "gate": ("edgekd.cli.gate:gate", "Check a result against its budgets."),
    "report": ("edgekd.cli.run:report", "Run a pipeline up to its report."),
    "bundle": ("edgekd.cli.run:bundle", "Run a pipeline up to the bundle for the device."),
    "verify": ("edgekd.cli:verify", "Find changed, missing or extra files in a bundle."),
    "compare": ("edgekd.cli.compare:compare", "Compare the results of several runs side by side."),
    "layers": ("edgekd.cli.layers:layers", "List the layers that a loss can name, with shapes."),
    "profiles": ("edgekd.cli.profiles:profiles", "List, show and check device profiles."),
    "target": ("edgekd.cli.target:target", "Name, check and prepare the machines to measure on."),
    "doctor": ("edgekd.cli.doctor:doctor", "Report what this machine can do and what is missing."),
}


_OF_TEXT_FILES = ("init", "gate", "verify", "compare", "profiles", "target", "doctor")
"""Commands that open no file by the path from the root."""


_OPENING_MODELS = ("benchmark", "build", "check", "quantize")
"""Commands that open arbitrary ONNX files; a pipeline's files are made by the project itself."""


_LIBRARIES = ("onnxruntime.", "onnx.", "google.protobuf.")

_WRONG_MODEL = ("InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel", "NotImplemented")
"""The errors of ONNX Runtime that are the model's own; ONNX's all are."""


class LazyGroup(click.Group):
    """Commands imported on use; every error of the project becomes a message and an exit code."""

    def main(self, args: Any = None, *rest: Any, **extra: Any) -> Any:
        """Parse and run, as :meth:`click.Group.main`; the program's own command line runs with
        protected streams, and supervised where it opens a model.
        """
        if args is None:
            from edgekd.cli.process import interrupt_on_sigterm, protect_streams

            protect_streams()
            words = [word for word in sys.argv[1:] if word != "--debug"]
            pipeline = any(map(is_pipeline, words))
            if words[:1] and words[0] in _OPENING_MODELS and not pipeline:
                # Its child may be in native code, which only the default of SIGTERM ends.
                crashes.supervise(_probe)
            else:
                interrupt_on_sigterm()
        return super().main(args, *rest, **extra)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order in which a user meets them."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command."""
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Suggest the nearest command for a misspelt one."""
        if any(re.fullmatch(r"(--[^=]*=)?", word) for word in args):
            ctx.fail("An argument is empty. Give a name, or leave the option out.")
        try:
            folder = str(Path.cwd())
        except FileNotFoundError:
            ctx.fail("The working folder was removed. Change to another one.")
        if not is_utf8(folder) and args and args[0] not in _OF_TEXT_FILES:
            ctx.fail(
                f"The name of the working folder, {folder!r}, is not valid UTF-8, and the runtimes "
                "take no other. Rename it, or change to another one."
            )
        for word in args:
            if not is_utf8(word):
                ctx.fail(f"The argument {word!r} is not valid UTF-8. Rename the file.")
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            guess = nearest(args[0], _COMMANDS)
            hint = f" Did you mean {guess!r}?" if guess else ""
            ctx.fail(f"There is no command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; print errors without a traceback and exit with their exit code."""
        try:
            if crashes.is_supervised():
                limit_memory()
                call_seconds()  # Its parent has no way to report a wrong one.
            return super().invoke(ctx)
        except click.ClickException as error:
            error.message = printable(error.message)  # type: ignore[misc]
            raise
        except (click.Abort, click.exceptions.Exit, SystemExit):
            raise
        except KeyboardInterrupt:
            from edgekd.cli import process

            click.echo("\ninterrupted: finished stages are stored; run again to resume", err=True)
            ctx.exit(143 if process.terminated else 130)
        except BaseException as error:
            # What the runtimes raise has no common base class, and Rust's panics are no Exception.
            failed = _explained(error)
            if ctx.params.get("debug"):
                traceback.print_exception(error)
            _print_error(str(failed))
            ctx.exit(failed.exit_code)


def _explained(error: BaseException) -> EdgerunError:
    """The error to show, with its exit code."""
    if isinstance(error, EdgerunError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        name = str(error.filename)
        shown = name if len(name) <= 80 else f"{name[:80]}…"
        return InputError(
            f"the file cannot be used: {error.strerror}", where=shown, remedy="give another name"
        )
    if is_out_of_memory(error):
        if is_limited():
            return too_large("the model", crashes.noted_file(), InputError)
        return StageError(f"the memory ran out: {error}", remedy="free some, or give less")
    if not type(error).__module__.startswith(_LIBRARIES):
        from edgekd.cli.process import unexpected

        return unexpected(error)
    library, name = type(error).__module__.partition(".")[0], type(error).__name__
    wrong_model = library != "onnxruntime" or name in _WRONG_MODEL
    return (InputError if wrong_model else StageError)(
        f"{library} fails: {' '.join(str(error).split())}",
        where=crashes.noted_file(),
        remedy="'edgekd check' shows what the model needs; export it again, in another "
        "opset or with another exporter",
    )


def _probe(model: Path, level: str) -> None:
    from edgekd.targets import LocalTarget

    LocalTarget().probe(model, optimization=level)


def _print_error(text: str) -> None:
    click.secho("error: ", nl=False, err=True, fg="red", bold=True)
    click.echo(printable(text), err=True)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="edgekd", prog_name="edgekd")
@click.option("--debug", is_flag=True, envvar="EDGEKD_DEBUG", help="Show the traceback of errors.")
def main(debug: bool) -> None:
    """From a teacher network to a gated, deployable edge artifact.

    Exit codes: 0 done and the gate passed, 1 the gate failed, 2 the input is wrong,
    3 a stage failed, 4 the target could not be reached, 130 interrupted (143 by SIGTERM).
    """


@click.command()
@click.argument("path", type=click.Path(path_type=Path), default=Path("pipeline.yaml"))
@click.option("--example", default="digits", show_default=True, help="Which shipped pipeline.")
@click.option("--schema", is_flag=True, help="Write the JSON schema for editors instead.")
def init(path: Path, example: str, schema: bool) -> None:
    """Write an example pipeline to PATH (never over an existing file)."""
    from edgekd.files import pipelines_folder, write_errors

    if path.exists():
        raise InputError("the file exists already", where=str(path), remedy="give another path")
    if schema:
        from edgekd.config.pipeline import pipeline_schema

        text = json.dumps(pipeline_schema(), indent=1)
    else:
        examples = {file.stem: file for file in pipelines_folder().glob("*.yaml")}
        if example not in examples:
            raise unknown_name("example", example, examples, where="--example")
        text = examples[example].read_text(encoding="utf-8")
    with write_errors(path, error=InputError):
        path.write_text(text, encoding="utf-8")
    click.echo(printable(f"wrote {path}" + ("" if schema else f"; next: edgekd run {path}")))


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
def verify(bundle: Path) -> None:
    """Check every file of BUNDLE (a folder or .tar.gz) against its manifest.

    Exit code 1 when a file is changed, missing or extra.
    """
    from edgerun.manifest import verify as verify_bundle

    with edgerun_errors():
        problems = verify_bundle(bundle).problems
    for problem in problems:
        click.echo(printable(problem))
    if problems:
        click.echo(printable(f"{bundle}: {len(problems)} problem(s)"))
        sys.exit(1)
    click.echo(printable(f"{bundle}: intact"))
