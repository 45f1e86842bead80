"""A network with named inputs and outputs, and the check that its outputs are repeatable."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from edgekd.errors import InputError
from edgekd.spec import ModelSpec, TensorSpec


class DictModel(nn.Module):
    """Any module, with mappings from name to tensor as input and output.

    The batch is never changed: a network that writes into its inputs (``x.sub_(mean)``, a first
    ReLU in place) gets copies of those it writes into; other networks get none.

    Args:
        module: called with its inputs by name if the parameters of its ``forward`` have the names
        of
            ``spec.inputs``; the complete mapping if its only parameter is called ``batch``; else
            by position in the order of ``spec.inputs``. It returns a tensor, a tuple or a mapping.
        spec: the names, shapes and dtypes.

    Attributes:
        output_scale, output_offset: where they are set (:meth:`scale_output`), the first output
            is ``module's · output_scale + output_offset``.

    Raises:
        InputError: ``forward`` cannot take that many inputs.
    """

    spec: ModelSpec
    module: nn.Module
    output_scale: Tensor | None
    output_offset: Tensor | None

    def __init__(self, module: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.module = module
        self.spec = spec
        self._input_names = tuple(s.name for s in spec.inputs)
        self._passing = _passing(module, self._input_names)
        self._tried: set[bool] = set()
        self._overwritten: set[str] = set()
        self.register_buffer("output_scale", None)
        self.register_buffer("output_offset", None)

    def scale_output(self, scale: Tensor | None, offset: Tensor | None) -> None:
        """Set the first output to the module's times ``scale`` plus ``offset``; None: unscaled.

        Args:
            scale: a number.
            offset: in the shape of one sample of the output.
        """
        self.output_scale, self.output_offset = scale, offset

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name.

        Args:
            batch: at least the inputs of the spec; other names (targets) are not looked at.

        Raises:
            InputError: an input is missing, the module returns other outputs than the spec, or it
                writes into an input that it did not write into when it was first called.
        """
        missing = [name for name in self._input_names if name not in batch]
        if missing:
            raise InputError(
                f"the batch lacks the input {', '.join(map(repr, missing))}",
                remedy=f"the batch has {', '.join(batch)}",
            )
        inputs = {name: batch[name] for name in self._input_names}
        outputs = name_outputs(self._call_unchanged(inputs), self.spec.outputs)
        if self.output_scale is not None and self.output_offset is not None:
            primary = self.spec.outputs[0].name
            outputs[primary] = outputs[primary] * self.output_scale + self.output_offset
        return outputs

    def _call_unchanged(self, inputs: dict[str, Tensor]) -> object:
        """The module's outputs; the inputs are unchanged."""
        if torch.compiler.is_compiling():
            # A compiler removes a copy that nothing writes into; an exporter does not.
            exporting = torch.compiler.is_exporting()
            copied = self._overwritten if exporting else self._input_names
            return self._call({n: t.clone() if n in copied else t for n, t in inputs.items()})
        # Training and evaluation may differ in this, so each is tried on copies first.
        trial = self.training not in self._tried
        copied = self._input_names if trial else self._overwritten
        given = {n: t.clone() if n in copied else t for n, t in inputs.items()}
        versions = {n: _version(t) for n, t in given.items()}
        output = self._call(given)
        counted = True
        for name, tensor in given.items():
            if name in self._overwritten:
                continue
            if tensor.is_inference():
                # Nothing counts the writes in inference mode.
                counted = False
                written = trial and not torch.equal(tensor, inputs[name])
            else:
                written = _version(tensor) != versions[name]
            if written and not trial:
                raise InputError(
                    f"the network {type(self.module).__name__} writes into its input {name!r}, "
                    "and did not when it was first called: others read the same tensor",
                    remedy=f"let its forward begin with {name} = {name}.clone()",
                )
            if written:
                self._overwritten.add(name)
        if trial and counted:
            self._tried.add(self.training)
        return output

    def _call(self, inputs: dict[str, Tensor]) -> object:
        if self._passing == "mapping":
            return self.module(inputs)
        if self._passing == "name":
            return self.module(**inputs)
        return self.module(*inputs.values())

    def check_batch(self, batch: Mapping[str, Tensor]) -> None:
        """Raise InputError when an input does not have the shape of the spec; both are named."""
        for spec in self.spec.inputs:
            if spec.name in batch and not fits(batch[spec.name].shape, spec):
                raise InputError(
                    f"the model takes {spec}, and {spec.name!r} is {list(batch[spec.name].shape)}",
                    remedy="resize the data (data.image_size), or build the model for this size",
                )


