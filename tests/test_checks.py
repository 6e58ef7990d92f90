"""Validators accept what users pass in good faith, and refuse everything else with a helpful message."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elakit import checks
from elakit.errors import SettingError

ODD = [None, True, np.True_, "3", b"3", [3], np.array([3, 4]), {}, float("nan"), float("inf"), 1j, object()]


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3)])
def test_whole_numbers_become_plain(value: Any) -> None:
    result = checks.whole_number(value, "steps", 1, 1000)
    assert (result, type(result)) == (3, int)


@pytest.mark.parametrize("value", [*ODD, 0, 1001, 3.5, pytest.param(10**5000, id="huge")])
def test_what_is_no_whole_number_is_refused(value: Any) -> None:
    with pytest.raises(SettingError, match=r"^steps=.*: must be a whole number from 1 to 1000\. Take fewer\.$"):
        checks.whole_number(value, "steps", 1, 1000, hint="Take fewer.")


def test_a_float_with_a_whole_value_is_told_apart_from_an_integer() -> None:
    with pytest.raises(SettingError, match=r"^steps=3\.0: must be an integer from 1 to 1000, not a float\.$"):
        checks.whole_number(3.0, "steps", 1, 1000)


@pytest.mark.parametrize("value", [0.5, np.float16(0.5), np.float64(0.5)])
def test_numbers_become_plain(value: Any) -> None:
    result = checks.share(value, "guided")
    assert (result, type(result)) == (0.5, float)


@pytest.mark.parametrize("value", [*ODD, -0.1, 1.1, np.float32("nan"), pytest.param(10**400, id="huge"), -np.inf])
def test_what_is_no_share_is_refused(value: Any) -> None:
    with pytest.raises(SettingError, match=r"^SynGen\(guided=.*\): must be a number from 0 to 1\.$"):
        checks.share(value, "guided", owner="SynGen")


def test_an_unbounded_number_is_finite() -> None:
    assert checks.real_number(-5, "shift") == -5.0
    with pytest.raises(SettingError, match=r"must be a finite number\."):
        checks.real_number(float("inf"), "shift")
    with pytest.raises(SettingError, match=r"must be a finite number, 0 or more\."):
        checks.real_number(float("inf"), "shift", 0)


def test_a_message_shows_plain_values_and_is_short() -> None:
    with pytest.raises(SettingError, match=r"^height=0: must be"):
        checks.whole_number(np.int64(0), "height", 8)
    with pytest.raises(SettingError) as caught:
        checks.whole_number(list(range(10_000)), "height", 8)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", ["maximum", None, 1, True, ["max"], np.array(["max", "max"])])
def test_a_choice_is_one_of_the_allowed(value: Any) -> None:
    with pytest.raises(SettingError, match="must be one of 'mean', 'max'"):
        checks.choice(value, "reduce", ("mean", "max"))
    assert checks.choice(np.str_("max"), "reduce", ("mean", "max")) == "max"


def test_a_misspelled_choice_gets_a_suggestion() -> None:
    with pytest.raises(SettingError, match="Did you mean 'otsu'"):
        checks.choice("ostu", "binarization", ("otsu", "threshold"))


def test_one_is_not_true() -> None:
    with pytest.raises(SettingError):
        checks.choice(True, "level", (1, 2))
    with pytest.raises(SettingError, match="must be True or False"):
        checks.boolean(1, "refine")


@pytest.mark.parametrize("value", [-1, 2**63, 2**64, 1.0, True, "7", None])
def test_seeds_outside_the_range_are_refused(value: Any) -> None:
    with pytest.raises(SettingError, match="seed="):
        checks.seeds(value)
    with pytest.raises(SettingError, match="seed="):
        checks.seeds([0, value])


@pytest.mark.parametrize("values", [[], (), range(0), np.zeros((2, 2), int), "12", {0: 1}])
def test_an_empty_or_odd_list_of_seeds_is_refused(values: Any) -> None:
    with pytest.raises(SettingError, match=f"a whole number from 0 to {checks.MAX_SEED}, or a list of one or more"):
        checks.seeds(values)


def test_a_repeated_seed_is_refused_where_it_matters() -> None:
    assert checks.seeds([1, 1]) == [1, 1]
    with pytest.raises(SettingError, match="seed=1 is given more than once"):
        checks.seeds([0, 1, 1], distinct=True)


@given(st.one_of(st.none(), st.booleans(), st.text(), st.binary(), st.floats(), st.integers(), st.lists(st.floats())))
def test_any_value_is_accepted_as_its_plain_self_or_refused(value: Any) -> None:
    for check in (lambda: checks.whole_number(value, "x", -5, 5), lambda: checks.real_number(value, "x", -5, 5)):
        try:
            assert check() == value
            assert -5 <= check() <= 5
        except SettingError as error:
            assert "x=" in str(error)  # noqa: PT017
