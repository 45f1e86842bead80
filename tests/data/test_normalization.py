import numpy as np
import pytest

from edgekd.data import dataset
from edgekd.data.normalization import fit_preprocess


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
