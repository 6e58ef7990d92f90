"""Rewording keeps each entity with its noun and its attributes, in any order and with any conjunction."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import elakit
from elakit.prompt import Prompt, parse
from elakit.rewording import bracketed, next_to, swapped
from elakit.world.vocabulary import COLORS, NOUNS


@pytest.fixture(scope="module")
def world() -> Any:
    return elakit.load("picture-world")


def described(prompt: Prompt) -> list[tuple[str, tuple[str, ...]]]:
    return [(entity.noun, entity.attributes) for entity in prompt.entities]


@pytest.mark.parametrize(
    ("text", "brackets", "other_order", "side_by_side"),
    [
        (
            "a bear and a blue clock",
            "a [bear] and a [blue clock]",
            "a [blue clock] and a [bear]",
            "a [bear] next to a [blue clock]",
        ),
        (  # the capital stays at the beginning, articles stay with their nouns
            "A red apple and an orange cat in the library",
            "A [red apple] and an [orange cat] in the library",
            "An [orange cat] and a [red apple] in the library",
            "A [red apple] next to an [orange cat] in the library",
        ),
        (
            "a cat, a dog, and a red car",
            "a [cat], a [dog], and a [red car]",
            "a [red car], a [dog], and a [cat]",
            "a [cat] next to a [dog] next to a [red car]",
        ),
        (  # other relations between entities do not change
            "a cat on a chair",
            "a [cat] on a [chair]",
            "a [chair] on a [cat]",
            None,
        ),
        (  # a number stays outside the brackets
            "a red and white car and two  dogs",
            "a [red and white car] and two  [dogs]",
            "two  [dogs] and a [red and white car]",
            "a [red and white car] next to two  [dogs]",
        ),
        ("a [red car]", "a [red car]", None, None),
        ("a [cat] and a [cat]", "a [cat] and a [cat]", None, "a [cat] next to a [cat]"),
    ],
)
def test_entities_are_named_in_other_words(
    world: Any, text: str, brackets: str, other_order: str | None, side_by_side: str | None
) -> None:
    prompt = parse(text, world)
    assert (bracketed(prompt), swapped(prompt), next_to(prompt)) == (brackets, other_order, side_by_side)


def test_an_adjective_after_the_noun_stays_with_its_entity(world: Any) -> None:
    prompt = parse("a car that is red and a bird", world)
    assert described(prompt)[0] == ("car", ("red",))
    assert bracketed(prompt) == prompt.text  # no bracket can say that red belongs to the car
    assert swapped(prompt) == "a [bird] and a [red car]"
    assert described(parse(swapped(prompt) or "", world)) == described(prompt)[::-1]
    assert next_to(prompt) == "a [red car] next to a [bird]"


def test_entities_that_are_not_listed_are_not_put_next_to_each_other(world: Any) -> None:
    prompt = parse("a car that is red on a chair", world)
    assert described(prompt) == [("car", ("red",)), ("chair", ())]
    assert next_to(prompt) is None


subjects = st.lists(
    st.tuples(st.lists(st.sampled_from(COLORS), max_size=2, unique=True), st.sampled_from(NOUNS)),
    min_size=2, max_size=4,
)  # fmt: skip


@given(subjects, st.sampled_from([" and ", ", ", " & ", "  and\n", " next to ", " under "]), st.booleans())
def test_nothing_is_lost_or_mixed_up(
    world: Any, things: list[tuple[list[str], str]], joined: str, articles: bool
) -> None:
    named = [f"{'a ' if articles else ''}[{' '.join([*colors, noun])}]" for colors, noun in things]
    prompt = parse(joined.join(named), world)
    same = [(noun, tuple(colors)) for colors, noun in things]
    assert described(parse(bracketed(prompt), world)) == same
    assert parse(bracketed(prompt), world) == prompt
    if (other := swapped(prompt)) is not None:
        assert described(parse(other, world)) == same[::-1]
    if (beside := next_to(prompt)) is not None:
        assert described(parse(beside, world)) == same
        assert parse(beside, world).text.count("next to") == len(things) - 1
