"""Suites of prompts to sweep: the Attend-and-Excite benchmark, and suites that each make one thing harder.

The generated suites have 60 prompts each, of picture-world's nouns and colors, and are the same in every sweep: their
random numbers are seeded by the suite's name.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from elakit.errors import OutputError, SettingError
from elakit.resources import data_path
from elakit.world.scenes import FREE_WORDINGS, Subject, caption
from elakit.world.vocabulary import COLORS, NOUNS, OBJECTS

SIZE = 60  # prompts of a generated suite

# Animals of like build, which models fuse most readily.
LOOK_ALIKES = (
    ("cat", "lion"), ("cat", "dog"), ("cat", "rabbit"), ("cat", "mouse"), ("dog", "lion"), ("dog", "bear"),
    ("dog", "rabbit"), ("dog", "horse"), ("lion", "bear"), ("lion", "horse"), ("bear", "monkey"),
    ("bear", "elephant"), ("horse", "elephant"), ("rabbit", "mouse"), ("frog", "turtle"),
)  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """A named set of prompts.

    Attributes
    ----------
    name : str
    summary : str
        The rule its prompts follow, in a line.
    build : callable
        Gives the prompts.
    """

    name: str
    summary: str
    build: Callable[[], tuple[str, ...]]


def suite(name: str) -> tuple[str, ...]:
    """The prompts of a suite.

    Parameters
    ----------
    name : str
        One of `SUITES`.

    Raises
    ------
    SettingError
        There is no such suite.

    Examples
    --------
    >>> len(suite("attend-and-excite")), len(suite("three-entities"))
    (276, 60)
    >>> suite("similar-animals")[0]
    'a cat and a lion'
    """
    if name not in SUITES:
        raise SettingError(
            f"There is no suite {name!r}. Choose from {', '.join(SUITES)}, or give a file of prompts (--prompts)."
        )
    return SUITES[name].build()


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """Prompts of a text file, one a line; empty lines are skipped, and a prompt counts once.

    Parameters
    ----------
    path : str or Path

    Raises
    ------
    OutputError
        The file cannot be read.
    SettingError
        It is not UTF-8, or holds no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise OutputError(
            f"The prompts in {path} cannot be read: {error.strerror or error}. Give a text file with a prompt a line."
        ) from error
    except UnicodeDecodeError as error:
        raise SettingError(f"{path} is not a text file in UTF-8 ({error.reason}); save it as UTF-8.") from error
    prompts = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise SettingError(f"{path} holds no prompt; write one a line.")
    return prompts


def spread(prompts: Sequence[str], count: int | None) -> tuple[str, ...]:
    """So many of the prompts, spread evenly with the first and the last; all where there are no more, or for None.

    Parameters
    ----------
    prompts : sequence of str
    count : int, optional

    Raises
    ------
    SettingError
        The count is less than 1.

    Examples
    --------
    >>> spread(["a", "b", "c", "d", "e"], 3)
    ('a', 'c', 'e')
    """
    if count is None:
        return tuple(prompts)
    if count < 1:
        raise SettingError(f"limit={count}: must be 1 prompt or more.")
    places = np.linspace(0, len(prompts) - 1, min(count, len(prompts))).round().astype(int)
    return tuple(prompts[place] for place in places)


def _benchmark(*groups: str) -> tuple[str, ...]:
    table = json.loads(data_path("prompts", "attend_and_excite.json").read_text(encoding="utf-8"))
    return tuple(prompt for group in groups or table for prompt in table[group])


def _distinct(name: str, make: Callable[[np.random.Generator, int], str]) -> tuple[str, ...]:
    """`SIZE` different prompts; `make` is given the number of the prompt."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    found: dict[str, None] = {}
    while len(found) < SIZE:
        found[make(rng, len(found))] = None
    return tuple(found)


def _pick(rng: np.random.Generator, words: Sequence[str], count: int) -> list[str]:
    return [str(word) for word in rng.choice(words, count, replace=False)]


def _three(rng: np.random.Generator, _: int) -> str:
    nouns, colors = _pick(rng, NOUNS, 3), _pick(rng, COLORS, 3)
    pairs = zip(nouns, colors, strict=True)
    return caption(tuple(Subject(noun, color if noun in OBJECTS else None) for noun, color in pairs))


def _same_color(rng: np.random.Generator, _: int) -> str:
    (color,) = _pick(rng, COLORS, 1)
    return caption(tuple(Subject(noun, color) for noun in _pick(rng, OBJECTS, 2)))


def _free(rng: np.random.Generator, number: int) -> str:
    wording = FREE_WORDINGS[number % len(FREE_WORDINGS)]
    count = 3 if wording == "list" else 2  # a list of two is worded as the benchmark's
    nouns, colors = _pick(rng, NOUNS, count), _pick(rng, COLORS, count)
    # nothing else tells an English reader that "bowl" in "frog and bowl" is a thing
    colored = (rng.random(count) < 0.5) | (wording == "bare")
    subjects = [Subject(n, c if wanted else None) for n, c, wanted in zip(nouns, colors, colored, strict=True)]
    return caption(tuple(subjects), wording=wording)


def _look_alikes() -> tuple[str, ...]:
    rng = np.random.default_rng(zlib.crc32(b"similar-animals"))
    prompts = []
    for pair in LOOK_ALIKES:
        plain = tuple(Subject(noun) for noun in pair)
        painted = tuple(Subject(n, c) for n, c in zip(pair, _pick(rng, COLORS, 2), strict=True))
        prompts += [caption(subjects) for both in (plain, painted) for subjects in (both, both[::-1])]
    return tuple(prompts)


SUITES: dict[str, Suite] = {
    each.name: each
    for each in (
        Suite("attend-and-excite", "all 276 prompts of the Attend-and-Excite benchmark", _benchmark),
        Suite("animals", "its pairs of animals", partial(_benchmark, "animals")),
        Suite("animals-objects", "its pairs of an animal and an object", partial(_benchmark, "animals_objects")),
        Suite("objects", "its pairs of colored objects", partial(_benchmark, "objects")),
        Suite(
            "three-entities",
            "three different nouns joined by and; objects in different colors, animals as they are",
            partial(_distinct, "three-entities", _three),
        ),
        Suite(
            "same-color",
            "two different objects that share one color",
            partial(_distinct, "same-color", _same_color),
        ),
        Suite(
            "similar-animals",
            "15 pairs of animals of like build, in both orders, without colors and in two different ones",
            _look_alikes,
        ),
        Suite(
            "free-captions",
            f"ten prompts in each wording ({', '.join(FREE_WORDINGS)}), half of the things colored, three in a list",
            partial(_distinct, "free-captions", _free),
        ),
    )
}
