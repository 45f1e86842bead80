"""Entire channels are removed, the least important ones, and the rest computes as without them."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from edgekd.config.networks import ModelConfig
from edgekd.config.pruning import PruneConfig
from edgekd.errors import InputError
from edgekd.models import DictModel, build_model, count_parameters
from edgekd.spec import ModelSpec, TensorSpec
from edgekd.students import apply_cuts, prune, read_structure, write_structure

LOGITS = TensorSpec("logits", ("batch", 7))
ACTIONS = TensorSpec("action", ("batch", 3, 2))
STATE = TensorSpec("state", ("batch", 5))
VECTOR = TensorSpec("x", ("batch", 10))

CAMERA = TensorSpec("image", ("batch", 3, 16, 16))
NETWORKS = {
    "convnet-l": ((CAMERA,), (LOGITS,)),
    "convnet-s": ((TensorSpec("image", ("batch", 1, 8, 8)),), (LOGITS,)),
    "mlp": ((CAMERA, STATE), (ACTIONS,)),
    "policy-s": ((CAMERA, STATE), (ACTIONS, LOGITS)),
    "policy-l": ((CAMERA, STATE), (ACTIONS,)),
}
ROUNDING = 1e-5
"""Sums of other lengths are summed in another order; answers are of the order of 1."""


def network(name: str, seed: int = 0) -> DictModel:
    """A built-in network in which no two channels are alike, batch norms included."""
    torch.manual_seed(seed)
    model = build_model(ModelConfig(model=name), *NETWORKS[name])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return model


def of(module: nn.Module, *inputs: TensorSpec, output: TensorSpec = LOGITS) -> DictModel:
    return DictModel(module, ModelSpec(inputs or (VECTOR,), (output,)))


def batch_for(model: DictModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {s.name: torch.randn(6, *s.shape[1:], generator=generator) for s in model.spec.inputs}


def answers(model: DictModel) -> dict[str, torch.Tensor]:
    model.eval()
    with torch.no_grad():
        return model(batch_for(model))


def removed_channels(before: nn.Module, after: nn.Module) -> list[int]:
    """Those whose own number (a running mean, a bias) is not there any more."""
    values = [m.running_mean if isinstance(m, nn.BatchNorm2d) else m.bias for m in (before, after)]
    return [i for i, value in enumerate(values[0]) if not bool((values[1] == value).any())]


def silenced(model: DictModel, pruned: DictModel) -> dict[str, torch.Tensor]:
    """The full network's outputs, with 0 for the channels that were pruned."""

    def silence(channels: list[int]):
        return lambda module, inputs, output: output.index_fill(
            1, torch.tensor(channels, dtype=torch.int64), 0.0
        )

    after, handles, count = dict(pruned.named_modules()), [], 0
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d | nn.Linear):
            channels = removed_channels(module, after[name])
            handles.append(module.register_forward_hook(silence(channels)))
            count += len(channels)
    assert count > 0
    given = answers(model)
    for handle in handles:
        handle.remove()
    return given


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", NETWORKS)
def test_half_goes_and_the_rest_answers_as_without_it(name: str, scope: str) -> None:
    model = network(name)
    whole, size = answers(model), count_parameters(model)
    done = prune(model, PruneConfig(ratio=0.5, scope=scope))
    given, expected = answers(done.model), silenced(model, done.model)
    for output in given:
        assert given[output].shape == whole[output].shape
        torch.testing.assert_close(given[output], expected[output], rtol=0, atol=ROUNDING)
    # Half of the inputs and half of the outputs of most layers: a quarter of their weights.
    assert done.parameters == (size, count_parameters(done.model))
    assert done.parameters[1] < 0.55 * size
    assert done.macs[1] < 0.55 * done.macs[0]
    assert torch.equal(whole[output], answers(model)[output]), "the network itself was changed"


@pytest.mark.parametrize("name", NETWORKS)
def test_structure_is_built_again(name: str, tmp_path) -> None:
    done = prune(network(name), PruneConfig(ratio=0.4, importance="random", scope="global"))
    write_structure(tmp_path / "structure.json", done.cuts)
    fresh = network(name, seed=9)
    apply_cuts(fresh, read_structure(tmp_path / "structure.json")[0])
    fresh.load_state_dict(done.model.state_dict())
    for output, answer in answers(done.model).items():
        assert torch.equal(answers(fresh)[output], answer)


