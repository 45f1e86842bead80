import pytest
import torch
from torch import Generator

from edgekd.data.transforms import augmentations, erase, flip, probe, shift
from edgekd.errors import InputError


def generator(seed=0):
    return Generator().manual_seed(seed)


@pytest.fixture(params=[torch.uint8, torch.float32])
def images(request):
    return torch.randint(1, 256, (200, 3, 9, 7), generator=generator()).to(request.param)


@pytest.mark.parametrize("function", [flip, shift, erase])
def test_pure_deterministic_and_of_the_same_kind(images, function):
    before = images.clone()
    result = function(images, generator(1))
    assert torch.equal(images, before)
    assert (result.shape, result.dtype) == (images.shape, images.dtype)
    assert torch.equal(result, function(images, generator(1)))
    assert not torch.equal(result, function(images, generator(2)))


def test_flip_mirrors_about_half_of_the_images_and_no_other(images):
    result = flip(images, generator())
    mirrored = (result == images.flip(-1)).flatten(1).all(1)
    same = (result == images).flatten(1).all(1)
    assert (mirrored ^ same).all()
    assert 60 < mirrored.sum() < 140
    assert torch.equal(flip(images, generator(), p=0.0), images)
    assert torch.equal(flip(images, generator(), p=1.0), images.flip(-1))


def test_shift_is_one_of_the_shifts_of_a_zero_padded_image(images):
    result = shift(images, generator(), pixels=2)
    offsets = set()
    for image, shifted in zip(images, result, strict=True):
        padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
        matches = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if torch.equal(shifted, padded[:, y : y + 9, x : x + 7])
        ]
        assert len(matches) == 1
        offsets.update(matches)
    assert len(offsets) == 25
    assert torch.equal(shift(images, generator(), pixels=0), images)


def test_erase_zeroes_one_rectangle_of_the_stated_size(images):
    result = erase(images, generator(), p=1.0, size=0.4)
    gone = (result == 0).all(1)
    assert ((result == 0).any(1) == gone).all()
    assert (gone.any(2).sum(1) == round(0.4 * 9)).all()
    assert (gone.any(1).sum(1) == round(0.4 * 7)).all()
    assert (gone.sum((1, 2)) == round(0.4 * 9) * round(0.4 * 7)).all()
    assert gone.any(0).all()
    kept = ~gone[:, None].expand_as(images)
    assert torch.equal(result[kept], images[kept])
    untouched = (erase(images, generator(), p=0.5) == images).flatten(1).all(1)
    assert 60 < untouched.sum() < 140


def test_entries_apply_their_arguments():
    images = torch.arange(1, 13, dtype=torch.uint8).reshape(1, 1, 3, 4)
    always, far = augmentations([{"flip": {"p": 1}}, {"shift": {"pixels": 2}}])
    assert torch.equal(always(images, generator()), images.flip(-1))
    assert torch.equal(far(images, generator()), shift(images, generator(), pixels=2))


def test_own_augmentation_by_reference(tmp_path, monkeypatch):
    (tmp_path / "my_augmentations.py").write_text(
        "def invert(images, generator, top=255):\n    return top - images\n"
        "def grow(images, generator):\n    return images.repeat(1, 1, 2, 1)\n"
        "def broken(images, generator):\n    raise KeyError('colour')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    images = torch.zeros(2, 1, 3, 3, dtype=torch.uint8)
    (invert,) = augmentations([{"my_augmentations:invert": {"top": 16}}])
    assert (invert(images, generator()) == 16).all()
    for name, said in (("grow", r"\(2, 1, 6, 3\)"), ("broken", "KeyError: 'colour'")):
        (own,) = augmentations([f"my_augmentations:{name}"])
        with pytest.raises(InputError, match=said):
            probe(own, images)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("flipp", "did you mean 'flip'"),
        ({"shift": {"pixel": 2}}, "did you mean 'pixels'"),
        ({"flip": {}, "shift": {}}, "not 2: flip, shift"),
        ({}, "not 0"),
        ("json:JSONDecodr", "did you mean 'JSONDecoder'"),
    ],
)
def test_wrong_entries(entry, said):
    with pytest.raises(InputError, match=said):
        augmentations([entry])


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"flip": {"p": 1.5}}, "p is 1.5"),
        ({"flip": {"p": "x"}}, "p is 'x'"),
        ({"erase": {"size": -0.1}}, "size is -0.1"),
        ({"shift": {"pixels": 3}}, "pixels is 3"),
        ({"shift": {"pixels": 1.5}}, "fails|pixels is 1.5"),
    ],
)
def test_wrong_values_are_found_before_training(entry, said):
    (augmentation,) = augmentations([entry])
    with pytest.raises(InputError, match=said):
        probe(augmentation, torch.zeros(2, 1, 3, 3))
