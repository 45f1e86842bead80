"""Each kind of extension, added from outside: by ``package.module:name`` and by an entry point."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from edgekd.api import execute, open_job
from edgekd.config.networks import ModelConfig
from edgekd.config.pipeline import DataConfig, ExternalEngineConfig, expand_engine
from edgekd.config.training import LossTerm, SchemeConfig
from edgekd.data import load_dataset, source_fingerprint
from edgekd.distill.objective import Objective
from edgekd.distill.schemes import find_scheme
from edgekd.engines.builder import ExternalBuilder
from edgekd.errors import InputError
from edgekd.extension import installed_extensions
from edgekd.models import build_model
from edgekd.pipeline.fingerprint import extension_versions, references_sha256
from edgekd.pipeline.runner import plan
from edgekd.spec import TensorSpec
from edgekd.stages import STAGES
from edgekd.targets import open_target
from edgekd.tasks import Classification, Policy, get_task

MODULE = """\
import numpy as np
from torch import nn

from edgekd.distill.losses import traits
from edgekd.targets import LocalTarget
from edgekd.tasks import Classification


@traits(needs_full_logits=False, needs_hard_label=True, compares="classes")
def focal(student, teacher, factor: float = 2.0):
    return factor * (student - teacher).square().mean()


def plain(student, teacher):
    return (student - teacher).square().mean()


@traits(compares="numbers")
def gap(student, target):
    return (student - target).abs().mean()


class Digits(Classification):
    name = "digits of ours"


def scans(count: int = 60):
    draws = np.random.default_rng(0)
    label = np.arange(count) % 3
    image = draws.normal(size=(count, 1, 4, 4)) * 0.1 + label[:, None, None, None]
    return {"image": image.astype("float32"), "label": label}


def network(num_classes, width: int = 8):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, num_classes))


def alone(context, rounds: int = 1):
    return {"student": context.fit(context.student, context.new_objective(), "student", context.teacher)}


class Board(LocalTarget):
    name = "board"

    def info(self, model=None):
        return {"board": True}


class Compiler:
    suffix = ".onnx"
    settings = {}

    def __init__(self, level: int = 1):
        self.level = level

    def build(self, source, out, precision, keep=()):
        out.write_bytes(source.read_bytes())
        return {"level": self.level, "precision": precision}

    def describe(self):
        return "a compiler of ours"


class Group:
    loss = staticmethod(plain)
