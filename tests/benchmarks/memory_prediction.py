"""Peak memory and latency of networks of different shape, predicted from their graphs and measured.

    python tests/benchmarks/memory_prediction.py RECORDS.json [--batches 1 8] [--threads 1]

Every network is exported, quantized (static INT8), built as the engines stage does and measured as
the gate's figure is: the peak of a process with the runtime above that of an empty one. "A priori"
is a prediction without any measurement of these networks; "others known" is from the measurements
of all other networks. RECORDS.json stores what is measured; delete it to measure again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.config.profile import load_profile
from edgekd.engines.onnxruntime import build_engine
from edgekd.errors import EdgekdError
from edgekd.models.dict_model import DictModel
from edgekd.onnx.export import export_onnx
from edgekd.onnx.samples import ArraySamples
from edgekd.quantization.quantize_onnx import QuantizeSettings, quantize_onnx
from edgekd.spec import ModelSpec, TensorSpec
from edgekd.students.cost_model import CostModel
from edgekd.students.costs import Figures, GraphCosts, Precision, Range, graph_costs
from edgekd.targets import LocalTarget

CPU = ("CPUExecutionProvider",)


def conv(a: int, b: int, stride: int = 1, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm and ReLU."""
    layer = nn.Conv2d(a, b, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(b), nn.ReLU())


def convnet(channels: int, widths: list[int], classes: int = 10) -> nn.Module:
    """Convolutions, each second one with stride 2."""
    pairs = zip([channels, *widths], widths, strict=False)
    layers = [conv(a, b, 1 + i % 2) for i, (a, b) in enumerate(pairs)]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)
    )


class Inverted(nn.Module):
    """The block of MobileNetV2 and EfficientNet-Lite."""

    def __init__(self, a: int, b: int, stride: int, grow: int = 6, kernel: int = 3) -> None:
        super().__init__()
        self.same = a == b and stride == 1
        wide = a * grow
        self.layers = nn.Sequential(
            conv(a, wide, 1, 1), conv(wide, wide, stride, kernel, wide),
            nn.Conv2d(wide, b, 1, bias=False), nn.BatchNorm2d(b),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.same else self.layers(x)


def mobile(width: float, blocks: list[tuple[int, int, int, int]], last: int) -> nn.Module:
    """A stem, inverted blocks (channels, repeats, stride, kernel), a wide layer and a head."""
    a = int(32 * width)
    layers: list[nn.Module] = [conv(3, a, 2)]
    for channels, repeats, stride, kernel in blocks:
        b = int(channels * width)
        for i in range(repeats):
            layers.append(Inverted(a, b, stride if i == 0 else 1, kernel=kernel))
            a = b
    return nn.Sequential(
        *layers, conv(a, last, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 100)
    )


V2 = [(16, 1, 1, 3), (24, 2, 2, 3), (32, 3, 2, 3), (64, 4, 2, 3), (96, 3, 1, 3), (160, 3, 2, 3)]
LITE0 = [(16, 1, 1, 3), (24, 2, 2, 3), (40, 2, 2, 5), (80, 3, 2, 3), (112, 3, 1, 5), (192, 4, 2, 5)]


class Residual(nn.Module):
    """Two 3×3 convolutions and a sum."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(conv(a, b, stride), nn.Conv2d(b, b, 3, 1, 1), nn.BatchNorm2d(b))
        self.short = nn.Conv2d(a, b, 1, stride) if (a, stride) != (b, 1) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layers(x) + self.short(x))


def resnet(widths: list[int], blocks: int) -> nn.Module:
    """A residual network on images with three channels."""
    layers: list[nn.Module] = [conv(3, widths[0], 2, 7), nn.MaxPool2d(3, 2, 1)]
    for a, b in zip([widths[0], *widths], widths, strict=False):
        layers += [
            Residual(a if i == 0 else b, b, 2 if i == 0 and a != b else 1) for i in range(blocks)
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 100))


class Attention(nn.Module):
    """A transformer's encoder layer with plain products."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.first(x)).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).reshape(b, n, c))
        return x + self.mlp(self.second(x))


class Transformer(nn.Module):
    """Tokens of ``inputs`` numbers each, attention, a mean over the tokens."""

    def __init__(self, inputs: int, width: int, layers: int, heads: int = 4) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(inputs, width), nn.Linear(width, 10)
        self.layers = nn.Sequential(*(Attention(width, heads) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x)).mean(1))


