"""A prompt as the denoiser sees it: its entities, their attributes, and the tokens that stand for them.

An entity is addressed by its occurrence, never by its string: "a red car and a red dog" has the words
``red#1`` and ``red#2``.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from numbers import Integral
from typing import Any

from elakit.english import ARTICLES, load_reader, phrases
from elakit.errors import ModelError, PromptError
from elakit.tokens import Span, TextSequence, Token, encoder_length, label_words, split_words, tokenize, touching

__all__ = ["Entity", "Prompt", "Token", "parse"]

_SEQUENCES = ("attributes", "token_indices", "attribute_indices")
_JOINING = ARTICLES | {"and", "or"}
_BRACKETS = 'Mark the entities with brackets, "a [red car] and a [blue bird]".'


@dataclass(frozen=True)
class Entity:
    """One thing a prompt names.

    Attributes
    ----------
    text : the words that name it, "a red car".
    noun : the last of them, "car".
    attributes : what is said of it, ("red",).
    token_indices : tokens of the noun, all pieces.
    attribute_indices : tokens of all attributes, all pieces, in the order of the text.
    label : the noun, as "car#1", "car#2" if the word occurs more than once in the prompt.
    """

    text: str
    noun: str
    attributes: tuple[str, ...]
    token_indices: tuple[int, ...]
    attribute_indices: tuple[int, ...]
    label: str


@dataclass(frozen=True)
class Prompt:
    """A prompt with its entities and tokens; made by `parse`.

    Attributes
    ----------
    text : the prompt as the pipeline gets it, brackets removed.
    entities : in the order of the text.
    tokens : those of words only, without start-of-text, end-of-text and padding.
    end_index : position of the first end-of-text.
    length : positions the denoiser attends to, padding included (77 for CLIP; for T5 as many as the pipeline takes
        unless told otherwise).
    start_index : position of start-of-text; None where there is none (T5).
    ends : stretches of end-of-text and padding, as (first, past the last), where that is not simply everything from
        `end_index` on: Stable Diffusion 3 reads the prompt twice, with CLIP and then with T5.
    """

    text: str
    entities: tuple[Entity, ...]
    tokens: tuple[Token, ...]
    end_index: int
    length: int
    start_index: int | None = 0
    ends: tuple[tuple[int, int | None], ...] = ()

    def end_positions(self, length: int | None = None) -> tuple[int, ...]:
        """Return the positions of end-of-text and padding.

        Parameters
        ----------
        length : positions of the run's text, where they are not those of the prompt (``max_sequence_length``).

        Examples
        --------
        >>> Prompt("a car", (), (), end_index=3, length=6).end_positions()
        (3, 4, 5)
        >>> Prompt("a car", (), (), 3, 12, ends=((3, 6), (9, None))).end_positions(length=10)
        (3, 4, 5, 9)
        """
        length = self.length if length is None else length
        stretches = self.ends or ((self.end_index, None),)
        return tuple(
            i for first, past in stretches for i in range(first, length if past is None else min(past, length))
        )

    def find(self, which: str | int | Entity) -> tuple[int, ...]:
        """Return the positions of the tokens that stand for a word, an entity or a phrase.

        Parameters
        ----------
        which : a word ("car"), a label of a word, a piece or an entity ("red#2", "giraffe/1", "car@t5"), words
            that follow each other ("red car"), an `Entity` of this prompt, or a position. Capitals do not matter.
            Where a model reads the prompt twice (Stable Diffusion 3) a word stands for its tokens in both.

        Returns
        -------
        tuple of int
            Positions in the encoder's sequence.

        Raises
        ------
        PromptError
            Nothing or more than one thing in the prompt fits, or a position lies outside the sequence.

        Examples
        --------
        >>> prompt = Prompt.from_dict({
        ...     "text": "red giraffe", "entities": [], "end_index": 4, "length": 8, "tokens": [
        ...     {"index": 1, "text": "red", "label": "red", "word": 0},
        ...     {"index": 2, "text": "gira", "label": "giraffe/1", "word": 1},
        ...     {"index": 3, "text": "ffe", "label": "giraffe/2", "word": 1}]})
        >>> prompt.find("giraffe"), prompt.find("giraffe/2"), prompt.find("red giraffe"), prompt.find(0)
        ((2, 3), (3,), (1, 2, 3), (0,))
        """
        if isinstance(which, Entity):
            if which not in self.entities:
                raise PromptError(f"{which.text!r} is not an entity of {self.text!r}; {self._choices}.")
            return which.token_indices
        if isinstance(which, Integral) and not isinstance(which, bool):
            if not 0 <= which < self.length:
                raise PromptError(f"Position {which} lies outside the encoder's sequence: 0 to {self.length - 1}.")
            return (int(which),)
        if not isinstance(which, str):
            raise PromptError(f"{which!r} names no token: give a word, a label, an Entity or a position.")
        wanted = which.strip().lower()
        for token in self.tokens:
            if token.label == wanted:
                return (token.index,)
        if wanted in self._labels:
            return self._tokens_of([self._labels.index(wanted)], which)
        sought = [wanted[slice(*span)] for span in split_words(wanted)]
        words = [self.text[slice(*span)].lower() for span in self._words]
        starts = [at for at in range(len(words) - len(sought) + 1) if sought and words[at : at + len(sought)] == sought]
        if not starts:
            raise PromptError(f"{which!r} is not in {self.text!r}; {self._choices}.")
        if len(starts) > 1:
            labels = " or ".join(repr(self._labels[at + len(sought) - 1]) for at in starts)
            raise PromptError(f"{which!r} occurs {len(starts)} times in {self.text!r}: say {labels}.")
        return self._tokens_of(range(starts[0], starts[0] + len(sought)), which)

    def to_dict(self) -> dict[str, Any]:
        """Return the prompt as plain lists and dictionaries, as JSON takes them."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Prompt:
        """Return the prompt that `to_dict` wrote.

        Raises
        ------
        PromptError
            A field is missing or not one of a prompt's.
        """
        try:
            entities = tuple(
                Entity(**entity | {key: tuple(entity[key]) for key in _SEQUENCES}) for entity in plain["entities"]
            )
            tokens = tuple(Token(**token) for token in plain["tokens"])
            return cls(
                plain["text"],
                entities,
                tokens,
                plain["end_index"],
                plain["length"],
                plain.get("start_index", 0),  # prompts written before T5 was read have a start
                tuple((first, past) for first, past in plain.get("ends", ())),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PromptError(f"This is no prompt written by Prompt.to_dict: {error!r}.") from error

    @cached_property
    def _words(self) -> tuple[Span, ...]:
        return split_words(self.text)

    @cached_property
    def _labels(self) -> tuple[str, ...]:
        return label_words(self.text, self._words)

    @property
    def _choices(self) -> str:
        return f"it has {', '.join(repr(label) for label in self._labels)}"

    def _tokens_of(self, words: Iterable[int], which: str) -> tuple[int, ...]:
        wanted = set(words)
        found = tuple(token.index for token in self.tokens if token.word in wanted)
        if not found:
            raise PromptError(f"The tokenizer keeps no token of its own for {which!r} in {self.text!r}.")
        return found


def parse(text: str | Prompt, pipe: Any, nlp: Any = None) -> Prompt:
    """Read the entities of a prompt and find their tokens.

    Entities are the noun phrases of the text (`elakit.english.phrases` tells which: not "a photo of", nor a
    setting such as "in the library"). Brackets override that: with them exactly the bracketed words are
    entities, the last word of each is its noun, the others its attributes, and no spaCy model is needed.

    Parameters
    ----------
    text : the prompt; one already parsed is returned as it is.
    pipe : a pipeline, or any object with a ``tokenizer``.
    nlp : a loaded spaCy pipeline to use instead of the small English model; not used for text with brackets.

    Returns
    -------
    Prompt

    Raises
    ------
    PromptError
        The text is empty, too long for the encoder or names no entity, or its brackets are unbalanced,
        nested, empty or cut a word.
    ModelError
        `pipe` has no tokenizer or one whose pieces cannot be aligned to words or that tells no length, or there is no
        spaCy model.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> class OneTokenAWord:  # stands in for a pipeline's tokenizer
    ...     model_max_length = 12
    ...     def __call__(self, text, add_special_tokens=True, **options):
    ...         ids = [len(word) for word in text.split()]
    ...         return {"input_ids": [0, *ids, 1] if add_special_tokens else ids}
    >>> pipe = SimpleNamespace(tokenizer=OneTokenAWord())
    >>> prompt = parse("a [red car] and a [red dog]", pipe)
    >>> dog = prompt.entities[1]
    >>> dog.noun, dog.attributes, dog.token_indices, dog.attribute_indices
    ('dog', ('red',), (7,), (6,))
    >>> prompt.find("red#1"), prompt.find("red dog"), prompt.end_index
    ((2,), (6, 7), 8)
    """
    if isinstance(text, Prompt):
        return text
    if not isinstance(text, str):
        raise PromptError(f"A prompt is a string, not {type(text).__name__}: {text!r}.")
    plain, brackets = _read_brackets(text)
    sequences = _sequences(pipe)
    for sequence in sequences:
        _check_text(plain, pipe, sequence.tokenizer)
    words = split_words(plain)
    labels = label_words(plain, words)
    found = tokenize(plain, words, labels, sequences)
    tokens, end_index = found.tokens, found.ends[0][0]
    if brackets:
        marked = [_in_bracket(plain, words, span, at) for span, at in brackets]
    else:
        marked = _in_english(plain, words, nlp)
    if not marked:
        raise PromptError(f"No entity found in {text!r}. {_BRACKETS}")
    return Prompt(
        plain,
        tuple(_entity(plain, words, labels, tokens, *one) for one in marked),
        tokens,
        end_index,
        found.length,
        found.start,
        found.ends if len(found.ends) > 1 else (),
    )


def _sequences(pipe: Any) -> tuple[TextSequence, ...]:
    """The token sequences a pipeline's denoiser attends to."""
    tokenizer = getattr(pipe, "tokenizer", None)
    if getattr(pipe, "transformer", None) is not None or (tokenizer is None and hasattr(pipe, "tokenizer_2")):
        from elakit.models import adapter_for  # slow to import, and a prompt read for CLIP needs none of it

        return adapter_for(pipe).text()
    if tokenizer is None:
        raise ModelError(f"{type(pipe).__name__} has no tokenizer: give a text-to-image pipeline, see elakit.load.")
    return (TextSequence("clip", tokenizer, 0, encoder_length(pipe, tokenizer)),)


def _check_text(text: str, pipe: Any, tokenizer: Any) -> None:
    if not text.strip():
        raise PromptError(f'The prompt is empty: {text!r}. Name what to draw, such as "a red car and a blue bird".')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"Character {error.start + 1} of {text!r} is half of a surrogate pair.") from error
    for name in ("bos_token", "eos_token"):
        special = getattr(tokenizer, name, None)
        if special and special in text:
            raise PromptError(f"{text!r} contains {special!r}, which the encoder takes for a boundary: remove it.")
    # A textual inversion of several vectors makes the pipeline encode another text than this one.
    expand = getattr(pipe, "maybe_convert_prompt", None)
    if callable(expand) and expand(text, tokenizer) != text:
        raise PromptError(f"{text!r} uses a textual inversion of several vectors, whose tokens cannot be followed yet.")