"""  # noqa: E501 - the module of somebody else

NAMES = {
    "edgekd.losses": ("focal", "focal"),
    "edgekd.tasks": ("our-digits", "Digits"),
    "edgekd.sources": ("our-scans", "scans"),
    "edgekd.models": ("our-net", "network"),
    "edgekd.schemes": ("just-once", "alone"),
    "edgekd.targets": ("board", "Board"),
    "edgekd.engines": ("compiler", "Compiler"),
}
"""By group: the name of the entry point, and what of the module it is."""

NUMBERS = itertools.count()


@dataclass(frozen=True)
class Package:
    """A distribution in a separate folder on the path."""

    folder: Path
    module: str

    def install(self, points: dict[str, dict[str, str]], dist: str, version: str = "1.0") -> None:
        info = self.folder / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
        groups = (
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in names.items())
            for group, names in points.items()
        )
        (info / "entry_points.txt").write_text("\n".join(groups))

    def install_all(self, dist: str, version: str) -> None:
        """One entry point of each group."""
        points = {group: {name: f"{self.module}:{value}"} for group, (name, value) in NAMES.items()}
        self.install(points, dist, version)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    module = f"outside{os.getpid()}_{next(NUMBERS)}"
    (folder / f"{module}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(folder)
    return Package(folder, module)


@pytest.fixture(params=["reference", "entry point"])
def named(request: pytest.FixtureRequest, package: Package) -> Callable[[str], str]:
    """The name of what a group adds, in one of the two forms."""
    if request.param == "reference":
        return lambda group: f"{package.module}:{NAMES[group][1]}"
    package.install_all("edgekd-outside", "1.0")
    return lambda group: NAMES[group][0]


def loss_of(name: str, task=None, **args) -> Objective:
    return Objective([LossTerm(name=name, args=args)], task or Classification())


def test_a_loss_from_outside_has_its_arguments_and_traits(named) -> None:
    name = named("edgekd.losses")
    objective = loss_of(name, factor=3)
    ones = {"logits": torch.ones(2, 3)}
    assert float(objective(ones, {"logits": torch.zeros(2, 3)}, {})[0]) == 3.0
    assert objective.needs_full_logits == ()
    assert len(objective.needs_hard_label) == 1
    with pytest.raises(InputError, match="use output_regression"):
        loss_of(name, Policy())
    with pytest.raises(InputError, match="has no argument 'facter'"):
        loss_of(name, facter=3)


def test_a_task_from_outside(named) -> None:
    assert get_task(named("edgekd.tasks")).name == "digits of ours"


def test_a_source_from_outside_and_its_fingerprint(named, package, tmp_path) -> None:
    config = DataConfig(source=named("edgekd.sources"), args={"count": 90})
    dataset = load_dataset(config, tmp_path, seed=0)
    assert sum(len(split) for split in dataset.splits.values()) == 90
    before = source_fingerprint(config, tmp_path)
    (package.folder / f"{package.module}.py").write_text(MODULE + "\n# edited\n")
    assert source_fingerprint(config, tmp_path) != before


def test_a_model_from_outside(named) -> None:
    inputs = [TensorSpec("image", ("batch", 1, 4, 4), "float32")]
    outputs = [TensorSpec("logits", ("batch", 5), "float32")]
    config = ModelConfig(model=named("edgekd.models"), args={"width": 7})
    model = build_model(config, inputs, outputs)
    assert sum(parameter.numel() for parameter in model.parameters()) == 17 * 7 + 8 * 5


def test_a_scheme_from_outside(named) -> None:
    scheme = find_scheme(SchemeConfig(name=named("edgekd.schemes"), args={"rounds": 2}))
    assert scheme.keywords == {"rounds": 2}


def test_a_target_from_outside(named) -> None:
    assert open_target(named("edgekd.targets")).info() == {"board": True}


def test_an_engine_from_outside(named, tmp_path) -> None:
    name = named("edgekd.engines")
    source, out = tmp_path / "m.onnx", tmp_path / "engine.onnx"
    source.write_bytes(b"model")
    config = expand_engine({"kind": name, "args": {"level": 3}})
    assert config == {"kind": "external", "name": name, "args": {"level": 3}}
    builder = ExternalBuilder(ExternalEngineConfig(**config))
    record = builder.build(source, out, "fp32")
    assert out.read_bytes() == b"model"
    assert (record["level"], record["size_bytes"], record["run_level"]) == (3, 5, "all")
    with pytest.raises(InputError, match="has no argument 'levl'"):
        ExternalBuilder(ExternalEngineConfig(kind="external", name=name, args={"levl": 3}))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("x = object()", "is not an engine: it has no suffix, settings, build, describe"),
        ("def x(): return 1 / 0", "fails when made: ZeroDivisionError"),
    ],
)
def test_what_is_no_engine_is_refused(package, text, what) -> None:
    (package.folder / f"{package.module}_e.py").write_text(text)
    with pytest.raises(InputError, match=what):
        ExternalBuilder(ExternalEngineConfig(kind="external", name=f"{package.module}_e:x"))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("x = object()", "is not a target: it has no name, bench"),
        ("def x(host): ...", "needs 'host'"),
        ("def x(): return 1 / 0", "fails when made: ZeroDivisionError"),
    ],
)
def test_what_is_no_target_is_refused(package, text, what) -> None:
    (package.folder / f"{package.module}_t.py").write_text(text)
    with pytest.raises(InputError, match=what):
        open_target(f"{package.module}_t:x")


@pytest.mark.slow
def test_a_pipeline_of_names_that_a_distribution_adds(package, tmp_path) -> None:
    package.install_all("edgekd-outside", "1.0")
    run, file = tmp_path / "run", tmp_path / "p.yaml"
    file.write_text("""\
name: outside
task: our-digits
target: board
data: {source: our-scans}
teacher: {model: our-net, args: {width: 16}, train: {epochs: 1}}
student: {model: our-net}
distill: {epochs: 1, scheme: just-once, losses: [hard_labels, focal], cache: {views: 1, top: 2},
  baseline: false}
