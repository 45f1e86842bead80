"""Tasks: checks of bad data, the outputs they require, and scores."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from edgekd.errors import InputError, StageError
from edgekd.spec import TensorSpec
from edgekd.tasks import (
    Classification,
    Policy,
    Regression,
    agreement_task,
    constant_outputs,
    get_task,
)
from tests.command_line import check_not_imported


def dataset(labels=None, targets=("label",), image=None, **splits):
    """A small data set: ``splits`` are targets by split; images are random unless given."""
    made = {}
    for split, arrays in splits.items():
        count = len(next(iter(arrays.values())))
        pixels = np.random.default_rng(0).random((count, 1, 4, 4), np.float32)
        made[split] = SimpleNamespace(arrays={"image": pixels, **arrays})
    return SimpleNamespace(
        splits=made,
        inputs=(TensorSpec("image", ("batch", 1, 4, 4)),),
        targets=tuple(TensorSpec(name, ("batch",)) for name in targets),
        labels=labels,
    )


def labelled(train, validation=(0, 1), labels=None):
    return dataset(
        labels, train={"label": np.array(train)}, validation={"label": np.array(validation)}
    )


def test_registry_suggests_the_nearest_task():
    with pytest.raises(InputError, match="did you mean 'classification'"):
        get_task("clasification")


def test_unknown_task_argument_is_named():
    with pytest.raises(InputError, match=r"no argument 'clases'[\s\S]*did you mean 'classes'"):
        get_task("classification", {"clases": 3})


def test_one_class_is_refused_as_an_argument():
    with pytest.raises(InputError, match="classes"):
        get_task("classification", {"classes": 1})


def test_a_task_of_ones_own_must_be_a_task():
    with pytest.raises(InputError, match="is not a task"):
        get_task("fractions:Fraction")


@pytest.mark.parametrize("bad", [3, -2])
def test_label_out_of_range_names_split_sample_and_value(bad):
    data = labelled([0, 1, 2], [0, 2, bad, 1], labels=("a", "b", "c"))
    with pytest.raises(InputError, match=rf"sample 2 is {bad}, outside 0…2[\s\S]*validation"):
        Classification().check(data)


def test_unlabelled_samples_are_good_data_in_every_split():
    Classification().check(labelled([0, -1, 2], [-1, -1]))
    Classification(classes=3).check(labelled([-1, -1], [-1]))


def test_without_any_training_label_the_classes_must_be_said():
    with pytest.raises(InputError, match=r"no training sample has a label[\s\S]*classes"):
        Classification().check(labelled([-1, -1]))
    assert Classification(classes=4).outputs(labelled([-1, -1]))[0].shape == ("batch", 4)


def test_classes_come_from_the_training_split_when_unnamed():
    data = labelled([0, 1, 4])
    assert Classification().outputs(data)[0].shape == ("batch", 5)
    with pytest.raises(InputError, match="outside 0…4"):
        Classification().check(labelled([0, 1, 4], [5]))


def test_fractional_label_is_named():
    with pytest.raises(InputError, match=r"sample 1 is 0\.5, not an integer[\s\S]*train"):
        Classification().check(labelled([0.0, 0.5, 1.0]))


def test_whole_numbers_as_floats_say_how_to_convert():
    with pytest.raises(InputError, match=r"astype\('int64'\)"):
        Classification().check(labelled([0.0, 1.0]))


def test_nan_label_is_named():
    with pytest.raises(InputError, match="sample 1 is nan"):
        Classification().check(labelled([0.0, np.nan]))


def test_nan_input_names_split_sample_and_position():
    data = labelled([0, 1, 1])
    data.splits["train"].arrays["image"][2, 0, 3, 1] = np.nan
    with pytest.raises(InputError, match=r"'image' of sample 2 is nan at \[0, 3, 1\][\s\S]*train"):
        Classification().check(data)


def test_nan_beyond_the_first_piece_is_found_at_its_own_index():
    count = 9000
    data = labelled(np.arange(count) % 2)
    data.splits["train"].arrays["image"][8765, 0, 0, 0] = np.inf
    with pytest.raises(InputError, match="sample 8765 is inf"):
        Classification().check(data)


def test_missing_target_lists_what_there_is():
    data = dataset(train={"y": np.array([0, 1])})
    with pytest.raises(InputError, match=r"needs the target 'label', and the data have image, y"):
        Classification().check(data)


def test_empty_split_is_refused():
    with pytest.raises(InputError, match="'validation' has no samples"):
        Classification().check(labelled([0, 1], np.array([], dtype=np.int64)))


def test_good_data_pass():
    Classification().check(labelled([0, 1, 1]))
    Policy().check(dataset(targets=("action",), train={"action": np.zeros((3, 2), np.float32)}))


def test_accuracy_of_each_sample():
    logits = np.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    scores = Classification().scores({"logits": logits}, {"label": np.array([1, 1, 1])})
    assert scores.dtype == np.float64
    assert scores.tolist() == [1.0, 0.0, 1.0]


def test_accuracy_over_positions_is_a_mean_per_sample():
    logits = np.eye(3)[[[0, 1], [2, 2]]]
    scores = Classification().scores({"logits": logits}, {"label": np.array([[0, 0], [2, 2]])})
    assert scores.tolist() == [0.5, 1.0]


def test_positions_without_a_label_do_not_count():
    logits = np.eye(3)[[[0, 1], [2, 2], [0, 0]]]
    labels = {"label": np.array([[0, -1], [2, 1], [-1, -1]])}
    scores = Classification().scores({"logits": logits}, labels)
    assert scores[:2].tolist() == [1.0, 0.5]
    assert np.isnan(scores[2])
    assert Classification().labelled(labels).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("task", "outputs"),
    [
        (Classification(), {"logits": np.random.default_rng(0).random((6, 4))}),
        (Classification(), {"logits": np.random.default_rng(0).random((6, 3, 4))}),
        (Policy(), {"action": np.random.default_rng(0).random((6, 3, 2), np.float32)}),
        (Regression(), {"prediction": np.random.default_rng(0).random((6, 1), np.float32)}),
    ],
)
def test_a_model_is_right_about_its_own_answers(task, outputs):
    targets = task.pseudo_targets(outputs)
    assert task.labelled(targets).all()
    assert (task.scores(outputs, targets) == (1.0 if task.higher_is_better else 0.0)).all()


def test_the_constant_answer_is_the_best_of_all_constants():
    labels = {"label": np.array([2, 0, 2, -1, 1, 2, -1, -1, -1])}
    task = Classification()
    given = task.scores(task.constant(labels), labels)[task.labelled(labels)]
    assert given.mean() == 3 / 5
    rng = np.random.default_rng(0)
    target = rng.gamma(1.0, 2.0, (41, 2, 3))
    mask = rng.random((41, 2)) < 0.7
    mask[:, 0] = True
    target[~mask] = np.nan
    targets = {"action": target, "action_mask": mask}
    policy = Policy()
    # The mean over the kept elements: each sample weighs as much as it has of them.
    weights = mask.sum(1)
    best = (policy.scores(policy.constant(targets), targets) * weights).sum()
    for shift in rng.normal(0, 0.3, (50, 2, 3)):
        moved = {"action": policy.constant(targets)["action"] + shift}
        assert (policy.scores(moved, targets) * weights).sum() >= best


@pytest.mark.parametrize(("metric", "best"), [("mae", 1.0), ("mse", 4.0)])
def test_the_constant_of_an_error_is_its_median_or_its_mean(metric, best):
    task = Regression(metric=metric)
    targets = {"target": np.array([[0.0], [1.0], [11.0]])}
    constant = task.constant(targets)
    assert np.allclose(constant["prediction"], best)
    error = task.scores(constant, targets).mean()
    for other in (-0.5, 0.5, 3.0):
        moved = {"prediction": constant["prediction"] + other}
        assert task.scores(moved, targets).mean() >= error


def test_a_constant_from_other_samples_gives_the_requested_count():
    known = {"target": np.array([[1.0, 5.0], [2.0, 6.0], [9.0, 7.0]])}
    answers = constant_outputs(Regression(), known, 4)["prediction"]
    assert answers.tolist() == [[2.0, 6.0]] * 4


def test_the_agreement_task_is_named_so_and_leaves_the_original():
    task = Classification(target="digit")
    agreeing = agreement_task(task)
    assert (agreeing.metric, agreeing.target, task.metric) == ("agreement", "digit", "accuracy")
    assert agreement_task(Policy()).metric == "mae to the teacher"


def test_answers_that_are_nan_are_no_score():
    logits = np.array([[0.0, 1.0], [np.nan, 1.0]])
    with pytest.raises(StageError, match="first for sample 1"):
        Classification().scores({"logits": logits}, {"label": np.array([1, 0])})


def test_mae_of_each_sample_ignores_what_the_mask_leaves_out():
    action = np.array([[[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    target = np.array([[[1.0, 3.0], [5.0, 7.0]], [[2.0, 2.0], [np.nan, 100.0]]])
    mask = np.array([[1, 1], [1, 0]])
    scores = Policy().scores({"action": action}, {"action": target, "action_mask": mask})
    assert scores.tolist() == [4.0, 2.0]


def test_masked_loss_and_its_gradient_ignore_padding_even_when_it_is_nan():
    prediction = torch.zeros(1, 2, 1, requires_grad=True)
    batch = {
        "action": torch.tensor([[[2.0], [float("nan")]]]),
        "action_mask": torch.tensor([[1.0, 0.0]]),
    }
    loss = Policy().hard_loss({"action": prediction}, batch)
    loss.backward()
    assert loss.item() == 4.0
    assert prediction.grad is not None
    assert prediction.grad.flatten().tolist() == [-4.0, 0.0]


def test_single_numbers_are_compared_with_a_column_and_not_broadcast():
    task = Regression()
    prediction = torch.tensor([[1.0], [2.0], [3.0]])
    target = torch.tensor([1.0, 2.0, 3.0])
    assert task.hard_loss({"prediction": prediction}, {"target": target}).item() == 0.0
    assert task.scores({"prediction": prediction.numpy()}, {"target": target.numpy()}).sum() == 0.0
    data = dataset(targets=("target",), train={"target": np.zeros(3, np.float32)})
    assert task.outputs(data)[0].shape == ("batch", 1)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(InputError, match=r"\[3, 2\] does not fit target \[3, 1\]"):
        Regression().hard_loss({"prediction": torch.zeros(3, 2)}, {"target": torch.zeros(3, 1)})


def test_nan_target_is_named_unless_masked():
    action = np.zeros((3, 2, 1), np.float32)
    action[1, 1] = np.nan
    named = dataset(targets=("action",), train={"action": action})
    with pytest.raises(InputError, match=r"target 'action' of sample 1 is nan at \[1, 0\]"):
        Policy().check(named)
    mask = np.array([[1, 1], [1, 0], [1, 1]])
    targets = ("action", "action_mask")
    Policy().check(dataset(targets=targets, train={"action": action, "action_mask": mask}))


def test_a_mask_that_would_not_reach_the_loss_is_refused():
    arrays = {"action": np.zeros((2, 3, 1), np.float32), "action_mask": np.ones((2, 3))}
    with pytest.raises(InputError, match="not among the targets"):
        Policy().check(dataset(targets=("action",), train=arrays))


def test_a_mask_that_keeps_nothing_names_the_sample():
    arrays = {
        "action": np.zeros((2, 3, 1), np.float32),
        "action_mask": np.array([[1, 1, 0], [0, 0, 0]]),
    }
    with pytest.raises(InputError, match="mask of sample 1 selects nothing"):
        Policy().check(dataset(targets=("action", "action_mask"), train=arrays))


def test_label_smoothing_without_labels_is_refused():
    with pytest.raises(InputError, match="label_smoothing"):
        Policy().hard_loss({"action": torch.zeros(1, 2)}, {"action": torch.zeros(1, 2)}, 0.1)


@pytest.mark.parametrize("loss", ["mse", "mae", "huber"])
@pytest.mark.parametrize(("unit", "offset"), [(1e5, 0.0), (1e-4, 0.0), (10.0, 1e4)])
def test_the_loss_does_not_know_the_unit_of_the_targets(loss, unit, offset):
    values = np.random.default_rng(0).normal(0, 1, (200, 3))
    target = torch.from_numpy(values[:8])
    guess = target + torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3)
    task, other = Regression(loss=loss, standardize=True), Regression(loss=loss)
    task.fit_unit({"target": values})
    other.fit_unit({"target": values * unit + offset})
    assert other.offset is not None
    expected = task.hard_loss({"prediction": guess}, {"target": target})
    found = other.hard_loss(
        {"prediction": guess * unit + offset}, {"target": target * unit + offset}
    )
    assert float(found) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(
    ("scale", "mean", "asks"), [(1, 0, 0), (0.5, 1, 0), (50, 0, 1), (1, 20, 1)]
)
def test_targets_near_one_are_left_as_they_are(scale, mean, asks):
    task = Policy()
    task.fit_unit({"action": np.random.default_rng(0).normal(mean, scale, (300, 4, 2))})
    assert (task.unit != 1.0 or task.offset is not None) == asks


def test_what_a_mask_leaves_out_counts_in_no_unit():
    target = np.array([[[100.0], [np.nan]], [[300.0], [200.0]]])
    mask = np.array([[1, 0], [1, 1]])
    task = Policy()
    task.fit_unit({"action": target, "action_mask": mask})
    assert task.offset.ravel().tolist() == [200.0, 200.0]
    assert task.unit == pytest.approx(np.sqrt(20_000 / 3))


def test_targets_that_are_all_the_same_number_have_an_offset_and_no_unit():
    task = Regression()
    task.fit_unit({"target": np.full((10, 1), 5e4)})
    assert (task.unit, task.offset.tolist()) == (1.0, [5e4])


def test_tasks_do_not_import_torch():
    check_not_imported({"torch"}, "from edgekd.tasks import get_task; get_task('policy')")
