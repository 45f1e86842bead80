"""Weights on disk: round trips, and every way a file can be wrong."""

import pickle

import pytest
import torch
from torch import nn

from edgekd.errors import InputError, StageError
from edgekd.models import NamedModel, load_weights, save_weights
from edgekd.spec import ModelSpec, TensorSpec


def network(classes=3):
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes))


def named(module):
    spec = ModelSpec((TensorSpec("x", ("batch", 4)),), (TensorSpec("logits", ("batch", 3)),))
    return NamedModel(module, spec)


def same(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_round_trip_with_the_networks_own_keys(tmp_path):
    first, second = network(), network()
    save_weights(named(first), tmp_path / "w.safetensors")
    load_weights(second, tmp_path / "w.safetensors")
    assert same(first, second)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {}},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
        lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
    ],
)
def test_state_dicts_are_found_in_their_wrappers(tmp_path, wrap):
    first, second = network(), network()
    torch.save(wrap(first.state_dict()), tmp_path / "w.pt")
    load_weights(named(second), tmp_path / "w.pt")
    assert same(first, second)


def test_missing_unexpected_and_misshaped_keys_are_listed_with_shapes(tmp_path):
    state = network(classes=5).state_dict()
    del state["0.bias"]
    state["extra"] = torch.zeros(2, 2)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(InputError) as caught:
        load_weights(network(), tmp_path / "w.pt", where="teacher.checkpoint")
    text = str(caught.value)
    assert "1 missing: 0.bias [8]" in text
    assert "1 unexpected: extra [2, 2]" in text
    assert "3.weight [5, 8], the model has [3, 8]" in text
    assert "teacher.checkpoint" in text


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path):
    torch.save(network(classes=5).state_dict(), tmp_path / "w.pt")
    model, before = network(), network()
    before.load_state_dict(model.state_dict())
    with pytest.raises(InputError, match="number of classes"):
        load_weights(model, tmp_path / "w.pt")
    assert same(model, before)


class Evil:
    """Would run code when unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


@pytest.mark.parametrize("dump", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_a_pickle_that_needs_code_is_refused_and_not_run(tmp_path, dump):
    dump({"state_dict": Evil()}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"would run code[\s\S]*allow_pickle: true"):
        load_weights(network(), tmp_path / "w.pt")


def test_a_whole_pickled_module_is_taken_when_allowed(tmp_path):
    first, second = network(), network()
    torch.save(first, tmp_path / "w.pt")
    with pytest.raises(InputError, match="refused"):
        load_weights(second, tmp_path / "w.pt")
    load_weights(second, tmp_path / "w.pt", allow_pickle=True)
    assert same(first, second)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_truncated_file_says_so(tmp_path, part, suffix):
    path = tmp_path / f"w.{suffix}"
    if suffix == "pt":
        torch.save(network().state_dict(), path)
    else:
        save_weights(network(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(InputError, match="cut off"):
        load_weights(network(), path)


def test_rubbish_is_no_checkpoint(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"hello, I am text and not a checkpoint")
    with pytest.raises(InputError, match=r"cannot be read|refused"):
        load_weights(network(), tmp_path / "w.pt")


def test_missing_file_and_strange_suffix(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_weights(network(), tmp_path / "w.pt")
    (tmp_path / "w.h5").write_bytes(b"")
    with pytest.raises(InputError, match=r"cannot be a \.h5"):
        load_weights(network(), tmp_path / "w.h5")


def test_a_file_without_a_state_dict(tmp_path):
    torch.save({"epoch": 3, "loss": 0.1}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="a mapping with epoch, loss"):
        load_weights(network(), tmp_path / "w.pt")


def test_nan_weights_are_refused(tmp_path):
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    save_weights(model, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"'0.weight' holds NaN"):
        load_weights(network(), tmp_path / "w.safetensors")


def test_a_folder_that_is_not_there_is_a_stage_error(tmp_path):
    with pytest.raises(StageError, match="cannot be written"):
        save_weights(network(), tmp_path / "none" / "w.safetensors")


def test_torchscript_is_named(tmp_path):
    torch.jit.save(torch.jit.script(network()), str(tmp_path / "w.pt"))
    with pytest.raises(InputError, match="TorchScript"):
        load_weights(network(), tmp_path / "w.pt")