def test_structure_of_another_network_is_refused() -> None:
    cuts = prune(network("convnet-l"), PruneConfig(ratio=0.5)).cuts
    with pytest.raises(InputError, match=r"no channel \d+ of a layer"):
        apply_cuts(network("convnet-s"), cuts)


def test_magnitude_removes_the_channels_of_the_smallest_norm() -> None:
    torch.manual_seed(2)
    first, second = nn.Linear(10, 12), nn.Linear(12, 7)
    done = prune(of(nn.Sequential(first, nn.ReLU(), second)), PruneConfig(ratio=0.5))
    norms = first.weight.square().sum(1) + second.weight.square().sum(0)
    smallest = sorted(norms.argsort()[:6].tolist())
    (cut,) = done.cuts
    assert (cut.layer, list(cut.removed)) == ("0", smallest)
    kept = [i for i in range(12) if i not in smallest]
    assert torch.equal(done.model.module[0].weight, first.weight[kept])
    assert torch.equal(done.model.module[2].weight, second.weight[:, kept])


def test_taylor_removes_what_the_loss_does_not_feel_however_large() -> None:
    torch.manual_seed(3)
    first, second = nn.Linear(10, 8), nn.Linear(8, 7)
    with torch.no_grad():
        first.weight[:4] *= 100
        second.weight[:, :4] = 0
    model = of(nn.Sequential(first, nn.Tanh(), second))
    targets = torch.arange(6)
    nn.functional.cross_entropy(model(batch_for(model))["logits"], targets).backward()
    (cut,) = prune(model, PruneConfig(ratio=0.5, importance="taylor")).cuts
    assert cut.removed == (0, 1, 2, 3)
    (cut,) = prune(model, PruneConfig(ratio=0.5)).cuts
    assert cut.removed == (4, 5, 6, 7)


def test_random_depends_on_its_seed_alone() -> None:
    config = PruneConfig(ratio=0.5, importance="random")
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    first = prune(network("mlp"), config, seed=1).cuts
    torch.manual_seed(5)
    model = network("mlp")
    assert prune(model, config, seed=1).cuts == first
    assert prune(model, config, seed=2).cuts != first
    torch.manual_seed(5)
    prune(model, config)
    assert torch.equal(torch.rand(1), drawn), "the caller's random numbers were used"


def test_the_whole_network_shares_a_global_ratio() -> None:
    torch.manual_seed(0)
    weak, strong = nn.Linear(10, 16), nn.Linear(16, 16)
    model = of(nn.Sequential(weak, nn.ReLU(), strong, nn.ReLU(), nn.Linear(16, 7)))
    with torch.no_grad():
        # One channel so large that all others of its layer are small against it.
        weak.weight[0] *= 50
    done = prune(model, PruneConfig(ratio=0.25, scope="global"))
    assert {w.name: w.before - w.after for w in done.layers} == {"0": 8}


def test_widths_are_multiples_of_round_to() -> None:
    done = prune(network("convnet-l"), PruneConfig(ratio=0.6, round_to=8))
    assert done.layers
    assert all(width.after % 8 == 0 for width in done.layers)
    # 6.4 of 16 channels: 8 is nearer than 0.
    assert [(w.before, w.after) for w in done.layers if w.before == 16] == [(16, 8)]


def test_keep_keeps_the_width_of_what_it_names_and_of_what_is_added_to_it() -> None:
    kept = ("features.layers.0", "features.layers.2.second.0")
    done = prune(network("convnet-l"), PruneConfig(ratio=0.5, keep=kept))
    narrower = {width.name for width in done.layers}
    # layers.1 and layers.2.second are added up.
    whole = {"features.layers.0.0", "features.layers.1.0", "features.layers.2.second.0"}
    assert not narrower & whole
    assert "features.layers.2.first.0" in narrower
    assert {name for name, reason in done.left.items() if reason == "keep"} <= whole


