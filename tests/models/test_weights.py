"""Weights on disk: round trips, and every way a file can be wrong."""

import contextlib
import pickle
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edgekd.errors import InputError, StageError
from edgekd.models import DictModel, load_weights, save_weights, weights
from edgekd.models.weights import read_checkpoint
from edgekd.spec import ModelSpec, TensorSpec
from tests.distill.small_training import same


def network(classes=3):
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes))


def named(module):
    spec = ModelSpec((TensorSpec("x", ("batch", 4)),), (TensorSpec("logits", ("batch", 3)),))
    return DictModel(module, spec)


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
    with pytest.raises(InputError, match="truncated"):
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


def changed(state):
    return {k: v + 1 if v.is_floating_point() else v for k, v in state.items()}


def under(prefix, state):
    return {f"{prefix}{k}": v for k, v in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: under("architecture.", s),
        lambda s: {"state_dict": under("model.", s) | {"criterion.weight": torch.ones(10)}},
        lambda s: under("module.", s) | {"n_averaged": torch.tensor(3)},
        lambda s: {"epoch": 3, "model": None, "ema": s},
        lambda s: {"model": s, "state_dict": s},
        lambda s: {k.replace("1.", "1.module.", 1) if k[0] == "1" else k: v for k, v in s.items()},
        lambda s: {"backbone." * (k[0] != "3") + k: v for k, v in s.items()},
    ],
)
def test_weights_are_found_whatever_they_lie_in(tmp_path, wrap):
    first, second = network(), network()
    torch.save(wrap(first.state_dict()), tmp_path / "w.pt")
    load_weights(named(second), tmp_path / "w.pt")
    assert same(first, second)


@pytest.mark.parametrize(
    "names", [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "ema")]
)
def test_of_two_sets_of_weights_one_has_to_be_named(tmp_path, names):
    first, second = network(), network()
    ema = first.state_dict()
    torch.save({names[0]: changed(ema), names[1]: under("module.", ema)}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=f"'checkpoint_key: {names[1]}'"):
        load_weights(second, tmp_path / "w.pt", where="teacher.checkpoint")
    notes = load_weights(second, tmp_path / "w.pt", key=names[1])
    assert same(first, second)
    assert notes == []
    with pytest.raises(InputError, match="did you mean"):
        load_weights(second, tmp_path / "w.pt", key=names[1] + "s")


def test_of_two_networks_in_one_checkpoint_one_has_to_be_named(tmp_path):
    first, second = network(), network()
    state = first.state_dict()
    both = under("student.", changed(state)) | under("teacher.", state)
    torch.save({"state_dict": both}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"'student.', 'teacher.'[\s\S]*prefix: teacher."):
        load_weights(second, tmp_path / "w.pt", where="teacher.checkpoint")
    load_weights(second, tmp_path / "w.pt", prefix="teacher.")
    assert same(first, second)


def test_weights_with_a_copy_beside_them_are_not_taken_silently(tmp_path):
    state = network().state_dict()
    torch.save(state | under("ema.", changed(state)), tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"more than once[\s\S]*''"):
        load_weights(network(), tmp_path / "w.pt")
    second = network()
    notes = load_weights(second, tmp_path / "w.pt", prefix="")
    assert torch.equal(second[0].weight, state["0.weight"])
    assert "not used" in notes[0]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight


@pytest.mark.parametrize("untied", [False, True])
def test_tied_weights_are_stored_once_and_loaded_twice(tmp_path, untied):
    from safetensors.torch import save_file, save_model

    first, second = Tied(), Tied()
    if untied:
        second.b = nn.Linear(4, 4)
    save_model(first, str(tmp_path / "w.safetensors"))
    load_weights(second, tmp_path / "w.safetensors")
    assert same(first, second)
    if not untied:
        lone = {k: v for k, v in first.state_dict().items() if k != "a.weight"}
        save_file(lone, tmp_path / "lone.safetensors")
        third = Tied()
        load_weights(third, tmp_path / "lone.safetensors")
        assert same(first, third)


