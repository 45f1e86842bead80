"""Several teachers as one: the mixture by hand, its symmetries, and the scheme."""

import numpy as np
import pytest
import torch

from edgekd.config.networks import TeacherConfig
from edgekd.config.training import SchemeConfig
from edgekd.distill.schemes import find_scheme
from edgekd.distill.schemes.offline import EnsembleTeacher, ensemble
from edgekd.errors import InputError
from edgekd.tasks import Regression


class Answers:
    """A teacher that gives fixed outputs."""

    def __init__(self, digest="one", **outputs):
        self.digest, self.watched = digest, ()
        self.outputs = {name: torch.as_tensor(value) for name, value in outputs.items()}

    def predict(self, batch):
        return {**self.outputs, **{f"@{layer}": torch.ones(2) for layer in self.watched}}

    def capture(self, layers):
        self.watched = tuple(layers)


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture
def logits():
    return 3 * np.random.default_rng(0).normal(size=(3, 6, 4))


def teachers(logits):
    return [Answers(str(number), logits=z) for number, z in enumerate(logits)]


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
def test_the_mean_of_the_probabilities(logits, weights):
    answer = EnsembleTeacher(teachers(logits), "logits", weights=weights).predict({})["logits"]
    wanted = np.average(softmax(logits), axis=0, weights=weights)
    np.testing.assert_allclose(answer.exp().numpy(), wanted, rtol=1e-12)
    # And it is a set of logits that means the same.
    np.testing.assert_allclose(softmax(answer.numpy()), wanted, rtol=1e-12)


def test_logits_of_a_larger_size_do_not_count_more(logits):
    shifted = logits + np.array([0.0, 100.0, -50.0])[:, None, None]
    a, b = (EnsembleTeacher(teachers(z), "logits").predict({})["logits"] for z in (logits, shifted))
    torch.testing.assert_close(a, b)


def test_confidence_by_hand(logits):
    together = EnsembleTeacher(teachers(logits), "logits", combine="confidence", weights=[1, 1, 2])
    p = softmax(logits)
    sure = np.exp((p * np.log(p)).sum(-1)) * np.array([1, 1, 2])[:, None]
    wanted = (sure[..., None] / sure.sum(0)[..., None] * p).sum(0)
    np.testing.assert_allclose(together.predict({})["logits"].exp().numpy(), wanted, rtol=1e-12)
    weights = together.member_weights(torch.tensor(np.log(p)))
    assert weights.shape == (3, 6)
    torch.testing.assert_close(weights.sum(0), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("combine", ["mean", "confidence"])
def test_the_order_of_the_members_does_not_matter(logits, combine):
    order = [2, 0, 1]
    weights = [1.0, 2.0, 3.0]
    straight = EnsembleTeacher(teachers(logits), "logits", weights=weights, combine=combine)
    turned = EnsembleTeacher(
        teachers(logits[order]), "logits", weights=[weights[i] for i in order], combine=combine
    )
    torch.testing.assert_close(straight.predict({})["logits"], turned.predict({})["logits"])


@pytest.mark.parametrize("combine", ["mean", "confidence"])
def test_members_of_one_mind_answer_as_each_of_them(logits, combine):
    together = EnsembleTeacher(teachers(logits[[0, 0]]), "logits", combine=combine)
    np.testing.assert_allclose(
        softmax(together.predict({})["logits"].numpy()), softmax(logits[0]), rtol=1e-12
    )


def test_the_one_that_is_sure_is_listened_to_even_at_the_limits():
    sure = Answers(logits=[[1000.0, 0.0, 0.0, 0.0]])
    lost = Answers(logits=[[0.0, 0.0, 0.0, 0.0]])
    together = EnsembleTeacher([sure, lost], "logits", combine="confidence")
    answer = together.predict({})["logits"]
    assert answer.isfinite().all()
    # Perplexities 1 and 4: the sure one counts 4/5.
    torch.testing.assert_close(answer.exp(), torch.tensor([[0.85, 0.05, 0.05, 0.05]]))


def test_positions_of_a_sequence_are_weighed_one_by_one():
    z = 2 * np.random.default_rng(1).normal(size=(2, 3, 5, 4))
    whole = EnsembleTeacher(teachers(z), "logits", combine="confidence").predict({})["logits"]
    flat = EnsembleTeacher(teachers(z.reshape(2, 15, 4)), "logits", combine="confidence")
    torch.testing.assert_close(whole.reshape(15, 4), flat.predict({})["logits"])


def test_numbers_are_averaged_as_they_are():
    members = [Answers(action=[[1.0, 3.0]], value=[2.0]), Answers(action=[[3.0, 7.0]], value=[6.0])]
    answer = EnsembleTeacher(members, "action", classes=False, weights=[3, 1]).predict({})
    torch.testing.assert_close(answer["action"], torch.tensor([[1.5, 4.0]]))
    torch.testing.assert_close(answer["value"], torch.tensor([3.0]))


def test_another_member_weight_or_combination_is_another_teacher(logits):
    def digest(members=logits, **keys):
        return EnsembleTeacher(teachers(members), "logits", **keys).digest

    made = [digest(), digest(logits[:2]), digest(weights=[1, 2, 1]), digest(combine="confidence")]
    assert len({*made, "0"}) == 5
    assert digest(weights=[2, 2, 2]) == digest()


def test_the_first_members_layers_are_watched_and_left_alone(logits):
    members = teachers(logits)
    together = EnsembleTeacher(members, "logits")
    together.capture(["block"])
    assert [member.watched for member in members] == [("block",), (), ()]
    assert torch.equal(together.predict({})["@block"], torch.ones(2))
    together.capture([])
    assert list(together.predict({})) == ["logits"]


@pytest.mark.parametrize(
    ("second", "what"),
    [
        (Answers(logits=[[1.0, 2.0]]), r"teacher 2 gives \[1, 2\] as 'logits', and .* \[1, 3\]"),
        (Answers(scores=[[1.0, 2.0, 3.0]]), "gives nothing as 'logits'"),
    ],
)
def test_members_that_answer_something_else(second, what):
    first = Answers(logits=[[1.0, 2.0, 3.0]])
    with pytest.raises(InputError, match=what):
        EnsembleTeacher([first, second], "logits").predict({})


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"weights": [1.0]}, "1 weights for 3 teachers"),
        ({"weights": [1.0, 0.0, 1.0]}, "the weights are 1.0, 0.0, 1.0"),
        ({"combine": "confidence", "classes": False}, "confidence is defined for classes only"),
    ],
)
def test_wrong_combinations(logits, keys, what):
    with pytest.raises(InputError, match=what):
        EnsembleTeacher(teachers(logits), "logits", **keys)


