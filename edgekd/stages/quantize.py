"""Stage quantize: variants of the student in fewer bits; which one is shipped is
decided in the engines stage, where they are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from edgekd.config.engines import EngineConfig, ExternalEngineConfig, QuantizeConfig, TensorRTConfig
from edgekd.config.pipeline import PipelineConfig
from edgekd.errors import CrashError, EdgekdError, InputError
from edgekd.pipeline.stage import Context, Job
from edgekd.stages.evaluator import remarks_on_errors
from edgekd.stages.qat import reduce_range
from edgekd.stages.task_data import (
    EVALUATION_BATCH,
    TaskData,
    Validation,
    ValidationSamples,
    open_task_data,
    write_json,
)
from edgekd.tasks.classification import Classification

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
        return {
            "quantize": config.quantize.model_dump(mode="json", exclude={"select"}),
            "runtimes": runtimes_of(job),
            "reduce_range": reduce_range(job),
            "task": [config.task, config.task_args],
            "opset": config.export.opset,
            "qat": _training_slice(config) if config.quantize.int8 == "qat" else None,
        }

    def run(self, context: Context, inputs: Mapping[str, Path]) -> None:
        """Write and compare the candidates."""
        wanted = context.job.config.quantize
        index: dict[str, Any] = {}
        if wanted is not None:
            task_data = open_task_data(inputs["data"], context.job.config)
            work = _CandidateBuilder(task_data, context, inputs, wanted)
            for runtime in runtimes_of(context.job) if wanted.int8 else ():
                index.update(work.int8(runtime))
            if wanted.precision:
                index.update(work.half(wanted.precision))
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
        wanted: QuantizeConfig,
    ) -> None:
        self.task_data, self.context, self.inputs, self.wanted = task_data, context, inputs, wanted
        self.source = inputs["export"] / STUDENT
        self.validation = Validation(task_data, self.source)
        self.calibration = ValidationSamples(task_data, wanted.samples)
        self._opener: Callable[[Path], object] | None = None
        if wanted.int8 in ("static", "qat") and self.calibration.count < 2:
            raise InputError(
                f"calibration needs at least 2 samples; the validation split has "
                f"{self.calibration.count}",
                where="quantize.int8",
                remedy="give more data or a larger data.validation",
            )

    def opens(self, file: Path) -> None:
        """Open and run a file in another process.

        Raises:
            CrashError: ONNX Runtime crashes on it.
        """
        from edgekd.onnx.file import describe_onnx
        from edgekd.stages.quantize_onnx_static import opener

        if self._opener is None:
            spec = describe_onnx(self.source).spec
            self.context.scratch.mkdir(parents=True, exist_ok=True)
            self._opener = opener(self.context.scratch, spec, self.calibration)
        self._opener(file)

    def int8(self, runtime: Runtime) -> dict[str, Any]:
        """The INT8 candidates for one runtime, by name."""
        from edgekd.quantization.dynamic import quantize_dynamic
        from edgekd.quantization.weights_only import quantize_weights

        kind = self.wanted.int8
        if kind == "dynamic" or kind == "weights-only":
            name = f"int8-{kind}"
            write = quantize_dynamic if kind == "dynamic" else quantize_weights
            write(
                self.source,
                self._out(name),
                keep=self.wanted.exclude_nodes,
                samples=self.calibration,
            )
            # TensorRT's parser takes no DynamicQuantizeLinear, and quantized weights alone do not
            # speed it up.
            return {name: self._entry(name, kind, "cpu", self.wanted.exclude_nodes)}
        found = self._static(runtime)
        if kind == "qat":
            found |= self._qat(runtime)
        return found

    def half(self, kind: Literal["fp16", "bf16"]) -> dict[str, Any]:
        """The half precision candidate, by name."""
        from edgekd.quantization.mixed_precision import convert_mixed_precision

        # ONNX Runtime's CPU provider has no bfloat16 kernels.
        runtime: Runtime | None = "tensorrt" if kind == "bf16" else None
        try:
            info = convert_mixed_precision(
                self.source,
                self._out(kind),
                kind,
                samples=self.calibration,
                keep=self.wanted.exclude_nodes,
                opens=self.opens if kind == "fp16" else None,
            )
        except CrashError as error:
            return {kind: self._refused(kind, kind, runtime, error)}
        kept = (*self.wanted.exclude_nodes, *info.kept)
        return {kind: self._entry(kind, kind, runtime, kept, half=info.to_json())}

    def _static(self, runtime: Runtime) -> dict[str, Any]:
        from edgekd.quantization.mixed_precision_search import search_float_layers
        from edgekd.quantization.static import StaticQuantizer

        name = f"int8-{runtime}"
        folder = self.context.scratch / name
        folder.mkdir(parents=True, exist_ok=True)
        quantizer = StaticQuantizer(
            self.source,
            self.calibration,
            folder,
            runtime=runtime,
            calibration=self.wanted.calibration,
            keep=self.wanted.exclude_nodes,
            reduce_range=reduce_range(self.context.job),
        )
        # The search opens many similar files in this process.
        quantizer.write(folder / "all.onnx")
        if crash := self._crash(folder / "all.onnx"):
            return {name: self._refused(name, "static", runtime, crash)}
        self._say_unit()
        decision = search_float_layers(
            quantizer,
            self._out(name),
            self._drop_of,
            self.wanted.max_drop,
            samples=self.calibration,
        )
        for line in decision.lines():
            self.context.progress.message(f"  {name}: {line}")
        if decision.chosen is None:
            whole = decision.drop_all
            drop = "give no numbers" if whole is None else f"drop it by {whole:.4f}"
            return {
                name: {
                    "method": "static",
                    "runtime": runtime,
                    "decision": decision.to_json(),
                    "refused": f"no layer can stay in INT8 within a drop of "
                    f"{self.wanted.max_drop:g}; all of them {drop}",
                }
            }
        for mixed in quantizer.mixed:
            self.context.progress.message(
                f"  {name}: {mixed} stays in float32, as 8 bits of one scale would lose a part"
            )
        kept = (*self.wanted.exclude_nodes, *quantizer.mixed_nodes, *decision.kept)
        found = {name: self._entry(name, "static", runtime, kept, decision=decision.to_json())}
        if runtime == "cpu" and (first := quantizer.input_layers(decision.kept)):
            # Which of the two is faster is measured on the target.
            name = f"{name}-float-input"
            quantizer.write(self._out(name), (*decision.kept, *first))
            found[name] = self._entry(name, "static", runtime, (*kept, *first))
        return found

    def _say_unit(self) -> None:
        """Report the unit of drops, and a budget that is smaller than one sample."""
        task, count = self.validation.task, len(self.validation.scores)
        if not task.higher_is_better:
            self.context.progress.message(
                f"  drops of {task.metric} are shares of {self.validation.scale:.5g}, the error of "
                "the best constant prediction on the validation split"
            )
        if 0 < self.wanted.max_drop < 1 / count and isinstance(
            self.validation.task, Classification
        ):
            self.context.progress.message(
                f"  one of {count} validation samples is {1 / count:.4f}: more than quantize."
                f"max_drop = {self.wanted.max_drop:g}, so a single one keeps layers in float32"
            )

    def _qat(self, runtime: Runtime) -> dict[str, Any]:
        from edgekd.stages.qat import train_quantized

        name = f"int8-{runtime}-qat"
        history = train_quantized(
            self.task_data, self.context, self.inputs, runtime, self.wanted.qat, self._out(name)
        )
        write_json(self.context.out / f"{name}-history.json", history.to_json())
        # What torchao does not round (transposed and one-dimensional convolutions) stays in
        # float32.
        return {name: self._entry(name, "qat", runtime, _float_layers(self._out(name)))}

    def _drop_of(self, path: Path) -> float:
        return self.validation.drop_of(path)

    def _out(self, name: str) -> Path:
        return self.context.out / f"{name}.onnx"

    def _entry(
        self,
        name: str,
        method: str,
        runtime: Runtime | None,
        kept: Sequence[str] = (),
        **more: Any,
    ) -> dict[str, Any]:
        """A candidate's entry in the index: how it was made, and its difference to float32.

        ``kept`` are the layers that are intentionally in float32; a builder that finds another one
        there refuses the file.
        """
        from edgekd.quantization.float_weights import float_nodes
        from edgekd.quantization.mixed_precision_graph import write_rounded

        file = self._out(name)
        there = _node_names(file)
        entry: dict[str, Any] = {
            "method": method,
            "runtime": runtime,
            "file": file.name,
            "kept": [name for name in dict.fromkeys(kept) if name in there],
            **more,
        }
        runnable = file
        if method == "bf16":
            # ONNX Runtime's CPU provider has no such kernels: the same rounding, in float32.
            runnable = self.context.scratch / f"{name}-rounded.onnx"
            write_rounded(file, runnable, "bf16")
        if crash := self._crash(runnable):
            file.unlink()
            return self._refused(name, method, runtime, crash)
        # Dynamic ranges depend on the batch: with batch 1 the outputs are those on a device.
        batch = 1 if method == "dynamic" else EVALUATION_BATCH
        drop, errors = self.validation.compare(runnable, batch)
        self.context.progress.message(
            f"  {name}: {file.stat().st_size:,} of {self.source.stat().st_size:,} bytes, "
            f"validation {self.validation.change_text(drop)}"
        )
        if method in ("static", "dynamic", "weights-only"):
            rows = float_nodes(file, dict.fromkeys(kept, "kept"), f"no 8 bits in {method}")
            entry["float32_nodes"] = [row.to_json() for row in rows]
            if left := [row for row in rows if row.node not in kept]:
                nodes = ", ".join(f"{row.node} ({row.op})" for row in left[:_NAMED])
                rest = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
                total = sum(row.bytes for row in left)
                self.context.progress.message(
                    f"  {name}: {total:,} bytes of weights stay in float32: {nodes}{rest}"
                )
        found = [error.to_json() for error in errors]
        for remark in remarks_on_errors(found):
            self.context.progress.message(f"  {name}: {remark}")
        return entry | {"drop": drop, "drop_unit": self.validation.drop_unit, "errors": found}

    def _crash(self, file: Path) -> CrashError | None:
        try:
            self.opens(file)
        except CrashError as error:
            return error
        except EdgekdError:
            pass  # Errors that do not end a process are reported by the comparison.
        return None

    def _refused(
        self, name: str, method: str, runtime: Runtime | None, error: CrashError
    ) -> dict[str, Any]:
        """The entry in the index of a candidate that crashes a runtime."""
        self.context.progress.message(f"  {name}: {error.what}; it is no candidate")
        return {"method": method, "runtime": runtime, "refused": error.what}


def _node_names(file: Path) -> set[str]:
    from edgekd.onnx.file import read_onnx

    return {node.name for node in read_onnx(file).graph.node}


def _float_layers(file: Path) -> list[str]:
    """Layers of a Q/DQ file whose weights are in float32."""
    from edgekd.onnx.file import read_onnx

    nodes = read_onnx(file).graph.node
    given = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    return [node.name for node in nodes if node.op_type in WEIGHTED and node.input[1] not in given]


def _training_slice(config: PipelineConfig) -> dict[str, Any]:
    """Settings that quantization-aware training depends on besides its own section."""
    from edgekd.pipeline.fingerprint import library_versions

    return {
        "libraries": library_versions(("torchao",)),
        "distill": config.distill.model_dump(mode="json", exclude={"cache": {"folder"}}),
        "losses": [term.model_dump(mode="json") for term in config.loss_terms],
        "student": config.student.model_dump(mode="json", exclude={"checkpoint"}),
        "teacher": config.teacher.model_dump(mode="json", include={"model", "args"}),
        "augment": list(config.data.augment),
        "seed": config.seed,
    }
