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
    """Marks of a prompt: a dict with one item per entity.

    The key is the word index of the entity's noun, and the value holds the word indices of the entity's attributes.
    The words of the prompt are counted from 0.

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
    """Copy of a prompt after a click on a word, by which the word changes its role.

    A word without a role becomes an entity, an entity becomes an attribute, and an attribute loses its role. An
    attribute belongs to the next entity after it or, if there is none, to the last entity before it. When an entity
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
    """Copy of a prompt with other entities and attributes, which `marks` defines.

    Parameters
    ----------
    prompt : Prompt
    marks : mapping of int to sequence of int
        One item per entity, as `marks_of` returns them. The key is the word index of the entity's noun, and the value
        holds the word indices of the entity's attributes in any order. Words are counted from 0.

    Raises
    ------
    PromptError
        There is no entity, or the tokenizer has no separate token for a word.
    """
    if not marks:
        raise PromptError(
            f"The prompt {prompt.text!r} must keep at least one entity. Mark another word as an entity first."
        )
    return replace(prompt, entities=tuple(_entity(prompt, noun, sorted(marks[noun])) for noun in sorted(marks)))


def chips(prompt: Prompt) -> list[dict[str, object]]:
    """All words of a prompt, in order, as dicts for the widget `Words`.

    Each dict has six keys. "text" is the word as written. "gap" is True if a space precedes the word. "role" is
    "entity", "attribute" or "". "owner" is the label of the entity to which the word belongs, or "". "color" is the
    color of this entity, or None. "clickable" is True if the word has a letter or digit and at least one token.

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
    """Word index of the noun to which the attribute `word` belongs; None if `marks` has no noun.

    The attribute belongs to the next noun after it or, if there is none, to the last noun before it.
    """
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
