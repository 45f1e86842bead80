"""Check whether a model will run on a device: each runtime's verdict, and the memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from edgekd.config.budgets import Budgets
from edgekd.config.profile import Profile
from edgekd.engines.provider_assignment import (
    ProviderCoverage,
    count_by_provider,
    fallen_back,
    listed,
    provider_coverage,
)
from edgekd.engines.tensorrt import OTHERWISE, Diagnostic, Parse, Status, tensorrt_verdict
from edgekd.errors import InputError, StageError, unknown_name
from edgekd.onnx.file import OnnxInfo, describe_onnx, files_of_onnx, read_onnx
from edgekd.onnx.graph import node_label, precisions_of
from edgekd.onnx.memory_estimate import MemoryEstimate, estimate_memory
from edgekd.onnx.optimizer_faults import find_fault_on_random_inputs
from edgekd.onnx.session import CPU_PROVIDER

_COMPARED_BYTES = 256 << 20
"""Models up to this memory are run, to compare outputs with and without optimization."""
_NO_KERNEL = re.compile(r"implementation for (\w+)\(\d+\)|(\w+)\(-?\d+\) is not a registered")


@dataclass(frozen=True)
class CheckReport:
    """Everything that was found about a model."""

    model: str
    engines: tuple[str, ...]
    profile: str | None
    findings: tuple[Diagnostic, ...]
    onnx: OnnxInfo
    coverage: tuple[ProviderCoverage, ...]
    tensorrt: dict[str, Any] | None
    memory: MemoryEstimate

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(finding.status in ("ok", "note") for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The record ``edgekd.check/2``."""
        return {
            "schema": "edgekd.check/2",
            "model": self.model,
            "engines": list(self.engines),
            "profile": self.profile,
            "passed": self.passed,
            "findings": [asdict(finding) for finding in self.findings],
            "onnx": self.onnx.to_json(),
            "coverage": [row.to_json() for row in self.coverage],
            "tensorrt": self.tensorrt,
            "memory": self.memory.to_json(),
        }


def check_model(
    path: Path,
    parse: Parse,
    opens: Callable[[Path], object] | None = None,
    *,
    engines: Sequence[str] = (),
    profile: Profile | None = None,
    providers: Sequence[str] = (),
    shapes: Mapping[str, Sequence[int]] | None = None,
    batch: int | None = None,
) -> CheckReport:
    """Check a model with every requested runtime.

    Args:
        path: the ONNX file.
        parse: TensorRT's parser; called only for a library that is installed. Where it fails,
            that is only noted: TensorRT is not needed where it was not requested.
        opens: opens the model in another process, as
            :meth:`edgekd.targets.LocalTarget.probe` does; where that raises an error, ONNX Runtime
            is not run here, as it would end this process.
        engines: the engines that must run it: tensorrt, tensorrt-rtx, onnxruntime; empty: the
        profile's,
            else ONNX Runtime.
        profile: the device: its engine, providers, TensorRT version and budgets.
        providers: of ONNX Runtime, the preferred first; none is the profile's, else the CPU.
            Naming some also checks ONNX Runtime.
        shapes: sizes of inputs by name, for the memory.
        batch: for the memory; None is 1.

    Raises:
        InputError: the file is missing, broken, or lacks its external data; an unknown provider
            is named; a shape does not fit.
    """
    model = read_onnx(path)
    info = describe_onnx(path)
    requested: set[str] = set(engines) or {profile.runtime.engine if profile else "onnxruntime"}
    if providers:
        requested.add("onnxruntime")
    chain = tuple(providers) or (profile.runtime.providers if profile else ()) or (CPU_PROVIDER,)
    _known_providers(chain)
    budgets = Budgets.resolve(profile=profile)
    findings = [*_format(model, info), *_dynamic(info, profile), *_size(info, path, budgets)]
    coverage, found = _onnxruntime(path, model, chain, "onnxruntime" in requested, opens)
    findings += found
    verdict, found = tensorrt_verdict(path, model, parse, requested, profile)
    findings += found
    memory = estimate_memory(path, shapes, batch)
    if CPU_PROVIDER in chain and coverage:
        findings += _optimized(path, memory, "onnxruntime" in requested)
    findings.append(_memory(memory, info, budgets))
    return CheckReport(
        model=str(path),
        engines=tuple(sorted(requested)),
        profile=profile.name if profile else None,
        findings=tuple(findings),
        onnx=info,
        coverage=coverage,
        tensorrt=verdict,
        memory=memory,
    )


