"""The same as the command line, for a notebook or a script."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from edgekd.config.budgets import Budgets, GateConfig, load_budgets
from edgekd.config.pipeline import load_pipeline
from edgekd.config.profile import Profile, load_profile
from edgekd.errors import InputError
from edgekd.extension import searching
from edgekd.files import write_errors
from edgekd.pipeline.runner import Runner, RunOutcome, Workers, join_workers, up_to_date
from edgekd.pipeline.runner import plan as plan_run
from edgekd.pipeline.stage import Context, Job, Stage
from edgekd.pipeline.store import Store
from edgekd.progress import Console as SafeConsole
from edgekd.progress import ConsoleProgress, EventLog
from edgekd.stages import STAGES, preflight

if TYPE_CHECKING:
    from edgekd.release.gate import Verdict
    from edgekd.release.result import Result


def open_job(pipeline: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read a pipeline file and the profile it names.

    Raises:
        InputError: something in them is wrong.
    """
    path = Path(pipeline)
    config = load_pipeline(path, overrides)
    base = Path(os.path.realpath(path)).parent
    return Job(config, base, load_profile(config.profile, base))


def run_folder(job: Job, output: str | Path | None = None) -> Path:
    """The folder of a job's artifacts: ``output``, or ``runs/<name>`` in the working folder.

    Raises:
        InputError: the path exists and is not a folder.
    """
    folder = Path(output) if output is not None else Path("runs") / job.config.name
    if folder.exists() and not folder.is_dir():
        raise InputError(
            "the run folder is a file", where=str(folder), remedy="give another --output"
        )
    return folder


def execute(
    job: Job,
    folder: Path,
    until: str | None = None,
    console: Console | None = None,
    workers: Workers | None = None,
    stages: tuple[Stage, ...] = STAGES,
) -> RunOutcome:
    """Run a job with progress on ``console`` (None: silently) and a log in its run folder.

    Where every stage is up to date, nothing is written, and the folder may be read-only.

    ``workers``: the processes that train together, of which this is the first; None: a single
    process.

    Returns:
        The outcome of the run. ``outcome.failure`` is set when the gate did not pass.

    Raises:
        EdgekdError: as the stages raise, except :class:`edgekd.errors.GateFailed`.
    """
    # Read when torch loads its thread pool. Its default of spinning for milliseconds makes two
    # threads many times slower than one as soon as anything else wants the processor.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    store = Store(folder)
    shown = console or SafeConsole()
    finished = up_to_date(job, folder, stages, until)
    if finished is not None:
        _remove_leftovers(store)
        progress = ConsoleProgress(shown, quiet=console is None)
        for stage in finished.artifacts:
            progress.message(f"{stage}: unchanged, skipped")
        return finished
    store.acquire()
    try:
        log = EventLog(folder / "log.jsonl")
        try:
            with (
                _temporary_files(folder),
                ConsoleProgress(shown, log, quiet=console is None) as progress,
            ):
                runner = Runner(job, store, progress, stages, log, workers, preflight)
                return runner.run(until)
        finally:
            log.close()
    finally:
        store.release()


def _temporary_folder(folder: Path) -> Path:
    """In the run folder or, where the user set TMPDIR for a larger disk, of its name there."""
    chosen = os.environ.get("TMPDIR")
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return Path(chosen) / f"edgekd-{name}" if chosen else folder.resolve() / "tmp"


def _remove_leftovers(store: Store) -> None:
    """Remove what a killed run left, where this is possible and they are not those of a run in
    progress.
    """
    temporary = _temporary_folder(store.folder)
    if store.has_leftovers() or temporary.exists():
        with suppress(InputError):
            store.acquire()
            shutil.rmtree(temporary, ignore_errors=True)
            store.release()


@contextmanager
def _temporary_files(folder: Path) -> Iterator[None]:
    """Put temporary files, also those of processes that are started, into the run folder.

    What a killed run left is removed by the next one.
    """
    chosen = os.environ.get("TMPDIR")
    place = _temporary_folder(folder)
    before = tempfile.tempdir
    shutil.rmtree(place, ignore_errors=True)
    remedy = "free space there, or set TMPDIR to a larger disk"
    with write_errors(place, "the folder of temporary files", remedy):
        place.mkdir(mode=0o700)
    tempfile.tempdir = os.environ["TMPDIR"] = str(place)
    try:
        yield
    finally:
        tempfile.tempdir = before
        if chosen is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = chosen
        shutil.rmtree(place, ignore_errors=True)


def run(
    pipeline: str | Path,
    *,
    until: str | None = None,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    console: Console | None = None,
) -> RunOutcome:
    """Run a pipeline file, completely or up to a stage; stages that are up to date are skipped.

    Of several processes that ``torchrun`` started, the first runs the stages and the others only
    train with it; their outcome is empty.

    Args:
        pipeline: the YAML file.
        until: the last stage to run; None runs all.
        overrides: ``key.sub=value`` strings that replace values of the file.
        output: the run folder; ``runs/<name>`` by default.
        console: where progress is shown; None shows none.

    Raises:
        GateFailed: the gate did not pass; the report is written nevertheless.
        EdgekdError: a stage failed or the input is wrong.
    """
    with join_workers() as workers:
        if workers is not None and not workers.is_main:
            workers.serve(STAGES)
            return RunOutcome()
        job = open_job(pipeline, overrides)
        outcome = execute(job, run_folder(job, output), until, console, workers)
        if outcome.failure is not None:
            raise outcome.failure
        return outcome


