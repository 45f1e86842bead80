"""Blobs in noisy images, networks of a few weights, the real training loop."""

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
from tests.distill.small_training import Source
from tests.progress import RecordedProgress

INPUTS = (TensorSpec("image", ("batch", 1, 8, 8)),)
OUTPUTS = (TensorSpec("logits", ("batch", 3)),)
SOFT = ({"hard_labels": {}, "weight": 0.1}, {"soft_labels": {"temperature": 2}, "weight": 0.9})

Fit = namedtuple("Fit", "label model objective teacher before")


def build(config, index):
    torch.manual_seed(1000 + index)
    return build_model(config, INPUTS, OUTPUTS)


@pytest.fixture
def source():
    return Source(96, batch=32)


@pytest.fixture
def make_context(tmp_path, source):
    """Makes a context; ``context.fits`` are its trainings, ``context.said`` its messages."""

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
                progress=RecordedProgress(),
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
