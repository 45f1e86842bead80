"""``edgekd benchmark``: measure an ONNX model or engine, or a pipeline's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from edgekd.cli.options import (
    THREADS,
    FiniteRange,
    is_pipeline,
    refuse_options_of_a_model,
    target_override,
)
from edgekd.errors import InputError, StageError
from edgekd.measurement import ABSENT, number
from edgekd.progress import Console
from edgerun.cli import LEVELS
from edgerun.percentiles import PERCENTILES

if TYPE_CHECKING:
    from edgekd.config.profile import Profile
    from edgekd.targets import Target

FILE = click.Path(path_type=Path)

COMPARED_BYTES = 64 << 20
"""Model files up to this size are also run without graph optimizations, to compare the outputs."""


@click.command()
@click.argument("model", type=FILE, metavar="MODEL.onnx")
@click.option("--against", type=FILE, metavar="OTHER.onnx", help="Compare, in interleaved rounds.")
@click.option(
    "--target", metavar="TARGET", help="Where: ssh://user@host[:port], or a name (edgekd target "
    "list).  [default: local]",
)  # fmt: skip
@click.option("--profile", metavar="NAME", help="Threads and providers of this device profile.")
@click.option("--threads", type=THREADS, help="[default: the profile's, or 1]")
@click.option("--inputs", type=FILE, metavar="DATA.npz", help="[default: random inputs]")
@click.option("--shape", "shapes", multiple=True, metavar="NAME=1x3x224x224")
@click.option("--providers", metavar="A,B", help="[default: the profile's, or the CPU]")
@click.option(
    "--optimization", type=click.Choice(LEVELS), default="all", help="ONNX Runtime's level of "
    "graph optimization.  [default: all]",
)  # fmt: skip
@click.option("--batch", type=click.IntRange(min=1), help="Samples of one query.  [default: 1]")
@click.option("--min-queries", type=click.IntRange(min=1), default=1000, show_default=True)
@click.option("--max-seconds", type=FiniteRange(0, min_open=True), default=60.0)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Fresh "
    "processes at least; up to three times as many are added while the interval of p50 is wide.",
)
@click.option(
    "--budget-p95-ms",
    type=FiniteRange(0, min_open=True),
    help="Add processes until this is outside the interval of p95.",
)
@click.option("--json", "out", type=FILE, metavar="OUT", help="Write the complete record here.")
def benchmark(
    model: Path,
    against: Path | None,
    target: str | None,
    profile: str | None,
    threads: int | None,
    inputs: Path | None,
    shapes: tuple[str, ...],
    providers: str | None,
    optimization: str,
    batch: int | None,
    min_queries: int,
    max_seconds: float,
    processes: int,
    budget_p95_ms: float | None,
    out: Path | None,
) -> None:
    """Measure the latency and peak memory of MODEL.onnx, on this machine or another one.

    The model runs in several fresh processes that hold only numpy and ONNX Runtime, in each of
    which it is warmed up until steady. Percentiles are shown only with enough queries, each with
    the 95 % interval in which the same measurement would find it again.

    Given a pipeline's YAML file, run the pipeline up to its benchmark.
    """
    if is_pipeline(model):
        refuse_options_of_a_model({"model", "target"})
        from edgekd.cli.run import run_pipeline_until

        run_pipeline_until(model, "benchmark", target_override(target))
        return
    from edgekd.crashes import note_model
    from edgekd.files import check_output
    from edgekd.measurement import evidence_of
    from edgekd.onnx.file import ENGINE_SUFFIXES, files_of_onnx
    from edgekd.targets import LocalTarget, open_target

    note_model(model)
    read = [Path(path) for path in (inputs, profile) if path]
    for given in (model, *([against] if against else [])):
        read += [given] if given.suffix.lower() in ENGINE_SUFFIXES else files_of_onnx(given)
    if out is not None:
        check_output(out, "--json", inputs=read, stream=True)
    loaded = _load_profile(profile)
    machine = open_target(target or LocalTarget.name, "--target")
    local = machine.name == LocalTarget.name
    console = Console()
    chosen, left_out = _providers(providers, loaded, None if local else machine)
    threads = threads or (loaded.runtime.threads if loaded else None) or 1
    with Console(stderr=True).status("measuring: warm-up until steady, then timed rounds"):
        record = machine.bench(
            model,
            against,
            inputs=inputs,
            shapes=shapes,
            batch=batch,
            threads=threads,
            providers=chosen,
            provider_options=_options(model, chosen, threads),
            against_options=None if against is None else _options(against, chosen, threads),
            optimization=optimization,
            min_queries=min_queries,
            max_seconds=max_seconds,
            processes=processes,
            budget_p95_ms=budget_p95_ms,
        )
    if inputs is None:
        for measured, path in zip(record["models"], (model, against), strict=False):
            measured["fed"]["decides_work"] = decided_by_inputs(path)
    name = loaded.name if loaded else "host"
    mismatch = loaded.mismatch(record["environment"]) if loaded and not local else ""
    evidence = evidence_of(name, machine.name, mismatch)
    record.update(profile=name, target=machine.name, evidence=evidence, providers_left_out=left_out)
    # A lower level is set by users who already avoid the highest one.
    timed = [model, *([against] if against else [])] if optimization == "all" else []
    record["optimizer_faults"] = _optimizer_faults(timed)
    if out is not None:
        write_record(out, record)
    print_benchmark(console, record)
    if mismatch:
        console.print(f"not evidence for {name}: {mismatch}", style="yellow", markup=False)
    for file, fault in record["optimizer_faults"].items():
        console.print(f"  {file}: {fault}", style="yellow", highlight=False, markup=False)


def _optimizer_faults(models: list[Path]) -> dict[str, str]:
    """Faults of small models whose optimized graph gives other outputs than the model as
    written.
    """
    from edgekd.onnx.file import ENGINE_SUFFIXES
    from edgekd.onnx.graph import precisions_of
    from edgekd.onnx.optimizer_faults import find_fault_on_random_inputs

    found: dict[str, str] = {}
    for model in models:
        if model.suffix.lower() in ENGINE_SUFFIXES or model.stat().st_size > COMPARED_BYTES:
            continue
        if any(precisions_of(model).values()):
            continue  # in fewer bits an optimized graph is rounded in other places
        try:
            fault = find_fault_on_random_inputs(model)
        except (InputError, StageError):
            continue  # it runs on the given inputs, but not on random ones
        if fault is not None:
            found[str(model)] = f"{fault}; {fault.remedy}"
    return found


def decided_by_inputs(model: Path | None) -> dict[str, str]:
    """Inputs whose random values decide how much a model computes, with what they decide; empty for
    an engine."""
    from edgekd.onnx.file import ENGINE_SUFFIXES, read_onnx
    from edgekd.onnx.graph import deciding_inputs

    if model is None or model.suffix.lower() in ENGINE_SUFFIXES:
        return {}
    return deciding_inputs(read_onnx(model))


def _load_profile(name: str | None) -> Profile | None:
    if name is None:
        return None
    from edgekd.config.profile import load_profile

    return load_profile(name)


def _providers(
    given: str | None, profile: Profile | None, machine: Target | None
) -> tuple[list[str], list[str]]:
    """The providers to use, and those of the profile that the machine (None: this one) has not.

    A requested one must be available; a profile may be another device's, and then the ones
    left out are shown next to the figures.
    """
    if given is not None:
        from edgerun.model import full_provider_name

        # edgerun refuses unknown names.
        return [full_provider_name(name.strip()) for name in given.split(",") if name.strip()], []
    if profile is None:
        return [], []
    from edgekd.config.host import local_providers

    here: Sequence[str] = (
        local_providers()
        if machine is None
        else machine.info()["environment"]["providers_available"]
    )
    wanted = profile.runtime.providers
    return [name for name in wanted if name in here], [name for name in wanted if name not in here]


def _options(model: Path, providers: list[str], threads: int) -> dict[str, dict[str, str]]:
    """The providers' options for a model in its precision."""
    from edgekd.onnx.file import ENGINE_SUFFIXES
    from edgekd.onnx.graph import precisions_of
    from edgekd.onnx.session import default_options

    any_options = default_options(providers, threads, half=False, int8=False)
    # A file that cannot be read is reported by edgerun, as without options.
    if not any_options or not model.is_file() or model.suffix.lower() in ENGINE_SUFFIXES:
        return {}
    return default_options(providers, threads, **precisions_of(model))


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a command's record as JSON.

    Raises:
        StageError: the file cannot be written.
    """
    from edgekd.files import write_errors

    remedy = "give --json a file in a folder that exists and has space"
    with write_errors(path, "the record", remedy):
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")


_EVIDENCE = {
    "measured-on-target": "measured on the target itself",
    "measured-on-host": "measured on this machine, which only stands in for the profile's device",
}


def print_benchmark(console: Console, record: dict[str, Any]) -> None:
    """Print a record ``edgerun.bench/1`` with ``profile`` and ``evidence``: one column a model."""
    models = record["models"]
    count = len(record["processes"])
    title = f"ms, 95 % interval over {count} process{'es' if count != 1 else ''} in brackets"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for model in models:
        table.add_column(escape(Path(model["path"]).name), justify="right", overflow="fold")
    for key in PERCENTILES:
        table.add_row(
            key.replace("_", "."), *(_percentile(model["latency"][key]) for model in models)
        )
    table.add_row("queries", *(f"{model['latency']['n']:,}" for model in models))
    table.add_row("warm-up", *(_warm_up(model["warmup"]) for model in models))
    table.add_row("load", *(_cold(model["load"]) for model in models))
    table.add_row("first query", *(_cold(model["first"]) for model in models))
    table.add_row("peak memory", *(_memory(model["memory"]) for model in models))
    table.add_row("size", *(f"{model['size_bytes'] / 1e6:.3f} MB" for model in models))
    table.add_row("nodes run by", *(_nodes(model["providers"]) for model in models))
    console.print(table)
    for note in sorted({m["latency"][key]["note"] for m in models for key in PERCENTILES} - {""}):
        console.print(note, markup=False, highlight=False)
    for model in models:
        _print_inputs(console, model)
    if record["comparison"] is not None:
        _print_comparison(console, record)
    _print_machine(console, record)


def _percentile(figure: dict[str, Any]) -> str:
    if figure["value"] is None:
        return "n too small"
    if figure["interval"] is None:
        return number(figure["value"])
    low, high = figure["interval"]
    return f"{number(figure['value'])} \\[{number(low)}, {number(high)}]"


def _cold(figure: dict[str, Any]) -> str:
    low, high = figure["range"]
    return f"{number(figure['value'])} ({number(low)} to {number(high)})"


def _warm_up(warm_up: dict[str, Any]) -> str:
    state = "steady" if warm_up["steady"] else "[bold yellow]not steady[/]"
    return f"{state} after {warm_up['queries']:,}"


def _memory(memory: dict[str, Any] | None) -> str:
    if memory is None or memory["above_empty_mb"] is None:
        return ABSENT
    return f"{memory['above_empty_mb']:.1f} MB above empty ({memory['peak_mb']:.1f} in all)"


def _nodes(providers: dict[str, Any]) -> str:
    if providers["nodes"] is None:
        return "not known"
    return ", ".join(
        f"{name.removesuffix('ExecutionProvider')} {count}"
        for name, count in providers["nodes"].items()
    )


def _print_inputs(console: Console, model: dict[str, Any]) -> None:
    fed = model["fed"]
    console.print(f"{Path(model['path']).name}: inputs {fed['source']}", markup=False)
    for name, given in fed["inputs"].items():
        shape = " x ".join(map(str, given["shape"])) or "scalar"
        note = f"  ({given['note']})" if given["note"] not in ("", "declared") else ""
        line = f"  {name}: {given['dtype']} {shape}{note}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if fed.get("decides_work"):
        console.print(
            decided_text(fed["decides_work"]),
            style="yellow",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def decided_text(decides: Mapping[str, str]) -> str:
    """The warning that random values decide how much was computed, with the remedy."""
    decided = "; ".join(f"{name} decides {what}" for name, what in decides.items())
    return (
        f"  random values decide how much is computed, so that these times are of no real query: "
        f"{decided}. Give real ones: --inputs DATA.npz"
    )


def _print_comparison(console: Console, record: dict[str, Any]) -> None:
    comparison = record["comparison"]
    first, second = (Path(model["path"]).name for model in record["models"])
    low, high = comparison["interval"]
    console.print(
        f"{second} takes {number(comparison['ratio'])} times the p50 of {first} "
        f"[{number(low)}, {number(high)}] ({comparison['rounds']} interleaved rounds in "
        f"{len(record['processes'])} processes)",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _print_machine(console: Console, record: dict[str, Any]) -> None:
    environment = record["environment"]
    threads = record["settings"]["threads"]
    facts = [
        environment["device"] or environment["cpu"] or "unknown device",
        f"{threads} thread{'s' if threads != 1 else ''}",
        f"onnxruntime {environment['versions']['onnxruntime']}",
        f"governor {environment['governor'] or 'not known'}",
    ]
    console.print(", ".join(facts), markup=False, highlight=False)
    if record.get("providers_left_out"):
        console.print(
            f"[bold yellow]not on this machine, left out: "
            f"{escape(', '.join(record['providers_left_out']))}[/]"
        )
    for reason in record["steadiness"]["reasons"]:
        console.print(f"not steady: {reason}", style="bold yellow", highlight=False, markup=False)
    if not record["steadiness"]["steady"]:
        console.print(
            "close other programs, fix the clocks, or allow more time (--max-seconds)",
            style="yellow",
            highlight=False,
        )
    console.print(
        f"evidence: {record['evidence']} ({_EVIDENCE[record['evidence']]}; "
        f"profile {record['profile']})",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
