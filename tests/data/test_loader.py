from itertools import chain

import numpy as np
import pytest
import torch

from edgekd.config.pipeline import DataConfig
from edgekd.data import open_dataset, save_dataset
from edgekd.data.augment import SampleRng
from edgekd.data.build_dataset import build_dataset
from edgekd.data.loader import Loader
from edgekd.data.source import RawData
from edgekd.data.transforms import cutmix, mixup, partner_rows
from edgekd.errors import InputError
from edgekd.spec import SAMPLE, VIEW
from edgekd.tasks import Classification


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    random = np.random.default_rng(0)
    arrays = {
        "image": random.integers(0, 256, (100, 3, 6, 5), np.uint8),
        "state": random.normal(5, 3, (100, 4)),
        "speed": random.normal(5, 3, 100),
        "tokens": random.integers(0, 9, (100, 7)),
        "label": np.arange(100),
        "action": random.normal(size=(100, 2)),
    }
    splits = {"train": arrays, "validation": arrays, "test": arrays}
    made = build_dataset(RawData(splits, "here", "a test"), DataConfig(source="npz"))
    folder = tmp_path_factory.mktemp("data")
    save_dataset(made, folder)
    return open_dataset(folder)


def labels(batches):
    return [batch["label"].tolist() for batch in batches]


def test_ordered_batches_equal_the_numpy_preprocessing(dataset):
    batches = list(Loader("test", dataset, 32).ordered())
    assert [len(b["label"]) for b in batches] == [32, 32, 32, 4]
    inputs = dataset.model_inputs("test", 0, 100)
    assert set(batches[0]) == {*inputs, "label", "action"}
    for name, expected in inputs.items():
        found = torch.cat([b[name] for b in batches]).numpy()
        assert found.dtype == expected.dtype
        # The same three float32 operations in the same order: a unit in the last place at most.
        np.testing.assert_allclose(found, expected, rtol=2e-7, atol=1e-7)
    assert list(chain(*labels(batches))) == list(range(100))


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch(dataset):
    loader = Loader("train", dataset, 10)
    assert sorted(chain(*labels(loader.epoch(1, 2)))) == list(range(100))
    assert labels(loader.epoch(1, 2)) == labels(loader.epoch(1, 2))
    different = [labels(loader.epoch(*at)) for at in ((1, 2), (1, 3), (2, 2), (2, 1))]
    assert all(a != b for i, a in enumerate(different) for b in different[:i])


def test_rows_stay_together(dataset):
    raw = dataset.splits["train"].arrays
    for batch in Loader("train", dataset, 10).epoch(0, 1):
        rows = batch["label"].numpy()
        np.testing.assert_array_equal(batch["tokens"].numpy(), raw["tokens"][rows])
        np.testing.assert_array_equal(batch["action"].numpy(), raw["action"][rows])
        expected = dataset.preprocess["image"].apply(raw["image"][rows])
        np.testing.assert_allclose(batch["image"].numpy(), expected, rtol=2e-7, atol=1e-7)


def test_augmentation_is_deterministic_and_leaves_the_order_alone(dataset):
    plain = Loader("train", dataset, 10)
    augmented = Loader("train", dataset, 10, augment=["flip", {"shift": {"pixels": 1}}, "erase"])
    one, again, other, bare = (
        list(loader.epoch(*at))
        for loader, at in ((augmented, (3, 4)), (augmented, (3, 4)), (augmented, (3, 5)),
                           (plain, (3, 4)))
    )  # fmt: skip
    assert labels(one) == labels(bare)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0]["image"], other[0]["image"])
    assert not torch.equal(one[0]["image"], bare[0]["image"])
    assert torch.equal(one[0]["state"], bare[0]["state"])


def test_what_is_erased_is_the_raw_zero(dataset):
    loader = Loader("train", dataset, 10, augment=[{"erase": {"p": 1.0, "size": 1.0}}])
    constants = dataset.preprocess["image"]
    expected = -np.array(constants.mean) / np.array(constants.std)
    image = next(iter(loader.epoch(0, 1)))["image"]
    np.testing.assert_allclose(image.mean((0, 2, 3)).numpy(), expected, rtol=1e-5)
    for plain, unaugmented in zip(
        loader.ordered(), Loader("train", dataset, 10).ordered(), strict=True
    ):
        assert torch.equal(plain["image"], unaugmented["image"])


