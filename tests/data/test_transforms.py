import numpy as np
import pytest
import torch

from edgekd.data.augment import AUGMENTATIONS, SampleRng, colour, crop, erase, flip, shift
from edgekd.data.transforms import MIXINGS, augmentations, check_augmentations, mixing, probe
from edgekd.errors import InputError


def draws(count=200, view=0):
    return SampleRng(0, np.arange(count), np.full(count, view))


@pytest.fixture(params=[torch.uint8, torch.float32])
def images(request):
    pixels = np.random.default_rng(0).integers(1, 256, (200, 3, 9, 7))
    return torch.from_numpy(pixels).to(request.param)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_pure_and_of_the_same_kind_and_another_for_another_view(images, name):
    function = AUGMENTATIONS[name]
    before = images.clone()
    result = function(images, draws())
    assert torch.equal(images, before)
    assert (result.shape, result.dtype) == (images.shape, images.dtype)
    assert torch.equal(result, function(images, draws()))
    assert not torch.equal(result, function(images, draws(view=1)))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(28, 28), (33, 17)])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_image_becomes_the_same_in_any_batch(name, size, channels):
    pixels = np.random.default_rng(0).random((65, channels, *size), np.float32)
    for images in (torch.from_numpy(pixels), torch.from_numpy((pixels * 255).astype(np.uint8))):
        whole = AUGMENTATIONS[name](images, draws(65))
        rows = np.arange(65)
        for part in (slice(1), slice(1, 4), slice(4, 20), slice(20, None)):
            alone = AUGMENTATIONS[name](images[part], SampleRng(0, rows[part], rows[part] * 0))
            assert torch.equal(whole[part], alone)


def test_flip_mirrors_about_half_of_the_images_and_no_other(images):
    result = flip(images, draws())
    mirrored = (result == images.flip(-1)).flatten(1).all(1)
    same = (result == images).flatten(1).all(1)
    assert (mirrored ^ same).all()
    assert 60 < mirrored.sum() < 140
    assert torch.equal(flip(images, draws(), p=0.0), images)
    assert torch.equal(flip(images, draws(), p=1.0), images.flip(-1))
    assert torch.equal(flip(result, draws()), images)


def test_shift_is_one_of_the_shifts_of_a_zero_padded_image(images):
    result = shift(images, draws(), pixels=2)
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
    assert torch.equal(shift(images, draws(), pixels=0), images)


def test_erase_zeroes_one_rectangle_of_the_stated_size(images):
    result = erase(images, draws(), p=1.0, size=0.4)
    gone = (result == 0).all(1)
    assert ((result == 0).any(1) == gone).all()
    assert (gone.any(2).sum(1) == round(0.4 * 9)).all()
    assert (gone.any(1).sum(1) == round(0.4 * 7)).all()
    assert (gone.sum((1, 2)) == round(0.4 * 9) * round(0.4 * 7)).all()
    assert gone.any(0).all()
    kept = ~gone[:, None].expand_as(images)
    assert torch.equal(result[kept], images[kept])
    untouched = (erase(images, draws(), p=0.5) == images).flatten(1).all(1)
    assert 60 < untouched.sum() < 140
    assert torch.equal(erase(images, draws(), p=0.0), images)
    assert not erase(images, draws(), p=1.0, size=1.0).any()


