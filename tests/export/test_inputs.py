from __future__ import annotations

import numpy as np
import pytest

from edgerun.errors import BadInput
from edgerun.inputs import SampleArrays, feeds_from, load_arrays, make_feeds
from edgerun.model import BatchLayout, Settings, TensorInfo, choose_shapes, parse_shapes
from edgerun.onnx_session import OrtSession
from tests.export import models


def tensor(name, shape, dtype="float32") -> TensorInfo:
    return TensorInfo(name, dtype, tuple(shape))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((None, 3, None, None), (1, 3, 224, 224)),
        (("n", "h", "w", 3), (1, 224, 224, 3)),
        (("batch", "sequence"), (1, 1)),
        ((None, 16, None, None), (1, 16, 1, 1)),
        ((1, 3, 32, 32), (1, 3, 32, 32)),
        ((), ()),
    ],
)
def test_open_dimensions_take_a_stated_default(shape, expected):
    chosen = choose_shapes([tensor("x", shape)], {}, None)["x"]
    assert chosen.shape == expected
    assert (chosen.note == "declared") == all(isinstance(d, int) for d in shape)


def test_a_state_has_its_batch_on_the_axis_of_the_same_name():
    inputs = [tensor("x", ("b", 3)), tensor("state", (2, "b", 8)), tensor("rate", (), "int64")]
    assert BatchLayout.of(inputs).axes == {"x": 0, "state": 1, "rate": None}
    chosen = choose_shapes(inputs, {}, 5)
    assert [chosen[n].shape for n in ("x", "state", "rate")] == [(5, 3), (2, 5, 8), ()]


def test_a_fixed_batch_is_not_changed():
    with pytest.raises(BadInput, match="built for batch size 4, not 8"):
        choose_shapes([tensor("x", (4, 3))], {}, 8)


def test_shape_options():
    assert parse_shapes(["x=1x3x8x8", "a=b:0=2", "s="]) == {
        "x": (1, 3, 8, 8),
        "a=b:0": (2,),
        "s": (),
    }
    for wrong in ("x", "x=1x", "x=0x3", "x=axb", "=1x2"):
        with pytest.raises(BadInput, match="not a shape"):
            parse_shapes([wrong])


def test_random_feeds_are_of_the_declared_type_in_a_sane_range(tmp_path):
    model = OrtSession(models.every_dtype(tmp_path / "m.onnx"), Settings(1))
    feeds = make_feeds(model.inputs, {}, batch=64)
    for feed in feeds.feeds:
        for declared in model.inputs:
            array = feed[declared.name]
            assert array.dtype == declared.dtype
            assert array.min() >= 0
            if declared.name in ("i32", "i64"):
                assert array.max() <= 1
        model.run(feed)
    again = make_feeds(model.inputs, {}, batch=64)
    assert all(
        np.array_equal(a[k], b[k]) for a, b in zip(feeds.feeds, again.feeds, strict=True) for k in a
    )
    assert not np.array_equal(feeds.feeds[0]["f64"], feeds.feeds[1]["f64"])


def test_string_inputs_are_refused_by_name(tmp_path):
    model = OrtSession(models.of_strings(tmp_path / "m.onnx"), Settings(1))
    with pytest.raises(BadInput, match=r"'text' is of type tensor\(string\)"):
        make_feeds(model.inputs, {})


def test_a_state_and_a_scalar_of_a_file_come_with_every_sample(tmp_path):
    model = OrtSession(models.stateful_if(tmp_path / "m.onnx"), Settings(1))
    data = tmp_path / "d.npz"
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.savez(data, input=x, state=np.ones((1, 4, 3), np.float32), rate=np.int64(16000))
    feeds = feeds_from(data, model.inputs, batch=2)
    assert [feed["input"].shape for feed in feeds.feeds] == [(2, 3), (2, 3)]
    assert feeds.feeds[0]["state"].shape == (1, 2, 3)
    assert feeds.feeds[0]["rate"].shape == ()
    answer = model.run(feeds.feeds[1])
    np.testing.assert_array_equal(answer[0], 2 * x[2:])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"z": np.zeros((2, 4), np.float32)}, "there is no array 'x'"),
        ({"x": np.zeros((2, 5), np.float32)}, "does not fit input x"),
        ({"x": np.zeros((2, 4, 1), np.float32)}, "does not fit input x"),
        ({"x": np.zeros((0, 4), np.float32)}, "no samples"),
        ({"x": np.zeros((2, 4), np.uint8)}, "raw uint8"),
        ({"x": np.zeros((2, 4), np.int64)}, "is int64"),
        ({"x": np.array([["a"] * 4])}, "is <U1"),
        ({"x": np.array([[None] * 4])}, "cannot be read"),
    ],
)
def test_a_file_that_does_not_fit_says_what_is_wrong(tmp_path, arrays, message):
    model = OrtSession(models.linear(tmp_path / "m.onnx"), Settings(1))
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(BadInput, match=message):
        SampleArrays.of(load_arrays(tmp_path / "d.npz", model.inputs), model.inputs, "d.npz")


def test_integers_are_cast_only_where_their_values_fit(tmp_path):
    inputs = [tensor("x", ("b",), "int32")]
    np.savez(tmp_path / "fits.npz", x=np.array([1, 2]))
    assert load_arrays(tmp_path / "fits.npz", inputs)["x"].dtype == np.int32
    np.savez(tmp_path / "large.npz", x=np.array([2**40]))
    with pytest.raises(BadInput, match="is int64"):
        load_arrays(tmp_path / "large.npz", inputs)


@pytest.mark.parametrize("content", [b"", b"not an npz", b"PK\x03\x04 broken"])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "d.npz"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="not an npz file"):
        load_arrays(path, [tensor("x", ("b",))])
