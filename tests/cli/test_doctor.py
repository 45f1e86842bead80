"""The doctor: what is here, what is missing, and what to do; null-safe everywhere."""

import json
import sys

from edgekd.cli import doctor
from edgekd.cli.doctor import examine
from tests.command_line import edgekd


def named(checks, name):
    return next(check for check in checks if check.name == name)


def test_every_trouble_says_what_to_do(tmp_path):
    checks = examine(tmp_path)
    assert all(check.remedy for check in checks if check.status != "ok")
    assert all(check.detail and check.needed_for for check in checks)
    assert len({check.name for check in checks}) == len(checks)


def test_installed_and_missing_packages_are_told_apart(monkeypatch):
    assert named(examine(), "torch").status == "ok"
    monkeypatch.setitem(doctor.REQUIRED, "no-such-package-here", "nothing")
    check = named(examine(), "no-such-package-here")
    assert (check.status, check.remedy) == ("missing", "pip install no-such-package-here")


def test_another_build_of_onnxruntime_counts(monkeypatch):
    import importlib.metadata as metadata

    def version(name):
        if name == "onnxruntime-gpu":
            return "1.99"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert doctor.version_of("onnxruntime") == "1.99 (onnxruntime-gpu)"
    assert doctor.version_of("torch") is None


def test_a_gpu_is_told_by_the_kernels_files(tmp_path):
    nowhere = tmp_path / "nowhere"
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar 5\n")
    assert "550.54.15" in doctor.gpu(driver, nowhere).detail
    driver.write_text("")
    assert doctor.gpu(driver, nowhere).status == "ok"
    tegra = tmp_path / "nv_tegra_release"
    tegra.write_text("# R36 (release), REVISION: 4.3\n")
    assert "R36" in doctor.gpu(nowhere, tegra).detail
    assert doctor.gpu(nowhere, nowhere).status in ("ok", "note")


def test_part_of_the_fashion_mnist_files_is_not_enough(tmp_path):
    assert doctor.fashion_mnist(tmp_path).status == "note"
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"):
        (tmp_path / name).touch()
    partly = doctor.fashion_mnist(tmp_path)
    assert partly.status == "note"
    assert "2 of 4" in partly.detail
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        (tmp_path / name).touch()
    assert doctor.fashion_mnist(tmp_path).status == "ok"


def test_a_torch_that_does_not_start_is_reported(monkeypatch):
    monkeypatch.setattr(doctor, "_TORCH_PROBE", "raise ImportError('libtorch is broken')")
    check = named(examine(deep=True), "torch starts")
    assert check.status == "missing"
    assert "libtorch is broken" in check.detail


def test_the_command_prints_a_table_and_json():
    assert "ONNX Runtime" in edgekd("doctor").output
    rows = json.loads(edgekd("doctor", "--json").output)
    assert {"name", "status", "detail", "needed_for", "remedy"} == set(rows[0])
    assert rows[0]["detail"].startswith(f"{sys.version_info.major}.")
