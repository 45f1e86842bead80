"""The teacher cache: what comes back, and for what."""

import json
import math
import threading
from pathlib import Path

import pytest
import torch

from edgekd.errors import InputError, StageError
from edgekd.spec import SAMPLE, VIEW, TensorSpec
from tests.distill.small_cache import (
    BLOCK,
    LOGITS,
    SAMPLES,
    VIEWS,
    Source,
    Teacher,
    answers_of,
    assert_right,
    everything,
    fill,
    once,
)
from tests.progress import RecordedProgress


def test_dense_answers_come_back_bit_by_bit_and_are_asked_for_once(tmp_path):
    teacher, progress = Teacher(), RecordedProgress()
    assert_right(fill(tmp_path, teacher, progress))
    assert teacher.asked == once()
    assert progress.done == progress.total == SAMPLES * VIEWS
    assert not progress.open
    assert progress.units == {"sample"}
    again, silent = Teacher(), RecordedProgress()
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

        def predict(self, batch):
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
def test_a_damaged_header_heals(tmp_path, change):
    path = fill(tmp_path).folder / "header.json"
    text = path.read_text()
    if change == "cut":
        path.write_text(text[:50])
    else:
        path.write_text(json.dumps(json.loads(text) | {change: "0" * 64}))
    teacher = Teacher()
    assert_right(fill(tmp_path, teacher))
    assert not teacher.asked  # The blocks have checksums of their own.
    assert path.read_text() == text


def test_the_same_folder_from_another_working_directory(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    cached = fill(Path("caches"))
    monkeypatch.chdir("a")
    teacher = Teacher()
    fill(Path("../caches"), teacher)
    assert not teacher.asked
    # The cache opened elsewhere still reads, and repairs, where it was opened.
    (cached.folder / "blocks.bin").write_bytes(b"")
    assert_right(cached)


# Several at once


def test_two_writers_ask_once_and_the_second_says_that_it_waits(tmp_path):
    teachers = [Teacher(seconds=0.01), Teacher(seconds=0.01)]
    watchers = [RecordedProgress(), RecordedProgress()]
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
        ({SAMPLE: [0], VIEW: [-1]}, "view -1 is not"),
        ({"x": [0.0]}, "lacks @sample"),
    ],
)
@pytest.mark.parametrize("in_memory", [False, True])
def test_what_is_not_there_is_said(tmp_path, batch, message, in_memory):
    cached = fill(tmp_path)
    if in_memory:
        everything(cached)
    with pytest.raises(InputError, match=message):
        cached.predict({name: torch.tensor(value) for name, value in batch.items()})


def test_a_cache_shows_no_layers(tmp_path):
    cached = fill(tmp_path)
    cached.capture([])
    with pytest.raises(InputError, match="layers are needed: stem"):
        cached.capture(["stem"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("top", [3, 40])
def test_an_answer_that_is_no_number_is_not_kept(tmp_path, value, top):
    class Broken(Teacher):
        def predict(self, batch):
            answers = super().predict(batch)
            answers["logits"][batch[SAMPLE] == 6, 11] = value
            return answers

    with pytest.raises(StageError, match="sample 6 in view 0 is NaN or infinite"):
        fill(tmp_path, Broken(), logits=["logits"], top=top)


def test_an_answer_of_another_shape_is_named(tmp_path):
    with pytest.raises(InputError, match=r"logits as \[4, 40\], .* \[4, 41\]"):
        fill(tmp_path, outputs=[TensorSpec("logits", ("batch", 41))])
    with pytest.raises(InputError, match="outputs other as nothing"):
        fill(tmp_path, outputs=[TensorSpec("other", ("batch", 40))])
    with pytest.raises(InputError, match="no fixed size"):
        fill(tmp_path, outputs=[TensorSpec("logits", ("batch", "tokens"))])


def test_a_loader_that_gives_other_samples_is_found_out(tmp_path):
    class Shuffled(Source):
        def view(self, seed, view, start=0):
            for batch in super().view(seed, view, start):
                yield {name: tensor.flip(0) for name, tensor in batch.items()}

    with pytest.raises(StageError, match="did not return sample 0 of view 0"):
        fill(tmp_path, source=Shuffled())
