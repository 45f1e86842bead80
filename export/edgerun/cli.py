"""The commands of ``python -m edgerun``: parse the arguments, call, print.

Exit codes: 0 done, 1 a bundle is not intact, 2 the input is wrong, 3 the runtime failed or there
is no GPU for an engine, 5 a file cannot be written.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterable,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
)

import edgerun
from edgerun.errors import (
    BadInput,
    CannotWrite,
    EdgerunError,
    RunFailed,
    discard,
    is_utf8,
    printable,
)
from edgerun.files import check_output, is_engine, read_json, write_errors
from edgerun.limits import limited_memory

if TYPE_CHECKING:
    from edgerun.model import Settings

MAX_THREADS = 1024
"""More threads than this only exhaust the system; ONNX Runtime starts all at once."""

BUDGETS = {
    **{f"budget_{name}_ms": name for name in ("p50", "p90", "p95", "p99")},
    "budget_speedup": "speedup",
}
"""Options of ``bench`` that are limits of a figure: processes are added until its interval is on
one side."""

LEVELS = ("all", "extended", "basic", "disabled")
"""ONNX Runtime's levels of graph optimization, the highest first."""


def command_parser() -> argparse.ArgumentParser:
    """The argument parser; ``name`` of the result is the command."""
    parser = argparse.ArgumentParser(
        prog="edgerun", description="Run, measure and verify an ONNX model on this device."
    )
    parser.add_argument("--version", action="version", version=f"edgerun {edgerun.__version__}")
    commands = parser.add_subparsers(dest="name", metavar="COMMAND")
    commands.required = True

    run = commands.add_parser("run", help="outputs for every sample of an npz file")
    run.add_argument("model", type=Path, nargs="?", metavar="MODEL.onnx")
    run.add_argument("--inputs", type=Path, required=True, metavar="DATA.npz")
    run.add_argument("--output", type=Path, required=True, metavar="OUTPUTS.npz")
    run.add_argument("--bundle", type=Path, metavar="FOLDER", help="with model and manifest")
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
    bench.add_argument("--processes", type=_count, default=5, metavar="N", help="fresh ones, least")
    bench.add_argument("--max-processes", type=_count, metavar="N", help="default: 3 times as many")
    for name in BUDGETS:
        bench.add_argument(f"--{name.replace('_', '-')}", type=_positive, metavar="LIMIT")
    bench.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    bench.add_argument("--json", type=Path, metavar="OUT", help="write the complete record here")
    _add_settings(bench)

    verify = commands.add_parser("verify", help="whether a bundle is intact")
    verify.add_argument("bundle", type=Path, metavar="FOLDER", help="or its .tar.gz")

    info = commands.add_parser("info", help="describe this device, or a model")
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
    """The settings to open a command's model, or the one it is compared with (``against``).

    Raises:
        BadInput: no provider is named, or the providers' options are no mapping of texts.
    """
    # It imports numpy, which the other commands do not need.
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
    """``{provider: {key: value}}`` from JSON, or from a file with it."""
    if not text:
        return {}
    try:
        inline = text.lstrip().startswith("{")
        given = json.loads(text) if inline else read_json(Path(text))
    except (OSError, ValueError, RecursionError) as error:
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
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the complete record here")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=_count, metavar="N", help="samples of one call")
    parser.add_argument(
        "--threads", type=_threads, metavar="N", help="default: the runtime's choice"
    )
    parser.add_argument("--providers", default="cpu", metavar="A,B", help="default: cpu")
    parser.add_argument(
        "--provider-options",
        default="",
        metavar="JSON",
        help='{"PROVIDER": {"KEY": "VALUE"}}, or a file with it',
    )
    parser.add_argument("--optimization", choices=LEVELS, default="all")