def test_length_and_the_last_partial_batch(dataset):
    assert len(Loader("train", dataset, 30)) == 3
    assert [len(b) for b in labels(Loader("train", dataset, 30).epoch(0, 1))] == [30] * 3
    assert len(Loader("train", dataset, 300)) == 1
    assert [len(b) for b in labels(Loader("train", dataset, 300).epoch(0, 1))] == [100]


def test_batches_do_not_alias_the_stored_arrays(dataset):
    loader = Loader("train", dataset, 100)
    for batches in (loader.ordered, lambda: loader.epoch(0, 1)):
        for tensor in next(iter(batches())).values():
            tensor.fill_(0)
    assert dataset.splits["train"].arrays["label"].sum() == 4950
    np.testing.assert_array_equal(next(iter(loader.ordered()))["label"], range(100))


def test_channels_last_changes_the_memory_format_only(dataset):
    one = next(iter(Loader("train", dataset, 10, channels_last=True).ordered()))
    two = next(iter(Loader("train", dataset, 10).ordered()))
    assert one["image"].is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_augmentation_needs_an_image_that_it_fits(dataset):
    with pytest.raises(InputError, match="pixels is 9"):
        Loader("train", dataset, 10, augment=[{"shift": {"pixels": 9}}])
    splits = {"all": {"state": np.random.default_rng(0).normal(size=(20, 2)), "y": np.arange(20)}}
    vectors = build_dataset(RawData(splits, "here", "a test"), DataConfig(source="npz"))
    with pytest.raises(InputError, match="no input is an image"):
        Loader("train", vectors, 4, augment=["flip"])


AUGMENTS = {
    "single": ["flip", {"shift": {"pixels": 1}}, "erase", "crop", "colour"],
    "mixup": ["flip", "crop", {"mixup": {"alpha": 0.5}}],
    "cutmix": ["erase", "cutmix"],
}


def image_dataset(kind=np.uint8, count=60, **targets):
    """One image of two channels; labels 0…4, of which every seventh is unknown."""
    random = np.random.default_rng(0)
    arrays = {
        "image": random.integers(1, 256, (count, 2, 8, 7)).astype(kind),
        "label": np.where(np.arange(count) % 7 == 6, -1, np.arange(count) % 5),
        "action": random.normal(size=(count, 2)),
        **targets,
    }
    splits = {"train": arrays, "validation": arrays, "test": arrays}
    return build_dataset(RawData(splits, "here", "a test"), DataConfig(source="npz"))


def by_sample(batches):
    """Every tensor of each sample, by its row and view."""
    return {
        (int(batch[SAMPLE][i]), int(batch[VIEW][i])): {
            name: tensor[i] for name, tensor in batch.items()
        }
        for batch in batches
        for i in range(len(batch[SAMPLE]))
    }


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].keys() == other[key].keys()
        assert all(torch.equal(one[key][name], other[key][name]) for name in one[key])


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
@pytest.mark.parametrize("augment", AUGMENTS.values(), ids=AUGMENTS)
def test_a_view_is_what_the_epoch_gives_bit_for_bit(kind, augment):
    data = image_dataset(kind)
    trained = by_sample(Loader("train", data, 10, augment=augment).epoch(3, 5))
    assert {view for _, view in trained} == {4}
    for size in (1, 7, 60, 100):
        loader = Loader("train", data, size, augment=augment)
        assert_same(by_sample(loader.view(3, 4)), trained)
    few = np.array([41, 6, 2, 33])
    some = Loader("train", data, 2, augment=augment, rows=few)
    kept = {key: value for key, value in trained.items() if key[0] in few}
    assert_same(by_sample(some.epoch(3, 5)), kept)
    assert_same(by_sample(some.view(3, 4)), trained)


