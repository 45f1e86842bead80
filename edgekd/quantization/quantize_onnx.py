"""Quantize an ONNX file by one method, for the stage ``quantize`` and for ``edgekd quantize``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgekd.errors import CrashError, EdgekdError
from edgekd.files import write_npz

if TYPE_CHECKING:
    from edgekd.onnx.samples import Samples
    from edgekd.quantization.evaluator import Evaluator
    from edgekd.quantization.exclusion_search import Decision
    from edgekd.quantization.mixed_precision import MixedPrecisionInfo
    from edgekd.quantization.node_selection import FloatNode
    from edgekd.quantization.static import StaticQuantizer
    from edgekd.spec import ModelSpec

Method = Literal["static", "dynamic", "weights-only", "fp16", "bf16"]

PROBE_QUERIES = 8
"""Number of different queries with which a file is probed or timed."""


@dataclass(frozen=True)
class QuantizeSettings:
    """How a model is quantized.

    Attributes:
        method: ``static`` needs samples; ``fp16`` finds with them what overflows.
        runtime: whose scheme static INT8 follows: ``cpu`` or ``tensorrt``.
        calibrator: how ``static`` finds the ranges of activations.
        samples: at most this many samples are calibrated on.
        max_drop: the largest allowed drop of the metric; ``static`` keeps layers in float32 until
            it is met. None accepts any.
        labels: the array with a class for each sample compared on, for the metric accuracy;
            without it the metric is agreement with float32.
        validation: file of the samples to compare on, all of them; None takes those of the
            calibration, which the result was fitted to.
        keep: names of nodes that are not quantized.
        threads: of ONNX Runtime.
        timing: compare latency on this machine.
        per_layer: list each layer's error.
        reduce_range: static INT8 weights of 7 bits, which older x86 processors need; None follows
            this machine's processor.
    """

    method: Method = "static"
    runtime: Literal["cpu", "tensorrt"] = "cpu"
    calibrator: Literal["minmax", "entropy", "percentile"] = "minmax"
    samples: int = 512
    max_drop: float | None = None
    labels: str | None = None
    validation: str | Path | None = None
    keep: tuple[str, ...] = ()
    threads: int = 1
    timing: bool = True
    per_layer: bool = False
    reduce_range: bool | None = None


@dataclass
class Quantized:
    """A quantized file, and which of its nodes stay in float32.

    Attributes:
        path: the file; it does not exist where :attr:`refused` is true.
        kept: nodes that are in float32 intentionally, by their names in the file quantized or in
            the one written.
        reasons: why nodes are in float32, by name, where it is not the method.
        decision: of the search for nodes that must stay in float32 to meet ``max_drop``.
        half: which nodes compute in 16 bits.
        quantizer: of static INT8, to write further files with the same ranges.
    """

    path: Path
    method: Method | Literal["qat"]
    kept: tuple[str, ...]
    reasons: dict[str, str] = field(default_factory=dict)
    decision: Decision | None = None
    half: MixedPrecisionInfo | None = None
    quantizer: StaticQuantizer | None = None

    @property
    def refused(self) -> bool:
        """Whether no node can be quantized within ``max_drop``, so that no file was written."""
        return self.decision is not None and self.decision.chosen is None

    @property
    def input_layers(self) -> tuple[str, ...]:
        """The quantized convolutions that read the model's inputs, in static INT8 for a CPU."""
        if self.quantizer is None or self.quantizer.runtime != "cpu":
            return ()
        return self.quantizer.input_layers(self.searched)

    @property
    def searched(self) -> tuple[str, ...]:
        """The nodes in float32 that the search found."""
        return self.decision.kept if self.decision is not None else ()

    def runnable(self, scratch: Path) -> Path:
        """The file itself; of bfloat16, for which ONNX Runtime's CPU provider has no kernels, one
        in ``scratch`` that computes the same rounding in float32."""
        if self.method != "bf16":
            return self.path
        from edgekd.quantization.mixed_precision_graph import write_rounded

        rounded = scratch / f"{self.path.stem}-rounded.onnx"
        write_rounded(self.path, rounded, "bf16")
        return rounded

    def float_nodes(self) -> tuple[FloatNode, ...]:
        """The nodes of an 8-bit file that read float32 weights or have a reason to stay in
        float32; none for 16 bits."""
        from edgekd.quantization.node_selection import float_nodes

        if self.method in ("fp16", "bf16"):
            return ()
        default = f"{self.method} quantization has no 8 bits for it"
        return float_nodes(self.path, self.reasons, default)


