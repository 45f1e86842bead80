"""The command line's arguments: what may be typed, and what each must be."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import edgerun
from edgerun.errors import BadInput

if TYPE_CHECKING:
    from edgerun.model import Settings


def command_parser() -> argparse.ArgumentParser:
    """What edgerun can be asked; ``name`` of the result is the command."""
    parser = argparse.ArgumentParser(
        prog="edgerun", description="Answer, measure and verify an ONNX model on this device."
    )
    parser.add_argument("--version", action="version", version=f"edgerun {edgerun.__version__}")
    commands = parser.add_subparsers(dest="name", metavar="COMMAND")
    commands.required = True

    run = commands.add_parser("run", help="answers for every sample of an npz file")
    run.add_argument("model", type=Path, nargs="?", metavar="MODEL.onnx")
    run.add_argument("--inputs", type=Path, required=True, metavar="DATA.npz")
    run.add_argument("--output", type=Path, required=True, metavar="ANSWERS.npz")
    run.add_argument("--bundle", type=Path, metavar="FOLDER", help="take model and manifest here")
    run.add_argument("--manifest", type=Path, metavar="manifest.json")
    run.add_argument("--raw", action="store_true", help="preprocess data of any dtype")
    _add_settings(run)

    bench = commands.add_parser("bench", help="latency with intervals, peak memory")
    bench.add_argument("model", type=Path, metavar="MODEL.onnx")
    bench.add_argument("--against", type=Path, metavar="OTHER.onnx", help="compare, interleaved")
    bench.add_argument(
        "--against-provider-options",
        metavar="JSON",
        help="of the other model's providers; default: the same",
    )
    bench.add_argument("--inputs", type=Path, metavar="DATA.npz", help="default: random inputs")
    bench.add_argument("--shape", action="append", default=[], metavar="NAME=1x3x224x224")
    bench.add_argument("--seed", type=_natural, default=0, metavar="N")
    bench.add_argument("--min-queries", type=_count, default=1000, metavar="N")
    bench.add_argument("--max-seconds", type=_seconds, default=60.0, metavar="S")
    bench.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    bench.add_argument("--json", type=Path, metavar="OUT", help="write the whole record here")
    _add_settings(bench)

    verify = commands.add_parser("verify", help="whether a bundle is intact")
    verify.add_argument("folder", type=Path, metavar="FOLDER")

    info = commands.add_parser("info", help="what this device, or a model, is")
    info.add_argument("model", type=Path, nargs="?", metavar="MODEL.onnx")
    info.add_argument("--json", type=Path, metavar="OUT")

    probe = commands.add_parser("probe", help="whether a model opens and runs once")
    probe.add_argument("model", type=Path, metavar="MODEL.onnx")
    probe.add_argument("--inputs", type=Path, metavar="DATA.npz", help="default: random inputs")
    probe.add_argument("--shape", action="append", default=[], metavar="NAME=1x3x224x224")
    probe.add_argument("--no-run", action="store_true", help="open it only")
    probe.add_argument("--json", type=Path, metavar="OUT", help="write the record here")
    _add_settings(probe)

    build = commands.add_parser("build", help="a TensorRT engine for this device")
    build.add_argument("model", type=Path, metavar="MODEL.onnx")
    build.add_argument("--engine", type=Path, required=True, metavar="OUT")
    _add_library(build)
    build.add_argument("--precision", choices=("fp32", "fp16", "bf16", "int8"))
    build.add_argument("--keep", action="append", default=[], metavar="NODE", help="may be wider")
    build.add_argument("--shape", action="append", default=[], metavar="NAME=MIN:USUAL:MAX")
    build.add_argument("--batch", type=_count, default=1, metavar="N", help="usual and largest")
    build.add_argument("--sm", action="append", default=[], metavar="8.6", help="tensorrt-rtx only")
    build.add_argument("--workspace-mb", type=_positive, metavar="MB")
    build.add_argument("--timing-cache", type=Path, metavar="FILE")
    build.add_argument("--version-compatible", action="store_true")
    build.add_argument("--hardware-compatible", action="store_true")
    build.add_argument("--dla", type=_natural, metavar="CORE", help="of a Jetson")
    build.add_argument("--no-gpu-fallback", action="store_true", help="all layers on the DLA")

    parse = commands.add_parser("parse", help="whether TensorRT takes a model, and why not")
    parse.add_argument("model", type=Path, metavar="MODEL.onnx")
    _add_library(parse)
    return parser


def model_settings(options: argparse.Namespace, against: bool = False) -> Settings:
    """How a command opens its model, or the one that it is held ``against``.

    Raises:
        BadInput: no provider is named, or the providers' options are no mapping of texts.
    """
    # It brings numpy, which the other commands do without.
    from edgerun.model import Settings, full_provider_name

    names = [name.strip() for name in options.providers.split(",") if name.strip()]
    if not names:
        raise BadInput("no provider is named", "--providers", "for example: --providers cpu")
    providers = tuple(dict.fromkeys(full_provider_name(name) for name in names))
    option, text = "--provider-options", options.provider_options
    if against and options.against_provider_options is not None:
        option, text = "--against-provider-options", options.against_provider_options
    given = _provider_options(text, option)
    named = {full_provider_name(name): values for name, values in given.items()}
    return Settings(options.threads, providers, options.optimization, named)


def _provider_options(text: str, option: str) -> dict[str, dict[str, str]]:
    """``{provider: {key: value}}`` from JSON, or from a file that holds it."""
    if not text:
        return {}
    try:
        inline = text.lstrip().startswith("{")
        given = json.loads(text if inline else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _bad_options(f"the providers' options cannot be read: {error}", option) from error
    if not isinstance(given, dict):
        raise _bad_options("the providers' options are no mapping", option)
    for name, options in given.items():
        if not isinstance(options, dict):
            raise _bad_options(f"the options of {name} are no mapping", option)
        for key, value in options.items():
            if not isinstance(value, str):
                raise _bad_options(
                    f"option {key} of {name} is no text: {json.dumps(value)}", option
                )
    return given


def _bad_options(what: str, option: str) -> BadInput:
    return BadInput(
        what,
        where=option,
        remedy='give {"PROVIDER": {"KEY": "VALUE"}}, or a file with it; numbers are texts too',
    )


def _add_library(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--library", choices=("tensorrt", "tensorrt-rtx"), default="tensorrt")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the whole record here")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=_count, metavar="N", help="samples of one call")
    parser.add_argument("--threads", type=_count, metavar="N", help="default: the runtime's choice")
    parser.add_argument("--providers", default="cpu", metavar="A,B", help="default: cpu")
    parser.add_argument(
        "--provider-options",
        default="",
        metavar="JSON",
        help='{"PROVIDER": {"KEY": "VALUE"}}, or a file with it',
    )
    parser.add_argument(
        "--optimization", choices=("disabled", "basic", "extended", "all"), default="all"
    )


def _natural(text: str) -> int:
    return _whole(text, least=0)


def _count(text: str) -> int:
    return _whole(text, least=1)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def _seconds(text: str) -> float:
    return _number(text, "of seconds ")


def _positive(text: str) -> float:
    return _number(text)


def _number(text: str, unit: str = "") -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number {unit}above 0")
    return value
