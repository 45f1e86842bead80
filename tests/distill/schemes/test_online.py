"""Mutual learning: the total by hand, who gets a gradient, and how often a peer runs."""

import numpy as np
import pytest
import torch

from edgekd.config.networks import ModelConfig
from edgekd.config.training import SchemeConfig
from edgekd.distill.schemes import find_scheme
from edgekd.distill.schemes.online import Peers, mutual_objective, online
from edgekd.errors import InputError
from edgekd.tasks import Classification, Policy

TASK = Classification()


def peers_outputs(count, seed=0, output="logits", shape=(5, 4)):
    generator = torch.Generator().manual_seed(seed)
    keys = [output, *(f"{output} of peer {number}" for number in range(1, count))]
    return {
        key: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for key in keys
    }


def softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize(("count", "temperature", "weight"), [(2, 1.0, 1.0), (3, 2.0, 0.7)])
def test_the_total_is_the_papers(count, temperature, weight):
    outputs = peers_outputs(count)
    label = torch.tensor([0, 3, 1, 1, 2])
    total, _ = mutual_objective(count, TASK, temperature, weight)(outputs, None, {"label": label})

    z = [value.detach().numpy() for value in outputs.values()]
    wanted = 0.0
    for i in range(count):
        wanted -= np.mean([np.log(softmax(z[i])[row, y]) for row, y in enumerate(label)])
        for j in range(count):
            if j != i:
                p, q = softmax(z[j] / temperature), softmax(z[i] / temperature)
                kl = (p * np.log(p / q)).sum(1).mean()
                wanted += weight * temperature**2 * kl / (count - 1)
    np.testing.assert_allclose(total.item(), wanted, rtol=1e-12)


def test_what_a_peer_teaches_gives_it_no_gradient():
    outputs = peers_outputs(3)
    objective = mutual_objective(3, TASK, 1.0, 1.0)
    batch = {"label": torch.zeros(5, dtype=torch.int64)}
    values = {term.label: term(outputs, None, batch, 0.0) for term in objective.terms}
    for number, (key, own) in enumerate(outputs.items()):
        (gradient,) = torch.autograd.grad(
            values[f"peer {number} mutual"], own, retain_graph=True, allow_unused=True
        )
        assert gradient.abs().max() > 0
        others = [value for other, value in outputs.items() if other != key]
        assert torch.autograd.grad(
            values[f"peer {number} mutual"], others, retain_graph=True, allow_unused=True
        ) == (None, None)


def test_mutual_regression_uses_the_task_distance_on_masked_values():
    task = Policy(loss="mae")
    outputs = peers_outputs(2, output="action", shape=(2, 3))
    target = torch.zeros(2, 3, dtype=torch.float64)
    mask = torch.tensor([1, 0])
    batch = {"action": target, "action_mask": mask}
    _, values = mutual_objective(2, task, 1.0, 1.0)(outputs, None, batch)
    first, second = (value.detach().numpy() for value in outputs.values())
    wanted = np.abs(first - second)[0].mean()
    np.testing.assert_allclose(values["peer 0 mutual"].item(), wanted, rtol=1e-12)
    np.testing.assert_allclose(values["peer 1 mutual"].item(), wanted, rtol=1e-12)


def test_one_forward_per_peer_and_step_and_only_the_student_is_scored(make_context, source):
    context = make_context()
    asked = {}
    make = context.new_student

    def counted(name, model):
        asked[name] = {True: 0, False: 0}

        def hook(module, inputs, output):
            asked[name][module.training] += 1

        model.register_forward_hook(hook)
        return model

    counted("student", context.student)
    object.__setattr__(context, "new_student", lambda index: counted(f"peer {index}", make(index)))
    histories = online(context, peers=3)
    steps, scored = len(source), 3
    assert asked == {
        "student": {True: steps, False: scored},
        "peer 1": {True: steps, False: 0},
        "peer 2": {True: steps, False: 0},
    }
    assert list(histories) == ["student"]
    assert list(histories["student"].epochs[0].terms)[:2] == ["peer 0 hard", "peer 0 mutual"]


def test_every_peer_learns_from_first_weights_of_its_own(make_context):
    context = make_context()
    online(context)
    (fit,) = context.fits
    assert fit.teacher is None
    student, other = fit.model.members
    assert student is context.student
    key = "module.head.linear.0.weight"
    first, second = fit.before[f"members.0.{key}"], fit.before[f"members.1.{key}"]
    assert not torch.equal(first, second)
    assert not torch.equal(student.state_dict()[key], first)
    assert not torch.equal(other.state_dict()[key], second)
    # What is shipped are the student's own keys.
    assert list(context.student.state_dict()) == list(context.new_student(0).state_dict())


def test_without_weight_a_peer_learns_as_if_it_were_alone(make_context):
    """The joint step is no other than the peers' own: nothing flows between them but the term."""
    together, alone = make_context(), make_context()
    online(together, weight=0.0)
    single = Peers([alone.student])
    alone.fit(single, mutual_objective(2, TASK, 1.0, 0.0).of([
        mutual_objective(2, TASK, 1.0, 0.0).terms[0]
    ]), "alone")  # fmt: skip
    for a, b in zip(together.student.parameters(), alone.student.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_peers_of_other_networks(make_context):
    context = make_context()
    online(context, models=(ModelConfig(model="convnet-xs"),))
    kinds = [type(member.module).__name__ for member in context.fits[0].model.members]
    assert kinds == ["Mlp", "ConvNet"]


@pytest.mark.parametrize(
    ("args", "what"),
    [
        ({"peers": 1}, "peers: input should be greater than or equal to 2"),
        ({"models": ["convnet-z"]}, "no model named 'convnet-z'"),
        ({"models": [{"args": {}}]}, "no model named ''"),
        ({"temperature": 0.5}, "greater than or equal to 1"),
        ({"weight": -1}, "greater than or equal to 0"),
        ({"peer": 3}, "no argument 'peer'"),
    ],
)
def test_wrong_arguments_are_found_before_anything_runs(args, what):
    with pytest.raises(InputError, match=what):
        find_scheme(SchemeConfig(name="online", args=args))


def test_peers_and_models_must_agree(make_context):
    with pytest.raises(InputError, match=r"1 models for 2 peers(.|\n)*write peers: 2"):
        online(make_context(), peers=3, models=(ModelConfig(model="mlp"),))
