"""A network measured as it would be shipped: exported, quantized, built and timed on the target.

Untrained weights are enough. The raw figures of each process are stored as soon as they are there,
so that a stopped search loses none and a repeated measurement costs an export.
"""

from __future__ import annotations

import copy
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.config.pipeline import QuantizeConfig
from edgekd.engines.builder import EngineBuilder
from edgekd.engines.selection import FLOAT, Candidate, choose
from edgekd.errors import CrashError, EdgekdError, TargetError
from edgekd.files import file_sha256, json_sha256, write_npz, write_whole
from edgekd.pipeline.fingerprint import library_versions
from edgekd.pipeline.stage import Context
from edgekd.quantization.quantize_onnx import (
    Method,
    QuantizeSettings,
    opener,
    quantize_onnx,
    raise_crash,
)
from edgekd.release.statistics import t_quantile
from edgekd.stages.engine_builders import StudentVariant, common_level, open_builder
from edgekd.stages.export import metadata_of
from edgekd.stages.quantize import Runtime, reduce_range, runtime_of
from edgekd.stages.task_data import TaskData, ValidationSamples
from edgekd.students.constraints import Limits, Violation, operator_violations
from edgekd.students.costs import Figures, Footprint, GraphCosts, Range, graph_costs
from edgerun.percentiles import PERCENTILES, queries_needed

if TYPE_CHECKING:
    from edgekd.models.dict_model import DictModel
    from edgekd.onnx.samples import Array
    from edgekd.targets import Target

PROCESSES, MOST_PROCESSES = 3, 7
"""A file is timed in so many fresh processes, and in up to so many while an interval contains a
limit."""
QUERIES, SECONDS = 300, 3.0
"""Timed queries of each process at least, and the time after which there are no more."""
MEMORY_NOISE = 0.02
"""Peak memory, which is itself the largest of three processes, is measured once: in repeated
measurements it differed by less than this share."""
SAMPLES = 64
"""Validation samples that are run, compared on, and calibrated on."""
_STATED = ("p50", "p90", "p95", "p99")
_UNSUPPORTED = re.compile(
    r"implementation for ([\w.]+)\(\d+\)|([\w.:]+)\(-?\d+\) is not a registered"
)


@dataclass(frozen=True)
class CandidateMeasurement:
    """What was measured of a network.

    Attributes:
        costs: of the exported float32 graph.
        figures: of the file that the stage ``engines`` would select, were all variants within
            ``quantize.max_drop``; None where the network failed.
        variants: of all files, by name; those not selected were timed in one process.
        violations: the limits that it breaks.
        failure: why there are no figures; empty where there are.
        file: the float32 ONNX file.
        measured: processes started for this call; 0 where all figures were stored already.
    """

    costs: GraphCosts
    figures: Figures | None
    variants: Mapping[str, Figures]
    violations: tuple[Violation, ...]
    failure: str
    file: Path
    measured: int

    @property
    def feasible(self) -> bool:
        """Whether it runs and holds all limits."""
        return self.figures is not None and not self.violations

    @property
    def reason(self) -> str:
        """Why it is not feasible; empty where it is."""
        return self.failure or "; ".join(each.text for each in self.violations)


def measure_candidate(
    context: Context,
    task_data: TaskData,
    model: DictModel | Path,
    teacher: Path | None = None,
    *,
    limits: Limits,
    teacher_figures: Figures | None = None,
    only_float: bool = False,
    processes: int = PROCESSES,
) -> CandidateMeasurement:
    """Export, quantize, build and time a network on the target, or read what was stored of it.

    Args:
        context: of the running stage; figures are stored in its cache, files in its scratch.
        task_data: its validation samples are fed and calibrated on.
        model: the network, with any weights; or its file, as :func:`export_candidate` writes it.
        teacher: the teacher's float32 ONNX file; needed for ``latency.min_speedup``.
        limits: decide when more processes are needed, and the violations.
        teacher_figures: for limits that are ratios to the teacher's size and parameters.
        only_float: leave out the quantized variants, as for the teacher itself.
        processes: the least number of processes that time the file.

    Raises:
        TargetError: the target cannot be reached; the figures so far are stored.
    """
    quantize = None if only_float else context.job.config.quantize
    meter = _Meter(context, task_data, limits)
    return meter.measure(model, teacher, teacher_figures, processes, quantize)


