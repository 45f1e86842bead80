"""CRD against loops over its bank, what the bank remembers, and how much memory it takes."""

import math

import numpy as np
import pytest
import torch

from edgekd.distill.losses import LOSSES
from edgekd.distill.losses.contrastive import Crd, bank_scores, noise_contrast
from edgekd.errors import InputError
from tests.distill.losses.samples import LargestTensor

STUDENT, TEACHER = (4, 5), (4, 3, 2, 2)


def crd(samples=12, dtype=torch.float64, seed=0, student=STUDENT, teacher=TEACHER, **arguments):
    torch.manual_seed(seed)
    arguments = {"embedding": 6, "negatives": 5, "temperature": 0.5} | arguments
    return Crd(student, teacher, samples, **arguments).to(dtype)


def batch(seed=0, dtype=torch.float64, student=STUDENT, teacher=TEACHER):
    draw = np.random.default_rng(seed)
    return [torch.from_numpy(draw.normal(0, 1, shape)).to(dtype) for shape in (student, teacher)]


def embedded(module, s, t):
    """Unit vectors of both features, in numpy."""
    found = []
    for layer, x in ((module.student, s.numpy()), (module.teacher, t.numpy().mean((2, 3)))):
        y = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        found.append(y / np.linalg.norm(y, axis=1, keepdims=True))
    return found


def drawn_rows(module, row, seed):
    """The negatives that a step with this seed draws; the generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return module._draw(row).numpy()


def in_loops(module, s, t, rows, positives, z):
    """Equations 17 to 19 as they stand, with M and Z = M · z explicit."""
    size, many = len(s), len(module.owner)
    banks = module.student_bank.numpy(), module.teacher_bank.numpy()
    total = 0.0
    for anchors, bank, positive, mean in (
        (s, banks[1], positives[1], z[0]),
        (t, banks[0], positives[0], z[1]),
    ):
        for b in range(size):
            count = len(rows[b])

            def h(v, b=b, anchors=anchors, mean=mean, count=count):
                x = math.exp(anchors[b] @ v / module.temperature) / (many * mean)
                return x / (x + count / many)

            total -= math.log(h(positive[b]))
            total -= sum(math.log(1 - h(bank[row])) for row in rows[b])
    return total / size


def mean_exponential(anchors, bank, rows, temperature):
    return np.mean(
        [
            math.exp(a @ bank[r] / temperature)
            for a, own in zip(anchors, rows, strict=True)
            for r in own
        ]
    )


def test_the_first_and_a_later_batch_are_the_published_formula():
    module, (s, t) = crd(), batch()
    sample = torch.tensor([3, 0, 11, 7])
    rows = drawn_rows(module, sample, seed=5)
    es, et = embedded(module, s, t)
    banks = module.student_bank.numpy().copy(), module.teacher_bank.numpy().copy()
    z = [mean_exponential(es, banks[1], rows, 0.5), mean_exponential(et, banks[0], rows, 0.5)]
    expected = in_loops(module, es, et, rows, (es, et), z)
    torch.manual_seed(5)
    assert module(s, t, sample).item() == pytest.approx(expected, rel=1e-10)

    # Then Z stands, and samples seen before are contrasted with their entries in the bank.
    s, t = batch(seed=1)
    sample = torch.tensor([7, 1, 3, 2])
    rows = drawn_rows(module, sample, seed=6)
    es, et = embedded(module, s, t)
    known = np.array([True, False, True, False])[:, None]
    held = [bank[sample].numpy() for bank in (module.student_bank, module.teacher_bank)]
    positives = np.where(known, held[0], es), np.where(known, held[1], et)
    expected = in_loops(module, es, et, rows, positives, z)
    torch.manual_seed(6)
    assert module(s, t, sample).item() == pytest.approx(expected, rel=1e-10)


def test_product_then_gather_equals_gather_then_product():
    anchor, bank = torch.randn(4, 6).double(), torch.randn(9, 6).double()
    rows = torch.randint(9, (4, 20))
    naive = (anchor[:, None] * bank[rows]).sum(-1)
    torch.testing.assert_close(bank_scores(anchor, bank, rows), naive, rtol=1e-12, atol=1e-14)


def test_gradient():
    module, (s, t) = crd(), batch()
    sample = torch.tensor([3, 0, 11, 7])
    module(s, t, sample)
    module.eval()

    def loss(x, *parameters):
        torch.manual_seed(2)
        return module(x, t, sample)

    s.requires_grad_()
    assert torch.autograd.gradcheck(loss, (s, *module.parameters()))


def test_the_order_of_the_batch_does_not_matter():
    (s, t), rows = batch(), torch.randint(12, (4, 5))
    bank = torch.randn(12, 5).double()
    order = torch.tensor([2, 0, 3, 1])

    def loss(order):
        scores = bank_scores(s, bank, rows)[order]
        return noise_contrast((s * bank[:4]).sum(1)[order], scores, torch.tensor(0.3))

    torch.testing.assert_close(loss(order), loss(slice(None)), rtol=1e-12, atol=0)
    module = crd()
    other = crd()
    numbers = torch.tensor([3, 0, 11, 7])
    module(s, t, numbers)
    other(s[order], t[order], numbers[order])
    torch.testing.assert_close(module.student_bank, other.student_bank)
    assert torch.equal(module.owner, other.owner)


def test_training_brings_a_sample_s_two_embeddings_together():
    """The student sees a mixture of what the teacher sees: 32 pairs that can be distinguished."""
    shape = (32, 8)
    module = crd(samples=32, student=shape, teacher=shape, embedding=8, negatives=31)
    t, mixture = batch(student=shape, teacher=(8, 8))
    s, sample = t @ mixture, torch.arange(32)

    def found():
        with torch.no_grad():
            products = module._embed(module.student, s) @ module._embed(module.teacher, t).T
        return (products.argmax(1) == sample).double().mean()

    assert found() < 0.2
    optimizer = torch.optim.Adam(module.parameters(), lr=0.03)
    for _ in range(200):
        optimizer.zero_grad()
        module(s, t, sample).backward()
        optimizer.step()
    assert found() > 0.9


def test_negatives_are_all_other_rows_evenly_and_never_the_sample_s_own():
    module = crd(negatives=11)
    row = torch.tensor([0, 11, 5]).repeat(2000)
    drawn = module._draw(row)
    assert drawn.shape == (6000, 11)
    assert (drawn != row[:, None]).all()
    counts = torch.bincount(drawn[row == 5].flatten(), minlength=12)
    others = torch.cat([counts[:5], counts[6:]]).double()
    # 22000 draws over 11 rows: 2000 each, with a deviation of 43; five of them is no accident.
    assert (others - 2000).abs().max() < 5 * 43


def test_a_bank_s_row_moves_by_the_momentum_and_others_stay():
    module, (s, t) = crd(momentum=0.25), batch()
    sample = torch.tensor([3, 0, 11, 7])
    before = module.teacher_bank.clone()
    module(s, t, sample)
    first = embedded(module, s, t)[1]
    np.testing.assert_allclose(module.teacher_bank[sample].numpy(), first, rtol=1e-10)
    untouched = torch.tensor([1, 2, 4, 5, 6, 8, 9, 10])
    assert torch.equal(module.teacher_bank[untouched], before[untouched])
    s, t = batch(seed=1)
    module(s, t, sample)
    mixed = 0.25 * first + 0.75 * embedded(module, s, t)[1]
    mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
    np.testing.assert_allclose(module.teacher_bank[sample].numpy(), mixed, rtol=1e-10)


def test_evaluation_changes_nothing_that_is_remembered():
    module, (s, t) = crd().eval(), batch()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module(s, t, torch.tensor([3, 0, 11, 7]))
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_two_steps_can_be_differentiated_together():
    """The bank moves between forward and backward; the graph must use the forward's values."""
    module, (s, t) = crd(), batch()
    s.requires_grad_()
    losses = [module(s, t, torch.tensor(rows)) for rows in ([0, 1, 2, 3], [2, 3, 4, 5])]
    sum(losses).backward()
    assert s.grad.isfinite().all()