def _read_brackets(text: str) -> tuple[str, list[tuple[Span, int]]]:
    """Return the text without brackets, and of each its span there and its place in the original (from 1)."""
    plain: list[str] = []
    found: list[tuple[Span, int]] = []
    opened = None
    for place, character in enumerate(text, start=1):
        if character == "[":
            if opened is not None:
                raise PromptError(f"Bracket at character {place} of {text!r} opens inside the one at {opened[1]}.")
            opened = (len(plain), place)
        elif character == "]":
            if opened is None:
                raise PromptError(f"Bracket at character {place} of {text!r} closes none that is open.")
            if not "".join(plain[opened[0] :]).strip():
                raise PromptError(f"Bracket at character {opened[1]} of {text!r} is empty. {_BRACKETS}")
            found.append(((opened[0], len(plain)), opened[1]))
            opened = None
        else:
            plain.append(character)
    if opened is not None:
        raise PromptError(f"Bracket at character {opened[1]} of {text!r} is never closed.")
    return "".join(plain), found


def _in_bracket(text: str, words: Sequence[Span], span: Span, place: int) -> tuple[Span, int, list[int]]:
    """Return an entity's span, the word that is its noun and those that are its attributes."""
    inside = touching(words, span)
    for word in inside:
        if words[word][0] < span[0] or words[word][1] > span[1]:
            cut = text[slice(*words[word])]
            raise PromptError(f"Bracket at character {place} cuts the word {cut!r}: put the whole word inside.")
    named = [word for word in inside if not _is_punctuation(text[slice(*words[word])])]
    if not named:
        raise PromptError(f"Bracket at character {place} holds no word: {text[slice(*span)]!r}. {_BRACKETS}")
    *others, noun = named
    return span, noun, [word for word in others if text[slice(*words[word])].lower() not in _JOINING]