class Recurrent(nn.Module):
    """A GRU or LSTM over (batch, time, inputs), of which the last state is classified."""

    def __init__(self, kind: type[nn.RNNBase], inputs: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.cells = kind(inputs, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


class UNet(nn.Module):
    """Down, up by transposed convolutions, and a sum of both."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.down = conv(3, width), conv(width, 2 * width, 2)
        self.deep, self.up = conv(2 * width, 2 * width), nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(y + self.up(self.deep(self.down(y)))).mean((2, 3))


def signal(width: int) -> nn.Module:
    """Convolutions over a raw signal."""
    layers: list[nn.Module] = []
    for a, b in ((1, width), (width, 2 * width), (2 * width, 4 * width), (4 * width, 4 * width)):
        layers += [nn.Conv1d(a, b, 9, 4, 4), nn.BatchNorm1d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def mlp(widths: list[int]) -> nn.Module:
    """Linear layers with ReLU."""
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


NETWORKS: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "convnet 28²": ((1, 28, 28), lambda: convnet(1, [8, 16, 32])),
    "convnet 32², wide": ((3, 32, 32), lambda: convnet(3, [64, 128, 128, 256, 256, 512])),
    "convnet 256², thin": ((3, 256, 256), lambda: convnet(3, [8, 16, 16, 32])),
    "MLP, wide": ((784,), lambda: mlp([784, 3072, 3072, 1024])),
    "MLP, deep": ((64,), lambda: mlp([64] + [256] * 24)),
    "MobileNetV2-like 96²": ((3, 96, 96), lambda: mobile(0.5, V2, 640)),
    "MobileNetV2-like 224²": ((3, 224, 224), lambda: mobile(1.0, V2, 1280)),
    "EfficientNet-Lite0-like 224²": ((3, 224, 224), lambda: mobile(1.0, LITE0, 1280)),
    "ResNet18-like 224²": ((3, 224, 224), lambda: resnet([64, 128, 256, 512], 2)),
    "ResNet, 100 MB, 64²": ((3, 64, 64), lambda: resnet([96, 192, 384, 768], 2)),
    "U-Net 128²": ((3, 128, 128), lambda: UNet(24)),
    "transformer, small": ((64, 32), lambda: Transformer(32, 128, 4)),
    "transformer, 85 MB": ((196, 768), lambda: Transformer(768, 768, 3, 12)),
    "transformer, 512 tokens": ((512, 16), lambda: Transformer(16, 192, 3)),
    "1-D convolutions 16000": ((1, 16000), lambda: signal(32)),
    "GRU": ((100, 40), lambda: Recurrent(nn.GRU, 40, 256, 2)),
    "LSTM": ((100, 40), lambda: Recurrent(nn.LSTM, 40, 512, 2)),
}


def measure(
    name: str, batches: list[int], threads: int, known: dict[str, Any], save: Callable[[], None]
) -> None:
    """Add the records of a network in float32 and INT8 at all batch sizes that are not known."""
    keys = {(p, b): f"{name} | {p} | {b}" for p in ("fp32", "int8") for b in batches}
    if all(key in known for key in keys.values()):
        return
    shape, build = NETWORKS[name]
    torch.manual_seed(0)
    spec = ModelSpec((TensorSpec("x", ("batch", *shape)),), (TensorSpec("y", ("batch", None)),))
    module = build().eval()
    x = torch.randn(32, *shape)
    with torch.no_grad():
        y = module(x[:2])
    spec = ModelSpec(spec.inputs, (TensorSpec("y", ("batch", *y.shape[1:])),))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source, int8 = folder / "fp32.onnx", folder / "int8.onnx"
        export_onnx(DictModel(module, spec), source)
        samples = ArraySamples({"x": x.numpy()})
        settings = QuantizeSettings(method="static")
        try:
            quantize_onnx(source, int8, None, settings, calibration=samples, scratch=folder)
        except EdgekdError as error:
            print(name, "INT8:", error)
        for precision, file in (("fp32", source), ("int8", int8)):
            if not file.is_file():
                continue
            built = folder / f"{precision}-built.onnx"
            small = {"x": x.numpy()[:8]}
            row = build_engine(file, built, CPU, threads, samples=small, tolerance=1.0)
            for batch in batches:
                inputs = folder / "inputs.npz"
                np.savez(inputs, x=x.numpy()[:batch])
                record = LocalTarget().bench(
                    built, inputs=inputs, batch=batch, threads=threads, providers=CPU,
                    min_queries=20, max_seconds=5.0, optimization=row.run_level,
                    processes=1, max_processes=1,
                )["models"][0]  # fmt: skip
                known[keys[precision, batch]] = {
                    "costs": vars(graph_costs(source, batch)),
                    "memory": record["memory"],
                    "latency_ms": record["latency"]["p50"]["value"],
                    "size_mb": built.stat().st_size / 1e6,
                }
                save()
                print(keys[precision, batch], record["memory"]["above_empty_mb"], flush=True)


def main() -> None:
    """Measure what is not stored, then print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("records", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    options = parser.parse_args()
    known = json.loads(options.records.read_text()) if options.records.is_file() else {}
    for name in options.networks:
        measure(
            name,
            options.batches,
            options.threads,
            known,
            lambda: options.records.write_text(json.dumps(known)),
        )

    _table(known)


def _table(known: dict[str, Any]) -> None:
    """Predicted and measured, and how many networks are within 15 % at all batch sizes."""
    rows = {key: (_costs(each), _figures(key, each)) for key, each in known.items()}
    heads = ("measured MB", "a priori", "others known", "p50 ms", "others known")
    print(f"| network | precision | batch | {' | '.join(heads)} |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    worst: dict[tuple[str, str], float] = {}
    for key, (costs, found) in rows.items():
        name, precision, batch = key.split(" | ")
        model = CostModel(load_profile("host"), (cast(Precision, precision),))
        before = model.predict(costs).memory_mb.value
        for other, (others_costs, others_figures) in rows.items():
            if not other.startswith(f"{name} |"):
                model.correct(others_costs, others_figures)
        after = model.predict(costs)
        assert found.memory_mb is not None
        measured, p50 = found.memory_mb.value, found.latency_ms["p50"].value
        off = before / measured - 1
        worst[precision, name] = max(worst.get((precision, name), 0.0), abs(off))
        print(
            f"| {name} | {precision} | {batch} | {measured:.1f} | {before:.1f} ({off:+.0%}) "
            f"| {after.memory_mb.value:.1f} ({after.memory_mb.value / measured - 1:+.0%}) "
            f"| {p50:.3f} | {after.latency_ms['p50'].value:.3f} |"
        )
    for precision in ("fp32", "int8"):
        errors = [error for (which, _), error in worst.items() if which == precision]
        print(
            f"{precision}: {sum(e <= 0.15 for e in errors)} of {len(errors)} within 15 % a priori"
        )


def _costs(record: dict[str, Any]) -> GraphCosts:
    return GraphCosts(**{**record["costs"], "operators": tuple(record["costs"]["operators"])})


def _figures(key: str, record: dict[str, Any]) -> Figures:
    variant = "int8" if "| int8 |" in key else "float32"
    latency, memory = record["latency_ms"], record["memory"]["above_empty_mb"]
    known = {"p50": Range(latency, latency, latency)}
    return Figures(known, Range(memory, memory, memory), record["size_mb"], 1, variant, 1)


if __name__ == "__main__":
    main()
