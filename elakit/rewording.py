"""Other wordings of a prompt: its entities in brackets, in reverse order, or joined by "next to".

Each entity keeps its noun and its attributes, and the new wording marks each entity by brackets. Brackets cannot be
inserted into a prompt in which an attribute follows its noun, as in "a car that is red and a bird". `bracketed` returns
such a prompt unchanged. `swapped` and `next_to` write its entities again, with the attributes first, and drop all other
words: "a [bird] and a [red car]", "a [red car] next to a [bird]".
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from elakit.english import ARTICLES
from elakit.prompt import Entity, Prompt, names_something
from elakit.tokens import Span, touching

# Words inside brackets that are not attributes.
_NO_ATTRIBUTE = ARTICLES | {"and", "or"}
# Text that only lists entities, and can therefore be replaced.
_LISTING = re.compile(r"\s*(?:,?\s*(?:and|&|\+)|,)\s*", re.IGNORECASE)
# Words and signs between two entities of a list, whatever else stands there.
_SEPARATOR = re.compile(r"\band\b|[&+,]", re.IGNORECASE)


@dataclass(frozen=True)
class _Phrase:
    """Two spans of an entity in the text: `span` includes its article, and `inside` is what the brackets enclose."""

    span: Span
    inside: Span


def entity_spans(prompt: Prompt) -> list[tuple[int, int, str]]:
    """Return the positions of the entities in the text.

    Parameters
    ----------
    prompt : Prompt

    Returns
    -------
    list of (int, int, str)
        (start, end, label) of each entity that is found in the text: the positions of its first character and of the
        character after its last one, and its label.
    """
    found, at = [], 0
    for entity in prompt.entities:
        # The text of an entity has single spaces, whatever spacing the prompt has.
        match = re.compile(r"\s+".join(map(re.escape, entity.text.split()))).search(prompt.text, at)
        if match:
            at = match.end()
            found.append((match.start(), at, entity.label))
    return found


def bracketed(prompt: Prompt) -> str:
    """Return the prompt with its entities in brackets; `elakit.parse` reads the same entities from it, without spaCy.

    Parameters
    ----------
    prompt : Prompt

    Returns
    -------
    str
        The text with brackets; the unchanged text if brackets cannot mark one of the entities, such as "a car that is
        red".

    Examples
    --------
    >>> import elakit
    >>> bracketed(elakit.parse("a [bear] and a [blue clock]", elakit.load("picture-world")))
    'a [bear] and a [blue clock]'
    """
    found = _phrases(prompt)
    if found is None:
        return prompt.text
    text = prompt.text
    for phrase in reversed(found):
        first, last = phrase.inside
        text = f"{text[:first]}[{text[first:last]}]{text[last:]}"
    return text


def swapped(prompt: Prompt) -> str | None:
    """Return the prompt with its entities in reverse order.

    Parameters
    ----------
    prompt : Prompt

    Returns
    -------
    str or None
        The new text, with its entities in brackets; None if its words have the same order as in the prompt, for example
        because the prompt has only one entity.

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
    return _joined(prompt, named[::-1], gaps)


def next_to(prompt: Prompt) -> str | None:
    """Return the prompt with "next to" in place of each "and" or comma that joins two entities.

    Parameters
    ----------
    prompt : Prompt

    Returns
    -------
    str or None
        The new text, with its entities in brackets; None if it has the words of the prompt in the same order, for
        example because the prompt has no such "and" or comma.

    Examples
    --------
    >>> import elakit
    >>> pipe = elakit.load("picture-world")
    >>> next_to(elakit.parse("a [bear], a [lion] and a [blue clock]", pipe))
    'a [bear] next to a [lion] next to a [blue clock]'
    >>> next_to(elakit.parse("a [bear] on a [chair]", pipe)) is None
    True
    """
    if not _lists(prompt):
        return None
    named, gaps = _parts(prompt)
    between = [" next to " if _LISTING.fullmatch(gap) else gap for gap in gaps[1:-1]]
    return _joined(prompt, named, [gaps[0], *between, gaps[-1]])


