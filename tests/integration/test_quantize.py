"""A student in fewer bits, through every stage to the bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests import onnx_builders
from tests.command_line import edgekd
from tests.integration.pipelines import prepared_images

PIPELINE = """\
name: small
data: {source: digits}
teacher: {model: convnet-m, train: {epochs: 4, batch_size: 64, learning_rate: 3e-3}}
student: {model: convnet-s}
distill: {epochs: 3, batch_size: 64, learning_rate: 1e-2, baseline: false}
quantize: {int8: static, precision: fp16, samples: 100, max_drop: 0.02}
engines:
  - onnxruntime
  - {kind: tensorrt-rtx, compute_capabilities: ["8.6"]}
benchmark: {min_queries: 200, max_seconds: 2}
gate:
  accuracy: {min: 0.5}
  size: {max_mb: 0.07}
"""
"""float32 has 0.14 MB and fp16 0.073: only INT8 meets the gate, whether it is faster or not."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt_rtx", reason="the extra rtx is not installed")
    folder = tmp_path_factory.mktemp("small")
    (folder / "small.yaml").write_text(PIPELINE)
    edgekd("run", "small.yaml", cwd=folder)
    return folder / "runs" / "small"


def artifact(run: Path, stage: str) -> Path:
    return next((run / "artifacts" / stage).iterdir())


def test_the_budget_decides_and_the_choice_names_it(run: Path) -> None:
    choice = json.loads((artifact(run, "engines") / "choice.json").read_text())
    # Which of the two is faster is the machine's to say.
    assert choice["chosen"] in ("int8-cpu", "int8-cpu-float-input")
    names = {"float32", "int8-cpu", "int8-cpu-float-input", "fp16"}
    assert {row["name"] for row in choice["candidates"]} == names
    by_name = {row["name"]: row for row in choice["candidates"]}
    assert by_name["float32"]["misses"] == ["size.max_mb = 0.07"]
    assert by_name["int8-cpu"]["speedup"] is not None


def test_what_is_shipped_computes_in_8_bits_and_is_what_was_scored(run: Path) -> None:
    shipped = run / "bundle" / "small" / "model.onnx"
    operators = {node.op_type for node in onnx.load(shipped).graph.node}
    assert "QLinearConv" in operators
    data = artifact(run, "data")
    prepared = prepared_images(run, "test")
    logits = onnx_builders.run(shipped, {"image": prepared})["logits"]
    accuracy = float((logits.argmax(1) == np.load(data / "test" / "label.npy")).mean())
    result = json.loads((run / "benchmark" / "result.json").read_text())
    assert result["models"]["student"]["metric"]["value"] == accuracy
    assert result["models"]["student"]["size_mb"]["value"] == shipped.stat().st_size / 1e6


def test_the_drop_in_the_index_is_that_of_the_file(run: Path) -> None:
    data, folder = artifact(run, "data"), artifact(run, "quantize")
    index = json.loads((folder / "quantize.json").read_text())
    assert index.pop("schema") == "edgekd.variants/1"
    labels = np.load(data / "validation" / "label.npy")
    prepared = prepared_images(run, "validation")

    def accuracy(file: Path) -> float:
        logits = onnx_builders.run(file, {"image": prepared})["logits"]
        return float((logits.argmax(1) == labels).mean())

    plain = accuracy(artifact(run, "export") / "student.onnx")
    for entry in index.values():
        assert entry["drop"] == pytest.approx(plain - accuracy(folder / entry["file"]), abs=1e-9)
        assert entry["drop"] <= 0.02


def test_one_candidate_computes_the_input_layer_in_float(run: Path) -> None:
    folder = artifact(run, "quantize")
    index = json.loads((folder / "quantize.json").read_text())
    (kept,) = index["int8-cpu-float-input"]["kept"]
    for name, scaled in (("int8-cpu", True), ("int8-cpu-float-input", False)):
        graph = onnx.load(folder / index[name]["file"]).graph
        first = next(node for node in graph.node if node.op_type == "Conv")
        assert first.name == kept
        makers = {output: node.op_type for node in graph.node for output in node.output}
        assert (makers.get(first.input[1]) == "DequantizeLinear") is scaled


