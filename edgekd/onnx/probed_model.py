"""A model whose intermediate tensors can be read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import onnx
import onnxruntime

from edgekd.onnx.file import files_of_onnx, read_onnx
from edgekd.onnx.graph import seen_tensors
from edgekd.onnx.session import CPU_PROVIDER, open_session


class ProbedModel:
    """A model whose intermediate tensors can be read, by copies with more outputs."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self._model = read_onnx(path)
        self._copy = folder / "model.onnx"
        folder.mkdir()
        for file in files_of_onnx(path)[1:]:
            place = folder / file.relative_to(path.resolve().parent)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file, place)
            except OSError:  # another file system
                shutil.copyfile(file, place)
        graph = self._model.graph
        self._outputs = [value.name for value in graph.output]
        self.tensors = {value.name for value in graph.input}
        self.tensors |= {name for node in graph.node for name in node.output if name}
        self.seen = seen_tensors(graph)
        """The rounded tensor that consumers read in place of a tensor."""

    def open(self, tensors: Iterable[str] = ()) -> onnxruntime.InferenceSession:
        """A session that returns these tensors in addition to its outputs."""
        outputs = self._model.graph.output
        for name in set(tensors) - set(self._outputs):
            # Without a type: ONNX Runtime infers it, also of operators that onnx does not know.
            outputs.append(onnx.ValueInfoProto(name=name))
        self._copy.write_bytes(self._model.SerializeToString())
        del outputs[len(self._outputs) :]
        return open_session(self._copy, (CPU_PROVIDER,), 1, "disabled")
