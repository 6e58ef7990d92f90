"""Roles of a prompt's words (entity, attribute or none), as a user assigns them by clicking on the words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from elakit.errors import PromptError
from elakit.plot.style import entity_colors
from elakit.prompt import Entity, Prompt

# Word index of an entity's noun -> word indices of its attributes.
Marks = Mapping[int, Sequence[int]]


def marks_of(prompt: Prompt) -> dict[int, tuple[int, ...]]:
    """Marks of a prompt: the index of each entity's noun, mapped to the indices of the entity's attributes.

    Indices are those of the words of the prompt, counted from 0.

    Examples
    --------
    >>> import elakit
    >>> marks_of(elakit.parse("a [red car] and a [bird]", elakit.load("picture-world")))
    {2: (1,), 5: ()}
    """
    word = {token.index: token.word for token in prompt.tokens}
    return {
        word[entity.token_indices[0]]: tuple(dict.fromkeys(word[index] for index in entity.attribute_indices))
        for entity in prompt.entities
    }


def toggled(prompt: Prompt, at: int) -> Prompt:
    """The prompt after a click on a word, which changes the word's role from none to entity, to attribute, to none.

    An attribute belongs to the next entity after it, or to the last entity before it if none follows. When an entity
    becomes an attribute, its own attributes pass to other entities by the same rule. The only entity of a prompt cannot
    be changed.

    Parameters
    ----------
    prompt : Prompt
    at : int
        Index of the word, counted from 0.

    Raises
    ------
    PromptError
        No entity would be left, or the tokenizer has no separate token for the word.

    Examples
    --------
    >>> import elakit
    >>> prompt = elakit.parse("a [red car] and a [bird]", elakit.load("picture-world"))
    >>> marks_of(toggled(prompt, 2))  # "car" becomes an attribute of "bird", and so does "red"
    {5: (1, 2)}
    >>> marks_of(toggled(toggled(prompt, 2), 2))
    {5: (1,)}
    """
    marks = {noun: list(attributes) for noun, attributes in marks_of(prompt).items()}
    if at in marks:
        orphans = [at, *marks.pop(at)]
        for word in orphans:
            if (owner := _owner(marks, word)) is not None:
                marks[owner].append(word)
    elif any(at in attributes for attributes in marks.values()):
        marks = {noun: [word for word in attributes if word != at] for noun, attributes in marks.items()}
    else:
        marks[at] = []
    return marked(prompt, marks)


def marked(prompt: Prompt, marks: Marks) -> Prompt:
    """Copy of a prompt whose entities and attributes are the marked words.

    Parameters
    ----------
    prompt : Prompt
    marks : mapping of int to sequence of int
        For each entity, the index of its noun, mapped to the indices of its attributes in any order, as `marks_of`
        returns them.

    Raises
    ------
    PromptError
        There is no entity, or the tokenizer has no separate token for a word.
    """
    if not marks:
        raise PromptError(
            f"No word of {prompt.text!r} would be left as an entity: mark another word as an entity first."
        )
    return replace(prompt, entities=tuple(_entity(prompt, noun, sorted(marks[noun])) for noun in sorted(marks)))


def chips(prompt: Prompt) -> list[dict[str, object]]:
    """All words of a prompt, in order, as dicts for the widget `Words`.

    The keys of each are "text", the word as written; "gap", True if a space precedes it; "role", which is "entity",
    "attribute" or ""; "owner", the label of the entity to which the word belongs, or ""; "color", that of this entity,
    or None; and "clickable", True if the word has a letter or digit and at least one token.

    Examples
    --------
    >>> import elakit
    >>> [(chip["text"], chip["role"]) for chip in chips(elakit.parse("a [red car]", elakit.load("picture-world")))]
    [('a', ''), ('red', 'attribute'), ('car', 'entity')]
    """
    marks = marks_of(prompt)
    colors = entity_colors([entity.label for entity in prompt.entities])
    entities = dict(zip(marks, prompt.entities, strict=True))
    owners = {word: entities[noun].label for noun, attributes in marks.items() for word in attributes}
    owners |= {noun: entity.label for noun, entity in entities.items()}
    kept = {token.word for token in prompt.tokens}
    found: list[dict[str, object]] = []
    last = 0
    for i, (first, past) in enumerate(prompt.words):
        owner = owners.get(i, "")
        found.append(
            {
                "text": prompt.text[first:past],
                "gap": first > last,
                "role": "entity" if i in marks else "attribute" if owner else "",
                "owner": owner,
                "color": colors.get(owner),
                "clickable": i in kept and any(character.isalnum() for character in prompt.text[first:past]),
            }
        )
        last = past
    return found


def _owner(marks: Marks, word: int) -> int | None:
    """Index of the noun to which an attribute belongs: the next one, or the last one before it; None if none."""
    after = [noun for noun in marks if noun > word]
    return min(after) if after else max(marks, default=None)


def _entity(prompt: Prompt, noun: int, attributes: Sequence[int]) -> Entity:
    def text(word: int) -> str:
        return prompt.text[slice(*prompt.words[word])]

    nouns = tuple(token.index for token in prompt.tokens if token.word == noun)
    if not nouns:
        raise PromptError(
            f"The tokenizer has no separate token for {text(noun)!r} in {prompt.text!r}; mark another word."
        )
    return Entity(
        text=" ".join(text(word) for word in sorted([noun, *attributes])),
        noun=text(noun),
        attributes=tuple(text(word) for word in attributes),
        token_indices=nouns,
        attribute_indices=tuple(token.index for token in prompt.tokens if token.word in attributes),
        label=prompt.word_labels[noun],
    )
