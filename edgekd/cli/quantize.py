"""``edgekd quantize``: fewer bits for any ONNX model, or for a pipeline's student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgekd.cli.benchmark import FILE, write_record
from edgekd.cli.typed_options import PIPELINE_SUFFIXES, refuse_options, typed_options
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
@click.option("--samples", type=click.IntRange(min=2), default=512, show_default=True)
@click.option(
    "--max-drop",
    type=click.FloatRange(min=0),
    help="Keep layers in float32 until the metric falls by no more.",
)
@click.option("--labels", metavar="NAME", help="The array of DATA.npz with the classes.")
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
    --labels the metric is agreement with the float32 model. Exit code 1: --max-drop cannot be
    met, and nothing was written. A file that was at --output before stays until all is done.

    Given a pipeline's YAML file, run the pipeline up to its quantized candidates.
    """
    if model.suffix.lower() in PIPELINE_SUFFIXES:
        refuse_options(typed_options() - FOR_PIPELINE, "an ONNX model, not for a pipeline")
        from edgekd.cli.stage_command import run_pipeline_until

        run_pipeline_until(model, "quantize", overrides, out, quiet)
        return
    refuse_options(typed_options() & {"overrides", "quiet"}, "a pipeline, not for an ONNX model")
    if out is None:
        raise InputError("no file to write is given", where="--output", remedy="give -o OUT.onnx")
    from rich.console import Console

    from edgekd.cli.quantize_table import print_quantized
    from edgekd.stages.own_model import QuantizeSettings, quantize_model

    settings: dict[str, Any] = {"method": method, "runtime": runtime, "calibration": calibrator}
    with Console(stderr=True).status("quantizing and comparing"):
        record = quantize_model(
            model,
            out,
            calibration,
            QuantizeSettings(
                **settings,
                samples=samples,
                max_drop=max_drop,
                labels=labels,
                keep=keep,
                threads=threads,
                timing=not no_timing,
                per_layer=per_layer,
            ),
        )
    if record_to is not None:
        write_record(record_to, record)
    print_quantized(Console(), record)
    if record["output"] is None:
        raise GateFailed(
            f"no layer can stay in INT8 within a drop of {max_drop:g}",
            where=str(model),
            remedy="allow more, calibrate with --calibrator entropy or percentile, or on more and "
            "more typical samples; in a pipeline, quantize: {int8: qat} trains the loss back",
        )
