"""Stage teacher: train it, load its weights, or use an ONNX file as a black box."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.config.networks import TeacherConfig
from edgekd.errors import InputError
from edgekd.files import file_sha256
from edgekd.pipeline.stage import Context, Job
from edgekd.stages.task_data import (
    ADAPTATION_SCHEMA,
    HISTORY_SCHEMA,
    VALIDATION_SCHEMA,
    TaskData,
    open_task_data,
    read_json,
    some_samples,
    write_json,
)
from edgekd.stages.training import fit, hub_fingerprint, scale_output
from edgekd.tasks.classification import Classification

if TYPE_CHECKING:
    from torch import Tensor

    from edgekd.distill.checkpoint import History
    from edgekd.distill.teacher import OnnxTeacher, Teacher
    from edgekd.models.adapted import Adaptation, InputAdaptation
    from edgekd.models.dict_model import DictModel
    from edgekd.models.weights import ClassNames

WEIGHTS, BLACK_BOX = "teacher.safetensors", "teacher.onnx"
ADAPTATION = "adaptation.json"
ENOUGH_LABELS = 20
"""Number of labelled validation samples below which a teacher near chance is not refused."""

Say = Callable[[str], None]
"""Prints a progress message."""


class TeacherStage:
    """Writes the teacher's weights or ONNX file, its history and its validation metric."""

    name = "teacher"
    inputs = ("data",)
    libraries = ("torch",)

    def config_slice(self, job: Job) -> dict[str, Any]:
        """The section ``teacher``, its files, and its training's settings."""
        teacher = job.config.teacher
        chosen = teacher.model_dump(mode="json", exclude={"checkpoint", "onnx"})
        files = hub_fingerprint(teacher.model)
        if teacher.checkpoint is not None:
            path = job.existing_file(teacher.checkpoint, "teacher.checkpoint")
            files["checkpoint"] = file_sha256(path)
        if teacher.onnx is not None:
            from edgekd.onnx.file import files_of_onnx

            parts = files_of_onnx(job.existing_file(teacher.onnx, "teacher.onnx"))
            files["onnx"] = " ".join(map(file_sha256, parts))
        training = {"seed": job.config.seed, "augment": list(job.config.data.augment)}
        return {
            "teacher": chosen,
            **files,
            "task": job.task_settings,
            **(training if teacher.train else {}),
        }

    def run(self, context: Context, inputs: Mapping[str, Path]) -> None:
        """Train or load the teacher, and check it on validation samples."""
        from edgekd.distill.teacher import ModuleTeacher, adaptation_of_teacher
        from edgekd.models.weights import save_weights
        from edgekd.onnx.import_onnx import pack_onnx, rename_onnx

        job = context.job
        config = job.config.teacher
        task_data = open_task_data(inputs["data"], job.config)
        if config.onnx is not None:
            packed = context.out / BLACK_BOX
            pack_onnx(job.existing_file(config.onnx, "teacher.onnx"), packed)
            black_box = _black_box(task_data, config, packed, "teacher", context)
            # Student and teacher are timed on the same samples, so they share their names.
            rename_onnx(packed, black_box.names)
            write_adaptation(black_box.adaptation, context.out)
            teacher = open_teacher(context.out, task_data)
        else:
            model, history = _trained_or_loaded(task_data, config, context, "teacher")
            if history is not None:
                write_json(context.out / "history.json", history.to_json(), HISTORY_SCHEMA)
            save_weights(model, context.out / WEIGHTS)
            teacher = ModuleTeacher(model)
            write_adaptation(adaptation_of_teacher(teacher), context.out)
        write_json(
            context.out / "validation.json",
            check_teacher(teacher, task_data, context),
            VALIDATION_SCHEMA,
        )


