"""Images per second of distillation: the answer cache, a live teacher, and what others take.

The contenders train the same student on Fashion-MNIST, from the same weights, in batches of 128,
with SGD and ``0.1 · CE + 0.9 · T² · KL`` at T = 4:

- ``alone``: edgekd, the student by hard labels only;
- ``cached``: edgekd, soft labels from the answer cache, which is filled and timed beforehand;
- ``live``: edgekd with ``distill.cache: false``;
- ``by hand``: the loop that anybody would write around a live teacher;
- ``torchdistill``: its DistillationBox with KDLoss, when ``--torchdistill`` names an interpreter of
  an environment that has it (and edgekd's dependencies; edgekd itself is put on its path).

Each is a fresh process, and they take turns epoch by epoch: while one trains, the others wait, so
that a drift of the machine meets all alike. The ratios are those of neighbouring epochs (without
the first, which warms up), with a bootstrap interval of their median over all rounds. The clock
runs from asking for an epoch's first batch until its last step is done: validation and checkpoints
are left out, which only edgekd has. The teacher's weights are random, which costs the same. Where
other work shares the machine, images per CPU second tell more than those per second::

    python tests/benchmarks/distillation_throughput.py [--threads 1] [--rounds 5] \
        [--torchdistill /path/to/environment/bin/python] [--teacher convnet-l --student convnet-s]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import edgekd
import edgerun
from edgekd.config.networks import ModelConfig
from edgekd.config.pipeline import DataConfig
from edgekd.config.training import CacheConfig, LossTerm, TrainConfig
from edgekd.data import Split, load_dataset, open_dataset, save_dataset
from edgekd.data.loader import Loader
from edgekd.distill.cache import fill_cache
from edgekd.distill.objective import Objective
from edgekd.distill.teacher import ModuleTeacher, Teacher
from edgekd.distill.trainer import Trainer
from edgekd.models import DictModel, build_model, count_parameters
from edgekd.tasks import get_task

BATCH = 128
TEMPERATURE, HARD, SOFT = 4.0, 0.1, 0.9
OPTIMIZER: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
NETWORKS = {
    "teacher-280k": ModelConfig(model="convnet-l", args={"widths": (14, 28, 48, 96)}),
    "student-18k": ModelConfig(model="convnet-s", args={"widths": (8, 16, 35)}),
}
"""Beside the built-in ones: 280,724 and 17,837 parameters."""
EDGEKD = ("alone", "cached", "live")
AUGMENT = ("flip", {"erase": {"size": 0.3}})

Laps = list[tuple[float, float]]
"""Seconds and CPU seconds of each epoch."""


def await_turn() -> None:
    """Report that this process is ready for an epoch, and wait until it may train it."""
    print("ready", flush=True)
    if not sys.stdin.readline():
        raise SystemExit("the benchmark has ended")


def clocked(batches: Iterable[Any], laps: Laps) -> Iterator[Any]:
    """The batches; the lap ends when one more is asked for than there are."""
    await_turn()
    begin, busy = time.perf_counter(), time.process_time()
    yield from batches
    laps.append((time.perf_counter() - begin, time.process_time() - busy))


class ClockedLoader(Loader):
    """A loader that times its epochs."""

    laps: Laps

    def epoch(self, seed: int, epoch: int) -> Iterator[dict[str, Tensor]]:
        """See :class:`Loader`."""
        return clocked(super().epoch(seed, epoch), self.laps)


class Tensors(nn.Module):
    """A network as other loops call it: images in, logits out."""

    def __init__(self, network: DictModel) -> None:
        super().__init__()
        self.network = network.module

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, classes)."""
        logits: Tensor = self.network(images)["logits"]
        return logits


class Bench:
    """The data and the two networks, the same for every contender."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.dataset = open_dataset(options.work / "data")
        self.task = get_task("classification", {})
        self.outputs = self.task.outputs(self.dataset)
        self.teacher = self._network(options.teacher, seed=1)
        self.student = self._network(options.student, seed=0)

    def _network(self, name: str, seed: int) -> DictModel:
        torch.manual_seed(seed)
        config = NETWORKS.get(name, ModelConfig(model=name))
        return build_model(config, self.dataset.inputs, self.outputs)

    def loader(self, laps: Laps) -> ClockedLoader:
        """Training batches, as ``edgekd.stages.training.fit`` makes them."""
        views = min(CacheConfig().views, self.options.epochs) if self.options.augment else 1
        loader = ClockedLoader(
            "train",
            self.dataset,
            BATCH,
            AUGMENT if self.options.augment else (),
            channels_last=True,
            views=None if self.options.contender == "live" else views,
            steps=self.options.batches,
        )
        loader.laps = laps
        return loader

    def cached(self, loader: Loader) -> Teacher:
        """The teacher's answers from the disk, asked for where they are missing."""
        assert loader.views is not None
        return fill_cache(
            ModuleTeacher(self.teacher),
            loader,
            self.options.work / "cache",
            outputs=self.outputs,
            logits=["logits"],
            views=loader.views,
            top=CacheConfig().top,
            seed=0,
            data="fashion-mnist",
            augment=list(loader.augmented * AUGMENT),
            progress=Mock(),
        )

    def tensors(self) -> tuple[TensorDataset, int]:
        """All training images, preprocessed, and labels; and how many an epoch takes."""
        split = self.dataset.splits["train"]
        images = self.dataset.model_inputs("train", 0, len(split))["image"]
        labels = np.array(split.arrays["label"], np.int64)
        data = TensorDataset(torch.from_numpy(images), torch.from_numpy(labels))
        return data, self.options.batches * BATCH