def _natural(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def _count(text: str) -> int:
    return _natural(text, least=1)


def _threads(text: str) -> int:
    threads = _count(text)
    if threads > MAX_THREADS:
        raise argparse.ArgumentTypeError(f"{text!r} is more than {MAX_THREADS:,} threads")
    return threads


def _seconds(text: str) -> float:
    return _positive(text, "of seconds ")


def _positive(text: str, unit: str = "") -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number {unit}above 0")
    return value


_OPTIONS = {
    "against_options": "against-provider-options",
    "compute_capabilities": "sm",
    "shapes": "shape",
}
_SWITCHED_OFF = ("gpu_fallback", "memory", "run")
"""Settings that are on by default, with an option --no-… instead of one of their name."""


def command_words(command: str, model: Path | None, settings: Mapping[str, Any]) -> List[str]:
    """The words after ``python -m edgerun`` that mean these settings; None is the default.

    Args:
        command: its name.
        model: its model.
        settings: by name, as the options are called, or as
            :class:`edgerun.tensorrt.settings.BuildSettings` has them.
    """
    words = [command]
    if model is not None:
        words.append(f"./{model}" if str(model).startswith("-") else str(model))
    for name, value in settings.items():
        option = f"--{_OPTIONS.get(name, name.replace('_', '-'))}"
        values: Sequence[Any] = (value,)
        if value is None:
            continue
        if isinstance(value, bool):
            off = name in _SWITCHED_OFF
            words += [] if value == off else [option.replace("--", "--no-") if off else option]
            continue
        if name == "shapes" and isinstance(value, dict):
            ranges = {key: ":".join("x".join(map(str, s)) for s in r) for key, r in value.items()}
            values = [f"{key}={sizes}" for key, sizes in ranges.items()]
        elif isinstance(value, dict):
            values = [json.dumps(value)]
        elif name == "providers":
            values = [",".join(value)] if value else []
        elif isinstance(value, (list, tuple)):
            values = value
        for one in map(str, values):
            # A value that begins with a hyphen is taken for an option otherwise.
            words += [f"{option}={one}"] if one.startswith("-") else [option, one]
    return words


def _check_outputs(options: argparse.Namespace) -> None:
    """Check that no file to write is one that is read or written besides.

    Raises:
        BadInput, CannotWrite: as :func:`edgerun.files.check_output`.
    """
    given = {name: path for name, path in vars(options).items() if isinstance(path, Path)}
    outputs = {name: given.pop(name) for name in ("json", "output", "engine") if name in given}
    read = list(given.values())
    if options.name == "run" and options.bundle is not None:
        read += [options.bundle / "manifest.json", *options.bundle.glob("*.onnx")]
    for name, path in outputs.items():
        others = [other for key, other in outputs.items() if key != name]
        # Whether an engine or an output can be written at all is found when that is done.
        if name == "json" or os.path.lexists(str(path)):
            check_output(path, f"--{name}", [*read, *others], stream=True)


def _is_limited(options: argparse.Namespace) -> bool:
    """Whether a command's memory is limited: drivers of GPUs map more than they use."""
    model = getattr(options, "model", None)
    on_cpu = getattr(options, "providers", "cpu") in ("cpu", "CPUExecutionProvider")
    return options.name not in ("build", "parse") and on_cpu and not (model and is_engine(model))


# numpy and the runtime are imported inside the commands: verify must work without them.
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not a stream that a program put in its place
            stream.reconfigure(errors="backslashreplace")
    parser = command_parser()
    for word in sys.argv[1:] if arguments is None else arguments:
        if not is_utf8(word):
            parser.error(f"the argument {word!r} is not valid UTF-8: rename the file")
    try:
        options = parser.parse_args(arguments)
    except SystemExit as ending:
        raise SystemExit(_print((), int(ending.code or 0))) from None
    try:
        _check_outputs(options)
        with limited_memory("the model") if _is_limited(options) else nullcontext():
            code, record, lines = _COMMANDS[options.name](options)
        if record is not None and getattr(options, "json", None) is not None:
            _write_json(options.json, record)
        return _print(lines, code)
    except EdgerunError as error:
        return error.report()
    except ImportError as error:
        return RunFailed(
            f"{error.name} is not installed for {sys.executable}",
            remedy=f"{sys.executable} -m pip install numpy onnxruntime",
        ).report()
    except KeyboardInterrupt:
        return 130
    except MemoryError as error:
        return RunFailed(
            f"the memory ran out: {error}", remedy="give smaller inputs, or free some"
        ).report()
    except Exception as error:
        if os.environ.get("EDGERUN_DEBUG"):
            raise
        text = " ".join(str(error).split())[:500]
        return RunFailed(
            f"edgerun failed unexpectedly: {type(error).__name__}: {text}",
            remedy="EDGERUN_DEBUG=1 shows the traceback, to be reported",
        ).report()


def _print(lines: Iterable[str], code: int) -> int:
    """Print lines and all that was printed before; the exit code, which is another one than
    ``code`` where they cannot be written.
    """
    try:
        for line in lines:
            print(printable(line))
        if sys.stdout is not None:  # it was closed by the caller otherwise
            sys.stdout.flush()
        return code
    except OSError as error:
        discard(sys.stdout)
        if isinstance(error, BrokenPipeError):  # the reader closed it (| head)
            return 141
        lost = CannotWrite(
            f"the output cannot be written: {error.strerror}",
            where="standard output",
            remedy="free space, or redirect it elsewhere",
        )
        return code or lost.report()


Done = Tuple[int, Optional[Dict[str, Any]], Iterable[str]]
"""What a command returns: its exit code, its record, and the lines to print."""


def _run(options: argparse.Namespace) -> Done:
    from edgerun.manifest import MANIFEST, manifest_beside, read_manifest
    from edgerun.run import open_model, run

    manifest = None
    if options.bundle is not None:
        manifest = read_manifest(options.bundle / MANIFEST)
    elif options.manifest is not None:
        manifest = read_manifest(options.manifest)
    path = options.model or (manifest.model_path if manifest else None)
    if path is None:
        raise BadInput("no model is given", remedy="edgerun run MODEL.onnx, or --bundle FOLDER")
    manifest = manifest or manifest_beside(path)
    model = open_model(path, model_settings(options))
    begin = time.perf_counter()
    outputs = run(model, options.inputs, options.batch, manifest, options.raw)
    seconds = time.perf_counter() - begin
    outputs.save(options.output)
    lines = [
        f"{name} {array.dtype} {'x'.join(map(str, array.shape))}"
        for name, array in outputs.arrays.items()
    ]
    if outputs.labels is not None:
        more = " …" if outputs.samples > 10 else ""
        lines.append(f"labels: {', '.join(outputs.labels[:10])}{more}")
    return 0, None, [*lines, f"{outputs.samples} samples in {seconds:.2f} s -> {options.output}"]


def _bench(options: argparse.Namespace) -> Done:
    from edgerun.bench import BenchOptions, bench, bench_lines
    from edgerun.model import parse_shapes

    record = bench(
        BenchOptions(
            models=tuple(p for p in (options.model, options.against) if p is not None),
            settings=model_settings(options),
            inputs=options.inputs,
            shapes=parse_shapes(options.shape),
            batch=options.batch,
            seed=options.seed,
            min_queries=options.min_queries,
            max_seconds=options.max_seconds,
            memory=not options.no_memory,
            processes=options.processes,
            max_processes=options.max_processes,
            budgets={
                figure: getattr(options, name)
                for name, figure in BUDGETS.items()
                if getattr(options, name) is not None
            },
            against_settings=model_settings(options, against=True),
        )
    )
    return 0, record, bench_lines(record)


def _verify(options: argparse.Namespace) -> Done:
    from edgerun.manifest import verify

    verdict = verify(options.bundle)
    if verdict.intact:
        return 0, None, [f"intact: {verdict.listed} files"]
    return 1, None, verdict.problems


def _info(options: argparse.Namespace) -> Done:
    from edgerun.board import describe_board
    from edgerun.run import describe_model, model_lines
    from edgerun.system import describe_environment, description_lines, read_conditions

    environment = {**describe_environment(), "now": read_conditions()}
    board = describe_board()
    record: Dict[str, Any] = {
        "schema": "edgerun.info/1",
        "environment": environment,
        "board": board,
    }
    own = {key: board[key] for key in board if key not in environment and key != "missing"}
    lines = list(description_lines({**environment, **own}))
    if options.model is not None:
        record["model"] = describe_model(options.model)
        lines = [*model_lines(record["model"]), *lines]
    return 0, record, lines


def _probe(options: argparse.Namespace) -> Done:
    from edgerun.model import parse_shapes
    from edgerun.run import probe

    record = probe(
        options.model,
        model_settings(options),
        inputs=options.inputs,
        shapes=parse_shapes(options.shape),
        batch=options.batch,
        run=not options.no_run,
        # Flushed at once: the next step may crash this process.
        report=lambda step: print(step, flush=True),
    )
    return 0, record, ()


def _build(options: argparse.Namespace) -> Done:
    from edgerun.tensorrt.build import build, build_lines
    from edgerun.tensorrt.settings import BuildSettings, parse_ranges

    settings = BuildSettings(
        library=options.library,
        compute_capabilities=tuple(dict.fromkeys(options.sm)),
        precision=options.precision,
        keep=tuple(dict.fromkeys(options.keep)),
        shapes=parse_ranges(options.shape),
        batch=options.batch,
        workspace_mb=options.workspace_mb,
        timing_cache=options.timing_cache,
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
        dla=options.dla,
        gpu_fallback=not options.no_gpu_fallback,
    )
    record = build(options.model, options.engine, settings)
    return 0, record, build_lines(record)


def _parse(options: argparse.Namespace) -> Done:
    from edgerun.tensorrt.network import parse

    record = parse(options.model, options.library)
    takes = "takes the model" if record["supported"] else "does not take the model"
    problems = [f"  {p['node']} ({p['op']}): {p['message']}" for p in record["problems"]]
    return 0, record, [f"{record['library']} {record['version']} {takes}", *problems]


def _write_json(path: Path, value: Dict[str, Any]) -> None:
    with write_errors(path, "the result"):
        path.write_text(json.dumps(value, allow_nan=False) + "\n", encoding="utf-8")


_COMMANDS: Dict[str, Callable[[argparse.Namespace], Done]] = {
    "run": _run,
    "bench": _bench,
    "verify": _verify,
    "info": _info,
    "probe": _probe,
    "build": _build,
    "parse": _parse,
}
