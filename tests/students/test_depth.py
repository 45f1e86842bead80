"""Repeated blocks are found in any network, and evenly spaced ones remain with their weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgekd.config.networks import ModelConfig
from edgekd.config.pruning import DropLayersConfig, PruneConfig
from edgekd.errors import InputError
from edgekd.models import DictModel, build_model, count_parameters
from edgekd.spec import ModelSpec, TensorSpec
from edgekd.students import drop_layers, prune, read_structure, repeated_blocks, write_structure
from edgekd.students.depth import Run, skip_blocks

VECTOR = TensorSpec("x", ("batch", 10))
IMAGE = TensorSpec("image", ("batch", 1, 16, 16))
LOGITS = TensorSpec("logits", ("batch", 7))


def of(module: nn.Module, given: TensorSpec = VECTOR) -> DictModel:
    return DictModel(module.eval(), ModelSpec((given,), (LOGITS,)))


class Block(nn.Module):
    """x + a layer of x; as a tuple with a None where asked, as those of transformers are."""

    def __init__(self, as_tuple: bool = False, width: int = 10) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, width))
        self.as_tuple, self.kind = as_tuple, "full"

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor | tuple[Tensor, None]:
        hidden = hidden + self.inner(hidden)
        return (hidden, None) if self.as_tuple else hidden


class Encoder(nn.Module):
    """Calls its blocks with keywords, reads an attribute of each, and counts on their number."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Block(as_tuple=True) for _ in range(count))
        self.head, self.count = nn.Linear(10, 7), count

    def forward(self, x: Tensor) -> Tensor:
        for number in range(self.count):
            assert self.layer[number].kind == "full"
            x = self.layer[number](hidden=x, mask=None)[0]
        return self.head(x)


class Attributes(nn.Module):
    """Blocks that are attributes of their own, the first of which changes the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Sequential(nn.Linear(10, 12), Block(width=12)), Block(
            width=12), Block(width=12)  # fmt: skip
        self.head = nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(x))))


@pytest.mark.parametrize(
    ("count", "keep", "remain"),
    [
        # DistilBERT took these of BERT's layers.
        (12, 0.5, [0, 2, 4, 7, 9, 11]),
        (12, 6, [0, 2, 4, 7, 9, 11]),
        (6, 0.5, [0, 3, 5]),
        (4, 2, [0, 3]),
        (4, 1, [0]),
        (3, 0.1, [0]),
        (3, 9, [0, 1, 2]),
    ],
)
def test_evenly_spaced_blocks_remain(count: int, keep: float, remain: list[int]) -> None:
    run = Run(tuple(map(str, range(count))), "Block")
    assert [int(name) for name in run.blocks if name not in run.dropped(keep)] == remain


def test_the_rest_computes_as_in_the_teacher_without_them() -> None:
    torch.manual_seed(0)
    model = of(Encoder(5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    smaller, names = drop_layers(model, DropLayersConfig(keep=3))
    assert names == ("layer.1", "layer.3")
    x = torch.randn(4, 10)
    hidden = x
    for number in (0, 2, 4):
        hidden = hidden + model.module.layer[number].inner(hidden)
    assert torch.equal(smaller({"x": x})["logits"], model.module.head(hidden))
    assert before.keys() == model.state_dict().keys(), "the network itself was changed"
    assert all(torch.equal(before[name], v) for name, v in smaller.state_dict().items())


def test_blocks_that_are_attributes_are_found() -> None:
    (run,) = repeated_blocks(of(Attributes()))
    assert run.blocks == ("b", "c")


def test_a_stage_keeps_its_first_block_and_inner_layers_are_no_blocks() -> None:
    model = build_model(ModelConfig(model="mobilenet", args={"width": 0.5}), (IMAGE,), (LOGITS,))
    runs = repeated_blocks(model)
    assert [len(run.blocks) for run in runs] == [2, 3, 3, 2]
    assert {run.kind for run in runs} == {"InvertedResidual"}
    smaller, names = drop_layers(model, DropLayersConfig(keep=0.5))
    assert not {run.blocks[0] for run in runs} & set(names)
    assert count_parameters(smaller) < count_parameters(model)


def test_a_block_that_is_alone_in_each_stage_is_repeated() -> None:
    model = build_model(ModelConfig(model="convnet-l"), (IMAGE,), (LOGITS,))
    (run,) = repeated_blocks(model)
    assert (run.kind, len(run.blocks)) == ("Residual", 3)


def test_torchs_own_encoder() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    model = of(nn.Sequential(nn.Unflatten(1, (2, 5)), nn.Linear(5, 8), encoder, nn.Flatten(1),
                             nn.Linear(16, 7)))  # fmt: skip
    smaller, names = drop_layers(model, DropLayersConfig(keep=0.5))
    assert names == ("2.layers.1", "2.layers.2")
    assert smaller({"x": torch.randn(3, 10)})["logits"].shape == (3, 7)


def test_dropped_then_pruned_is_built_again(tmp_path) -> None:
    config = ModelConfig(model="transformer", args={"depth": 4, "width": 16})
    torch.manual_seed(0)
    model = build_model(config, (IMAGE,), (LOGITS,))
    smaller, names = drop_layers(model, DropLayersConfig(keep=2))
    done = prune(smaller, PruneConfig(ratio=0.5))
    write_structure(tmp_path / "s.json", done.cuts, names)
    from edgekd.students import apply_cuts

    fresh = build_model(config, (IMAGE,), (LOGITS,))
    cuts, dropped = read_structure(tmp_path / "s.json")
    skip_blocks(fresh, dropped)
    apply_cuts(fresh, cuts)
    fresh.load_state_dict(done.model.state_dict())
    batch = {"image": torch.randn(2, 1, 16, 16)}
    assert torch.equal(fresh.eval()(batch)["logits"], done.model.eval()(batch)["logits"])


class Shared(nn.Module):
    """One block that is called twice has no second one to drop."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(10, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.block(x)))


class Needed(nn.Module):
    """Reads a layer inside each of its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList([Block(), Block(), Block()])
        self.head = nn.Linear(10, 7)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layer:
            x = block(x) + block.inner[0].bias.mean()
        return self.head(x)


@pytest.mark.parametrize(
    ("network", "keep", "says"),
    [
        (Shared, 0.5, "Shared has no repeated blocks"),
        (lambda: Encoder(3), 0.9, r"leaves all of the repeated blocks: 3 × Block \(layer.0 …\)"),
        (Needed, 2, r"does not run without its blocks layer.1: [\s\S]*'inner'"),
    ],
)
def test_what_cannot_be_dropped(network, keep: float, says: str) -> None:
    with pytest.raises(InputError, match=says):
        drop_layers(of(network()), DropLayersConfig(keep=keep))


def test_structure_of_another_network_is_refused() -> None:
    with pytest.raises(InputError, match=r"no block 'layer.7'"):
        skip_blocks(of(Encoder(3)), ["layer.7"])
