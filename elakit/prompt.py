"""A prompt as the denoiser receives it: entities, attributes, and the tokens that represent them.

Words and entities are identified by their occurrence in the prompt, not by their string: the two words "red" of "a red
car and a red dog" have the labels ``red#1`` and ``red#2``.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, cast

from elakit.checks import is_whole
from elakit.english import ARTICLES, load_reader, phrases, plain_english
from elakit.errors import ModelError, PromptError, clause
from elakit.pipeline import HasTokenizer, Pipeline
from elakit.tokens import (
    Span,
    TextSequence,
    Token,
    Tokens,
    encoder_length,
    label_words,
    may_split,
    split_words,
    tokenize,
    touching,
)

__all__ = ["Entity", "Prompt", "Token", "parse"]

_SEQUENCES = ("attributes", "token_indices", "attribute_indices")
_JOINING = ARTICLES | {"and", "or"}
_BRACKETS = 'Mark the entities with brackets: "a [red car] and a [blue bird]".'


@dataclass(frozen=True)
class Entity:
    """One object that a prompt names.

    Attributes
    ----------
    text : str
        The words that name the object, such as "a red car". If the prompt marks the object with brackets, `text` is the
        text inside the brackets.
    noun : str
        The noun of the object, such as "car".
    attributes : tuple of str
        Words that describe the object, such as ("red",).
    token_indices : tuple of int
        Positions of the noun's tokens among all text positions that the denoiser attends to, counted from 0.
    attribute_indices : tuple of int
        Positions of the attributes' tokens, counted in the same way, in ascending order.
    label : str
        Unique name: the noun in lower case, or "car#1" and "car#2" if the word occurs more than once in the prompt. A
        noun that is spelled like a reserved label is always numbered: "background#1".

    Examples
    --------
    Start-of-text is at position 0, so "a" is at position 1, "red" at 2 and "car" at 3:

    >>> import elakit
    >>> car = elakit.parse("a [red car]", elakit.load("picture-world")).entities[0]
    >>> car.noun, car.attributes, car.token_indices, car.attribute_indices
    ('car', ('red',), (3,), (2,))
    """

    text: str
    noun: str
    attributes: tuple[str, ...]
    token_indices: tuple[int, ...]
    attribute_indices: tuple[int, ...]
    label: str


@dataclass(frozen=True)
class Prompt:
    """A prompt with its entities and tokens, as `parse` returns it.

    Attributes
    ----------
    text : str
        The prompt for the pipeline, without brackets.
    entities : tuple of Entity
        Entities in the order of the text.
    tokens : tuple of Token
        Tokens of words, without start-of-text, end-of-text and padding.
    end_index : int
        Position of the first end-of-text token.
    length : int
        Number of text positions that the denoiser attends to, including padding. CLIP has 77 positions. Most other text
        encoders, such as T5, have the default of the pipeline's argument ``max_sequence_length``.
    start_index : int or None
        Position of start-of-text. None if the text encoder has no such token (T5).
    ends : tuple of (int, int or None)
        Ranges of the positions of end-of-text and padding, as pairs (start, end). The position `end` does not belong to
        the range. If `end` is None, the range goes to the last position. An empty tuple stands for the usual case: one
        range from `end_index` to the last position. There are two ranges if two text encoders read the prompt (CLIP and
        T5 in Stable Diffusion 3), or if padding precedes the text.
    borders : tuple of int
        Character positions in `text` at which a bracket split a word. A bracket may split words only in scripts without
        spaces between words, such as Chinese. In all other scripts, `borders` is an empty tuple.

    Examples
    --------
    Start-of-text is at position 0, so "bird", the seventh word, is at position 7:

    >>> import elakit
    >>> prompt = elakit.parse("a [red car] and a [blue bird]", elakit.load("picture-world"))
    >>> prompt.text, [entity.label for entity in prompt.entities], prompt.find("bird")
    ('a red car and a blue bird', ['car', 'bird'], (7,))
    """

    text: str
    entities: tuple[Entity, ...]
    tokens: tuple[Token, ...]
    end_index: int
    length: int
    start_index: int | None = 0
    ends: tuple[tuple[int, int | None], ...] = ()
    borders: tuple[int, ...] = ()

    @cached_property
    def words(self) -> tuple[Span, ...]:
        """Words and symbols of the text, as half-open ranges (start, end) of characters.

        `Token.word` is an index into this tuple.
        """
        return split_words(self.text, self.borders)

    @cached_property
    def word_labels(self) -> tuple[str, ...]:
        """Unique labels of the words, in the order of `words`: "car", or "red#1" and "red#2" if a word occurs twice."""
        return label_words(self.text, self.words)

    def end_positions(self, length: int | None = None) -> tuple[int, ...]:
        """Return the positions of end-of-text and padding.

        Parameters
        ----------
        length : int, optional
            Number of text positions in a run, including padding. Default: the attribute `length`. Give the number if
            the pipeline was called with another ``max_sequence_length`` than its default.

        Returns
        -------
        tuple of int
            Positions, counted from 0.

        Examples
        --------
        The last three of six positions are end-of-text and padding:

        >>> Prompt("a car", (), (), end_index=3, length=6).end_positions()
        (3, 4, 5)

        There are two ranges if two text encoders read the prompt. Here, the second range begins at position 9 and ends
        with the last of ten positions:

        >>> prompt = Prompt("a car", (), (), end_index=3, length=12, ends=((3, 6), (9, None)))
        >>> prompt.end_positions(length=10)
        (3, 4, 5, 9)
        """
        length = self.length if length is None else length
        ranges = self.ends or ((self.end_index, None),)
        return tuple(i for first, past in ranges for i in range(first, length if past is None else min(past, length)))

    def find(self, which: str | int | Entity) -> tuple[int, ...]:
        """Return the positions of the tokens of a word, an entity or a phrase.

        Parameters
        ----------
        which : str, int or Entity
            Any of the following, in upper or lower case:

            * a word, such as "car", or consecutive words, such as "red car";
            * the label of a word, such as "red#2";
            * the label of a token, such as "giraffe/1" or "car@t5";
            * an `Entity` of this prompt, or the label of an entity; both stand for the noun of the entity;
            * a position, counted from 0.

        Returns
        -------
        tuple of int
            Positions of the tokens among all text positions that the denoiser attends to. If two text encoders read the
            prompt (Stable Diffusion 3), a word has tokens in both sequences.

        Raises
        ------
        PromptError
            Raised when the prompt contains no match or several matches. Also raised when a position is outside the
            sequence.

        Examples
        --------
        The word "red" has one token, at position 1. The word "giraffe" has two tokens, at positions 2 and 3:

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
                raise PromptError(f"{which.text!r} is not an entity of {self.text!r}. {self._choices}")
            return which.token_indices
        if is_whole(which):
            if not 0 <= which < self.length:
                raise PromptError(
                    f"Position {which} is outside the text encoder's sequence. Give a position from 0 to "
                    f"{self.length - 1}."
                )
            return (int(which),)
        if not isinstance(which, str):
            raise PromptError(f"{which!r} is not the name of a token. Give a word, a label, an Entity or a position.")
        wanted = which.strip().lower()
        for token in self.tokens:
            if token.label == wanted:
                return (token.index,)
        if wanted in self.word_labels:
            return self._tokens_of([self.word_labels.index(wanted)], which)
        sought = [wanted[slice(*span)] for span in split_words(wanted)]
        words = [self.text[slice(*span)].lower() for span in self.words]
        starts = [at for at in range(len(words) - len(sought) + 1) if sought and words[at : at + len(sought)] == sought]
        if not starts:
            raise PromptError(f"{which!r} is not in {self.text!r}. {self._choices}")
        if len(starts) > 1:
            labels = " or ".join(repr(self.word_labels[at + len(sought) - 1]) for at in starts)
            raise PromptError(f"{which!r} occurs {len(starts)} times in {self.text!r}: use {labels}.")
        return self._tokens_of(range(starts[0], starts[0] + len(sought)), which)

    def matches(self, pipe: Pipeline | HasTokenizer) -> bool:
        """Return True if a pipeline's tokenizer splits the text into the tokens of this prompt, at the same positions.

        A prompt that was parsed for another family of models usually does not match. For example, the first word is at
        position 0 in T5, but at position 1 in CLIP, where start-of-text precedes it. ``parse(prompt, pipe)`` returns a
        prompt with the same entities and with the token positions of `pipe`.

        Parameters
        ----------
        pipe : diffusers.DiffusionPipeline or object
            A pipeline, or any object with a ``tokenizer``.

        Raises
        ------
        PromptError
            Raised when the text is too long for this pipeline.
        ModelError
            Raised when `pipe` has no tokenizer, or its tokenizer cannot be aligned to words.

        Examples
        --------
        >>> import elakit
        >>> pipe = elakit.load("picture-world")
        >>> elakit.parse("a [red car]", pipe).matches(pipe)
        True
        """
        found = _read_tokens(self.text, self.words, self.word_labels, pipe)
        return _positions(found) == (self.tokens, self.end_index, self.length, self.start_index, self.ends)

    def to_dict(self) -> dict[str, Any]:
        """Return the prompt as lists and dictionaries that JSON can represent."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Prompt:
        """Return the prompt from the dictionary that `to_dict` returned.

        Raises
        ------
        PromptError
            Raised when a field is missing or invalid.
        """
        try:
            return cls(
                text=plain["text"],
                entities=tuple(
                    Entity(**entity | {key: tuple(entity[key]) for key in _SEQUENCES}) for entity in plain["entities"]
                ),
                tokens=tuple(Token(**token) for token in plain["tokens"]),
                end_index=plain["end_index"],
                length=plain["length"],
                start_index=plain.get("start_index", 0),
                ends=tuple((first, past) for first, past in plain.get("ends", ())),
                borders=tuple(plain.get("borders", ())),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PromptError(
                f"The dictionary is not a prompt written by Prompt.to_dict ({type(error).__name__}: {clause(error)}). "
                "Parse the text of the prompt again with elakit.parse."
            ) from error

    @property
    def _choices(self) -> str:
        return f"Choose from the words of the prompt: {', '.join(repr(label) for label in self.word_labels)}."

    def _tokens_of(self, words: Iterable[int], which: str) -> tuple[int, ...]:
        wanted = set(words)
        found = tuple(token.index for token in self.tokens if token.word in wanted)
        if not found:
            raise PromptError(_no_token(which, self.text))
        return found


class _Marked(NamedTuple):
    """An entity whose tokens are not known yet.

    `span` is the half-open range (start, end) of the entity's characters in the text. `noun` is the index of the noun
    in `Prompt.words`, and `attributes` has the indices of the attributes.
    """

    span: Span
    noun: int
    attributes: Sequence[int]


def parse(text: str | Prompt, pipe: Pipeline | HasTokenizer, nlp: Any = None) -> Prompt:
    """Read the entities of a prompt and find their tokens.

    Without brackets, the noun phrases of the text are the entities, and a spaCy model finds them.
    `elakit.english.phrases` lists the exceptions, such as "a photo of" and the setting "in the library".

    With brackets, each pair of brackets encloses one entity, and the text outside of brackets names no entity. The last
    word in a pair of brackets is the noun. The other words are attributes, except articles, "and" and "or". A prompt
    with brackets needs no spaCy model.

    Punctuation, numbers and emoji are neither nouns nor attributes. The same holds for a weight, such as 1.3 in
    "(red car:1.3)".

    Some scripts have no spaces between words (Chinese, Japanese, Thai). In these scripts, brackets may begin and end
    inside a word. The enclosed characters then count as one word, the noun. If spaces divide the enclosed characters,
    each part counts as one word.

    Parameters
    ----------
    text : str or Prompt
        The prompt. A parsed prompt is returned unchanged if it matches `pipe` (see `Prompt.matches`). Any other parsed
        prompt is returned with the same entities and with the tokens of `pipe`.
    pipe : diffusers.DiffusionPipeline or object
        A pipeline, or any object with a ``tokenizer``.
    nlp : spacy.language.Language, optional
        A loaded spaCy pipeline that finds the noun phrases. Default: spaCy's small English model. Unused if the text
        has brackets.

    Returns
    -------
    Prompt

    Raises
    ------
    PromptError
        Raised when the text is empty, is too long for the text encoder, or names no entity. Also raised when brackets
        are unbalanced, nested or empty, or split a word of a script with spaces. Also raised when a text without
        brackets has letters that are not Latin, and `nlp` is not given. Also raised when the tokenizer has no token for
        a noun. Also raised when the text contains a special token, an unpaired surrogate, or a textual inversion with
        several vectors.
    ModelError
        Raised when `pipe` has no tokenizer, or when a text without brackets needs a spaCy model and none is installed.
        Also raised when the tokenizer cannot be aligned to words, or has no maximum length.

    Examples
    --------
    The tokenizer of this example has start-of-text at position 0, then one token per word, then end-of-text:

    >>> from types import SimpleNamespace
    >>> class OneTokenPerWord:  # a stand-in for a pipeline's tokenizer
    ...     model_max_length = 12
    ...     def __call__(self, text, add_special_tokens=True, **options):
    ...         ids = [len(word) for word in text.split()]
    ...         return {"input_ids": [0, *ids, 1] if add_special_tokens else ids}
    >>> pipe = SimpleNamespace(tokenizer=OneTokenPerWord())
    >>> prompt = parse("a [red car] and a [red dog]", pipe)
    >>> dog = prompt.entities[1]
    >>> dog.noun, dog.attributes, dog.token_indices, dog.attribute_indices
    ('dog', ('red',), (7,), (6,))
    >>> prompt.find("red#1"), prompt.find("red dog"), prompt.end_index
    ((2,), (6, 7), 8)
    """
    if isinstance(text, Prompt):
        return text if text.matches(pipe) else _for_pipeline(text, pipe)
    if not isinstance(text, str):
        raise PromptError(f"The prompt {text!r} has type {type(text).__name__}. Give a string, or an elakit.Prompt.")
    plain, brackets = _read_brackets(text)
    borders = tuple(sorted({at for span, _ in brackets for at in span if may_split(plain, at)}))
    words = split_words(plain, borders)
    labels = label_words(plain, words)
    found = _read_tokens(plain, words, labels, pipe)
    if brackets:
        marked = [_in_bracket(plain, words, span, at) for span, at in brackets]
    else:
        marked = _in_english(plain, words, nlp)
    if not marked:
        raise PromptError(f"No entity found in {text!r}. {_BRACKETS}")
    tokens, end_index, length, start_index, ends = _positions(found)
    of_word = _tokens_by_word(tokens)
    return Prompt(
        text=plain,
        entities=tuple(_entity(plain, words, labels, of_word, one) for one in marked),
        tokens=tokens,
        end_index=end_index,
        length=length,
        start_index=start_index,
        ends=ends,
        borders=borders,
    )


def _for_pipeline(prompt: Prompt, pipe: Pipeline | HasTokenizer) -> Prompt:
    """Return a `Prompt` with the text and the entities of `prompt`, but with the tokens of another pipeline."""
    tokens, end_index, length, start_index, ends = _positions(
        _read_tokens(prompt.text, prompt.words, prompt.word_labels, pipe)
    )
    word = {token.index: token.word for token in prompt.tokens}
    of_word = _tokens_by_word(tokens)

    def again(indices: Iterable[int]) -> tuple[int, ...]:
        words = dict.fromkeys(word[index] for index in indices)
        return tuple(sorted(index for one in words for index in of_word.get(one, ())))

    entities = tuple(
        replace(
            entity,
            token_indices=again(entity.token_indices),
            attribute_indices=again(entity.attribute_indices),
        )
        for entity in prompt.entities
    )
    if lost := [entity.noun for entity in entities if not entity.token_indices]:
        raise PromptError(_no_token(lost[0], prompt.text))
    return replace(
        prompt,
        entities=entities,
        tokens=tokens,
        end_index=end_index,
        length=length,
        start_index=start_index,
        ends=ends,
    )


def _read_tokens(text: str, words: Sequence[Span], labels: Sequence[str], pipe: Pipeline | HasTokenizer) -> Tokens:
    sequences = _sequences(pipe)
    for sequence in sequences:
        _check_text(text, pipe, sequence.tokenizer)
    return tokenize(text, words, labels, sequences)


def _positions(
    found: Tokens,
) -> tuple[tuple[Token, ...], int, int, int | None, tuple[tuple[int, int | None], ...]]:
    """Convert the result of `tokenize` to attributes of `Prompt`: tokens, end_index, length, start_index, ends."""
    ends = found.ends if len(found.ends) > 1 else ()
    return found.tokens, found.ends[0][0], found.length, found.start, ends


def _tokens_by_word(tokens: Iterable[Token]) -> dict[int, list[int]]:
    of_word: dict[int, list[int]] = {}
    for token in tokens:
        of_word.setdefault(token.word, []).append(token.index)
    return of_word


def _sequences(pipe: Pipeline | HasTokenizer) -> tuple[TextSequence, ...]:
    """Return the token sequences that a pipeline's denoiser attends to."""
    tokenizer = getattr(pipe, "tokenizer", None)
    encoder = getattr(pipe, "text_encoder", None)
    other = getattr(pipe, "unet", None) is not None and encoder is not None and "CLIP" not in type(encoder).__name__
    if getattr(pipe, "transformer", None) is not None or other or (tokenizer is None and hasattr(pipe, "tokenizer_2")):
        from elakit.models import adapter_for  # a slow import that a CLIP prompt does not need

        return adapter_for(cast(Pipeline, pipe)).text()  # which refuses anything else
    if tokenizer is None:
        raise ModelError(
            f"{type(pipe).__name__} has no tokenizer. Pass a text-to-image pipeline, such as "
            'elakit.load("picture-world").'
        )
    return (TextSequence(name="clip", tokenizer=tokenizer, offset=0, length=encoder_length(pipe, tokenizer)),)


