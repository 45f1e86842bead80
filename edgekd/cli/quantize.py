"""``edgekd quantize``: make an ONNX model INT8 or FP16, compare and print."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from edgekd.cli.benchmark import FILE, write_record
from edgekd.cli.options import (
    THREADS,
    FiniteRange,
    is_pipeline,
    refuse_options,
    refuse_options_of_a_model,
    typed_options,
)
from edgekd.errors import GateFailed, InputError
from edgekd.measurement import Measurement, full_text
from edgekd.onnx.error_metrics import SCORE_THRESHOLD
from edgekd.progress import Console

FOR_PIPELINE = frozenset({"model", "out", "overrides", "quiet"})


@click.command()
@click.argument("model", type=FILE, metavar="MODEL.onnx")
@click.option("-o", "--output", "out", type=FILE, metavar="OUT.onnx", help="What to write.")
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
    help="How the ranges of activations are determined.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=2),
    default=512,
    show_default=True,
    help="Largest number of samples to calibrate on.",
)
@click.option(
    "--max-drop",
    type=FiniteRange(min=0),
    help="The metric may fall by no more (0.01: one point). Static INT8 keeps layers in float32 "
    "until that holds; else nothing is written.",
)
@click.option(
    "--validation",
    type=FILE,
    metavar="DATA.npz",
    help="Samples to compare on.  [default: those of --calibration]",
)
@click.option("--labels", metavar="NAME", help="The array with the classes.")
@click.option("--keep", multiple=True, metavar="NODE", help="A node that is not quantized.")
@click.option("--threads", type=THREADS, default=1, show_default=True)
@click.option("--per-layer", is_flag=True, help="List each layer's error.")
@click.option("--no-timing", is_flag=True, help="Do not compare the latency.")
@click.option("--json", "record_to", type=FILE, metavar="OUT", help="Write the record here.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="For a pipeline.")
@click.option("-q", "--quiet", is_flag=True, help="For a pipeline: print only errors.")
def quantize(
    model: Path,
    out: Path | None,
    calibration: Path | None,
    no_timing: bool,
    record_to: Path | None,
    overrides: tuple[str, ...],
    quiet: bool,
    **settings: Any,
) -> None:
    """Write MODEL.onnx in fewer bits, and report what that gains and costs on real samples.

    INT8 by ONNX Runtime's quantizer (Q/DQ, weights per channel), or 16-bit floats. Without
    --labels the metric is agreement with the float32 model. Other samples than those of the
    calibration (--validation) are the better test. For a CPU, layers at the input stay in float32
    where that is measured to be faster here (not with --no-timing). Exit code 1: --max-drop cannot
    be met, and nothing was written. A file that was at --output before stays until all is done.

    Given a pipeline's YAML file, run the pipeline up to its quantized candidates.
    """
    if is_pipeline(model):
        refuse_options_of_a_model(FOR_PIPELINE)
        from edgekd.cli.run import run_pipeline_until

        run_pipeline_until(model, "quantize", overrides, out, quiet)
        return
    refuse_options(typed_options() & {"overrides", "quiet"}, "a pipeline, not for an ONNX model")
    if settings["method"] != "static":
        unused = typed_options() & {"runtime", "calibrator", "samples"}
        refuse_options(unused, f"--method static, not for --method {settings['method']}")
    if out is None:
        raise InputError("no file to write is given", where="--output", remedy="give -o OUT.onnx")
    from rich.markup import escape

    from edgekd.crashes import note_model
    from edgekd.files import check_output
    from edgekd.quantization.quantize_model import files_read, quantize_model
    from edgekd.quantization.quantize_onnx import QuantizeSettings

    note_model(model)
    if record_to is not None:
        read = files_read(model, calibration, settings["validation"])
        check_output(record_to, "--json", inputs=[*read, out], stream=True)

    doing = "quantizing and comparing"
    with Console(stderr=True).status(doing) as status:
        record = quantize_model(
            model,
            out,
            calibration,
            QuantizeSettings(**settings, timing=not no_timing),
            progress=lambda text: status.update(f"{doing}: {escape(text)}"),
        )
    if record_to is not None:
        write_record(record_to, record)
    print_quantized(Console(), record)
    if record["output"] is None and settings["max_drop"] is not None:
        raise _not_met(record, settings["max_drop"])


def _not_met(record: Mapping[str, Any], max_drop: float) -> GateFailed:
    """The failure of a model whose metric fell by more than allowed."""
    if "drop" not in record:
        drop_all = record["decision"]["drop_all"]
        drop = "they give no numbers"
        if drop_all is not None:
            drop = f"all of them drop it by {drop_all:.4g}"
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


LAYERS_SHOWN = 15

NODES_SHOWN = 8


def print_quantized(console: Console, record: Mapping[str, Any]) -> None:
    """Print size, metric, errors, latency and the layers of a record ``edgekd.quantize/1``."""
    say = partial(console.print, highlight=False, markup=False)
    for line in record.get("decision_lines", ()):
        say(f"  {line}")
    if record["output"] is not None:
        if record.get("float_inputs"):
            _print_float_inputs(say, record["float_inputs"])
        _print_size(say, record)
        _print_float_nodes(say, record)
    if record.get("mixed"):
        part = "in float32, as 8 bits of one scale would lose the smaller part"
        say(f"  {part}: {', '.join(record['mixed'])}")
    half = record.get("half")
    if half:
        say(
            f"  {len(half['kept'])} of {len(half['kept']) + len(half['low'])} nodes stay in float32"
        )
        for name, reason in half["kept"].items():
            say(f"    {name}: {reason}")
    if "metric" in record:
        _print_metric(say, record)
        console.print(_errors(record["errors"], record["compared_on"]))
        for name, note in record["compared_on"].get("outputs", {}).items():
            say(f"  {name}: {note}")
        if record["compared_on"]["calibrated_on"]:
            console.print("  other samples are a better test: --validation DATA.npz")
    for warning in record["warnings"]:
        say(f"  {warning}", style="yellow")
    if "timing" in record:
        _print_timing(say, record["timing"])
    if record.get("layers"):
        console.print(_layers(record["layers"]))


def _print_metric(say: Callable[..., None], record: Mapping[str, Any]) -> None:
    metric, worst = record["metric"], record["worst"]
    of = f" of {worst['part']}" if worst and worst["metric"] == metric else ""
    score, drop = (full_text(Measurement.from_json(record[name])) for name in ("score", "drop"))
    say(f"  {metric}{of}: {score}, drop {drop}")
    if worst and not of:
        say(f"  {worst['metric']} of {worst['part']}: drop {worst['drop']:.4g}")


def _print_size(say: Callable[..., None], record: Mapping[str, Any]) -> None:
    size, before = record["bytes"], record["float_bytes"]
    change = f"{before / size:.2f}× smaller" if size <= before else f"{size / before:.2f}× larger"
    say(f"{record['output']}")
    say(f"  size: {size:,} bytes, {change} ({before:,})")
    if size >= before:
        say("  not smaller than float32", style="yellow")


def _print_float_nodes(say: Callable[..., None], record: Mapping[str, Any]) -> None:
    """Print which nodes stay in float32, those with most weights first."""
    from edgekd.quantization.node_selection import STORED_IN_8_BITS

    rows = sorted(record.get("float32_nodes", ()), key=lambda row: -row["bytes"])
    if not rows:
        return
    total = sum(row["bytes"] for row in rows)
    stay = "node stays" if len(rows) == 1 else "nodes stay"
    weights = f", with {total:,} bytes of weights" if total else ""
    say(f"  {len(rows)} {stay} in float32{weights}")
    for row in rows[:NODES_SHOWN]:
        weights = f", {row['bytes']:,} bytes" if row["bytes"] else ""
        say(f"    {row['node']} ({row['op']}{weights}): {row['reason']}")
    if len(rows) > NODES_SHOWN:
        say(f"    and {len(rows) - NODES_SHOWN} more (--json)")
    others = {row["op"] for row in rows if row["bytes"]} & STORED_IN_8_BITS
    if others and record["method"] == "static":
        names = ", ".join(sorted(others))
        say(f"  --method dynamic or weights-only stores the weights of {names} in 8 bits")


def _print_float_inputs(say: Callable[..., None], tried: Mapping[str, Any]) -> None:
    if tried["taken"]:
        stay = "stays" if len(tried["nodes"]) == 1 else "stay"
        nodes = ", ".join(tried["nodes"])
        say(f"  {nodes} at the input {stay} in float32: {tried['speedup']:.2f}× faster so")


def _print_timing(say: Callable[..., None], timing: Mapping[str, Any]) -> None:
    if "failed" in timing:
        say(f"  latency not compared: {timing['failed']}", style="yellow")
        return
    low, high = timing["interval"] or (None, None)
    interval = "" if low is None else f" ({low:.2f} to {high:.2f})"
    say(
        f"  p50 here, {timing['threads']} thread(s): {_milliseconds(timing['p50_ms'])}, float32 "
        f"{_milliseconds(timing['float_p50_ms'])}: {timing['speedup']:.2f}×{interval}"
    )
    if timing["p50_ms"] is None or timing["float_p50_ms"] is None:
        say(
            "  a query takes so long that too few were timed for a median; "
            "'edgekd benchmark --against' takes the time that you give it"
        )
    if low is None or low <= 1:
        slower = high is not None and high < 1
        outcome = "slower than float32" if slower else "not shown to be faster than float32"
        say(f"  {outcome} on this machine", style="yellow")


def _errors(rows: list[Mapping[str, Any]], on: Mapping[str, Any]) -> Table:
    which = f"{on['samples']:,} samples of {Path(on['file']).name}"
    if on["calibrated_on"] == on["samples"]:
        which = f"{on['samples']:,} calibration samples"
    elif on["calibrated_on"]:
        which += f", {on['calibrated_on']:,} of them calibrated on"
    table = Table(title=Text(f"against float32, on the {which}"))
    headings = ("output", "max |Δ|", "rmse", "SQNR", "cosine", "same")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "output" else "right")
    for row in rows:
        parts = row["parts"]
        same = row["argmax_agreement"]
        if len(parts) == 1:
            same = parts[0]["agreement"]
        chosen = "–" if same is None else f"{same:.2%}"
        if [part["kind"] for part in parts] == ["decisions"]:
            # A difference between class indices is no error measure.
            table.add_row(Text(row["name"]), "–", "–", "–", "–", chosen)
            continue
        table.add_row(
            Text(row["name"]),
            _number(row["max_absolute"]),
            _number(row["rmse"]),
            _decibels(row["sqnr_db"]),
            _number(row["cosine"]),
            chosen,
        )
        for part in parts if len(parts) > 1 else ():
            table.add_row(
                Text(f"  {part['part']}"),
                _number(part["max_absolute"]),
                _number(part["rmse"]),
                _decibels(part["sqnr_db"]),
                "",
                "–" if part["agreement"] is None else f"{part['agreement']:.2%}",
            )
    table.caption = _caption(rows)
    return table


def _caption(rows: list[Mapping[str, Any]]) -> str | None:
    """The footnote that defines the column "same"."""
    kinds = {p["kind"] for row in rows for p in row["parts"] if p["agreement"] is not None}
    meanings = []
    if any(row["argmax_agreement"] is not None for row in rows):
        meanings.append("samples of the same class")
    if "decisions" in kinds:
        meanings.append("values that are equal")
    if "scores" in kinds:
        meanings.append(f"scores over {SCORE_THRESHOLD:g} on either side that are so on both")
    return f"same: {'; '.join(meanings)}" if meanings else None


def _decibels(value: float | None) -> str:
    # Rounded first: no "-0.0".
    return "–" if value is None else f"{round(value, 1) + 0.0:.1f} dB"


def _layers(rows: list[Mapping[str, Any]]) -> Table:
    table = Table(title="layers, the noisiest of their own first")
    for heading in ("node", "operation", "SQNR", "own error"):
        table.add_column(heading, justify="left" if heading in ("node", "operation") else "right")
    rows = sorted(rows, key=lambda row: -(math.inf if row["own"] is None else row["own"]))
    for row in rows[:LAYERS_SHOWN]:
        table.add_row(
            Text(row["node"]), Text(row["op"]), _decibels(row["sqnr_db"]), _number(row["own"])
        )
    return table


def _milliseconds(value: float | None) -> str:
    return "n too small" if value is None else f"{value:.4f} ms"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