def _trained_or_loaded(
    task_data: TaskData, config: TeacherConfig, context: Context, where: str
) -> tuple[DictModel, History | None]:
    """A teacher network with its weights, and its history when it was trained here."""
    from edgekd.distill.objective import Objective
    from edgekd.models.adapted import adapt
    from edgekd.models.dict_model import DictModel, check_repeatable
    from edgekd.models.weights import class_names_in, load_weights, read_checkpoint

    say = context.progress.message
    read = None
    if config.checkpoint is not None:
        at = f"{where}.checkpoint"
        path = context.job.existing_file(config.checkpoint, at)
        read = read_checkpoint(path, config.allow_pickle, at)
    named = read.class_names() if read is not None else None
    planned = plan_adaptation(task_data, config, where, named, say)
    model = build_teacher(task_data, config, where, planned)
    if read is not None:
        for note in load_weights(model, read, key=config.checkpoint_key, prefix=config.prefix):
            say(f"  {where}: {note}")
    hub = getattr(model.module, "config", None)
    if named is None and (named := class_names_in(getattr(hub, "__dict__", None))) is not None:
        planned = plan_adaptation(task_data, config, where, named, say)
    batch = some_samples(task_data)
    check_repeatable(model, batch, where)
    if isinstance(task_data.task, Classification):
        import torch

        network = DictModel(model.module, planned.network_spec(model.spec)).eval()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            outputs = network(planned.prepare(batch))[task_data.task.output]
        planned = with_form(planned, outputs, config, where, say)
    spec, scale, offset = model.spec, model.output_scale, model.output_offset
    model = adapt(DictModel(model.module, planned.network_spec(spec)), spec, planned)
    model.scale_output(scale, offset)
    if config.train is None:
        return model, None
    if scaled := scale_output(task_data, model):
        say(f"  {where}: {scaled}")
    objective = Objective.supervised(task_data.task, config.train.label_smoothing)
    return model, fit(task_data, model, objective, config.train, where, context)


def _black_box(
    task_data: TaskData, config: TeacherConfig, path: Path, where: str, context: Context
) -> OnnxTeacher:
    """An ONNX file as a teacher, with its adaptation to the data."""
    from edgekd.distill.teacher import OnnxTeacher, check_repeatable_outputs
    from edgekd.models.weights import class_names_in_metadata
    from edgekd.onnx.file import describe_onnx

    say, spec = context.progress.message, task_data.spec
    named = class_names_in_metadata(describe_onnx(path).metadata)
    planned = plan_adaptation(task_data, config, where, named, say)
    teacher = OnnxTeacher(path, spec.inputs, spec.outputs, adaptation=planned)
    batch = some_samples(task_data)
    check_repeatable_outputs(teacher, batch, where)
    if isinstance(task_data.task, Classification):
        outputs = teacher.raw_outputs(batch)[task_data.task.output]
        teacher.adaptation = with_form(planned, outputs, config, where, say)
    return teacher


def load_teacher(
    task_data: TaskData, config: TeacherConfig, context: Context, where: str
) -> Teacher:
    """A teacher in addition to the pipeline's own, such as a member of an ensemble.

    ``where`` is its YAML position, for errors and as the label of its training.
    """
    from edgekd.distill.distributed import training_device
    from edgekd.distill.teacher import ModuleTeacher

    if config.onnx is not None:
        path = context.job.existing_file(config.onnx, f"{where}.onnx")
        teacher: Teacher = _black_box(task_data, config, path, where, context)
    else:
        model, _ = _trained_or_loaded(task_data, config, context, where)
        teacher = ModuleTeacher(model.to(training_device()))
    check_teacher(teacher, task_data, context, where)
    return teacher


