"""``python -m edgerun``: parse the arguments, call, print.

Exit codes: 0 done, 1 a bundle is not intact, 2 the input is wrong, 3 the runtime failed or there
is no GPU for an engine, 5 a file cannot be written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable, Sequence

from edgerun.arguments import command_parser, model_settings
from edgerun.errors import BadInput, CannotWrite, EdgerunError, RunFailed
from edgerun.output_file import check_output

# numpy and the runtime are imported inside the commands: verify must work without them.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = command_parser().parse_args(arguments)
    try:
        if getattr(options, "json", None) is not None:
            check_output(options.json, "--json", stream=True)
        code: int = _COMMANDS[options.name](options)
    except EdgerunError as error:
        print(f"edgerun: {error}", file=sys.stderr)
        return error.exit_code
    except ImportError as error:
        print(
            f"edgerun: {error.name} is not installed for {sys.executable}\n"
            f"  to do: {sys.executable} -m pip install numpy onnxruntime",
            file=sys.stderr,
        )
        return RunFailed.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has had enough of it (| head); Python must not flush the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def _run(options: argparse.Namespace) -> int:
    from edgerun.manifest import MANIFEST, manifest_beside, read_manifest
    from edgerun.model import open_model
    from edgerun.run import run

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
    answers = run(model, options.inputs, options.batch, manifest, options.raw)
    seconds = time.perf_counter() - begin
    answers.save(options.output)
    for name, array in answers.outputs.items():
        print(f"{name} {array.dtype} {'x'.join(map(str, array.shape))}")
    if answers.labels is not None:
        more = " …" if answers.samples > 10 else ""
        print(f"labels: {', '.join(answers.labels[:10])}{more}")
    print(f"{answers.samples} samples in {seconds:.2f} s -> {options.output}")
    return 0


def _bench(options: argparse.Namespace) -> int:
    from edgerun.bench import Plan, bench
    from edgerun.shapes import parse_shapes
    from edgerun.text import bench_lines

    record = bench(
        Plan(
            models=tuple(p for p in (options.model, options.against) if p is not None),
            settings=model_settings(options),
            inputs=options.inputs,
            shapes=parse_shapes(options.shape),
            batch=options.batch,
            seed=options.seed,
            min_queries=options.min_queries,
            max_seconds=options.max_seconds,
            memory=not options.no_memory,
            against_settings=model_settings(options, against=True),
        )
    )
    if options.json is not None:
        _write_json(options.json, record)
    print("\n".join(bench_lines(record)))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from edgerun.verify import verify

    verdict = verify(options.folder)
    print("\n".join(verdict.lines()))
    return 0 if verdict.intact else 1


def _info(options: argparse.Namespace) -> int:
    from edgerun.environment import describe_environment
    from edgerun.model_description import describe_model, model_lines
    from edgerun.sensors import read_conditions
    from edgerun.text import description_lines

    described: dict[str, Any] = {
        "schema": "edgerun.info/1",
        "environment": {**describe_environment(), "now": read_conditions()},
    }
    if options.model is not None:
        described["model"] = model = describe_model(options.model)
        print("\n".join(model_lines(model)))
    if options.json is not None:
        _write_json(options.json, described)
    print("\n".join(description_lines(described["environment"])))
    return 0


def _probe(options: argparse.Namespace) -> int:
    from edgerun.probe import probe
    from edgerun.shapes import parse_shapes

    record = probe(
        options.model,
        model_settings(options),
        inputs=options.inputs,
        shapes=parse_shapes(options.shape),
        batch=options.batch,
        run=not options.no_run,
        # At once: what follows may end this process.
        tell=lambda step: print(step, flush=True),
    )
    if options.json is not None:
        _write_json(options.json, record)
    return 0


def _build(options: argparse.Namespace) -> int:
    from edgerun.tensorrt_build import build
    from edgerun.tensorrt_settings import BuildSettings, parse_ranges
    from edgerun.tensorrt_text import build_lines

    settings = BuildSettings(
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
    record = build(options.model, options.engine, options.library, settings)
    if options.json is not None:
        _write_json(options.json, record)
    print("\n".join(build_lines(record)))
    return 0


def _parse(options: argparse.Namespace) -> int:
    from edgerun.tensorrt_network import judge

    verdict = judge(options.model, options.library)
    if options.json is not None:
        _write_json(options.json, verdict)
    said = "takes the model" if verdict["supported"] else "does not take the model"
    print(f"{verdict['library']} {verdict['version']} {said}")
    for problem in verdict["problems"]:
        print(f"  {problem['node']} ({problem['op']}): {problem['message']}")
    return 0


def _write_json(path: Path, value: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(value, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise CannotWrite(f"the result cannot be written: {error.strerror}", str(path)) from error


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "bench": _bench,
    "verify": _verify,
    "info": _info,
    "probe": _probe,
    "build": _build,
    "parse": _parse,
}

if __name__ == "__main__":
    sys.exit(main())