def test_settings_beside_the_weights_run_no_code_and_are_allowed(tmp_path):
    import argparse

    import numpy as np

    first, second = network(), network()
    beside = {"args": argparse.Namespace(lr=0.1), "best": np.float64(0.9), "at": tmp_path}
    torch.save({"model": first.state_dict(), **beside}, tmp_path / "w.pth.tar")
    load_weights(second, tmp_path / "w.pth.tar")
    assert same(first, second)


def test_class_names_are_read_from_either_kind_of_file(tmp_path):
    from safetensors.torch import save_file

    state = network().state_dict()
    torch.save({"state_dict": state, "class_to_idx": {"b": 1, "a": 0}}, tmp_path / "w.pt")
    save_file(state, tmp_path / "w.safetensors", {"classes": '["a", "b"]'})
    for name in ("w.pt", "w.safetensors"):
        found = read_checkpoint(tmp_path / name).class_names()
        assert found is not None
        assert found.names == ("a", "b")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float16", "float64"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_other_floats_are_widened(tmp_path, dtype, suffix):
    first, second, dtype = network(), network(), getattr(torch, dtype)
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in first.state_dict().items()}
    path = tmp_path / f"w.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    load_weights(second, path)
    assert torch.equal(second[0].weight, state["0.weight"].float())


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize(
    "change", [lambda t: t.to(torch.complex64), lambda t: t.to_sparse(),
               lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)],
)  # fmt: skip
def test_weights_that_are_no_plain_numbers_are_refused(tmp_path, change):
    state = network().state_dict()
    state["0.weight"] = change(state["0.weight"])
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"not plain numbers|refused|cannot be read"):
        load_weights(network(), tmp_path / "w.pt")


def test_an_archive_far_larger_unpacked_is_refused(tmp_path, monkeypatch):
    torch.save({"0.weight": torch.zeros(1000, 1000)}, tmp_path / "w.pt")
    with (
        zipfile.ZipFile(tmp_path / "w.pt") as stored,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as deflated,
    ):
        for name in stored.namelist():
            deflated.writestr(name, stored.read(name))
    monkeypatch.setattr(weights, "_LARGE", 1_000_000)
    with pytest.raises(InputError, match="unpacked"):
        read_checkpoint(tmp_path / "bomb.pt")
    assert read_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_whatever_is_wrong_with_a_file_is_an_input_error(tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    save_weights(network(), path) if suffix == "safetensors" else torch.save(
        network().state_dict(), path
    )
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(200):
        changed = bytearray(whole)
        for place in random.integers(0, min(len(whole), 900), 2):
            changed[place] = random.integers(0, 256)
        path.write_bytes(changed)
        with contextlib.suppress(InputError):
            load_weights(network(), path)


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of Linux")
def test_a_pickle_that_asks_for_any_memory_is_refused(tmp_path, monkeypatch):
    """``bytearray(3 * 10**9)`` in 100 bytes."""
    monkeypatch.setattr(weights, "_LARGEST_REST", 1 << 28)
    size = (3 * 10**9).to_bytes(5, "little")
    program = b"\x80\x02c__builtin__\nbytearray\n\x8a\x05" + size + b"\x85R."
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")
    with pytest.raises(InputError, match="the checkpoint needs more memory than 2"):
        read_checkpoint(tmp_path / "w.pt")


def test_mappings_that_hold_one_another_many_times_are_refused(tmp_path):
    content = {"a": 1}
    for _ in range(5):
        content = dict.fromkeys(map(str, range(100)), content)
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match="more than 200,000 mappings"):
        load_weights(network(), tmp_path / "w.pt")


def test_a_header_of_many_megabytes_is_refused(tmp_path):
    header = b"[" * (9 << 20)
    content = len(header).to_bytes(8, "little") + header + b"0"
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="header has 9,437,184 bytes"):
        read_checkpoint(tmp_path / "w.safetensors")
