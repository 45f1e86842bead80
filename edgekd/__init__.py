"""edgekd: from a teacher network to a gated, deployable edge artifact.

The names for use in a notebook; each is imported when it is first used, so that
``import edgekd`` costs nothing.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgekd.api import benchmark, build, export, gate, load_result, quantize, run
    from edgekd.config.profile import load_profile

# Read by ONNX Runtime when it is imported: it would otherwise look up a host for its telemetry and
# store an identifier of this machine. Child processes inherit it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = ["benchmark", "build", "export", "gate", "load_profile", "load_result", "quantize", "run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'edgekd' has no attribute {name!r}")
    module = "edgekd.config.profile" if name == "load_profile" else "edgekd.api"
    return getattr(importlib.import_module(module), name)
