"""Take a foreign ONNX file over: one file, the pipeline's names, the same answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir
from google.protobuf.message import EncodeError

from edgekd.engines.onnx_file import check_onnx
from edgekd.engines.session import first_line
from edgekd.errors import InputError


def pack_onnx(source: Path, destination: Path) -> None:
    """Copy a model into one file, its external data inside (PyTorch's exporter writes them apart).

    Raises:
        InputError: as :func:`edgekd.engines.onnx.check_onnx`, or the whole is above protobuf's
            2 GB.
    """
    check_onnx(source)
    try:
        onnx.save(onnx.load(str(source)), str(destination))
    except (ValueError, EncodeError) as error:
        raise InputError(
            f"the model does not fit into one file: {first_line(error)}",
            where=str(source),
            remedy="ONNX files hold at most 2 GB; give a smaller model",
        ) from error


def rename_onnx(path: Path, names: Mapping[str, str]) -> None:
    """Give inputs and outputs of a file other names, in place.

    Args:
        path: a model in one file.
        names: the new names by the old; names that stay may be left out.
    """
    changed = {old: new for old, new in names.items() if old != new}
    if not changed:
        return
    model = onnx_ir.load(path)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name in changed:
            value.name = changed[value.name]
    # Serialized whole before the file that the weights are still read from is replaced.
    content = onnx_ir.to_proto(model).SerializeToString()
    path.write_bytes(content)
