"""Arrays of any name in an npz file, by edgekd and by edgerun on a device."""

import io

import numpy as np
import pytest

from edgekd.npz import write_npz
from edgerun.npz import write_npz as write_npz_on_device

ARRAYS = {
    "file": np.arange(6, dtype=np.float32).reshape(2, 3),
    "allow_pickle": np.array(True),
    "block/0:out": np.arange(4, dtype=np.uint8)[::2],
    "fortran": np.asfortranarray(np.eye(3)),
    "label": np.array(["cat", "dog"]),
}


@pytest.mark.parametrize("where", ["workstation", "device"])
def test_numpy_reads_them_back(tmp_path, where):
    path = tmp_path / "a.npz"
    if where == "workstation":
        write_npz(path, ARRAYS)
    else:
        content = io.BytesIO()
        write_npz_on_device(content, ARRAYS)
        path.write_bytes(content.getvalue())
    with np.load(path) as archive:
        assert archive.files == list(ARRAYS)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(archive[name], array)
            assert archive[name].dtype == array.dtype


def test_the_same_arrays_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_npz(tmp_path / name, ARRAYS)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
