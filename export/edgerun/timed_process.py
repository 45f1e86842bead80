"""One of the fresh processes in which a benchmark times its models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Mapping, Sequence

from edgerun.contention import Contention, read_counters
from edgerun.errors import AS_JSON, BadInput, EdgerunError, RunFailed
from edgerun.inputs import Feeds, feeds_from, make_feeds
from edgerun.manifest import manifest_beside
from edgerun.model import LoadedModel, Settings
from edgerun.process import PARENT, end_with_parent
from edgerun.run import open_model
from edgerun.system import read_clock
from edgerun.timing import (
    LEAST_WARM_UP_SECONDS,
    WARM_UP_SHARE,
    Stopwatch,
    device_times,
    timed_rounds,
)

DEVICE_SHARE = 0.25
"""The pass that times an engine's queries on the GPU alone takes at most this share of the time."""


@dataclass(frozen=True)
class BenchOptions:
    """Settings of a benchmark: what to measure and for how long.

    Attributes:
        models: one path, or two to compare.
        settings: settings for opening the models.
        against_settings: the second one's, where they differ.
        inputs: an npz file with the models' inputs; None makes random ones from ``seed``. Raw
            uint8 data is preprocessed by the manifest of the bundle that contains the model.
        shapes: sizes by input name, for random inputs.
        batch: samples of one query; None: the model's fixed batch, or 1.
        min_queries: timed queries of each model in all processes, unless ``max_seconds`` is
            reached first.
        max_seconds: of timing; as long as it lasts, processes are added until the figures are
            as narrow as :func:`edgerun.bench.bench` wants them.
        memory: whether to measure peak memory, in separate processes.
        processes: fresh processes at least, each of which opens the models anew.
        max_processes: at most; None is three times as many.
        budgets: limits by percentile of the first model (``p95``) in ms, and of how many times
            slower the second model is (``speedup``): processes are added until each is outside
            its interval.
    """

    models: tuple[Path, ...]
    settings: Settings
    inputs: Path | None = None
    shapes: Mapping[str, tuple[int, ...]] | None = None
    batch: int | None = None
    seed: int = 0
    min_queries: int = 1000
    max_seconds: float = 60.0
    memory: bool = True
    against_settings: Settings | None = None
    processes: int = 5
    max_processes: int | None = None
    budgets: Mapping[str, float] = field(default_factory=dict)

    def settings_of(self, index: int) -> Settings:
        """The settings of the model at an index of ``models``."""
        return self.settings if index == 0 else self.against_settings or self.settings


@dataclass(frozen=True)
class Share:
    """The part of a benchmark that one process does.

    Attributes:
        queries: timed queries of each model at least.
        rounds: at least, in each of which each model has a block of queries.
        seconds: for warm-up and timing.
        turned: open and time the second model first, so that being the first is no advantage.
    """

    queries: int
    rounds: int
    seconds: float
    turned: bool = False


@dataclass(frozen=True)
class TimedModel:
    """What one process measured of one model; times in ms.

    Attributes:
        load_ms: of opening it.
        first_ms: of its first query.
        warmup: :meth:`edgerun.timing.WarmUp.to_json`.
        rounds: latencies by round, by query.
        device: of queries on the GPU alone; None for an ONNX file.
    """

    load_ms: float
    first_ms: float
    warmup: dict[str, Any]
    rounds: list[list[float]]
    device: list[float] | None

    @property
    def samples(self) -> list[float]:
        """The latencies of all queries."""
        return [ms for block in self.rounds for ms in block]


@dataclass(frozen=True)
class TimedProcess:
    """What one process measured: its models in the order of the options, and the machine."""

    models: list[TimedModel]
    contention: Contention
    clock_mhz: float | None

    def to_json(self) -> dict[str, Any]:
        """A plain mapping, without the latencies."""
        return {
            "models": [
                {
                    "queries": len(model.samples),
                    "queries_per_round": len(model.rounds[0]),
                    "load_ms": round(model.load_ms, 3),
                    "first_ms": round(model.first_ms, 6),
                    "warmup": model.warmup,
                }
                for model in self.models
            ],
            "contention": self.contention.to_json(),
            "clock_mhz": self.clock_mhz,
        }


def make_all_feeds(config: BenchOptions, models: Sequence[LoadedModel]) -> list[Feeds]:
    """The feeds of each model, from the file or random.

    Raises:
        BadInput: they do not fit the models.
    """
    if config.inputs is not None:
        if config.shapes:
            raise BadInput(
                "shapes are for random inputs; the file's arrays have their own",
                where="--shape",
                remedy="leave out --shape or --inputs",
            )
        return [
            feeds_from(config.inputs, model.inputs, config.batch, manifest_beside(model.path))
            for model in models
        ]
    shapes = config.shapes or {}
    known = {tensor.name for model in models for tensor in model.inputs}
    for name in shapes:
        if name not in known:
            raise BadInput(
                f"there is no input {name!r}",
                where="--shape",
                remedy=f"the inputs are: {', '.join(str(t) for m in models for t in m.inputs)}",
            )
    return [make_feeds(model.inputs, shapes, config.batch, config.seed) for model in models]


