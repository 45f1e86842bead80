"""Several processes: the same result as one, and an end in finite time when one of them fails."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

TRAINING = """
import sys
from pathlib import Path

import torch
from torch import nn

from edgekd.config.training import LossTerm, TrainConfig
from edgekd.distill.objective import Objective
from edgekd.distill.teacher import ModuleTeacher
from edgekd.distill.trainer import Trainer
from edgekd.models import DictModel
from edgekd.spec import SAMPLE, ModelSpec, TensorSpec
from edgekd.tasks import Classification
from tests.progress import RecordedProgress

TASK = Classification()
SPEC = ModelSpec((TensorSpec("image", ("batch", 2, 6, 6)),), (TensorSpec("logits", ("batch", 4)),))


class Source:
    samples = 68

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.label = torch.randint(0, 4, (68,), generator=generator)
        self.image = torch.randn(68, 2, 6, 6, generator=generator, dtype=torch.float64)
        self.image += self.label[:, None, None, None] / 2

    def __len__(self):
        return 4

    def epoch(self, seed, epoch):
        order = torch.randperm(68, generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(17):  # not a multiple of two
            yield {"image": self.image[rows], "label": self.label[rows], SAMPLE: rows}

    def ordered(self):
        for rows in torch.arange(68).split(67):  # the last one has a single sample
            yield {"image": self.image[rows], "label": self.label[rows]}


def network(seed):
    torch.manual_seed(seed)
    return DictModel(nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(144, 8), nn.BatchNorm1d(8, momentum=None), nn.Linear(8, 4),
    ), SPEC).double()


torch.set_default_dtype(torch.float64)
folder = Path(sys.argv[1])
terms = [
    LossTerm(name="hard_labels"),
    LossTerm(name="soft_labels"),
    LossTerm(name="rkd"),
    LossTerm(name="fitnets", args={"student": "1", "teacher": "0"}),
    LossTerm(name="crd", args={"student": "4", "teacher": "4", "negatives": 8}),
]
objective, teacher, model = Objective(terms, TASK), ModuleTeacher(network(7)), network(0)
teacher.capture(objective.teacher_layers)
config = TrainConfig(
    epochs=3, batch_size=17, accumulate=3, ema=0.9, clip_norm=0.5, optimizer="sgd",
    schedule="cosine", warm_up=0.2, learning_rate=0.05,
)
arguments = (objective, Source(1), Source(2), TASK, config, 0)
trainer = Trainer(
    model, *arguments, checkpoint_folder=folder, progress=RecordedProgress(), teacher=teacher
)
history = trainer.fit()
kinds = sorted({type(m).__name__ for m in model.modules()})
saved = {"model": model.state_dict(), "history": history.to_json(), "kinds": kinds}
torch.save(saved, folder / f"saved-{__import__('os').environ.get('RANK', 'one')}.pt")
"""

PIPELINE = """\
name: digits
data: {source: digits}
teacher: {model: "own:net", train: {epochs: 2, batch_size: 75, learning_rate: 3e-3}}
student: {model: convnet-xs}
distill: {epochs: 2, batch_size: 75, learning_rate: 1e-2, baseline: false}
"""

OWN = """
import os, signal
from torch import nn
from edgekd.errors import InputError

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
            nn.Linear(96, 10),
        )
        self.steps = 0

    def forward(self, image):
        self.steps += self.training
        if self.steps == 20 and os.environ.get("RANK") == "1":
            match os.environ.get("FAULT"):
                case "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "fails":
                    raise InputError("process one cannot go on", remedy="none")
        return self.body(image)

def net(*args, **kwargs):
    return Net()
"""


IMPORTING = """
import sys
from pathlib import Path

import torch

from edgekd.config.pipeline import PipelineConfig
from edgekd.config.profile import load_profile
from edgekd.errors import EdgekdError
from edgekd.extension import resolve
from edgekd.pipeline.runner import Runner, join_workers
from edgekd.pipeline.stage import Job
from edgekd.pipeline.store import Store
from tests.progress import RecordedProgress


class Teacher:
    name, inputs, libraries = "teacher", (), ()

    def config_slice(self, job):
        return {"loss": "mine:VALUE"}

    def run(self, context, inputs):
        # The first process imports the file before it is edited, the second one after that.
        first = torch.distributed.get_rank() == 0
        if first:
            resolve("mine:VALUE", {}, "loss")
            Path("mine.py").write_text(sys.argv[1])
        torch.distributed.barrier()
        if not first:
            resolve("mine:VALUE", {}, "loss")
        (context.out / "out.txt").write_text("made")


config = {
    "name": "n", "data": {"source": "digits"}, "teacher": {"model": "m", "train": {}},
    "student": {"model": "s"},
}
job = Job(PipelineConfig.model_validate(config), Path.cwd(), load_profile("host"))
stages = (Teacher(),)
try:
    with join_workers() as workers:
        if workers.is_main:
            progress = RecordedProgress()
            Runner(job, Store(Path("run")), progress, stages, workers=workers).run()
            print(progress.messages)
        else:
            workers.serve(stages)