def test_a_crop_of_the_full_scale_is_the_image(images):
    result = crop(images, draws(), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    if images.dtype == torch.uint8:
        assert torch.equal(result, images)
    # Places are off by some 1e-6 of a pixel, and neighbours differ by up to 255.
    torch.testing.assert_close(result, images, rtol=0, atol=2e-3)


def test_a_crop_is_a_linear_map_of_the_stated_area_and_ratio():
    """On images of each pixel's own position, a bilinear crop gives the positions."""
    height, width, count = 40, 30, 400
    rows, columns = torch.arange(height).float(), torch.arange(width).float()
    ramps = torch.stack([rows[:, None].expand(height, width), columns.expand(height, width)])
    result = crop(ramps.expand(count, -1, -1, -1), draws(count), (0.2, 0.5), (0.8, 1.25)).double()
    down, right = result[:, 0, :, 0], result[:, 1, 0, :]
    # Rounding of float32 at 40.
    assert (result[:, 0] - down[:, :, None]).abs().max() < 1e-5
    assert (result[:, 1] - right[:, None, :]).abs().max() < 1e-5
    # Away from the border, where the outermost half pixel is repeated, places are equidistant.
    parts = []
    for places, length in ((down, height), (right, width)):
        inner = places[:, 2:-2].diff(dim=1)
        # Steps of some 0.5 between places of up to 40 in float32, with their rounding of 4e-6.
        assert (inner.amax(1) - inner.amin(1)).max() < 1e-4
        parts.append(inner.mean(1))
        assert places.min() >= 0
        assert places.max() <= length - 1
        assert places.min() < 1
        assert places.max() > length - 2
    area, ratio = parts[0] * parts[1], parts[1] / parts[0]
    for found, low, high in ((area, 0.2, 0.5), (ratio, 0.8, 1.25)):
        assert low - 1e-4 < found.min() < low * 1.1
        assert high / 1.1 < found.max() < high + 1e-4


def test_a_crop_is_the_bilinear_interpolation_worked_out_by_hand():
    image = torch.from_numpy(np.random.default_rng(1).random((6, 6)))
    view = draws(1)
    result = crop(image.float()[None, None], view, (0.25, 0.25), (1.0, 1.0))[0, 0]
    again = draws(1)
    _, _, top, left = (again.uniform().item() * (1 - 0.5) * 6 for _ in range(4))
    for y in range(6):
        for x in range(6):
            at = [min(max(start + (i + 0.5) / 2 - 0.5, 0), 5) for start, i in ((top, y), (left, x))]
            (y0, x0), (dy, dx) = map(int, at), (at[0] % 1, at[1] % 1)
            y1, x1 = min(y0 + 1, 5), min(x0 + 1, 5)
            expected = (
                image[y0, x0] * (1 - dy) * (1 - dx) + image[y1, x0] * dy * (1 - dx)
                + image[y0, x1] * (1 - dy) * dx + image[y1, x1] * dy * dx
            )  # fmt: skip
            # float32 places, and values of at most 1.
            assert result[y, x].item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_uint8_crop_is_the_rounded_float_crop():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (50, 1, 8, 8), np.uint8))
    found, exact = crop(images, draws(50)), crop(images.float(), draws(50))
    assert torch.equal(found.float(), exact.round())


def test_colour_by_hand():
    """Brightness, contrast and saturation one after the other, in float64."""
    images = np.random.default_rng(0).random((20, 3, 5, 4))
    found = colour(torch.from_numpy(images).float(), draws(20), 0.3, 0.4, 0.5)
    again = draws(20)
    factors = [1 + a * (2 * again.uniform().double().numpy() - 1) for a in (0.3, 0.4, 0.5)]
    luma = np.array([0.299, 0.587, 0.114])
    for image, result, bright, contrast, saturation in zip(images, found, *factors, strict=True):
        values = image * bright
        mean = np.tensordot(luma, values, 1).mean()
        values = mean + contrast * (values - mean)
        grey = np.tensordot(luma, values, 1)
        values = grey + saturation * (values - grey)
        # float32 with values of about 1.
        np.testing.assert_allclose(result.numpy(), values, atol=2e-6)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_colour_of_nothing_is_the_image_and_of_one_kind_leaves_the_other(channels):
    pixels = np.random.default_rng(0).integers(60, 190, (50, channels, 6, 6), np.uint8)
    images = torch.from_numpy(pixels)
    assert torch.equal(colour(images, draws(50), 0, 0, 0), images)
    exact = images.double()
    brighter = colour(images.float(), draws(50), 0.3, 0, 0).double()
    factor = (brighter / exact).flatten(1)
    # One factor for the image, but for the rounding of float32.
    assert (factor.amax(1) - factor.amin(1)).max() < 1e-5
    assert factor.min() < 0.75
    assert factor.max() > 1.25
    grey = colour(images.float(), draws(50), 0, 0.3, 0).double()
    if channels != 3:
        torch.testing.assert_close(grey.mean((1, 2, 3)), exact.mean((1, 2, 3)), rtol=1e-5, atol=0.0)
    assert torch.equal(colour(images, draws(50), 0, 0, 1.0), images) == (channels != 3)


def test_colour_keeps_uint8_in_its_range():
    images = torch.full((200, 1, 4, 4), 255, dtype=torch.uint8)
    images[:, :, :2] = 0
    result = colour(images, draws(), 1.0, 1.0)
    assert (result[:, :, 2:].int() - result[:, :, :2].int()).min() >= 0
    assert result.max() == 255


def test_entries_apply_their_arguments():
    images = torch.arange(1, 13, dtype=torch.uint8).reshape(1, 1, 3, 4)
    always, far = augmentations([{"flip": {"p": 1}}, {"shift": {"pixels": 2}}])
    assert torch.equal(always(images, draws(1)), images.flip(-1))
    assert torch.equal(far(images, draws(1)), shift(images, draws(1), pixels=2))


