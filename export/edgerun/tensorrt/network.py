"""An ONNX file read by TensorRT's own parser: the network, or the unsupported nodes with
reasons.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Tuple

from edgerun.errors import BadInput
from edgerun.files import describe_files
from edgerun.model import dimension_name
from edgerun.tensorrt.library import Library, open_library, start_builder

PARSE_SCHEMA = "edgerun.parse/1"
PROBLEMS_SHOWN = 5
_QUANTIZATION = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Problem:
    """One node that the parser refuses; ``node`` may be empty where the file names none."""

    node: str
    op: str
    message: str

    def to_json(self) -> Dict[str, str]:
        """A plain mapping for a JSON file."""
        return {"node": self.node, "op": self.op, "message": self.message}

    def __str__(self) -> str:
        return f"{self.node or '(no name)'} ({self.op or 'no operator'}): {self.message}"


@dataclass(frozen=True)
class Parsed:
    """A parser's result. References builder and parser, because they own the network's weights."""

    builder: Any
    network: Any
    parser: Any
    problems: Tuple[Problem, ...]


def parse(model: Path, name: str) -> Dict[str, Any]:
    """The parser's verdict as a record ``edgerun.parse/1``; no engine is built.

    Raises:
        BadInput: the file is missing or is no complete ONNX model, or the library is absent.
        RunFailed: the library does not start.
    """
    library = open_library(name)
    parsed = read_network(library, model, strongly_typed=True)
    return {
        "schema": PARSE_SCHEMA,
        "library": library.name,
        "version": library.version,
        "model": {"path": str(model), **describe_files(model)},
        "supported": not parsed.problems,
        "problems": [problem.to_json() for problem in parsed.problems],
        "remedy": remedy_for(parsed.problems) if parsed.problems else None,
        "warnings": list(library.log.warnings),
    }


def read_network(library: Library, model: Path, strongly_typed: bool) -> Parsed:
    """Parse a model, its external weights included.

    Args:
        strongly_typed: use each tensor's type in the model; else the builder may choose.

    Raises:
        BadInput: the file or its weights are missing, truncated or not ONNX.
    """
    if not model.is_file():
        what = "the model is a folder, not a file" if model.exists() else "there is no such file"
        raise BadInput(what, str(model), "give the path of an .onnx file")
    builder = start_builder(library)
    network = builder.create_network(_creation_flags(library, strongly_typed))
    parser = library.module.OnnxParser(network, library.log)
    whole = parser.parse_from_file(str(model))
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    _check_weights(library, errors, model)
    # Protobuf parses many other files as an empty message.
    broken = any(error.code().name == "MODEL_DESERIALIZE_FAILED" for error in errors)
    if broken or (whole and not network.num_outputs):
        raise BadInput(
            "this is not a complete ONNX model",
            where=f"{model} ({model.stat().st_size} bytes)",
            remedy="the file may be truncated or of another format: export or copy it again",
        )
    _drop_no_names(network)
    problems = tuple(_problem(error) for error in errors)
    if not whole and not problems:
        reason = library.log.last_error() or "the parser gives no reason"
        problems = (Problem("", "", reason),)
    return Parsed(builder, network, parser, () if whole else problems)


def refusal(library: Library, model: Path, problems: Tuple[Problem, ...]) -> BadInput:
    """The error for a model that cannot become an engine."""
    shown = "".join(f"\n    {problem}" for problem in problems[:PROBLEMS_SHOWN])
    more = len(problems) - PROBLEMS_SHOWN
    left = f"\n    and {more} more" if more > 0 else ""
    return BadInput(
        f"{library} does not take the model, for {len(problems)} of its nodes:{shown}{left}",
        where=str(model),
        remedy=remedy_for(problems),
    )


def remedy_for(problems: Tuple[Problem, ...]) -> str:
    """The remedy for refused nodes."""
    if any(problem.op in _QUANTIZATION for problem in problems):
        return (
            "the model is quantized for another runtime; TensorRT takes symmetric int8 with zero "
            "points of 0 and biases in float: edgekd quantize MODEL.onnx --for tensorrt "
            "--calibration DATA -o OUT.onnx"
        )
    return "export the model with other operators or another opset, or run it with ONNX Runtime"


def _creation_flags(library: Library, strongly_typed: bool) -> int:
    """EXPLICIT_BATCH where it still exists, and STRONGLY_TYPED."""
    flags = 0
    for name, wanted in (("EXPLICIT_BATCH", True), ("STRONGLY_TYPED", strongly_typed)):
        member = library.member("NetworkDefinitionCreationFlag", name)
        if wanted and member is not None:
            flags |= 1 << int(member)
    return flags


def _drop_no_names(network: Any) -> None:
    """Rename dimensions that an exporter calls "?": the library requires dimensions of one name to
    have one size. The first one keeps its name, as the parser uses it."""
    seen = set()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        for axis in range(len(tuple(tensor.shape))):
            name = tensor.get_dimension_name(axis)
            if not name or dimension_name(name) is not None:
                continue
            if name in seen:
                tensor.set_dimension_name(axis, "")
            seen.add(name)


def _check_weights(library: Library, errors: List[Any], model: Path) -> None:
    """The error for unreadable weights, whose reason is only in the log."""
    if not any("importInitializers" in f"{error.func()} {error.desc()}" for error in errors):
        return
    logged = library.log.errors
    reasons = [text for text in logged if "open file" in text or "out of range" in text]
    if reasons:
        raise BadInput(
            f"the model's weights are in another file, which cannot be read: {reasons[0]}",
            where=str(model),
            remedy="put the complete weight file next to the model, under its original name",
        )


def _problem(error: Any) -> Problem:
    # Without a GPU every refusal is followed by a CUDA error, which is not the cause.
    lines = [line for line in error.desc().splitlines() if "cudaError" not in line]
    return Problem(error.node_name(), error.node_operator(), " ".join(" ".join(lines).split()))
