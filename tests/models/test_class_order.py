"""Names of a network's outputs, and the order that labelled samples speak for."""

import json

import numpy as np
import pytest

from edgekd.errors import InputError
from edgekd.models.adapted import class_list, fitting_permutation, output_order
from edgekd.models.weights import ClassNames, class_names_in, class_names_in_metadata

NAMES = ("cat", "dog", "emu")


@pytest.mark.parametrize(
    "content",
    [
        {"class_to_idx": {"dog": 1, "cat": 0, "emu": 2}, "epoch": 3},
        {"hyper_parameters": {"classes": ["cat", "dog", "emu"]}},
        {"id2label": {"0": "cat", "2": "emu", "1": "dog"}},
        {"meta": {"dataset_meta": {"CLASSES": NAMES}}},
        {"model": {"fc.weight": 1}, "names": {0: "cat", 1: "dog", 2: "emu"}},
    ],
)
def test_names_are_found_where_trainers_put_them(content):
    found = class_names_in(content)
    assert found is not None
    assert found.names == NAMES


@pytest.mark.parametrize(
    "metadata",
    [
        {"names": "{0: 'cat', 1: 'dog', 2: 'emu'}"},
        {"labels": "cat\ndog\nemu"},
        {"classes": "cat, dog, emu"},
        {"class_to_idx": json.dumps({"emu": 2, "dog": 1, "cat": 0})},
    ],
)
def test_names_are_read_from_a_files_texts(metadata):
    found = class_names_in_metadata({"author": "x", **metadata})
    assert found is not None
    assert found.names == NAMES


def test_what_are_no_names_is_left_alone():
    assert class_names_in({"labels": [0, 1, 2], "epoch": 1}) is None
    assert class_names_in({"id2label": {0: "LABEL_0", 1: "LABEL_1"}}) is None
    assert class_names_in_metadata({"names": "", "producer": "a\nb"}) is None


def test_outputs_are_found_by_name_and_others_left_out():
    found = ClassNames(("background", "Emu", "cat", "the-dog"), "classes")
    assert output_order(found, ("cat", "the dog", "emu"), "teacher.classes", stated=True) == (
        2,
        3,
        1,
    )


def test_a_class_that_has_no_output_is_an_error_when_others_have_one():
    found = ClassNames(("cat", "dgo", "emu"), "class_to_idx")
    with pytest.raises(InputError, match=r"'dog'[\s\S]*is it 'dgo'[\s\S]*teacher.classes"):
        output_order(found, NAMES, "teacher.classes", stated=False)


def test_unmatched_class_names_are_an_error_only_when_stated():
    found = ClassNames(("Katze", "Hund", "Strauss"), "classes")
    assert output_order(found, NAMES, "teacher.classes", stated=False) is None
    with pytest.raises(InputError):
        output_order(found, NAMES, "teacher.classes", stated=True)


def predictions_of(labels, order, accuracy, classes, seed=0):
    """What a classifier of this accuracy gives whose output for class t is order[t]."""
    rng = np.random.default_rng(seed)
    right = rng.random(len(labels)) < accuracy
    return np.where(right, np.asarray(order)[labels], rng.integers(0, classes, len(labels)))


@pytest.mark.parametrize("order", [(1, 0, 2, 3, 4, 5), (3, 4, 5, 0, 1, 2), (1, 2, 3, 4, 5, 0)])
@pytest.mark.parametrize("accuracy", [0.6, 0.9, 1.0])
def test_another_order_is_found(order, accuracy):
    labels = np.arange(300) % 6
    predictions = predictions_of(labels, order, accuracy, 6)
    assert fitting_permutation(labels, predictions, 6) == order


def test_two_classes_the_other_way_round_are_found():
    labels = np.arange(100) % 2
    assert fitting_permutation(labels, predictions_of(labels, (1, 0), 0.8, 2), 2) == (1, 0)


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
@pytest.mark.parametrize("accuracy", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("count", [5, 30, 400])
def test_a_good_or_ignorant_teacher_in_the_right_order_is_let_alone(classes, accuracy, count):
    for seed in range(10):
        labels = np.random.default_rng(100 + seed).integers(0, classes, count)
        predictions = predictions_of(labels, range(classes), accuracy, classes, seed)
        assert fitting_permutation(labels, predictions, classes) is None


def test_few_samples_do_not_speak_for_another_order():
    labels = np.arange(6) % 3
    assert fitting_permutation(labels, np.asarray((1, 2, 0))[labels], 3) is None


def test_a_teacher_that_merges_two_classes_is_not_called_permuted():
    labels = np.repeat([0, 1, 2], 100)
    predictions = np.where(labels == 2, 1, labels)
    predictions[100:200] = 1
    assert fitting_permutation(labels, predictions, 3) is None


def test_the_line_to_add_is_yaml():
    import yaml

    names = ["it's: a", "Ankle boot", "no", "3"]
    assert yaml.safe_load(class_list(names)) == {"classes": names}
