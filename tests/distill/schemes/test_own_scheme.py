"""A user's own scheme by its name: a function of a context, nothing registered."""

import pytest

from edgekd.config.training import SchemeConfig
from edgekd.distill.schemes import SCHEMES, find_scheme
from edgekd.errors import InputError


def test_the_built_in_ones():
    assert set(SCHEMES) == {"offline", "online", "self", "assistant", "ensemble"}


def test_a_scheme_of_ones_own_trains_the_student(users_code, make_context):
    def twice(context, rounds: int = 2):
        histories = {}
        for number in range(rounds):
            label = "student" if number == rounds - 1 else f"round {number}"
            histories[label] = context.fit(
                context.student, context.new_objective(), label, context.teacher
            )
        return histories

    users_code.twice = twice
    context = make_context()
    scheme = find_scheme(SchemeConfig.model_validate({"users_code:twice": {"rounds": 3}}))
    assert list(scheme(context)) == ["round 0", "round 1", "student"]
    assert [fit.model for fit in context.fits] == [context.student] * 3

    with pytest.raises(InputError, match=r"no argument 'round'(.|\n)*did you mean 'rounds'"):
        find_scheme(SchemeConfig.model_validate({"users_code:twice": {"round": 3}}))


def test_a_function_without_a_room_is_no_scheme(users_code):
    users_code.loss = lambda student, teacher: 0
    with pytest.raises(InputError, match="no parameter 'context'"):
        find_scheme(SchemeConfig(name="users_code:loss"))


def test_the_nearest_name_is_suggested():
    with pytest.raises(InputError, match="did you mean 'online'"):
        find_scheme(SchemeConfig(name="onlin"))
