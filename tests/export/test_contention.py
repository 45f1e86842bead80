from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from edgerun.contention import Contention, Counters, read_counters

START = Counters(0.0, cpus=2, busy=0.0, stolen=0.0, own=0.0, ran=0.0, waited=0.0, preempted=0,
                 pressure=0.0)  # fmt: skip


def span(**grown):
    return Contention.between(START, replace(START, time=1.0, **grown))


def test_an_idle_machine_is_not_called_busy():
    # Services in the background, and the noise of the ticks that processors are counted in.
    idle = span(busy=1.06, own=1.0, ran=1.0, waited=0.004, stolen=0.002, preempted=9)
    assert idle.reason == ""
    assert idle.others == pytest.approx(0.03)


@pytest.mark.parametrize(
    ("grown", "words"),
    [
        ({"busy": 2.0, "own": 1.0}, "used 50 % of the CPU time of its 2 processors"),
        ({"ran": 0.5, "waited": 0.5}, "waited for a processor 50 % of its time"),
        ({"stolen": 0.2}, "the hypervisor took 10 %"),
    ],
)
def test_each_kind_of_load_is_named(grown, words):
    assert words in span(**grown).reason
    quiet = span(busy=1.0, own=1.0, ran=1.0, stolen=0.0)
    # A longer quiet span weighs more than a short busy one.
    mixed = Contention.mean([replace(quiet, seconds=200.0), span(**grown)])
    assert mixed.reason == ""


def test_counters_that_are_missing_are_null_and_no_reason(tmp_path):
    found = read_counters(tmp_path)
    assert (found.cpus, found.busy, found.ran, found.pressure) == (None,) * 4
    unknown = Contention.between(found, replace(found, time=found.time + 1))
    assert unknown.reason == ""
    assert unknown.to_json()["others"] is None
    assert Contention.mean([unknown, span(busy=2.0)]).others == 1.0


def test_counters_are_read_from_the_kernel_s_files(tmp_path):
    task = tmp_path / "proc/self/task"
    for thread, text in (("1", "2000000000 500000000 3"), ("2", "1000000000 0 1")):
        (task / thread).mkdir(parents=True)
        (task / thread / "schedstat").write_text(text)
    (tmp_path / "proc/stat").write_text(
        "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 100 50 25 900 7 0 25 30 0 0\n"
        "cpu1 100 0 0 900 0 0 0 0 0 0\nintr 5\n"
    )
    (tmp_path / "proc/pressure").mkdir()
    (tmp_path / "proc/pressure/cpu").write_text(
        "some avg10=1.00 avg60=1.00 avg300=1.00 total=2500000\nfull avg10=0.00 total=0\n"
    )
    found, ticks = read_counters(tmp_path), os.sysconf("SC_CLK_TCK")
    assert (found.cpus, found.busy, found.stolen) == (2, 300 / ticks, 30 / ticks)
    assert (found.ran, found.waited, found.pressure) == (3.0, 0.5, 2.5)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the counters are Linux's")
@pytest.mark.parametrize("pinned", [True, False])
def test_busy_loops_beside_this_process_are_seen(pinned):
    # As many as leave half of the processors idle: one of two.
    processors = sorted(os.sched_getaffinity(0))[: max(1, len(os.sched_getaffinity(0)) // 2)]
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in processors]
    try:
        for loop, processor in zip(loops, processors, strict=True):
            if pinned:
                os.sched_setaffinity(loop.pid, {processor})
        time.sleep(0.2)
        before = read_counters()
        end = time.perf_counter() + 1.0
        while time.perf_counter() < end:
            pass
        found = Contention.between(before, read_counters())
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    assert "the machine is busy: other processes used" in found.reason
