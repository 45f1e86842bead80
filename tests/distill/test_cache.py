"""The teacher cache: what comes back, what it survives, and what it never takes for an answer."""

import json
import math
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from edgekd.distill import cache as cache_module
from edgekd.distill.cache import fill_cache
from edgekd.errors import InputError, StageError
from edgekd.spec import SAMPLE, VIEW, TensorSpec

SAMPLES, VIEWS, BLOCK = 23, 3, 5
LOGITS = TensorSpec("logits", ("batch", 40))
FEATURE = TensorSpec("feature", ("batch", 2, 3))


class Source:
    """Inputs that tell sample and view apart; batches straddle the blocks."""

    samples = SAMPLES

    def view(self, seed, view, start=0):
        for at in range(start, self.samples, 4):
            rows = torch.arange(at, min(at + 4, self.samples))
            noise = torch.sin(rows * 1.3 + view * 7.1 + seed)
            yield {"x": noise, SAMPLE: rows, VIEW: torch.full_like(rows, view)}


class Teacher:
    """Counts how often it is asked for each (sample, view)."""

    digest = "teacher-1"

    def __init__(self, fail_after=None, seconds=0.0):
        self.asked = Counter()
        self.fail_after = fail_after
        self.seconds = seconds

    def answer(self, batch):
        time.sleep(self.seconds)
        if self.fail_after is not None and self.asked.total() >= self.fail_after:
            raise RuntimeError("the teacher fell over")
        self.asked.update(zip(batch[SAMPLE].tolist(), batch[VIEW].tolist(), strict=True))
        return answers_of(batch["x"])


def answers_of(x):
    """Elementwise in float64, so that a row's answer does not depend on its batch."""
    classes = torch.arange(40, dtype=torch.float64)
    logits = 6 * torch.sin(x.double()[:, None] * 17 + classes * 2.3)
    return {"logits": logits.float(), "feature": x[:, None, None] * torch.ones(2, 3) / 3}


class Watcher:
    """A progress that remembers."""

    def __init__(self):
        self.messages, self.total, self.done, self.open = [], 0, 0, False

    def start(self, label, total, unit):
        assert unit == "sample"
        self.total, self.open = total, True

    def advance(self, n=1, **figures):
        self.done += n

    def message(self, text):
        self.messages.append(text)

    def finish(self):
        self.open = False


def fill(root, teacher=None, progress=None, **changed):
    settings = {
        "outputs": (LOGITS, FEATURE),
        "views": VIEWS,
        "top": 40,
        "seed": 0,
        "data": "data-1",
        "augment": ["flip"],
        "preprocess": {"x": {"scale": 1.0}},
        "block_samples": BLOCK,
    } | changed
    source = settings.pop("source", None) or Source()
    return fill_cache(
        teacher or Teacher(), source, root, progress=progress or Watcher(), **settings
    )


