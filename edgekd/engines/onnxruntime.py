"""The ONNX Runtime engine: a model optimized offline, saved, and checked for equal outputs."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgekd.engines.provider_assignment import (
    PlacedNode,
    assigned_nodes,
    check_fallback,
    count_by_provider,
    fallen_back,
    nodes_in_trace,
)
from edgekd.errors import StageError
from edgekd.files import atomic_write, write_errors
from edgekd.onnx.file import check_onnx, describe_onnx
from edgekd.onnx.graph import precisions_of
from edgekd.onnx.inference import outputs_of, outputs_of_random_inputs
from edgekd.onnx.optimizer_faults import guarded, optimizers_to_disable
from edgekd.onnx.samples import Array
from edgekd.onnx.session import (
    CPU_PROVIDER,
    RECORD_ASSIGNMENT,
    Fallback,
    Optimization,
    default_options,
    open_session,
    options_record,
    provider_chain,
    providers_for,
    session_options,
)

__all__ = [
    "EngineInfo",
    "build_engine",
    "open_session",
    "provider_chain",
    "providers_for",
]

_WITH_KERNELS = ("CPUExecutionProvider", "CUDAExecutionProvider", "DmlExecutionProvider")
"""Providers whose part of a graph can be saved; others compile theirs to their own format."""


@dataclass(frozen=True)
class EngineInfo:
    """How a model was prepared for ONNX Runtime and is to be run.

    ``providers_session`` are those of the session; ``providers_left_out`` requested ones that are
    not here or did not start. ``nodes`` is how many kernels of the optimized graph each really
    ran, ``placement`` the names of its nodes by provider (a subgraph compiled into one kernel
    lists its nodes), ``fell_back`` those of them that the preferred provider should have run and
    ``shape_arithmetic`` those that belong on the CPU; see
    :mod:`edgekd.engines.provider_assignment`.
    ``saved_level`` is the optimization inside the file, ``run_level`` the one to open it with;
    ``disabled_optimizers`` are those of ONNX Runtime that would have changed the outputs and were
    left out. Where the runtime would apply them when it opens the file, ``run_level`` is
    ``disabled``: the other optimizations are in the file already.
    ``max_difference`` is the largest |optimized − exported| seen.
    """

    file: str
    size_bytes: int
    providers_requested: tuple[str, ...]
    providers_session: tuple[str, ...]
    providers_left_out: tuple[str, ...]
    provider_options: dict[str, dict[str, str]]
    fallback: Fallback
    nodes: dict[str, int]
    placement: dict[str, tuple[str, ...]]
    fell_back: tuple[str, ...]
    shape_arithmetic: tuple[str, ...]
    threads: int
    saved_level: str
    run_level: str
    disabled_optimizers: tuple[str, ...]
    max_difference: float
    session_options: dict[str, Any]
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """A plain mapping for a JSON file."""
        return asdict(self)


def build_engine(
    onnx_path: Path,
    out_path: Path,
    providers: Sequence[str],
    threads: int = 1,
    optimization: Optimization = "all",
    samples: Mapping[str, Array] | None = None,
    tolerance: float = 1e-3,
    *,
    fallback: Fallback = "error",
    left_out: Sequence[str] = (),
    cache: Path | None = None,
) -> EngineInfo:
    """Optimize a model offline, save it, load it again and compare its outputs.

    ``out_path`` is written last: on failure, an existing file is unchanged.

    The file is optimized to ``extended`` at most: what ``all`` adds (blocked memory layouts)
    depends on the processor it was made on. It is to be run at ``optimization``, which
    adds the rest where it runs. For a provider that compiles its part of the graph (TensorRT,
    OpenVINO) it is optimized to ``basic``: the fused operations of ``extended`` are not ONNX's.

    Args:
        onnx_path: the exported model.
        out_path: the optimized file; not the same as ``onnx_path``.
        providers: from :func:`providers_for`.
        threads: intra-op threads.
        optimization: the level to run at.
        samples: inputs to compare on, (N, …) by name; random where None: see
            :func:`made_up_inputs`; a size that the model can run is searched.
        tolerance: |optimized − exported| may be ``tolerance · max(1, max|exported|)``. The
            default allows what fusing float32 convolutions and normalizations changes.
        fallback: whether nodes may run on another provider than the first of ``providers``, and
            a provider may fail to start.
        left_out: requested providers that are not available, for the record; see
            :func:`edgekd.onnx.session.provider_chain`.
        cache: the cache folder of providers that compile.

    Raises:
        InputError: the file is not a valid model, a provider does not start, or nodes fell back
            to another one than the preferred.
        StageError: the optimized file cannot be written, read back, or its outputs differ
            whichever optimizers are disabled.
    """
    check_onnx(onnx_path)
    saved: Optimization = "extended" if optimization == "all" else optimization
    saving = tuple(providers)
    if not set(providers) <= set(_WITH_KERNELS):
        saved, saving = "disabled" if saved == "disabled" else "basic", (CPU_PROVIDER,)
    chosen = default_options(providers, threads, **precisions_of(onnx_path), cache=cache)
    exported = open_session(
        onnx_path, providers, threads, "disabled", provider_options=chosen, fallback=fallback
    )
    if samples is None:
        spec = describe_onnx(onnx_path).spec
        inputs, reference = outputs_of_random_inputs(exported, spec, onnx_path)
    else:
        inputs, reference = dict(samples), outputs_of(exported, samples, onnx_path)
    del exported
    disabled: tuple[str, ...] = ()
    run_level = optimization
    with atomic_write(out_path) as partial, guarded(onnx_path) as source:

        def save(without: Sequence[str]) -> None:
            _save_optimized(source, partial, saving, threads, saved, fallback, without)

        def run(level: Optimization) -> _Ran:
            return _run(partial, providers, threads, level, chosen, fallback, inputs)

        def right(level: Optimization, without: Sequence[str]) -> bool:
            save(without)
            return _difference(reference, run(level).outputs, tolerance)[1] is None

        save(())
        ran = run(run_level)
        difference, fault = _difference(reference, ran.outputs, tolerance)
        if fault is not None:
            # Opened as on the device: optimizers that would run again on opening are disabled.
            disabled = optimizers_to_disable(lambda without: right("disabled", without))
            if not disabled:
                raise _differs(fault, partial)
            run_level = optimization if right(optimization, disabled) else "disabled"
            ran = run(run_level)
            difference, fault = _difference(reference, ran.outputs, tolerance)
            if fault is not None:
                raise _differs(fault, partial)
        check_fallback(ran.placed, providers[0], fallback, onnx_path)
    return EngineInfo(
        file=out_path.name,
        size_bytes=out_path.stat().st_size,
        providers_requested=tuple(providers),
        providers_session=ran.started,
        providers_left_out=(*left_out, *(name for name in providers if name not in ran.started)),
        provider_options=chosen,
        fallback=fallback,
        nodes=count_by_provider(ran.nodes),
        placement=_names_by_provider(ran.placed),
        fell_back=tuple(map(str, fallen_back(ran.placed, providers[0]))),
        shape_arithmetic=tuple(str(node) for node in ran.placed if node.shape_arithmetic),
        threads=threads,
        saved_level=saved,
        run_level=run_level,
        disabled_optimizers=disabled,
        max_difference=difference,
        session_options=options_record(threads, run_level),
        versions={"onnxruntime": onnxruntime.__version__},
    )


@dataclass(frozen=True)
class _Ran:
    """One run of a built file: its outputs, and the provider of each node."""

    outputs: dict[str, Array]
    nodes: list[PlacedNode]
    placed: list[PlacedNode]
    started: tuple[str, ...]


def _run(
    path: Path,
    providers: Sequence[str],
    threads: int,
    level: Optimization,
    provider_options: Mapping[str, Mapping[str, str]],
    fallback: Fallback,
    inputs: Mapping[str, Array],
) -> _Ran:
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(threads, level)
        options.add_session_config_entry(RECORD_ASSIGNMENT, "1")
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "trace")
        session = open_session(
            path,
            providers,
            threads,
            level,
            options,
            provider_options=provider_options,
            fallback=fallback,
        )
        outputs = outputs_of(session, inputs, path)
        nodes = nodes_in_trace(Path(session.end_profiling()), path)
    placed = assigned_nodes(session, path)
    # The profile knows the nodes as well, but a compiled subgraph only as one.
    return _Ran(
        outputs,
        list(nodes),
        list(nodes if placed is None else placed),
        tuple(session.get_providers()),
    )


def _save_optimized(
    onnx_path: Path,
    out_path: Path,
    providers: Sequence[str],
    threads: int,
    level: Optimization,
    fallback: Fallback,
    without: Sequence[str],
) -> None:
    if level == "disabled":
        with write_errors(out_path, "the model"):
            shutil.copyfile(onnx_path, out_path)
        return
    options = session_options(threads, level)
    options.optimized_model_filepath = str(out_path)
    open_session(
        onnx_path,
        providers,
        threads,
        level,
        options,
        fallback=fallback,
        disabled_optimizers=without,
    )
    if out_path.stat().st_size == 0:
        raise StageError(
            "ONNX Runtime wrote no optimized model",
            where=str(out_path),
            remedy="free space, or set engines: [{kind: onnxruntime, optimization: disabled}]",
        )


def _names_by_provider(nodes: Sequence[PlacedNode]) -> dict[str, tuple[str, ...]]:
    names: dict[str, list[str]] = {}
    for node in nodes:
        names.setdefault(node.provider, []).append(str(node))
    return {provider: tuple(found) for provider, found in names.items()}


def _difference(
    reference: Mapping[str, Array], outputs: Mapping[str, Array], tolerance: float
) -> tuple[float, str | None]:
    """The largest difference of all outputs, and what is wrong where it is too large."""
    largest = 0.0
    for name, expected in reference.items():
        output = outputs.get(name)
        if output is None or output.shape != expected.shape:
            return math.inf, f"output {name!r} is lost or has another shape"
        if expected.dtype.kind not in "fiub":
            if not np.array_equal(expected, output):
                return math.inf, f"output {name!r} has another value"
            continue
        p, o = expected.astype(np.float64), output.astype(np.float64)
        with np.errstate(invalid="ignore"):
            same = (p == o) | (np.isnan(p) & np.isnan(o))
            difference = float(np.where(same, 0.0, np.abs(o - p)).max(initial=0.0))
        finite = np.abs(p[np.isfinite(p)])
        if not difference <= tolerance * max(1.0, float(finite.max(initial=0.0))):
            return math.inf, f"output {name!r} has a difference of {difference:.3g}"
        largest = max(largest, difference)
    return largest, None


def _differs(how: str, path: Path) -> StageError:
    return StageError(
        f"the optimized model's outputs differ, whichever optimizers are disabled: {how}",
        where=str(path),
        remedy="set engines: [{kind: onnxruntime, optimization: disabled}]",
    )
