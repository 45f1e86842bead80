"""Which provider of ONNX Runtime really runs each node, and which nodes fell back."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from edgekd.errors import InputError
from edgekd.onnx.file import read_onnx
from edgekd.onnx.graph import subgraphs
from edgekd.onnx.session import (
    CPU_PROVIDER,
    RECORD_ASSIGNMENT,
    Fallback,
    Optimization,
    open_session,
    session_options,
    source_of,
)

SMALL = 100
"""Largest constant that ONNX Runtime counts as part of a shape computation."""

_SHOWN = 5


@dataclass(frozen=True)
class PlacedNode:
    """A node and who runs it.

    ``shape_arithmetic``: it computes with sizes of tensors, not with their values; see
    :func:`shape_arithmetic`. The name is empty for a node that has none in the file.
    """

    name: str
    op: str
    provider: str
    shape_arithmetic: bool = False

    def __str__(self) -> str:
        return f"{self.name or 'unnamed'} ({self.op})"


@dataclass(frozen=True)
class ProviderCoverage:
    """One provider of a chain: ``here`` is whether this ONNX Runtime has it and it started.

    ``nodes`` are those that it runs, None where that is not known; ``install`` is what to do
    when it is not here.
    """

    provider: str
    here: bool
    nodes: tuple[PlacedNode, ...] | None
    install: str = ""

    def to_json(self) -> dict[str, Any]:
        """A plain mapping for a JSON file."""
        return asdict(self)


def provider_coverage(
    path: Path,
    providers: Sequence[str],
    threads: int = 1,
    optimization: Optimization = "all",
    provider_options: Mapping[str, Mapping[str, str]] | None = None,
) -> tuple[ProviderCoverage, ...]:
    """Open a model on the available providers, and find which provider runs which node.

    Nodes are those of the graph after folding constants and before fusing; a subgraph that a
    provider compiles into one node is listed node by node. Nothing is run.

    Raises:
        InputError: ONNX Runtime refuses the model, or none of the providers is here.
    """
    available = onnxruntime.get_available_providers()
    here = [name for name in providers if name in available]
    if not here:
        raise InputError(
            f"this ONNX Runtime has none of {', '.join(providers)}",
            where="providers",
            remedy=source_of(providers[0]) if providers else "add CPUExecutionProvider",
        )
    options = session_options(threads, optimization)
    options.add_session_config_entry(RECORD_ASSIGNMENT, "1")
    session = open_session(
        path,
        here,
        threads,
        optimization,
        options,
        provider_options=provider_options,
        fallback="allow",
    )
    placed = assigned_nodes(session, path)
    started = session.get_providers()
    rows = []
    # ONNX Runtime adds the CPU to every chain.
    for name in dict.fromkeys([*providers, CPU_PROVIDER]):
        if name in started:
            runs = None if placed is None else tuple(n for n in placed if n.provider == name)
            rows.append(ProviderCoverage(name, True, runs))
        elif name in available:
            rows.append(ProviderCoverage(name, False, None, "its driver or libraries are missing"))
        else:
            rows.append(ProviderCoverage(name, False, None, source_of(name)))
    return tuple(rows)


def assigned_nodes(
    session: onnxruntime.InferenceSession, path: Path
) -> tuple[PlacedNode, ...] | None:
    """Every node with its provider, as the session partitioned the graph.

    The session must have been opened with ``RECORD_ASSIGNMENT``. None where this ONNX Runtime
    does not record it (before 1.24): then only a profile of a run shows it.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return None
    return _placed(
        (
            (node.name, node.op_type, part.ep_name)
            for part in session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        ),
        path,
    )


def nodes_in_trace(trace: Path, path: Path) -> tuple[PlacedNode, ...]:
    """The kernels that ran, each once, from ONNX Runtime's profile; subgraphs compiled are one."""
    ran = {
        event["name"]: (event["args"].get("op_name", ""), event["args"]["provider"])
        for event in json.loads(trace.read_text())
        if event.get("cat") == "Node" and event.get("args", {}).get("provider")
    }
    return _placed(
        (
            (name.removesuffix("_kernel_time"), operator, provider)
            for name, (operator, provider) in ran.items()
        ),
        path,
    )