def test_mixing_is_the_last_entry_or_none():
    assert mixing([]) is None
    assert mixing(["flip"]) is None
    assert len(augmentations(["flip", {"mixup": {"alpha": 0.3}}])) == 1
    found = mixing(["flip", {"mixup": {"alpha": 0.3}}])
    assert (found.func, found.keywords) == (MIXINGS["mixup"], {"alpha": 0.3})
    check_augmentations([{"crop": {"scale": [0.5, 1]}}, "colour", "cutmix"])


OWN = """\
import torch

def invert(images, draws, top=255):
    return top - images

def grow(images, draws):
    return images.repeat(1, 1, 2, 1)

def broken(images, draws):
    raise KeyError('colour')

def old(images, generator, p=0.5):
    chosen = torch.rand(len(images), generator=generator) < p
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)

def hidden(images, draws):
    return torch.where((torch.rand(len(images)) < 0.5)[:, None, None, None], 0, images)

def exchanged(images, draws):
    return images.flip(0)

def fade(images, draws):
    return (images * draws.uniform()[:, None, None, None]).to(images.dtype)

def in_place(images, draws):
    return images.mul_(draws.integers(2)[:, None, None, None].to(images.dtype))
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_augmentations.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda name: augmentations([f"my_augmentations:{name}"])[0]


@pytest.mark.parametrize("name", ["invert", "fade", "in_place"])
def test_own_augmentation_by_reference(own, name, images):
    before = images.clone()
    probe(own(name), images[:8])
    assert torch.equal(images, before)
    (invert,) = augmentations([{"my_augmentations:invert": {"top": 16}}])
    assert (invert(torch.zeros(2, 1, 3, 3), draws(2)) == 16).all()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("grow", r"\(8, 3, 18, 7\)"),
        ("broken", "KeyError: 'colour'"),
        ("old", r"(?s)'old' fails: TypeError.*draws, which are no torch.Generator: draws.uniform"),
        ("hidden", r"(?s)two different images.*from draws only"),
        ("exchanged", r"(?s)two different images.*each image separately"),
    ],
)
def test_own_augmentations_that_cannot_be_used(own, images, name, said):
    torch.manual_seed(0)
    with pytest.raises(InputError, match=said):
        probe(own(name), images[:8])


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("count", [1, 8])
def test_the_built_in_ones_pass_the_probe(images, name, count):
    probe(AUGMENTATIONS[name], images[:count])


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (["flipp"], "did you mean 'flip'"),
        (["cutmxi"], "did you mean 'cutmix'"),
        ([{"shift": {"pixel": 2}}], "did you mean 'pixels'"),
        ([{"mixup": {"alfa": 2}}], "did you mean 'alpha'"),
        ([{"mixup": {"partners": 2}}], "'mixup': 'partners' is filled in by the project"),
        ([{"flip": {}, "shift": {}}], "not 2: flip, shift"),
        ([{}], "not 0"),
        ([{"flip": {"p": "x"}}], "'flip': p: input should be a valid number; it is 'x'"),
        ([{"flip": {"p": True}}], "'flip': p: .* it is True"),
        ([{"shift": {"pixels": 1.5}}], "'shift': pixels: .* it is 1.5"),
        ([{"crop": {"scale": 0.5}}], "'crop': scale: input should be a valid tuple; it is 0.5"),
        ([{"crop": {"scale": [0.5]}}], "'crop': scale"),
        (["json:JSONDecodr"], "did you mean 'JSONDecoder'"),
        (["mixup", "flip"], "'mixup' is entry 1 of 2, and mixing comes last"),
        (["flip", "mixup", "cutmix"], "'mixup' is entry 2 of 3"),
    ],
)
def test_wrong_entries(entries, said):
    with pytest.raises(InputError, match=said):
        check_augmentations(entries)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"flip": {"p": 1.5}}, "p is 1.5"),
        ({"erase": {"size": -0.1}}, "size is -0.1"),
        ({"shift": {"pixels": 3}}, "pixels is 3"),
        ({"crop": {"scale": [0.5, 2]}}, "scale is 2"),
        ({"crop": {"ratio": [1.2, 0.9]}}, "from more to less"),
        ({"colour": {"contrast": 2}}, "contrast is 2"),
    ],
)
def test_wrong_values_are_found_before_training(entry, said):
    (augmentation,) = augmentations([entry])
    with pytest.raises(InputError, match=said):
        probe(augmentation, torch.zeros(2, 1, 3, 3))
