"""Other wordings of a prompt: its entities in brackets, in reverse order, or joined by "next to".

Brackets enclose the attributes and the noun of an entity: "a [red car]". `elakit.parse` reads the text in each
pair of brackets as one entity. A new wording has brackets around each entity, and keeps its attributes and noun.

Brackets cannot enclose an entity whose attribute follows the noun, as in "a car that is red and a bird". `bracketed`
returns this prompt unchanged. `swapped` and `next_to` keep only the entities of this prompt, and write the attributes
first. `swapped` returns "a [bird] and a [red car]", and `next_to` returns "a [red car] next to a [bird]".
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
    """Position of an entity in a text, as two spans. A span is (start, end) in characters, the end excluded.

    `span` is the position of the entity with its article, such as "a red car". `inside` is the position of the part
    that brackets enclose: "red car".
    """

    span: Span
    inside: Span


def entity_spans(prompt: Prompt) -> list[tuple[int, int, str]]:
    """Return the position of each entity in the text of a prompt.

    Parameters
    ----------
    prompt : Prompt

    Returns
    -------
    list of (int, int, str)
        (start, end, label) of each entity. Start and end are in characters, the end excluded. Entities that are not
        found in the text are left out.
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
    """Return the text of a prompt with each entity in brackets.

    From a text with brackets, `elakit.parse` reads the same entities, and does not need spaCy.

    Parameters
    ----------
    prompt : Prompt

    Returns
    -------
    str
        The text with brackets. Brackets cannot mark an entity whose attribute follows the noun, such as "a car that is
        red". The text is then returned unchanged.

    Examples
    --------
    The text of a parsed prompt has no brackets; `bracketed` inserts brackets:

    >>> import elakit
    >>> prompt = elakit.parse("a [bear] and a [blue clock]", elakit.load("picture-world"))
    >>> prompt.text, bracketed(prompt)
    ('a bear and a blue clock', 'a [bear] and a [blue clock]')
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
    """Return the text of a prompt with its entities in reverse order.

    Parameters
    ----------
    prompt : Prompt

    Returns
    -------
    str or None
        The new text, with each entity in brackets. None if the new text has the same words in the same order as the
        prompt, for example because the prompt has only one entity.

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
    """Return the text of a prompt with "next to" in place of each "and" or comma between two entities.

    Parameters
    ----------
    prompt : Prompt

    Returns
    -------
    str or None
        The new text, with each entity in brackets. None if the new text has the same words in the same order as the
        prompt, for example because the prompt has no "and" or comma between two entities.

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
    """Join the texts of the entities with the texts around the entities, and return the new text of the prompt.

    `named` has the text of each entity. `gaps` has the text before the first entity, the texts between the entities,
    and the text after the last entity. Return None if the new text has the same words in the same order as the prompt.
    """
    opens = not gaps[0].strip() and prompt.text.lstrip()[:1].isupper()
    parts = [_lowered(name) if opens else name for name in named]
    text = "".join(gap + part for gap, part in zip(gaps, [*parts, ""], strict=True))
    if opens:
        text = re.sub(r"\w", lambda match: match[0].upper(), text, count=1)
    plain = " ".join(text.replace("[", "").replace("]", "").split())
    return None if plain.lower() == " ".join(prompt.text.split()).lower() else text


def _parts(prompt: Prompt) -> tuple[list[str], list[str]]:
    """Split a prompt into two lists: the texts of the entities, and the texts around the entities.

    The text of an entity is written with brackets, such as "a [red car]". The second list has the text before the first
    entity, the texts between the entities, and the text after the last entity.
    """
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
    """Write the article at the beginning of a phrase in lower case: "A [red car]" -> "a [red car]"."""
    article, _, rest = name.partition(" ")
    return f"{article.lower()} {rest}" if article.lower() in ARTICLES else name


def _phrases(prompt: Prompt) -> list[_Phrase] | None:
    """Return the position of each entity in the text; None if there is an entity that brackets cannot mark."""
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
    """Return the span of the text that brackets around an entity enclose: from its first attribute to its noun.

    `words` are the spans of the entity's words in the text. Return None if an attribute follows the noun, or if other
    words stand between the attributes and the noun. Articles, "and", "or" and words without a letter are allowed.
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
