"""Which provider runs each node, from the runtime's own profile of a few queries.

A profiled session is slower, so it is never the timed one.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from edgerun.errors import EdgerunError
from edgerun.inputs import Feed
from edgerun.session import RUNTIME_ERRORS, Model, Settings

NO_PROFILE: tuple[type[Exception], ...] = (EdgerunError, OSError, ValueError, *RUNTIME_ERRORS)


def provider_nodes(model: Path, settings: Settings, feed: Feed) -> dict[str, int] | None:
    """Provider → number of nodes that it ran for one feed.

    Nodes inside a branch that was not taken do not count; a subgraph that a provider compiled
    into one node counts as one. None where the runtime gives no profile.
    """
    with tempfile.TemporaryDirectory(prefix="edgerun-") as folder:
        try:
            profiled = Model(model, settings, profile_to=Path(folder) / "profile")
            profiled.run(feed)
            events = json.loads(Path(profiled.session.end_profiling()).read_text("utf-8"))
        except NO_PROFILE:
            # The figures stand without it: "not known" is the honest answer here.
            return None
    nodes: dict[str, set[str]] = {}
    for event in events:
        provider = event.get("args", {}).get("provider")
        if event.get("cat") == "Node" and provider:
            nodes.setdefault(provider, set()).add(event["name"])
    return {provider: len(names) for provider, names in nodes.items()} or None
