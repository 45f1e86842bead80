import sys

import numpy as np
import pytest

from edgekd.config.pipeline import DataConfig
from edgekd.data import load_dataset, source_fingerprint
from edgekd.errors import InputError
from tests.command_line import check_not_imported

MODULE = """
import numpy as np
from edgekd.errors import InputError

def arrays(n):
    image = np.arange(n * 30, dtype=np.uint8).reshape(n, 1, 6, 5)
    return {"image": image, "label": np.arange(n) % 2}

def split(n=20):
    return {"train": arrays(n), "test": arrays(8), "classes": ["even", "odd"]}

def unsplit(path, seed, scale=1.0):
    state = np.load(path) * scale + seed
    return {"state": state, "y": state.sum(1)}

def tensors():
    import torch
    return {"x": torch.zeros(20, 1, 4, 4, requires_grad=True), "y": torch.arange(20) % 2}

def lists():
    return {"state": [[1.0, 2.0]] * 20, "label": [0, 1] * 10}

def dataset():
    from edgekd.data.build_dataset import build_dataset
    from edgekd.config.pipeline import DataConfig
    from edgekd.data.source import RawData
    return build_dataset(RawData({"all": arrays(20)}, "mine", "mine"), DataConfig(source="npz"))

def ragged(): return {"state": [[1.0], [1.0, 2.0]], "label": [0, 1]}
def mixed(): return {"train": arrays(20), "extra": np.ones(3)}
def misspelt(): return {"train": arrays(20), "tets": arrays(8)}
def pairs(): return {"train": (np.ones((20, 3)), np.ones(20)), "test": 1}
def half():
    import torch
    return {"state": torch.ones(20, 3, dtype=torch.bfloat16), "y": torch.ones(20)}
def nothing(): pass
def broken(): return {}["key"]
def own_error(): raise InputError("the sensor log is from 2019")
number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    # A separate module for each test: Python caches modules by name.
    name = f"my_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    yield tmp_path
    sys.modules.pop(name, None)


def load(folder, function, seed=0, **config):
    source = f"my_{folder.name}:{function}"
    return load_dataset(DataConfig(source=source, **config), folder, seed)


def test_splits_classes_and_arguments(folder):
    dataset = load(folder, "split", args={"n": 40})
    assert len(dataset.splits["train"]) + len(dataset.splits["validation"]) == 40
    assert len(dataset.splits["test"]) == 8
    assert dataset.labels == ("even", "odd")


def test_path_and_seed_are_given_to_parameters_of_these_names(folder):
    np.save(folder / "state.npy", np.zeros((20, 3)))
    dataset = load(
        folder, "unsplit", seed=7, path="state.npy", args={"scale": 2.0, "normalize": False}
    )
    np.testing.assert_array_equal(dataset.splits["train"].arrays["state"], 7)
    assert [spec.name for spec in dataset.targets] == ["target"]
    np.testing.assert_array_equal(dataset.model_inputs("test", 0, 1)["state"], 7)


@pytest.mark.parametrize("function", ["tensors", "lists", "dataset"])
def test_other_forms_of_samples(folder, function):
    dataset = load(folder, function)
    assert sum(len(split) for split in dataset.splits.values()) == 20
    assert [spec.name for spec in dataset.targets] == ["label"]


@pytest.mark.parametrize(
    ("function", "config", "said"),
    [
        ("split", {"args": {"m": 3}}, "no argument of .*split named 'm'"),
        ("split", {"path": "."}, "no parameter 'path'"),
        ("unsplit", {}, "needs the argument 'path'"),
        ("arrays", {}, "needs the argument 'n'"),
        ("ragged", {}, "'state' of .* is no array"),
        ("mixed", {}, "next to them, 'extra'"),
        ("misspelt", {}, "did you mean 'test'"),
        ("pairs", {}, "the split 'train' of .* is tuple"),
        ("half", {}, "'state' of .* is no array: .*BFloat16"),
        ("nothing", {}, "returned NoneType"),
        ("broken", {}, "KeyError: 'key'"),
        ("own_error", {}, "^the sensor log is from 2019$"),
        ("number", {}, "is int, not a function"),
        ("splitt", {}, "did you mean 'split'"),
    ],
)
def test_what_is_wrong_is_said(folder, function, config, said):
    with pytest.raises(InputError, match=said):
        load(folder, function, **config)


def test_the_fingerprint_follows_the_module_and_the_path(folder):
    source = f"my_{folder.name}:unsplit"
    config = DataConfig(source=source, path="state.npy")
    found = []
    for value, line in ((0, ""), (1, ""), (1, "# changed\n")):
        np.save(folder / "state.npy", np.full((20, 3), value))
        (folder / f"my_{folder.name}.py").write_text(MODULE + line)
        found.append(str(source_fingerprint(config, folder)))
    assert len(set(found)) == 3


def test_reading_data_does_not_import_torch(tmp_path):
    code = (
        "from pathlib import Path\n"
        "from edgekd.config.pipeline import DataConfig\n"
        "from edgekd.data import load_dataset, save_dataset, open_dataset\n"
        f"here = Path({str(tmp_path)!r})\n"
        "save_dataset(load_dataset(DataConfig(source='digits'), here, 0), here / 'd')\n"
        "open_dataset(here / 'd')\n"
    )
    check_not_imported({"torch"}, code)
