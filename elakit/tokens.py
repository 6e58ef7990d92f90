"""The words of a prompt and the tokens that stand for them.

Words are aligned to tokens by the offsets the tokenizer itself reports: it lower-cases, composes accents,
splits rare words and drops spaces, and only its offsets lead back to the text as it was typed.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from elakit.errors import ModelError, PromptError

Span: TypeAlias = tuple[int, int]  # (first, past the last) character

# A word: letters, digits and marks with inner hyphens ("red-haired"), an English ending ("'s"), or signs.
_WORD = re.compile(r"\w+(?:-\w+)*|(?<=\w)['’](?:s|t|re|ve|m|ll|d)\b|[^\w\s]+")


@dataclass(frozen=True)
class Token:
    """One token of a prompt that stands for (a piece of) a word.

    Attributes
    ----------
    index : position in the sequence that the denoiser attends to.
    text : the piece of the prompt it covers.
    label : unique and readable: "car"; "red#2" of a word that occurs more than once; "giraffe/1" of a piece;
        "car@clip" and "car@t5" where the model reads the prompt twice.
    word : which word of the prompt, counted from 0.
    """

    index: int
    text: str
    label: str
    word: int


@dataclass(frozen=True)
class TextSequence:
    """One sequence of tokens that the denoiser attends to: most models have one, Stable Diffusion 3 has two.

    Attributes
    ----------
    name : "clip" or "t5".
    tokenizer : what cuts the text into tokens.
    offset : position of its first token among those that the denoiser attends to.
    length : positions it takes, padding included.
    read : the text as the pipeline gives it to the tokenizer, character for character (PixArt lowers it).
    """

    name: str
    tokenizer: Any
    offset: int
    length: int
    read: Callable[[str], str] = str


def split_words(text: str) -> tuple[Span, ...]:
    """Return the (first, past the last) character of each word; signs between words count as words.

    Examples
    --------
    >>> text = "A red-haired girl's car!"
    >>> [text[first:last] for first, last in split_words(text)]
    ['A', 'red-haired', 'girl', "'s", 'car', '!']
    """
    # To Python a combining accent or vowel sign is no part of a word; here it goes with what it stands on.
    shown: list[str] = []
    for character in text:
        if unicodedata.category(character).startswith("M"):
            character = "." if not shown or shown[-1].isspace() else shown[-1]
        elif "\x1c" <= character <= "\x1f":
            character = "."  # space to Python, not to tokenizers
        shown.append(character)
    return tuple(match.span() for match in _WORD.finditer("".join(shown)))


def label_words(text: str, words: Sequence[Span]) -> tuple[str, ...]:
    """Return a label for each word that no other has: "car", but "red#1" and "red#2"."""
    plain = [text[slice(*span)].lower() for span in words]
    total, seen = Counter(plain), Counter[str]()
    labels = []
    for word in plain:
        seen[word] += 1
        labels.append(f"{word}#{seen[word]}" if total[word] > 1 else word)
    return tuple(labels)


def touching(words: Sequence[Span], span: Span) -> list[int]:
    """Return which words have a character in a span."""
    return [at for at, (first, last) in enumerate(words) if first < span[1] and last > span[0]]


@dataclass(frozen=True)
class Tokens:
    """The tokens of a prompt, in all the sequences that the denoiser attends to.

    Attributes
    ----------
    tokens : those of words, by position.
    start : position of start-of-text; None where the sequence has none (T5).
    ends : of each sequence the positions from end-of-text on, as (first, past the last); None: to the end of the text.
    length : positions of all sequences.
    """

    tokens: tuple[Token, ...]
    start: int | None
    ends: tuple[tuple[int, int | None], ...]
    length: int


def tokenize(text: str, words: Sequence[Span], labels: Sequence[str], sequences: Sequence[TextSequence]) -> Tokens:
    """Find the tokens of all words.

    With one sequence tokens are labeled as their words, with several also by the sequence: "car@clip", "car@t5".

    Raises
    ------
    PromptError
        There are more tokens than the encoder takes; of several encoders, than any takes (those that take fewer see
        the beginning of the prompt only).
    ModelError
        The tokenizer's pieces cannot be aligned to words.
    """
    tokens: list[Token] = []
    ends: list[tuple[int, int | None]] = []
    start = None
    roomiest = max(sequences, key=lambda sequence: sequence.length)
    for nth, sequence in enumerate(sequences):
        seen = sequence.read(text)
        total, pieces = _align_by_offsets(seen, words, sequence.tokenizer) or _align_by_words(
            seen, words, sequence.tokenizer
        )
        closing = total - 1 - pieces[-1][0]  # end-of-text
        if total > sequence.length and sequence is roomiest:
            special = total - len(pieces)
            # What is cut is the end of the text; the last positions are kept for the end-of-text.
            lost = sorted({word for index, word, _ in pieces if index >= sequence.length - closing})
            words_lost = text[words[lost[0]][0] : words[lost[-1]][1]]
            raise PromptError(
                f"The prompt has {len(pieces)} tokens, the encoder takes {sequence.length - special} "
                f"({sequence.length} with its {special} special ones). It would lose {words_lost!r}: shorten the "
                "prompt."
            )
        pieces = [piece for piece in pieces if piece[0] < sequence.length - closing]
        if nth == 0 and _has_start(sequence.tokenizer, seen):
            start = sequence.offset
        last = nth == len(sequences) - 1
        ends.append((sequence.offset + pieces[-1][0] + 1, None if last else sequence.offset + sequence.length))
        suffix = f"@{sequence.name}" if len(sequences) > 1 else ""
        of_word, done = Counter(word for _, word, _ in pieces), Counter[int]()
        for index, word, piece in pieces:
            done[word] += 1
            label = labels[word] if of_word[word] == 1 else f"{labels[word]}/{done[word]}"
            tokens.append(Token(sequence.offset + index, piece, label + suffix, word))
    return Tokens(tuple(tokens), start, tuple(ends), sequences[-1].offset + sequences[-1].length)


def _has_start(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer opens each text with a token of its own."""
    return bool(
        list(tokenizer(text, truncation=False, padding=False, verbose=False)["input_ids"])[:1]
        != list(tokenizer(text, add_special_tokens=False, truncation=False, padding=False, verbose=False)["input_ids"])[
            :1
        ]
    )