def fill(bench: Bench, laps: Laps) -> float:
    """Not a contender: the cache is filled."""
    loader = bench.loader(laps)
    await_turn()
    begin, busy = time.perf_counter(), time.process_time()
    bench.cached(loader)
    laps.append((time.perf_counter() - begin, time.process_time() - busy))
    return 0.0


def with_edgekd(bench: Bench, laps: Laps) -> float:
    """``alone``, ``cached`` or ``live``; the last epoch's mean loss."""
    contender = bench.options.contender
    loader = bench.loader(laps)
    teacher: Teacher | None = None
    objective = Objective.supervised(bench.task)
    if contender != "alone":
        teacher = bench.cached(loader) if contender == "cached" else ModuleTeacher(bench.teacher)
        soft = LossTerm(name="soft_labels", args={"temperature": TEMPERATURE}, weight=SOFT)
        objective = Objective([LossTerm(name="hard_labels", weight=HARD), soft], bench.task)
    few = {name: array[:BATCH] for name, array in bench.dataset.splits["validation"].arrays.items()}
    with tempfile.TemporaryDirectory(dir=bench.options.work) as folder:
        history = Trainer(
            bench.student,
            objective,
            loader,
            Loader(Split(few), bench.dataset, BATCH, channels_last=True),
            bench.task,
            TrainConfig(
                epochs=bench.options.epochs,
                batch_size=BATCH,
                optimizer="sgd",
                learning_rate=OPTIMIZER["lr"],
                schedule="constant",
            ),
            0,
            checkpoint_folder=Path(folder),
            progress=Mock(),
            teacher=teacher,
        ).fit()
    return float(history.epochs[-1].loss)


def by_hand(bench: Bench, laps: Laps) -> float:
    """A live teacher, as people write it."""
    data, samples = bench.tensors()
    loader = DataLoader(data, batch_size=BATCH, sampler=RandomSampler(data, num_samples=samples))
    teacher, student = Tensors(bench.teacher).eval(), Tensors(bench.student).train()
    optimizer = torch.optim.SGD(student.parameters(), **OPTIMIZER)
    for _ in range(bench.options.epochs):
        total = 0.0
        for images, labels in clocked(loader, laps):
            with torch.no_grad():
                answer = teacher(images)
            logits = student(images)
            soft = F.kl_div(
                F.log_softmax(logits / TEMPERATURE, dim=1),
                F.softmax(answer / TEMPERATURE, dim=1),
                reduction="batchmean",
            )
            loss = HARD * F.cross_entropy(logits, labels) + SOFT * TEMPERATURE**2 * soft
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item()
    return float(total / bench.options.batches)


def with_torchdistill(bench: Bench, laps: Laps) -> float:
    """The training loop of its examples, without their logging."""
    from torchdistill.core.distillation import get_distillation_box  # type: ignore[import-not-found]

    data, samples = bench.tensors()
    terms: dict[str, Any] = {"temperature": TEMPERATURE, "alpha": HARD, "beta": SOFT}
    for who in ("student", "teacher"):
        terms |= {f"{who}_module_path": ".", f"{who}_module_io": "output"}
    kd = {"criterion": {"key": "KDLoss", "kwargs": terms}, "weight": 1.0}
    config = {
        "num_epochs": bench.options.epochs,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler, "kwargs": {"num_samples": samples}},
            "kwargs": {"batch_size": BATCH, "num_workers": 0, "drop_last": True},
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": dict(OPTIMIZER)},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": kd}}},
    }
    device = torch.device("cpu")
    teacher, student = Tensors(bench.teacher).eval(), Tensors(bench.student)
    box = get_distillation_box(teacher, student, {"train": data}, config, device, None, False, 1)
    for epoch in range(bench.options.epochs):
        box.pre_epoch_process(epoch=epoch)
        total = 0.0
        for images, labels, extra in clocked(box.train_data_loader, laps):
            loss = box.forward_process(images.to(device), labels.to(device), extra)
            box.post_forward_process(loss)
            total += loss.item()
        box.post_epoch_process()
    return float(total / bench.options.batches)