def everything(cached, views=VIEWS):
    """All that the cache answers, in a shuffled order with the views mixed."""
    order = torch.randperm(SAMPLES * views, generator=torch.Generator().manual_seed(0))
    batch = {SAMPLE: order % SAMPLES, VIEW: order // SAMPLES}
    return batch, cached.answer(batch)


def assert_right(cached, views=VIEWS):
    batch, answers = everything(cached, views)
    x = torch.sin(batch[SAMPLE] * 1.3 + batch[VIEW] * 7.1)
    live = answers_of(x)
    assert torch.equal(answers["logits"], live["logits"])
    assert torch.equal(answers["feature"], live["feature"])


def once(views=VIEWS):
    return Counter({(s, v): 1 for s in range(SAMPLES) for v in range(views)})


# What comes back


def test_dense_answers_come_back_bit_by_bit_and_are_asked_for_once(tmp_path):
    teacher, progress = Teacher(), Watcher()
    assert_right(fill(tmp_path, teacher, progress))
    assert teacher.asked == once()
    assert progress.done == progress.total == SAMPLES * VIEWS
    assert not progress.open
    again, silent = Teacher(), Watcher()
    cached = fill(tmp_path, again, silent)
    assert_right(cached)
    assert not again.asked
    assert silent.total == 0
    assert cached.digest == Teacher.digest


def test_an_answer_is_a_copy(tmp_path):
    cached = fill(tmp_path)
    _, answers = everything(cached)
    for tensor in answers.values():
        tensor.fill_(7.0)
    assert_right(cached)


def test_top_logits_come_back_within_float16_and_the_largest_exactly(tmp_path):
    cached = fill(tmp_path, logits=["logits"], top=5)
    batch, answers = everything(cached)
    live = answers_of(torch.sin(batch[SAMPLE] * 1.3 + batch[VIEW] * 7.1))
    assert torch.equal(answers["feature"], live["feature"])
    assert torch.equal(answers["logits"].amax(-1), live["logits"].amax(-1))
    assert torch.equal(answers["logits"].argmax(-1), live["logits"].argmax(-1))
    index = live["logits"].topk(5).indices
    kept = answers["logits"].gather(1, index).double()
    exact = live["logits"].gather(1, index).double()
    # Half a unit of float16's 11 bits, of the distance to the largest; then one of float32's 24.
    bound = (exact.amax(-1, keepdim=True) - exact) * 2.0**-11 + 6 * 2.0**-23 + 2.0**-25
    assert ((kept - exact).abs() <= bound).all()


def test_imagenet_takes_at_most_48_bytes_with_its_share_of_the_checksum(tmp_path):
    class Wide(Source):
        samples = 4096

        def view(self, seed, view, start=0):
            rows = torch.arange(start, self.samples)
            yield {SAMPLE: rows, VIEW: torch.full_like(rows, view)}

    class WideTeacher:
        digest = "wide"

        def answer(self, batch):
            return {"logits": torch.randn(len(batch[SAMPLE]), 1000)}

    spec = TensorSpec("logits", ("batch", 1000))
    cached = fill(
        tmp_path,
        WideTeacher(),
        source=Wide(),
        outputs=[spec],
        logits=["logits"],
        top=10,
        views=1,
        block_samples=4096,
    )
    size = sum(f.stat().st_size for f in cached.folder.glob("*.bin"))
    assert size / 4096 <= 48


# Keys


@pytest.mark.parametrize(
    "changed",
    [
        {"data": "data-2"},
        {"augment": []},
        {"preprocess": {"x": {"scale": 2.0}}},
        {"seed": 1},
        {"top": 39},
        {"outputs": (LOGITS,)},
        {"teacher": "teacher-2"},
    ],
)
def test_whatever_an_answer_depends_on_changes_the_folder(tmp_path, changed):
    old = fill(tmp_path)
    teacher = Teacher()
    teacher.digest = changed.pop("teacher", Teacher.digest)
    assert fill(tmp_path, teacher, **changed).folder != old.folder
    assert teacher.asked == once()


def test_more_views_are_added_to_those_that_are_there(tmp_path):
    fill(tmp_path, views=1)
    teacher = Teacher()
    cached = fill(tmp_path, teacher)
    assert teacher.asked == once() - once(1)
    assert_right(cached)
    assert_right(fill(tmp_path, views=2), views=2)
    assert json.loads((cached.folder / "header.json").read_text())["views"] == VIEWS


@pytest.mark.parametrize("change", ["key", "schema", "cut"])
def test_a_header_of_something_else_is_refused(tmp_path, change):
    path = fill(tmp_path).folder / "header.json"
    text = path.read_text()
    if change == "cut":
        path.write_text(text[:50])
    else:
        path.write_text(json.dumps(json.loads(text) | {change: "0" * 64}))
    with pytest.raises(InputError, match="remove its folder"):
        fill(tmp_path)


def test_the_same_folder_from_another_working_directory(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    cached = fill(Path("caches"))
    monkeypatch.chdir("a")
    teacher = Teacher()
    fill(Path("../caches"), teacher)
    assert not teacher.asked
    # The one that was opened elsewhere still reads, and mends, where it was opened.
    (cached.folder / "blocks.bin").write_bytes(b"")
    assert_right(cached)


# Faults


def test_a_teacher_that_falls_over_leaves_whole_blocks(tmp_path):
    first, progress = Teacher(fail_after=31), Watcher()
    with pytest.raises(RuntimeError, match="fell over"):
        fill(tmp_path, first, progress)
    assert not progress.open
    second = Teacher()
    assert_right(fill(tmp_path, second))
    twice = [pair for pair, n in (first.asked + second.asked).items() if n > 1]
    assert set(first.asked | second.asked) == set(once())
    # Only what was answered of the unfinished block.
    assert len(twice) < BLOCK


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_cache import Teacher, fill
fill(Path({root!r}), Teacher(seconds=0.1))
"""


def test_a_killed_process_leaves_whole_blocks(tmp_path):
    code = KILLED.format(tests=str(Path(__file__).parent), root=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while sum(f.stat().st_size for f in tmp_path.glob("*/blocks.bin")) < 3 * 8:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    teacher = Teacher()
    assert_right(fill(tmp_path, teacher))
    assert set(teacher.asked.values()) == {1}
    kept = SAMPLES * VIEWS - teacher.asked.total()
    assert 3 * BLOCK <= kept < SAMPLES * VIEWS


@pytest.mark.parametrize("file", ["answers.bin", "blocks.bin"])
def test_no_flipped_bit_is_ever_an_answer(tmp_path, file):
    path = fill(tmp_path).folder / file
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for at in generator.choice(len(whole), 25, replace=False):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        teacher = Teacher()
        assert_right(fill(tmp_path, teacher))
        assert 0 < teacher.asked.total() <= BLOCK
        assert path.read_bytes() == whole


def test_damage_found_while_training_is_mended_then_and_said(tmp_path):
    teacher, progress = Teacher(), Watcher()
    cached = fill(tmp_path, teacher, progress)
    path = cached.folder / "answers.bin"
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size // 2)
        stream.write(b"rotten")
    assert_right(cached)
    assert (teacher.asked - once()).total() == BLOCK
    assert len(progress.messages) == 1
    assert "view 1, samples 10 to 14" in progress.messages[0]


@pytest.mark.parametrize("file", ["answers.bin", "blocks.bin"])
@pytest.mark.parametrize("part", [0.0, 0.4, 0.99])
def test_a_truncated_file_is_filled_up(tmp_path, file, part):
    path = fill(tmp_path).folder / file
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    teacher = Teacher()
    cached = fill(tmp_path, teacher)
    assert path.read_bytes() == whole
    assert_right(cached)
    assert teacher.asked.total() <= SAMPLES * VIEWS * (1 - part) + BLOCK


def test_a_cache_that_vanishes_while_training_is_made_again(tmp_path):
    teacher = Teacher()
    cached = fill(tmp_path, teacher)
    assert_right(cached)
    shutil.rmtree(cached.folder)
    assert_right(cached)
    (cached.folder / "answers.bin").write_bytes(b"")
    assert_right(cached)
    assert set(teacher.asked.values()) == {3}
    assert_right(fill(tmp_path, teacher))
    assert set(teacher.asked.values()) == {3}


def test_a_disk_that_loses_what_it_is_given(tmp_path, monkeypatch):
    cached = fill(tmp_path)
    (cached.folder / "answers.bin").write_bytes(b"")
    monkeypatch.setattr("edgekd.distill.cache_file._write", lambda *a, **k: None)
    with pytest.raises(StageError, match=r"block 0 .* does not read as it was written"):
        cached.answer({SAMPLE: torch.tensor([0]), VIEW: torch.tensor([0])})


def test_a_block_in_another_place_is_no_answer(tmp_path):
    folder = fill(tmp_path).folder
    for name in ("answers.bin", "blocks.bin"):
        content = (folder / name).read_bytes()
        third = len(content) // VIEWS
        swapped = content[third : 2 * third] + content[:third] + content[2 * third :]
        (folder / name).write_bytes(swapped)
    teacher = Teacher()
    assert_right(fill(tmp_path, teacher))
    assert teacher.asked == once(2)


@contextmanager
def largest_file(size):
    """The system refuses to let a file grow beyond this, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_what_was_written(tmp_path):
    record = 4 * (40 + 6)
    with (
        largest_file(12 * record),
        pytest.raises(StageError, match=r"10 answers are kept"),
    ):
        fill(tmp_path)
    teacher = Teacher()
    assert_right(fill(tmp_path, teacher))
    assert teacher.asked.total() == SAMPLES * VIEWS - 10


def test_a_disk_that_is_too_small_is_said_before_the_teacher_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "disk_usage", lambda folder: usage(free=1000))
    teacher = Teacher()
    with pytest.raises(StageError, match="MB are free"):
        fill(tmp_path, teacher)
    assert not teacher.asked


def usage(free):
    return SimpleNamespace(free=free)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((StageError, InputError)):
        fill(tmp_path / "file")


# Several at once


def test_two_writers_ask_once_and_the_second_says_that_it_waits(tmp_path):
    teachers = [Teacher(seconds=0.01), Teacher(seconds=0.01)]
    watchers = [Watcher(), Watcher()]
    caches = [None, None]

    def write(number):
        caches[number] = fill(tmp_path, teachers[number], watchers[number])

    threads = [threading.Thread(target=write, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert teachers[0].asked + teachers[1].asked == once()
    assert sum("waiting" in text for w in watchers for text in w.messages) == 1
    for cached in caches:
        assert_right(cached)


def test_readers_at_once_mend_a_block_once(tmp_path):
    teacher = Teacher(seconds=0.01)
    cached = fill(tmp_path, teacher)
    path = cached.folder / "answers.bin"
    path.write_bytes(b"\xff" * 100 + path.read_bytes()[100:])
    readers = [cached, fill(tmp_path, teacher), fill(tmp_path, teacher)]
    wrong = []

    def read(reader):
        try:
            for _ in range(20):
                assert_right(reader)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=read, args=(reader,)) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (teacher.asked - once()).total() == BLOCK


# What is refused


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({SAMPLE: [SAMPLES], VIEW: [0]}, f"sample {SAMPLES} is not in the teacher cache"),
        ({SAMPLE: [-1], VIEW: [0]}, "sample -1 is not"),
        ({SAMPLE: [0], VIEW: [VIEWS]}, f"view {VIEWS} is not in the teacher cache"),
        ({"x": [0.0]}, "lacks @sample"),
    ],
)
def test_what_is_not_there_is_said(tmp_path, batch, message):
    cached = fill(tmp_path)
    with pytest.raises(InputError, match=message):
        cached.answer({name: torch.tensor(value) for name, value in batch.items()})