@torch.no_grad()
def fold_output_scale(model: DictModel, batch: Mapping[str, Tensor]) -> bool:
    """Take the scale of the first output into the last linear layer, in place, for deployment.

    Only where that layer's output is the output itself and nothing else uses the layer; the
    outputs for ``batch`` must be equal, else nothing is changed.

    Args:
        model: in evaluation mode.
        batch: a few real samples.

    Returns:
        Whether it was folded.
    """
    scale, offset = model.output_scale, model.output_offset
    if scale is None or offset is None:
        return False
    primary = model.spec.outputs[0].name
    expected = model(batch)[primary]
    calls: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda layer, _, output: calls.append((layer, output)))
        for layer in model.modules()
        if type(layer) is nn.Linear and "weight" in layer._parameters
    ]
    model.scale_output(None, None)
    raw = model(batch)[primary]
    for hook in hooks:
        hook.remove()
    last = [layer for layer, output in calls if output is raw]
    rows = offset.reshape(-1, offset.shape[-1])
    uses = [p for _, p in model.named_parameters(remove_duplicate=False)]
    layer = last[0] if len(last) == 1 else None
    if (
        isinstance(layer, nn.Linear)
        and [called for called, _ in calls].count(layer) == 1
        and sum(p is layer.weight or p is layer.bias for p in uses) == 1 + (layer.bias is not None)
        and bool((rows == rows[0]).all())
    ):
        before = layer.weight, layer.bias
        bias = torch.zeros_like(layer.weight[:, 0]) if layer.bias is None else layer.bias
        layer.weight = nn.Parameter(layer.weight * scale)
        layer.bias = nn.Parameter(bias * scale + rows[0])
        off = (model(batch)[primary] - expected).abs().max()
        if bool(off <= _SAME * expected.abs().max()):
            return True
        layer.weight, layer.bias = before
    model.scale_output(scale, offset)
    return False


_SAME = 1e-5
"""Largest error of a folded network's outputs, relative to the largest one: float32 rounding."""


def fits(shape: Sequence[int], spec: TensorSpec) -> bool:
    """Whether a tensor's shape is that of a spec, whose symbolic dimensions match any size."""
    return len(shape) == len(spec.shape) and all(
        isinstance(expected, str) or expected == size
        for size, expected in zip(shape, spec.shape, strict=True)
    )


def name_outputs(result: object, outputs: Sequence[TensorSpec]) -> dict[str, Tensor]:
    """A module's outputs, by the names of the spec.

    Raises:
        InputError: it returned another number of outputs, other names, or no tensors.
    """
    names = [spec.name for spec in outputs]
    named: dict[str, object]
    if isinstance(result, Mapping):
        lacking = [name for name in names if name not in result]
        if lacking:
            raise InputError(
                f"the model outputs {', '.join(map(str, result))}, and not {', '.join(lacking)}",
                remedy="name its outputs as the task does, or return a tensor",
            )
        named = {name: result[name] for name in names}
    else:
        given = list(result) if isinstance(result, tuple | list) else [result]
        if len(given) != len(names):
            raise InputError(
                f"the model returns {len(given)} outputs, and {len(names)} are needed: "
                f"{', '.join(names)}",
                remedy="return a mapping from output name to tensor",
            )
        named = dict(zip(names, given, strict=True))
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    for name, value in named.items():
        if name not in tensors:
            raise InputError(
                f"the model's output {name!r} is a {type(value).__name__}, not a tensor",
                remedy="return a tensor, a tuple of tensors or a mapping from name to tensor",
            )
    return tensors


