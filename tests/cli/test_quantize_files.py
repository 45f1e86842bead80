"""Which files ``edgekd quantize`` may write: none that it reads, and none half."""

from __future__ import annotations

import errno
import os

import pytest

from tests.cli.quantizing import quantize
from tests.onnx_builders import save_external

LOST = "would overwrite another file of this command"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-o", "DATA"], LOST),
        (["-o", "OUT", "--json", "MODEL"], LOST),
        (["-o", "OUT", "--json", "DATA"], LOST),
        (["-o", "LINK"], LOST),
        (["-o", "OUT", "--json", "LINK"], LOST),
        (["-o", "OUT", "--json", "OUT"], LOST),
        (["-o", "OUT", "--json", "FOLDER"], "a folder, not a file"),
        (["-o", "OUT", "--json", "FOLDER/absent/r.json"], "does not exist"),
        (["-o", "OTHER", "--validation", "OTHER"], LOST),
        (["-o", "PIPE"], "a device or a pipe"),
        (["-o", "FOLDER"], "a folder, not a file"),
    ],
)
def test_a_file_that_would_be_lost_is_refused_before_the_work(
    model, data, tmp_path, monkeypatch, words, says
):
    def work(*args, **settings):
        raise AssertionError("work was begun")

    monkeypatch.setattr("edgekd.quantization.static.StaticQuantizer", work)
    own, other, link = tmp_path / "data.npz", tmp_path / "other.npz", tmp_path / "link.json"
    own.write_bytes(data.read_bytes())
    other.write_bytes(data.read_bytes())
    link.symlink_to(own)
    os.mkfifo(tmp_path / "pipe.onnx")
    before = own.read_bytes(), model.read_bytes()
    places = {
        "DATA": own,
        "OTHER": other,
        "LINK": link,
        "PIPE": tmp_path / "pipe.onnx",
        "MODEL": model,
    }
    places |= {"OUT": tmp_path / "o.onnx", "FOLDER": tmp_path}
    words = [places.get(word, word.replace("FOLDER", str(tmp_path))) for word in words]
    done = quantize(model, "--calibration", own, *words, code=2)
    assert says in " ".join(done.output.split())
    assert (own.read_bytes(), model.read_bytes()) == before


def test_external_data_of_the_model_is_not_written_over(model, data, tmp_path):
    outside = save_external(model, tmp_path / "m.onnx", "m.bin")
    before = (tmp_path / "m.bin").read_bytes()
    quantize(outside, "-o", tmp_path / "m.bin", "--calibration", data, code=2)
    assert (tmp_path / "m.bin").read_bytes() == before


def test_a_file_named_like_a_partial_one_is_left_alone(model, data, tmp_path):
    mine = tmp_path / "o.partial.onnx"
    mine.write_bytes(model.read_bytes())
    quantize(mine, "-o", tmp_path / "o.onnx", "--calibration", data, "--no-timing")
    assert mine.read_bytes() == model.read_bytes()


@pytest.mark.parametrize("method", ["static", "dynamic", "weights-only", "fp16", "bf16"])
def test_a_disk_that_fills_up_is_an_error_without_a_traceback(
    model, data, tmp_path, monkeypatch, method
):
    def full(*args, **settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writes = "pathlib.Path.write_bytes" if method in ("fp16", "bf16") else "onnx.save"
    monkeypatch.setattr(writes, full)
    out = tmp_path / "o.onnx"
    done = quantize(model, "-o", out, "--calibration", data, "--method", method, code=3)
    assert "No space left" in done.output
    assert not isinstance(done.exception, OSError)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_error(model, data):
    done = quantize(model, "-o", "/proc/o.onnx", "--calibration", data, code=3)
    assert "cannot be written" in done.output
