"""Teachers: a torch module, and an ONNX file as a black box."""

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.distill.losses.response import soft_labels
from edgekd.distill.teacher import ModuleTeacher, OnnxTeacher
from edgekd.errors import InputError
from edgekd.models import DictModel
from edgekd.models.adapted import Adaptation, recognized_form
from edgekd.spec import ModelSpec, TensorSpec
from tests.onnx_builders import save_onnx

X = TensorSpec("x", ("batch", 4))
LOGITS = TensorSpec("logits", ("batch", 3))
WEIGHT = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


TYPES = {"float": np.float32, "float16": np.float16, "double": np.float64}


def onnx_file(path, batch="n", dtype="float", names=("x", "logits"), softmax=False):
    """A linear map of 4 numbers to 3."""
    taken, given = names
    product, then = ("z", f"{given} = Softmax (z)") if softmax else (given, "")
    text = f"""({dtype}[{batch},4] {taken}) => ({dtype}[{batch},3] {given})
    {{ {product} = MatMul ({taken}, w) {then} }}"""
    return save_onnx(path, text, {"w": WEIGHT.astype(TYPES[dtype])}, opset=18)


@pytest.fixture
def batch():
    return {"x": torch.randn(5, 4, generator=torch.Generator().manual_seed(0))}


def expected(batch):
    return batch["x"] @ torch.from_numpy(WEIGHT)


@pytest.mark.parametrize("size", ["n", 1, 2, 5, 8])
def test_any_batch_size_is_served_by_a_file_fixed_to_one(tmp_path, batch, size):
    teacher = OnnxTeacher(onnx_file(tmp_path / "t.onnx", size), [X], [LOGITS], threads=1)
    answers = teacher.predict(batch)
    torch.testing.assert_close(answers["logits"], expected(batch))


def test_names_that_differ_are_matched_by_order(tmp_path, batch):
    path = onnx_file(tmp_path / "t.onnx", names=("input_1", "output_7"))
    answers = OnnxTeacher(path, [X], [LOGITS]).predict(batch)
    torch.testing.assert_close(answers, {"logits": expected(batch)})


@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_other_widths_are_fed_and_answered_in_float32(tmp_path, batch, dtype):
    answers = OnnxTeacher(onnx_file(tmp_path / "t.onnx", dtype=dtype), [X], [LOGITS]).predict(batch)
    assert answers["logits"].dtype is torch.float32
    # float16 carries eleven bits.
    torch.testing.assert_close(answers["logits"], expected(batch), rtol=5e-3, atol=5e-3)


def test_probabilities_become_logits_that_mean_the_same(tmp_path, batch):
    path = onnx_file(tmp_path / "t.onnx", softmax=True)
    teacher = OnnxTeacher(path, [X], [LOGITS])
    form = recognized_form(teacher.raw_outputs(batch)["logits"])
    assert form == "probabilities"
    before = teacher.digest
    teacher.adaptation = Adaptation(form=form)
    assert teacher.digest != before
    student = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        soft_labels(student, teacher.predict(batch)["logits"]),
        soft_labels(student, expected(batch)),
    )


def test_logits_are_not_taken_for_probabilities(tmp_path, batch):
    teacher = OnnxTeacher(onnx_file(tmp_path / "t.onnx"), [X], [LOGITS])
    assert recognized_form(teacher.raw_outputs(batch)["logits"]) == "logits"


def test_wrong_input_shape_names_both(tmp_path):
    path = onnx_file(tmp_path / "t.onnx")
    with pytest.raises(InputError, match=r"x \['n', 4\].*x float32\[batch, 6\]"):
        OnnxTeacher(path, [TensorSpec("x", ("batch", 6))], [LOGITS])


def test_wrong_output_shape_names_both(tmp_path):
    path = onnx_file(tmp_path / "t.onnx")
    with pytest.raises(InputError, match=r"logits \[batch, 3\].*needs \[batch, 10\]"):
        OnnxTeacher(path, [X], [TensorSpec("logits", ("batch", 10))])


def test_other_inputs_are_named(tmp_path):
    path = onnx_file(tmp_path / "t.onnx", names=("pixels", "logits"))
    with pytest.raises(InputError, match="takes pixels, and the data have x, state"):
        OnnxTeacher(path, [X, TensorSpec("state", ("batch", 2))], [LOGITS])


@pytest.mark.parametrize("part", [0.0, 0.5, 0.95])
def test_a_truncated_file_says_so(tmp_path, part):
    path = onnx_file(tmp_path / "t.onnx")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(InputError, match="truncated"):
        OnnxTeacher(path, [X], [LOGITS])


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        OnnxTeacher(tmp_path / "none.onnx", [X], [LOGITS])


def test_a_module_teacher_answers_frozen_and_in_evaluation_mode(batch):
    module = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9))
    teacher = ModuleTeacher(DictModel(module, ModelSpec((X,), (LOGITS,))))
    first, second = (teacher.predict(batch)["logits"] for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    student = torch.zeros(5, 3, requires_grad=True)
    soft_labels(student, first).backward()
    assert student.grad is not None