def _align_by_offsets(
    text: str, words: Sequence[Span], tokenizer: Any
) -> tuple[int, list[tuple[int, int, str]]] | None:
    """Return the number of tokens and (index, word, piece) of those of words; None without good offsets."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    encoded = tokenizer(
        text,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        truncation=False,
        padding=False,
        verbose=False,
    )
    special, offsets = encoded["special_tokens_mask"], encoded["offset_mapping"]
    pieces: list[tuple[int, int, str]] = []
    covered: set[int] = set()
    for index, (first, last) in enumerate(offsets):
        if special[index]:
            continue
        # A piece over two words (CLIP reads "'s" in "'small'") goes with the one it has most of, or the last.
        shared = {at: min(last, words[at][1]) - max(first, words[at][0]) for at in touching(words, (first, last))}
        if not shared:
            if text[first:last].strip():
                return None
            continue  # T5's mark of a space, where the word's first piece does not have it
        covered.update(shared)
        pieces.append((index, max(shared, key=lambda at: (shared[at], at)), text[first:last]))
    return (len(offsets), pieces) if len(covered) == len(words) else None


def _align_by_words(text: str, words: Sequence[Span], tokenizer: Any) -> tuple[int, list[tuple[int, int, str]]]:
    """As `_align_by_offsets`, for tokenizers that report no offsets: by encoding word after word."""
    whole = list(tokenizer(text, truncation=False, padding=False, verbose=False)["input_ids"])
    alone: list[tuple[int, int]] = []
    for at, (first, last) in enumerate(words):
        ids = tokenizer(text[first:last], add_special_tokens=False, truncation=False, padding=False, verbose=False)[
            "input_ids"
        ]
        alone.extend((at, one) for one in ids)
    bare = [one for _, one in alone]
    start = next((at for at in range(len(whole) - len(bare) + 1) if bare and whole[at : at + len(bare)] == bare), None)
    if start is None:
        raise ModelError(
            f"{type(tokenizer).__name__} reports no usable offsets and splits {text!r} unlike its words one "
            "by one, so tokens cannot be told apart. Use the fast tokenizer of this model."
        )
    several = Counter(at for at, _ in alone)
    name = getattr(tokenizer, "convert_ids_to_tokens", None)
    return len(whole), [
        (
            start + nth,
            at,
            str(name(one)).replace("</w>", "") if name and several[at] > 1 else text[slice(*words[at])],
        )
        for nth, (at, one) in enumerate(alone)
    ]


def encoder_length(pipe: Any, tokenizer: Any) -> int:
    """Positions that a pipeline's text encoder takes, as its tokenizer or configuration tells."""
    length = getattr(tokenizer, "model_max_length", None)
    if length is None or length > 10**6:  # what tokenizers say when they know no limit
        length = getattr(getattr(getattr(pipe, "text_encoder", None), "config", None), "max_position_embeddings", None)
    if length is None:
        raise ModelError("The tokenizer tells no length: set pipe.tokenizer.model_max_length, 77 for CLIP.")
    return int(length)
