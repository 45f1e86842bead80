"""A training of a second: blobs in noisy images, a network of a few weights, the real loop."""

import torch
from torch import nn

from edgekd.config.training import LossTerm, TrainConfig
from edgekd.distill.objective import Objective
from edgekd.distill.trainer import Trainer
from edgekd.models import DictModel
from edgekd.spec import ModelSpec, TensorSpec
from edgekd.tasks import Classification
from tests.progress import RecordedProgress

TASK = Classification()
SPEC = ModelSpec((TensorSpec("image", ("batch", 1, 8, 8)),), (TensorSpec("logits", ("batch", 3)),))


class Source:
    """Blobs in three places of a noisy image; ``stop_in`` raises in the middle of that epoch."""

    def __init__(self, count=96, batch=16, stop_in=None, poison=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.label = torch.randint(0, 3, (count,), generator=generator)
        self.image = torch.randn(count, 1, 8, 8, generator=generator)
        for row, label in zip(self.image, self.label, strict=True):
            row[0, 2 * int(label) : 2 * int(label) + 2] += 1.0
        self.batch, self.stop_in, self.poison = batch, stop_in, poison

    def __len__(self):
        return len(self.label) // self.batch

    @property
    def samples(self):
        return len(self.label)

    def epoch(self, seed, epoch):
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(self.label), generator=generator)
        for step in range(len(self)):
            if epoch == self.stop_in and step == 3:
                raise KeyboardInterrupt
            rows = order[step * self.batch : (step + 1) * self.batch]
            image = self.image[rows]
            if self.poison == (epoch, step + 1):
                image = image * float("nan")
            yield {"image": image, "label": self.label[rows]}

    def ordered(self):
        for start in range(0, len(self.label), 40):
            rows = slice(start, start + 40)
            yield {"image": self.image[rows], "label": self.label[rows]}


def network(seed=0):
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(6, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 3),
    )
    return DictModel(module, SPEC)


DISTILL = [
    LossTerm(name="hard_labels", weight=0.1),
    LossTerm(name="soft_labels", args={"temperature": 4.0}, weight=0.9),
]


def fit(folder, *, seed=0, source=None, objective=None, teacher=None, progress=None, **keys):
    model = network()
    config = TrainConfig(**{"epochs": 4, "batch_size": 16, **keys})
    history = Trainer(
        model,
        objective or Objective.supervised(TASK),
        source or Source(),
        Source(50, seed=1),
        TASK,
        config,
        seed,
        checkpoint_folder=folder,
        progress=progress or RecordedProgress(),
        teacher=teacher,
    ).fit()
    return model, history


def same(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )
