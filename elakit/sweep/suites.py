"""Suites of prompts: the Attend-and-Excite benchmark, and suites that elakit generates at random.

Each generated suite differs from the benchmark in one respect that makes the prompts harder, such as three entities
instead of two. A generated suite has 60 prompts with nouns and colors that the built-in model picture-world knows. The
random generator is seeded with the name of the suite, so the prompts are always the same.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from elakit.errors import SettingError
from elakit.resources import data_path
from elakit.world.scenes import FREE_WORDINGS, Subject, caption
from elakit.world.vocabulary import COLORS, NOUNS, OBJECTS

SIZE = 60  # prompts per generated suite

# Animals of similar build, which models fuse most readily.
SIMILAR = (
    ("cat", "lion"), ("cat", "dog"), ("cat", "rabbit"), ("cat", "mouse"), ("dog", "lion"), ("dog", "bear"),
    ("dog", "rabbit"), ("dog", "horse"), ("lion", "bear"), ("lion", "horse"), ("bear", "monkey"),
    ("bear", "elephant"), ("horse", "elephant"), ("rabbit", "mouse"), ("frog", "turtle"),
)  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """A named list of prompts.

    Attributes
    ----------
    name : str
        Name, as given to ``elakit sweep run --suite``.
    summary : str
        Description of the prompts, in one line.
    build : callable
        Function without arguments that returns the prompts.
    """

    name: str
    summary: str
    build: Callable[[], tuple[str, ...]]


def suite(name: str) -> tuple[str, ...]:
    """Prompts of the suite with a given name.

    Parameters
    ----------
    name : str
        A name in `SUITES`.

    Returns
    -------
    tuple of str

    Raises
    ------
    SettingError
        The suite is unknown, or is a public benchmark whose prompts are not part of elakit. For such a benchmark, the
        error message contains the commands that download the prompts and run a sweep on them.

    Examples
    --------
    The Attend-and-Excite benchmark has 276 prompts. A suite that elakit generates has 60:

    >>> len(suite("attend-and-excite")), len(suite("three-entities"))
    (276, 60)
    >>> suite("similar-animals")[0]
    'a cat and a lion'
    """
    from elakit.sweep.prompts import BENCHMARKS

    if name in BENCHMARKS:
        raise SettingError(
            f"The prompts of {name} are not included in elakit (license: {BENCHMARKS[name].license}). Download them "
            f"and run a sweep with these commands:\n{BENCHMARKS[name].command}"
        )
    if name not in SUITES:
        raise SettingError(
            f"There is no suite {name!r}. Choose from {', '.join(SUITES)}, or pass a file of prompts with --prompts."
        )
    return SUITES[name].build()


def _benchmark(*groups: str) -> tuple[str, ...]:
    table = json.loads(data_path("prompts", "attend_and_excite.json").read_text(encoding="utf-8"))
    return tuple(prompt for group in groups or table for prompt in table[group])


def _distinct(name: str, make: Callable[[np.random.Generator, int], str]) -> tuple[str, ...]:
    """Generate the 60 distinct prompts of a suite at random.

    Each call of `make` returns one prompt. The arguments of `make` are a random generator and the number of distinct
    prompts so far. The random generator is seeded with `name`, the name of the suite.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    found: dict[str, None] = {}
    while len(found) < SIZE:
        found[make(rng, len(found))] = None
    return tuple(found)


def _sample(rng: np.random.Generator, words: Sequence[str], count: int) -> list[str]:
    return [str(word) for word in rng.choice(words, count, replace=False)]


def _three(rng: np.random.Generator, _: int) -> str:
    nouns, colors = _sample(rng, NOUNS, 3), _sample(rng, COLORS, 3)
    pairs = zip(nouns, colors, strict=True)
    return caption(tuple(Subject(noun, color if noun in OBJECTS else None) for noun, color in pairs))


def _same_color(rng: np.random.Generator, _: int) -> str:
    (color,) = _sample(rng, COLORS, 1)
    return caption(tuple(Subject(noun, color) for noun in _sample(rng, OBJECTS, 2)))


def _free(rng: np.random.Generator, number: int) -> str:
    wording = FREE_WORDINGS[number % len(FREE_WORDINGS)]
    count = 3 if wording == "list" else 2  # a list of two has the wording of the benchmark
    nouns, colors = _sample(rng, NOUNS, count), _sample(rng, COLORS, count)
    # without an article only a color lets the English parser read "bowl" in "frog and bowl" as a noun
    colored = (rng.random(count) < 0.5) | (wording == "bare")
    subjects = [Subject(n, c if wanted else None) for n, c, wanted in zip(nouns, colors, colored, strict=True)]
    return caption(tuple(subjects), wording=wording)


def _similar_animals() -> tuple[str, ...]:
    rng = np.random.default_rng(zlib.crc32(b"similar-animals"))
    prompts = []
    for pair in SIMILAR:
        plain = tuple(Subject(noun) for noun in pair)
        colored = tuple(Subject(n, c) for n, c in zip(pair, _sample(rng, COLORS, 2), strict=True))
        prompts += [caption(subjects) for both in (plain, colored) for subjects in (both, both[::-1])]
    return tuple(prompts)


SUITES: dict[str, Suite] = {
    each.name: each
    for each in (
        Suite("attend-and-excite", "all 276 prompts of the Attend-and-Excite benchmark", _benchmark),
        Suite("animals", "pairs of animals from Attend-and-Excite", partial(_benchmark, "animals")),
        Suite(
            "animals-objects",
            "pairs of an animal and an object from Attend-and-Excite",
            partial(_benchmark, "animals_objects"),
        ),
        Suite("objects", "pairs of colored objects from Attend-and-Excite", partial(_benchmark, "objects")),
        Suite(
            "three-entities",
            "three different nouns joined by 'and'; objects in different colors, animals without a color",
            partial(_distinct, "three-entities", _three),
        ),
        Suite(
            "same-color",
            "two different objects of the same color",
            partial(_distinct, "same-color", _same_color),
        ),
        Suite(
            "similar-animals",
            "15 pairs of animals of similar build, in both orders, without colors and in two different colors",
            _similar_animals,
        ),
        Suite(
            "free-captions",
            f"ten prompts per wording ({', '.join(FREE_WORDINGS)}); half of the nouns have a color; lists have three "
            "nouns",
            partial(_distinct, "free-captions", _free),
        ),
    )
}
