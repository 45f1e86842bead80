"""A wrong pipeline file gives an error that names the line, the key and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekd.config.budgets import GateConfig
from edgekd.config.loader import load_section
from edgekd.config.pipeline import load_pipeline
from edgekd.config.yaml_source import parse_scalar
from edgekd.errors import InputError

GOOD = """\
name: small
data: {source: digits}
teacher: {model: convnet-m, train: {epochs: 3, learning_rate: 1e-3}}
student: {model: convnet-xs}
distill:
  epochs: 2
  losses:
    - {hard_labels: {}, weight: 0.1}
    - {soft_labels: {temperature: 4}, weight: 0.9}
    - hard_distillation
engines: [onnxruntime]
"""


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str) -> Path:
        path = tmp_path / "pipeline.yaml"
        path.write_text(text)
        return path

    return _write


def test_short_forms_are_understood(write) -> None:
    config = load_pipeline(write(GOOD))
    names = [(term.name, term.args, term.weight) for term in config.distill.losses]
    assert names == [
        ("hard_labels", {}, 0.1),
        ("soft_labels", {"temperature": 4}, 0.9),
        ("hard_distillation", {}, 1.0),
    ]
    assert config.engines[0].kind == "onnxruntime"
    assert config.teacher.train is not None
    assert config.teacher.train.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("  epochs: 2", "  epoch: 2", 6, "did you mean 'epochs'"),
        ("  epochs: 2", "  epochs: many", 6, "'many'"),
        ("distill:", "distil:", 5, "did you mean 'distill'"),
        ("name: small", "name: ../escape", 1, "name"),
        ("{soft_labels: {temperature: 4}, weight: 0.9}", "{a: 1, b: 2}", 9, "a, b"),
        ("engines: [onnxruntime]", "engines: [onnxruntim]", 11, "did you mean 'onnxruntime'"),
        ("train: {epochs: 3, learning_rate: 1e-3}", "onnx: t.onnx", 3, "remove 'model'"),
        (", train: {epochs: 3, learning_rate: 1e-3}", "", 3, "give one of train"),
    ],
)
def test_one_mistake_is_pointed_at(write, old: str, new: str, line: int, says: str) -> None:
    assert old in GOOD
    path = write(GOOD.replace(old, new))
    with pytest.raises(InputError) as caught:
        load_pipeline(path)
    assert f"pipeline.yaml:{line}" in str(caught.value)
    assert says in str(caught.value)


def test_all_mistakes_are_named_at_once(write) -> None:
    path = write(GOOD.replace("epochs: 2", "epoch: 2") + "gate: {size: {max_mb: -1}}\n")
    with pytest.raises(InputError, match="2 things are wrong") as caught:
        load_pipeline(path)
    assert "pipeline.yaml:6" in str(caught.value)
    assert "pipeline.yaml:12" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1", "not valid YAML"),
        ("", "not a mapping"),
        ("- 1\n", "not a mapping"),
        ("name: a\nname: b\n", "is given twice"),
        ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_what_is_not_a_pipeline_file_is_refused(write, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_pipeline(write(text))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.yaml"):
        load_pipeline(tmp_path / "absent.yaml")


def test_overrides_replace_and_are_blamed(write) -> None:
    path = write(GOOD)
    config = load_pipeline(path, ["distill.epochs=7", "distill.losses.1.weight=0.5", "seed=3"])
    assert (config.distill.epochs, config.distill.losses[1].weight, config.seed) == (7, 0.5, 3)
    with pytest.raises(InputError, match=r"--set distill\.epochs=x"):
        load_pipeline(path, ["distill.epochs=x"])
    with pytest.raises(InputError, match="sets nothing"):
        load_pipeline(path, ["distill.epochs"])
    with pytest.raises(InputError, match="nothing named 9"):
        load_pipeline(path, ["distill.losses.9.weight=1"])


def test_budget_that_contradicts_itself(write) -> None:
    path = write("gate: {latency: {p50_ms: 3, p95_ms: 1}}\n")
    with pytest.raises(InputError, match="contradicts itself"):
        load_section(path, GateConfig, "gate")


@pytest.mark.parametrize(
    ("engines", "says"),
    [
        ("[tensorrt-rxt]", "did you mean 'tensorrt-rtx'"),
        ("[{kind: tensorrt-rtx, compute_capabilites: ['8.6']}]", "'compute_capabilities'"),
        ("[{kind: onnxruntime, thread: 2}]", "unknown key 'engines.0.thread'"),
        ("[{kind: tensorrt, workspace_mb: -1}]", "engines.0.workspace_mb"),
        ("[]", "nothing would be run"),
    ],
)
def test_a_section_of_several_kinds_is_explained_by_its_own(tmp_path, engines, says):
    path = tmp_path / "p.yaml"
    path.write_text(
        "name: a\ndata: {source: digits}\nteacher: {model: convnet-l, train: {}}\n"
        f"student: {{model: convnet-s}}\nengines: {engines}\n"
    )
    with pytest.raises(InputError) as caught:
        load_pipeline(path)
    assert says in str(caught.value)
    assert "things are wrong" not in str(caught.value)
    assert caught.value.where == f"{path}:5"


def test_a_file_is_selected_by_force_only_where_it_is_made(write) -> None:
    path = write(GOOD + "quantize: {precision: fp16, select: half}\n")
    config = load_pipeline(path)
    assert config.quantize.select == "half"
    with pytest.raises(InputError, match="add precision: "):
        load_pipeline(path, ["quantize={int8: static, select: half}"])
    with pytest.raises(InputError, match="add int8: "):
        load_pipeline(path, ["quantize.select=int8"])


def test_a_gain_over_the_student_alone_needs_the_student_alone(write) -> None:
    gain = "gate: {accuracy: {min_gain: 0.05}}\n"
    assert load_pipeline(write(GOOD + gain)).gate.accuracy.min_gain == 0.05
    with pytest.raises(InputError, match=r"distill\.baseline: true"):
        load_pipeline(write(GOOD.replace("epochs: 2", "epochs: 2\n  baseline: false") + gain))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            "{source: digits}",
            "{source: {npz: {mode: L}}}",
            ["data.source: it takes a name alone", "'source: npz'", "'args: {…}'"],
        ),
        (
            "{source: digits}",
            '{source: {"mine:load": {n: 5}}}',
            ["'source: \"mine:load\"'", "'args: {…}'"],
        ),
        ("name: a", "name: a\ntask: {classification: {classes: 3}}", ["'task_args: {…}'"]),
    ],
)
def test_a_name_written_as_a_mapping_is_told_where_its_arguments_go(write, old, new, says) -> None:
    text = "name: a\ndata: {source: digits}\nteacher: {model: m, train: {}}\nstudent: {model: s}\n"
    with pytest.raises(InputError) as caught:
        load_pipeline(write(text.replace(old, new)))
    for part in says:
        assert part in str(caught.value)
    assert "valid string" not in str(caught.value)


BOMB = "[&a [x, x, x, x, x, x, x, x, x, x]" + "".join(
    f", &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("!!int abc", "'abc' is no valid int"),
        ("!!timestamp x", "the tag"),
        ("!!set {a, b}", "the tag"),
        ("!!python/object/apply:os.getcwd []", "the tag"),
        ("9" * 5000, r"5,002 characters\) is no valid int"),
        ("9" * 4000, r"the integer .* is too large"),
        ("0x" + "f" * 400, "too large"),
        ('"\\U00110000"', "not valid YAML"),
        ('"\\ud800"', "control character"),
        ('"\\e[31m"', "control character"),
        ('"a\\0b"', "control character"),
        ("[" * 500 + "]" * 500, "more than 64 levels"),
        ("{? {a: b} : c}", "a key cannot be a list or a mapping"),
        ("{[a]: c}", "a key cannot be a list or a mapping"),
        (BOMB + "]", "more than 100,000 values"),
        ("&x {width: *x}", "itself a part of"),
        ("&x [*x]", "itself a part of"),
        ("x" * (1 << 19), "more than 512 kB"),
    ],
)
def test_yaml_that_no_pipeline_has_is_refused(write, value, says) -> None:
    path = write(GOOD + f"task_args: {{x: {value}}}\n")
    with pytest.raises(InputError, match=says) as raised:
        load_pipeline(path)
    assert len(str(raised.value)) < 600


def test_a_date_is_text_and_a_number_has_to_be_finite(write) -> None:
    path = write(GOOD.replace("name: small", "name: 2001-12-31"))
    assert load_pipeline(path).name == "2001-12-31"
    for number in (".nan", ".inf", "-.inf", "1e999"):
        with pytest.raises(InputError, match="finite number"):
            load_pipeline(path, [f"distill.learning_rate={number}"])
    with pytest.raises(InputError, match="not valid YAML"):
        load_pipeline(path, ["name=!!int abc"])
    with pytest.raises(InputError, match="'²'"):
        load_pipeline(path, ["distill.losses.²=1"])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("true", "valid number, .*; it is 'true'"),
        ("no", "valid number, .*; it is 'false'"),
        ("010", "YAML reads it as 8: write 8"),
        ("1:30", "YAML reads it as 90: write 90"),
        ("1:30.5", "YAML reads it as 90.5"),
        ("-010", "YAML reads it as -8"),
        (".nan", "finite"),
        ("-.inf", "finite"),
    ],
)
def test_a_number_is_a_plain_decimal_number(tmp_path, value, words):
    file = tmp_path / "budget.yaml"
    file.write_text(f"size: {{max_mb: 1}}\naccuracy:\n  min: {value}\n")
    with pytest.raises(InputError, match=words) as caught:
        load_section(file, GateConfig)
    assert str(caught.value.where).startswith(f"{file}:3")
    assert caught.value.remedy


def test_other_numbers_and_texts_are_read_as_before(tmp_path):
    file = tmp_path / "budget.yaml"
    file.write_text("accuracy: {min: 0.9, max_drop: 1e-3}\nparameters: {max: 1_000}\n")
    read = load_section(file, GateConfig)
    assert (read.accuracy.min, read.accuracy.max_drop, read.parameters.max) == (0.9, 1e-3, 1000)
    assert parse_scalar("['010', '1:30', 0, 0.5, 0x1F]") == ["010", "1:30", 0, 0.5, 31]
