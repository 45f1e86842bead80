"""The process that reads changed inputs: ``python -m tests.fuzz.worker FOLDER``.

It takes lines ``TARGET NUMBER`` and gives one JSON line for each. Its parent ends it when an input
takes too long; a limit on its data is that on memory.
"""

from __future__ import annotations

import copy
import io
import json
import os
import random
import resource
import shutil
import sys
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from click.testing import CliRunner

from edgekd.cli import main
from edgekd.errors import EdgekdError
from edgerun.manifest import BUNDLE_SCHEMA
from tests.fuzz.mutators import changed_bytes, changed_json, changed_yaml
from tests.release.conftest import latency, make_result

MEMORY = 2 << 30
"""How much data a target may allocate beyond the libraries."""

PIPELINE = """\
name: digits
data: {source: digits, augment: [{shift: {pixels: 1}}]}
profile: host
teacher: {model: convnet-m, train: {epochs: 2, batch_size: 64, learning_rate: 3e-3}}
student:
  model: convnet-xs
distill:
  losses:
    - {hard_labels: {}, weight: 0.1}
    - {soft_labels: {temperature: 4}, weight: 0.9}
  epochs: 3
engines: [onnxruntime]
gate:
  evidence: measured-on-host
  accuracy: {min: 0.05, max_drop: 0.99}
  size: {max_mb: 1}
  latency: {p95_ms: 50}
"""

BUDGETS = """\
accuracy: {min: 0.05, max_drop: 0.99}
size: {max_mb: 1}
latency: {p95_ms: 50}
memory: {peak_mb: 300}
evidence: measured-on-host
"""

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Target:
    """What reads an input.

    Attributes:
        make: writes the changed input into the current folder.
        words: the command line, or a function.
        codes: the exit codes that a wrong input may have.
        share: of the number of inputs; slow ones get fewer.
    """

    make: Callable[[random.Random], None]
    words: tuple[str, ...] | Callable[[], Any]
    codes: tuple[int, ...] = (0, 2)
    share: float = 1.0


def _write(name: str, content: bytes) -> None:
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_bytes(content)


def _yaml(name: str, text: str, **others: str) -> Callable[[random.Random], None]:
    def make(random_: random.Random) -> None:
        _write(name, changed_yaml(text, yaml.safe_load(text), random_))
        for stem, content in others.items():
            _write(f"{stem}.yaml" if stem != "ok" else "ok.json", content.encode())

    return make


@cache
def _result() -> dict[str, Any]:
    result = make_result()
    for model in result["models"].values():
        if "samples_ms" in model:
            model["samples_ms"] = model["samples_ms"][:200]
            model["latency"] = latency(model["samples_ms"])
    return result


def _changed_result(random_: random.Random) -> None:
    _write("r.json", changed_json(_result(), random_))
    _write("ok.json", json.dumps(_result()).encode())
    _write("ok.yaml", BUDGETS.encode())


@cache
def _bench() -> dict[str, Any]:
    from tests.release.test_build_result import bench

    return copy.deepcopy(bench())


def _changed_bench(random_: random.Random) -> None:
    _write("b.json", changed_json(_bench(), random_))
    _write("ok.json", json.dumps(_result()).encode())
    _write("b.yaml", b"latency: {p95_ms: 50}\n")


def _changed_manifest(random_: random.Random) -> None:
    import hashlib

    files = {}
    for name in ("model.onnx", "README.md"):
        _write(f"bundle/{name}", name.encode())
        files[name] = {"sha256": hashlib.sha256(name.encode()).hexdigest(), "bytes": len(name)}
    manifest = {"schema": BUNDLE_SCHEMA, "name": "x", "files": files}
    _write("bundle/manifest.json", changed_json(manifest, random_))


