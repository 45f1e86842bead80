"""Random float64 inputs of losses, and the size of what a loss makes of them."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def normal(*shapes, seed=0, scale=2.0):
    """One tensor of each shape."""
    draw = np.random.default_rng(seed)
    return [torch.from_numpy(draw.normal(0, scale, shape)) for shape in shapes]


def logits_and_classes(shape, seed=0, scale=3.0):
    """Student and teacher logits, and the class of each sample."""
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.randn(shape, generator=draw, dtype=torch.float64) * scale for _ in range(2)
    )
    return student, teacher, torch.randint(shape[-1], shape[:-1], generator=draw)


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest tensor that any operation makes, backward included."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                # A broadcast view occupies no more than its storage.
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result
