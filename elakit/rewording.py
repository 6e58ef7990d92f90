"""The same entities in other words: in brackets, in another order, or joined by "next to".

Whatever is done to the words, each entity keeps its noun and its attributes, and brackets say which they are.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from elakit.english import ARTICLES
from elakit.prompt import Entity, Prompt
from elakit.tokens import Span, split_words, touching

# Words in brackets that are no attributes.
_NOT_SAID = ARTICLES | {"and", "or"}
# What only lists one entity after the other, so that something else may stand in its place.
_LISTING = re.compile(r"\s*(?:,?\s*(?:and|&|\+)|,)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class _Phrase:
    """Where an entity stands in the text: with its article, and what brackets are to hold."""

    span: Span
    inside: Span


def entity_spans(prompt: Prompt) -> list[tuple[int, int, str]]:
    """Where the entities stand in the text.

    Parameters
    ----------
    prompt : Prompt

    Returns
    -------
    list of (int, int, str)
        First and past the last character, and the entity's label; an entity that is not found is left out.
    """
    found, at = [], 0
    for entity in prompt.entities:
        # the text of an entity has single spaces, whatever the prompt has
        match = re.compile(r"\s+".join(map(re.escape, entity.text.split()))).search(prompt.text, at)
        if match:
            at = match.end()
            found.append((match.start(), at, entity.label))
    return found


def bracketed(prompt: Prompt) -> str:
    """The prompt with its entities in brackets, so that it is read the same without spaCy.

    Parameters
    ----------
    prompt : Prompt

    Returns
    -------
    str
        The text as it is, where brackets cannot say what the entities are: "a car that is red".

    Examples
    --------
    >>> import elakit
    >>> bracketed(elakit.parse("a [bear] and a [blue clock]", elakit.load("picture-world")))
    'a [bear] and a [blue clock]'
    """
    phrases = _phrases(prompt)
    if phrases is None:
        return prompt.text
    text = prompt.text
    for phrase in reversed(phrases):
        first, last = phrase.inside
        text = f"{text[:first]}[{text[first:last]}]{text[last:]}"
    return text


def swapped(prompt: Prompt) -> str | None:
    """The prompt with its entities named in the opposite order.

    Parameters
    ----------
    prompt : Prompt

    Returns
    -------
    str or None
        With brackets; None where that changes nothing.

    Examples
    --------
    >>> import elakit
    >>> pipe = elakit.load("picture-world")
    >>> swapped(elakit.parse("a [bear] and a [blue clock]", pipe))
    'a [blue clock] and a [bear]'
    >>> swapped(elakit.parse("a [bear]", pipe)) is None
    True
    """
    named, gaps = _parts(prompt)
    return _other(prompt, named[::-1], gaps)


def next_to(prompt: Prompt) -> str | None:
    """The prompt with "next to" where it only lists its entities with "and" or a comma.

    Parameters
    ----------
    prompt : Prompt

    Returns
    -------
    str or None
        With brackets; None where it lists none.

    Examples
    --------
    >>> import elakit
    >>> pipe = elakit.load("picture-world")
    >>> next_to(elakit.parse("a [bear], a [lion] and a [blue clock]", pipe))
    'a [bear] next to a [lion] next to a [blue clock]'
    >>> next_to(elakit.parse("a [bear] on a [chair]", pipe)) is None
    True
    """
    named, gaps = _parts(prompt)
    between = [" next to " if _LISTING.fullmatch(gap) else gap for gap in gaps[1:-1]]
    return _other(prompt, named, [gaps[0], *between, gaps[-1]])


def _other(prompt: Prompt, named: Sequence[str], gaps: Sequence[str]) -> str | None:
    """The text put together again; None where its words are the same as before."""
    opens = not gaps[0].strip() and prompt.text.lstrip()[:1].isupper()
    parts = [_lowered(name) if opens else name for name in named]
    text = "".join(gap + part for gap, part in zip(gaps, [*parts, ""], strict=True))
    if opens:
        text = re.sub(r"\w", lambda match: match[0].upper(), text, count=1)
    plain = " ".join(text.replace("[", "").replace("]", "").split())
    return None if plain.lower() == " ".join(prompt.text.split()).lower() else text


def _parts(prompt: Prompt) -> tuple[list[str], list[str]]:
    """Each entity in brackets with its article, and the text before, between and after them."""
    phrases = _phrases(prompt)
    if phrases is None:  # told anew: of what is said elsewhere in the text nothing else could be kept
        vowels = any(word.lower() == "an" for word in prompt.text.split())
        named = [_told(entity, vowels) for entity in prompt.entities]
        return named, ["", *[" and "] * (len(named) - 1), ""]
    text, named, gaps, at = prompt.text, [], [], 0
    for phrase in phrases:
        (start, stop), (first, last) = phrase.span, phrase.inside
        gaps.append(text[at:start])
        named.append(f"{text[start:first]}[{text[first:last]}]{text[last:stop]}")
        at = stop
    return named, [*gaps, text[at:]]


def _told(entity: Entity, vowels: bool) -> str:
    words = " ".join([*entity.attributes, entity.noun])
    return f"{'an' if vowels and words[0].lower() in 'aeiou' else 'a'} [{words}]"


def _lowered(name: str) -> str:
    """A phrase that no longer opens the text: "A [red car]" -> "a [red car]"; names keep their capital."""
    article, _, rest = name.partition(" ")
    return f"{article.lower()} {rest}" if article.lower() in ARTICLES else name


def _phrases(prompt: Prompt) -> list[_Phrase] | None:
    """Where each entity stands; None where brackets cannot say what one of them is."""
    spans = entity_spans(prompt)
    if len(spans) != len(prompt.entities):
        return None
    words = split_words(prompt.text)
    phrases = []
    for (start, stop, _), entity in zip(spans, prompt.entities, strict=True):
        inside = _inside(prompt.text, [words[i] for i in touching(words, (start, stop))], entity)
        if inside is None:
            return None
        phrases.append(_Phrase((_with_article(prompt.text, words, start), stop), inside))
    return phrases


def _inside(text: str, words: Sequence[Span], entity: Entity) -> Span | None:
    """The last words of an entity's text that say its attributes and its noun, and nothing else."""
    wanted = [*entity.attributes, entity.noun]
    for first in range(len(words)):
        inside = [text[slice(*span)] for span in words[first:]]
        said = [word for word in inside if word.lower() not in _NOT_SAID and not _is_punctuation(word)]
        if said == wanted and inside[0] == said[0]:
            return words[first][0], words[-1][1]
    return None


def _with_article(text: str, words: Sequence[Span], start: int) -> int:
    before = [span for span in words if span[1] <= start]
    if before and text[slice(*before[-1])].lower() in ARTICLES and not text[before[-1][1] : start].strip():
        return before[-1][0]
    return start


def _is_punctuation(word: str) -> bool:
    return all(unicodedata.category(character).startswith("P") for character in word)