def _known_providers(chain: Sequence[str]) -> None:
    known = {*onnxruntime.get_all_providers(), *onnxruntime.get_available_providers()}
    for name in chain:
        if name not in known:
            raise unknown_name("execution provider", name, known, "--providers")


def _format(model: onnx.ModelProto, info: OnnxInfo) -> list[Diagnostic]:
    domains = [o for o in model.opset_import if o.domain not in ("", "ai.onnx")]
    also = f"; also {', '.join(f'{o.domain} {o.version}' for o in domains)}" if domains else ""
    detail = f"opset {info.opset}, IR version {model.ir_version}{also}"
    return [Diagnostic("format", "note", detail)]


def _dynamic(info: OnnxInfo, profile: Profile | None) -> list[Diagnostic]:
    open_inputs = [t for t in info.spec.inputs if any(isinstance(d, str) for d in t.shape)]
    if not open_inputs:
        return [Diagnostic("dynamic dimensions", "note", "none, every size is fixed")]
    found = [Diagnostic("dynamic dimensions", "note", "; ".join(map(str, open_inputs)))]
    if profile and profile.runtime.engine == "tensorrt" and profile.compute.dla_int8_dense_tops:
        detail = "it takes fixed sizes only, and no operation whose shape depends on values"
        remedy = "for the DLA, build with one size (shapes: …); gpu_fallback runs the rest"
        found.append(Diagnostic("DLA", "note", detail, remedy))
    return found


def _size(info: OnnxInfo, path: Path, budgets: Budgets) -> list[Diagnostic]:
    data = files_of_onnx(path)[1:]
    detail = f"{info.parameters:,} parameters, {info.size_bytes / 1e6:.3f} MB"
    if data:
        detail += f", of it external: {', '.join(file.name for file in data)}"
    budget = budgets["size.max_mb"]
    if budget is None:
        return [Diagnostic("size", "note", detail)]
    fits = info.size_bytes <= budget * 1e6
    return [
        Diagnostic(
            "size",
            "ok" if fits else "fails",
            f"{detail}; budget {budget:g} MB",
            "" if fits else "prune or quantize the model ('edgekd quantize')",
        )
    ]


def _onnxruntime(
    path: Path,
    model: onnx.ModelProto,
    chain: Sequence[str],
    requested: bool,
    opens: Callable[[Path], object] | None,
) -> tuple[tuple[ProviderCoverage, ...], list[Diagnostic]]:
    subject = f"ONNX Runtime {onnxruntime.__version__}"
    bad: Status = "fails" if requested else "note"
    here = [name for name in chain if name in onnxruntime.get_available_providers()]
    try:
        if opens is not None:
            opens(path)
    except StageError as error:
        return (), [Diagnostic(subject, bad, error.what, error.remedy or "")]
    except InputError:
        pass  # Told below, in the words that name its nodes.
    try:
        rows = provider_coverage(path, chain if here else [*chain, CPU_PROVIDER])
    except InputError as error:
        ops = {op for match in _NO_KERNEL.finditer(error.what) for op in match.groups() if op}
        nodes = tuple(node_label(node) for node in model.graph.node if node.op_type in ops)
        remedy = OTHERWISE.partition(", or")[0] if nodes else error.remedy or ""
        return (), [Diagnostic(subject, bad, error.what, remedy, nodes)]
    shown = [row for row in rows if row.provider in chain or row.nodes]
    return rows, [_provider(row, rows, chain[0], requested) for row in shown]


