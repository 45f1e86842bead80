"""The ONNX Runtime engine: a model optimized offline, saved, and checked to answer the same."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgekd.engines.coverage import (
    PlacedNode,
    assigned_nodes,
    check_fallback,
    count_by_provider,
    fallen_back,
    nodes_in_trace,
)
from edgekd.engines.made_up_inputs import answers_of, answers_to_made_up
from edgekd.engines.onnx_file import check_onnx, describe_onnx
from edgekd.engines.onnx_graph import precisions_of
from edgekd.engines.replacing import replacing
from edgekd.engines.samples import Array
from edgekd.engines.session import (
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
from edgekd.errors import StageError

__all__ = [
    "EngineInfo",
    "build_engine",
    "open_session",
    "provider_chain",
    "providers_for",
]

_WITH_KERNELS = ("CPUExecutionProvider", "CUDAExecutionProvider", "DmlExecutionProvider")
"""Providers whose part of a graph can be saved; the others compile theirs into something."""


@dataclass(frozen=True)
class EngineInfo:
    """How a model was prepared for ONNX Runtime and is to be run.

    ``providers_session`` are those the session took; ``providers_left_out`` those wanted that are
    not here or did not start. ``nodes`` is how many kernels of the optimized graph each really
    ran, ``placement`` the names of its nodes by provider (a subgraph compiled into one kernel
    lists its nodes), ``fell_back`` those of them that the preferred provider should have run and
    ``shape_arithmetic`` those that belong on the CPU; see :mod:`edgekd.engines.coverage`.
    ``saved_level`` is the optimization inside the file, ``run_level`` the one to open it with.
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
    """Optimize a model offline, save it, load it again and compare its answers.

    ``out_path`` is written last: where something fails, it stays as it was before.

    The file is optimized to ``extended`` at most: what ``all`` adds (blocked memory layouts)
    depends on the processor it was made on. It is meant to be run at ``optimization``, which
    adds the rest where it runs. For a provider that compiles its part of the graph (TensorRT,
    OpenVINO) it is optimized to ``basic``: the fused operations of ``extended`` are not ONNX's.

    Args:
        onnx_path: the exported model.
        out_path: the optimized file; not the same as ``onnx_path``.
        providers: from :func:`providers_for`.
        threads: intra-op threads.
        optimization: the level to run at.
        samples: inputs to compare on, (N, …) by name; made up where None: see
            :func:`made_up_inputs`; a size that the model can run is searched.
        tolerance: |optimized − exported| may be ``tolerance · max(1, max|exported|)``. The
            default allows what fusing float32 convolutions and normalizations changes.
        fallback: whether nodes may run on another provider than the first of ``providers``, and
            a provider may fail to start.
        left_out: providers wanted that are not here, for the record; see
            :func:`edgekd.engines.session.provider_chain`.
        cache: the folder where providers that compile keep what they made.

    Raises:
        InputError: the file is not a valid model, a provider does not start, or nodes fell back
            to another one than the preferred.
        StageError: the optimized file cannot be written, read back, or answers differently.
    """
    check_onnx(onnx_path)
    saved: Optimization = "extended" if optimization == "all" else optimization
    saving = tuple(providers)
    if not set(providers) <= set(_WITH_KERNELS):
        saved, saving = "disabled" if saved == "disabled" else "basic", (CPU_PROVIDER,)
    chosen = default_options(providers, threads, **precisions_of(onnx_path), cache=cache)
    with replacing(out_path) as partial:
        _save_optimized(onnx_path, partial, saving, threads, saved, fallback)
        exported = open_session(
            onnx_path, providers, threads, "disabled", provider_options=chosen, fallback=fallback
        )
        if samples is None:
            spec = describe_onnx(onnx_path).spec
            inputs, reference = answers_to_made_up(exported, spec, onnx_path)
        else:
            inputs, reference = dict(samples), answers_of(exported, samples, onnx_path)
        with tempfile.TemporaryDirectory() as folder:
            options = session_options(threads, optimization)
            options.add_session_config_entry(RECORD_ASSIGNMENT, "1")
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "trace")
            session = open_session(
                partial,
                providers,
                threads,
                optimization,
                options,
                provider_options=chosen,
                fallback=fallback,
            )
            answers = answers_of(session, inputs, partial)
            ran = nodes_in_trace(Path(session.end_profiling()), partial)
        placed = assigned_nodes(session, partial)
        # The profile knows the nodes as well, but a compiled subgraph only as one.
        placed = ran if placed is None else placed
        check_fallback(placed, providers[0], fallback, onnx_path)
        difference = _largest_difference(reference, answers, tolerance, partial)
    started = tuple(session.get_providers())
    return EngineInfo(
        file=out_path.name,
        size_bytes=out_path.stat().st_size,
        providers_requested=tuple(providers),
        providers_session=started,
        providers_left_out=(*left_out, *(name for name in providers if name not in started)),
        provider_options=chosen,
        fallback=fallback,
        nodes=count_by_provider(ran),
        placement=_names_by_provider(placed),
        fell_back=tuple(map(str, fallen_back(placed, providers[0]))),
        shape_arithmetic=tuple(str(node) for node in placed if node.shape_arithmetic),
        threads=threads,
        saved_level=saved,
        run_level=optimization,
        max_difference=difference,
        session_options=options_record(threads, optimization),
        versions={"onnxruntime": onnxruntime.__version__},
    )


def _save_optimized(
    onnx_path: Path,
    out_path: Path,
    providers: Sequence[str],
    threads: int,
    level: Optimization,
    fallback: Fallback,
) -> None:
    if level == "disabled":
        try:
            shutil.copyfile(onnx_path, out_path)
        except OSError as error:
            raise StageError(
                f"the model cannot be written: {error.strerror}",
                where=str(out_path),
                remedy="free space or choose another folder",
            ) from error
        return
    options = session_options(threads, level)
    options.optimized_model_filepath = str(out_path)
    open_session(onnx_path, providers, threads, level, options, fallback=fallback)
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


def _largest_difference(
    reference: Mapping[str, Array], answers: Mapping[str, Array], tolerance: float, path: Path
) -> float:
    largest = 0.0
    for name, expected in reference.items():
        answer = answers.get(name)
        if answer is None or answer.shape != expected.shape:
            raise StageError(
                f"the optimized model lost or reshaped output {name!r}",
                where=str(path),
                remedy="set engines: [{kind: onnxruntime, optimization: basic}]",
            )
        if expected.dtype.kind not in "fiub":
            if not np.array_equal(expected, answer):
                raise _differs(name, path, "another value")
            continue
        p, o = expected.astype(np.float64), answer.astype(np.float64)
        with np.errstate(invalid="ignore"):
            same = (p == o) | (np.isnan(p) & np.isnan(o))
            difference = float(np.where(same, 0.0, np.abs(o - p)).max(initial=0.0))
        finite = np.abs(p[np.isfinite(p)])
        if not difference <= tolerance * max(1.0, float(finite.max(initial=0.0))):
            raise _differs(name, path, f"a difference of {difference:.3g}")
        largest = max(largest, difference)
    return largest


def _differs(name: str, path: Path, how: str) -> StageError:
    return StageError(
        f"the optimized model answers differently: output {name!r} has {how}",
        where=str(path),
        remedy="set engines: [{kind: onnxruntime, optimization: basic}] or disabled",
    )
