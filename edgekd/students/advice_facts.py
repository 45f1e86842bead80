"""What advice depends on, and what it is: a key with its reason and the evidence for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgekd.config.budgets import Budgets
from edgekd.config.pipeline import PipelineConfig
from edgekd.config.profile import Profile
from edgekd.measurement import Measurement
from edgekd.release.result import Result


@dataclass(frozen=True)
class Known:
    """A figure that was measured, and the file that it is in."""

    value: float
    file: str


@dataclass(frozen=True)
class Facts:
    """What the advice depends on. What is not known is None."""

    config: PipelineConfig
    """With the goal and the requirements."""
    content: Mapping[str, Any]
    """The same as written: only keys that are set."""
    original: Mapping[str, Any]
    """As written without them: the file with ``--set``."""
    profile: Profile
    wished: frozenset[str]
    """Keys that the goal or an option set."""
    objectives: tuple[str, ...] | None
    """Those of the search that the goal asks for, the first deciding; None: it asks for none."""
    providers: tuple[str, ...]
    """ONNX Runtime's execution providers on this machine."""
    saturates: bool
    """Whether this processor adds INT8 products in 16 bits (x86 without VNNI)."""
    rtx_installed: bool
    """Whether engines of TensorRT for RTX can be built here."""
    higher_is_better: bool
    metric: str
    inputs: tuple[tuple[int, ...], ...] | None = None
    """The shape of one sample of each input."""
    classes: int | None = None
    samples: int | None = None
    """Of the training split."""
    teacher_score: Known | None = None
    """On validation samples."""
    teacher_entropy: Known | None = None
    """Mean of its outputs on validation samples as a share of the largest, ln(classes)."""
    teacher_parameters: Known | None = None
    student_parameters: Known | None = None
    result: Result | None = None
    """Of the file as it is, without the goal."""
    result_file: str = ""
    choice: Mapping[str, Any] | None = None
    """Of the engines stage, in the same run."""
    choice_file: str = ""
    searched: Mapping[str, Any] | None = None
    """The record of the search that chose the student."""
    searched_file: str = ""

    @property
    def budgets(self) -> Budgets:
        """Those of the gate, else the profile's."""
        return Budgets.resolve(self.config.gate, self.profile)

    def written(self, key: str) -> Any:
        """The value of a dotted key in the file, or None."""
        return at(self.content, key)

    def figure(self, name: str) -> Measurement | None:
        """A comparison of the earlier result, such as ``drop``; None where it was not measured."""
        figure = self.result.comparison.get(name) if self.result is not None else None
        return figure if figure is not None and figure.value is not None else None

    def keep(self, key: str, reason: str, evidence: str = "yours") -> Advice:
        """Leave a key as it is written."""
        return self.choose(key, self.written(key), reason, evidence)

    def choose(self, key: str, value: Any, reason: str, evidence: str) -> Advice:
        """Advise a value, with the file's own beside it where that is another."""
        before = at(self.original, key)
        return Advice(key, value, reason, evidence, None if before == value else before)


def at(content: Any, key: str) -> Any:
    """The value of a dotted key in a file's content, or None."""
    for part in key.split("."):
        content = content.get(part) if isinstance(content, Mapping) else None
    return content


@dataclass(frozen=True)
class Advice:
    """One key of the advised pipeline."""

    key: str
    value: Any
    """As in YAML; what the file has where that is to stay."""
    reason: str
    evidence: str
    """``measured: FILE``, ``published: …``, ``device: …`` or ``yours``."""
    yours: Any = None
    """What the file has, where the advice is another."""

    @property
    def comment(self) -> str:
        """The text above the key."""
        changed = "" if self.yours is None else f"yours: {short(self.yours)}, advised: as below. "
        source = "" if self.reason.startswith(self.evidence) else f" [{self.evidence}]"
        return f"{changed}{self.reason}{source}"


def short(value: Any, longest: int = 160) -> str:
    """A value in one line of YAML's flow style, of so many characters at most."""
    text = json.dumps(value, ensure_ascii=False).replace('"', "")
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
