"""The training loop: determinism, resuming to the very same weights, and stopping on NaN."""

import shutil

import pytest
import torch
from torch import nn

from edgekd.config.pipeline import LossTerm, TrainConfig
from edgekd.distill import trainer
from edgekd.distill.checkpoint import NAME
from edgekd.distill.objective import Objective
from edgekd.distill.teacher import ModuleTeacher
from edgekd.distill.trainer import score, train
from edgekd.errors import InputError, StageError
from edgekd.models import NamedModel
from edgekd.spec import ModelSpec, TensorSpec
from edgekd.tasks import Classification

TASK = Classification()
SPEC = ModelSpec((TensorSpec("image", ("batch", 1, 8, 8)),), (TensorSpec("logits", ("batch", 3)),))


class Silent:
    """A progress display that keeps what it was told."""

    def __init__(self):
        self.messages, self.done, self.total, self.finished = [], 0, 0, 0

    def start(self, label, total, unit):
        self.total += total

    def advance(self, n=1, **figures):
        self.done += n

    def message(self, text):
        self.messages.append(text)

    def finish(self):
        self.finished += 1


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
    return NamedModel(module, SPEC)


DISTILL = [
    LossTerm(name="hard_labels", weight=0.1),
    LossTerm(name="soft_labels", args={"temperature": 4.0}, weight=0.9),
]


def fit(folder, *, seed=0, source=None, objective=None, teacher=None, progress=None, **keys):
    model = network()
    config = TrainConfig(**{"epochs": 4, "batch_size": 16, **keys})
    history = train(
        model,
        objective or Objective.supervised(TASK),
        (source or Source(), Source(50, seed=1)),
        TASK,
        config,
        seed,
        checkpoint_folder=folder,
        progress=progress or Silent(),
        teacher=teacher,
    )
    return model, history


def same(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def last_weights(folder):
    return torch.load(folder / NAME, weights_only=True)["model"]


OPTIMIZERS = [
    {"optimizer": "adamw"},
    {"optimizer": "sgd", "learning_rate": 0.05, "clip_norm": 1.0},
    {"optimizer": "adamw", "channels_last": False, "schedule": "cosine"},
    {"schedule": "constant", "warm_up": 0.2, "ema": 0.9, "accumulate": 4, "clip_norm": 0.5},
    {"precision": "bfloat16"},
]


@pytest.mark.parametrize("keys", OPTIMIZERS)
def test_stopped_and_gone_on_with_gives_the_very_same_weights(tmp_path, keys):
    distil = {"objective": Objective(DISTILL, TASK), "teacher": ModuleTeacher(network(9))}
    whole, history = fit(tmp_path / "whole", **distil, **keys)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", source=Source(stop_in=3), **distil, **keys)
    progress = Silent()
    resumed, again = fit(tmp_path / "parts", progress=progress, **distil, **keys)
    assert progress.messages == ["training: going on after epoch 2 of 4"]
    assert same(whole, resumed)
    first, second = last_weights(tmp_path / "whole"), last_weights(tmp_path / "parts")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert [(r.loss, r.terms, r.validation) for r in history.epochs] == [
        (r.loss, r.terms, r.validation) for r in again.epochs
    ]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path):
    first, _ = fit(tmp_path / "a")
    torch.rand(7)
    second, _ = fit(tmp_path / "b")
    other, _ = fit(tmp_path / "c", seed=1)
    assert same(first, second)
    assert not same(first, other)


