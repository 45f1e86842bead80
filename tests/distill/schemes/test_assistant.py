"""A chain of teachers, and when one is proposed."""

import re

import pytest

from edgekd.config.networks import ModelConfig
from edgekd.config.training import SchemeConfig
from edgekd.distill.schemes import find_scheme
from edgekd.distill.schemes.offline import assistant, offline, propose_assistant
from edgekd.distill.teacher import weights_digest
from edgekd.errors import InputError
from edgekd.models.dict_model import count_parameters

CHAIN = (ModelConfig(model="convnet-s"), ModelConfig(model="convnet-xs"))
LAYERS = ({"fitnets": {"student": "features.layers.0", "teacher": "features.layers.0"}},)


def test_each_is_taught_by_the_one_before_it(make_context):
    context = make_context()
    first_digest = context.teacher.digest
    histories = assistant(context, models=CHAIN)
    assert list(histories) == ["assistant 1", "assistant 2", "student"]
    first, second, student = context.fits
    assert first.teacher is context.teacher
    assert first_digest == context.teacher.digest
    assert second.teacher.digest == weights_digest(first.model)
    assert student.teacher.digest == weights_digest(second.model)
    assert student.model is context.student
    assert all(parameter.requires_grad for parameter in context.student.parameters())
    assert count_parameters(first.model) > count_parameters(second.model)
    assert len({id(fit.objective) for fit in context.fits}) == 3


def test_terms_that_name_layers_go_with_networks_that_have_them(make_context):
    context = make_context(LAYERS, student="convnet-xs")
    assistant(context, models=CHAIN[:1])
    assert [fit.label for fit in context.fits] == ["assistant 1", "student"]


@pytest.mark.parametrize(
    ("student", "models", "who"),
    [
        ("mlp", ("convnet-xs",), r"losses\[0\]\.fitnets\.student\n"),
        ("convnet-xs", ("mlp",), r"fitnets\.student, for the assistant mlp\n"),
    ],
)
def test_a_missing_layer_is_found_before_the_first_training(make_context, student, models, who):
    context = make_context(LAYERS, student=student)
    with pytest.raises(InputError, match=rf"no layer named 'features.layers.0'(.|\n)*{who}"):
        assistant(context, models=tuple(ModelConfig(model=name) for name in models))
    assert context.fits == []


def test_nothing_to_pass_on(make_context):
    with pytest.raises(InputError, match="no loss term compares with a teacher"):
        assistant(make_context(terms=("hard_labels",)), models=CHAIN)


@pytest.mark.parametrize(
    ("args", "what"),
    [
        ({}, "needs 'models'"),
        ({"models": []}, "at least 1 item"),
        ({"models": ["convnet-q"]}, "no model named 'convnet-q'"),
        ({"models": "convnet-s"}, "valid tuple"),
    ],
)
def test_wrong_arguments_are_found_before_anything_runs(args, what):
    with pytest.raises(InputError, match=what):
        find_scheme(SchemeConfig(name="assistant", args=args))


def test_the_nearest_to_the_geometric_mean_is_proposed():
    candidates = {"tiny": 900, "small": 40_000, "medium": 90_000, "large": 600_000, "huge": 10**8}
    # √(1000 · 1 000 000) ≈ 31 623; the arithmetic mean would be "large".
    assert propose_assistant(1_000_000, 1000, candidates) == "small"
    # The same prediction at another scale.
    scaled = {name: 7 * count for name, count in candidates.items()}
    assert propose_assistant(7_000_000, 7000, scaled) == "small"


def test_nothing_is_proposed_for_a_small_gap_or_out_of_nothing():
    assert propose_assistant(10_000, 1000, {"between": 3000}) is None
    assert propose_assistant(10_001, 1000, {"between": 3000}) == "between"
    assert propose_assistant(100_000, 1000, {"same": 1000, "teacher": 100_000}) is None
    assert propose_assistant(100_000, 0, {"between": 3000}) is None


def test_offline_proposes_an_assistant_for_a_large_teacher_only(make_context):
    small = {"hidden": [4]}
    teacher = make_context().build(ModelConfig(model="mlp", args={"hidden": [4096, 512]}), 1)
    far = make_context(student_args=small, teacher=teacher)
    offline(far)
    (said,) = far.said
    assert re.search(r"\d+ times the student's parameters; (\S+) between .*models: \[\1\]", said)
    assert far.fits[0].teacher is far.teacher

    near = make_context(student="convnet-s")
    offline(near)
    labels = make_context(("hard_labels",), student_args=small, teacher=teacher)
    offline(labels)
    assert near.said == labels.said == []
