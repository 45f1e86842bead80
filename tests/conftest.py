"""What all tests share."""

from __future__ import annotations

import os

from hypothesis import settings

pytest_plugins = ["tests.onnx_fixtures"]

# Read when torch is imported, also by the processes that tests start. The networks of the tests
# are so small that a second thread only waits, and waits dearly on a machine with other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A machine shared with others is slow at times; and what a server runs must not depend on luck.
settings.register_profile("edgekd", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("edgekd")