except EdgekdError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def together(
    arguments: list[str], cwd: Path, **environment: str
) -> list[subprocess.CompletedProcess[str]]:
    """The same command in two processes that know of each other; at most two minutes."""
    common = {
        **os.environ,
        **{"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
        **{"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        **environment,
    }
    started = [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=cwd,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *texts)
        for process, texts in zip(started, said, strict=True)
    ]


def alone(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Relations, batch norms, adapters, a memory bank, uneven rows: all of the global batch."""
    (tmp_path / "training.py").write_text(TRAINING)
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    one = alone(["training.py", "one"], tmp_path)
    assert one.returncode == 0, one.stderr
    for process in together(["training.py", "two"], tmp_path):
        assert process.returncode == 0, process.stderr
    files = (folders[0] / "saved-one.pt", *(folders[1] / f"saved-{rank}.pt" for rank in (0, 1)))
    expected, first, second = (torch.load(file, weights_only=True) for file in files)
    for key, value in expected["model"].items():
        # float64: only the order of sums differs.
        torch.testing.assert_close(first["model"][key], value, rtol=1e-8, atol=1e-10)
        assert torch.equal(first["model"][key], second["model"][key]), key
    assert first["kinds"] == expected["kinds"], "batch norms are plain again"
    for ours, theirs in zip(first["history"]["epochs"], expected["history"]["epochs"], strict=True):
        assert ours["terms"] == pytest.approx(theirs["terms"], rel=1e-6)
        assert ours["validation"] == theirs["validation"]


def test_another_process_that_imports_an_edited_form_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "importing.py").write_text(IMPORTING)
    (tmp_path / "mine.py").write_text("VALUE = 1\n")
    first, second = together(["importing.py", "VALUE = 2  # edited\n"], tmp_path)
    assert (first.returncode, second.returncode) == (2, 2), first.stdout + first.stderr
    assert "process 1 imported another form of your own code" in first.stdout
    assert "run again" in first.stdout
    assert not list((tmp_path / "run" / "artifacts").glob("teacher/[0-9a-f]*")), "not stored"
    # Unchanged code is accepted, of both.
    first, second = together(["importing.py", "VALUE = 2  # edited\n"], tmp_path)
    assert (first.returncode, second.returncode) == (0, 0), first.stdout + first.stderr
    assert "teacher: done" in first.stdout


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    (tmp_path / "digits.yaml").write_text(PIPELINE)
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


@pytest.mark.slow
def test_a_run_of_two_processes_is_that_of_one(pipeline: Path) -> None:
    command = ["-m", "edgekd", "distill", "digits.yaml", "--output"]
    one = alone([*command, "one"], pipeline)
    assert one.returncode == 0, one.stderr
    first, second = together([*command, "two"], pipeline)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "distill: done" in first.stdout
    assert second.stdout == ""
    for pattern in ("teacher/*/teacher.safetensors", "distill/*/student.safetensors"):
        found, expected = (
            load_file(next((pipeline / name / "artifacts").glob(pattern)))
            for name in ("two", "one")
        )
        assert list(found) == list(expected)
        for key in expected:
            # float32 over some forty steps of AdamW.
            torch.testing.assert_close(found[key], expected[key], rtol=1e-2, atol=1e-3)
    again = alone([*command, "two"], pipeline)
    assert "Nothing to do" in again.stdout, "what two processes made is up to date for one"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "codes", "text"),
    [
        ("dies", (3, -9), "one of the 2 processes of this run is gone"),
        ("fails", (2, 2), "process one cannot go on"),
    ],
)
def test_one_process_that_fails_ends_all(
    pipeline: Path, fault: str, codes: tuple[int, int], text: str
) -> None:
    command = ["-m", "edgekd", "run", "digits.yaml", "--until", "teacher", "--output", "run"]
    first, second = together(command, pipeline, FAULT=fault)
    assert (first.returncode, second.returncode) == codes, first.stderr + second.stderr
    assert text in first.stderr
    assert "Traceback" not in first.stderr
    assert text not in second.stdout + second.stderr
    log = (pipeline / "run" / "log.jsonl").read_text().splitlines()
    assert any(json.loads(line)["event"] == "stage-failed" for line in log)
    # One process alone resumes after the finished epoch.
    rest = alone(command, pipeline)
    assert rest.returncode == 0, rest.stderr
    assert "resuming after epoch 1" in rest.stdout


@pytest.mark.slow
def test_wrong_input_is_said_once(pipeline: Path) -> None:
    command = ["-m", "edgekd", "run", "digits.yaml", "--set", "distil.epochs=3"]
    first, second = together(command, pipeline)
    assert (first.returncode, second.returncode) == (2, 2)
    assert "distil" in first.stderr
    assert second.stdout + second.stderr == ""