def quantize_onnx(
    model: Path,
    out: Path,
    evaluator: Evaluator | None,
    settings: QuantizeSettings,
    *,
    calibration: Samples | None,
    ranking: Samples | None = None,
    scratch: Path,
    opens: Callable[[Path], object] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Quantized:
    """Write a model in fewer bits by the method of the settings.

    Args:
        model: a float32 model.
        out: where to write.
        evaluator: measures the files that are tried to meet ``settings.max_drop``, static only.
        settings: method, scheme and limits.
        calibration: real inputs; static INT8 needs at least two.
        ranking: real inputs that the nodes' sensitivity is measured on; None: those of the
            calibration.
        scratch: a folder that outlives the result.
        opens: opens a file in another process and runs it once, see :func:`opener`; None: static
            INT8 is not probed before its files are opened in this process, and 16 bits are not
            tested.
        progress: receives messages about what is being tried.

    Raises:
        CrashError: ONNX Runtime crashes on the file.
        InputError: the model, the samples or a name do not fit.
        StageError: the file cannot be written or does not run.
    """
    method, keep = settings.method, settings.keep
    reasons = dict.fromkeys(keep, "excluded by name")
    if method == "dynamic" or method == "weights-only":
        from edgekd.quantization.dynamic import quantize_dynamic
        from edgekd.quantization.weights_only import quantize_weights

        write = quantize_dynamic if method == "dynamic" else quantize_weights
        write(model, out, keep=keep, samples=calibration)
        return Quantized(out, method, keep, reasons)
    if method == "fp16" or method == "bf16":
        from edgekd.quantization.mixed_precision import convert_mixed_precision

        info = convert_mixed_precision(
            model, out, method, samples=calibration, keep=keep, opens=opens
        )
        return Quantized(out, method, (*keep, *info.kept), half=info)
    from edgekd.quantization.exclusion_search import search_float_layers
    from edgekd.quantization.static import StaticQuantizer

    assert calibration is not None
    quantizer = StaticQuantizer(
        model,
        calibration,
        scratch,
        runtime=settings.runtime,
        calibration=settings.calibrator,
        keep=keep,
        threads=settings.threads,
        reduce_range=settings.reduce_range,
    )
    if opens is not None:
        # The search opens many similar files in this process.
        everything = scratch / "all.onnx"
        quantizer.write(everything)
        raise_crash(opens, everything)
    decision = None
    if settings.max_drop is None or evaluator is None:
        quantizer.write(out)
    else:
        decision = search_float_layers(
            quantizer,
            out,
            evaluator.drop_of,
            settings.max_drop,
            samples=ranking or calibration,
            progress=progress,
        )
    searched = decision.kept if decision is not None else ()
    reasons |= dict.fromkeys(quantizer.mixed_nodes, "8 bits of one scale would lose a part")
    reasons |= dict.fromkeys(quantizer.kept, "excluded by name") | quantizer.left_in_float
    reasons |= dict.fromkeys(searched, "its 8 bits cost more than the allowed drop")
    kept = (*keep, *quantizer.mixed_nodes, *searched)
    return Quantized(out, method, kept, reasons, decision, quantizer=quantizer)


def raise_crash(opens: Callable[[Path], object], path: Path) -> None:
    """Open a file in another process; its other errors are reported when it is compared.

    Raises:
        CrashError: ONNX Runtime crashes on it.
    """
    try:
        opens(path)
    except CrashError:
        raise
    except EdgekdError:
        pass


def opener(
    folder: Path, spec: ModelSpec, samples: Samples | None, threads: int = 1
) -> Callable[[Path], object]:
    """A function that opens a file in another process and runs it once; raises as
    :meth:`edgekd.targets.LocalTarget.probe` does.

    ``folder`` exists for as long as the function is used; without samples inputs are random.
    """
    from edgekd.targets import LocalTarget

    inputs = None
    if samples is not None and samples.count:
        inputs = folder / "probe.npz"
        write_queries(inputs, spec, samples)
    return lambda path: LocalTarget().probe(path, inputs=inputs, threads=threads)


def write_queries(path: Path, spec: ModelSpec, samples: Samples) -> None:
    """A few queries of the size that the model fixes, else of one sample, as an npz file."""
    from edgekd.onnx.inference import to_model
    from edgekd.onnx.samples import spec_layout

    layout = spec_layout(spec.inputs)
    size = layout.size or 1
    batch = next(samples.batches(PROBE_QUERIES * size))
    count = len(next(iter(batch.values())))
    rows = max(size, count // size * size)
    # Fewer samples than one query needs are repeated.
    filled = {name: np.resize(array, (rows, *array.shape[1:])) for name, array in batch.items()}
    write_npz(path, to_model(layout, filled))
