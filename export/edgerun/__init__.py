"""edgerun: run, measure and verify a model on its device.

Needs the standard library, numpy and onnxruntime only, and Python 3.8 or later. The same code
measures on a workstation, in a fresh process, so that a figure from there and one from a board
mean the same thing. Start it with ``python -m edgerun run|bench|verify|info``.
"""

import os

# Read by ONNX Runtime when it is imported: it would otherwise look up a host for its telemetry and
# store an identifier of this machine.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