def _in_english(text: str, words: Sequence[Span], nlp: Any) -> list[tuple[Span, int, list[int]]]:
    found = []
    for phrase in phrases((nlp or load_reader())(text)):
        naming = touching(words, phrase.noun)
        noun = next((word for word in reversed(naming) if not _is_punctuation(text[slice(*words[word])])), None)
        if noun is not None:
            # spaCy splits "red-haired", so two attributes may be one word here.
            said = dict.fromkeys(word for span in phrase.attributes for word in touching(words, span))
            shown = [word for word in said if word != noun and not _is_punctuation(text[slice(*words[word])])]
            found.append((phrase.span, noun, shown))
    return found


def _is_punctuation(word: str) -> bool:
    return all(unicodedata.category(character).startswith("P") for character in word)


def _entity(
    text: str,
    words: Sequence[Span],
    labels: Sequence[str],
    tokens: Sequence[Token],
    span: Span,
    noun: int,
    attributes: Sequence[int],
) -> Entity:
    nouns = tuple(token.index for token in tokens if token.word == noun)
    if not nouns:
        raise PromptError(f"The tokenizer keeps no token of its own for {text[slice(*words[noun])]!r} in {text!r}.")
    return Entity(
        text=" ".join(text[slice(*span)].split()),
        noun=text[slice(*words[noun])],
        attributes=tuple(text[slice(*words[word])] for word in attributes),
        token_indices=nouns,
        attribute_indices=tuple(token.index for token in tokens if token.word in attributes),
        label=labels[noun],
    )