@pytest.mark.parametrize("augment", AUGMENTS.values(), ids=AUGMENTS)
def test_a_view_depends_on_both_seeds_and_on_nothing_else(augment):
    data = image_dataset()
    loader = Loader("train", data, 60, augment=augment)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    (one,) = loader.view(1, 2)
    assert torch.equal(torch.get_rng_state(), state)
    list(loader.epoch(8, 8))
    torch.manual_seed(2)
    (again,) = loader.view(1, 2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    reseeded = Loader("train", data, 60, augment=augment, seed=5)
    for (other,) in (loader.view(1, 3), loader.view(2, 2), reseeded.view(1, 2)):
        assert (one["image"] != other["image"]).flatten(1).any(1).sum() > 40
    assert next(reseeded.epoch(1, 2))[SAMPLE].tolist() == next(loader.epoch(1, 2))[SAMPLE].tolist()


def test_a_view_can_be_gone_on_with():
    loader = Loader("train", image_dataset(), 16, augment=["flip"])
    batches = list(loader.view(0, 1))
    assert [len(b[SAMPLE]) for b in batches] == [16, 16, 16, 12]
    assert torch.cat([b[SAMPLE] for b in batches]).tolist() == list(range(60))
    later = list(loader.view(0, 1, start=45))
    assert [len(b[SAMPLE]) for b in later] == [15]
    assert torch.equal(later[0]["image"], torch.cat([b["image"] for b in batches])[45:])
    assert list(loader.view(0, 1, start=60)) == []


def test_batches_name_their_rows_and_view(dataset):
    for epoch, view in ((1, 0), (3, 2), (4, 0), (8, 1)):
        for batch in Loader("train", dataset, 10, views=3).epoch(0, epoch):
            assert batch[SAMPLE].dtype is batch[VIEW].dtype is torch.int64
            assert torch.equal(batch[SAMPLE], batch["label"])
            assert batch[VIEW].tolist() == [view] * 10
    views = Loader("train", dataset, 100, augment=["erase"], views=2)
    one, two, three = (by_sample(views.epoch(0, n)) for n in (1, 2, 3))
    assert one.keys() == three.keys()
    assert_same(one, three)
    assert one.keys() != two.keys()


def test_augmented_is_whether_views_differ(dataset):
    assert not Loader("train", dataset, 10).augmented
    assert Loader("train", dataset, 10, augment=["flip"]).augmented
    assert Loader("train", image_dataset(), 10, augment=["mixup"]).augmented


def test_rows_and_steps(dataset):
    rows = np.array([5, 90, 17, 3, 60, 61, 62])
    loader = Loader("train", dataset, 3, rows=rows)
    assert (len(loader), loader.samples) == (2, 100)
    assert labels(loader.ordered()) == [[5, 90, 17], [3, 60, 61], [62]]
    first = list(chain(*labels(loader.epoch(0, 1))))
    assert len(set(first)) == 6
    assert set(first) < set(rows.tolist())
    longer = Loader("train", dataset, 3, rows=rows, steps=8)
    batches = labels(longer.epoch(0, 1))
    assert [len(b) for b in batches] == [3] * len(longer) == [3] * 8
    flat = list(chain(*batches))
    passes = [flat[:7], flat[7:14], flat[14:21]]
    assert all(sorted(one) == sorted(rows) for one in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert flat[:6] == first
    assert set(flat[21:]) <= set(rows.tolist())
    assert labels(Loader("train", dataset, 3, rows=rows, steps=1).epoch(0, 1)) == batches[:1]


@pytest.mark.parametrize(
    ("rows", "said"),
    [([], "not integers|no rows"), ([0, 100], "from 0 to 100, and the split has 100"),
     ([-1, 3], "from -1 to 3"), ([0.5], "float64"), ([[1]], r"\(1, 1\)"),
     (np.arange(0), "no rows")],
)  # fmt: skip
def test_wrong_rows(dataset, rows, said):
    with pytest.raises(InputError, match=said):
        Loader("train", dataset, 10, rows=np.array(rows))


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_a_mixed_batch_by_hand(name):
    """Without other augmentations: the raw rows mixed, and their targets by the same share."""
    data = image_dataset()
    (batch,) = Loader("train", data, 60, augment=[{name: {"alpha": 0.7}}]).view(4, 2)
    raw = data.splits["train"].arrays
    rows = np.arange(60)
    again = SampleRng(4, rows, np.full(60, 2))
    partners = partner_rows(rows, again, 60)
    again.branch()
    own, others = (torch.from_numpy(raw["image"][at]) for at in (rows, partners))
    mixed, share = (mixup if name == "mixup" else cutmix)(own, others, again, 0.7)
    expected = data.preprocess["image"].apply(mixed.numpy())
    np.testing.assert_allclose(batch["image"].numpy(), expected, rtol=2e-7, atol=1e-7)
    weight = share.double().numpy()[:, None]
    action = weight * raw["action"] + (1 - weight) * raw["action"][partners]
    # float32 values of about 1.
    np.testing.assert_allclose(batch["action"].numpy(), action, atol=1e-6)
    assert batch["label"].dtype is torch.float32
    one_hot = np.eye(5)
    for i, (one, other) in enumerate(zip(raw["label"], raw["label"][partners], strict=True)):
        known = one >= 0 and other >= 0
        wanted = weight[i] * one_hot[one] + (1 - weight[i]) * one_hot[other] if known else 0
        np.testing.assert_allclose(batch["label"][i].numpy(), wanted, atol=1e-7)
    assert (batch["label"].sum(1) == 0).sum() > 8


def test_partners_have_an_augmentation_of_their_own():
    """Where the share is 0, what is seen is the partner, mirrored as often as not."""
    data = image_dataset()
    loader = Loader("train", data, 60, augment=["flip", {"mixup": {"alpha": 0.01}}])
    (batch,) = loader.view(0, 0)
    plain = next(Loader("train", data, 60).ordered())["image"]
    rows = np.arange(60)
    again = SampleRng(0, rows, rows * 0)
    own_flips = again.uniform() < 0.5
    partners = torch.from_numpy(partner_rows(rows, again, 60))
    straight = (batch["image"] == plain[partners]).flatten(1).all(1)
    mirrored = (batch["image"] == plain[partners].flip(-1)).flatten(1).all(1)
    assert straight.sum() > 5
    assert mirrored.sum() > 5
    # Neither always as its own image is, nor always otherwise.
    assert (straight & own_flips).any()
    assert (mirrored & ~own_flips).any()


def test_labels_without_a_value_pass_through():
    data = image_dataset()
    (batch,) = Loader("train", data, 60, augment=["flip"]).view(0, 0)
    assert torch.equal(batch["label"], torch.from_numpy(data.splits["train"].arrays["label"]))


def test_class_names_say_how_many_classes_there_are():
    arrays = {"image": np.ones((20, 1, 4, 4), np.uint8), "label": np.arange(20) % 3}
    raw = RawData({"train": arrays, "test": arrays}, "here", "a test", labels=tuple("abcdefg"))
    data = build_dataset(raw, DataConfig(source="npz"))
    assert next(Loader("train", data, 4, augment=["mixup"]).view(0, 0))["label"].shape == (4, 7)
    raw = RawData({"train": arrays, "test": arrays}, "here", "a test", labels=("a", "b"))
    data = build_dataset(raw, DataConfig(source="npz"), classes=None)
    with pytest.raises(InputError, match="the label 2, but there are 2 classes"):
        Loader("train", data, 4, augment=["mixup"])


@pytest.mark.parametrize("names", [None, tuple("abcde")])
def test_the_task_may_know_of_more_classes_than_the_data(names):
    """A mixed target has as many classes as the logits it is compared with."""
    arrays = {"image": np.ones((20, 1, 4, 4), np.uint8), "label": np.arange(20) % 3}
    raw = RawData({"train": arrays, "test": arrays}, "here", "a test", labels=names)
    data, task = build_dataset(raw, DataConfig(source="npz")), Classification(classes=7)
    counts = {"label": task.outputs(data)[0].shape[-1]}
    batch = next(Loader("train", data, 4, augment=["mixup"], classes=counts).view(0, 0))
    logits = torch.zeros(4, 7)
    # Equal logits: the cross-entropy is log 7 whatever the mixed labels are.
    assert task.hard_loss({"logits": logits}, batch).item() == pytest.approx(np.log(7), rel=1e-6)
    assert (batch["label"][:, 3:] == 0).all()
    with pytest.raises(InputError, match=r"label 2, but there are 2 classes \(as the task"):
        Loader("train", data, 4, augment=["mixup"], classes={"label": 2})


def test_what_cannot_be_mixed(dataset):
    with pytest.raises(InputError, match="only input; here: image, state, speed, tokens"):
        Loader("train", dataset, 10, augment=["mixup"])
    splits = {"all": {"state": np.random.default_rng(0).normal(size=(20, 2)), "y": np.arange(20)}}
    vectors = build_dataset(RawData(splits, "here", "a test"), DataConfig(source="npz"))
    with pytest.raises(InputError, match="no input is an image"):
        Loader("train", vectors, 4, augment=["cutmix"])
    with pytest.raises(InputError, match="alpha is 0"):
        Loader("train", image_dataset(), 4, augment=[{"mixup": {"alpha": 0}}])
    for targets, said in (
        ({"action_mask": np.ones(60, int)}, "'action_mask' is a mask"),
        ({"target": np.ones((60, 4), int)}, "'target' has integers"),
        ({"target": np.full(60, -1)}, "no 'target' of the training split is known"),
    ):
        with pytest.raises(InputError, match=said):
            Loader("train", image_dataset(**targets), 4, augment=["mixup"])