def test_training_gives_the_callers_random_numbers_back(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    model = network()
    torch.manual_seed(5)
    train(
        model,
        Objective.supervised(TASK),
        (Source(), Source(50)),
        TASK,
        TrainConfig(epochs=1),
        0,
        checkpoint_folder=tmp_path,
        progress=Silent(),
    )
    assert torch.equal(torch.rand(3), expected)


def test_it_learns_and_keeps_the_best_weights(tmp_path):
    model, history = fit(tmp_path, epochs=6, learning_rate=1e-2)
    metrics = [row.validation for row in history.epochs]
    best = max(metrics)
    assert best > 0.7
    assert history.best_epoch == max(i for i, m in enumerate(metrics, 1) if m == best)
    assert not model.training
    assert score(model, Source(50, seed=1), TASK).mean() == pytest.approx(best)
    assert history.epochs[-1].loss < history.epochs[0].loss


def test_history_is_plain_json_and_comes_back(tmp_path):
    import json

    _, history = fit(tmp_path, epochs=2)
    rows = json.loads(json.dumps(history.to_json()))
    assert type(history).from_json(rows) == history
    assert set(rows["epochs"][0]) == {
        *("epoch", "loss", "terms", "validation"),
        *("learning_rate", "seconds", "samples_per_second"),
    }


def test_a_finished_training_is_not_done_again(tmp_path):
    first, _ = fit(tmp_path)
    before = (tmp_path / NAME).stat().st_mtime_ns
    second, history = fit(tmp_path, source=Source(stop_in=1))
    assert same(first, second)
    assert len(history.epochs) == 4
    assert (tmp_path / NAME).stat().st_mtime_ns == before


@pytest.mark.parametrize("part", [0.0, 0.2, 0.99])
def test_a_damaged_checkpoint_is_said_and_the_training_starts_again(tmp_path, part):
    whole, _ = fit(tmp_path / "whole")
    fit(tmp_path / "cut")
    path = tmp_path / "cut" / NAME
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    progress = Silent()
    again, history = fit(tmp_path / "cut", progress=progress)
    assert "cannot be read" in progress.messages[0]
    assert "starting again" in progress.messages[0]
    assert same(whole, again)
    assert len(history.epochs) == 4


def test_a_checkpoint_of_another_training_is_not_gone_on_with(tmp_path):
    fit(tmp_path, learning_rate=1e-3)
    progress = Silent()
    model, _ = fit(tmp_path, learning_rate=2e-3, progress=progress)
    assert "another training" in progress.messages[0]
    assert same(model, fit(tmp_path / "fresh", learning_rate=2e-3)[0])


def test_a_stop_while_the_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    import os

    calls = []

    def replace(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    original = os.replace
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts")
    monkeypatch.undo()
    progress = Silent()
    resumed, _ = fit(tmp_path / "parts", progress=progress)
    assert progress.messages == ["training: going on after epoch 2 of 4"]
    assert same(resumed, fit(tmp_path / "whole")[0])


def test_a_checkpoint_that_cannot_be_written_is_a_stage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StageError, match="cannot be written"):
        fit(tmp_path / "file" / "folder")


def test_nan_names_epoch_step_and_terms(tmp_path):
    objective = Objective(DISTILL, TASK)
    with pytest.raises(
        StageError,
        match=r"became nan in epoch 2, step 4; its terms: hard_labels nan, soft_labels nan",
    ):
        fit(
            tmp_path,
            source=Source(poison=(2, 4)),
            objective=objective,
            teacher=ModuleTeacher(network(9)),
        )
    assert len(torch.load(tmp_path / NAME, weights_only=True)["history"]["epochs"]) == 1


def test_progress_adds_up(tmp_path):
    progress = Silent()
    fit(tmp_path, progress=progress)
    assert progress.done == progress.total == 4 * 6
    assert progress.finished == 1


def test_progress_is_finished_when_stopped(tmp_path):
    progress = Silent()
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, source=Source(stop_in=1), progress=progress)
    assert progress.finished == 1


def test_an_objective_that_needs_a_teacher_must_have_one(tmp_path):
    with pytest.raises(InputError, match="there is none"):
        fit(tmp_path, objective=Objective(DISTILL, TASK))


def test_images_of_another_size_name_both(tmp_path):
    source = Source()
    source.image = torch.zeros(96, 1, 9, 9)
    with pytest.raises(InputError, match=r"batch, 1, 8, 8\], and 'image' is \[16, 1, 9, 9\]"):
        fit(tmp_path, source=source)


def test_the_teacher_is_not_changed(tmp_path):
    teacher_model, untouched = network(9), network(9)
    fit(tmp_path, objective=Objective(DISTILL, TASK), teacher=ModuleTeacher(teacher_model))
    assert same(teacher_model, untouched)
    assert all(p.grad is None for p in teacher_model.parameters())


def plain_network(seed=0):
    """Without dropout and batch norm: a batch's gradient is the mean of its parts'."""
    torch.manual_seed(seed)
    return NamedModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), SPEC).double()


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
    arguments = (Objective.supervised(TASK), sources, TASK, config, 0)
    history = train(model, *arguments, checkpoint_folder=folder, progress=Silent())
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
    kept = history.kept
    assert score(model, Source(50, seed=1), TASK).mean() == pytest.approx(kept.validation)
    if kept is history.epochs[-1]:
        for key, value in model.state_dict().items():
            assert torch.equal(value, state["step"]["average"][f"module.{key}"])
    assert not same(model, fit(tmp_path / "plain", learning_rate=1e-2)[0])
    assert set(model.state_dict()) == set(network().state_dict())


def test_layers_are_captured_from_the_network_that_is_trained(tmp_path):
    terms = [
        LossTerm(name="hard_labels"),
        LossTerm(name="fitnets", args={"student": "4", "teacher": "4"}),
    ]
    teacher = ModuleTeacher(network(9))
    objective = Objective(terms, TASK)
    teacher.watch(objective.teacher_layers)
    _, history = fit(tmp_path, objective=objective, teacher=teacher, ema=0.9, epochs=2)
    assert history.epochs[1].terms["fitnets"] < history.epochs[0].terms["fitnets"]


def test_patience_stops_and_says_so_and_resuming_does_not_go_on(tmp_path):
    progress = Silent()
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
    monkeypatch.setattr(trainer, "check_step", lambda *arguments: None)
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
