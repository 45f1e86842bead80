from pathlib import Path

import numpy as np
import pytest

from edgekd.config.pipeline import DataConfig
from edgekd.data import load_dataset, source_fingerprint
from edgekd.errors import InputError

HERE = Path()


def test_real_scans_in_three_splits():
    dataset = load_dataset(DataConfig(source="digits"), HERE, seed=0)
    assert sum(len(split) for split in dataset.splits.values()) == 1797
    assert len(dataset.splits["test"]) == round(1797 * 0.25)
    assert dataset.inputs[0].shape == ("batch", 1, 8, 8)
    assert dataset.labels == tuple("0123456789")
    for split in dataset.splits.values():
        assert split.arrays["image"].dtype == np.uint8
        assert np.ptp(np.bincount(split.arrays["label"])) <= 0.05 * len(split)
    assert dataset.splits["train"].arrays["image"].max() == 16
    values = dataset.model_inputs("train", 0, len(dataset.splits["train"]))["image"]
    assert values.mean() == pytest.approx(0, abs=1e-5)
    assert values.std() == pytest.approx(1, abs=1e-5)


def test_the_splits_are_the_same_for_every_training_seed():
    config = DataConfig(source="digits", test=0.4)
    one, two = (load_dataset(config, HERE, seed=seed) for seed in (0, 1))
    assert len(one.splits["test"]) == round(1797 * 0.4)
    for split in one.splits:
        for name, array in one.splits[split].arrays.items():
            np.testing.assert_array_equal(array, two.splits[split].arrays[name])


def test_keys_without_a_meaning_are_refused():
    with pytest.raises(InputError, match="takes no 'path'"):
        load_dataset(DataConfig(source="digits", path="x.npz"), HERE, seed=0)
    with pytest.raises(InputError, match="did you mean 'normalize'"):
        load_dataset(DataConfig(source="digits", args={"normalise": False}), HERE, seed=0)
    with pytest.raises(InputError, match="did you mean 'digits'"):
        load_dataset(DataConfig(source="digit"), HERE, seed=0)
    with pytest.raises(InputError, match="did you mean 'digits'"):
        source_fingerprint(DataConfig(source="digit"), HERE)
    assert "scikit-learn" in source_fingerprint(DataConfig(source="digits"), HERE)
