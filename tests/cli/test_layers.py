"""``edgekd layers``: the paths that a loss can name, with their shapes."""

from pathlib import Path

import pytest

from tests.command_line import edgekd

PIPELINE = """\
name: digits
data: {source: digits}
teacher: {model: convnet-m, train: {epochs: 1}}
student: {model: convnet-xs}
"""


def call(*words, **settings):
    return edgekd("layers", *words, columns=120, **settings)


def rows(output: str) -> dict[str, list[str]]:
    cells = [
        [cell.strip() for cell in line.strip("│ ").split("│")]
        for line in output.splitlines()
        if line.startswith("│")
    ]
    return {row[0]: row[1:] for row in cells}


def test_a_network_by_its_name():
    result = call("convnet-s", "--shape", "image=1x28x28", "--classes", "7")
    found = rows(result.output)
    assert found["features.layers.1.0"] == ["Conv2d", "[batch, 24, 7, 7]", "3,456"]
    assert found["head.linear.0"] == ["Linear", "[batch, 7]", str(48 * 7 + 7)]


def test_a_pipelines_networks_on_its_own_data(tmp_path: Path):
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    result = call(str(tmp_path / "pipeline.yaml"), "-o", str(tmp_path / "run"))
    student, teacher = result.output.split("teacher", 1)
    assert rows(student)["features"][1] == "[batch, 24]"
    assert rows(teacher)["features"][1] == "[batch, 64]"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convnet-s"], "depend on its inputs"),
        (["convnet-q"], "did you mean"),
        (["convnet-q", "--shape", "image=1x28x28"], "did you mean"),
        (["convnet-s", "--shape", "image=1xbx28"], "is not a shape"),
        (["convnet-s", "--shape", "image=0x28x28"], "is not a shape"),
        (["convnet-s", "--shape", "image=1x-8x28"], "is not a shape"),
        (["convnet-s", *["--shape", "image=1x28x28"] * 2], "is given twice"),
        (["convnet-s", "--shape", "image=1x4x4"], "at least 8×8"),
    ],
)
def test_what_cannot_be_listed(arguments, said):
    assert said in call(*arguments, code=2).output


def test_a_student_that_is_still_to_be_searched_for_is_not_listed(tmp_path: Path):
    text = PIPELINE.replace("{model: convnet-xs}", "{search: {}}")
    (tmp_path / "pipeline.yaml").write_text(text)
    result = call(str(tmp_path / "pipeline.yaml"), "-o", str(tmp_path / "run"))
    assert "chosen by a search, which has not been run" in result.output
    assert rows(result.output)["features"][1] == "[batch, 64]"