def test_misspelt_keep_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'features.layer.2'[\s\S]*did you mean 'features.lay"):
        prune(network("convnet-l"), PruneConfig(ratio=0.5, keep=("features.layer.2",)))


def test_a_ratio_that_leaves_nothing() -> None:
    with pytest.raises(InputError, match=r"nothing of 'features.layers.0.0', which has 16") as low:
        prune(network("convnet-s"), PruneConfig(ratio=0.98))
    assert "at most 0.96" in str(low.value)
    assert prune(network("convnet-s"), PruneConfig(ratio=0.96)).layers[0].after == 1
    with pytest.raises(InputError, match="of 136 channels 134 should go, and 132 can"):
        prune(network("convnet-s"), PruneConfig(ratio=0.99, scope="global"))


def test_nothing_to_prune_says_why() -> None:
    with pytest.raises(InputError, match=r"0: it is an output layer"):
        prune(of(nn.Sequential(nn.Linear(10, 7))), PruneConfig(ratio=0.5))
    with pytest.raises(InputError, match=r"narrow as allowed[\s\S]*lower round_to"):
        prune(network("convnet-s"), PruneConfig(ratio=0.5, round_to=64))


class BehindRawInput(nn.Module):
    """Features joined behind an input that no layer made."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 8), nn.Linear(13, 8)
        self.last = nn.Linear(8, 7)

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([state, self.first(x).relu()], 1)
        return self.last(self.second(joined).relu())


class ChannelsLast(nn.Module):
    """Flattened with the channels as the last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 4), nn.Linear(128, 8)
        self.last = nn.Linear(8, 7)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        flat = self.first(image).relu().permute(0, 2, 3, 1).flatten(1)
        return self.last(self.second(flat).relu())


