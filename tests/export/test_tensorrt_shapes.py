from __future__ import annotations

import pytest

from edgerun.errors import BadInput
from edgerun.tensorrt.settings import (
    NetworkInput,
    Range,
    choose_ranges,
    named_dimensions,
    network_inputs,
    parse_ranges,
)

IMAGE = NetworkInput("image", (-1, 3, -1, -1), ("batch", "", "side", "side"))
STATE = NetworkInput("state", (2, -1, 8), ("", "batch", ""))
FIXED = NetworkInput("rate", (1,), ("",))


def test_a_range_is_one_shape_or_three_and_names_may_hold_colons():
    assert parse_ranges(["x:0=1x4:2x4:8x4", "s=2x3"]) == {
        "x:0": Range((1, 4), (2, 4), (8, 4)),
        "s": Range((2, 3), (2, 3), (2, 3)),
    }


@pytest.mark.parametrize("text", ["x", "x=", "x=1x2:3x4", "x=0x2", "x=1xb", "x=1:2:3:4", "=1"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(BadInput, match="not the range of a shape"):
        parse_ranges([text])


def test_a_range_given_twice_is_refused():
    with pytest.raises(BadInput, match="given twice"):
        parse_ranges(["x=1", "x=2"])


def test_dimensions_of_one_name_follow_the_input_that_was_given():
    given = {"image": Range((1, 3, 8, 8), (2, 3, 16, 16), (4, 3, 32, 32))}
    ranges = choose_ranges([IMAGE, STATE, FIXED], given)
    assert ranges["state"] == Range((2, 1, 8), (2, 2, 8), (2, 4, 8))
    assert set(ranges) == {"image", "state"}


def test_the_batch_dimension_is_found_by_name_where_not_first():
    plain = NetworkInput("x", (-1, 4), ("batch", ""))
    ranges = choose_ranges([STATE, plain], {}, batch=8)
    assert ranges["state"] == Range((2, 1, 8), (2, 8, 8), (2, 8, 8))


class Network:
    """One input whose dimensions an exporter named."""

    num_inputs, num_outputs = 1, 0

    def __init__(self, names):
        self.names = names

    def get_input(self, index):
        return self

    name, shape, is_shape_tensor = "x", (-1, 3, -1, -1), False

    def get_dimension_name(self, axis):
        return self.names[axis]


@pytest.mark.parametrize("none", ["?", "", None, "None", "-1", "unk__12"])
def test_what_exporters_write_for_an_unknown_size_is_no_name(none):
    (tensor,) = network_inputs(Network(["n", "", none, none]))
    assert tensor.symbols == ("n", "", "", "")
    given = {"x": Range((1, 3, 48, 192), (1, 3, 48, 192), (1, 3, 48, 192))}
    assert choose_ranges([tensor], given) == given
    assert named_dimensions(Network(["n", "", none, none]))["inputs"][0]["shape"] == [
        *("n", 3, None, None)
    ]


def test_a_name_is_one_size_wherever_it_stands():
    (tensor,) = network_inputs(Network(["n", "", "side", "side"]))
    with pytest.raises(BadInput, match="of the same name is 48:48:48"):
        choose_ranges([tensor], {"x": Range(*[(1, 3, 48, 192)] * 3)})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"axis 2 \(side\) of input 'image' is open and no size"),
        ({"imag": Range((1,), (1,), (1,))}, "no input 'imag'"),
        ({"rate": Range((1, 1), (1, 1), (1, 1))}, r"2 sizes is given for input rate \[1\]"),
        ({"rate": Range((1,), (1,), (2,))}, r"axis 0 of input 'rate' is 1 in the model"),
        (
            {"image": Range((1, 3, 8, 8), (1, 4, 8, 8), (1, 3, 8, 8))},
            "axis 1 of input 'image' is 3 in the model; given: 3:4:3",
        ),
        (
            {"image": Range((4, 3, 8, 8), (2, 3, 8, 8), (8, 3, 8, 8))},
            r"axis 0 \(batch\) of input 'image' is given as 4:2:8",
        ),
        (
            {"image": Range((1, 3, 8, 16), (1, 3, 8, 16), (1, 3, 8, 16))},
            r"axis 3 \(side\) of input 'image' is 16:16:16, and axis 2 \(side\)",
        ),
        (
            {
                "image": Range((1, 3, 8, 8), (1, 3, 8, 8), (4, 3, 8, 8)),
                "state": Range((2, 1, 8), (2, 1, 8), (2, 2, 8)),
            },
            r"axis 1 \(batch\) of input 'state' is 1:1:2, and axis 0 \(batch\) of input 'image'",
        ),
    ],
)
def test_what_does_not_fit_names_input_and_axis(given, message):
    with pytest.raises(BadInput, match=message):
        choose_ranges([IMAGE, STATE, FIXED], given)