def check_teacher(
    teacher: Teacher, task_data: TaskData, context: Context, where: str = "teacher"
) -> dict[str, Any]:
    """Report a teacher's validation metric and chance, and refuse a teacher that is no better.

    One whose outputs fit the labels far better in another order is refused with that order.
    Chance is the best constant prediction for these labels. The teacher must be
    better by more than noise: the paired difference of their scores has a one-sided 95 % bound,
    which must be above 0. Below ``ENOUGH_LABELS`` labelled samples the figures are only shown.

    Returns:
        The metric, that of chance, and the number of labelled samples; None where there is none.
        Of a classifier also ``entropy``: the mean of its outputs as a share of the largest.

    Raises:
        InputError: the teacher's outputs are in another order, or it is not better than chance.
    """
    import torch

    from edgekd.distill.teacher import adaptation_of_teacher
    from edgekd.distill.trainer import score
    from edgekd.release.statistics import paired_difference

    task = task_data.task
    rows = task_data.labelled_rows("validation")
    if len(rows) == 0:
        context.progress.message(
            f"  {where}: no validation sample has a label, so its accuracy is not checked"
        )
        return {task.metric: None, "chance": None, "labelled": 0}
    arrays = task_data.dataset.splits["validation"].arrays
    targets = {s.name: arrays[s.name][rows] for s in task_data.dataset.targets}
    labels: list[Tensor] = []
    predictions: list[Tensor] = []
    entropies: list[Tensor] = []

    def predict(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        outputs = teacher.predict(batch)
        if isinstance(task, Classification):
            labels.append(batch[task.target].cpu().flatten())
            predictions.append(outputs[task.output].argmax(dim=-1).cpu().flatten())
            entropies.append(_entropy(outputs[task.output]).cpu().flatten())
        return outputs

    scores = score(predict, task_data.validation_loader(), task)
    by_chance = task.scores(task.constant(targets), targets)
    metric, chance = float(scores.mean()), float(by_chance.mean())
    context.progress.message(
        f"  {where}: validation {task.metric} {metric:.4f}, chance {chance:.4f} "
        f"({len(rows):,} labelled samples)"
    )
    if isinstance(task, Classification):
        figures = f"{task.metric} {metric:.4f}"
        known, predicted = torch.cat(labels).numpy(), torch.cat(predictions).numpy()
        adaptation, labelled = adaptation_of_teacher(teacher), known >= 0
        check_order(task_data, adaptation, known[labelled], predicted[labelled], figures, where)
    if len(rows) >= ENOUGH_LABELS:
        sign = 1 if task.higher_is_better else -1
        # The lower end of a two-sided 90 % interval is a one-sided 95 % bound.
        above = paired_difference(sign * scores, sign * by_chance, confidence=0.9)
        if above.interval is None or above.interval[0] <= 0:
            raise InputError(
                f"the teacher is no better than chance: {task.metric} {metric:.4g}, and always "
                f"predicting the same gives {chance:.4g} "
                f"({len(rows):,} labelled validation samples)",
                where=where,
                remedy="check that it gets its inputs as in its training (teacher.preprocess: "
                "normalisation, channel order, image size), that labels count its outputs in "
                "their order, and that the checkpoint is the right one; if it is trained "
                "here, train it longer",
            )
    entropy = {"entropy": float(torch.cat(entropies).mean())} if entropies else {}
    return {task.metric: metric, "chance": chance, "labelled": len(rows), **entropy}


def _entropy(logits: Tensor) -> Tensor:
    """The entropy of each distribution, as a share of the largest, ln(classes)."""
    import torch

    entropy: Tensor = torch.special.entr(logits.float().softmax(dim=-1)).sum(dim=-1)
    return entropy / math.log(max(2, logits.shape[-1]))


def build_teacher(
    task_data: TaskData,
    config: TeacherConfig | None = None,
    where: str = "teacher",
    adaptation: Adaptation | None = None,
) -> DictModel:
    """The teacher's network with fresh weights drawn from the pipeline's seed.

    Without ``config`` it is the pipeline's teacher, and without ``adaptation`` it is adapted to
    the data as its section alone states.
    """
    import torch

    from edgekd.models.adapted import adapt
    from edgekd.models.build import build_model

    config = config or task_data.config.teacher
    if adaptation is None:
        adaptation = plan_adaptation(task_data, config, where)
    torch.manual_seed(task_data.config.seed)
    spec = task_data.spec
    own = adaptation.network_spec(spec)
    remedy = (
        "give its last layer that size; or, if it was trained with other classes besides these, "
        f"name all of its outputs in their order under {where}: 'classes: […]'"
        if isinstance(task_data.task, Classification) and config.train is None
        else ""
    )
    network = build_model(config, own.inputs, own.outputs, where=where, remedy=remedy)
    return adapt(network, spec, adaptation)


def open_network(folder: Path, task_data: TaskData) -> DictModel:
    """The network of a finished teacher stage with its weights, and its adaptation to the data."""
    from edgekd.models.weights import load_weights

    model = build_teacher(task_data, adaptation=read_adaptation(folder, task_data))
    load_weights(model, folder / WEIGHTS, where="teacher")
    return model


def open_teacher(folder: Path, task_data: TaskData) -> Teacher:
    """The teacher of a finished teacher stage, ready to run."""
    from edgekd.distill.distributed import training_device
    from edgekd.distill.teacher import ModuleTeacher, OnnxTeacher

    if (folder / BLACK_BOX).is_file():
        spec, adaptation = task_data.spec, read_adaptation(folder, task_data)
        return OnnxTeacher(folder / BLACK_BOX, spec.inputs, spec.outputs, adaptation=adaptation)
    return ModuleTeacher(open_network(folder, task_data).to(training_device()))


def plan_adaptation(
    task_data: TaskData,
    config: TeacherConfig,
    where: str = "teacher",
    found: ClassNames | None = None,
    say: Say = lambda text: None,
) -> Adaptation:
    """The preprocessing and the order of the outputs, from the section and from the file.

    ``found`` are the class names in the teacher's file; ``classes`` of its section take precedence.

    Raises:
        InputError: keys that do not fit the data, or names that are not all the data's classes.
    """
    from edgekd.models.adapted import Adaptation, output_order
    from edgekd.models.weights import ClassNames

    dataset, task = task_data.dataset, task_data.task
    planned = Adaptation(task.output, input=_preprocessing(task_data, config, where))
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
            raise InputError(
                "a class is named twice", where=f"{where}.classes", remedy="name each class once"
            )
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
    planned: Adaptation, outputs: Tensor, config: TeacherConfig, where: str, say: Say
) -> Adaptation:
    """The adaptation with the form of the teacher's outputs: configured, else detected.

    ``outputs`` are the network's own for real samples, (N, ..., outputs).

    Raises:
        InputError: the outputs cannot have the configured form.
    """
    from edgekd.models.adapted import check_form, recognized_form

    if config.output is not None:
        check_form(outputs, config.output, f"{where}.output")
        return replace(planned, form=config.output)
    form = recognized_form(outputs)
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
    return tuple(map(str, range(task_data.num_classes)))


def check_order(
    task_data: TaskData,
    adaptation: Adaptation,
    labels: Any,
    predictions: Any,
    figures: str,
    where: str,
) -> None:
    """Refuse a teacher whose outputs, in another order, fit the labels far better.

    ``labels`` and ``predictions`` are classes of labelled validation samples, (N,).

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
    write_json(folder / ADAPTATION, known, ADAPTATION_SCHEMA)


def read_adaptation(folder: Path, task_data: TaskData) -> Adaptation:
    """The inverse of :func:`write_adaptation`; the preprocessing comes from the section."""
    from edgekd.models.adapted import Adaptation

    known = read_json(folder / ADAPTATION, ADAPTATION_SCHEMA)
    own = _preprocessing(task_data, task_data.config.teacher, "teacher")
    order = None if known["order"] is None else tuple(known["order"])
    return Adaptation(task_data.task.output, order, known["outputs"], known["form"], own)


def _preprocessing(
    task_data: TaskData, config: TeacherConfig, where: str
) -> InputAdaptation | None:
    from edgekd.models.adapted import input_adaptation

    data = task_data.dataset
    return input_adaptation(config.preprocess, data.inputs, data.preprocess, f"{where}.preprocess")
