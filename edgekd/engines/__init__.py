"""Engines: the exported file, its parity with PyTorch, and what a runtime makes of it."""
