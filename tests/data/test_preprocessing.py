"""What the axes of an input are: images, signals, features; and how each is normalized."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgekd.config.pipeline import DataConfig
from edgekd.data import dataset
from edgekd.data.build_dataset import build_dataset
from edgekd.data.loader import preprocess
from edgekd.data.preprocessing import fit_preprocess
from edgekd.data.source import RawData
from edgekd.errors import InputError
from edgerun.manifest import InputPreprocessing

RANDOM = np.random.default_rng(0)
LABELS = np.arange(60) % 2
# A thermometer, a barometer and a gyroscope: scales that differ by 10,000.
SIGNAL = RANDOM.normal(size=(60, 3, 32)) * [[0.05], [300], [500]] + [[300], [101_300], [0]]


def make(name, array, **args):
    raw = RawData({"all": {name: array, "label": LABELS}}, "here", "a test")
    return build_dataset(raw, DataConfig(source="npz", args=args))


def values(dataset):
    """The preprocessed training samples."""
    return dataset.model_inputs("train", 0, len(dataset.splits["train"]))[dataset.inputs[0].name]


@pytest.mark.parametrize("name", ["x", "X", "signal", "imu"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_signal_is_normalized_per_channel_over_samples_and_time(name, dtype, channels):
    dataset = make(name, np.moveaxis(SIGNAL, 1, channels).astype(dtype))
    (spec,) = dataset.inputs
    assert spec.name == ("x" if name == "X" else name)
    assert spec.shape == ("batch", *((3, 32) if channels == 1 else (32, 3)))
    over = (0, 2) if channels == 1 else (0, 1)
    # float32 keeps 300 K ± 0.05 to 3e-5, and 101,300 Pa to 8e-3.
    np.testing.assert_allclose(values(dataset).mean(over), 0, atol=2e-3)
    np.testing.assert_allclose(values(dataset).std(over), 1, atol=2e-3)
    assert any("a signal of 3 channels" in remark for remark in dataset.remarks)


def test_a_waveform_of_integers_is_a_signal_and_not_indices():
    wave = (RANDOM.normal(size=(60, 2, 40)) * [[20], [8000]]).astype(np.int16)
    for array, over in ((wave, (0, 2)), (wave[:, 1], (0, 1))):
        dataset = make("x", array)
        assert dataset.splits["train"].arrays["x"].dtype == np.int16
        assert dataset.inputs[0].dtype == "float32"
        np.testing.assert_allclose(values(dataset).std(over), 1, atol=1e-5)
    assert len(make("x", wave[:, 1]).preprocess["x"].mean) == 1
    tokens = make("tokens", np.arange(480).reshape(60, 8))
    assert tokens.preprocess == {}
    assert tokens.inputs[0].dtype == "int64"


@pytest.mark.parametrize(
    ("name", "array", "shape"),
    [
        ("x", np.zeros((60, 6, 5), np.uint8), (1, 6, 5)),
        ("image", RANDOM.random((60, 6, 5)), (1, 6, 5)),
        ("x", RANDOM.random((60, 8, 8)), (1, 8, 8)),
        ("x", RANDOM.random((60, 1, 8, 5)), (1, 8, 5)),
        ("x", RANDOM.random((60, 3, 32)), (3, 32)),
        ("state", RANDOM.random((60, 8, 8)), (8, 8)),
    ],
)
def test_images_are_told_from_signals_by_the_stated_rule(name, array, shape):
    (spec,) = make(name, array).inputs
    assert spec.sample_shape == shape
    assert (spec.name == "image") == (len(shape) == 3)


def test_the_layout_can_be_said():
    image = make("x", SIGNAL, layout="nhw")
    assert image.inputs[0].shape == ("batch", 1, 3, 32)
    assert image.remarks == ()
    square = RANDOM.random((60, 8, 8)) * np.arange(1, 9)
    for layout, over in (("nct", (0, 2)), ("ntc", (0, 1))):
        dataset = make("x", square, layout={"x": layout})
        assert dataset.inputs[0].shape == ("batch", 8, 8)
        assert dataset.remarks == ()
        np.testing.assert_allclose(values(dataset).std(over), 1, atol=1e-5)
    flat = SIGNAL.reshape(60, -1)
    assert len(make("x", flat).preprocess["x"].mean) == 96
    assert len(make("x", flat, layout="nt").preprocess["x"].mean) == 1
    assert len(make("audio", flat).preprocess["audio"].mean) == 1
    assert len(make("audio", flat, layout="nf").preprocess["audio"].mean) == 96


def test_a_choice_that_could_be_another_names_its_key():
    for array in (SIGNAL, RANDOM.random((60, 8, 8)), RANDOM.random((60, 500))):
        (remark,) = make("x", array).remarks
        assert "data.args: {layout:" in remark


@pytest.mark.parametrize(
    ("array", "args", "said"),
    [
        (SIGNAL, {"layout": "tnc"}, "layout is 'tnc'"),
        (SIGNAL, {"layout": "nhwc"}, "layout nhwc has 4 axes"),
        (SIGNAL, {"layout": {"y": "nct"}}, "names 'y', which is no input"),
        (RANDOM.random((60, 8, 8, 2)), {}, r"may be \(N, H, W, C\)"),
        (RANDOM.random((60, 8, 8, 4)), {}, r"may be \(N, H, W, C\)"),
        (RANDOM.random((60, 9, 9, 6)), {}, r"may be \(N, H, W, C\)"),
        (np.zeros((60, 1, 8, 8), np.uint16), {}, "are uint16"),
    ],
)
def test_what_cannot_be_told_is_asked_for(array, args, said):
    with pytest.raises(InputError, match=said):
        make("x", array, **args)


def test_one_layout_serves_the_inputs_that_have_its_axes():
    arrays = {"image": RANDOM.random((60, 6, 5, 3)), "state": SIGNAL[:, :, 0], "label": LABELS}
    raw = RawData({"all": arrays}, "here", "a test")
    dataset = build_dataset(raw, DataConfig(source="npz", args={"layout": "nhwc"}))
    assert [spec.shape for spec in dataset.inputs] == [("batch", 3, 6, 5), ("batch", 3)]


@pytest.mark.parametrize("channels", [1, 2])
def test_training_and_device_normalize_a_signal_alike(channels):
    dataset = make("x", np.moveaxis(SIGNAL, 1, channels))
    constants = dataset.preprocess["x"]
    raw = dataset.splits["train"].arrays["x"][:7]
    written = constants.to_json()
    device = InputPreprocessing(
        written["scale"], tuple(written["mean"]), tuple(written["std"]), written.get("axis")
    )
    np.testing.assert_array_equal(device.apply(raw), constants.apply(raw))
    batch = preprocess(torch.from_numpy(np.array(raw)), constants)
    np.testing.assert_array_equal(batch.numpy(), constants.apply(raw))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    # So that the merging of chunks is what is tested.
    monkeypatch.setattr(dataset, "CHUNK_BYTES", 1000)


@pytest.mark.parametrize("shape", [(101, 3, 5, 7), (101, 4), (101, 6, 4), (101,)])
def test_floats_come_out_with_mean_zero_and_deviation_one(shape):
    values = np.random.default_rng(0).normal(1000, 3, shape).astype(np.float32)
    fitted = fit_preprocess(values, 1.0, True)
    axes = (0, 2, 3) if len(shape) == 4 else tuple(range(max(1, len(shape) - 1)))
    np.testing.assert_allclose(fitted.mean, np.ravel(values.mean(axes, dtype=np.float64)))
    np.testing.assert_allclose(fitted.std, np.ravel(values.std(axes, dtype=np.float64)))


def test_uint8_images_agree_with_float64_arithmetic():
    images = np.random.default_rng(0).integers(0, 256, (50, 3, 4, 5), np.uint8)
    fitted = fit_preprocess(images, 1 / 255, True)
    scaled = images.astype(np.float64) / 255
    np.testing.assert_allclose(fitted.mean, scaled.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(fitted.std, scaled.std((0, 2, 3)), rtol=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_a_constant_feature_is_not_divided_by_its_rounding(value):
    values = np.full((40, 2), value, np.float32)
    values[:, 1] = np.arange(40)
    fitted = fit_preprocess(values, 1.0, True)
    assert fitted.std[0] == 1.0
    assert fitted.apply(values)[:, 0] == pytest.approx(0, abs=1e-6)


def test_integers_that_are_no_image_have_no_preprocessing():
    assert fit_preprocess(np.arange(12).reshape(4, 3), 1 / 255, True) is None
    assert fit_preprocess(np.zeros((4, 3), np.uint8), 1 / 255, True) is None


def test_without_normalisation_floats_stay_and_images_are_only_scaled():
    assert fit_preprocess(np.ones((4, 3), np.float32), 1.0, False).apply(
        np.full((1, 3), 7.5, np.float32)
    ).tolist() == [[7.5] * 3]
    fitted = fit_preprocess(np.zeros((4, 1, 2, 2), np.uint8), 1 / 255, False)
    assert fitted.apply(np.full((1, 1, 2, 2), 255, np.uint8)) == pytest.approx(1)