def _check_text(text: str, pipe: Pipeline | HasTokenizer, tokenizer: Any) -> None:
    if not text.strip():
        raise PromptError(f'The prompt is empty: {text!r}. Describe an image, such as "a red car and a blue bird".')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"Character {error.start + 1} of {text!r} is an unpaired surrogate, which no text encoder reads: remove it."
        ) from error
    for name in ("bos_token", "eos_token"):
        special = getattr(tokenizer, name, None)
        if special and special in text:
            raise PromptError(
                f"{text!r} contains {special!r}, which the text encoder reads as the start or end of the prompt: "
                "remove it."
            )
    # A textual inversion with several vectors makes the pipeline encode a text other than this one.
    expand = getattr(pipe, "maybe_convert_prompt", None)
    if callable(expand) and expand(text, tokenizer) != text:
        raise PromptError(
            f"{text!r} uses a textual inversion with several vectors, which elakit does not support yet. Use a textual "
            "inversion with one vector."
        )


def _read_brackets(text: str) -> tuple[str, list[tuple[Span, int]]]:
    """Remove the brackets from a text.

    Returns the text without brackets, and a list with a pair (span, position) for each pair of brackets. `span` is the
    half-open range (start, end) of the enclosed characters in the text without brackets. `position` is the position of
    the opening bracket in the original text, counted from 1.
    """
    plain: list[str] = []
    found: list[tuple[Span, int]] = []
    opened = None
    for position, character in enumerate(text, start=1):
        if character == "[":
            if opened is not None:
                raise PromptError(
                    f"Bracket at character {position} of {text!r} opens before the bracket at character {opened[1]} "
                    "is closed. Close the first bracket before the second opens."
                )
            opened = (len(plain), position)
        elif character == "]":
            if opened is None:
                raise PromptError(f"Bracket at character {position} of {text!r} has no opening bracket. {_BRACKETS}")
            if not "".join(plain[opened[0] :]).strip():
                raise PromptError(f"Bracket at character {opened[1]} of {text!r} is empty. {_BRACKETS}")
            found.append(((opened[0], len(plain)), opened[1]))
            opened = None
        else:
            plain.append(character)
    if opened is not None:
        raise PromptError(f"Bracket at character {opened[1]} of {text!r} is never closed. {_BRACKETS}")
    return "".join(plain), found