SECTION = TeacherConfig(model="mlp", checkpoint="other.safetensors")


def test_the_scheme_teaches_with_all_of_them(make_context):
    context = make_context()
    first_said = []
    opened = context.open_teacher
    object.__setattr__(
        context,
        "open_teacher",
        lambda config, where: first_said.append(where) or opened(config, where),
    )
    ensemble(context, teachers=(SECTION, SECTION), weights=(2.0, 1.0, 1.0))
    (fit,) = context.fits
    assert fit.teacher.members[0] is context.teacher
    assert len(fit.teacher.members) == 3
    assert first_said == [f"distill.scheme.ensemble.teachers[{index}]" for index in (0, 1)]
    assert fit.model is context.student


def test_what_is_wrong_is_found_before_a_teacher_is_opened(make_context):
    context = make_context()

    def never(config, where):
        raise AssertionError

    object.__setattr__(context, "open_teacher", never)
    with pytest.raises(InputError, match="3 weights for 2 teachers"):
        ensemble(context, teachers=(SECTION,), weights=(1.0, 1.0, 1.0))
    object.__setattr__(context, "task", Regression())
    with pytest.raises(InputError, match="confidence is defined for classes only"):
        ensemble(context, teachers=(SECTION,), combine="confidence")
    with pytest.raises(InputError, match="the ensemble would never be used"):
        ensemble(make_context(terms=("hard_labels",)), teachers=(SECTION,))


@pytest.mark.parametrize(
    ("args", "what"),
    [
        ({"teachers": []}, "at least 1 item"),
        ({"teachers": [{"model": "mlp"}]}, "give one of train "),
        ({"teachers": [{"onnx": "a.onnx"}], "combine": "vote"}, "combine"),
        ({"teachers": [{"onnx": "a.onnx"}], "weights": [1, 0]}, "greater than 0"),
    ],
)
def test_wrong_arguments_are_found_before_anything_runs(args, what):
    with pytest.raises(InputError, match=what):
        find_scheme(SchemeConfig(name="ensemble", args=args))
