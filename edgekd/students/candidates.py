"""Candidates for the student, proposed from the section ``student.search``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekd.config.networks import StudentConfig, TeacherConfig
from edgekd.config.search import SearchConfig

if TYPE_CHECKING:
    from edgekd.models.dict_model import DictModel
    from edgekd.spec import TensorSpec


@dataclass(frozen=True)
class Candidate:
    """A student that a search may choose."""

    name: str
    """Readable and unique in its search: ``teacher pruned 0.5``, ``convnet-s blocks=1 20px``."""
    origin: str
    """``prune`` or ``drop_layers`` (the teacher made smaller), ``family`` (a built-in network, or
    one of a hub), ``list`` (the user's own)."""
    student: StudentConfig
    """The complete section ``student``, which can be copied into a pipeline."""
    parameters: int
    """Its number of parameters; estimated where channels are removed."""


def propose(
    search: SearchConfig,
    teacher: TeacherConfig,
    network: DictModel | None,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    say: Callable[[str], None],
) -> tuple[Candidate, ...]:
    """The candidates of a search, at most ``max_candidates``, in the order of the section.

    Args:
        search: the section ``student.search``.
        teacher: the section ``teacher``.
        network: the teacher's network, fresh weights suffice; None for an ONNX file.
        inputs: what the data deliver.
        outputs: the outputs that the task needs.
        say: shows a message.

    Raises:
        InputError: a source's network cannot be built for these data, or only one candidate is
            left.
    """
    raise NotImplementedError