def _optimized(path: Path, memory: MemoryEstimate, requested: bool) -> list[Diagnostic]:
    """Whether ONNX Runtime's optimization preserves the outputs."""
    subject = "optimized outputs"
    if memory.total_bytes > _COMPARED_BYTES:
        return [
            Diagnostic(subject, "note", "not compared, the model is large: 'edgekd build' does")
        ]
    if any(precisions_of(path).values()):
        detail = "not compared: a model in fewer bits is rounded in other places when optimized"
        return [Diagnostic(subject, "note", detail)]
    try:
        fault = find_fault_on_random_inputs(path)
    except (InputError, StageError) as error:
        return [Diagnostic(subject, "note", f"not compared: {error.what}")]
    if fault is None:
        same = "those of the model as written, on random inputs"
        return [Diagnostic(subject, "ok" if requested else "note", same)]
    remedy = f"{fault.remedy}; 'edgekd build' writes a file that is right"
    return [Diagnostic(subject, "fails" if requested else "note", str(fault), remedy)]


def _provider(
    row: ProviderCoverage, rows: Sequence[ProviderCoverage], preferred: str, requested: bool
) -> Diagnostic:
    name = row.provider.removesuffix("ExecutionProvider")
    if not row.here:
        needed = requested and row.provider == preferred
        detail = f"not in this ONNX Runtime: {row.install}"
        return Diagnostic(name, "inconclusive" if needed else "note", detail, row.install * needed)
    if row.nodes is None:
        return Diagnostic(
            name, "note", "takes the model; this ONNX Runtime does not report which nodes"
        )
    placed = [node for other in rows for node in other.nodes or ()]
    runs = f"runs {len(row.nodes)} of {len(placed)} nodes"
    if row.provider != preferred:
        return Diagnostic(name, "note", runs, nodes=tuple(map(str, row.nodes)))
    fell = fallen_back(placed, preferred)
    if not fell:
        return Diagnostic(name, "ok" if requested else "note", runs)
    counts = ", ".join(f"{other} {count}" for other, count in count_by_provider(fell).items())
    return Diagnostic(
        name,
        "fails" if requested else "note",
        f"{runs}; not {listed(fell)} ({counts})",
        "replace these operations, choose another provider, or allow it: fallback: allow",
        tuple(map(str, fell)),
    )


def _memory(memory: MemoryEstimate, info: OnnxInfo, budgets: Budgets) -> Diagnostic:
    mb = memory.total_bytes / 1e6
    sizes = ", ".join(f"{name} = {size}" for name, size in memory.dimensions.items())
    at = f" at {sizes}" if sizes else ""
    least = "at least " if memory.unknown else ""
    detail = (
        f"{least}{mb:.3f} MB{at}: weights {memory.weights_bytes / 1e6:.3f}, "
        f"activations {memory.activations_bytes / 1e6:.3f} at {memory.at_node}"
    )
    remedy = ""
    if memory.unknown:
        counted = f"{len(memory.unknown)} tensor{'s' if len(memory.unknown) > 1 else ''}"
        detail += f"; {counted} of unknown size: {listed(memory.unknown)}"
        declared = {d for tensor in info.spec.inputs for d in tensor.shape if isinstance(d, str)}
        if declared - set(memory.dimensions):
            remedy = "give open sizes: --shape NAME=1x3x224x224"
    budget = budgets["memory.peak_mb"]
    if budget is None:
        return Diagnostic("memory", "note", detail, remedy)
    detail += f"; budget {budget:g} MB"
    if mb > budget:
        return Diagnostic("memory", "fails", detail, "a smaller batch or input, or a smaller model")
    return Diagnostic("memory", "inconclusive" if memory.unknown else "ok", detail, remedy)
