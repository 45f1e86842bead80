"""``edgekd build``: an engine from any ONNX model, or those of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from edgekd.cli.benchmark import write_record
from edgekd.cli.options import (
    THREADS,
    FiniteRange,
    is_pipeline,
    refuse_options,
    refuse_options_of_a_model,
    typed_options,
)
from edgekd.errors import InputError, printable
from edgerun.cli import LEVELS

if TYPE_CHECKING:
    from edgekd.config.profile import Profile
    from edgekd.onnx.session import Optimization

FILE = click.Path(path_type=Path)
ENGINES = ("onnxruntime", "tensorrt", "tensorrt-rtx")
FOR_PIPELINE = frozenset({"model", "output", "overrides", "quiet"})
FOR_ONNXRUNTIME = frozenset(
    {"model", "output", "engine", "profile", "threads", "optimization", "out"}
)
NOT_FOR_MODEL = frozenset({"overrides", "quiet"})


@click.command()
@click.argument("model", type=FILE, metavar="MODEL.onnx")
@click.option("-o", "--output", type=FILE, metavar="OUT", help="The engine, or the run's folder.")
@click.option("--engine", type=click.Choice(ENGINES), help="[default: the profile's]")
@click.option("--profile", metavar="NAME", help="Memory, GPU and threads of this device profile.")
@click.option("--threads", type=THREADS, help="ONNX Runtime's.  [default: 1]")
@click.option(
    "--optimization", type=click.Choice(LEVELS), default="all", help="ONNX Runtime's level to run "
    "at.  [default: all]",
)  # fmt: skip
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16", "int8"]))
@click.option("--keep", multiple=True, metavar="NODE", help="Node that may stay wider.")
@click.option("--shape", "shapes", multiple=True, metavar="NAME=MIN:USUAL:MAX")
@click.option("--batch", type=click.IntRange(min=1), help="Usual and largest batch.  [default: 1]")
@click.option("--sm", multiple=True, metavar="8.6", help="A GPU to build for (tensorrt-rtx).")
@click.option("--workspace-mb", type=FiniteRange(0, min_open=True), metavar="MB")
@click.option("--timing-cache", type=FILE, metavar="FILE", help="Reused by later builds.")
@click.option("--version-compatible", is_flag=True, help="For later releases too.")
@click.option("--hardware-compatible", is_flag=True, help="For other GPUs too (tensorrt).")
@click.option("--dla", type=click.IntRange(min=0), metavar="CORE", help="A Jetson's DLA core.")
@click.option("--no-gpu-fallback", is_flag=True, help="Every layer on the DLA.")
@click.option("--json", "out", type=FILE, metavar="OUT", help="Write the complete record here.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="For a pipeline.")
@click.option("-q", "--quiet", is_flag=True, help="For a pipeline: print only errors.")
def build(model: Path, output: Path | None, **options: Any) -> None:
    """Build an engine from MODEL.onnx.

    tensorrt-rtx builds for named GPUs on a machine without one; an engine of tensorrt is built
    on the device it runs on. A layer without the requested precision is an error.

    Given a pipeline's YAML file, run the pipeline up to its engines.
    """
    if is_pipeline(model):
        refuse_options_of_a_model(FOR_PIPELINE)
        from edgekd.cli.run import run_pipeline_until

        run_pipeline_until(model, "engines", options["overrides"], output, options["quiet"])
        return
    refuse_options(typed_options() & NOT_FOR_MODEL, "a pipeline, not for an ONNX model")
    if output is None:
        raise InputError("no file to write is given", where="edgekd build", remedy="add -o OUT")
    from edgekd.config.profile import load_profile
    from edgekd.crashes import note_model
    from edgekd.files import check_output
    from edgekd.onnx.file import files_of_onnx

    note_model(model)
    profile = None if options["profile"] is None else load_profile(options["profile"])
    engine = options["engine"] or (profile.runtime.engine if profile else "onnxruntime")
    given = (options["profile"], options["timing_cache"])
    read = [*files_of_onnx(model), *(Path(name) for name in given if name)]
    check_output(output, "-o", inputs=read)
    if options["out"] is not None:
        check_output(options["out"], "--json", inputs=[*read, output], stream=True)
    if engine == "onnxruntime":
        refuse_options(typed_options() - FOR_ONNXRUNTIME, "TensorRT, not for ONNX Runtime")
        record = _build_onnxruntime(
            model, output, profile, options["threads"], options["optimization"]
        )
    else:
        refuse_options(
            typed_options() & {"threads", "optimization"}, "ONNX Runtime, not for TensorRT"
        )
        record = _build_tensorrt(model, output, engine, profile, options)
    if options["out"] is not None:
        write_record(options["out"], record)


def _build_onnxruntime(
    model: Path,
    output: Path,
    profile: Profile | None,
    threads: int | None,
    optimization: Optimization,
) -> dict[str, Any]:
    from edgekd.config.host import local_providers
    from edgekd.engines.onnxruntime import build_engine, providers_for

    here = local_providers()
    wanted = profile.runtime.providers if profile else ()
    # A profile may be another device's: the file is then optimized with what is here.
    chosen = tuple(name for name in wanted if name in here) or ("CPUExecutionProvider",)
    threads = threads or (profile.runtime.threads if profile else None) or 1
    info = build_engine(model, output, providers_for(chosen, None), threads, optimization)
    shown = printable(str(output))
    click.echo(f"{shown}  {info.size_bytes / 1e6:.3f} MB  ONNX Runtime, {threads} thread(s)")
    nodes = ", ".join(f"{count} on {name}" for name, count in info.nodes.items())
    click.echo(f"  nodes: {nodes}; largest difference {info.max_difference:.2g}")
    if info.disabled_optimizers:
        click.echo(
            f"  without {', '.join(info.disabled_optimizers)}, which ONNX Runtime changes the "
            "outputs by"
        )
    if info.run_level != "all":
        click.echo(
            "  open it with graph_optimization_level = ORT_DISABLE_ALL (edgerun: --optimization "
            "disabled): the file is optimized already, and ONNX Runtime would change the outputs"
        )
    left_out = [name for name in wanted if name not in here]
    if left_out:
        click.echo(f"  left out, not on this machine: {', '.join(left_out)}")
    return {"engine": "onnxruntime", **info.to_json(), "providers_left_out": left_out}


def _build_tensorrt(
    model: Path,
    output: Path,
    engine: Literal["tensorrt", "tensorrt-rtx"],
    profile: Profile | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    from dataclasses import replace

    from edgekd.config.pipeline import TensorRTConfig
    from edgekd.engines.tensorrt import check_runtime, engine_settings
    from edgekd.errors import edgerun_errors
    from edgekd.targets import LocalTarget
    from edgerun.tensorrt.build import build_lines
    from edgerun.tensorrt.settings import parse_ranges

    config = TensorRTConfig(
        kind=engine,
        workspace_mb=options["workspace_mb"],
        version_compatible=options["version_compatible"],
        hardware_compatible=options["hardware_compatible"],
        dla=options["dla"],
        gpu_fallback=not options["no_gpu_fallback"],
    )
    settings = engine_settings(
        config,
        profile,
        batch=options["batch"] or 1,
        precision=options["precision"],
        keep=options["keep"],
        timing_cache=options["timing_cache"],
    )
    with edgerun_errors():
        shapes = parse_ranges(options["shapes"])
    settings = replace(
        settings,
        shapes=shapes,
        compute_capabilities=tuple(options["sm"]) or settings.compute_capabilities,
    )
    check_runtime(settings, profile, model)
    record = LocalTarget().build(model, output, settings)
    click.echo(printable("\n".join(build_lines(record))))
    return record