def export_candidate(task_data: TaskData, model: DictModel, file: Path) -> None:
    """Write a network as float32 ONNX file, as the stage ``export`` does of a trained one.

    Raises:
        StageError: it cannot be exported.
    """
    from edgekd.onnx.export import export_onnx

    samples = next(ValidationSamples(task_data, SAMPLES).batches(SAMPLES))
    opset, metadata = task_data.config.export.opset, metadata_of(task_data, "student")
    export_onnx(_prepared(model, samples), file, opset, metadata)


def measure_footprint(context: Context, task_data: TaskData) -> Footprint:
    """What the runtime of the measured engine needs for a model that does nothing.

    Raises:
        TargetError: the target cannot be reached.
    """
    import onnx
    from onnx import helper

    meter = _Meter(context, task_data, Limits({}, {}))
    first = task_data.spec.inputs[0]
    kind = helper.np_dtype_to_tensor_dtype(meter.samples[first.name].dtype)
    given, same = (helper.make_tensor_value_info(name, kind, list(first.shape))
                   for name in (first.name, "same"))  # fmt: skip
    node = helper.make_node("Identity", [given.name], [same.name])
    graph = helper.make_graph([node], "empty", [given], [same])
    opset = helper.make_opsetid("", context.job.config.export.opset)
    file = meter.folder / "empty.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), file)
    # The builder compares outputs for the inputs of the model alone.
    figures = _FileMeter(meter, file, None, None).figures(0, 1, None)
    memory = figures.memory_mb
    peak = None if memory is None else memory.value
    return Footprint(peak, figures.latency_ms["p50"].value)


@dataclass
class _Stored:
    """The raw figures of one file's variants, in a JSON file that is written after each process.

    ``compared`` are the records of the selection by variant, ``timed`` those of each process that
    timed it, ``refused`` the variants that are none, with the reason.
    """

    path: Path
    compared: dict[str, dict[str, Any]] = field(default_factory=dict)
    timed: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.is_file():
            vars(self).update(json.loads(self.path.read_text(encoding="utf-8")))

    def write(self) -> None:
        """Store the figures so far."""
        value = {key: each for key, each in vars(self).items() if key != "path"}
        write_whole(self.path, json.dumps(value), "the figures of a candidate")


@dataclass(frozen=True)
class _Built:
    """A variant with its engine, and that one's row of ``engines.json``."""

    file: Path
    row: Mapping[str, Any]