def test_samples_that_share_a_row_replace_each_other_without_mixing():
    module, (s, t) = crd(samples=1000, bank=8), batch()
    assert len(module.owner) == 8
    module(s, t, torch.tensor([3, 4, 5, 6]))
    s, t = batch(seed=1)
    # 11 shares row 3 with 3; 13 and 21 share row 5 with each other: the later one stays.
    module(s, t, torch.tensor([11, 13, 21, 6]))
    assert module.owner.tolist() == [-1, -1, -1, 11, 4, 21, 6, -1]
    es, et = embedded(module, s, t)
    np.testing.assert_allclose(module.student_bank[[3, 5]].numpy(), es[[0, 2]], rtol=1e-10)
    np.testing.assert_allclose(module.teacher_bank[[3, 5]].numpy(), et[[0, 2]], rtol=1e-10)


def test_a_replaced_sample_keeps_its_own_teacher_as_positive():
    module, (s, t) = crd(samples=1000, bank=8), batch()
    module(s, t, torch.tensor([0, 1, 2, 3]))
    shared, fresh = torch.tensor([8, 9, 10, 11]), crd(samples=1000, bank=8)
    fresh.load_state_dict(module.state_dict())
    fresh.owner.fill_(-1)
    values = []
    for each in (module.eval(), fresh.eval()):
        torch.manual_seed(1)
        values.append(each(s, t, shared).item())
    assert values[0] == values[1]


