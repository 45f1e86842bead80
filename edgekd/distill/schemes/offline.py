"""A trained teacher teaches the student: Hinton et al. 2015."""

from __future__ import annotations

from edgekd.config.networks import ModelConfig
from edgekd.distill.history import History
from edgekd.distill.schemes.assistant import LARGE_GAP, propose_assistant
from edgekd.distill.schemes.scheme import Classroom
from edgekd.distill.teacher import ModuleTeacher
from edgekd.errors import InputError
from edgekd.models.build import MODELS
from edgekd.models.named import count_parameters


def offline(room: Classroom) -> dict[str, History]:
    """One training of the student with the pipeline's loss terms."""
    objective = room.new_objective()
    if objective.needs_teacher:
        _propose_assistant(room)
    return {"student": room.fit(room.student, objective, "student", room.teacher)}


def _propose_assistant(room: Classroom) -> None:
    """Say which network could stand between a large teacher and the student."""
    if not isinstance(room.teacher, ModuleTeacher):
        return  # An ONNX file does not say what of it are parameters.
    above, below = count_parameters(room.teacher.model), count_parameters(room.student)
    if above <= LARGE_GAP * below:
        return
    candidates = {}
    kinds = (type(room.student.module), type(getattr(room.teacher.model, "module", None)))
    for name in MODELS:
        try:
            network = room.build(ModelConfig(model=name), 0)
        except InputError:
            continue  # It is made for other inputs.
        if isinstance(network.module, kinds):
            candidates[name] = count_parameters(network)
    between = propose_assistant(above, below, candidates)
    if between is not None:
        room.say(
            f"  the teacher has {above / below:.0f} times the student's parameters; {between} "
            f"between them may help: distill.scheme: {{assistant: {{models: [{between}]}}}}"
        )
