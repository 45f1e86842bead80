"""npz files by others: whatever is wrong with one is said before it is unpacked."""

import io
import struct
import zipfile

import numpy as np
import pytest

from edgerun import npz
from edgerun.errors import BadInput
from edgerun.npz import NpzFile


def npy(array=None, header=None, version=(1, 0), data=b""):
    """The bytes of an .npy, of an array or with any header."""
    if array is not None:
        stream = io.BytesIO()
        np.lib.format.write_array(stream, array, allow_pickle=True)
        return stream.getvalue()
    text = header if isinstance(header, bytes) else header.encode()
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + size + text + data


def archive(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members:
            file.writestr(f"{name}.npy", content)
    return path


def described(shape, descr="'<f4'"):
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


HEADERS = {
    "deep": "{'descr': " + "(" * 4000 + ")" * 4000 + "}\n",
    "deep list": "[" * 9000 + "\n",
    "long": "{'descr': '<f4', 'shape': (1,), 'fortran_order': False}" + " " * 60000 + "\n",
    "code": "__import__('os').system('true')\n",
    "no mapping": "3\n",
    "negative": described("(-1, 4)"),
    "huge": described("(4611686018427387904,)"),
    "huge product": described("(4294967296, 4294967296)"),
    "text shape": described("'abc'"),
    "no type": described("(1,)", "'nonsense'"),
    "nested type": described("(1,)", "[('a', " * 40 + "'<f4'" + ")]" * 40),
    "missing key": "{'descr': '<f4'}\n",
    "not text": b"\xff\xfe\xfd\n",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_a_header_that_is_no_header_is_said_to_be_damaged(tmp_path, header, version):
    path = archive(tmp_path / "a.npz", [("x", npy(header=header, version=version))])
    with NpzFile(path) as file, pytest.raises(BadInput, match="damaged at array 'x'") as caught:
        file.read("x")
    assert caught.value.where == str(path)
    assert "\n" not in caught.value.what


@pytest.mark.parametrize(
    "content", [b"", b"text", npy(np.ones(9))[:-1], npy(header="", version=(9, 9))]
)
def test_a_member_that_is_no_array_or_truncated(tmp_path, content):
    path = archive(tmp_path / "a.npz", [("x", content)])
    with NpzFile(path) as file, pytest.raises(BadInput, match="damaged at array 'x'"):
        file.read("x")


def test_damaged_compression_and_a_wrong_checksum(tmp_path):
    path = archive(tmp_path / "a.npz", [("x", npy(np.arange(999)))], zipfile.ZIP_DEFLATED)
    whole = path.read_bytes()
    for place in range(60, len(whole) - 120, 40):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with NpzFile(path) as file, pytest.raises(BadInput, match="damaged at array 'x'"):
            file.read("x")


def test_encryption_and_unknown_compression(tmp_path):
    path = archive(tmp_path / "a.npz", [("x", npy(np.arange(9)))])
    content = bytearray(path.read_bytes())
    local, central = content.index(b"PK\3\4"), content.index(b"PK\1\2")
    for flags, method in ((1, 0), (0, 99)):
        content[local + 6], content[central + 8] = flags, flags
        content[local + 8], content[central + 10] = method, method
        path.write_bytes(content)
        with NpzFile(path) as file, pytest.raises(BadInput, match="damaged at array 'x'"):
            file.read("x")


def test_objects_are_not_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was loaded",))

    path = archive(
        tmp_path / "a.npz", [("x", npy(np.array([Bomb()], object))), ("y", npy(np.ones(1)))]
    )
    with NpzFile(path) as file:
        assert file.read("y") == 1
        with pytest.raises(BadInput, match="'x' cannot be read: it holds pickled objects"):
            file.read("x")


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    zeros = np.zeros(1 << 20, np.uint8)
    path = archive(tmp_path / "a.npz", [("x", npy(zeros))], zipfile.ZIP_DEFLATED)
    with NpzFile(path) as file:
        assert np.array_equal(file.read("x"), zeros)
    monkeypatch.setattr(npz, "_LARGE", 1 << 19)
    with (
        NpzFile(path) as file,
        pytest.raises(BadInput, match="1,048,576 unpacked"),
    ):
        file.read("x")


def test_arrays_that_together_exceed_the_memory_are_refused(tmp_path, monkeypatch):
    path = archive(tmp_path / "a.npz", [(n, npy(np.zeros(1 << 10, np.uint8))) for n in "xyz"])
    monkeypatch.setattr(npz, "memory_limit", lambda: 2500)
    with NpzFile(path) as file:
        file.read("x"), file.read("y")
        with pytest.raises(BadInput, match="the arrays up to 'z' need"):
            file.read("z")


def test_a_bomb_gives_no_more_bytes_than_it_declares(tmp_path):
    path = archive(
        tmp_path / "a.npz", [("x", npy(np.zeros(1 << 16, np.uint8)))], zipfile.ZIP_DEFLATED
    )
    content = bytearray(path.read_bytes())
    central = content.index(b"PK\1\2")
    content[central + 24 : central + 28] = struct.pack("<I", 200)  # the unpacked size
    path.write_bytes(content)
    with NpzFile(path) as file, pytest.raises(BadInput, match="damaged at array 'x'"):
        file.read("x")


def test_more_than_ten_thousand_arrays_are_too_many(tmp_path):
    content = npy(np.zeros(1))
    path = archive(tmp_path / "a.npz", [(str(n), content) for n in range(10_001)])
    with pytest.raises(BadInput, match="has 10,001 arrays, and 10,000 are the most"):
        NpzFile(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_arrays_of_one_name_are_refused(tmp_path):
    path = archive(tmp_path / "a.npz", [("x", npy(np.ones(1))), ("x", npy(np.zeros(1)))])
    with pytest.raises(BadInput, match="two arrays of one name"):
        NpzFile(path)


@pytest.mark.parametrize("dtype", [">f4", ">i8", "<f2", "?", "<U3", "<c8"])
def test_arrays_come_in_the_byte_order_of_the_machine(tmp_path, dtype):
    array = np.array([[0, 1], [1, 0]]).astype(dtype)
    for given in (array, np.asfortranarray(array), array[0, 0]):
        path = archive(tmp_path / "a.npz", [("x", npy(given))])
        with NpzFile(path) as file:
            found = file.read("x")
        np.testing.assert_array_equal(found, given)
        assert found.dtype.kind == array.dtype.kind
        assert found.dtype.isnative
