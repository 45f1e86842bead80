"""Inputs for a model about which nothing else is known, and its answers to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from edgekd.engines.onnx_file import UNKNOWN_RANK
from edgekd.engines.samples import Array
from edgekd.engines.session import first_line
from edgekd.errors import InputError, StageError
from edgekd.spec import ModelSpec

TRIED_SIZES = (1, 16, 128, 512)
"""What symbolic dimensions other than the batch's are tried with when no samples are given."""


def made_up_inputs(spec: ModelSpec, size: int = 1, seed: int = 0) -> dict[str, Array]:
    """Inputs of the right shapes for a model about which nothing else is known.

    Floats are standard normal, all else is zero. The first input is taken for the data and later
    ones for its state: symbolic dimensions of the first input but its first one (the batch) are
    ``size`` wherever they occur, all others are 1.

    Raises:
        InputError: an input has no known number of dimensions, or holds strings.
    """
    random = np.random.default_rng(seed)
    free = {d for tensor in spec.inputs[:1] for d in tensor.shape[1:] if isinstance(d, str)}
    inputs: dict[str, Array] = {}
    for tensor in spec.inputs:
        if tensor.dtype == "string" or UNKNOWN_RANK in tensor.shape:
            raise InputError(
                f"no input can be made up for {tensor}", where=tensor.name, remedy="give samples"
            )
        shape = tuple(d if isinstance(d, int) else size if d in free else 1 for d in tensor.shape)
        floating = "float" in tensor.dtype
        values = random.standard_normal(shape) if floating else np.zeros(shape)
        inputs[tensor.name] = np.asarray(values).astype(tensor.dtype)
    return inputs


def answers_to_made_up(
    session: onnxruntime.InferenceSession, spec: ModelSpec, path: Path
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Made-up inputs of the first size that the model can run, and its answers to them.

    Raises:
        InputError: as :func:`made_up_inputs`.
        StageError: the model runs with none of :data:`TRIED_SIZES`.
    """
    failure: StageError | None = None
    for size in TRIED_SIZES:
        inputs = made_up_inputs(spec, size)
        try:
            return inputs, answers_of(session, inputs, path)
        except StageError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def answers_of(
    session: onnxruntime.InferenceSession, inputs: Mapping[str, Array], path: Path
) -> dict[str, Array]:
    """A model's outputs by name.

    Raises:
        StageError: it does not run on these inputs.
    """
    names = [output.name for output in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))
    except Exception as error:  # the runtime's own exception classes have no public base
        shapes = ", ".join(f"{name} {value.shape}" for name, value in inputs.items())
        raise StageError(
            f"the model does not run on {shapes}: {first_line(error)}",
            where=str(path),
            remedy="give samples of the shapes that the model takes",
        ) from error
