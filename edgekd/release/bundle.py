"""The bundle for the device: model, edgerun, example, manifest, README."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from edgekd.errors import StageError
from edgekd.files import write_npz
from edgekd.measurement import full_text, markdown_text
from edgekd.release.result import Result
from edgekd.spec import ModelSpec
from edgerun.files import sha256
from edgerun.manifest import BUNDLE_SCHEMA, MANIFEST


def _readme(manifest: Mapping[str, Any], result: Result) -> str:
    """The README for the content of a manifest."""
    parts = [
        f"# {markdown_text(manifest['name'])}",
        "",
        f"A {markdown_text(manifest['task']['name'])} model in ONNX, with what runs and checks "
        "it. It needs Python 3.8 or newer, numpy and onnxruntime; nothing else.",
        "",
        "```sh",
        "python -m pip install -r requirements.txt      # numpy onnxruntime",
        "python -m edgerun verify .                     # every file is what was packed",
        "python -m edgerun run model.onnx --inputs example.npz --output ../outputs.npz",
        "```",
        "",
        "Run them in this folder; their output is written next to it, so that the bundle stays "
        "unchanged. The outputs for `example.npz` (real samples) were, when this "
        "was packed, those in `expected.npz`. The empty files named `__pycache__` belong to it: "
        "they keep Python from writing byte code here, and from running any that was put here.",
        "",
        "```sh",
        "python -c \"import numpy as n; o, e = n.load('../outputs.npz'), n.load('expected.npz'); "
        'print({k: float(abs(o[k] - e[k]).max()) for k in e})"   # near 0',
        "python -m edgerun bench model.onnx --inputs example.npz --json ../bench.json",
        "```",
        "",
        "## Inputs and outputs",
        "",
        "| | name | dtype | shape |",
        "|---|---|---|---|",
    ]
    for kind in ("inputs", "outputs"):
        for tensor in manifest[kind]:
            shape = " × ".join(map(markdown_text, tensor["shape"]))
            plain = re.fullmatch(r"[\w./:-]+", tensor["name"])
            name = f"`{tensor['name']}`" if plain else markdown_text(tensor["name"])
            parts.append(f"| {kind[:-1]} | {name} | {tensor['dtype']} | {shape} |")
    parts += [
        "",
        "Give raw `uint8` data and `edgerun` prepares it with the constants in `manifest.json`, "
        "`(x · scale − mean) / std`; `float32` data must be preprocessed already.",
    ]
    if manifest["labels"]:
        labels = ", ".join(map(markdown_text, manifest["labels"][:20]))
        more = " …" if len(manifest["labels"]) > 20 else ""
        parts += [
            "",
            f"Classes, in the order of the outputs: {labels}{more} (all in the manifest).",
        ]
    parts += _engine_lines(manifest.get("engines") or {})
    parts += ["", "## Figures", "", *_figure_rows(result)]
    return "\n".join(parts) + "\n"


def _engine_lines(engines: Mapping[str, Any]) -> list[str]:
    """How each additional engine is built on the device; edgerun needs its runtime there."""
    if not engines:
        return []
    lines = ["", "## Engines of other runtimes", ""]
    for kind, build in engines.items():
        figures = (
            "The figures below are those of its engine."
            if build["measured"]
            else "Its figures are not those below: it was not measured."
        )
        lines.append(
            f"`engines/{kind}` holds the student made for {kind} ({build['from']}). {figures}"
        )
        if build["command"]:
            lines += [
                "Build it on the device, in that folder:",
                "",
                "```sh",
                f"PYTHONPATH=../.. {build['command']}",
                "```",
                "",
            ]
    return lines


def _figure_rows(result: Result) -> list[str]:
    student = result.student
    rows = [
        (result.metric, student.metric),
        ("size", student.size_mb),
        ("parameters", student.parameters),
        ("latency p50", student.latency.get("p50_ms")),
        ("latency p95", student.latency.get("p95_ms")),
        ("peak memory above an empty process", student.peak_memory_mb),
    ]
    return [
        "| figure | value (95 % interval) | n | evidence |",
        "|---|---|---|---|",
        *(
            f"| {markdown_text(label)} | {markdown_text(full_text(figure))} | {figure.n:,} "
            f"| {figure.evidence} |"
            for label, figure in rows
            if figure is not None
        ),
        "",
        f"Profile: {markdown_text(result.profile)}; "
        f"measured on target: {markdown_text(result.target)}.",
    ]


MODEL = "model.onnx"

ENGINES = "engines"

EXAMPLE = "example.npz"

EXPECTED = "expected.npz"

REQUIREMENTS = "numpy\nonnxruntime\n"

_EPOCH = 0
"""Modification time of every member of the archive, so that equal content is an equal file."""


def write_bundle(
    folder: Path,
    model: Path,
    edgerun_folder: Path,
    *,
    name: str,
    spec: ModelSpec,
    preprocess: Mapping[str, Mapping[str, Any]],
    labels: Sequence[str] | None,
    task: Mapping[str, Any],
    runtime: Mapping[str, Any],
    result: Result,
    example: Mapping[str, npt.NDArray[Any]],
    engines: Path | None = None,
) -> Path:
    """Write a bundle as a folder and as ``<folder>.tar.gz`` next to it.

    The bundle's own ``edgerun`` runs the example in a fresh process before it is packed: the
    outputs are stored as ``expected.npz``, and a bundle that does not run is never written.

    Args:
        folder: the bundle's folder; replaced if it exists.
        model: the ONNX file.
        edgerun_folder: the device-side package, copied in.
        name: of the pipeline.
        spec: the model's inputs and outputs.
        preprocess: by input name ``{"scale", "mean", "std"}``: what ``edgerun`` does to raw uint8
            data, ``(x · scale − mean) / std``.
        labels: class names, if the task has them.
        task: ``{"name", "output"}``.
        runtime: ``{"providers", "threads"}`` that the figures were measured with, and the level of
            ``optimization`` where it differs from edgerun's default.
        result: of the benchmark; its figures, versions and fingerprints go in.
        example: a few real samples by input name, (N, …): raw where they are uint8, otherwise
            as the model expects them.
        engines: a folder for each additional runtime, with the ONNX file and ``build.json``: how
            the engine is built on the device, and the engine itself if it is built already.

    Returns:
        The archive.

    Raises:
        StageError: the bundle does not run.
    """
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    shutil.copyfile(model, folder / MODEL)
    shutil.copytree(
        edgerun_folder,
        folder / "edgerun",
        ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"),
    )
    for package in [path.parent for path in (folder / "edgerun").rglob("__init__.py")]:
        # A file where Python's cache would be: no byte code is written there, nor read from there.
        (package / "__pycache__").touch()
    builds = {}
    if engines is not None and engines.is_dir():
        shutil.copytree(engines, folder / ENGINES)
        for file in sorted((folder / ENGINES).glob("*/build.json")):
            builds[file.parent.name] = json.loads(file.read_text(encoding="utf-8"))
    (folder / "requirements.txt").write_text(REQUIREMENTS, encoding="utf-8")
    write_npz(folder / EXAMPLE, example)
    manifest = {
        "schema": BUNDLE_SCHEMA,
        "name": name,
        "task": dict(task),
        "model": {"file": MODEL},
        **spec.to_json(),
        "preprocess": {key: dict(value) for key, value in preprocess.items()},
        "labels": list(labels) if labels else None,
        "runtime": dict(runtime),
        "example": {"inputs": EXAMPLE, "outputs": EXPECTED},
        "engines": {
            kind: {
                "from": build["from"],
                "precision": build["precision"],
                "measured": build["measured"],
                "command": build.get("command"),
            }
            for kind, build in builds.items()
        },
        "figures": _figures(result.to_json()),
        "environment": result.environment,
        "versions": result.versions,
        "fingerprints": result.fingerprints,
    }
    (folder / "README.md").write_text(_readme(manifest, result), encoding="utf-8")
    _write_manifest(folder, manifest)
    _run_example(folder, runtime)
    _write_manifest(folder, manifest)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    archive = folder.parent / f"{folder.name}.tar.gz"
    write_archive(folder, archive)
    return archive


def write_archive(folder: Path, archive: Path) -> None:
    """Pack a folder so that equal content gives an equal file, byte for byte.

    Members are sorted, have no owner and no time, and are under the folder's name.
    """
    with (
        archive.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=_EPOCH) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            member = tarfile.TarInfo(f"{folder.name}/{file.relative_to(folder).as_posix()}")
            member.size = file.stat().st_size
            member.mode, member.mtime = 0o644, _EPOCH
            with file.open("rb") as content:
                tar.addfile(member, content)


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    files = {
        path.relative_to(folder).as_posix(): {
            "sha256": sha256(path),
            "bytes": path.stat().st_size,
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    content = json.dumps({**manifest, "files": files}, indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(content + "\n", encoding="utf-8")


def _run_example(folder: Path, runtime: Mapping[str, Any]) -> None:
    """Run the bundle on its own example, as the device will."""
    command = [sys.executable, "-m", "edgerun", "run", MODEL]
    command += ["--inputs", EXAMPLE, "--output", EXPECTED]
    if runtime.get("threads"):
        command += ["--threads", str(runtime["threads"])]
    if runtime.get("optimization"):
        command += ["--optimization", str(runtime["optimization"])]
    # Python finds the bundle's own edgerun: the working folder comes first for -m. An inherited
    # PYTHONPATH or PYTHONSAFEPATH must not put another one before it.
    inherited = ("PYTHONPATH", "PYTHONSAFEPATH")
    environment = {key: value for key, value in os.environ.items() if key not in inherited}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0 or not (folder / EXPECTED).is_file():
        raise StageError(
            f"the bundle does not run: {(done.stderr or done.stdout).strip()[-2000:]}",
            where=str(folder),
            remedy=f"run it there by hand: {' '.join(['python', *command[1:]])}",
        )


def _figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """The student's figures and the comparison, without the raw samples."""
    student = dict(result["models"]["student"])
    for key in ("file", "samples_ms"):
        student.pop(key, None)
    figures = {**result, "student": student}
    keys = ("profile", "target", "evidence", "task", "student", "comparison")
    return {key: figures[key] for key in keys}
