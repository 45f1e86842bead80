"""Stage quantize: variants of the student in fewer bits; which one is shipped is
decided in the engines stage, where they are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgekd.config.pipeline import (
    EngineConfig,
    ExportConfig,
    ExternalEngineConfig,
    PipelineConfig,
    QatConfig,
    QuantizeConfig,
    TensorRTConfig,
)
from edgekd.config.training import TrainConfig
from edgekd.errors import CrashError, InputError, StageError
from edgekd.pipeline.fingerprint import library_versions
from edgekd.pipeline.stage import Context, Job
from edgekd.quantization.evaluator import remarks_on_errors
from edgekd.quantization.quantize_onnx import (
    Method,
    Quantized,
    QuantizeSettings,
    opener,
    quantize_onnx,
    raise_crash,
)
from edgekd.stages.build_student import build_student
from edgekd.stages.comparison import is_student_alone
from edgekd.stages.distill import STUDENT_WEIGHTS, training_settings
from edgekd.stages.export import metadata_of, parity_samples
from edgekd.stages.recipes import trained_config
from edgekd.stages.task_data import (
    EVALUATION_BATCH,
    TaskData,
    TaskEvaluator,
    ValidationSamples,
    open_task_data,
    write_json,
)
from edgekd.stages.teacher import open_teacher
from edgekd.stages.training import fit
from edgekd.tasks.classification import Classification

if TYPE_CHECKING:
    from torch import nn

    from edgekd.distill.checkpoint import History
    from edgekd.distill.objective import Objective
    from edgekd.models.dict_model import DictModel
    from edgekd.tasks import Task

Runtime = Literal["cpu", "tensorrt"]

STUDENT = "student.onnx"

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")

INDEX = "quantize.json"

_NAMED = 5  # nodes in float32 that a line names


class QuantizeStage:
    """Writes ``<candidate>.onnx`` for each requested method, and ``quantize.json`` about them.

    Without ``quantize`` in the pipeline it writes an empty index. A method that turns out
    impossible (no layer can stay in INT8 within the drop) is in the index, without a file.
    """

    name = "quantize"
    inputs = ("data", "teacher", "student", "distill", "export")
    libraries = ("onnx", "onnx-ir", "onnxruntime", "onnxscript", "torch")

    def config_slice(self, job: Job) -> dict[str, Any]:
        """The section ``quantize`` and, for QAT, what the training depends on."""
        config = job.config
        if config.quantize is None:
            return {"quantize": None}
        training = None
        if config.quantize.int8 == "qat":
            training = training_settings(config) | {"libraries": library_versions(("torchao",))}
        return {
            "quantize": config.quantize.model_dump(mode="json", exclude={"select"}),
            "runtimes": runtimes_of(job),
            "reduce_range": reduce_range(job),
            "task": job.task_settings,
            "opset": config.export.opset,
            "qat": training,
        }

    def run(self, context: Context, inputs: Mapping[str, Path]) -> None:
        """Write and compare the candidates."""
        config = context.job.config.quantize
        index: dict[str, Any] = {}
        if config is not None:
            task_data = open_task_data(inputs["data"], context.job.config)
            work = _CandidateBuilder(task_data, context, inputs, config)
            if config.int8 == "dynamic" or config.int8 == "weights-only":
                # TensorRT's parser takes no DynamicQuantizeLinear, and quantized weights alone do
                # not speed it up.
                index |= work.quantized(f"int8-{config.int8}", config.int8, "cpu")
            elif config.int8:
                for runtime in runtimes_of(context.job):
                    index |= work.int8(runtime)
            if config.precision:
                # ONNX Runtime's CPU provider has no bfloat16 kernels.
                runtime_of_half: Runtime | None = "tensorrt" if config.precision == "bf16" else None
                index |= work.quantized(config.precision, config.precision, runtime_of_half)
        write_json(context.out / INDEX, index)


def runtime_of(job: Job, engine: EngineConfig) -> Runtime:
    """The runtime whose INT8 scheme an engine needs; the pipeline may override it."""
    config = job.config
    if config.quantize is not None and config.quantize.runtime is not None:
        return config.quantize.runtime
    if isinstance(engine, ExternalEngineConfig):
        return engine.runtime
    if isinstance(engine, TensorRTConfig):
        return "tensorrt"
    chain = engine.providers or job.profile.runtime.providers
    return "tensorrt" if "tensorrt" in chain[0].lower() else "cpu"


def runtimes_of(job: Job) -> list[Runtime]:
    """The runtimes of all engines of the pipeline, each once."""
    return list(dict.fromkeys(runtime_of(job, engine) for engine in job.config.engines))


class _CandidateBuilder:
    """Builds the candidates; float32's outputs are computed once for all."""

    def __init__(
        self,
        task_data: TaskData,
        context: Context,
        inputs: Mapping[str, Path],
        config: QuantizeConfig,
    ) -> None:
        from edgekd.onnx.file import describe_onnx

        self.task_data, self.context, self.inputs, self.config = task_data, context, inputs, config
        self.source = inputs["export"] / STUDENT
        self.evaluator = TaskEvaluator(task_data, self.source)
        self.calibration = ValidationSamples(task_data, config.samples)
        if config.int8 in ("static", "qat") and self.calibration.count < 2:
            raise InputError(
                f"calibration needs at least 2 samples; the validation split has "
                f"{self.calibration.count}",
                where="quantize.int8",
                remedy="give more data or a larger data.validation",
            )
        context.scratch.mkdir(parents=True, exist_ok=True)
        spec = describe_onnx(self.source).spec
        self.opens = opener(context.scratch, spec, self.calibration)
        """Opens and runs a file in another process; raises CrashError where that crashes."""

    def int8(self, runtime: Runtime) -> dict[str, Any]:
        """The static INT8 candidates for one runtime, and that of QAT, by name."""
        self._say_unit()
        found = self.quantized(f"int8-{runtime}", "static", runtime)
        if self.config.int8 == "qat":
            found |= self._qat(runtime)
        return found

    def quantized(self, name: str, method: Method, runtime: Runtime | None) -> dict[str, Any]:
        """The candidates of one method, by name."""
        config, static = self.config, method == "static"
        settings = QuantizeSettings(
            method=method,
            runtime=runtime or "cpu",
            calibrator=config.calibration,
            max_drop=config.max_drop,
            keep=config.exclude_nodes,
            reduce_range=reduce_range(self.context.job),
        )
        try:
            quantized = quantize_onnx(
                self.source,
                self._out(name),
                self.evaluator,
                settings,
                calibration=self.calibration,
                scratch=self.context.scratch / name if static else self.context.scratch,
                opens=None if method == "bf16" else self.opens,
            )
        except CrashError as error:
            return {name: self._refused(name, method, runtime, error)}
        more: dict[str, Any] = {}
        if quantized.half is not None:
            more["half"] = quantized.half.to_json()
        decision, quantizer = quantized.decision, quantized.quantizer
        if decision is not None:
            for line in decision.lines():
                self.context.progress.message(f"  {name}: {line}")
            more["decision"] = decision.to_json()
            if quantized.refused:
                drop_all = decision.drop_all
                drop = "give no numbers" if drop_all is None else f"drop it by {drop_all:.4f}"
                reason = f"no layer can stay in INT8 within a drop of {config.max_drop:g}"
                refused = f"{reason}; all of them {drop}"
                entry = {"method": method, "runtime": runtime, **more, "refused": refused}
                return {name: entry}
        for mixed in quantizer.mixed if quantizer is not None else ():
            self.context.progress.message(
                f"  {name}: {mixed} stays in float32, as 8 bits of one scale would lose a part"
            )
        found = {name: self._entry(name, quantized, runtime, **more)}
        if quantizer is not None and (first := quantized.input_layers):
            # Which of the two is faster is measured on the target.
            name = f"{name}-float-input"
            quantizer.write(self._out(name), (*quantized.searched, *first))
            with_float = replace(quantized, path=self._out(name), kept=(*quantized.kept, *first))
            found[name] = self._entry(name, with_float, runtime)
        return found

    def _say_unit(self) -> None:
        """Report the unit of drops, and a budget that is smaller than one sample."""
        task, count = self.evaluator.task, len(self.evaluator.scores)
        if not task.higher_is_better:
            self.context.progress.message(
                f"  drops of {task.metric} are shares of {self.evaluator.scale:.5g}, the error of "
                "the best constant prediction on the validation split"
            )
        if 0 < self.config.max_drop < 1 / count and isinstance(task, Classification):
            self.context.progress.message(
                f"  one of {count} validation samples is {1 / count:.4f}: more than quantize."
                f"max_drop = {self.config.max_drop:g}, so a single one keeps layers in float32"
            )

    def _qat(self, runtime: Runtime) -> dict[str, Any]:
        name = f"int8-{runtime}-qat"
        file = self._out(name)
        history = train_quantized(
            self.task_data, self.context, self.inputs, runtime, self.config.qat, file
        )
        write_json(self.context.out / f"{name}-history.json", history.to_json())
        # What torchao does not round (transposed and one-dimensional convolutions) stays in
        # float32.
        return {name: self._entry(name, Quantized(file, "qat", _float_layers(file)), runtime)}

    def _out(self, name: str) -> Path:
        return self.context.out / f"{name}.onnx"

    def _entry(
        self, name: str, quantized: Quantized, runtime: Runtime | None, **more: Any
    ) -> dict[str, Any]:
        """A candidate's entry in the index: how it was made, and its difference to float32.

        Its ``kept`` are the layers that are intentionally in float32; a builder that finds another
        one there refuses the file.
        """
        file, method = quantized.path, quantized.method
        there = _node_names(file)
        entry: dict[str, Any] = {
            "method": method,
            "runtime": runtime,
            "file": file.name,
            "kept": [name for name in dict.fromkeys(quantized.kept) if name in there],
            **more,
        }
        runnable = quantized.runnable(self.context.scratch)
        try:
            raise_crash(self.opens, runnable)
        except CrashError as error:
            file.unlink()
            return self._refused(name, method, runtime, error)
        # Dynamic ranges depend on the batch: with batch 1 the outputs are those on a device.
        batch = 1 if method == "dynamic" else EVALUATION_BATCH
        drop, errors = self.evaluator.compare(runnable, batch)
        self.context.progress.message(
            f"  {name}: {file.stat().st_size:,} of {self.source.stat().st_size:,} bytes, "
            f"validation {self.evaluator.change_text(drop)}"
        )
        if method in ("static", "dynamic", "weights-only"):
            rows = quantized.float_nodes()
            entry["float32_nodes"] = [row.to_json() for row in rows]
            if left := [row for row in rows if row.bytes and row.node not in quantized.kept]:
                nodes = ", ".join(f"{row.node} ({row.op})" for row in left[:_NAMED])
                rest = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
                total = sum(row.bytes for row in left)
                self.context.progress.message(
                    f"  {name}: {total:,} bytes of weights stay in float32: {nodes}{rest}"
                )
        found = [error.to_json() for error in errors]
        for remark in remarks_on_errors(found):
            self.context.progress.message(f"  {name}: {remark}")
        return entry | {"drop": drop, "drop_unit": self.evaluator.drop_unit, "errors": found}

    def _refused(
        self, name: str, method: str, runtime: Runtime | None, error: CrashError
    ) -> dict[str, Any]:
        """The entry in the index of a candidate that crashes a runtime."""
        self.context.progress.message(f"  {name}: {error.what}; it is no candidate")
        return {"method": method, "runtime": runtime, "refused": error.what}