class _Meter:
    """Measures networks with the first engine of a pipeline on its target."""

    def __init__(self, context: Context, task_data: TaskData, limits: Limits) -> None:
        from edgekd.targets import open_target

        self.context, self.task_data, self.limits = context, task_data, limits
        self.config = context.job.config
        self.target: Target = open_target(self.config.target)
        self.calibration = ValidationSamples(task_data, SAMPLES)
        self.samples = next(self.calibration.batches(SAMPLES))
        self.builder: EngineBuilder = open_builder(context, self.config.engines[0], self.samples)
        self.folder = context.scratch / "candidates"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.cache = context.cache / "candidates"
        self.cache.mkdir(parents=True, exist_ok=True)
        self.inputs = self.folder / "samples.npz"
        write_npz(self.inputs, self.samples)
        limited = (key.removeprefix("latency.").removesuffix("_ms") for key in limits.values)
        self.queries = max(
            [QUERIES, *(queries_needed(PERCENTILES[name]) for name in limited if name in _STATED)]
        )
        self.started = 0

    def measure(
        self,
        model: DictModel | Path,
        teacher: Path | None,
        teacher_figures: Figures | None,
        processes: int,
        quantize: QuantizeConfig | None,
    ) -> CandidateMeasurement:
        """As :func:`measure_candidate`."""
        if isinstance(model, Path):
            file = model
        else:
            written = self.folder / "candidate.onnx"
            export_candidate(self.task_data, model, written)
            file = self.folder / f"{file_sha256(written)[:16]}.onnx"
            written.replace(file)
        costs = graph_costs(file, self.config.benchmark.batch_size)
        over = teacher if "latency.min_speedup" in self.limits.values else None
        figures, failure = None, ""
        violations: tuple[Violation, ...] = ()
        work = _FileMeter(self, file, over, quantize)
        try:
            figures = work.figures(costs.parameters, processes, teacher_figures)
        except TargetError:
            raise
        except EdgekdError as error:
            failure = f"{error.what} ({error.where})" if error.where else error.what
            found = [name for match in _UNSUPPORTED.finditer(error.what) for name in match.groups()]
            violations = operator_violations(dict.fromkeys(filter(None, found)))
        else:
            violations = self.limits.violations(figures, teacher_figures)
        variants = work.variants(costs.parameters)
        return CandidateMeasurement(
            costs, figures, variants, violations, failure, file, self.started
        )


