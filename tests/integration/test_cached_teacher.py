"""How the teacher's outputs reach a run: from the cache, again and again, or live."""

from __future__ import annotations

from pathlib import Path

PIPELINE = """\
name: digits
data: {source: digits, augment: [{shift: {pixels: 1}}]}
teacher: {model: convnet-s, train: {epochs: 3, batch_size: 64, learning_rate: 1e-2}}
student: {model: convnet-xs}
distill: {epochs: 3, batch_size: 64, learning_rate: 1e-2, baseline: false, cache: {views: 2}}
"""
FEATURES = (
    "distill.losses=[hard_labels, {attention: {student: features.layers.1, "
    "teacher: features.layers.1}, weight: 10}]"
)


def caches(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of each cache file, by its folder."""
    return {
        file.parent.name: (file.stat().st_size, file.stat().st_mtime_ns)
        for file in folder.glob("*/answers.bin")
    }


def test_the_cache_serves_another_loss_and_meets_no_other_augmentation(
    tmp_path: Path, edgekd
) -> None:
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    cache = tmp_path / "runs/digits/cache"

    def run(*overrides: str) -> str:
        sets = [part for override in overrides for part in ("--set", override)]
        return edgekd("distill", "pipeline.yaml", *sets).stdout

    run()
    first = caches(cache)
    (size,) = [size for size, _ in first.values()]
    assert size == 2 * 1213 * 10 * 4, "two views of each sample, ten float32 logits"

    run("distill.losses=[{soft_labels: {temperature: 2}}]", "distill.epochs=4")
    assert caches(cache) == first, "the teacher was asked again for what is on disk"

    said = run(FEATURES)
    assert "is run live: features.layers.1 of it is compared" in said
    assert caches(cache) == first

    run("distill.augment=[{shift: {pixels: 2}}]")
    assert len(caches(cache)) == 2
    assert {key: caches(cache)[key] for key in first} == first

    shared = f"distill.cache={{views: 1, folder: {tmp_path / 'shared'}}}"
    run(shared)
    assert [size for size, _ in caches(tmp_path / "shared").values()] == [1213 * 10 * 4]
    assert len(caches(cache)) == 2


NETWORK = """\
from torch import nn


class Net(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale
        self.layer = nn.Linear(64, 10)

    def forward(self, image):
        return self.layer(image.flatten(1)) * self.scale
"""


def test_a_teacher_that_differs_in_an_argument_alone_meets_no_old_answers(
    tmp_path: Path, edgekd
) -> None:
    (tmp_path / "mine.py").write_text(NETWORK)
    text = PIPELINE.replace("model: convnet-s, train", '"model": "mine:Net", train')
    (tmp_path / "pipeline.yaml").write_text(text)
    edgekd("distill", "pipeline.yaml")
    (weights,) = tmp_path.glob("runs/digits/artifacts/teacher/*/teacher.safetensors")
    checkpoint = tmp_path / "t.safetensors"
    checkpoint.write_bytes(weights.read_bytes())
    for scale in (1.0, 5.0):
        teacher = (
            f"teacher={{model: 'mine:Net', args: {{scale: {scale}}}, checkpoint: t.safetensors}}"
        )
        edgekd("distill", "pipeline.yaml", "--set", teacher)
    assert len(caches(tmp_path / "runs/digits/cache")) == 3


def test_what_contradicts_the_mixing_of_images_is_found_first(tmp_path: Path, edgekd) -> None:
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    losses = "distill.losses=[hard_labels, dkd]"
    done = edgekd(
        "distill", "pipeline.yaml", "--set", losses, "--set", "distill.augment=[mixup]", code=2
    )
    assert "dkd needs one class per sample" in done.stderr
    assert not list(tmp_path.glob("runs/digits/artifacts/teacher/*/teacher.safetensors"))
