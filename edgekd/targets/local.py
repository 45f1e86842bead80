"""This machine as a target: edgerun in a fresh process without torch and without edgekd."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekd.errors import CrashError, EdgekdError, InputError, StageError, TargetError
from edgekd.files import edgerun_folder
from edgerun.system import PARENT

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
STDERR_LINES = 10
RUN_FAILED, CANNOT_WRITE = 3, 5
"""The codes with which edgerun ends where the runtime fails, and where a file cannot be written."""
PROBE_SECONDS = 300.0
LEVELS = ("all", "extended", "basic", "disabled")
"""ONNX Runtime's levels of graph optimization, the highest first."""


class LocalTarget:
    """Runs ``python -m edgerun`` with this interpreter, one fresh process for each call.

    All methods raise InputError when edgerun finds the input wrong, StageError when it cannot
    write a file, and TargetError when it cannot be started or finds no GPU for an engine. Where a
    runtime fails on a model, :meth:`bench`, :meth:`run` and :meth:`probe` raise StageError, and
    CrashError where it ends the process; the others raise TargetError then.
    """

    name = "local"

    def bench(
        self,
        model: Path,
        against: Path | None = None,
        *,
        inputs: Path | None = None,
        shapes: Sequence[str] = (),
        batch: int | None = None,
        threads: int | None = None,
        providers: Sequence[str] = (),
        provider_options: Mapping[str, Mapping[str, str]] | None = None,
        against_options: Mapping[str, Mapping[str, str]] | None = None,
        optimization: str = "all",
        min_queries: int = 1000,
        max_seconds: float = 60.0,
        seed: int = 0,
        memory: bool = True,
    ) -> dict[str, Any]:
        """Measure one model, or two in interleaved rounds: a record ``edgerun.bench/1``.

        Args:
            model: an ONNX file.
            against: another one; the record's ratio is its p50 over the model's.
            inputs: an npz file with the models' inputs; None makes random ones.
            shapes: ``NAME=1x3x224x224`` for random inputs.
            batch: samples of one query.
            threads: the runtime's threads for one operator; None: the runtime's default.
            providers: ONNX Runtime's execution providers in order; none is the CPU.
            provider_options: of these providers by name; see
                :attr:`edgekd.engines.onnxruntime.EngineInfo.provider_options`.
            against_options: those with which ``against`` is opened, a file of another precision
                for example; None is ``provider_options``.
            optimization: ``disabled``, ``basic``, ``extended`` or ``all``.
            min_queries: timed queries of each model, unless ``max_seconds`` are over before.
            max_seconds: of timing both models.
            seed: of random inputs.
            memory: whether to measure peak memory, in additional processes.
        """
        words = [
            f"--min-queries={min_queries}",
            f"--max-seconds={max_seconds}",
            f"--seed={seed}",
            *_settings(batch, threads, providers, provider_options, optimization),
        ]
        if against is not None:
            words += ["--against", _absolute(against)]
            if against_options is not None:
                words += ["--against-provider-options", _json(against_options)]
        if inputs is not None:
            words += ["--inputs", _absolute(inputs)]
        for shape in shapes:
            words += [f"--shape={shape}"]
        if not memory:
            words += ["--no-memory"]
        try:
            return _edgerun_json("bench", [*words, "--", _absolute(model)], threads)
        except CrashError as crash:
            options = (provider_options, against_options or provider_options)
            for path, own in zip((model, against), options, strict=True):
                if path is not None:
                    self._explain(
                        path,
                        inputs=inputs,
                        shapes=shapes,
                        batch=batch,
                        threads=threads,
                        providers=providers,
                        provider_options=own,
                        optimization=optimization,
                    )
            crash.where = crash.where or str(model)
            raise

    def run(
        self,
        model: Path,
        inputs: Path,
        output: Path,
        *,
        batch: int | None = None,
        threads: int | None = None,
        providers: Sequence[str] = (),
        provider_options: Mapping[str, Mapping[str, str]] | None = None,
        optimization: str = "all",
        manifest: Path | None = None,
        raw: bool = False,
    ) -> None:
        """Write the model's outputs for every sample of an npz file to another one.

        Args:
            model: an ONNX file.
            inputs: an npz file with the model's inputs by name.
            output: the npz file to write, the outputs by name.
            batch: samples of one call; None is edgerun's choice.
            threads: as in :meth:`bench`.
            providers: as in :meth:`bench`.
            provider_options: as in :meth:`bench`.
            optimization: as in :meth:`bench`.
            manifest: the manifest whose preprocessing raw samples need.
            raw: preprocess samples of any dtype, not only uint8.
        """
        words = ["--inputs", _absolute(inputs), "--output", _absolute(output)]
        words += _settings(batch, threads, providers, provider_options, optimization)
        if manifest is not None:
            words += ["--manifest", _absolute(manifest)]
        if raw:
            words += ["--raw"]
        try:
            _edgerun("run", [*words, "--", _absolute(model)], threads)
        except CrashError as crash:
            self._explain(
                model,
                inputs=inputs,
                batch=batch,
                threads=threads,
                providers=providers,
                provider_options=provider_options,
                optimization=optimization,
            )
            crash.where = crash.where or str(model)
            raise

    def probe(
        self,
        model: Path,
        *,
        inputs: Path | None = None,
        shapes: Sequence[str] = (),
        batch: int | None = None,
        threads: int | None = None,
        providers: Sequence[str] = (),
        provider_options: Mapping[str, Mapping[str, str]] | None = None,
        optimization: str = "all",
        run: bool = True,
        max_seconds: float = PROBE_SECONDS,
    ) -> dict[str, Any]:
        """Open a model and run it once: a record ``edgerun.probe/1``.

        Args:
            model: an ONNX file.
            inputs: as in :meth:`bench`; where random ones do not fit the model, it is only opened.
            shapes: as in :meth:`bench`.
            batch: as in :meth:`bench`.
            threads: as in :meth:`bench`.
            providers: as in :meth:`bench`.
            provider_options: as in :meth:`bench`.
            optimization: as in :meth:`bench`.
            run: whether to run it at all.
            max_seconds: time limit.

        Raises:
            CrashError: the runtime ends the process. Where it does so at a high level of graph
                optimization, lower ones were tried and the remedy names the one that works.
            StageError: it takes longer than ``max_seconds``.
        """
        settings: dict[str, Any] = {
            "inputs": inputs,
            "shapes": shapes,
            "batch": batch,
            "threads": threads,
            "providers": providers,
            "provider_options": provider_options,
            "run": run,
            "max_seconds": max_seconds,
        }
        try:
            return _probe(model, optimization=optimization, **settings)
        except CrashError as crash:
            crash.remedy = _remedy(crash, model, optimization, settings)
            raise

    def _explain(self, model: Path, **settings: Any) -> None:
        """Raise the error that names the model and the step, if a probe is ended as well."""
        try:
            self.probe(model, **settings)
        except CrashError:
            raise
        except EdgekdError:
            return  # That is not what ended the process.

    def build(
        self,
        model: Path,
        engine: Path,
        *,
        library: str,
        compute_capabilities: Sequence[str] = (),
        precision: str | None = None,
        keep: Sequence[str] = (),
        shapes: Sequence[str] = (),
        batch: int = 1,
        workspace_mb: float | None = None,
        timing_cache: Path | None = None,
        version_compatible: bool = False,
        hardware_compatible: bool = False,
        dla: int | None = None,
        gpu_fallback: bool = True,
    ) -> dict[str, Any]:
        """Build a TensorRT engine: a record ``edgerun.build/1``, also written next to the engine.

        Args:
            model: an ONNX file.
            engine: the file to write.
            library: ``tensorrt`` or ``tensorrt-rtx``.
            compute_capabilities: ``("8.6", "8.9")``, the GPUs to build for; tensorrt-rtx alone.
            precision: ``fp32``, ``fp16``, ``bf16`` or ``int8``, which convolutions and matrix
                products must then have; None: the model's own precision.
            keep: nodes that may stay in a wider precision.
            shapes: ``NAME=MIN:USUAL:MAX`` of inputs with open dimensions.
            batch: usual and largest size of an open batch dimension without a shape.
            workspace_mb: limit of scratch memory.
            timing_cache: a file to read and write; tensorrt alone.
            version_compatible: also loadable by later releases.
            hardware_compatible: also loadable on other GPUs from Ampere on; tensorrt alone.
            dla: the core of a Jetson's DLA.
            gpu_fallback: whether what the DLA cannot run may run on the GPU.
        """
        words = ["--engine", _absolute(engine), "--library", library, "--batch", str(batch)]
        words += [f"--sm={capability}" for capability in compute_capabilities]
        words += [f"--keep={node}" for node in keep]
        words += [f"--shape={shape}" for shape in shapes]
        if precision is not None:
            words += ["--precision", precision]
        if workspace_mb is not None:
            words += ["--workspace-mb", str(workspace_mb)]
        if timing_cache is not None:
            words += ["--timing-cache", _absolute(timing_cache)]
        if dla is not None:
            words += ["--dla", str(dla)]
        switches = {
            "--version-compatible": version_compatible,
            "--hardware-compatible": hardware_compatible,
            "--no-gpu-fallback": not gpu_fallback,
        }
        words += [switch for switch, on in switches.items() if on]
        return _edgerun_json("build", [*words, "--", _absolute(model)], None)

    def parse(self, model: Path, library: str) -> dict[str, Any]:
        """The verdict of TensorRT's parser on a model: a record ``edgerun.parse/1``."""
        return _edgerun_json("parse", ["--library", library, "--", _absolute(model)], None)

    def info(self, model: Path | None = None) -> dict[str, Any]:
        """Describe this machine, and a model's inputs and outputs: ``edgerun.info/1``."""
        return _edgerun_json("info", [] if model is None else ["--", _absolute(model)], None)


