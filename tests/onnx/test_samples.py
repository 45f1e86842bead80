"""Samples in files: what was saved comes back in batches, and every fault is reported."""

import tracemalloc

import numpy as np
import pytest

from edgekd.errors import InputError
from edgekd.onnx.samples import open_samples
from edgekd.spec import ModelSpec, TensorSpec

IMAGE = TensorSpec("image", ("batch", 3, 8, 8))
STATE = TensorSpec("state", ("batch", 6))
BOTH = ModelSpec((IMAGE, STATE), ())
ONE = ModelSpec((IMAGE,), ())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("size", [1, 5, 23, 100])
def test_what_was_saved_comes_back_twice(samples, tmp_path, save, size):
    path = tmp_path / "s.npz"
    save(path, **samples, y=np.arange(3))
    opened = open_samples(path, BOTH)
    assert opened.count == 23
    for _ in range(2):
        batches = list(opened.batches(size))
        assert [len(b["state"]) for b in batches[:-1]] == [size] * (len(batches) - 1)
        for name, array in samples.items():
            read = np.concatenate([batch[name] for batch in batches])
            assert read.dtype == array.dtype
            np.testing.assert_array_equal(read, array)


def test_an_npy_file_and_the_other_byte_order(samples, tmp_path):
    path = tmp_path / "s.npy"
    np.save(path, samples["image"].astype(">f4"))
    (batch,) = open_samples(path, ONE).batches(23)
    assert batch["image"].dtype == np.dtype(np.float32)
    np.testing.assert_array_equal(batch["image"], samples["image"])
    with pytest.raises(InputError, match="the model takes 2 inputs"):
        open_samples(path, BOTH)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_memory_holds_a_batch_and_not_the_file(tmp_path, save):
    path = tmp_path / "s.npz"
    save(path, image=np.zeros((4000, 3, 8, 8), np.float32))  # 3 MB
    tracemalloc.start()
    for _ in open_samples(path, ONE).batches(8):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400_000


def test_a_fixed_batch_takes_any_number_of_samples(samples, tmp_path):
    path = tmp_path / "s.npz"
    np.savez(path, **samples)
    spec = ModelSpec((TensorSpec("image", (1, 3, 8, 8)),), ())
    assert open_samples(path, spec).count == 23


def image(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"imag": image(4, 3, 8, 8)}, "rename 'imag' to 'image'"),
        ({}, "the file has nothing"),
        ({"image": image(4, 3, 9, 8)}, "axis 2 has 9, the model takes 8"),
        ({"image": image(3, 8, 8)}, "it has 3 dimensions, the model takes 4"),
        ({"image": image(4, 3, 8, 8, dtype=np.float64)}, "is float32, the file has float64"),
        ({"image": image(0, 3, 8, 8)}, "the file has no samples"),
        ({"image": np.asfortranarray(image(4, 3, 8, 8))}, "ascontiguousarray"),
        ({"image": np.array([{}, None], object)}, "pickled objects"),
    ],
)
def test_wrong_arrays(tmp_path, arrays, message):
    path = tmp_path / "s.npz"
    np.savez(path, **arrays)
    with pytest.raises(InputError, match=message) as error:
        open_samples(path, ONE)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("declared", "shape"),
    [
        ((2, "batch", 6), (2, 4, 6)),
        ((2, "batch", 6), (4, 2, 6)),
        ((2, "batch", 6), (4, 2, 1, 6)),
        ((2, "state.1", 6), (2, 4, 6)),
        ((6, 2, "batch"), (6, 2, 4)),
    ],
)
def test_a_state_counts_its_samples_on_an_axis_of_its_own(tmp_path, declared, shape):
    """In the file as the model takes it, or with the samples first: the same batches."""
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    np.savez(tmp_path / "s.npz", image=image(4, 3, 8, 8), state=values)
    opened = open_samples(tmp_path / "s.npz", ModelSpec((IMAGE, TensorSpec("state", declared)), ()))
    assert opened.count == 4
    axis = 0 if shape[0] == 4 else shape.index(4)
    expected = np.moveaxis(values, axis, 0).reshape(4, *(d for d in declared if type(d) is int))
    for size in (1, 3):
        read = np.concatenate([batch["state"] for batch in opened.batches(size)])
        np.testing.assert_array_equal(read, expected)


@pytest.mark.parametrize(
    ("declared", "shape"), [((2, "batch", 6), (2, 1, 6)), ((2, 6), (2, 6)), ((), ()), ((), (1,))]
)
def test_one_state_or_scalar_serves_all_samples(tmp_path, declared, shape):
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    np.savez(tmp_path / "s.npz", image=image(4, 3, 8, 8), state=values)
    spec = ModelSpec((IMAGE, TensorSpec("state", declared)), ())
    (batch,) = open_samples(tmp_path / "s.npz", spec).batches(4)
    assert len(batch["state"]) == 4
    for row in batch["state"]:
        np.testing.assert_array_equal(row.ravel(), values.ravel())