def _version(tensor: Tensor) -> int:
    """How often a tensor was written into; not counted in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def count_parameters(model: nn.Module) -> int:
    """Number of elements of the parameters; buffers (batch-norm statistics) are not counted."""
    return sum(parameter.numel() for parameter in model.parameters())


def _passing(module: nn.Module, names: Sequence[str]) -> str:
    parameters = inspect.signature(module.forward).parameters
    kinds = inspect.Parameter
    by_name = {
        key
        for key, p in parameters.items()
        if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    }
    if set(names) <= by_name:
        return "name"
    if list(parameters) == ["batch"]:
        return "mapping"
    by_position = [
        p
        for p in parameters.values()
        if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    ]
    needed = sum(p.default is kinds.empty for p in by_position)
    unbounded = any(p.kind is kinds.VAR_POSITIONAL for p in parameters.values())
    if needed > len(names) or (len(by_position) < len(names) and not unbounded):
        raise InputError(
            f"forward({', '.join(parameters)}) of {type(module).__name__} cannot take the "
            f"{len(names)} inputs {', '.join(names)}",
            remedy="name its parameters as the inputs are named",
        )
    return "position"


_CALLS = 3
_ROUNDING = 1e-4
"""Largest difference of two calls, relative to the largest output: parallel sums vary in order."""


def check_repeatable(model: DictModel, batch: Mapping[str, Tensor], where: str) -> None:
    """Call a network several times with one batch, as it will be called for every figure.

    The network, its mode, its buffers and the random state are unchanged.

    Args:
        model: on the batch's device.
        batch: real samples.
        where: the YAML section, for errors.

    Raises:
        InputError: its outputs differ, or it changes a buffer; the module is named.
    """
    training = model.training
    buffers = dict(model.named_buffers())
    before = {name: tensor.clone() for name, tensor in buffers.items()}
    model.eval()
    try:
        with torch.random.fork_rng(devices=_cuda_devices(model)), torch.no_grad():
            calls = [_call(model, batch) for _ in range(_CALLS)]
        changed = [
            name
            for name, tensor in model.named_buffers()
            if name not in before or not torch.equal(tensor, before[name])
        ]
    finally:
        with torch.no_grad():
            for name, tensor in model.named_buffers():
                if name in before and tensor.shape == before[name].shape:
                    tensor.copy_(before[name])
        model.train(training)
    first = calls[0].outputs
    worst = max(_difference(first, call.outputs) for call in calls[1:])
    network = type(model.module).__name__
    if worst > 0:
        culprit = next(filter(None, (_culprit(calls[0], call) for call in calls[1:])), "")
        named = f"the layer {culprit}" if culprit else f"the forward of {network} itself"
        raise InputError(
            f"the network's outputs for the same batch differ by up to {worst:.3g} in "
            f"evaluation mode: {named} draws random numbers or counts its calls",
            where=where,
            remedy="let it do so in training only, e.g. F.dropout(x, p, training=self.training), "
            "and let train(False) reach every layer",
        )
    if changed:
        name = changed[0].removeprefix("module.")
        more = f" and {len(changed) - 1} more" if changed[1:] else ""
        raise InputError(
            f"the network changes its buffer {name!r}{more} in evaluation mode: an output depends "
            "on the batches before it",
            where=where,
            remedy="update buffers under 'if self.training:' only, and let train(False) reach "
            "every layer (a batch norm that remains in training mode uses the batch's statistics)",
        )


class _Call(NamedTuple):
    """One forward pass: its outputs, and each module's inputs and outputs, innermost first."""

    outputs: Mapping[str, Tensor]
    seen: list[tuple[str, str, Any, Any]]


def _call(model: DictModel, batch: Mapping[str, Tensor]) -> _Call:
    seen: list[tuple[str, str, Any, Any]] = []
    handles = []

    def hook(path: str) -> Any:
        def record(module: nn.Module, given: Any, output: Any) -> None:
            seen.append((path, type(module).__name__, _digest(given), _digest(output)))

        return record

    for path, module in model.module.named_modules():
        if path:
            handles.append(module.register_forward_hook(hook(path)))
    try:
        return _Call(model(batch), seen)
    finally:
        for handle in handles:
            handle.remove()


def _culprit(one: _Call, other: _Call) -> str:
    """The first module with different outputs for the same inputs; empty: none."""
    for (path, kind, given, output), (path_2, _, given_2, output_2) in zip(
        one.seen, other.seen, strict=False
    ):
        if path != path_2:
            return ""
        if given == given_2 and output != output_2:
            return f"{path} ({kind})"
    return ""


def _digest(value: Any) -> Any:
    """Something that is the same for the same tensors, in little memory."""
    if isinstance(value, Tensor):
        # In place, the output may be the input: two sums distinguish them without a copy.
        wide = value.double()
        weights = torch.arange(1, wide.numel() + 1, device=wide.device) % 1009
        return (tuple(value.shape), wide.sum().item(), (wide.reshape(-1) * weights).sum().item())
    if isinstance(value, Mapping):
        return tuple((key, _digest(entry)) for key, entry in value.items())
    if isinstance(value, tuple | list):
        return tuple(map(_digest, value))
    return None


def _difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference beyond rounding; infinite where shapes differ."""
    worst = 0.0
    for name, tensor in one.items():
        if name not in other or tensor.shape != other[name].shape:
            return float("inf")
        if tensor.numel() == 0:
            continue
        a, b = tensor.double(), other[name].double()
        difference = float(torch.where(a == b, 0, (a - b).abs()).nan_to_num(nan=0.0).max())
        if difference > _ROUNDING * float(a.abs().nan_to_num(posinf=0.0, neginf=0.0).max()):
            worst = max(worst, difference)
    return worst


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    found = {p.device for p in model.parameters() if p.device.type == "cuda"}
    return sorted(found, key=str)
