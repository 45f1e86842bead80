"""A small classifier and real inputs of it, for the tests of ``edgekd quantize``."""

from __future__ import annotations

import pytest

from tests.cli.quantizing import classifier, samples


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return classifier(tmp_path_factory.mktemp("model") / "m.onnx")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return samples(tmp_path_factory.mktemp("data") / "data.npz")