def _lists(prompt: Prompt) -> bool:
    """True if the text has an "and" or a comma between two of its entities."""
    spans = entity_spans(prompt)
    return any(_SEPARATOR.search(prompt.text[a[1] : b[0]]) for a, b in itertools.pairwise(spans))


def _joined(prompt: Prompt, named: Sequence[str], gaps: Sequence[str]) -> str | None:
    """Join the entities, `named`, with the texts before, between and after them, `gaps`.

    Return None if the result has the words of the prompt in the same order.
    """
    opens = not gaps[0].strip() and prompt.text.lstrip()[:1].isupper()
    parts = [_lowered(name) if opens else name for name in named]
    text = "".join(gap + part for gap, part in zip(gaps, [*parts, ""], strict=True))
    if opens:
        text = re.sub(r"\w", lambda match: match[0].upper(), text, count=1)
    plain = " ".join(text.replace("[", "").replace("]", "").split())
    return None if plain.lower() == " ".join(prompt.text.split()).lower() else text


def _parts(prompt: Prompt) -> tuple[list[str], list[str]]:
    """Return the entities, each written like "a [red car]", and the texts before, between and after them."""
    found = _phrases(prompt)
    if found is None:  # Words elsewhere in the text belong to an entity, so only the entities themselves are kept.
        vowels = any(word.lower() == "an" for word in prompt.text.split())
        named = [_written(entity, vowels) for entity in prompt.entities]
        return named, ["", *[" and "] * (len(named) - 1), ""]
    text, named, gaps, at = prompt.text, [], [], 0
    for phrase in found:
        (start, stop), (first, last) = phrase.span, phrase.inside
        gaps.append(text[at:start])
        named.append(f"{text[start:first]}[{text[first:last]}]{text[last:stop]}")
        at = stop
    return named, [*gaps, text[at:]]


def _written(entity: Entity, vowels: bool) -> str:
    words = " ".join([*entity.attributes, entity.noun])
    return f"{'an' if vowels and words[0].lower() in 'aeiou' else 'a'} [{words}]"


def _lowered(name: str) -> str:
    """Lower the article of a phrase that no longer begins the text: "A [red car]" -> "a [red car]"."""
    article, _, rest = name.partition(" ")
    return f"{article.lower()} {rest}" if article.lower() in ARTICLES else name


def _phrases(prompt: Prompt) -> list[_Phrase] | None:
    """Return the position of each entity; None if brackets cannot mark one of them."""
    spans = entity_spans(prompt)
    if len(spans) != len(prompt.entities):
        return None
    found = []
    for (start, stop, _), entity in zip(spans, prompt.entities, strict=True):
        inside = _inside(prompt.text, [prompt.words[i] for i in touching(prompt.words, (start, stop))], entity)
        if inside is None:
            return None
        found.append(_Phrase((_with_article(prompt, start), stop), inside))
    return found


def _inside(text: str, words: Sequence[Span], entity: Entity) -> Span | None:
    """Return the span from an entity's first attribute to its noun; None if it contains other words.

    Articles, "and", "or" and words without a letter are allowed between them.
    """
    wanted = [*entity.attributes, entity.noun]
    for first in range(len(words)):
        inside = [text[slice(*span)] for span in words[first:]]
        meant = [word for word in inside if word.lower() not in _NO_ATTRIBUTE and names_something(word)]
        if meant == wanted and inside[0] == meant[0]:
            return words[first][0], words[-1][1]
    return None


def _with_article(prompt: Prompt, start: int) -> int:
    text, before = prompt.text, [span for span in prompt.words if span[1] <= start]
    if before and text[slice(*before[-1])].lower() in ARTICLES and not text[before[-1][1] : start].strip():
        return before[-1][0]
    return start