def test_tensorrt_gets_its_own_scheme_and_the_bundle_a_build_file(
    run: Path,
) -> None:
    folder = run / "bundle" / "small" / "engines" / "tensorrt-rtx"
    build = json.loads((folder / "build.json").read_text())
    assert build["precision"] == "int8"
    assert build["engine"]["record"]["layers"]["by_precision"].get("int8")
    graph = onnx.load(folder / "student.onnx").graph
    zero_points = [
        onnx.numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.name.endswith("zero_point")
    ]
    assert zero_points
    assert not any(values.any() for values in zero_points)
    assert (folder / "student-built.engine").stat().st_size > 0
    assert build["command"] in (run / "bundle" / "small" / "README.md").read_text()


def test_the_report_shows_every_engine(run: Path) -> None:
    page = (run / "report" / "report.html").read_text()
    assert "Engines of the student" in page
    for name in ("float32", "int8-cpu", "fp16"):
        assert f"<th>{name}</th>" in page


def test_a_second_run_has_nothing_to_do(run: Path) -> None:
    done = edgekd("run", "small.yaml", cwd=run.parent.parent)
    assert "Nothing to do" in done.stdout


def test_another_drop_does_not_train_again(run: Path) -> None:
    done = edgekd("plan", "small.yaml", "--set", "quantize.max_drop=0.03", cwd=run.parent.parent)
    rows = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines()[:-1]}
    assert rows["distill"] == rows["export"] == "cached"
    assert rows["quantize"] == rows["engines"] == "run"


def test_excluded_layers_leave_tensorrt_and_requested_precisions_valid(
    run: Path,
) -> None:
    exported = onnx.load(artifact(run, "export") / "student.onnx").graph.node
    kept = next(node.name for node in exported if node.op_type == "Conv")
    changes = [f"quantize.exclude_nodes=[{kept}]", "quantize.precision=bf16", "gate.size.max_mb=1"]
    words = [word for change in changes for word in ("--set", change)]
    edgekd("build", "small.yaml", *words, cwd=run.parent.parent)
    newest = max((run / "artifacts" / "engines").iterdir(), key=lambda path: path.stat().st_mtime)
    choice = json.loads((newest / "choice.json").read_text())
    assert choice["refused"] == {
        "bf16": "is for tensorrt",
        "int8-tensorrt": "is for tensorrt",
    }
    build = json.loads((newest / "further" / "tensorrt-rtx" / "build.json").read_text())
    assert (build["precision"], build["from"]) == ("int8", "int8-tensorrt")
    assert kept in build["command"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["quantize={}"], "requests nothing"),
        (["quantize={precision: bf16}", "engines=[onnxruntime]"], "computes in bfloat16"),
        (["quantize.runtime=tensorrt", "quantize.int8=dynamic"], "TensorRT has no dynamic"),
        (["quantize.int8=statik"], "static"),
        (["engines=[tensorrt-rtx]"], "the first engine is what is measured"),
        (["quantize.calibration=max"], "minmax"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(
    tmp_path: Path, changes: list[str], says: str
) -> None:
    from edgekd.engines.tensorrt import can_run_here

    if changes == ["engines=[tensorrt-rtx]"] and can_run_here("tensorrt-rtx") is None:
        pytest.skip("TensorRT can run here")
    (tmp_path / "small.yaml").write_text(PIPELINE)
    words = [word for change in changes for word in ("--set", change)]
    done = edgekd("run", "small.yaml", *words, cwd=tmp_path, code=2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("runs/small/artifacts/*"))


def test_what_decides_a_file_is_in_its_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgekd.api import open_job
    from edgekd.config import host
    from edgekd.stages.benchmark import RECIPE
    from edgekd.stages.engines import EnginesStage
    from edgekd.stages.quantize import QuantizeStage

    (tmp_path / "small.yaml").write_text(PIPELINE)

    def job(*changes: str):
        return open_job(tmp_path / "small.yaml", changes)

    # On a processor that overflows, the host's weights have 7 bits and the board's 8.
    monkeypatch.setattr(host, "saturates", lambda: True)
    here, board = (
        QuantizeStage().config_slice(job(f"profile={name}")) for name in ("host", "raspberry-pi-5")
    )
    assert (here["reduce_range"], board["reduce_range"]) == (True, False)
    slice_of = EnginesStage().config_slice(job())
    assert slice_of["tensorrt"]["tensorrt-rtx"]
    assert slice_of["machine"]
    assert "quantize" in RECIPE
