from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest

from edgekd.errors import InputError, StageError, TargetError
from edgekd.files import edgerun_folder
from edgekd.targets import LocalTarget, local, open_target
from edgekd.targets.local import clean_environment
from tests.onnx_builders import save_onnx


@pytest.fixture
def model(tmp_path):
    text = "(float[batch,2] x) => (float[batch,2] y) { y = Add (x, x) }"
    return save_onnx(tmp_path / "model.onnx", text)


def test_a_run_answers_and_a_bench_measures(model, tmp_path, monkeypatch):
    # Relative paths start here, though edgerun runs in another folder.
    monkeypatch.chdir(tmp_path)
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.savez("d.npz", x=x)
    target = LocalTarget()
    target.run(model.relative_to(tmp_path), "d.npz", "y.npz", threads=1)
    np.testing.assert_array_equal(np.load("y.npz")["y"], 2 * x)
    record = target.bench(
        "model.onnx", "model.onnx", threads=1, min_queries=20, max_seconds=3, memory=False
    )
    assert len(record["models"]) == 2
    assert record["models"][0]["threads"] == 1
    assert record["comparison"]["interval"] is not None
    assert target.info(model)["model"]["inputs"][0]["name"] == "x"


def test_options_of_providers_reach_both_calls(model, tmp_path):
    options = {"CPUExecutionProvider": {"a key": 'a "quoted" value'}}
    record = LocalTarget().bench(
        model, provider_options=options, threads=1, min_queries=20, max_seconds=1, memory=False
    )
    assert record["models"][0]["providers"]["options"] == options
    quick = {"threads": 1, "min_queries": 20, "max_seconds": 1, "memory": False}
    for own, expected in (({}, {}), (None, options)):
        record = LocalTarget().bench(
            model, model, provider_options=options, against_options=own, **quick
        )
        assert [m["providers"]["options"] for m in record["models"]] == [options, expected]
    np.savez(tmp_path / "d.npz", x=np.zeros((1, 2), np.float32))
    absent = {"CUDAExecutionProvider": {"device_id": "0"}}
    with pytest.raises(InputError, match="which is not among the providers"):
        LocalTarget().run(model, tmp_path / "d.npz", tmp_path / "y.npz", provider_options=absent)


def test_the_process_has_edgerun_and_nothing_of_this_one(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere/with/torch")
    monkeypatch.setenv("PYTHONSTARTUP", "x.py")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    environment = clean_environment(2)
    assert environment["PYTHONPATH"] == str(edgerun_folder().parent)
    assert "PYTHONSTARTUP" not in environment
    assert environment["OMP_NUM_THREADS"] == environment["OPENBLAS_NUM_THREADS"] == "2"


def test_a_module_in_the_current_folder_does_not_stand_in_for_numpy(tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("raise SystemError('the wrong numpy')")
    monkeypatch.chdir(tmp_path)
    assert LocalTarget().info()["environment"]["versions"]["numpy"] == np.__version__


def test_bad_input_keeps_what_where_and_remedy(tmp_path):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"hello")
    with pytest.raises(InputError, match="not a complete ONNX model") as caught:
        LocalTarget().bench(bad)
    assert str(bad) in caught.value.where
    assert "export or copy it again" in caught.value.remedy


@pytest.fixture
def fake_edgerun(tmp_path, monkeypatch):
    """An edgerun whose main module a test writes."""

    def write(source):
        folder = tmp_path / "fake" / "edgerun"
        folder.mkdir(parents=True)
        # A package without it would stand behind one of an installation for development.
        (folder / "__init__.py").touch()
        (folder / "__main__.py").write_text(f"import sys\n{source}")
        shutil.copy(edgerun_folder() / "errors.py", folder)
        monkeypatch.setattr(local, "edgerun_folder", lambda: folder)

    return write


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise ZeroDivisionError('deep inside')", "ZeroDivisionError: deep inside"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9"),
        (
            "import edgerun.errors as e; sys.exit(e.RunFailed('no memory').report())",
            "^no memory",
        ),
        ("import edgerun.errors as e; sys.exit(e.NoDevice('x').report())", "^x"),
        ("import sys; print('usage', file=sys.stderr); sys.exit(2)", "ended with code 2"),
        ("", "left no readable result"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_crash_is_a_target_error_with_the_last_words(fake_edgerun, source, message):
    fake_edgerun(source)
    with pytest.raises(TargetError, match=message):
        LocalTarget().info()


def test_a_file_that_cannot_be_written_is_no_fault_of_the_machine(fake_edgerun):
    fake_edgerun("import edgerun.errors as e; sys.exit(e.CannotWrite('no space').report())")
    with pytest.raises(StageError, match="no space"):
        LocalTarget().info()


def test_an_error_crosses_the_process_whole(fake_edgerun):
    what, where, remedy = (
        "it holds\n  where: a line",
        "a file named\nedgerun: x",
        "to do: é \x1b[31m",
    )
    fake_edgerun(
        "import edgerun.errors as e; print('noise', file=sys.stderr); "
        f"sys.exit(e.BadInput({what!r}, {where!r}, {remedy!r}).report())"
    )
    with pytest.raises(InputError) as caught:
        LocalTarget().info()
    assert (caught.value.what, caught.value.where, caught.value.remedy) == (what, where, remedy)


def test_a_misspelt_setting_is_refused(tmp_path):
    with pytest.raises(TypeError, match="'bach'"):
        LocalTarget().bench(tmp_path / "m.onnx", bach=1)


def test_a_target_is_opened_by_name():
    assert open_target("local").name == "local"
    assert open_target("ssh://user@board:22").config.address == "user@board:22"
    for wrong in ("ssh://", "ssh://a:b@c", "ssh://-o=x", "ssh://h/folder", "ssh://h:0"):
        with pytest.raises(InputError, match="is no target"):
            open_target(wrong)
    with pytest.raises(InputError, match="did you mean 'local'"):
        open_target("locl")


def test_a_runtime_that_ends_for_memory_is_an_input_error(tmp_path):
    """In a thread of the runtime, C++'s exception ends the process."""
    said = "terminate called after throwing an instance of 'std::bad_alloc'\n"
    done = subprocess.CompletedProcess([], -6, "runs\n", said)
    error = local.error_of("probe", done, tmp_path / "m.onnx", 2 * 10**9)
    assert isinstance(error, InputError)
    assert error.what == "the model needs more memory than 2,000 MB"
    killed = subprocess.CompletedProcess([], -9, "runs\n", "")
    assert "signal 9 (SIGKILL) while it ran m.onnx" in str(
        local.error_of("run", killed, tmp_path / "m.onnx")
    )
