"""The teacher cache: bytes per record, records per second, and the memory it stays within.

A synthetic teacher answers by a cheap formula, so that the figures are the cache's own. Writing
and reading are measured each in a fresh process; resident memory is that process's peak, with
what importing torch alone takes beside it. On a machine with other work, records per CPU second
tell more than those per second::

    python tests/benchmarks/teacher_cache.py [--samples 1000000] [--classes 1000] [--top 10]
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from edgekd.distill.cache import CachedTeacher, fill_cache
from edgekd.spec import SAMPLE, VIEW, TensorSpec

BATCH = 128


class Rows:
    """Samples that are only their number."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def view(self, seed: int, view: int, start: int = 0) -> Iterator[Mapping[str, Tensor]]:
        """See :class:`edgekd.distill.cache.ViewSource`."""
        for at in range(start, self.samples, BATCH):
            rows = torch.arange(at, min(at + BATCH, self.samples))
            yield {SAMPLE: rows, VIEW: torch.full_like(rows, view)}


class Formula:
    """Logits from a table, shifted by the sample."""

    def __init__(self, classes: int) -> None:
        self.digest = f"formula-{classes}"
        self.seconds = 0.0
        noise = torch.randn(997 + classes, generator=torch.Generator().manual_seed(0))
        self._table = 3 * noise.unfold(0, classes, 1)

    def predict(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(B, C); the CPU time it takes is kept apart."""
        begin = time.process_time()
        logits = self._table[(batch[SAMPLE] * 31 + batch[VIEW]) % len(self._table)]
        self.seconds += time.process_time() - begin
        return {"logits": logits}


class Silent:
    """Progress that nobody watches."""

    def start(self, label: str, total: int, unit: str) -> None:
        """Nothing."""

    def advance(self, n: int = 1, **figures: float) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""


def peak_mb() -> float:
    """The largest resident size of this process so far, in MB of 10⁶ bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def cache(options: argparse.Namespace, teacher: Formula) -> CachedTeacher:
    """Fill it, or open it when it is full."""
    return fill_cache(
        teacher,
        Rows(options.samples),
        options.folder,
        outputs=[TensorSpec("logits", ("batch", options.classes))],
        logits=["logits"],
        views=options.views,
        top=options.top,
        seed=0,
        data="rows",
        progress=Silent(),
    )


def write(options: argparse.Namespace) -> None:
    """Fill a new cache and print its figures."""
    imported = peak_mb()
    teacher = Formula(options.classes)
    begin, busy = time.perf_counter(), time.process_time()
    folder = cache(options, teacher).folder
    elapsed, busy = time.perf_counter() - begin, time.process_time() - busy
    records = options.samples * options.views
    size = sum(file.stat().st_size for file in folder.glob("*.bin"))
    print(
        f"write: {size / records:.3f} bytes per record, {size / 1e6:.1f} MB; "
        f"{records / elapsed:,.0f} records/s, {records / busy:,.0f} per CPU second, "
        f"{records / (busy - teacher.seconds):,.0f} without the formula; "
        f"peak {peak_mb():.0f} MB, of which {imported:.0f} are imports"
    )


def read(options: argparse.Namespace) -> None:
    """Read random batches, first touch and again, and print their figures."""
    imported = peak_mb()
    cached = cache(options, Formula(options.classes))
    records = options.samples * options.views
    order = torch.randperm(records, generator=torch.Generator().manual_seed(1))
    batches = order[: max(BATCH, records // BATCH * BATCH)].split(BATCH)[: options.batches]
    for label in ("first", "again"):
        begin, busy = time.perf_counter(), time.process_time()
        for rows in batches:
            cached.predict({SAMPLE: rows % options.samples, VIEW: rows // options.samples})
        elapsed, busy = time.perf_counter() - begin, time.process_time() - busy
        read = sum(map(len, batches))
        print(
            f"read {label}: {read / elapsed:,.0f} records/s, {read / busy:,.0f} per CPU second, "
            f"in random batches of {BATCH}; "
            f"peak {peak_mb():.0f} MB, of which {imported:.0f} are imports"
        )


def main() -> None:
    """Run both halves in fresh processes, or one of them in this one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--top", type=int, default=10)
    parser.add_argument("--batches", type=int, default=8000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--half", choices=["write", "read"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.half:
        {"write": write, "read": read}[options.half](options)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for half in ("write", "read"):
            words = [*sys.argv[1:], "--folder", folder, "--half", half]
            subprocess.run([sys.executable, __file__, *words], check=True)


if __name__ == "__main__":
    main()
