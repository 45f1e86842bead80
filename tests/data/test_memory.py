import numpy as np

from edgekd.data import dataset


def test_large_arrays_live_in_a_file_and_hold_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(dataset, "IN_MEMORY_BYTES", 100)
    monkeypatch.setattr(dataset, "CHUNK_BYTES", 64)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    array = np.arange(400, dtype=np.int32).reshape(100, 4)
    indices = np.array([3, 99, 0, *range(10, 40)])
    result = dataset.take(array, indices)
    assert isinstance(result, np.memmap)
    np.testing.assert_array_equal(result, array[indices])
    assert list(tmp_path.iterdir()) == []


def test_chunks_cover_every_row_once(monkeypatch):
    monkeypatch.setattr(dataset, "CHUNK_BYTES", 50)
    array = np.arange(101)
    pieces = list(dataset.chunks(array))
    assert len(pieces) > 1
    np.testing.assert_array_equal(np.concatenate([piece for _, piece in pieces]), array)
    assert all(piece[0] == start for start, piece in pieces)