def _in_bracket(text: str, words: Sequence[Span], span: Span, position: int) -> _Marked:
    inside = touching(words, span)
    for word in inside:
        if words[word][0] < span[0] or words[word][1] > span[1]:
            cut = text[slice(*words[word])]
            raise PromptError(f"Bracket at character {position} splits the word {cut!r}: enclose the whole word.")
    named = [word for word in inside if names_something(text[slice(*words[word])])]
    # A weight, "[red car:1.3]" or "[(red car:1.3)]", has no letters and drops out here.
    if not named:
        raise PromptError(f"Bracket at character {position} contains no word: {text[slice(*span)]!r}. {_BRACKETS}")
    *others, noun = named
    return _Marked(span, noun, [word for word in others if text[slice(*words[word])].lower() not in _JOINING])


def _in_english(text: str, words: Sequence[Span], nlp: Any) -> list[_Marked]:
    if nlp is None and (foreign := _not_latin(text)):
        raise PromptError(
            f"The parser reads English only, and {text!r} contains {foreign!r}. Mark the entities with brackets, which "
            "work in every language."
        )
    found = []
    for phrase in phrases((nlp or load_reader())(plain_english(text))):
        naming = touching(words, phrase.noun)
        noun = next((word for word in reversed(naming) if names_something(text[slice(*words[word])])), None)
        if noun is not None:
            # spaCy splits "red-haired", so two of its attributes may be one word here.
            described = dict.fromkeys(word for span in phrase.attributes for word in touching(words, span))
            attributes = [word for word in described if word != noun and names_something(text[slice(*words[word])])]
            found.append(_Marked(_without_markup(text, phrase.span), noun, attributes))
    return found


