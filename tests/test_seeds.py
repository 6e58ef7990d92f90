"""Seeds of several images mean the same in Python and on every command line: a list, never a number of images."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import elakit
from elakit.errors import SettingError
from elakit.seeds import MAX_SEEDS, format_seeds, parse_seeds, seed_list


@given(st.lists(st.integers(0, 40) | st.integers(2**63 - 3, 2**63 - 1), min_size=1, max_size=20, unique=True))
def test_a_list_of_seeds_survives_a_command_line(seeds: list[int]) -> None:
    assert parse_seeds(format_seeds(seeds)) == seeds


@pytest.mark.parametrize(
    ("text", "seeds"), [("7", [7]), ("0-3", [0, 1, 2, 3]), ("1,3", [1, 3]), (" 5 , 8 - 9 ", [5, 8, 9]), ("4-4", [4])]
)
def test_seeds_are_written_alone_or_as_ranges(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "--seeds : '' is not a seed or a range of seeds. Give seeds and ranges"),
        ("1;3", "'1;3' is not a seed"),
        ("1,,3", "'' is not a seed"),
        ("-1", "'-1' is not a seed"),
        ("0-", "'0-' is not a seed"),
        ("²", "'²' is not a seed"),
        ("3-0", "the range 3-0 ends before it starts"),
        ("0-3,2", "--seeds=2 is given more than once"),
        ("0-99999999", "--seeds has 100,000,000 seeds; at most 10,000"),
        (f"{2**63}", f"--seeds={2**63}: must be a whole number from 0 to"),
    ],
)
def test_other_texts_are_refused(text: str, said: str) -> None:
    with pytest.raises(SettingError) as caught:
        parse_seeds(text)
    assert said in str(caught.value)


@pytest.mark.parametrize("number", [4, np.int64(4)])
def test_a_number_of_seeds_is_refused_with_the_list_that_is_probably_meant(number: int) -> None:
    with pytest.raises(SettingError, match=r"seeds=4: .* Use range\(4\) for the seeds 0 to 3, or \[4\] for one seed\."):
        elakit.diagnose(elakit.load("picture-world"), "a [cat] and a [lion]", seeds=number)  # type: ignore[arg-type]


def test_more_seeds_than_a_run_can_use_are_refused_before_they_are_listed() -> None:
    with pytest.raises(SettingError, match="seeds has 1,000,000,000 seeds; at most 10,000 are allowed"):
        seed_list(range(10**9))
    assert len(seed_list(range(MAX_SEEDS))) == MAX_SEEDS