def measure_students(job: Job, folder: Path, console: Console | None = None) -> dict[str, Any]:
    """Propose and measure the candidates of a search; nothing is trained.

    Returns:
        The record, as ``search.json`` has it; without a feasible candidate it says so.

    Raises:
        EdgekdError: as the stages raise.
    """
    stages = _survey_stages(job, folder)
    outcome = execute(job, folder, console=console, stages=stages)
    return _read_record(outcome.folder(stages[-1].name))


def plan_students(job: Job, folder: Path, console: Console | None = None) -> dict[str, Any]:
    """What is known of a search's candidates: chosen, measured, or predicted without running any.

    The data are prepared where they were not, for the shapes of the networks.

    Raises:
        EdgekdError: the data or the teacher's network cannot be opened.
    """
    from edgekd.stages.survey import predicted_survey

    survey = _survey_stages(job, folder)
    for stages in (STAGES[:3], survey):
        done = _finished(job, folder, stages)
        if (found := done.get(stages[-1].name)) is not None:
            return _read_record(found)
    if "data" not in done:
        execute(job, folder, "data", console)
        done = _finished(job, folder, STAGES[:2])
    shown = ConsoleProgress(console or SafeConsole(), quiet=console is None)
    with tempfile.TemporaryDirectory() as scratch, searching(job.base), shown as progress:
        preflight(job, gated=False)
        place = Path(scratch)
        context = Context(job, place, place, folder / "cache", progress, {})
        return predicted_survey(context, done["data"], done.get("teacher"))


def _survey_stages(job: Job, folder: Path) -> tuple[Stage, ...]:
    """The stages of :func:`measure_students`: with the teacher's unless it would be trained."""
    from edgekd.stages.survey import CandidatesStage

    with_teacher = job.config.teacher.train is None or "teacher" in _finished(
        job, folder, STAGES[:2]
    )
    inputs = ("data", "teacher") if with_teacher else ("data",)
    return (*STAGES[: len(inputs)], CandidatesStage(inputs))


def _finished(job: Job, folder: Path, stages: tuple[Stage, ...]) -> dict[str, Path]:
    """The artifacts of those of these stages that are up to date."""
    rows = plan_run(job, folder, stages)
    return {row.stage: row.artifact.folder for row in rows if row.artifact is not None}


def _read_record(folder: Path) -> dict[str, Any]:
    from edgekd.release.student_search import SCHEMA, SEARCH
    from edgekd.stages.task_data import read_json

    return read_json(folder / SEARCH, SCHEMA)


def export(pipeline: str | Path, **options: Any) -> RunOutcome:
    """Run a pipeline file up to the ONNX files; options as of :func:`run`."""
    return run(pipeline, until="export", **options)


def build(pipeline: str | Path, **options: Any) -> RunOutcome:
    """Run a pipeline file up to the engines; options as of :func:`run`."""
    return run(pipeline, until="engines", **options)


def quantize(
    model: str | Path,
    out: str | Path,
    calibration: str | Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Write an ONNX model in fewer bits, and return the record of gains and losses.

    The settings are those of :class:`edgekd.quantization.quantize_onnx.QuantizeSettings`; the
    samples are an npz file of real inputs by name.

    Raises:
        InputError: the model, the samples or a setting do not fit.
        StageError: the file cannot be written or does not run.
    """
    from edgekd.extension import check_arguments
    from edgekd.quantization.quantize_model import quantize_model
    from edgekd.quantization.quantize_onnx import QuantizeSettings

    given = check_arguments(QuantizeSettings, settings, name="quantize", where="settings")
    samples = None if calibration is None else Path(calibration)
    return quantize_model(Path(model), Path(out), samples, QuantizeSettings(**given))


def benchmark(
    model: str | Path, against: str | Path | None = None, target: str = "local", **settings: Any
) -> dict[str, Any]:
    """Measure an ONNX file in a fresh process, alone or interleaved with another one.

    The settings are those of :meth:`edgekd.targets.local.LocalTarget.bench`.

    Raises:
        InputError: a file or an input does not fit.
        TargetError: the process that measures could not be started or failed.
    """
    from edgekd.targets import open_target

    other = Path(against) if against is not None else None
    return open_target(target).bench(Path(model), against=other, **settings)


def gate(
    result: Result | Mapping[str, Any],
    budgets: GateConfig | str | Path,
    profile: Profile | None = None,
) -> list[Verdict]:
    """Check a result against budgets, given as a model or as a YAML file.

    A limit of the profile holds where the budgets leave its key out.

    Raises:
        InputError: the result or the budgets are wrong, or there is nothing to check.
    """
    from edgekd.release.gate import evaluate
    from edgekd.release.result import Result

    given = budgets if isinstance(budgets, GateConfig) else load_budgets(Path(budgets))
    found = result if isinstance(result, Result) else Result.from_json(result)
    return evaluate(found, Budgets.resolve(given, profile))


def load_result(run: str | Path) -> Result:
    """Read the figures of a run.

    Args:
        run: the folder of a run that reached its benchmark stage, or a ``result.json``.

    Returns:
        The models' figures (``result.student.metric.value``, ``result.models["teacher"]``) and
        the comparisons between them (``result.comparison["speedup"].interval``).

    Raises:
        InputError: there is no result, or it is damaged.
    """
    from edgekd.release.compare import find_result
    from edgekd.release.result import read_result

    return read_result(find_result(Path(run)))