def _without_markup(text: str, span: Span) -> Span:
    """Correct the span of a noun phrase that ends inside round brackets or inside the name of a textual inversion.

    A span is a range (start, end) of characters. If the phrase has a "(" without a ")", the span is cut to the part
    after the "(". For example, "a (red car" becomes "red car". If the phrase lacks the ">" of a textual inversion, the
    span is extended by this character. For example, "a <cat-toy" becomes "a <cat-toy>".
    """
    first, last = span
    if text[last : last + 1] == ">" and text.rfind("<", first, last) > text.rfind(">", first, last):
        last += 1
    opening = text.rfind("(", first, last)
    if opening < 0 or ")" in text[opening:last]:
        return first, last
    inside = text[opening + 1 : last]
    return last - len(inside.lstrip()), last


def names_something(word: str) -> bool:
    """Return True if a word has a letter, so that it can be a noun or an attribute.

    Examples
    --------
    >>> [names_something(word) for word in ("car", "车", "4x4", "1", "++", "🐸")]
    [True, True, True, False, False, False]
    """
    return any(unicodedata.category(character).startswith("L") for character in word)


def _not_latin(text: str) -> str:
    """Return the first letter of the text that belongs to a script other than Latin; "" if there is none."""
    for character in text:
        if not character.isascii() and unicodedata.category(character).startswith("L"):
            name = unicodedata.name(character, "")
            if "LATIN" not in name and name not in ("FEMININE ORDINAL INDICATOR", "MASCULINE ORDINAL INDICATOR"):
                return character
    return ""


def _no_token(word: str, text: str) -> str:
    return (
        f"The tokenizer has no token of its own for {word!r} in {text!r}. Separate the word from its neighbors with "
        "spaces, or choose another word."
    )


def _entity(
    text: str, words: Sequence[Span], labels: Sequence[str], of_word: Mapping[int, Sequence[int]], marked: _Marked
) -> Entity:
    noun = marked.noun
    if noun not in of_word:
        raise PromptError(_no_token(text[slice(*words[noun])], text))
    return Entity(
        text=" ".join(text[slice(*marked.span)].split()),
        noun=text[slice(*words[noun])],
        attributes=tuple(text[slice(*words[word])] for word in marked.attributes),
        token_indices=tuple(of_word[noun]),
        attribute_indices=tuple(sorted(index for word in set(marked.attributes) for index in of_word.get(word, ()))),
        label=labels[noun],
    )
