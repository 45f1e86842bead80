"""Teachers: a torch module, or an ONNX file as a black box."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from edgekd.distill.distributed import device_of, to_device
from edgekd.distill.features import FeatureExtractor
from edgekd.errors import InputError
from edgekd.files import file_sha256
from edgekd.models.adapted import Adaptation, AdaptedModel
from edgekd.models.dict_model import DictModel
from edgekd.models.weights import output_scaling
from edgekd.onnx.file import files_of_onnx
from edgekd.onnx.optimizer_faults import guarded
from edgekd.onnx.session import CPU_PROVIDER, first_line, open_session
from edgekd.spec import ModelSpec, TensorSpec
from edgerun.onnx_session import DTYPES


class Teacher(Protocol):
    """The interface of a teacher: outputs by name for a batch."""

    @property
    def digest(self) -> str:
        """A hash that identifies its weights."""
        ...

    def predict(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name, and the features of captured layers, without a graph."""
        ...

    def capture(self, layers: Collection[str]) -> None:
        """Return the features of these layers too, from now on; an empty argument removes them.

        Args:
            layers: module paths; a mapping gives each layer's config path, for errors.

        Raises:
            InputError: it has no such layer, or gives no access to layers.
        """
        ...


class ModuleTeacher:
    """A torch model, in evaluation mode and frozen.

    Args:
        model: called with the batch, returns outputs by name (a ``DictModel``). It is put in
            evaluation mode and its parameters no longer require gradients.
        channels_last: also lay out its weights for channels-last images, faster on CPUs.
    """

    def __init__(self, model: nn.Module, channels_last: bool = True) -> None:
        self.model = model.eval().requires_grad_(False)
        self.digest = weights_digest(model)
        self._channels_last = channels_last
        self._device = device_of(model)
        self._capture = FeatureExtractor(model, (), "teacher")
        if channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()  # not inference_mode: its tensors cannot be part of the student's graph
    def predict(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name, without a graph."""
        moved = to_device(batch, self._device, self._channels_last)
        outputs: dict[str, Tensor] = self.model(moved)
        return outputs | self._capture.take()

    def capture(self, layers: Collection[str]) -> None:
        """Return the features of these layers too; raises InputError for an unknown one."""
        self._capture.remove()
        self._capture = FeatureExtractor(self.model, layers, "teacher")


def adaptation_of_teacher(teacher: Teacher) -> Adaptation:
    """The adaptation between the data and a torch teacher; None for other teachers."""
    if isinstance(teacher, OnnxTeacher):
        return teacher.adaptation
    if isinstance(teacher, ModuleTeacher) and isinstance(teacher.model, AdaptedModel):
        return teacher.model.adaptation
    return Adaptation()


def check_repeatable_outputs(teacher: OnnxTeacher, batch: Mapping[str, Tensor], where: str) -> None:
    """Run an ONNX file twice on one batch and compare the outputs.

    Raises:
        InputError: the outputs differ; the nodes that draw random numbers are named.
    """
    first, second = teacher.raw_outputs(batch), teacher.raw_outputs(batch)
    if all(torch.allclose(v, second[k], rtol=1e-4, equal_nan=True) for k, v in first.items()):
        return
    nodes = onnx.load(str(teacher.path), load_external_data=False).graph.node
    drawing = [f"{n.name or n.output[0]} ({n.op_type})" for n in nodes if _may_draw(n)]
    raise InputError(
        "the ONNX teacher gives different outputs for the same batch"
        + (f": {', '.join(drawing[:3])} draws random numbers" if drawing else ""),
        where=f"{where}.onnx: {teacher.path}",
        remedy="export it in evaluation mode (model.eval()), without dropout or noise",
    )


def _may_draw(node: onnx.NodeProto) -> bool:
    return node.op_type.startswith(("Random", "Multinomial", "Bernoulli", "Dropout"))


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a network's class, its named weights and buffers, and its adaptation."""
    network = model.module if isinstance(model, DictModel) else model
    digest = hashlib.sha256(f"{type(network).__qualname__} {network}".encode())
    if isinstance(model, AdaptedModel):
        digest.update(repr(model.adaptation).encode())
    for name, tensor in {**network.state_dict(), **output_scaling(model)}.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(plain.numpy().tobytes())
    return digest.hexdigest()


class OnnxTeacher:
    """An ONNX file, run by ONNX Runtime on the CPU.

    Args:
        path: the file. Its inputs are matched by name; when names differ, by order. A fixed
            batch size is run in chunks, the last one padded.
        inputs: the specs of the batches' inputs.
        outputs: the outputs that the task needs. The file's outputs are matched by name; when names
            differ, by order. Left out, the file's own names are used.
        threads: intra-op threads; None takes ONNX Runtime's default.
        adaptation: the preprocessing and output conversion between the batches and the file.

    Raises:
        InputError: the file is missing, truncated or no ONNX; or it cannot take these inputs or
            does not have these outputs; both shapes are named.
    """

    def __init__(
        self,
        path: Path,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec] = (),
        threads: int | None = None,
        adaptation: Adaptation | None = None,
    ) -> None:
        self.path = path
        self.adaptation = adaptation or Adaptation()
        with guarded(path) as file:
            self._session = open_session(file, (CPU_PROVIDER,), threads or 0, "all")
        digests = " ".join(map(file_sha256, files_of_onnx(path)))
        self._file_digest = hashlib.sha256(digests.encode()).hexdigest()
        spec = self.adaptation.network_spec(ModelSpec(tuple(inputs), tuple(outputs)))
        inputs, outputs = spec.inputs, spec.outputs
        self._inputs = _match_inputs(self._session, inputs, path)
        self._batch_size = _fixed_first_size(self._session)
        given = [node.name for node in self._session.get_outputs()]
        wanted = [spec.name for spec in outputs] or given
        if not set(wanted) <= set(given) and len(given) < len(wanted):
            raise InputError(
                f"the ONNX teacher outputs {', '.join(given)}, and {', '.join(wanted)} are needed",
                where=str(path),
                remedy="export it with these outputs",
            )
        self._fetched = wanted if set(wanted) <= set(given) else given[: len(wanted)]
        self._names = wanted
        self._probe(inputs, outputs)

    @property
    def digest(self) -> str:
        """A hash of the file and of its adaptation."""
        if self.adaptation.is_identity:
            return self._file_digest
        return hashlib.sha256(f"{self._file_digest} {self.adaptation}".encode()).hexdigest()

    @property
    def names(self) -> dict[str, str]:
        """The pipeline's name of each input and output by the file's own name."""
        inputs = {node: name for name, node, _ in self._inputs}
        return inputs | dict(zip(self._fetched, self._names, strict=True))

    def predict(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name, float32 where the file has floats of another width."""
        given = self.raw_outputs(batch)
        return self.adaptation.finish(given) if self.adaptation.output in given else given

    def raw_outputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The file's own outputs, before the conversion to logits in the order of the classes."""
        batch = self.adaptation.prepare(batch)
        arrays = {}
        for name, node, dtype in self._inputs:
            if name not in batch:
                raise InputError(
                    f"the batch lacks the teacher's input {name!r}", where=str(self.path)
                )
            arrays[node] = np.ascontiguousarray(batch[name].detach().cpu().numpy(), dtype=dtype)
        device = batch[self._inputs[0][0]].device
        values = self._run(arrays)
        return {
            name: torch.from_numpy(_float32(array)).to(device)
            for name, array in zip(self._names, values, strict=True)
        }

    def capture(self, layers: Collection[str]) -> None:
        """Refuse layers: an ONNX file gives no access to them (raises InputError)."""
        if layers:
            raise InputError(
                f"an ONNX teacher gives no access to layers, and {', '.join(layers)} are needed",
                where=str(self.path),
                remedy="use losses on its outputs, or give the teacher as a torch module",
            )

    def _run(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        count = len(next(iter(arrays.values())))
        size = self._batch_size or count
        pieces = []
        for start in range(0, count, size):
            piece = {name: array[start : start + size] for name, array in arrays.items()}
            filled = {
                name: np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
                if len(part) < size
                else part
                for name, part in piece.items()
            }
            found = self._session.run(self._fetched, filled)
            pieces.append([array[: min(size, count - start)] for array in found])
        return [np.concatenate(parts) for parts in zip(*pieces, strict=True)]

    def _probe(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        """Run two samples of noise once, to find wrong shapes before the first epoch."""
        noise = np.random.default_rng(0)
        specs = {spec.name: spec for spec in inputs}
        arrays = {}
        for name, node, dtype in self._inputs:
            sizes = [2, *(s if isinstance(s, int) else 4 for s in specs[name].shape[1:])]
            arrays[node] = noise.random(sizes).astype(dtype)
        try:
            found = self._run(arrays)
        except Exception as error:
            raise InputError(
                f"the ONNX teacher cannot take {', '.join(map(str, inputs))}: {first_line(error)}",
                where=str(self.path),
                remedy="give data in the shape it was exported for",
            ) from error
        for spec, array in zip(outputs, found, strict=False):
            wanted = [size for size in spec.shape[1:] if isinstance(size, int)]
            if array.ndim != len(spec.shape) or len(array) != 2 or list(array.shape[1:]) != wanted:
                raise InputError(
                    f"the ONNX teacher gives {spec.name} [batch, "
                    f"{', '.join(map(str, array.shape[1:]))}], and the task needs "
                    f"[{', '.join(map(str, spec.shape))}]",
                    where=str(self.path),
                    remedy="give a teacher for the same classes or targets as the data have; or "
                    "name all of its outputs in their order (teacher.classes: […]), and those "
                    "that are not classes of the data are left out",
                )


def _match_inputs(
    session: onnxruntime.InferenceSession, inputs: Sequence[TensorSpec], path: Path
) -> list[tuple[str, str, str]]:
    """(name in the batch, name in the file, dtype) of each input of the file."""
    nodes = session.get_inputs()
    by_name = {spec.name: spec for spec in inputs}
    if all(node.name in by_name for node in nodes):
        pairs = [(by_name[node.name], node) for node in nodes]
    elif len(nodes) == len(inputs):
        pairs = list(zip(inputs, nodes, strict=True))
    else:
        raise InputError(
            f"the ONNX teacher takes {', '.join(node.name for node in nodes)}, and the data have "
            f"{', '.join(by_name)}",
            where=str(path),
            remedy="name the data's inputs as the file names them",
        )
    for spec, node in pairs:
        shape = list(node.shape)
        fixed = len(shape) == len(spec.shape) and all(
            not isinstance(wanted, int) or not isinstance(size, int) or wanted == size
            for wanted, size in zip(shape[1:], spec.shape[1:], strict=True)
        )
        if not fixed:
            raise InputError(
                f"the ONNX teacher takes {node.name} {shape}, and the data give {spec}",
                where=str(path),
                remedy="resize the data (data.image_size), or export the teacher for this size",
            )
        if _element(node) not in DTYPES:
            raise InputError(
                f"the ONNX teacher's input {node.name} is a {node.type}",
                where=str(path),
                remedy="numbers and booleans can be fed",
            )
    return [(spec.name, node.name, DTYPES[_element(node)]) for spec, node in pairs]


def _element(node: onnxruntime.NodeArg) -> str:
    """The element type of ``tensor(float)``."""
    return str(node.type)[len("tensor(") : -1]


def _fixed_first_size(session: onnxruntime.InferenceSession) -> int | None:
    """The batch size that one input fixes, even where others are open; None when all are open.

    Unlike :func:`edgekd.onnx.inference.fixed_batch` it reads first axes only: a teacher is fed
    every input with the batch first.
    """
    sizes = {node.shape[0] for node in session.get_inputs() if node.shape}
    fixed = [size for size in sizes if isinstance(size, int) and size > 0]
    return fixed[0] if fixed else None


def _float32(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array.astype(np.float32) if array.dtype.kind == "f" else array
