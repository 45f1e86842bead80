"""What runs each node of a model: ONNX Runtime's provider of each node, an engine's precisions.

A profiled session is slower, so it is never the timed one.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from edgerun.errors import EdgerunError
from edgerun.files import is_engine
from edgerun.inputs import Feed
from edgerun.model import LoadedModel, Settings


def provider_nodes(model: Path, settings: Settings, feed: Feed) -> dict[str, int] | None:
    """Provider → number of nodes that it ran for one feed.

    Nodes inside a branch that was not taken are not counted; a subgraph that a provider compiled
    into one node counts as one. None where the runtime gives no profile, and for an engine,
    which has no nodes.
    """
    if is_engine(model):
        return None
    from edgerun.onnx_session import RUNTIME_ERRORS, OrtSession

    no_profile: tuple[type[Exception], ...] = (EdgerunError, OSError, ValueError, *RUNTIME_ERRORS)
    with tempfile.TemporaryDirectory(prefix="edgerun-") as folder:
        try:
            profiled = OrtSession(model, settings, profile_to=Path(folder) / "profile")
            profiled.run(feed)
            events = json.loads(Path(profiled.session.end_profiling()).read_text("utf-8"))
        except no_profile:
            # The figures are valid without it: the assignment is reported as "not known".
            return None
    nodes: dict[str, set[str]] = {}
    for event in events:
        provider = event.get("args", {}).get("provider")
        if event.get("cat") == "Node" and provider:
            nodes.setdefault(provider, set()).add(event["name"])
    return {provider: len(names) for provider, names in nodes.items()} or None


def engine_precisions(model: LoadedModel) -> dict[str, int] | None:
    """Precision → number of an engine's layers that compute in it; None for an ONNX file.

    None, too, where the inspector has no types: an engine built without detail has only names.
    Never run: loading an engine needs a GPU.
    """
    if model.information is None:
        return None
    from edgerun.tensorrt.inspect import engine_layers

    try:
        layers = json.loads(model.information()).get("Layers", [])
    except (ValueError, AttributeError):
        return None
    return dict(engine_layers(layers, ()).by_precision) or None