def time_models(config: BenchOptions, share: Share) -> TimedProcess:
    """Open the models in this process and time them.

    Raises:
        BadInput, RunFailed: a model cannot be opened or run.
    """
    order = list(range(len(config.models)))
    order = order[::-1] if share.turned else order
    watches, cold = [], []
    for index in order:
        model = open_model(config.models[index], config.settings_of(index))
        alone = replace(config, shapes=_shapes_of(config, model))
        watch = Stopwatch(model, make_all_feeds(alone, [model])[0])
        cold.append((model.load_ms, watch.block(1)[0]))
        watches.append(watch)
    for watch in watches:
        watch.check()
    before = read_counters()
    warm_ups = [
        watch.warm_up(max(share.seconds * WARM_UP_SHARE / len(watches), LEAST_WARM_UP_SECONDS))
        for watch in watches
    ]
    rounds = timed_rounds(watches, warm_ups, share.queries, share.seconds, share.rounds)
    clock, contention = read_clock(), Contention.between(before, read_counters())
    device = [device_times(watch, share.queries, share.seconds * DEVICE_SHARE) for watch in watches]
    timed = {
        index: TimedModel(*cold[i], warm_ups[i].to_json(), _rounded(rounds[i]), device[i])
        for i, index in enumerate(order)
    }
    return TimedProcess([timed[index] for index in sorted(timed)], contention, clock)


def _shapes_of(config: BenchOptions, model: LoadedModel) -> Mapping[str, tuple[int, ...]] | None:
    names = {tensor.name for tensor in model.inputs}
    return config.shapes and {k: v for k, v in config.shapes.items() if k in names}


def _rounded(rounds: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[round(ms, 6) for ms in block] for block in rounds]


def run_timed_process(config: BenchOptions, share: Share) -> TimedProcess:
    """:func:`time_models` in a fresh process.

    Raises:
        BadInput, RunFailed: as that, or the process ended without a result.
    """
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parent.parent))
    environment.update({PARENT: str(os.getpid()), AS_JSON: "json"})
    with tempfile.TemporaryDirectory(prefix="edgerun-") as folder:
        job, out = Path(folder) / "job.json", Path(folder) / "timed.json"
        job.write_text(json.dumps({"config": _plain(config), "share": vars(share)}), "utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "edgerun.timed_process", str(job), str(out)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode != 0:
            raise _failure(done)
        return _read(json.loads(out.read_text("utf-8")))


def _failure(done: subprocess.CompletedProcess[str]) -> EdgerunError:
    lines = done.stderr.strip().splitlines()
    for line in reversed(lines):
        if line.startswith('{"edgerun_error": '):
            found = json.loads(line)["edgerun_error"]
            kind = BadInput if found["code"] == BadInput.exit_code else RunFailed
            return kind(found["what"], found["where"], found["remedy"])
    last = "\n".join(lines[-5:])
    return RunFailed(
        f"a timing process ended with code {done.returncode}: {last}",
        remedy="a negative code is a signal; 9 often means that the memory ran out",
    )


def _plain(config: BenchOptions) -> dict[str, Any]:
    """The options as JSON values; :func:`_options` reads them. Relative paths stay so."""
    given = [config.settings_of(index) for index in range(len(config.models))]
    settings = [
        {
            **vars(each),
            "provider_options": {name: dict(o) for name, o in each.provider_options.items()},
        }
        for each in given
    ]
    return {
        "models": [str(path) for path in config.models],
        "settings": settings,
        "inputs": None if config.inputs is None else str(config.inputs),
        "shapes": config.shapes and dict(config.shapes),
        "batch": config.batch,
        "seed": config.seed,
    }


def _options(given: dict[str, Any]) -> BenchOptions:
    settings = [Settings(**{**s, "providers": tuple(s["providers"])}) for s in given["settings"]]
    shapes = given["shapes"] and {name: tuple(sizes) for name, sizes in given["shapes"].items()}
    return BenchOptions(
        models=tuple(map(Path, given["models"])),
        settings=settings[0],
        against_settings=settings[-1],
        inputs=given["inputs"] and Path(given["inputs"]),
        shapes=shapes,
        batch=given["batch"],
        seed=given["seed"],
    )


def _read(given: dict[str, Any]) -> TimedProcess:
    models = [TimedModel(**model) for model in given["models"]]
    return TimedProcess(models, Contention(**given["contention"]), given["clock_mhz"])


def _main(job: Path, out: Path) -> int:
    given = json.loads(job.read_text("utf-8"))
    try:
        timed = time_models(_options(given["config"]), Share(**given["share"]))
    except EdgerunError as error:
        return error.report()
    models = [vars(model) for model in timed.models]
    content = {**vars(timed), "models": models, "contention": vars(timed.contention)}
    out.write_text(json.dumps(content), "utf-8")
    return 0


if __name__ == "__main__":
    end_with_parent()
    sys.exit(_main(Path(sys.argv[1]), Path(sys.argv[2])))