def clean_environment(threads: int | None) -> dict[str, str]:
    """The environment of a measuring process.

    Python's own variables are dropped, so that nothing of this process's packages or settings
    is inherited but the interpreter; PYTHONPATH is edgerun's parent alone.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    kept["PYTHONPATH"] = str(edgerun_folder().parent)
    kept[PARENT] = str(os.getpid())
    # numpy's libraries allocate buffers for each thread when imported: memory that no model needs.
    kept.update(dict.fromkeys(THREAD_VARIABLES, str(threads or 1)))
    return kept


def _settings(
    batch: int | None,
    threads: int | None,
    providers: Sequence[str],
    provider_options: Mapping[str, Mapping[str, str]] | None,
    optimization: str,
) -> list[str]:
    words = ["--optimization", optimization]
    if batch is not None:
        words += ["--batch", str(batch)]
    if threads is not None:
        words += ["--threads", str(threads)]
    if providers:
        words += ["--providers", ",".join(providers)]
    if provider_options:
        words += ["--provider-options", _json(provider_options)]
    return words


def _json(provider_options: Mapping[str, Mapping[str, str]]) -> str:
    return json.dumps({name: dict(options) for name, options in provider_options.items()})


def _probe(
    model: Path,
    *,
    inputs: Path | None,
    shapes: Sequence[str],
    batch: int | None,
    threads: int | None,
    providers: Sequence[str],
    provider_options: Mapping[str, Mapping[str, str]] | None,
    optimization: str,
    run: bool,
    max_seconds: float,
) -> dict[str, Any]:
    words = _settings(batch, threads, providers, provider_options, optimization)
    if inputs is not None:
        words += ["--inputs", _absolute(inputs)]
    words += [f"--shape={shape}" for shape in shapes]
    if not run:
        words += ["--no-run"]
    try:
        return _edgerun_json("probe", [*words, "--", _absolute(model)], threads, max_seconds)
    except CrashError as crash:
        crash.where = str(model)
        raise


def _remedy(crash: CrashError, model: Path, level: str, settings: dict[str, Any]) -> str:
    """The remedy for a model that crashes the process; lower levels of optimization are tried."""
    if crash.signal == signal.SIGKILL:
        return "it is often the system that ends a process so, for memory: free some"
    for lower in LEVELS[LEVELS.index(level) + 1 :]:
        try:
            ran = _probe(model, optimization=lower, **settings)["ran"]
        except EdgekdError:
            continue
        return (
            f"at graph optimization level {lower!r} it {'opens and runs' if ran else 'opens'} "
            f"(tried here): give 'edgekd build' or 'benchmark' --optimization {lower}, in a "
            f"pipeline engines: [{{kind: onnxruntime, optimization: {lower}}}], and a program of "
            "your own SessionOptions.graph_optimization_level"
        )
    if crash.signal == signal.SIGFPE:
        return (
            "that is a division of whole numbers without a result (by 0, or of the smallest by "
            "-1): give real inputs (--inputs DATA.npz)"
        )
    return (
        "no lower level of graph optimization helps (tried here); another release of ONNX "
        "Runtime may, or an export in another opset"
    )


def _edgerun_json(
    command: str, words: Sequence[str], threads: int | None, max_seconds: float | None = None
) -> dict[str, Any]:
    """Run edgerun with ``--json`` and read its record."""
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        path = Path(folder) / "answer.json"
        _edgerun(command, ["--json", str(path), *words], threads, max_seconds)
        try:
            answer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TargetError(
                f"edgerun {command} ended well but left no readable result: {error}",
                where=LocalTarget.name,
                remedy="check the space in the temporary folder",
            ) from error
    return answer


def _edgerun(
    command: str, words: Sequence[str], threads: int | None, max_seconds: float | None = None
) -> None:
    # An empty working folder: 'python -m' would prefer a numpy.py in the current folder.
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "edgerun", command, *words],
                # Temporary files of a crashed process are removed with this folder.
                env=clean_environment(threads) | {"TMPDIR": folder},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=max_seconds,
            )
        except subprocess.TimeoutExpired as error:
            raise StageError(
                f"the model was not opened and run once within {max_seconds:g} s",
                where=words[-1],
                remedy="give smaller inputs, or a smaller model",
            ) from error
        except OSError as error:
            raise TargetError(
                f"{sys.executable} could not be started: {error}", where=LocalTarget.name
            ) from error
    if done.returncode != 0:
        from edgekd.onnx.file import ENGINE_SUFFIXES

        # An engine fails for what the machine lacks, an ONNX model by itself.
        runs_model = command in ("bench", "run", "probe")
        runs_model = runs_model and not words[-1].lower().endswith(ENGINE_SUFFIXES)
        raise _error(command, done, Path(words[-1]).name if runs_model else None)


def _error(command: str, done: subprocess.CompletedProcess[str], model: str | None) -> EdgekdError:
    """The error that a failed edgerun reported, or what it last wrote when it crashed."""
    code = done.returncode
    what, where, remedy = _reported(done.stderr)
    if what is not None and code == InputError.exit_code:
        return InputError(what, where=where, remedy=remedy)
    if what is not None and (code == CANNOT_WRITE or (model is not None and code == RUN_FAILED)):
        return StageError(what, where=where, remedy=remedy)
    if what is not None:
        return TargetError(what, where=where or LocalTarget.name, remedy=remedy)
    last = "\n".join(f"    {line}" for line in done.stderr.strip().splitlines()[-STDERR_LINES:])
    wrote = f"; it last wrote:\n{last}" if last else ""
    if code < 0 and model is not None:
        steps = {"opens": f"while it opened {model}", "runs": f"while it ran {model}"}
        step = steps.get((done.stdout.strip().splitlines() or [""])[-1], f"in edgerun {command}")
        return CrashError(
            f"ONNX Runtime was killed by signal {named_signal(-code)} {step}{wrote}",
            signal=-code,
            remedy="signal 9 often means that the memory ran out" if code == -9 else None,
        )
    ending = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return TargetError(
        f"edgerun {command} {ending}{wrote}",
        where=LocalTarget.name,
        remedy="signal 9 often means that the memory ran out" if code == -9 else None,
    )


def named_signal(number: int) -> str:
    """``11`` → ``11 (SIGSEGV)``; without a name, the number alone."""
    try:
        return f"{number} ({signal.Signals(number).name})"
    except ValueError:
        return str(number)


def _reported(stderr: str) -> tuple[str | None, str | None, str | None]:
    """What, where and remedy of edgerun's own message; three Nones when there is none."""
    what: list[str] = []
    fields: dict[str, str] = {}
    for line in stderr.splitlines():
        if line.startswith("edgerun: "):
            what, fields = [line.removeprefix("edgerun: ")], {}
        elif what and line.startswith(("  where: ", "  to do: ")):
            fields[line[2:7]] = line[9:]
        elif what and not fields:
            what.append(line)
    return "\n".join(what) or None, fields.get("where"), fields.get("to do")


def _absolute(path: Path) -> str:
    return str(Path(path).resolve())