engines: [compiler]
benchmark: {min_queries: 20, max_seconds: 1}
gate: {size: {max_mb: 1}}
""")
    outcome = execute(open_job(file), run, until="benchmark")
    stages = outcome.ran
    built = json.loads((outcome.folder("engines") / "engines.json").read_text())["student"]
    assert (built["level"], built["precision"]) == (1, "float32")
    rows = plan(open_job(file), run, STAGES, "benchmark")
    assert [(row.stage, row.action) for row in rows] == [(stage, "cached") for stage in stages]

    # A cache keeps the largest logits, except for a loss without that trait.
    assert "logits are cached" not in (run / "log.jsonl").read_text()
    losses = f"distill.losses=[focal, {package.module}:plain]"
    assert execute(open_job(file, [losses]), run, until="distill").ran == ["distill"]
    assert "all 3 logits are cached, not 2: plain" in (run / "log.jsonl").read_text()

    shutil.rmtree(package.folder / "edgekd_outside-1.0.dist-info")
    package.install_all("edgekd-outside", "2.0")
    first = plan(open_job(file), run, STAGES)[0]
    assert (first.stage, first.reason) == ("data", "other version of edgekd-outside")


def test_own_losses_may_have_traits_and_need_none(package) -> None:
    plain = loss_of(f"{package.module}:plain")
    assert plain.needs_full_logits == ("plain",)
    assert not plain.needs_hard_label
    loss_of(f"{package.module}:plain", Policy())  # Does not mention classes: not refused.
    task = Policy()
    task.fit_unit({"action": (1e5 * torch.randn(8, 2)).numpy()})
    value, _ = loss_of(f"{package.module}:gap", task)(
        {"action": torch.full((2, 2), task.unit)}, None, {"action": torch.zeros(2, 2)}
    )
    assert float(value) == pytest.approx(1.0)


def test_a_reference_may_go_into_a_class(package) -> None:
    assert loss_of(f"{package.module}:Group.loss").needs_teacher
    with pytest.raises(InputError, match="did you mean 'loss'"):
        loss_of(f"{package.module}:Group.lss")


def test_the_nearest_name_may_be_one_that_a_distribution_adds(package) -> None:
    package.install({"edgekd.losses": {"focal": f"{package.module}:focal"}}, "edgekd-outside")
    with pytest.raises(InputError, match="did you mean 'focal'"):
        loss_of("focl")


def test_one_name_in_two_distributions_names_both(package) -> None:
    for dist, value in (("edgekd-one", "focal"), ("edgekd-two", "plain")):
        package.install({"edgekd.losses": {"focal": f"{package.module}:{value}"}}, dist)
    with pytest.raises(InputError, match=r"edgekd-\w+ 1.0 and edgekd-\w+ 1.0") as raised:
        loss_of("focal")
    assert {"edgekd-one", "edgekd-two"} <= set(raised.value.what.split())
    assert f"{package.module}:plain" in str(raised.value.remedy)


def test_a_built_in_name_stays_the_built_in_thing(package) -> None:
    package.install({"edgekd.losses": {"soft_labels": f"{package.module}:focal"}}, "edgekd-outside")
    assert loss_of("soft_labels", temperature=2.0).needs_full_logits == ()


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("nowhere_at_all:f", "cannot be loaded: module 'nowhere_at_all'"),
        ("MODULE:absent", "has no 'absent'"),
        ("MODULE", "which names nothing in a module"),
    ],
)
def test_an_entry_point_that_leads_nowhere_names_its_distribution(package, value, what) -> None:
    value = value.replace("MODULE", package.module)
    package.install({"edgekd.losses": {"broken": value}}, "edgekd-outside", "3.1")
    with pytest.raises(InputError, match=what) as raised:
        loss_of("broken")
    assert "'broken' of edgekd-outside 3.1" in raised.value.what


def test_extras_and_spaces_of_an_entry_point_are_left_out(package) -> None:
    value = f"{package.module} : focal [more]"
    package.install({"edgekd.losses": {"focal": value}}, "edgekd-outside")
    (found,) = installed_extensions("edgekd.losses")["focal"]
    assert found.reference == f"{package.module}:focal"
    assert loss_of("focal").needs_teacher


def test_version_and_source_of_a_distribution_are_in_the_fingerprint(package) -> None:
    package.install({"edgekd.losses": {"focal": f"{package.module}:focal"}}, "edgekd-outside")
    section = {"losses": [{"name": "focal", "args": {}}]}
    before = references_sha256(section)
    assert list(before) == [f"{package.module}:focal {package.module}.py"]
    assert extension_versions(section) == {"edgekd-outside": "1.0"}
    (package.folder / f"{package.module}.py").write_text(MODULE + "\nx = 1\n")
    assert references_sha256(section) != before
    assert references_sha256({"losses": ["soft_labels"]}) == {}
    assert package.module not in sys.modules  # Nothing of it was imported for this.