def _node_names(file: Path) -> set[str]:
    from edgekd.onnx.file import read_onnx

    return {node.name for node in read_onnx(file).graph.node}


def _float_layers(file: Path) -> tuple[str, ...]:
    """Layers of a Q/DQ file whose weights are in float32."""
    from edgekd.onnx.file import read_onnx

    nodes = read_onnx(file).graph.node
    given = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    layers = (n for n in nodes if n.op_type in WEIGHTED and n.input[1] not in given)
    return tuple(node.name for node in layers)


def reduce_range(job: Job) -> bool:
    """Whether INT8 weights for a CPU have 7 bits: only older x86 processors need that.

    For a profile with another processor, which is then ARM, this machine is irrelevant.
    """
    from edgekd.config.host import saturates

    return job.profile.kind not in ("cpu-board", "jetson") and saturates()


_FAR = 0.25
"""Largest difference from PyTorch, relative to the output's largest value, that rounding can
explain: float32 noise moves a few activations by one of 255 steps; a wrongly exported graph
differs by far more."""


def train_quantized(
    task_data: TaskData,
    context: Context,
    inputs: Mapping[str, Path],
    runtime: Runtime,
    config: QatConfig,
    out: Path,
) -> History:
    """Continue the student's training with simulated 8-bit rounding, and write it as Q/DQ ONNX.

    The teacher, its cache, the augmentation and the data are those of the distillation; the
    objective is that of its terms that compare outputs, or ``config.losses``; of a student that was
    kept because the teacher harmed, its labels alone. ``runtime``
    determines how activations are rounded. A stopped training is resumed.

    Raises:
        InputError: torchao is missing, no loss is left, or the training or the network cannot
            be quantized so.
        StageError: the network cannot be traced, the training diverged, or the file does not
            give PyTorch's outputs.
    """
    from edgekd.distill.objective import Objective
    from edgekd.distill.qat import quantization_aware
    from edgekd.distill.qat_graph import computed_weights
    from edgekd.models.weights import load_weights
    from edgekd.onnx.export import export_onnx

    pipeline = trained_config(context.job.config, inputs["distill"])
    label = f"student int8 {runtime}"
    objective, left_out = qat_objective(pipeline, config, task_data.task)
    if config.losses is None and is_student_alone(inputs["distill"]):
        objective, left_out = Objective.supervised(task_data.task, config.label_smoothing), ()
    if left_out:
        context.progress.message(
            f"  {label}: without {', '.join(left_out)}: the layers that are compared are not in "
            "the graph that is trained"
        )
    # The cache and the augmentation are the distillation's, so that the teacher is not run again.
    training = pipeline.distill.model_copy(
        update={name: getattr(config, name) for name in TrainConfig.model_fields}
    )
    student = build_student(task_data, inputs["student"])
    load_weights(student, inputs["distill"] / STUDENT_WEIGHTS, where="student")
    if computed := computed_weights(student):
        context.progress.message(
            f"  {label}: {', '.join(computed)} {'is' if len(computed) == 1 else 'are'} trained on "
            "as plain weights: their parametrization is not part of the shipped model"
        )
    teacher = open_teacher(inputs["teacher"], task_data) if objective.needs_teacher else None

    def train(model: nn.Module) -> History:
        return fit(task_data, model, objective, training, label, context, teacher)

    narrow = runtime == "cpu" and reduce_range(context.job)
    result = quantization_aware(student, runtime, train, narrow)
    export_onnx(result.model, out, pipeline.export.opset, metadata_of(task_data, "student"))
    context.progress.message(f"  {label}: {_check_outputs(result.model, out, task_data)}")
    return result.history


