"""A teacher's adaptation to the pipeline's data: from its section, its file and its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.config.networks import TeacherConfig
from edgekd.errors import InputError
from edgekd.stages.task_data import TaskData, read_json, write_json
from edgekd.tasks.classification import Classification

if TYPE_CHECKING:
    from torch import Tensor

    from edgekd.models.adapted import Adaptation
    from edgekd.models.weights import ClassNames

ADAPTATION = "adaptation.json"

Say = Callable[[str], None]


def plan_adaptation(
    task_data: TaskData, config: TeacherConfig, where: str, found: ClassNames | None, say: Say
) -> Adaptation:
    """The preprocessing and the order of the outputs, from the section and from the file.

    Args:
        task_data: the data and the task.
        config: the teacher's section; its ``classes`` take precedence over the file's.
        where: its YAML position, for errors.
        found: the class names in its file.
        say: prints a progress message.

    Raises:
        InputError: keys that do not fit the data, or names that are not all the data's classes.
    """
    from edgekd.models.adapted import Adaptation, input_adaptation, output_order
    from edgekd.models.weights import ClassNames

    dataset, task = task_data.dataset, task_data.task
    own = input_adaptation(
        config.preprocess, dataset.inputs, dataset.preprocess, f"{where}.preprocess"
    )
    planned = Adaptation(task.output, input=own)
    if not isinstance(task, Classification):
        for key in ("classes", "output"):
            if getattr(config, key) is not None:
                raise InputError(
                    f"the task {task.name} has no classes",
                    where=f"{where}.{key}",
                    remedy=f"remove {key}",
                )
        return planned
    labels = class_labels(task_data)
    names = found
    if config.classes is not None:
        names = ClassNames(config.classes, f"{where}.classes")
        if len(set(config.classes)) < len(config.classes):
            raise InputError("a class is named twice", where=f"{where}.classes", remedy="fix it")
    elif dataset.labels is None or names is None:
        # Numeric labels cannot be matched with the names in a file.
        return planned
    order = output_order(names, labels, f"{where}.classes", stated=config.classes is not None)
    if order is None:
        say(
            f"  {where}: its {names.source} names {', '.join(names.names[:3])}, …, and the data "
            f"{', '.join(labels[:3])}, …: no name is the same, so its order is taken as it is"
        )
        return planned
    if order == tuple(range(len(names.names))):
        return planned
    left_out = len(names.names) - len(order)
    say(
        f"  {where}: its outputs are put into the order of the data's classes, by "
        f"{names.source}" + (f"; {left_out} that the data do not have left out" if left_out else "")
    )
    return replace(planned, order=order, outputs=len(names.names))


def with_form(
    planned: Adaptation, answers: Tensor, config: TeacherConfig, where: str, say: Say
) -> Adaptation:
    """The adaptation with the form of the teacher's outputs: configured, else detected.

    Args:
        planned: the rest of the adaptation.
        answers: the network's own outputs for real samples, (N, ..., outputs).
        config: the teacher's section.
        where: its YAML position, for errors.
        say: prints a progress message.

    Raises:
        InputError: the outputs cannot have the configured form.
    """
    from edgekd.models.adapted import check_form, recognized_form

    if config.output is not None:
        check_form(answers, config.output, f"{where}.output")
        return replace(planned, form=config.output)
    form = recognized_form(answers)
    if form == "logits":
        return planned
    made = {
        "probabilities": "sum to 1: they are probabilities, and their logarithm is taken as logits",
        "log_probabilities": "are logarithms of probabilities, which serve as logits",
        "sigmoid": "lie between 0 and 1 and do not sum to 1: each is taken for the sigmoid of a "
        "logit",
    }
    say(f"  {where}: its outputs {made[form]} (otherwise say {where}.output: logits)")
    return replace(planned, form=form)


def class_labels(task_data: TaskData) -> tuple[str, ...]:
    """The data's class names, or their numbers where they have none."""
    if task_data.dataset.labels is not None:
        return task_data.dataset.labels
    size = task_data.task.outputs(task_data.dataset)[0].shape[-1]
    assert isinstance(size, int)
    return tuple(map(str, range(size)))


def check_order(
    task_data: TaskData,
    adaptation: Adaptation,
    labels: Any,
    predictions: Any,
    figures: str,
    where: str,
) -> None:
    """Refuse a teacher whose outputs, in another order, fit the labels far better.

    Args:
        task_data: the data and the task.
        adaptation: the teacher's.
        labels: (N,) classes of labelled validation samples.
        predictions: (N,) the teacher's predictions.
        figures: the measured figures, for the error.
        where: the teacher's YAML position.

    Raises:
        InputError: there is such an order; it is given as the line to add.
    """
    from edgekd.models.adapted import class_list, fitting_permutation

    names = class_labels(task_data)
    better = fitting_permutation(labels, predictions, len(names))
    if better is None:
        return
    order = adaptation.order or tuple(range(len(names)))
    outputs = [f"(no class {at})" for at in range(adaptation.outputs or len(names))]
    for name, at in zip(names, better, strict=True):
        outputs[order[at]] = name
    right = sum(int(p == better[t]) for t, p in zip(labels, predictions, strict=True))
    moved = [f"{a} for {names[b]}" for a, b in zip(names, better, strict=True) if a != names[b]]
    raise InputError(
        f"the teacher's outputs are in another order than the data's classes: {figures} as they "
        f"are, {right / len(labels):.4f} when they are put in another order "
        f"({len(labels):,} labelled validation samples; it predicts {', '.join(moved[:3])}"
        f"{', …' if moved[3:] else ''})",
        where=where,
        remedy=f"if it was trained on these classes, name its outputs in its own order under "
        f"{where}: '{class_list(outputs)}'; if not, it is another network, or does not get its "
        f"inputs as it was trained ({where}.preprocess: normalisation, channel order)",
    )


def write_adaptation(adaptation: Adaptation, folder: Path) -> None:
    """Write the detected adaptation next to the teacher's weights."""
    known = {"order": adaptation.order, "outputs": adaptation.outputs, "form": adaptation.form}
    write_json(folder / ADAPTATION, known)


def read_adaptation(folder: Path, task_data: TaskData) -> Adaptation:
    """The inverse of :func:`write_adaptation`; the preprocessing comes from the section."""
    from edgekd.models.adapted import Adaptation, input_adaptation

    known: Mapping[str, Any] = read_json(folder / ADAPTATION)
    dataset = task_data.dataset
    own = input_adaptation(
        task_data.config.teacher.preprocess,
        dataset.inputs,
        dataset.preprocess,
        "teacher.preprocess",
    )
    order = None if known["order"] is None else tuple(known["order"])
    return Adaptation(task_data.task.output, order, known["outputs"], known["form"], own)
