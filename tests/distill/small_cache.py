"""A teacher cache of a few samples, and a teacher that counts its calls."""

import time
from collections import Counter

import torch

from edgekd.distill.cache import fill_cache
from edgekd.spec import SAMPLE, VIEW, TensorSpec
from tests.progress import RecordedProgress

SAMPLES, VIEWS, BLOCK = 23, 3, 5
LOGITS = TensorSpec("logits", ("batch", 40))
FEATURE = TensorSpec("feature", ("batch", 2, 3))


class Source:
    """Inputs that identify sample and view; batches straddle the blocks."""

    samples = SAMPLES

    def view(self, seed, view, start=0):
        for at in range(start, self.samples, 4):
            rows = torch.arange(at, min(at + 4, self.samples))
            noise = torch.sin(rows * 1.3 + view * 7.1 + seed)
            yield {"x": noise, SAMPLE: rows, VIEW: torch.full_like(rows, view)}


class Teacher:
    """Counts how often each (sample, view) is requested."""

    digest = "teacher-1"

    def __init__(self, fail_after=None, seconds=0.0):
        self.asked = Counter()
        self.fail_after = fail_after
        self.seconds = seconds

    def predict(self, batch):
        time.sleep(self.seconds)
        if self.fail_after is not None and self.asked.total() >= self.fail_after:
            raise RuntimeError("the teacher fell over")
        self.asked.update(zip(batch[SAMPLE].tolist(), batch[VIEW].tolist(), strict=True))
        return answers_of(batch["x"])


def answers_of(x):
    """Elementwise in float64, so that a row's output does not depend on its batch."""
    classes = torch.arange(40, dtype=torch.float64)
    logits = 6 * torch.sin(x.double()[:, None] * 17 + classes * 2.3)
    return {"logits": logits.float(), "feature": x[:, None, None] * torch.ones(2, 3) / 3}


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
        teacher or Teacher(), source, root, progress=progress or RecordedProgress(), **settings
    )


def everything(cached, views=VIEWS):
    """All outputs of the cache, in a shuffled order with the views mixed."""
    order = torch.randperm(SAMPLES * views, generator=torch.Generator().manual_seed(0))
    batch = {SAMPLE: order % SAMPLES, VIEW: order // SAMPLES}
    return batch, cached.predict(batch)


def assert_right(cached, views=VIEWS):
    batch, answers = everything(cached, views)
    x = torch.sin(batch[SAMPLE] * 1.3 + batch[VIEW] * 7.1)
    live = answers_of(x)
    assert torch.equal(answers["logits"], live["logits"])
    assert torch.equal(answers["feature"], live["feature"])


def once(views=VIEWS):
    return Counter({(s, v): 1 for s in range(SAMPLES) for v in range(views)})