def count_by_provider(nodes: Iterable[PlacedNode]) -> dict[str, int]:
    """How many nodes each provider has."""
    return dict(Counter(node.provider for node in nodes))


def fallen_back(nodes: Iterable[PlacedNode], preferred: str) -> tuple[PlacedNode, ...]:
    """The nodes that something else than the preferred provider runs, by no design.

    On the CPU, shape arithmetic is where ONNX Runtime places it: its results are sizes that the
    host needs, and copies to a device and back would cost more. With the CPU preferred, nothing
    can fall back.
    """
    if preferred == CPU_PROVIDER:
        return ()
    return tuple(
        node
        for node in nodes
        if node.provider != preferred
        and not (node.provider == CPU_PROVIDER and node.shape_arithmetic)
    )


def check_fallback(
    nodes: Sequence[PlacedNode], preferred: str, fallback: Fallback, path: Path
) -> None:
    """Make sure that the preferred provider runs the model, or that the user allowed otherwise.

    Raises:
        InputError: nodes fell back, or the preferred provider ran none, without ``allow``: what
            is measured would be another device than the one named.
    """
    if fallback == "allow" or preferred == CPU_PROVIDER:
        return
    allow = "or allow it: engines: [{kind: onnxruntime, fallback: allow}]"
    if not any(node.provider == preferred for node in nodes):
        ran = ", ".join(f"{name} ({count})" for name, count in count_by_provider(nodes).items())
        raise InputError(
            f"{preferred} ran no node of the model; {ran or 'nothing'} did",
            where=str(path),
            remedy=f"it supports none of these operations: choose another provider, {allow}",
        )
    if fell := fallen_back(nodes, preferred):
        counts = ", ".join(f"{name} {count}" for name, count in count_by_provider(fell).items())
        raise InputError(
            f"{preferred} does not run {len(fell)} of {len(nodes)} nodes ({counts}): "
            f"{listed(fell)}",
            where=str(path),
            remedy=f"replace these operations in the model, choose another provider, {allow}",
        )


def listed(nodes: Sequence[Any], limit: int = _SHOWN) -> str:
    """The first few names of a list, and the number of the others."""
    more = f" and {len(nodes) - limit} more" if len(nodes) > limit else ""
    return ", ".join(map(str, nodes[:limit])) + more


def shape_arithmetic(model: onnx.ModelProto) -> frozenset[tuple[str, str]]:
    """(name, operation) of the nodes that compute with sizes only.

    Shape and Size, and nodes that read only their results and constants of up to 100 elements:
    nodes that ONNX Runtime leaves on the CPU even with a GPU (its GetCpuPreferredNodes). That also
    counts inputs of the graph among these constants; here they do not count, they are data.
    A name that several nodes share is in the set only if all of them qualify.
    """
    seen = list(_sizes_only(model.graph, set(), set()))
    others = {key for key, belongs in seen if not belongs}
    return frozenset(key for key, belongs in seen if belongs and key not in others)


def _sizes_only(
    graph: onnx.GraphProto, known: set[str], constants: set[str]
) -> Iterable[tuple[tuple[str, str], bool]]:
    known = set(known)
    constants = constants | {t.name for t in graph.initializer if math.prod(t.dims) <= SMALL}
    for node in graph.node:
        if node.op_type == "Constant":
            values = [a.t for a in node.attribute if a.HasField("t")]
            if all(math.prod(value.dims) <= SMALL for value in values):
                constants.update(node.output)
            continue
        reads = [name for name in node.input if name and name not in constants]
        belongs = node.op_type in ("Shape", "Size") or (
            bool(reads) and not subgraphs(node) and all(name in known for name in reads)
        )
        if belongs:
            known.update(node.output)
        yield (node.name, node.op_type), belongs
        for inner in subgraphs(node):
            yield from _sizes_only(inner, known, constants)


def _placed(rows: Iterable[tuple[str, str, str]], path: Path) -> tuple[PlacedNode, ...]:
    sizes_only = shape_arithmetic(read_onnx(path))
    return tuple(
        PlacedNode(name, op, provider, (name, op) in sizes_only) for name, op, provider in rows
    )