def test_negatives_of_other_classes_only():
    module, (s, t) = crd(other_classes=True, negatives=11), batch()
    target = torch.tensor([0, 0, 1, 1])
    sample = torch.tensor([0, 1, 2, 3])
    module(s, t, sample, target)
    assert module.label.tolist() == [0, 0, 1, 1] + [-1] * 8
    s, t = batch(seed=1)
    es, et = embedded(module, s, t)
    z = module.log_z.exp().tolist()
    rows = drawn_rows(module, sample, seed=4)
    label = module.label.numpy()
    expected = 0.0
    for anchors, bank, mean in (
        (es, module.teacher_bank.numpy(), z[0]),
        (et, module.student_bank.numpy(), z[1]),
    ):
        for b in range(4):
            h = [
                1 / (1 + 11 * mean / math.exp(anchors[b] @ bank[row] / 0.5))
                for row in [b, *(r for r in rows[b] if label[r] != target[b])]
            ]
            expected -= math.log(h[0]) + 11 * np.mean(np.log1p(-np.array(h[1:])))
    torch.manual_seed(4)
    assert module(s, t, sample, target).item() == pytest.approx(expected / 4, rel=1e-10)


def test_a_bank_of_one_class_leaves_no_negatives_and_no_nan():
    module, (s, t) = crd(samples=4, other_classes=True), batch()
    target = torch.zeros(4, dtype=torch.long)
    for _ in range(2):
        value = module(s, t, torch.arange(4), target)
    assert value.isfinite()


def test_ten_million_samples_stay_within_the_bound():
    with LargestTensor() as making:
        module = Crd((16, 32), (16, 64), samples=10_000_000)
    rows, width = 65536, 128
    assert making.bytes <= rows * width * 4
    state = sum(value.nbytes for value in module.state_dict().values())
    assert state < 2 * rows * width * 4 + 2 * rows * 8 + 10**6
    s = torch.randn(16, 32, requires_grad=True)
    sample = torch.randint(10_000_000, (16,))
    with LargestTensor() as stepping:
        module(s, torch.randn(16, 64), sample).backward()
    # The bank itself is the largest; 16 x 16384 vectors of 128 would be 32 times that.
    assert stepping.bytes == rows * width * 4
    assert module.negatives == 16384


def test_a_small_data_set_has_a_row_per_sample():
    module = Crd((4, 5), (4, 5), samples=100)
    assert module.student_bank.shape == (100, 128)
    assert module.negatives == 99


def test_a_restored_module_goes_on_with_the_same_numbers():
    module = crd()
    steps = [(*batch(seed=n), torch.tensor([n, n + 1, n + 2, n + 3])) for n in range(6)]
    torch.manual_seed(3)
    for step in steps[:3]:
        module(*step)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    generator = torch.get_rng_state()
    rest = [module(*step).item() for step in steps[3:]]
    again = crd(seed=9)
    again.load_state_dict(state)
    torch.set_rng_state(generator)
    assert [again(*step).item() for step in steps[3:]] == rest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_finite_at_the_paper_s_temperature(dtype, autocast):
    module = crd(dtype=torch.float32, temperature=0.07)
    s, t = batch(dtype=dtype)
    s = (s * 1e4).requires_grad_()
    for _ in range(2):
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            value = module(s, t, torch.tensor([3, 0, 11, 7]))
    value.backward()
    assert value.dtype is torch.float32
    assert value.isfinite()
    assert s.grad.isfinite().all()


def test_extreme_scores_do_not_overflow():
    scores = torch.tensor([[1e4, -1e4]], requires_grad=True)
    value = noise_contrast(torch.tensor([-1e4]), scores, torch.tensor(0.0))
    value.backward()
    # -log h is linear there: 1e4 for the positive and 1e4 for the negative, less 2 log 2.
    assert value.item() == pytest.approx(2e4, rel=1e-3)
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize(
    ("sample", "target", "what"),
    [
        (torch.arange(3), torch.arange(4), "of one batch"),
        (torch.arange(4)[:, None], torch.arange(4), "of one batch"),
        (torch.arange(4), None, "the target is none"),
        (torch.arange(4), torch.zeros(4), "the target is torch.float32"),
        (torch.arange(4), torch.zeros(4, 2).long(), r"\[4, 2\]"),
    ],
)
def test_what_does_not_fit_the_batch_is_refused(sample, target, what):
    with pytest.raises(InputError, match=what):
        crd(other_classes=True)(*batch(), sample, target)


def test_one_sample_cannot_be_contrasted():
    with pytest.raises(InputError, match="1 training samples leave none"):
        crd(samples=1)


def test_it_is_a_loss_of_a_pipeline():
    assert LOSSES["crd"] is Crd
    assert not {"bank_scores", "noise_contrast"} & LOSSES.keys()