def qat_objective(
    pipeline: PipelineConfig, config: QatConfig, task: Task
) -> tuple[Objective, Sequence[str]]:
    """The objective of quantization-aware training, and the losses that it leaves out.

    Raises:
        InputError: torchao is missing, no loss is left, or the training cannot be quantized so.
    """
    from edgekd.distill.objective import Objective
    from edgekd.distill.qat import check_training, terms_of_outputs
    from edgekd.distill.qat_graph import check_torchao

    check_torchao()
    check_training(config)
    terms, left_out = terms_of_outputs(pipeline.loss_terms, config.losses)
    where = "distill.losses" if config.losses is None else "quantize.qat.losses"
    return Objective(terms, task, config.label_smoothing, where), left_out


def _check_outputs(model: DictModel, path: Path, task_data: TaskData) -> str:
    """Compare the file with the converted network over validation samples, in a line.

    Raises:
        StageError: they are further apart than rounding explains.
    """
    import torch

    from edgekd.onnx.parity import parity

    samples = parity_samples(task_data)
    with torch.inference_mode():
        outputs = model({name: torch.from_numpy(array) for name, array in samples.items()})
    largest = {name: float(tensor.abs().max()) for name, tensor in outputs.items()}
    report = parity(
        model,
        path,
        samples,
        task_data.task.output,
        ExportConfig(samples=task_data.config.export.samples),
        classification=isinstance(task_data.task, Classification),
    )
    shares: dict[str, float] = {}
    for row in report.rows:
        if row.max_absolute is None or row.max_absolute > _FAR * largest[row.output]:
            raise StageError(
                f"{path.name} does not give PyTorch's outputs: output {row.output!r} at batch "
                f"size {row.batch_size} differs by {row.max_absolute} where the largest value is "
                f"{largest[row.output]:.4g}",
                where=f"parity of {path.name}",
                remedy="try another opset (export: {opset: …}), or set int8: static",
            )
        shares[row.output] = max(
            shares.get(row.output, 0.0), row.max_absolute / (largest[row.output] or 1.0)
        )
    return "parity with PyTorch: max |Δ| " + ", ".join(
        f"{share:.1%} of the largest {name}" for name, share in shares.items()
    )