class FixedShape(nn.Module):
    """A reshape to sizes written in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 8), nn.Linear(8, 8)
        self.last = nn.Linear(8, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pairs = self.first(x).relu().view(-1, 4, 2)
        return self.last(self.second(pairs.flatten(1)).relu())


@pytest.mark.parametrize(
    ("module", "inputs"),
    [(BehindRawInput, (VECTOR, STATE)), (ChannelsLast, (CAMERA,)), (FixedShape, (VECTOR,))],
)
def test_what_cannot_be_followed_is_left_whole_and_said(module, inputs) -> None:
    torch.manual_seed(4)
    model = of(module(), *inputs)
    done = prune(model, PruneConfig(ratio=0.5))
    assert [(w.name, w.before, w.after) for w in done.layers] == [("second", 8, 4)]
    assert done.left["first"] != "it is an output layer"
    torch.testing.assert_close(
        answers(done.model)["logits"], silenced(model, done.model)["logits"], rtol=0, atol=ROUNDING
    )


def test_grouped_and_depthwise_convolutions_lose_as_much_of_each_group() -> None:
    torch.manual_seed(6)
    layers = nn.Sequential(
        *(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU()),
        *(nn.Conv2d(8, 12, 1, groups=2), nn.GroupNorm(4, 12), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 7)),
    )
    done = prune(of(layers, CAMERA), PruneConfig(ratio=0.5))
    assert answers(done.model)["logits"].shape == (6, 7)
    depthwise = done.model.module[1]
    assert depthwise.groups == depthwise.out_channels == 4
    # 12 channels in 4 parts: 1.5 of 3 in each, and the larger half stays.
    assert done.model.module[3].out_channels == 8
    assert done.model.module[3].groups == 2


def test_mode_and_frozen_parameters_stay() -> None:
    model = network("mlp")
    model.train()
    frozen = {"module.layers.0.weight", "module.head.linear.0.bias"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    done = prune(model, PruneConfig(ratio=0.5))
    for made in (model, done.model):
        assert {n for n, p in made.named_parameters() if not p.requires_grad} == frozen
        assert made.training


def test_absent_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(InputError, match=r"pip install 'edgekd\[prune\]'"):
        prune(network("mlp"), PruneConfig(ratio=0.5))


class Csp(nn.Module):
    """Half of the channels goes round, and both are joined again (YOLO's C2f in small)."""

    def __init__(self, pieces="split"):
        super().__init__()
        self.pieces = pieces
        self.a, self.b = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.c, self.fc = nn.Conv2d(24, 12, 1), nn.Linear(12, 7)

    def forward(self, image):
        x = torch.relu(self.a(image))
        p, q = x.split(8, 1) if self.pieces == "split" else (x[:, :8], x[:, 8:])
        x = torch.relu(self.c(torch.cat([p, q, torch.relu(self.b(q))], 1)))
        return self.fc(x.mean((2, 3)))


class Pixels(nn.Module):
    """Channels become places."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 1)
        self.c, self.fc = nn.Conv2d(4, 8, 3, 2, 1), nn.Linear(8, 7)

    def forward(self, image):
        x = nn.functional.pixel_shuffle(self.b(torch.relu(self.a(image))), 2)
        return self.fc(torch.relu(self.c(torch.relu(x))).mean((2, 3)))


class Shuffled(nn.Module):
    """Channels are dealt out between groups (ShuffleNet)."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 1, groups=2)
        self.c, self.fc = nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.Linear(16, 7)

    def forward(self, image):
        x = torch.relu(self.b(torch.relu(self.a(image))))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(torch.relu(self.c(x)).mean((2, 3)))


class Gated(nn.Module):
    """One half of the channels gates the other (GLU)."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 1)
        self.fc = nn.Linear(16, 7)

    def forward(self, image):
        values, gates = self.b(torch.relu(self.a(image))).chunk(2, 1)
        return self.fc((values * torch.sigmoid(gates)).mean((2, 3)))


class Flipped(nn.Module):
    """Each channel meets its opposite."""

    def __init__(self):
        super().__init__()
        self.a, self.fc = nn.Conv2d(3, 16, 3, 2, 1), nn.Linear(16, 7)

    def forward(self, image):
        x = torch.relu(self.a(image))
        return self.fc((x * x.flip(1)).mean((2, 3)))


def kill_odd(module: nn.Module) -> None:
    """Every second channel of the inner layers gives exactly 0."""
    with torch.no_grad():
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear) and not name.startswith("fc"):
                layer.weight[1::2] = 0
                layer.bias[1::2] = 0


@pytest.mark.parametrize(
    ("made", "whole"),
    [
        (Csp, {"a"}),
        (lambda: Csp("slices"), {"a"}),
        (Pixels, {"b"}),
        (Shuffled, {"b", "c"}),
        (Gated, set()),
    ],
)
def test_a_layer_that_cannot_be_followed_is_left_whole(made, whole: set[str]) -> None:
    torch.manual_seed(0)
    model = of(made(), CAMERA)
    kill_odd(model.module)
    expected = answers(model)["logits"]
    done = prune(model, PruneConfig(ratio=0.25))
    # A quarter is less than what is dead: nothing but dead channels goes.
    torch.testing.assert_close(answers(done.model)["logits"], expected, rtol=0, atol=ROUNDING)
    assert done.layers
    assert not whole & {width.name for width in done.layers}
    if whole:
        assert any("not certain" in reason for reason in done.left.values())


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.6])
def test_both_halves_of_a_gate_lose_the_same_requested_channels(ratio: float) -> None:
    torch.manual_seed(0)
    model = of(Gated(), CAMERA)
    with torch.no_grad():
        # Least important in one half is most important in the other.
        model.module.b.weight[1:16:2] *= 1e-4
        model.module.b.weight[16::2] *= 1e-4
    done = prune(model, PruneConfig(ratio=ratio))
    (cut,) = [cut for cut in done.cuts if cut.layer == "b"]
    low = [channel for channel in cut.removed if channel < 16]
    assert [channel - 16 for channel in cut.removed if channel >= 16] == low
    assert abs(len(low) - 16 * ratio) < 1
    assert done.model.module.b.out_channels == 32 - 2 * len(low)


def test_a_network_in_which_nothing_is_certain_is_refused() -> None:
    with pytest.raises(InputError, match="not certain"):
        prune(of(Flipped(), CAMERA), PruneConfig(ratio=0.5))