def test_a_cache_shows_no_layers(tmp_path):
    cached = fill(tmp_path)
    cached.watch([])
    with pytest.raises(InputError, match="layers are asked for: stem"):
        cached.watch(["stem"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("top", [3, 40])
def test_an_answer_that_is_no_number_is_not_kept(tmp_path, value, top):
    class Broken(Teacher):
        def answer(self, batch):
            answers = super().answer(batch)
            answers["logits"][batch[SAMPLE] == 6, 11] = value
            return answers

    with pytest.raises(StageError, match="sample 6 in view 0 is NaN or infinite"):
        fill(tmp_path, Broken(), logits=["logits"], top=top)


def test_an_answer_of_another_shape_is_named(tmp_path):
    with pytest.raises(InputError, match=r"logits as \[4, 40\], .* \[4, 41\]"):
        fill(tmp_path, outputs=[TensorSpec("logits", ("batch", 41))])
    with pytest.raises(InputError, match="answers other as nothing"):
        fill(tmp_path, outputs=[TensorSpec("other", ("batch", 40))])
    with pytest.raises(InputError, match="no fixed size"):
        fill(tmp_path, outputs=[TensorSpec("logits", ("batch", "tokens"))])


def test_a_loader_that_gives_other_samples_is_found_out(tmp_path):
    class Shuffled(Source):
        def view(self, seed, view, start=0):
            for batch in super().view(seed, view, start):
                yield {name: tensor.flip(0) for name, tensor in batch.items()}

    with pytest.raises(StageError, match="did not give sample 0 of view 0"):
        fill(tmp_path, source=Shuffled())
