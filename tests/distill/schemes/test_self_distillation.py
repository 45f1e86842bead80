"""Born-again networks, and early exits under the network's own deepest output."""

import numpy as np
import pytest
import torch

from edgekd.config.training import SchemeConfig
from edgekd.distill.features import layer_key
from edgekd.distill.schemes import find_scheme
from edgekd.distill.schemes.self_distillation import Exit, OwnHint, pooled, self_
from edgekd.distill.teacher import weights_digest
from edgekd.errors import InputError
from edgekd.tasks import Classification

TASK = Classification()


def test_each_generation_is_taught_by_the_one_before(make_context):
    context = make_context()
    histories = self_(context, generations=2)
    assert list(histories) == ["generation 0", "generation 1", "student"]
    labels, first, second = context.fits
    assert labels.teacher is None
    assert not labels.objective.needs_teacher
    assert first.teacher.digest == weights_digest(labels.model)
    assert second.teacher.digest == weights_digest(first.model)
    assert len({first.teacher.digest, second.teacher.digest, context.teacher.digest}) == 3
    assert second.model is context.student
    assert all(parameter.requires_grad for parameter in context.student.parameters())


def test_generations_start_from_weights_of_their_own(make_context):
    context = make_context()
    self_(context, generations=1)
    before, student = (fit.before["module.head.linear.0.weight"] for fit in context.fits)
    assert not torch.equal(before, student)
    first = context.new_student(0).state_dict()["module.head.linear.0.weight"]
    assert torch.equal(student, first)


@pytest.mark.parametrize(
    ("student", "teacher"), [("layers.9", "layers.0"), ("layers.0", "layer.0")]
)
def test_a_layer_that_does_not_exist_is_found_before_the_first_training(
    make_context, student, teacher
):
    context = make_context(({"fitnets": {"student": student, "teacher": teacher}},))
    with pytest.raises(InputError, match=r"no layer named 'layer(s\.9|\.0)'"):
        self_(context)
    assert context.fits == []


def test_an_exit_by_hand():
    random = np.random.default_rng(0)
    feature, deepest = random.normal(size=(5, 6, 3, 2)), random.normal(size=(5, 4))
    label = np.array([0, 3, 1, 1, 2])
    answers = {
        layer_key("block"): torch.tensor(feature, requires_grad=True),
        "logits": torch.tensor(deepest, requires_grad=True),
    }
    term = Exit("block", TASK, temperature=3.0, share=0.3, label_smoothing=0.0)
    term.prepare(answers, None, 5)
    term.double()
    value = term(answers, None, {"label": torch.tensor(label)}, 0.0)

    weight, bias = (p.detach().numpy() for p in term.head.parameters())
    z = feature.mean((2, 3)) @ weight.T + bias

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(1, keepdims=True))

    hard = -log_softmax(z)[np.arange(5), label].mean()
    log_p, log_q = log_softmax(deepest / 3), log_softmax(z / 3)
    soft = 9 * (np.exp(log_p) * (log_p - log_q)).sum(1).mean()
    np.testing.assert_allclose(value.item(), 0.7 * hard + 0.3 * soft, rtol=1e-12)

    value.backward()
    assert answers["logits"].grad is None
    assert answers[layer_key("block")].grad.abs().max() > 0
    assert term.head.weight.grad.abs().max() > 0


def test_a_hint_draws_the_shallow_feature_only():
    answers = {
        layer_key("shallow"): torch.randn(8, 4, 6, 6, requires_grad=True),
        layer_key("deep"): torch.rand(8, 7, 3, 3, requires_grad=True),
        "logits": torch.randn(8, 3),
    }
    term = OwnHint("shallow", "deep", TASK, 0.5)
    assert term.student_layers == ("shallow", "deep")
    assert not term.needs_teacher
    term.prepare(answers, None, 8)
    term(answers, None, {}, 0.0).backward()
    assert answers[layer_key("deep")].grad is None
    assert answers[layer_key("shallow")].grad.abs().max() > 0
    assert all(parameter.grad is not None for parameter in term.parameters())


def test_the_student_alone_is_trained_and_keeps_no_exits(make_context):
    exits = ("features.layers.0", "features.layers.1")
    context = make_context(student="convnet-xs")
    histories = self_(context, exits=exits, deepest="features.layers.2")
    assert list(histories) == ["student"]
    (fit,) = context.fits
    assert fit.teacher is None
    fresh = context.new_student(0).state_dict()
    trained = context.student.state_dict()
    assert {k: v.shape for k, v in trained.items()} == {k: v.shape for k, v in fresh.items()}
    head = "module.head.linear.0.weight"
    assert not torch.equal(trained[head], fresh[head])
    assert not any(module._forward_hooks for module in context.student.modules())
    assert list(histories["student"].epochs[0].terms) == [
        "hard",
        *(f"{kind} {layer}" for layer in exits for kind in ("exit", "hint")),
    ]


def test_the_exits_heads_are_trained(make_context):
    context = make_context(student="convnet-xs")
    made = {}
    prepare = Exit.prepare

    def watched(term, *answers):
        prepare(term, *answers)
        made.setdefault(term, term.head.weight.detach().clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exit, "prepare", watched)
        self_(context, exits=("features.layers.0",))
    ((term, first),) = made.items()
    assert not torch.equal(term.head.weight, first)


def test_generations_with_exits(make_context):
    context = make_context(student="convnet-xs")
    self_(context, generations=1, exits=("features.layers.0",))
    for fit in context.fits:
        assert "exit features.layers.0" in fit.objective.labels
    assert "soft_labels" in context.fits[1].objective.labels


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"generations": 0}, "nothing teaches the student"),
        ({"exits": ("features.layer.0",)}, "did you mean 'features.layers.0'"),
        ({"exits": ("features.layers.0",), "deepest": "no"}, "no layer named 'no'"),
        ({"deepest": "features.layers.2"}, "for exits, and there are none"),
    ],
)
def test_wrong_arguments(make_context, keys, what):
    context = make_context(student="convnet-xs")
    with pytest.raises(InputError, match=what):
        self_(context, **keys)
    assert context.fits == []


def test_generations_need_a_term_that_compares_with_a_teacher(make_context):
    with pytest.raises(InputError, match="no loss term compares with a teacher"):
        self_(make_context(terms=("hard_labels",)))


@pytest.mark.parametrize("args", [{"generations": -1}, {"share": 1.1}, {"hint": 0}])
def test_arguments_are_checked_before_anything_runs(args):
    with pytest.raises(InputError, match="input should be"):
        find_scheme(SchemeConfig(name="self", args=args))


def test_what_an_exit_cannot_take_is_named():
    with pytest.raises(InputError, match=r"'stem' gives \[2, 3, 4, 5, 6\]"):
        pooled(torch.zeros(2, 3, 4, 5, 6), "stem")
    assert pooled(torch.ones(2, 5, 3), "tokens").shape == (2, 3)
