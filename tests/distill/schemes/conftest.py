"""A small classroom: blobs in noisy images, networks of a few weights, the real training loop."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch

from edgekd.config.networks import ModelConfig
from edgekd.config.training import LossTerm, TrainConfig
from edgekd.distill.objective import Objective
from edgekd.distill.schemes import SchemeContext
from edgekd.distill.teacher import ModuleTeacher
from edgekd.distill.trainer import Trainer
from edgekd.models.build import build_model
from edgekd.spec import TensorSpec
from edgekd.tasks import Classification

INPUTS = (TensorSpec("image", ("batch", 1, 8, 8)),)
OUTPUTS = (TensorSpec("logits", ("batch", 3)),)
SOFT = ({"hard_labels": {}, "weight": 0.1}, {"soft_labels": {"temperature": 2}, "weight": 0.9})

Fit = namedtuple("Fit", "label model objective teacher before")


class Source:
    """96 images of three classes, in batches of 32."""

    samples = 96

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.label = torch.randint(0, 3, (96,), generator=generator)
        self.image = torch.randn(96, 1, 8, 8, generator=generator)
        for row, label in zip(self.image, self.label, strict=True):
            row[0, 2 * int(label) : 2 * int(label) + 2] += 1.0

    def __len__(self):
        return 3

    def epoch(self, seed, epoch):
        yield from self.ordered()

    def ordered(self):
        for start in range(0, 96, 32):
            rows = slice(start, start + 32)
            yield {"image": self.image[rows], "label": self.label[rows]}


class Silent:
    """A progress display that shows nothing."""

    def start(self, label, total, unit): ...

    def advance(self, n=1, **figures): ...

    def message(self, text): ...

    def finish(self): ...


def build(config, index):
    torch.manual_seed(1000 + index)
    return build_model(config, INPUTS, OUTPUTS)


@pytest.fixture
def source():
    return Source()


@pytest.fixture
def make_context(tmp_path, source):
    """Makes a classroom; ``context.fits`` are its trainings and ``context.said`` its messages."""

    def make(terms=SOFT, student="mlp", student_args=None, teacher=None, task=None, epochs=1):
        task = task or Classification()
        network = ModelConfig(model=student, args=student_args or {})
        fits, said = [], []

        def fit(model, objective, label, teacher=None):
            assert label not in [fit.label for fit in fits]
            before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
            fits.append(Fit(label, model, objective, teacher, before))
            if teacher is not None:
                teacher.capture(objective.teacher_layers)
            return Trainer(
                model,
                objective,
                source,
                source,
                task,
                TrainConfig(epochs=epochs, batch_size=32),
                0,
                checkpoint_folder=tmp_path / label,
                progress=Silent(),
                teacher=teacher,
                label=label,
            ).fit()

        context = SchemeContext(
            student=build(network, 0),
            teacher=ModuleTeacher(teacher or build(ModelConfig(model="convnet-s"), 99)),
            task=task,
            label_smoothing=0.0,
            fit=fit,
            new_objective=lambda: Objective([LossTerm.model_validate(t) for t in terms], task),
            new_student=lambda index: build(network, index),
            build=build,
            open_teacher=lambda config, where: ModuleTeacher(build(config, len(where))),
            say=said.append,
        )
        object.__setattr__(context, "fits", fits)
        object.__setattr__(context, "said", said)
        return context

    return make
