"""Check the exported graph against PyTorch: a hard gate, at several batch sizes.

The graph is run as it was exported, on the CPU and without optimizations, so that a difference
is the exporter's and not a runtime's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.config.pipeline import ExportConfig
from edgekd.errors import InputError, StageError
from edgekd.onnx.inference import joined
from edgekd.onnx.samples import Array, ArraySamples
from edgekd.onnx.session import CPU_PROVIDER, first_line, open_session

if TYPE_CHECKING:
    from edgekd.onnx.export import SpecModule

BATCH_SIZES = (1, 2, 7)
RELATIVE_FLOOR = 1e-3
"""Lower bound of a reference value, as a share of the output's largest value, when a difference
is divided by it; without it, values near zero would dominate the figure."""


@dataclass(frozen=True)
class WorstSample:
    """Where the difference is furthest beyond (or nearest to) the tolerance."""

    index: int
    element: tuple[int, ...]
    pytorch: float
    onnxruntime: float


@dataclass(frozen=True)
class ParityRow:
    """One output at one batch size, over ``samples`` samples.

    ``max_absolute`` = max |o − p|, ``max_relative`` = max |o − p| / max(|p|, 10⁻³·max|p|) with o
    ONNX Runtime's and p PyTorch's values; None when a value is not finite on one side only.
    ``argmax_agreement`` is the share of samples with the same largest class, None for an output
    that is not the classification's. ``beyond`` counts samples with any |o − p| > atol + rtol·|p|
    (any difference at all for integers).
    """

    batch_size: int
    output: str
    samples: int
    max_absolute: float | None
    max_relative: float | None
    argmax_agreement: float | None
    beyond: int
    worst: WorstSample
    passed: bool


@dataclass(frozen=True)
class ParityReport:
    """All rows of one exported file and the tolerances they were checked against."""

    file: str
    absolute_tolerance: float
    relative_tolerance: float
    argmax_agreement: float
    rows: tuple[ParityRow, ...]

    @property
    def passed(self) -> bool:
        """Whether every output agreed at every batch size."""
        return all(row.passed for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """A plain mapping for a JSON file."""
        return {**asdict(self), "passed": self.passed}

    def summary(self) -> str:
        """One line for a person."""
        sizes = ", ".join(str(size) for size in dict.fromkeys(row.batch_size for row in self.rows))
        differences = [row.max_absolute for row in self.rows]
        largest = max((d for d in differences if d is not None), default=0.0)
        shown = "not finite" if None in differences else f"{largest:.1e}"
        text = f"parity {'holds' if self.passed else 'FAILS'} at batch {sizes}: max |Δ| {shown}"
        agreement = [r.argmax_agreement for r in self.rows if r.argmax_agreement is not None]
        return text + (f", same class {min(agreement):.2%}" if agreement else "")


def parity(
    model: SpecModule,
    onnx_path: Path,
    samples: Mapping[str, Array],
    output: str,
    config: ExportConfig,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    *,
    classification: bool = True,
) -> ParityReport:
    """Compare ONNX Runtime with PyTorch in eval mode over real samples.

    Args:
        model: the module that was exported.
        onnx_path: the exported file.
        samples: the model's preprocessed inputs by name, (N, …) each; N at least the largest
            batch size. Batch size 1 sees all N, a larger one all complete batches.
        output: the task's primary output.
        config: the tolerances.
        batch_sizes: both sides are run in batches of each of these sizes.
        classification: also compare the argmax of ``output`` where it is (N, classes ≥ 2).

    Raises:
        InputError: there are fewer samples than the largest batch.
        StageError: ONNX Runtime cannot run the graph at a batch size, or returns another shape;
            or PyTorch's own outputs are NaN.
    """
    missing = [tensor.name for tensor in model.spec.inputs if tensor.name not in samples]
    if missing:
        raise InputError(
            f"the samples lack the model's input {missing[0]!r}",
            where=f"parity of {onnx_path.name}",
            remedy=f"they have: {', '.join(samples)}",
        )
    count = min(len(samples[tensor.name]) for tensor in model.spec.inputs)
    if count < max(batch_sizes):
        raise InputError(
            f"parity needs at least {max(batch_sizes)} samples; there are {count}",
            where="export: {samples: …}",
            remedy="give more validation samples",
        )
    rows = []
    inputs = {t.name: np.asarray(samples[t.name]).astype(t.dtype) for t in model.spec.inputs}
    for size in batch_sizes:
        whole = ArraySamples({k: v[: count - count % size] for k, v in inputs.items()})
        reference = joined(list(_pytorch(model, whole.batches(size))))
        outputs = joined(list(_onnxruntime(onnx_path, model, whole.batches(size), size)))
        for name, expected in reference.items():
            classes = classification and name == output
            rows.append(_compare(name, size, expected, outputs[name], config, classes, onnx_path))
    return ParityReport(
        file=onnx_path.name,
        absolute_tolerance=config.absolute_tolerance,
        relative_tolerance=config.relative_tolerance,
        argmax_agreement=config.argmax_agreement,
        rows=tuple(rows),
    )


def check_parity(report: ParityReport) -> None:
    """Let a report pass, or stop.

    Raises:
        StageError: an output is beyond the tolerance; the worst sample of all is named.
    """
    failed = [row for row in report.rows if not row.passed]
    if not failed:
        return
    row = max(failed, key=lambda r: math.inf if r.max_absolute is None else r.max_absolute)
    worst = row.worst
    element = f"[{', '.join(map(str, worst.element))}]" if worst.element else ""
    same = "" if row.argmax_agreement is None else f", same class {row.argmax_agreement:.2%}"
    raise StageError(
        f"{report.file} does not give PyTorch's outputs: output {row.output!r} at batch size "
        f"{row.batch_size}, worst sample {worst.index}: {row.output}{element} is "
        f"{worst.onnxruntime:.6g} in ONNX Runtime and {worst.pytorch:.6g} in PyTorch "
        f"({row.beyond} of {row.samples} samples beyond {report.absolute_tolerance:g} + "
        f"{report.relative_tolerance:g}·|value|{same})",
        where=f"parity of {report.file}",
        remedy="the exporter changed the model: look for operations that depend on the batch or "
        "on Python values, try another opset; raise the tolerance only for a known cause",
    )


def _compare(
    name: str,
    size: int,
    expected: Array,
    actual: Array,
    config: ExportConfig,
    classes: bool,
    onnx_path: Path,
) -> ParityRow:
    where = f"parity of {onnx_path.name}"
    if actual.shape != expected.shape:
        raise StageError(
            f"output {name!r} has shape {actual.shape} in ONNX Runtime and {expected.shape} in "
            f"PyTorch at batch size {size}",
            where=where,
            remedy="forward makes a shape from Python values; take it from the tensor",
        )
    p, o = expected.astype(np.float64), actual.astype(np.float64)
    if np.isnan(p).any():
        sample = int(np.argwhere(np.isnan(p))[0][0])
        raise StageError(
            f"PyTorch's own output {name!r} is NaN for sample {sample}",
            where=where,
            remedy="look at the training: the weights are not finite",
        )
    with np.errstate(invalid="ignore"):
        difference = np.where(p == o, 0.0, np.abs(o - p))  # equal infinities are equal
    difference[np.isnan(difference)] = np.inf
    exact = not np.issubdtype(expected.dtype, np.floating)
    magnitude = np.where(np.isfinite(p), np.abs(p), 0.0)
    tolerance = 0.0 if exact else config.absolute_tolerance + config.relative_tolerance * magnitude
    excess = (difference - tolerance).reshape(len(p), -1)
    per_sample = excess.max(axis=1)
    beyond = int((per_sample > 0).sum())
    floor = RELATIVE_FLOOR * float(magnitude.max())
    relative = difference / np.maximum(magnitude, floor or 1.0)
    agreement = None
    if classes and p.ndim == 2 and p.shape[1] >= 2:
        same = p.argmax(axis=1) == o.argmax(axis=1)
        agreement = float(same.mean())
        if beyond == 0 and agreement < config.argmax_agreement:
            # Every value is within its tolerance: the sample to name is one of another class.
            per_sample = np.where(same, -np.inf, per_sample)
    index = int(per_sample.argmax())
    element = tuple(int(i) for i in np.unravel_index(int(excess[index].argmax()), p.shape[1:]))
    position = (index, *element)
    return ParityRow(
        batch_size=size,
        output=name,
        samples=len(p),
        max_absolute=_finite(difference.max()),
        max_relative=_finite(relative.max()),
        argmax_agreement=agreement,
        beyond=beyond,
        worst=WorstSample(index, element, float(p[position]), float(o[position])),
        passed=beyond == 0 and (agreement is None or agreement >= config.argmax_agreement),
    )


def _finite(value: np.floating[Any]) -> float | None:
    return float(value) if np.isfinite(value) else None


def _pytorch(model: SpecModule, batches: Iterator[dict[str, Array]]) -> Iterator[dict[str, Array]]:
    import torch
    from torch import nn

    assert isinstance(model, nn.Module)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in batches:
                tensors = {k: torch.from_numpy(v).to(device) for k, v in batch.items()}
                outputs = model(tensors)
                yield {t.name: outputs[t.name].cpu().numpy() for t in model.spec.outputs}
    finally:
        model.train(training)


def _onnxruntime(
    onnx_path: Path, model: SpecModule, batches: Iterator[dict[str, Array]], size: int
) -> Iterator[dict[str, Array]]:
    session = open_session(onnx_path, (CPU_PROVIDER,), 1, "disabled")
    names = [tensor.name for tensor in model.spec.outputs]
    for batch in batches:
        try:
            outputs = session.run(names, batch)
        except Exception as error:  # the runtime's own exception classes have no public base
            raise StageError(
                f"ONNX Runtime cannot run the exported graph at batch size {size}: "
                f"{first_line(error)}",
                where=f"parity of {onnx_path.name}",
                remedy="the graph has a fixed batch size: forward makes a shape from Python "
                "values; take it from the tensor",
            ) from error
        yield dict(zip(names, outputs, strict=True))
