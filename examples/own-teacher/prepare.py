"""Stands for your own project: write scans.npz and the weights of a teacher trained elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from mine import Teacher
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

HERE = Path(__file__).parent
TRAIN = 1400


def main() -> None:
    """Write both files next to this one."""
    digits = load_digits()
    image, label = digits.images.astype(np.float32)[:, None] / 16, digits.target
    np.savez(
        HERE / "scans.npz",
        train_image=image[:TRAIN],
        train_label=label[:TRAIN],
        test_image=image[TRAIN:],
        test_label=label[TRAIN:],
    )

    # The pipeline gives its networks images of mean 0 and standard deviation 1 over the training
    # split, so the teacher is trained on such images.
    torch.manual_seed(0)
    inputs = torch.from_numpy(image[:TRAIN])
    inputs = (inputs - inputs.mean()) / inputs.std()
    targets = torch.from_numpy(label[:TRAIN])
    teacher = Teacher()
    optimizer = torch.optim.Adam(teacher.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        cross_entropy(teacher(inputs), targets).backward()
        optimizer.step()
    save_file(teacher.state_dict(), HERE / "teacher.safetensors")


if __name__ == "__main__":
    main()
