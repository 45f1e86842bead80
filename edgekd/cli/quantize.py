"""``edgekd quantize``: fewer bits for any ONNX model, or for a pipeline's student."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from edgekd.cli.benchmark import FILE, write_record
from edgekd.cli.typed_options import (
    PIPELINE_SUFFIXES,
    refuse_options,
    refuse_options_of_a_model,
    typed_options,
)
from edgekd.errors import GateFailed, InputError

FOR_PIPELINE = frozenset({"model", "out", "overrides", "quiet"})


@click.command()
@click.argument("model", type=FILE, metavar="MODEL.onnx")
@click.option(
    "-o",
    "--output",
    "out",
    type=FILE,
    metavar="OUT.onnx",
    help="What to write.",
)
@click.option("--calibration", type=FILE, metavar="DATA.npz", help="Real inputs by name, or .npy.")
@click.option(
    "--for",
    "runtime",
    type=click.Choice(["cpu", "tensorrt"]),
    default="cpu",
    show_default=True,
    help="Whose INT8 scheme: uint8 activations, or symmetric int8 with biases in float.",
)
@click.option(
    "--method",
    type=click.Choice(["static", "dynamic", "weights-only", "fp16", "bf16"]),
    default="static",
    show_default=True,
)
@click.option(
    "--calibrator",
    type=click.Choice(["minmax", "entropy", "percentile"]),
    default="minmax",
    show_default=True,
    help="How the ranges of activations are found.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    help="At most so many are calibrated on.",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(min=0),
    help="The metric may fall by no more (0.01: one point). Static INT8 keeps layers in float32 "
    "until that holds; else nothing is written.",
)
@click.option(
    "--validation",
    type=FILE,
    metavar="DATA.npz",
    help="Samples to compare on.  [default: those of --calibration]",
)
@click.option("--labels", metavar="NAME", help="The array with the classes, beside those samples.")
@click.option("--keep", multiple=True, metavar="NODE", help="Leave this node as it is.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--per-layer", is_flag=True, help="List each layer's error.")
@click.option("--no-timing", is_flag=True, help="Do not compare the latency.")
@click.option("--json", "record_to", type=FILE, metavar="OUT", help="Write the record here.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="For a pipeline.")
@click.option("-q", "--quiet", is_flag=True, help="For a pipeline: print only errors.")
def quantize(
    model: Path,
    out: Path | None,
    calibration: Path | None,
    runtime: str,
    method: str,
    calibrator: str,
    samples: int,
    max_drop: float | None,
    validation: Path | None,
    labels: str | None,
    keep: tuple[str, ...],
    threads: int,
    per_layer: bool,
    no_timing: bool,
    record_to: Path | None,
    overrides: tuple[str, ...],
    quiet: bool,
) -> None:
    """Write MODEL.onnx in fewer bits, and say what that gains and costs on real samples.

    INT8 by ONNX Runtime's quantizer (Q/DQ, weights per channel), or 16-bit floats. Without
    --labels the metric is agreement with the float32 model. Other samples than those of the
    calibration (--validation) are the better test. For a CPU, layers at the input stay in float32
    where that is measured to be faster here (not with --no-timing). Exit code 1: --max-drop cannot
    be met, and nothing was written. A file that was at --output before stays until all is done.

    Given a pipeline's YAML file, run the pipeline up to its quantized candidates.
    """
    if model.suffix.lower() in PIPELINE_SUFFIXES:
        refuse_options_of_a_model(FOR_PIPELINE)
        from edgekd.cli.stage_command import run_pipeline_until

        run_pipeline_until(model, "quantize", overrides, out, quiet)
        return
    refuse_options(typed_options() & {"overrides", "quiet"}, "a pipeline, not for an ONNX model")
    if method != "static":
        unused = typed_options() & {"runtime", "calibrator", "samples"}
        refuse_options(unused, f"--method static, not for --method {method}")
    if out is None:
        raise InputError("no file to write is given", where="--output", remedy="give -o OUT.onnx")
    from rich.console import Console
    from rich.markup import escape

    from edgekd.cli.quantize_table import print_quantized
    from edgekd.engines.output_file import check_output
    from edgekd.stages.own_model import QuantizeSettings, files_read, quantize_model
    from edgekd.supervision import note_model

    note_model(model)
    if record_to is not None:
        read = files_read(model, calibration, validation)
        check_output(record_to, "--json", inputs=[*read, out], stream=True)

    settings: dict[str, Any] = {"method": method, "runtime": runtime, "calibrator": calibrator}
    doing = "quantizing and comparing"
    with Console(stderr=True).status(doing) as status:
        record = quantize_model(
            model,
            out,
            calibration,
            QuantizeSettings(
                **settings,
                samples=samples,
                max_drop=max_drop,
                labels=labels,
                validation=validation,
                keep=keep,
                threads=threads,
                timing=not no_timing,
                per_layer=per_layer,
            ),
            progress=lambda text: status.update(f"{doing}: {escape(text)}"),
        )
    if record_to is not None:
        write_record(record_to, record)
    print_quantized(Console(), record)
    if record["output"] is None and max_drop is not None:
        raise _not_met(record, max_drop)


def _not_met(record: Mapping[str, Any], max_drop: float) -> GateFailed:
    """The failure of a model whose metric fell by more than allowed."""
    if "drop" not in record:
        whole = record["decision"]["drop_all"]
        drop = "they give no numbers" if whole is None else f"all of them drop it by {whole:.4g}"
        return GateFailed(
            f"no layer can stay in INT8 within a drop of {max_drop:g} ({drop}); nothing was "
            "written",
            where=record["model"],
            remedy="allow more, calibrate with --calibrator entropy or percentile, or on more and "
            "more typical samples; in a pipeline, quantize: {int8: qat} trains the loss back",
        )
    other = "fp16" if record["method"] in ("dynamic", "weights-only", "bf16") else None
    metric, worst = record["metric"], record["worst"]
    if worst is not None:
        metric = f"{worst['metric']} of {worst['part']}"
    drop = record["drop"]["value"] if worst is None else worst["drop"]
    return GateFailed(
        f"{metric} falls by {drop:.4g}, more than the {max_drop:g} of "
        "--max-drop; nothing was written",
        where=record["model"],
        remedy="allow more, keep the layers that --per-layer shows in float32 (--keep NODE)"
        + (f", or try --method {other}" if other else ""),
    )
