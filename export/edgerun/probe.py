"""Check that a model opens and runs, in a separate process that a runtime may crash.

Each step is printed on standard output beforehand, so that the parent process
knows which step ended it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Mapping

from edgerun.errors import EdgerunError
from edgerun.inputs import Feed, feeds_from, make_feeds
from edgerun.manifest import manifest_beside
from edgerun.model import LoadedModel, Settings
from edgerun.model_loading import open_model

SCHEMA = "edgerun.probe/1"
OPENS, RUNS = "opens", "runs"


def probe(
    path: Path,
    settings: Settings,
    inputs: Path | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    batch: int | None = None,
    run: bool = True,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Open a model and run it once: a record ``edgerun.probe/1``.

    ``ran`` is False where the model was only opened, and ``reason`` then says what prevented
    running: random inputs may be invalid for it.

    Args:
        inputs: an npz file, its first sample is run; None: random inputs.
        run: whether to run it.
        tell: called with ``opens`` and ``runs`` before each step.

    Raises:
        BadInput: the file is no model.
        RunFailed: the runtime cannot load it, or does not run it on ``inputs``.
    """
    tell(OPENS)
    model = open_model(path, settings)
    found: dict[str, Any] = {"schema": SCHEMA, "ran": False, "reason": None}
    if not run:
        return found
    try:
        feed = _feed(model, inputs, shapes or {}, batch)
        tell(RUNS)
        model.run(feed)
    except EdgerunError as error:
        if inputs is not None:
            raise
        return {**found, "reason": error.what}
    return {**found, "ran": True}


def _feed(
    model: LoadedModel,
    inputs: Path | None,
    shapes: Mapping[str, tuple[int, ...]],
    batch: int | None,
) -> Feed:
    if inputs is not None:
        return feeds_from(inputs, model.inputs, batch, manifest_beside(model.path)).feeds[0]
    return make_feeds(model.inputs, shapes, batch).feeds[0]
