"""A candidate is measured once, in as many processes as its limits need, and nothing is lost."""

import json

import pytest
import torch
from torch import nn

from edgekd.api import execute, open_job
from edgekd.errors import InputError, StageError, TargetError
from edgekd.models import DictModel
from edgekd.pipeline.stage import Context
from edgekd.progress import Console, ConsoleProgress
from edgekd.spec import ModelSpec
from edgekd.stages.measure_candidate import (
    MOST_PROCESSES,
    measure_candidate,
    measure_footprint,
    over_processes,
)
from edgekd.stages.task_data import open_task_data
from edgekd.students.constraints import Limits

PIPELINE = """
name: p
data: {source: digits}
profile: host
teacher: {model: convnet-s, train: {epochs: 1}}
student: {model: convnet-xs}
quantize: {int8: static}
"""


class Target:
    """Answers with the next latency, in ms, or raises the next error."""

    name = "local"

    def __init__(self, *answers, faster=2.0, memory=20.0):
        self.answers, self.faster, self.memory = list(answers), faster, memory
        self.calls = 0

    def bench(self, model, against=None, **settings):
        self.calls += 1
        p50 = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(p50, Exception):
            raise p50
        latency = {
            name: {"value": p50 * by, "interval": [p50 * by * 0.99, p50 * by * 1.01]}
            for name, by in {"p50": 1, "p90": 1.1, "p95": 1.2, "p99": 2}.items()
        }
        memory = {"above_empty_mb": self.memory} if settings["memory"] else None
        ratio = {"ratio": self.faster, "interval": [self.faster * 0.99, self.faster * 1.01]}
        return {
            "models": [{"latency": latency, "memory": memory}],
            "comparison": ratio if against else None,
        }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    (folder / "p.yaml").write_text(PIPELINE)
    job = open_job(folder / "p.yaml")
    data = execute(job, folder / "run", until="data").folder("data")
    torch.manual_seed(0)
    task_data = open_task_data(data, job.config)
    spec = task_data.spec
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return job, task_data, DictModel(network, ModelSpec(spec.inputs, spec.outputs))


@pytest.fixture
def measure(prepared, tmp_path, monkeypatch):
    job, task_data, model = prepared

    def call(target, only_float=True, **limits):
        monkeypatch.setattr("edgekd.targets.open_target", lambda name: target)
        keyed = {key.replace("__", "."): value for key, value in limits.items()}
        progress = ConsoleProgress(Console(quiet=True), quiet=True)
        context = Context(job, tmp_path, tmp_path / "scratch", tmp_path / "cache", progress, {})
        call.footprint = lambda: measure_footprint(context, task_data)
        origins = dict.fromkeys(keyed, "gate")
        return measure_candidate(
            context, task_data, model, limits=Limits(keyed, origins), only_float=only_float
        )

    return call


def test_a_repeated_measurement_starts_no_process(measure):
    first = measure(Target(1.0))
    assert (first.measured, first.figures.processes, first.figures.variant) == (3, 3, "float32")
    assert first.feasible
    assert first.figures.memory_mb.value == 20.0
    again = measure(Target(RuntimeError("not called")))
    assert (again.measured, again.figures) == (0, first.figures)
    # Other limits are judged by the same figures.
    assert measure(Target(9.0), latency__p95_ms=0.5).reason.startswith("latency.p95_ms: 1.2 ms")


def test_more_processes_only_where_they_can_decide(measure):
    noisy = [1.0, 1.3, 0.8, 1.1, 0.9, 1.2, 1.0, 1.0, 1.0]
    undecided = measure(Target(*noisy), latency__p50_ms=1.5)
    assert undecided.figures.processes == MOST_PROCESSES
    assert undecided.figures.latency_ms["p50"].high > 1.3


def test_a_clearly_broken_limit_needs_no_more(measure):
    found = measure(Target(1.0, 1.3, 0.8), latency__p50_ms=0.5)
    assert found.figures.processes == 3
    assert [each.key for each in found.violations] == ["latency.p50_ms"]


def test_a_lost_target_loses_no_figures(measure):
    with pytest.raises(TargetError):
        measure(Target(1.0, 1.1, TargetError("the board is gone", where="local")))
    assert measure(Target(1.05)).measured == 1


def test_a_candidate_that_fails_says_why(measure):
    killed = measure(Target(StageError("ONNX Runtime was killed by signal 11")))
    assert (killed.figures, killed.feasible) == (None, False)
    assert "signal 11" in killed.reason
    lacking = "Could not find an implementation for GridSample(16) node with name 'g'"
    found = measure(Target(InputError(lacking)))
    assert [each.key for each in found.violations] == ["operators"]
    assert found.violations[0].text == "the runtime has no operator GridSample"


@pytest.mark.parametrize(("faster", "selected"), [(2.0, "int8-cpu"), (0.5, "float32")])
def test_the_variant_is_that_of_the_engines_stage(measure, faster, selected):
    found = measure(Target(1.0, faster=faster), only_float=False)
    assert found.figures.variant.removesuffix("-float-input") == selected
    assert {"float32", "int8-cpu"} <= set(found.variants)
    assert found.figures.size_mb < 0.03
    assert measure(Target(1.0), only_float=False).measured == 0


def test_the_footprint_is_that_of_an_empty_model(measure):
    measure(Target(1.0))
    found = measure.footprint()
    assert (found.memory_mb, found.latency_ms, found.measured) == (20.0, 1.0, True)


def test_the_interval_over_processes_is_no_narrower_than_each():
    alike = over_processes([[1.0, 0.9, 1.1]] * 3)
    assert (alike.low, alike.high) == pytest.approx((0.9, 1.1))
    few = over_processes([[v, v * 0.99, v * 1.01] for v in (1.0, 1.1, 0.9)])
    more = over_processes([[v, v * 0.99, v * 1.01] for v in (1.0, 1.1, 0.9) * 2])
    assert few.high > more.high > 1.11


def test_stored_figures_are_raw(measure, tmp_path):
    measure(Target(1.0, 1.1, 1.2))
    (stored,) = (tmp_path / "cache" / "candidates").glob("*.json")
    timed = json.loads(stored.read_text())["timed"]["float32"]
    assert [record["latency"]["p50"][0] for record in timed] == [1.0, 1.1, 1.2]