class _FileMeter:
    """Measures one ONNX file and its variants."""

    def __init__(
        self, meter: _Meter, file: Path, teacher: Path | None, quantize: QuantizeConfig | None
    ) -> None:
        from edgekd.targets import machine_of

        self.meter, self.file, self.teacher, self.quantize = meter, file, teacher, quantize
        job, config = meter.context.job, meter.config
        self.runtime: Runtime = runtime_of(job, config.engines[0])
        key = {
            "file": file_sha256(file),
            "teacher": teacher and file_sha256(teacher),
            "inputs": [file_sha256(meter.inputs), config.benchmark.batch_size],
            "quantize": quantize and quantize.model_dump(mode="json", exclude={"select", "qat"}),
            "engine": config.engines[0].model_dump(mode="json"),
            "profile": job.profile.model_dump(mode="json", include={"runtime", "gpu"}),
            "queries": [meter.queries, SECONDS],
            "machine": [meter.target.name, *machine_of(config.target)],
            "versions": library_versions(("onnx", "onnxruntime")),
        }
        self.folder = meter.folder / json_sha256(key)[:16]
        self.stored = _Stored(meter.cache / f"{self.folder.name}.json")
        self._built: dict[str, _Built] = {}
        self._quantized: list[StudentVariant] | None = None

    def figures(self, parameters: int, processes: int, teacher: Figures | None) -> Figures:
        """Those of the selected variant, from more processes where they can decide on a limit.

        Raises:
            StageError: no variant may be shipped, or the runtime fails on the file.
            InputError: the runtime does not take the file.
            TargetError: the target cannot be reached.
        """
        limits, name = self.meter.limits, self._select()
        while True:
            figures = None
            count = len(self.stored.timed.get(name, ()))
            if count >= processes:
                figures = self._figures(name, parameters)
                if count >= MOST_PROCESSES or not limits.undecided(figures, teacher):
                    return figures
            self._time(name)

    def variants(self, parameters: int) -> dict[str, Figures]:
        """The figures of all variants that were timed, by name."""
        names = dict.fromkeys([*self.stored.timed, *self.stored.compared])
        return {name: self._figures(name, parameters) for name in names}

    def _figures(self, name: str, parameters: int) -> Figures:
        records = self.stored.timed.get(name) or [self.stored.compared[name]]
        stated = [p for p in _STATED if all(r["latency"].get(p) for r in records)]
        peaks = [r["memory_mb"] for r in records if r["memory_mb"] is not None]
        ratios = [r["speedup"] for r in records if r["speedup"]]
        return Figures(
            latency_ms={p: over_processes([r["latency"][p] for r in records]) for p in stated},
            memory_mb=_memory_range(max(peaks)) if peaks else None,
            size_mb=records[0]["size_bytes"] / 1e6,
            parameters=parameters,
            variant=name,
            processes=len(records),
            speedup=over_processes(ratios) if ratios and self.teacher is not None else None,
        )

    def _select(self) -> str:
        """The variant that the stage ``engines`` would select, were all within the drop."""
        others = self._others()
        if not others and not self.stored.refused:
            return FLOAT
        for name in (FLOAT, *others):
            if name not in self.stored.compared:
                against = None if name == FLOAT else self._engine(FLOAT)
                record = self._bench(self._engine(name), against, memory=False)
                self.stored.compared[name] = record
                self.stored.write()
        candidates = []
        for name in (FLOAT, *others):
            record = self.stored.compared[name]
            latency = {p: each and each[0] for p, each in record["latency"].items()}
            speedup, *interval = record["speedup"] or (None,)
            known = (interval[0], interval[1]) if interval else None
            candidates.append(
                Candidate(name, record["size_bytes"], 0.0, None, latency, speedup, known)
            )
        assert self.quantize is not None
        budgets = self.meter.context.job.budgets
        select, refused = self.quantize.select, self.stored.refused
        return choose(candidates, budgets, 0.0, refused=refused, select=select).chosen

    def _time(self, name: str) -> None:
        """Time a variant in one more fresh process."""
        teacher = None
        if self.teacher is not None:
            teacher = self._build("teacher", StudentVariant(FLOAT, self.teacher, {}))
        known = self.stored.timed.get(name, [])
        record = self._bench(self._engine(name), teacher, memory=not known)
        self.stored.timed[name] = [*known, record]
        self.stored.write()

    def _bench(self, built: _Built, against: _Built | None, memory: bool) -> dict[str, Any]:
        other = against.row if against is not None else {}
        levels = [row.get("run_level", "all") for row in (built.row, other) if row]
        record = self.meter.target.bench(
            built.file,
            against=None if against is None else against.file,
            inputs=self.meter.inputs,
            batch=self.meter.config.benchmark.batch_size,
            min_queries=self.meter.queries,
            max_seconds=SECONDS,
            memory=memory,
            # Processes are started one by one here, so that each is stored.
            processes=1,
            max_processes=1,
            provider_options=built.row.get("provider_options"),
            against_options=other.get("provider_options"),
            optimization=common_level(levels),
            **self.meter.builder.settings,
        )
        self.meter.started += 1
        timed, ratio = record["models"][0], record["comparison"]
        peak = timed["memory"]["above_empty_mb"] if timed["memory"] else None
        latency = {}
        for name in _STATED:
            each = timed["latency"][name]
            known = each["value"] is not None and each["interval"]
            latency[name] = [each["value"], *each["interval"]] if known else None
        return {
            "latency": latency,
            "memory_mb": peak,
            "size_bytes": built.file.stat().st_size,
            "speedup": [ratio["ratio"], *ratio["interval"]]
            if ratio and ratio["interval"]
            else None,
        }

    def _engine(self, name: str) -> _Built:
        if name == FLOAT:
            return self._build(FLOAT, StudentVariant(FLOAT, self.file, {}))
        return self._build(name, next(v for v in self._variants() if v.name == name))

    def _build(self, name: str, variant: StudentVariant) -> _Built:
        if name not in self._built:
            self.folder.mkdir(exist_ok=True)
            out = self.folder / f"{name}-built{self.meter.builder.suffix}"
            row = self.meter.builder.build(variant.file, out, variant.precision, variant.kept)
            self._built[name] = _Built(out, row)
        return self._built[name]

    def _others(self) -> list[str]:
        """The names of the variants besides float32; they are only made where none is stored."""
        if self.quantize is None:
            return []
        stored = [name for name in self.stored.compared if name != FLOAT]
        return stored or [variant.name for variant in self._variants()]

    def _variants(self) -> list[StudentVariant]:
        """The variants that the stage ``quantize`` would write, without its search for layers that
        cost accuracy."""
        if self._quantized is not None:
            return self._quantized
        self._quantized, config = [], self.quantize
        assert config is not None
        self.folder.mkdir(exist_ok=True)
        if config.int8 in ("static", "qat"):
            self._quantize(f"int8-{self.runtime}", "static", self.runtime)
        elif config.int8 == "dynamic" or config.int8 == "weights-only":
            self._quantize(f"int8-{config.int8}", config.int8, "cpu")
        if config.precision:
            runtime: Runtime = "tensorrt" if config.precision == "bf16" else self.runtime
            self._quantize(config.precision, config.precision, runtime)
        return self._quantized

    def _quantize(self, name: str, method: Method, runtime: Runtime) -> None:
        """Write the variants of one method; one that crashes the runtime is refused."""
        assert self.quantize is not None
        assert self._quantized is not None
        if runtime != self.runtime:
            self.stored.refused[name] = f"is for {runtime}"
            return
        settings = QuantizeSettings(
            method=method,
            runtime=runtime,
            calibrator=self.quantize.calibration,
            keep=self.quantize.exclude_nodes,
            reduce_range=reduce_range(self.meter.context.job),
        )
        scratch = self.folder / f"{name}-scratch"
        scratch.mkdir(exist_ok=True)
        spec, samples = self.meter.task_data.spec, self.meter.calibration
        opens = None if method == "bf16" else opener(scratch, spec, samples)
        out = self.folder / f"{name}.onnx"
        try:
            quantized = quantize_onnx(
                self.file, out, None, settings, calibration=samples, scratch=scratch, opens=opens
            )
            if opens is not None:
                raise_crash(opens, out)
        except CrashError as error:
            self.stored.refused[name] = error.what
            return
        self._quantized.append(
            StudentVariant(name, out, {"method": method, "kept": quantized.kept})
        )
        if quantized.quantizer is not None and (first := quantized.input_layers):
            name = f"{name}-float-input"
            quantized.quantizer.write(self.folder / f"{name}.onnx", first)
            entry = {"method": method, "kept": (*quantized.kept, *first)}
            self._quantized.append(StudentVariant(name, self.folder / f"{name}.onnx", entry))