def _npz(random_: random.Random) -> bytes:
    """An archive in which members, headers or bytes are changed."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "image": rng.integers(0, 255, (24, 4, 4)).astype(np.uint8),
        "label": np.arange(24) % 3,
    }
    if random_.random() < 0.4:
        name = random_.choice(list(arrays))
        arrays[name] = random_.choice(
            (
                *(np.array(3), np.zeros((0, 4)), np.array(["a", "b"]), np.zeros(24, "M8[s]")),
                *(np.zeros((24, 4), complex), np.full((24, 4), np.nan), np.zeros(24, "i4,f8")),
                *(np.zeros((24,) + (1,) * 20), np.zeros((24, 0)), arrays[name][:7]),
            )
        )
    stream = io.BytesIO()
    kind = random_.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(stream, "w", kind) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asanyarray(array))
            data = member.getvalue()
            if random_.random() < 0.4:
                head = data.index(b"\n") + 1
                data = changed_bytes(data[:head], random_) + data[head:]
            archive.writestr(f"{name}.npy", data)
            if random_.random() < 0.1:
                archive.writestr(random_.choice((f"{name}.npy", "../x.npy", "x", "a" * 300)), data)
    return stream.getvalue()


def _changed_data(random_: random.Random) -> None:
    data = _npz(random_)
    _write("d.npz", changed_bytes(data, random_) if random_.random() < 0.5 else data)
    _write("p.yaml", DATA.format(source="npz", path="d.npz").encode())


DATA = """\
name: n
data: {{source: {source}, path: {path}}}
teacher: {{model: convnet-m, train: {{epochs: 1}}}}
student: {{model: convnet-xs}}
"""


def _changed_images(random_: random.Random) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for kind in ("a", "b"):
        for number in range(10):
            pixels = rng.integers(0, 255, (6, 6, 3)).astype(np.uint8)
            stream = io.BytesIO()
            suffix = random_.choice(("png", "jpeg", "bmp", "gif"))
            Image.fromarray(pixels).save(stream, suffix)
            data = stream.getvalue()
            if number in (0, 5) and random_.random() < 0.6:
                data = changed_bytes(data, random_)
            _write(f"i/{kind}-{number}", b"")
            Path("i", kind).mkdir(exist_ok=True)
            Path("i", f"{kind}-{number}").unlink()
            Path("i", kind, f"{number}.{suffix}").write_bytes(data)
    _write("p.yaml", DATA.format(source="image-folder", path="i").encode())


@cache
def _network() -> Any:
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def _safetensors(random_: random.Random) -> None:
    """The header changed as JSON with its length corrected, or the bytes."""
    from safetensors.torch import save

    data = save(_network().state_dict(), {"format": "pt"})
    size = int.from_bytes(data[:8], "little")
    if random_.random() < 0.6:
        header = changed_json(json.loads(data[8 : 8 + size]), random_)
        data = len(header).to_bytes(8, "little") + header + data[8 + size :]
    else:
        data = changed_bytes(data, random_)
    _write("w.safetensors", data)


def _torch_file(random_: random.Random) -> None:
    """The members of the archive changed, with right sums, or the bytes."""
    import torch

    stream = io.BytesIO()
    content = {"state_dict": _network().state_dict(), "epoch": 3, "classes": ["a", "b", "c"]}
    torch.save(content, stream, _use_new_zipfile_serialization=random_.random() < 0.7)
    data = stream.getvalue()
    if zipfile.is_zipfile(stream) and random_.random() < 0.6:
        changed = io.BytesIO()
        with zipfile.ZipFile(stream) as old, zipfile.ZipFile(changed, "w") as new:
            victim = random_.choice(old.namelist())
            for name in old.namelist():
                inner = old.read(name)
                new.writestr(name, changed_bytes(inner, random_) if name == victim else inner)
        data = changed.getvalue()
    else:
        data = changed_bytes(data, random_)
    _write("w.pt", data)


def _load(name: str) -> Callable[[], None]:
    def load() -> None:
        from edgekd.models.weights import load_weights, read_checkpoint

        read = read_checkpoint(Path(name))
        read.class_names()
        load_weights(copy.deepcopy(_network()), read)

    return load


def _changed_onnx(random_: random.Random) -> None:
    from tests.fuzz.protobuf import MODELS, changed_model, model

    built = model(random_.choice([*MODELS, "external"]))
    _write("w.bin", bytes(48))
    shape = [size.dim_value or 1 for size in built.graph.input[0].type.tensor_type.shape.dim]
    rows = np.random.default_rng(0).standard_normal((6 * shape[0], *shape[1:]))
    np.savez("c.npz", x=rows.astype(np.float32))
    if random_.random() < 0.6:
        changed_model(built, random_)
    data = built.SerializeToString()
    _write("m.onnx", changed_bytes(data, random_) if random_.random() < 0.4 else data)


def _changed_calibration(random_: random.Random) -> None:
    from tests.fuzz.protobuf import model

    _write("m.onnx", model("plain").SerializeToString())
    arrays = {"x": np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)}
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    data = stream.getvalue()
    if random_.random() < 0.3:
        data = _npz(random_).replace(b"image", b"x")
    _write("d.npz", changed_bytes(data, random_))


def _open_calibration() -> None:
    from edgekd.onnx.file import describe_onnx
    from edgekd.onnx.samples import open_samples

    for batch in open_samples(Path("d.npz"), describe_onnx(Path("m.onnx")).spec).batches(1):
        for array in batch.values():
            array.sum()


def _changed_cache(random_: random.Random) -> None:
    from edgekd.distill.cache_store import CacheStore

    store = CacheStore(Path("cache"), "k" * 64, 16, 40, 8)
    Path("cache").mkdir()
    store.write_header({"teacher": "t", "record_bytes": 16})
    for block in range(5):
        store.write(block, bytes(store.length(block) * 16))
    name = random_.choice(sorted(file.name for file in Path("cache").iterdir()))
    _write(f"cache/{name}", changed_bytes(Path("cache", name).read_bytes(), random_))


def _read_cache() -> None:
    """A damaged cache is one with missing blocks, never an error and never other records."""
    from edgekd.distill.cache_store import CacheStore

    store = CacheStore(Path("cache"), "k" * 64, 16, 40, 8)
    if store.header_fits():
        for block in set(range(5)) - set(store.missing(1)):
            assert store.read(block) in (None, bytes(store.length(block) * 16))


def _changed_training(random_: random.Random) -> None:
    from edgekd.distill.checkpoint import History, save_checkpoint

    weights = _network().state_dict()
    state = {"model": weights, "objective": {}, "best": weights, "step": {"n": 1}}
    save_checkpoint(Path("state"), {"seed": 0}, state, History("accuracy", True))
    _write("state/checkpoint.pt", changed_bytes(Path("state/checkpoint.pt").read_bytes(), random_))


def _resume() -> None:
    """A damaged state is not used: its weights are right, or there is none."""
    import torch

    from edgekd.distill.checkpoint import load_checkpoint

    state, history, _ = load_checkpoint(Path("state"), {"seed": 0})
    if history is not None:
        for name, tensor in _network().state_dict().items():
            assert torch.equal(state["model"][name], tensor)


PROFILE = (ROOT / "profiles/raspberry-pi-5.yaml").read_text(encoding="utf-8")

TARGETS: dict[str, Target] = {
    "pipeline": Target(_yaml("p.yaml", PIPELINE), ("plan", "p.yaml", "-o", "run")),
    "profile": Target(_yaml("p.yaml", PROFILE), ("profiles", "show", "p.yaml")),
    "profile-check": Target(_yaml("p.yaml", PROFILE), ("profiles", "check", "p.yaml")),
    "budgets": Target(
        _yaml("b.yaml", BUDGETS, ok=json.dumps(_result())),
        ("gate", "ok.json", "--budget", "b.yaml", "--junit", "j.xml", "--json", "g.json"),
        (0, 1, 2),
    ),
    "result-gate": Target(_changed_result, ("gate", "r.json", "--budget", "ok.yaml"), (0, 1, 2)),
    "result-compare": Target(_changed_result, ("compare", "r.json", "ok.json", "--json", "c.json")),
    "bench": Target(_changed_bench, ("gate", "b.json", "--budget", "b.yaml"), (0, 1, 2)),
    "device-bench": Target(
        _changed_bench, ("gate", "ok.json", "--device", "b.json", "--budget", "b.yaml"), (0, 1, 2)
    ),
    "manifest": Target(_changed_manifest, ("verify", "bundle"), (0, 1, 2)),
    "npz-data": Target(_changed_data, ("run", "p.yaml", "-o", "r", "--until", "data", "-q")),
    "images": Target(_changed_images, ("run", "p.yaml", "-o", "r", "--until", "data", "-q")),
    "safetensors": Target(_safetensors, _load("w.safetensors")),
    "checkpoint": Target(_torch_file, _load("w.pt")),
    "onnx-check": Target(
        _changed_onnx, ("check", "m.onnx", "--profile", "raspberry-pi-5"), (0, 1, 2), 0.5
    ),
    "onnx-quantize": Target(
        _changed_onnx,
        ("quantize", "m.onnx", "-o", "q.onnx", "--no-timing", "--calibration", "c.npz"),
        (0, 2, 3),
        0.5,
    ),
    "onnx-benchmark": Target(
        _changed_onnx,
        ("benchmark", "m.onnx", "--min-queries", "10", "--max-seconds", "0.2"),
        (0, 2, 3),
        0.05,
    ),
    "calibration": Target(_changed_calibration, _open_calibration),
    "teacher-cache": Target(_changed_cache, _read_cache, (0,)),
    "training-state": Target(_changed_training, _resume, (0,)),
}


def attempt(target: Target, random_: random.Random) -> dict[str, Any]:
    """Make one input in the current folder and read it."""
    target.make(random_)
    started = time.process_time()
    output, code = "", 0
    try:
        if callable(target.words):
            target.words()
        else:
            done = CliRunner().invoke(main, list(target.words))
            output, code = done.output, done.exit_code
            for report in Path(os.environ["XDG_CACHE_HOME"]).glob("edgekd/errors/*"):
                output += report.read_text(encoding="utf-8")
                report.unlink()
            if done.exception is not None and not isinstance(done.exception, SystemExit):
                output += "".join(traceback.format_exception(done.exception))
    except EdgekdError as error:
        output, code = str(error), error.exit_code
    except BaseException:
        output, code = traceback.format_exc(), 1
    return {"code": code, "output": output[-6000:], "seconds": time.process_time() - started}


def make_input(name: str, number: int, folder: Path) -> dict[str, Any]:
    """Attempt input NUMBER of a target in a fresh folder, which stays."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.chdir(folder)
    return attempt(TARGETS[name], random.Random(f"{name} {number}"))


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def serve(folder: Path) -> None:
    """Answer the lines of standard input; only they are on standard output."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        name, number = line.split()
        answer = make_input(name, int(number), folder / name)
        answer["peak_mb"] = _memory() / 1e6
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import torch  # noqa: F401

    with open("/proc/self/status") as status:  # noqa: PTH123
        used = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, resource.RLIM_INFINITY))
    serve(Path(sys.argv[1]).resolve())
