"""What all tests share."""

from __future__ import annotations

import os

# Read when torch is imported, also by the processes that tests start. The networks of the tests
# are so small that a second thread only waits, and waits dearly on a machine with other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