def over_processes(records: Sequence[Sequence[float]]) -> Range:
    """Where a figure of one more process is expected, interval included.

    Of each process (value, low, high) are given, all above 0. The band are Student's prediction
    limits (95 %, in logarithms, as latencies are skewed) of the next process's low and high end,
    and never narrower than the median of those ends; one process has only its own interval.
    """
    value, low, high = (statistics.median(each) for each in zip(*records, strict=True))
    if len(records) > 1:
        t = t_quantile(0.95, len(records) - 1) * math.sqrt(1 + 1 / len(records))
        lows, highs = ([math.log(r[i]) for r in records] for i in (1, 2))
        low = min(low, math.exp(statistics.mean(lows) - t * statistics.stdev(lows)))
        high = max(high, math.exp(statistics.mean(highs) + t * statistics.stdev(highs)))
    return Range(value, low, high)


def _memory_range(peak: float) -> Range:
    return Range(peak, peak * (1 - MEMORY_NOISE), peak * (1 + MEMORY_NOISE))


def _prepared(model: DictModel, samples: Mapping[str, Array]) -> DictModel:
    """A copy for the export, as the stage ``export`` makes it of a trained network.

    Batch normalizations that were never trained get the statistics of real samples: with those
    they are made with, the activations of a deep network can vanish or overflow, and such numbers
    take other times.
    """
    import torch
    from torch import nn

    from edgekd.models.dict_model import fold_output_scale

    ready = copy.deepcopy(model)
    batch = {name: torch.from_numpy(array.copy()) for name, array in samples.items()}
    new = [m for m in ready.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
           and m.num_batches_tracked is not None and int(m.num_batches_tracked) == 0]  # fmt: skip
    ready.eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for layer in new:
            layer.train()
            layer.momentum = None
        ready(batch)
        ready.eval()
        fold_output_scale(ready, batch)
    return ready