@pytest.mark.parametrize(("declared", "shape"), [((), (4,)), ((2, 6), (4, 2, 6)), ((1, 6), (4, 6))])
def test_samples_that_differ_in_what_a_batch_takes_once_come_one_by_one(tmp_path, declared, shape):
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    spec = ModelSpec((IMAGE, TensorSpec("state", declared)), ())
    np.savez(tmp_path / "s.npz", image=image(4, 3, 8, 8), state=values)
    batches = list(open_samples(tmp_path / "s.npz", spec).batches(3))
    assert [len(batch["image"]) for batch in batches] == [1, 1, 1, 1]
    for row, batch in zip(values, batches, strict=True):
        np.testing.assert_array_equal(batch["state"].ravel(), row.ravel())
    np.savez(tmp_path / "s.npz", image=image(4, 3, 8, 8), state=np.ones(shape, np.float32))
    batches = list(open_samples(tmp_path / "s.npz", spec).batches(3))
    assert [len(batch["image"]) for batch in batches] == [3, 1]


def test_a_state_of_another_shape_is_refused_with_the_shapes_that_fit(tmp_path):
    np.savez(tmp_path / "s.npz", image=image(4, 3, 8, 8), state=image(3, 4, 6))
    spec = ModelSpec((IMAGE, TensorSpec("state", (2, "batch", 6))), ())
    with pytest.raises(InputError, match=r"has shape \(3, 4, 6\)") as error:
        open_samples(tmp_path / "s.npz", spec)
    assert "(2, N, 6)" in error.value.remedy
    assert "(N, 2, 6)" in error.value.remedy
    np.savez(tmp_path / "s.npz", image=image(4, 3, 8, 8), state=image(2, 3, 6))
    with pytest.raises(InputError, match="'image' 4, 'state' 3"):
        open_samples(tmp_path / "s.npz", spec)


@pytest.mark.parametrize("state", [("batch", 2, 6), (1, 2, 6)])
def test_one_sample_at_a_time_and_open_batches_are_taken(tmp_path, state):
    np.savez(tmp_path / "s.npz", image=image(4, 3, 8, 8), state=image(4, 2, 6))
    spec = ModelSpec((IMAGE, TensorSpec("state", state)), ())
    assert open_samples(tmp_path / "s.npz", spec).count == 4


def test_different_counts_and_sizes_of_one_name(tmp_path):
    path = tmp_path / "s.npz"
    np.savez(path, image=image(4, 3, 8, 8), state=image(5, 6))
    with pytest.raises(InputError, match="'image' 4, 'state' 5"):
        open_samples(path, BOTH)
    np.savez(path, a=image(4, 7), b=image(4, 9))
    named = tuple(TensorSpec(name, ("batch", "time")) for name in "ab")
    with pytest.raises(InputError, match="'time' is 7 in 'a' and 9 in 'b'"):
        open_samples(path, ModelSpec(named, ()))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_nan_is_found_when_it_is_read_and_named(samples, tmp_path, bad):
    path = tmp_path / "s.npz"
    samples["state"][17, 2] = bad
    np.savez(path, **samples)
    batches = open_samples(path, BOTH).batches(5)
    for _ in range(3):
        next(batches)
    with pytest.raises(InputError, match="input 'state' of sample 17 has a NaN"):
        next(batches)


def test_files_that_are_missing_truncated_or_something_else(samples, tmp_path):
    path = tmp_path / "s.npz"
    with pytest.raises(InputError, match="does not exist"):
        open_samples(path, BOTH)
    with pytest.raises(InputError, match="a folder"):
        open_samples(tmp_path, BOTH)
    np.savez(path, **samples)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="truncated"):
        open_samples(path, BOTH)
    path.write_bytes(b"not an archive")
    with pytest.raises(InputError, match=r"neither .npz nor .npy"):
        open_samples(path, BOTH)


def test_damage_inside_is_found_when_it_is_read(samples, tmp_path):
    path = tmp_path / "s.npy"
    np.save(path, samples["image"])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="truncated or damaged"):
        list(open_samples(path, ONE).batches(8))
    archive = tmp_path / "s.npz"
    np.savez(archive, **samples)
    content = bytearray(archive.read_bytes())
    content[2000] ^= 1  # still numbers: only the archive's checksum reveals it
    archive.write_bytes(content)
    with pytest.raises(InputError, match="truncated or damaged"):
        list(open_samples(archive, BOTH).batches(8))