RUNS = {**dict.fromkeys(EDGEKD, with_edgekd), "fill": fill, "by hand": by_hand}
RUNS["torchdistill"] = with_torchdistill


def contend(options: argparse.Namespace) -> None:
    """In a process of its own: run one contender and print its laps and its loss."""
    torch.set_num_threads(options.threads)
    laps: Laps = []
    loss = RUNS[options.contender](Bench(options), laps)
    print(json.dumps({"laps": laps, "loss": loss}))


def start(contender: str, options: argparse.Namespace, work: Path) -> subprocess.Popen[str]:
    """One contender in a fresh process, which waits for its turn before each epoch."""
    python = options.torchdistill if contender == "torchdistill" else sys.executable
    words = ["--contender", contender, "--work", str(work), *sys.argv[1:]]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(options.threads),
        "PYTHONPATH": os.pathsep.join(
            str(Path(package.__file__).parent.parent) for package in (edgekd, edgerun)
        ),
        # As edgekd sets it for itself: threads that spin stop each other on a busy machine.
        "GOMP_SPINCOUNT": "10000",
    }
    return subprocess.Popen(
        [python, __file__, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def take_turns(names: list[str], options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All contenders at once, one epoch each in turn: what each prints at the end."""
    running = {name: start(name, options, work) for name in names}
    results: dict[str, Any] = {}
    said: dict[str, str] = {}

    def listen(name: str) -> None:
        output = running[name].stdout
        assert output is not None
        said[name] = output.readline()
        if said[name] != "ready\n":
            results[name] = json.loads(said[name])

    try:
        for name in names:
            listen(name)
        turn = 0
        while len(results) < len(names):
            # Another one begins each time, so that none always comes after the same.
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                if name not in results:
                    print("go", file=running[name].stdin, flush=True)
                    listen(name)
            turn += 1
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return results


def compare(options: argparse.Namespace, work: Path) -> None:
    """The contenders, round by round; the ratios are those of neighbouring epochs."""
    save_dataset(load_dataset(DataConfig(source="fashion-mnist"), Path(), seed=0), work / "data")
    bench = Bench(argparse.Namespace(**{**vars(options), "work": work}))
    for role, network in (("teacher", bench.teacher), ("student", bench.student)):
        name = getattr(options, role)
        print(f"{role} {name}: {count_parameters(network):,} parameters")
    loader = bench.loader([])
    answers = loader.samples * (loader.views or 1)
    names = [*EDGEKD, *([] if options.augment else ["by hand"])]
    names += ["torchdistill"] if options.torchdistill and not options.augment else []
    names = [name for name in names if name in (options.only or names)]
    seconds, busy = take_turns(["fill"], options, work)["fill"]["laps"][0]
    print(f"the cache of {answers:,} answers is filled in {seconds:.1f} s, {busy:.1f} CPU seconds")
    laps: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    losses = {}
    for number in range(options.rounds):
        for name, result in take_turns(names, options, work).items():
            laps[name] += result["laps"][1:]
            losses[name] = result["loss"]
        figures = ", ".join(
            f"{name} {options.batches * BATCH / np.median(np.array(laps[name])[:, 0]):,.0f}"
            for name in names
        )
        print(f"{number}: {figures} images/s; load {os.getloadavg()[0]:.1f}", flush=True)
    table({name: options.batches * BATCH / np.array(pairs) for name, pairs in laps.items()}, losses)


def table(rates: dict[str, NDArray[np.float64]], losses: dict[str, float]) -> None:
    """Medians over epochs, median ratios with their 95 % intervals; the last epoch's loss."""
    print(
        "| contender | images/s | cached to it | images/CPU s | cached to it | loss |\n"
        "|---|---:|---:|---:|---:|---:|"
    )
    draws = np.random.default_rng(0)
    for name, values in rates.items():
        cells = [name]
        for clock in (0, 1):
            ratios = rates["cached"][:, clock] / values[:, clock]
            medians = np.median(draws.choice(ratios, (2000, len(ratios))), axis=1)
            low, high = np.quantile(medians, (0.025, 0.975))
            cells.append(f"{np.median(values[:, clock]):,.0f}")
            cells.append(f"{np.median(ratios):.3f} ({low:.3f} to {high:.3f})")
        print(f"| {' | '.join(cells)} | {losses[name]:.4f} |")


def main() -> None:
    """Compare, or be one of the compared."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=50, help="of an epoch")
    parser.add_argument("--epochs", type=int, default=20, help="of a round; the first is warm-up")
    parser.add_argument("--teacher", default="teacher-280k")
    parser.add_argument("--student", default="student-18k")
    parser.add_argument("--augment", action="store_true", help="flip and erase; edgekd only")
    parser.add_argument("--torchdistill", metavar="PYTHON")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), help="these contenders")
    parser.add_argument("--contender", choices=list(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        contend(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder))


if __name__ == "__main__":
    main()
