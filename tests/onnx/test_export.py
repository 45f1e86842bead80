"""Export: the specification's names and a batch that is really dynamic, or an error."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from edgekd.errors import StageError
from edgekd.onnx.export import export_onnx
from edgekd.onnx.file import check_onnx, describe_onnx
from edgekd.spec import ModelSpec, TensorSpec
from tests.onnx_builders import run


def test_the_file_has_the_models_signature_and_metadata(classifier, tmp_path, capfd):
    model = classifier().train()
    path = tmp_path / "m.onnx"
    export_onnx(model, path, 18, {"edgekd.role": "student", "labels": "a\nb"})
    check_onnx(path)
    info = describe_onnx(path)
    assert info.spec == model.spec
    assert info.opset == 18
    assert info.metadata == {"edgekd.role": "student", "labels": "a\nb"}
    assert info.size_bytes == path.stat().st_size
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]  # no external data
    assert model.training, "export leaves the model as it was"
    assert capfd.readouterr() == ("", "")


def test_a_model_of_two_inputs_and_two_outputs(policy, samples, tmp_path):
    path = tmp_path / "m.onnx"
    export_onnx(policy, path)
    assert describe_onnx(path).spec == policy.spec
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for size in (1, 5):
        feed = {name: values[:size] for name, values in samples.items()}
        action, value = session.run(["action", "value"], feed)
        assert action.shape == (size, 3)
        assert value.shape == (size,)


def test_batch_normalization_is_exported_as_in_evaluation(classifier, samples, tmp_path):
    """The parameters left are the convolution's, a bias each from the normalization, the rest."""
    path = tmp_path / "m.onnx"
    export_onnx(classifier().train(), path)
    ops = {node.op_type for node in onnx.load(str(path)).graph.node}
    assert "BatchNormalization" not in ops
    assert describe_onnx(path).parameters == 3 * 8 * 9 + 8 + 128 * 5 + 5


def test_the_file_says_nothing_of_the_machine_it_was_made_on(classifier, tmp_path):
    path = tmp_path / "m.onnx"
    export_onnx(classifier(), path)
    content = path.read_bytes()
    assert str(tmp_path).encode() not in content
    assert b".py" not in content
    assert b"stack_trace" not in content


@pytest.mark.parametrize("opset", [20, 21, 23])
def test_another_opset_is_what_is_written(classifier, tmp_path, opset):
    path = tmp_path / "m.onnx"
    export_onnx(classifier(), path, opset)
    assert describe_onnx(path).opset == opset


def test_an_opset_that_the_exporter_cannot_write_is_an_error(policy, tmp_path):
    """ReduceMean takes its axes as an input from 18 on; the exporter cannot convert it back."""
    with pytest.raises(StageError, match="wrote opset 18 where 17"):
        export_onnx(policy, tmp_path / "m.onnx", 17)
    assert not (tmp_path / "m.onnx").exists()


def test_a_fixed_batch_is_an_error(classifier, tmp_path):
    model = classifier(lambda net, batch: {"logits": net(batch["image"]).reshape(2, 5)})
    with pytest.raises(StageError, match=r"dimension 0 \('batch'\).*fixed number 2"):
        export_onnx(model, tmp_path / "m.onnx")


def test_a_branch_on_values_is_an_error_that_names_the_cause(classifier, tmp_path):
    def branch(net, batch):
        logits = net(batch["image"])
        return {"logits": logits + 1 if logits.sum() > 0 else logits}

    with pytest.raises(StageError, match=r"torch cannot export the model: .*data-dependent"):
        export_onnx(classifier(branch), tmp_path / "m.onnx")


def test_the_users_own_error_in_forward_is_the_cause(classifier, tmp_path):
    def fails(net, batch):
        raise ValueError("my own mistake")

    with pytest.raises(StageError, match="ValueError: my own mistake") as caught:
        export_onnx(classifier(fails), tmp_path / "m.onnx")
    assert len(str(caught.value)) < 600


def test_an_output_of_another_shape_is_an_error(classifier, tmp_path):
    model = classifier()
    model.spec = ModelSpec(model.spec.inputs, (TensorSpec("logits", ("batch", 4)),))
    with pytest.raises(StageError, match=r"logits float32\[batch, 5\].*batch, 4"):
        export_onnx(model, tmp_path / "m.onnx")


def test_integer_inputs_and_a_second_symbolic_dimension(tmp_path):
    class Words(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.spec = ModelSpec(
                (TensorSpec("words", ("batch", "time"), "int64"),),
                (TensorSpec("logits", ("batch", 3)),),
            )
            self.table = torch.nn.Embedding(11, 3)

        def forward(self, batch):
            return {"logits": self.table(batch["words"]).mean(1)}

    path = tmp_path / "m.onnx"
    export_onnx(Words(), path)
    assert describe_onnx(path).spec == Words().spec
    assert run(path, {"words": np.full((3, 9), 10)})["logits"].shape == (3, 3)


def test_a_folder_that_cannot_be_written(classifier, tmp_path):
    with pytest.raises(StageError, match="cannot be written"):
        export_onnx(classifier(), tmp_path / "missing" / "m.onnx")
