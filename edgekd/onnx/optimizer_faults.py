"""Find optimizations of ONNX Runtime that change a model's outputs, and avoid them.

A model's outputs are those of the graph as written. An optimizer with other outputs is
found by trial, and named. One is known and avoided by a rewrite that every runtime
accepts: ``Pad_Fusion`` turns padding with 0 the padding of the MaxPool after it, which is −∞
(microsoft/onnxruntime#24737), so that negative values win where 0 should.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekd.errors import StageError
from edgekd.onnx.file import describe_onnx, read_onnx
from edgekd.onnx.graph import node_label, opset_of, subgraphs, tensor_types
from edgekd.onnx.inference import outputs_of, outputs_of_random_inputs
from edgekd.onnx.samples import Array
from edgekd.onnx.session import CPU_PROVIDER, Optimization, open_session

TOLERANCE = 1e-3
"""Tolerance relative to an output's largest value: fused layers round differently; a wrong rewrite
is off by far more.
"""
_LEAST = 1e-6  # what a largest value counts for at least
_FLIPPED = 0.01  # the share of integers that rounding before them may change

OPTIMIZERS = (
    "AttentionFusion", "BiasDropoutFusion", "BiasGeluFusion", "BiasSkipLayerNormFusion",
    "BiasSoftmaxFusion", "CastChainElimination", "CastElimination", "ClipQuantRewrite",
    "CommonSubexpressionElimination", "ConstantFolding", "ConstantFoldingDQ",
    "ConstantSharing", "ConvActivationFusion", "ConvAddActivationFusion", "ConvAddFusion",
    "ConvBNFusion", "ConvMulFusion", "DivMulFusion", "DoubleQDQPairsRemover",
    "DQMatMulNBitsFusion", "DynamicQuantizeMatMulFusion", "EliminateDropout",
    "EliminateIdentity", "EliminateSlice", "EmbedLayerNormFusion", "EnsureUniqueDQForNodeUnit",
    "ExpandElimination", "FastGeluFusion", "FuseReluClip", "GatherToSliceFusion",
    "GatherToSplitFusion", "GeluApproximation", "GeluFusion", "GeluFusionL1", "GeluFusionL2",
    "GemmActivationFusion", "GemmSumFusion", "GemmTransposeFusion", "GroupQueryAttentionFusion",
    "LabelEncoderFusion", "LayerNormFusion", "LayerNormFusionL1", "LayerNormFusionL2",
    "MatMulActivationFusion", "MatMulAddFusion", "MatMulIntegerToFloatFusion",
    "MatMulNBitsFusion", "MatMulScaleFusion", "MatMul_BatchNormalization_Fusion",
    "MatmulTransposeFusion", "NchwcTransformer", "NhwcTransformer", "NoopElimination",
    "NotWhereFusion", "Pad_Fusion", "PreShapeNodeElimination", "QDQFinalCleanupTransformer",
    "QDQPropagationTransformer", "QDQS8ToU8Transformer", "QDQSelectorActionTransformer",
    "QuickGeluFusion", "ReluQuantRewrite", "RemoveDuplicateCastTransformer", "ReshapeFusion",
    "SimplifiedLayerNormFusion", "SkipLayerNormFusion", "SliceConcatToSpaceToDepthFusion",
    "TransposeOptimizer", "UnsqueezeElimination", "WeightBiasQuantization", "WhereDummyDq",
)  # fmt: skip
"""Names that ``InferenceSession(disabled_optimizers=…)`` accepts (1.19 to 1.31); one that a release
does not have is no error there."""

# Operators without negative outputs, and operators that pass on the values of their first input.
_NOT_NEGATIVE = {"Relu", "Sigmoid", "Softmax", "Abs", "Exp", "HardSigmoid", "Softplus", "Sqrt"}
_SAME_SIGN = {
    "MaxPool", "AveragePool", "GlobalAveragePool", "Reshape", "Transpose", "Identity",
    "Resize", "Pad", "Slice", "Concat", "QuantizeLinear", "DequantizeLinear", "Cast", "Dropout",
}  # fmt: skip
_SMALLEST: dict[int, float] = {
    TensorProto.FLOAT: 2.0**-126,
    TensorProto.BFLOAT16: 2.0**-126,
    TensorProto.FLOAT16: 2.0**-24,
    TensorProto.DOUBLE: 2.0**-126,
}


@dataclass(frozen=True)
class OptimizerFault:
    """An output that ONNX Runtime's optimization changes.

    ``difference`` is the largest |optimized − as written|, infinite where values are not to be
    compared; ``level`` the lowest level of optimization at which it is seen; ``disabled`` the
    optimizers without which the requested level is correct; empty where no set is.
    """

    output: str
    difference: float
    level: Optimization
    disabled: tuple[str, ...]

    def __str__(self) -> str:
        by = f" by {self.difference:.3g}" if np.isfinite(self.difference) else ""
        which = f" ({', '.join(self.disabled)})" if self.disabled else ""
        return (
            f"ONNX Runtime's optimization{which} changes the outputs: output {self.output!r}{by}, "
            f"from the level {self.level!r} on"
        )

    @property
    def remedy(self) -> str:
        """How to open the file so that it is right."""
        if self.disabled:
            return f"open it with InferenceSession(…, disabled_optimizers={list(self.disabled)})"
        return "open it with graph_optimization_level = ORT_DISABLE_ALL"

    def to_json(self) -> dict[str, Any]:
        """A plain mapping for a JSON file; a difference that is not finite is None."""
        difference = self.difference if np.isfinite(self.difference) else None
        return asdict(self) | {"difference": difference}


def find_fault(
    path: Path,
    inputs: Mapping[str, Array],
    *,
    threads: int = 1,
    optimization: Optimization = "all",
    tolerance: float = TOLERANCE,
) -> OptimizerFault | None:
    """Compare a model's outputs with and without optimization, on the CPU.

    Args:
        path: the model.
        inputs: by name, as the model expects them.
        threads: of ONNX Runtime.
        optimization: the level to compare with no optimization.
        tolerance: of an output's largest value; for integers see the module.

    Raises:
        InputError, StageError: the model cannot be opened, or does not run on these inputs.
    """

    def run(level: Optimization, disabled: Sequence[str] = ()) -> dict[str, Array]:
        session = open_session(
            path, (CPU_PROVIDER,), threads, level, disabled_optimizers=tuple(disabled)
        )
        return outputs_of(session, inputs, path)

    reference = run("disabled")
    found = changed(reference, run(optimization), tolerance)
    if found is None:
        return None
    levels: list[Optimization] = ["basic", "extended", "all"]
    below = levels[: levels.index(optimization)]
    lowest = next(
        (level for level in below if changed(reference, run(level), tolerance)), optimization
    )
    disabled = optimizers_to_disable(
        lambda names: changed(reference, run(optimization, names), tolerance) is None
    )
    return OptimizerFault(*found, lowest, disabled)


def find_fault_on_random_inputs(path: Path, *, threads: int = 1) -> OptimizerFault | None:
    """:func:`find_fault` on random inputs; also None where the model draws random
    numbers, as no two of its outputs are the same.

    Raises:
        InputError, StageError: the model accepts no random inputs.
    """
    session = open_session(path, (CPU_PROVIDER,), threads, "disabled")
    inputs, reference = outputs_of_random_inputs(session, describe_onnx(path).spec, path)
    if changed(reference, outputs_of(session, inputs, path), TOLERANCE):
        return None
    return find_fault(path, inputs, threads=threads)


def optimizers_to_disable(right_without: Callable[[Sequence[str]], bool]) -> tuple[str, ...]:
    """Few optimizers without which a model is right; none where it is not without all.

    Args:
        right_without: whether the model is correct when these are disabled. It is called some
        twenty
            times where one optimizer is to blame.
    """
    left = list(OPTIMIZERS)
    if not right_without(left):
        return ()
    size = len(left)
    while size > 1:
        size = (size + 1) // 2
        start = 0
        while start < len(left):
            trial = left[:start] + left[start + size :]
            if trial and right_without(trial):
                left = trial
            else:
                start += size
    return tuple(left)


def changed(
    reference: Mapping[str, Array], outputs: Mapping[str, Array], tolerance: float
) -> tuple[str, float] | None:
    """The output that differs most for its tolerance, and by how much; None where all agree."""
    worst: tuple[float, str, float] | None = None
    for name, expected in reference.items():
        excess, difference = _excess(expected, outputs.get(name), tolerance)
        if excess > 1 and (worst is None or excess > worst[0]):
            worst = excess, name, difference
    return None if worst is None else (worst[1], worst[2])


def _excess(expected: Any, actual: Any, tolerance: float) -> tuple[float, float]:
    """The difference over what is tolerated, and the difference."""
    if not isinstance(expected, np.ndarray) or not isinstance(actual, np.ndarray):
        return 0.0, 0.0  # sequences and maps are not compared
    if expected.shape != actual.shape:
        return np.inf, np.inf
    if not expected.size:
        return 0.0, 0.0
    if expected.dtype.kind != "f":
        share = float((expected != actual).mean())
        return share / _FLIPPED, share
    p, o = expected.astype(np.float64), actual.astype(np.float64)
    with np.errstate(invalid="ignore"):
        same = (p == o) | (np.isnan(p) & np.isnan(o))
        difference = float(np.where(same, 0.0, np.abs(o - p)).max())
    if np.isnan(difference):
        difference = np.inf
    largest = float(np.abs(p[np.isfinite(p)]).max(initial=0.0))
    return difference / (tolerance * max(largest, _LEAST)), difference


def guard_padding(model: onnx.ModelProto) -> tuple[str, ...]:
    """Keep ``Pad_Fusion`` from padding with 0 before a MaxPool, in place.

    The constant becomes the smallest positive number of its type, which changes an output by no
    more than that: no optimizer treats it as 0. Padding of non-negative values is unchanged:
    there the fusion is right.

    Returns:
        the nodes that were changed, by name.
    """
    types = tensor_types(model)
    return tuple(_guard(model.graph, opset_of(model), types))


@contextmanager
def guarded(path: Path) -> Iterator[Path]:
    """The file, or where :func:`guard_padding` changes something a changed copy of it.

    Raises:
        InputError: as :func:`edgekd.onnx.file.read_onnx`.
        StageError: the copy cannot be written.
    """
    if not guard_padding(read_onnx(path)):
        yield path
        return
    model = onnx.load(str(path))
    guard_padding(model)
    with TemporaryDirectory(prefix="edgekd-") as folder:
        copy = Path(folder) / path.name
        try:
            onnx.save(model, str(copy))
        except (OSError, ValueError) as error:
            raise StageError(
                f"a copy of the model with another padding cannot be written: {error}",
                where=str(path),
                remedy="free space; a model above 2 GB needs its padding before MaxPool changed "
                "where it is exported",
            ) from error
        yield copy


def _guard(graph: onnx.GraphProto, opset: int, types: Mapping[str, int]) -> Iterator[str]:
    makers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {
        node.output[0]: attribute.t
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }
    pooled = {node.input[0] for node in graph.node if node.op_type == "MaxPool"}
    for node in graph.node:
        for inner in subgraphs(node):
            yield from _guard(inner, opset, types)
        if node.op_type != "Pad" or node.output[0] not in pooled or len(node.input) > 3:
            continue
        if not _pads_with_zero(node, constants) or _not_negative(node.input[0], makers):
            continue
        kind = types.get(node.output[0]) or types.get(node.input[0], 0)
        if kind not in _SMALLEST:
            continue  # of integers the smallest above 0 is another number
        if opset < 11:
            kept = [attribute for attribute in node.attribute if attribute.name != "value"]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute("value", _SMALLEST[kind])])
        else:
            name = f"{node.output[0]}/padding"
            values = helper.make_tensor(name, kind, [], [_SMALLEST[kind]])
            graph.initializer.append(values)
            del node.input[2:]
            node.input.append(name)
        yield node_label(node)


def _pads_with_zero(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if settings.get("mode", b"constant") != b"constant" or settings.get("value", 0.0) != 0:
        return False
    if len(node.input) < 3 or not node.input[2]:
        return True
    constant = constants.get(node.input[2])
    if constant is None or constant.data_location == TensorProto.EXTERNAL:
        return False
    return not numpy_helper.to_array(constant).any()


def _not_negative(name: str, makers: Mapping[str, onnx.NodeProto]) -> bool:
    node = makers.get(name)
    if node is None:
        return False
    if node.op_type in _NOT_NEGATIVE:
        return True
    taken = node.input if node.op_type == "Concat" else node.input[:1]
    return node.op_type in _SAME_SIGN and all(_not_negative(t, makers) for t in taken)
