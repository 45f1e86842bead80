"""Options of the training: accumulation, averaging, precision, compilation, early stopping."""

import shutil

import pytest
import torch
from torch import nn

from edgekd.config.training import LossTerm, TrainConfig
from edgekd.distill import trainer
from edgekd.distill.checkpoint import NAME
from edgekd.distill.objective import Objective
from edgekd.distill.teacher import ModuleTeacher
from edgekd.distill.trainer import Trainer, score
from edgekd.errors import InputError
from edgekd.models import DictModel
from tests.distill.small_training import SPEC, TASK, Source, fit, network, same
from tests.progress import RecordedProgress


def plain_network(seed=0):
    """Without dropout and batch norm: a batch's gradient is the mean of its parts'."""
    torch.manual_seed(seed)
    return DictModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), SPEC).double()


class Ordered(Source):
    """The same samples in the same order in batches of any size, as float64."""

    def __init__(self, batch):
        super().__init__(batch=batch)
        self.image = self.image.double()

    def epoch(self, seed, epoch):
        for start in range(0, len(self) * self.batch, self.batch):
            rows = slice(start, start + self.batch)
            yield {"image": self.image[rows], "label": self.label[rows]}


def fit_plain(folder, batch, **keys):
    model = plain_network()
    config = TrainConfig(
        **{"epochs": 3, "optimizer": "sgd", "schedule": "constant", "learning_rate": 0.05, **keys}
    )
    sources = Ordered(batch), Ordered(16)
    arguments = (Objective.supervised(TASK), *sources, TASK, config, 0)
    progress = RecordedProgress()
    history = Trainer(model, *arguments, checkpoint_folder=folder, progress=progress).fit()
    return model, history


def close(a, b, tolerance):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.allclose(x, y, rtol=0, atol=tolerance) for x, y in pairs)


def test_accumulated_batches_step_as_one_large_batch(tmp_path):
    # float64, so that nothing but the order of the sums differs.
    together, _ = fit_plain(tmp_path / "a", 48, clip_norm=0.1)
    in_parts, _ = fit_plain(tmp_path / "b", 16, clip_norm=0.1, accumulate=3)
    apart, _ = fit_plain(tmp_path / "c", 16, clip_norm=0.1)
    assert close(together, in_parts, 1e-9)
    assert not close(together, apart, 1e-4)


def test_the_last_batches_of_an_epoch_step_although_they_are_fewer(tmp_path):
    # Two groups of an epoch: four batches of 16, then two; by hand with plain SGD.
    model, _ = fit_plain(tmp_path, 16, accumulate=4, epochs=1, momentum=0.0, weight_decay=0.0)
    expected, source = plain_network(), Ordered(16)
    for rows in (slice(0, 64), slice(64, 96)):
        loss = nn.functional.cross_entropy(
            expected({"image": source.image[rows]})["logits"], source.label[rows]
        )
        expected.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in expected.parameters():
                parameter -= 0.05 * parameter.grad
    assert close(model, expected, 1e-9)


def test_the_average_is_what_is_validated_and_kept(tmp_path):
    model, history = fit(tmp_path, ema=0.99, learning_rate=1e-2)
    state = torch.load(tmp_path / NAME, weights_only=True)
    best = history.best
    assert score(model, Source(50, seed=1), TASK).mean() == pytest.approx(best.validation)
    if best is history.epochs[-1]:
        for key, value in model.state_dict().items():
            assert torch.equal(value, state["step"]["average"][f"module.{key}"])
    assert not same(model, fit(tmp_path / "plain", learning_rate=1e-2)[0])
    assert set(model.state_dict()) == set(network().state_dict())


def test_patience_stops_and_says_so_and_resuming_does_not_go_on(tmp_path):
    progress = RecordedProgress()
    keys = {"epochs": 40, "patience": 2, "learning_rate": 1e-6, "progress": progress}
    model, history = fit(tmp_path, **keys)
    values = [row.validation for row in history.epochs]
    stopped = len(values)
    assert stopped < 40
    assert max(values[:-2]) >= max(values[-2:])
    # No earlier epoch had to stop it.
    for end in range(3, stopped):
        assert max(values[: end - 2]) < max(values[end - 2 : end])
    assert f"stopped after epoch {stopped} of 40" in progress.messages[-1]
    again, same_history = fit(tmp_path, source=Source(stop_in=stopped + 1), **keys)
    assert same(model, again)
    assert same_history == history


def test_bfloat16_keeps_its_weights_in_float32_and_its_losses_near(tmp_path):
    model, half = fit(tmp_path / "a", precision="bfloat16", epochs=2)
    _, whole = fit(tmp_path / "b", epochs=2)
    floating = [t for t in model.state_dict().values() if t.is_floating_point()]
    assert all(tensor.dtype == torch.float32 for tensor in floating)
    # 8 bits of mantissa: three digits or so of a loss near one.
    assert half.epochs[0].loss == pytest.approx(whole.epochs[0].loss, abs=0.05)
    assert half.epochs[0].loss != whole.epochs[0].loss


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"precision": "float16"}, "use bfloat16"),
        ({"warm_up": 0.1, "schedule": "one-cycle"}, "one-cycle has a warm-up of its own"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, keys, text):
    if keys.get("precision") == "float16" and torch.cuda.is_available():
        pytest.skip("float16 is trained where there is a GPU")
    with pytest.raises(InputError, match=text):
        fit(tmp_path, **keys)


def test_a_compiled_network_shows_no_layers(tmp_path):
    terms = [LossTerm(name="fitnets", args={"student": "4", "teacher": "4"})]
    teacher = ModuleTeacher(network(9))
    with pytest.raises(InputError, match="layers 4 are compared"):
        fit(tmp_path, objective=Objective(terms, TASK), teacher=teacher, compile=True)


def test_a_network_that_cannot_be_compiled_says_why(tmp_path, monkeypatch):
    from torch._dynamo.exc import TorchDynamoException

    def broken(model):
        def forward(batch):
            raise TorchDynamoException("No working C++ compiler found\n\nand a long explanation")

        return forward

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(InputError, match=r"No working C\+\+ compiler found\n"):
        fit(tmp_path, compile=True)


def test_the_scale_of_float16_losses_is_part_of_the_state(tmp_path, monkeypatch):
    # Its scaler runs on a CPU too; only that it learns badly there is why it is refused.
    monkeypatch.setattr(trainer, "check_train_config", lambda *arguments: None)
    keys = {"precision": "float16", "clip_norm": 1.0}
    whole, _ = fit(tmp_path / "whole", **keys)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", source=Source(stop_in=3), **keys)
    assert same(whole, fit(tmp_path / "parts", **keys)[0])
    scaler = torch.load(tmp_path / "whole" / NAME, weights_only=True)["step"]["scaler"]
    assert scaler["_growth_tracker"] == 4 * 6


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_it_learns_the_same_and_keeps_its_names(tmp_path):
    compiled, _ = fit_plain(tmp_path / "a", 16, compile=True)
    plain, _ = fit_plain(tmp_path / "b", 16)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert close(compiled, plain, 1e-9)
