"""Words of a prompt and the tokens that represent them.

Words are aligned to tokens by the character offsets that the tokenizer reports. Tokenizers lowercase, compose accents,
split rare words and drop spaces, so only the offsets lead back to the text as it was typed.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Any, Literal, TypeAlias

from elakit.errors import ModelError, PromptError
from elakit.numbering import number_of
from elakit.pipeline import HasTokenizer, Pipeline

Span: TypeAlias = tuple[int, int]  # start and end (excluded) in characters

# Labels with a meaning of their own in recordings and measures. A word that is spelled like one is always numbered.
RESERVED_LABELS = frozenset({"background", "<start>", "<end>", "<eot>"})

_SPECIAL_TITLES = {"<start>": "start-of-text", "<end>": "end-of-text and padding", "<eot>": "end-of-text"}

# A textual inversion ("<cat-toy>"), a word of letters, digits and marks with inner hyphens ("red-haired"), an English
# ending ("'s"), or a run of symbols.
_WORD = re.compile(r"<[^\W\d]\w*(?:-\w+)*>|\w+(?:-\w+)*|(?<=\w)['’](?:s|t|re|ve|m|ll|d)\b|[^\w\s]+")

# Scripts that write words without spaces between them, and Hangul, whose particles follow a noun without a space:
# Thai and Lao, Tibetan and Myanmar, Khmer, kana, Han, Hangul, halfwidth kana, supplementary Han.
_UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uac00-\ud7a3\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)


@dataclass(frozen=True)
class Token:
    """One token of a prompt. The token represents a word or a piece of a word.

    Attributes
    ----------
    index : int
        Position among all text positions that the denoiser attends to, counted from 0.
    text : str
        The part of the prompt that the token covers.
    label : str
        Unique name of the token, such as "car". "red#2" is the second occurrence of the word "red". "giraffe/1" is the
        first of several tokens of the word "giraffe". "car@clip" and "car@t5" are the tokens of the word "car" for two
        text encoders.
    word : int
        Index of the word in `Prompt.words`.

    Examples
    --------
    Start-of-text has the index 0 and "a" has the index 1, so "red" has the index 2:

    >>> import elakit
    >>> elakit.parse("a [red car]", elakit.load("picture-world")).tokens[1]
    Token(index=2, text='red', label='red', word=1)
    """

    index: int
    text: str
    label: str
    word: int


@dataclass(frozen=True)
class TextSequence:
    """One sequence of tokens that the denoiser attends to; most models have one, Stable Diffusion 3 has two.

    Attributes
    ----------
    name : str
        Name of the sequence, such as "clip" or "t5".
    tokenizer : transformers tokenizer
        Tokenizer of this sequence.
    offset : int
        Position of the first token of this sequence among the positions of all sequences; 0 for the first sequence.
    length : int
        Number of positions of this sequence, including padding.
    read : callable
        Function that changes the prompt in the same way as the pipeline, before the prompt is tokenized. For example,
        PixArt converts the prompt to lower case. The function must keep the number of characters. By default, the
        prompt is not changed.
    before, after : str
        Texts that the pipeline puts before and after the prompt, such as the two parts of a chat template.
    dropped : int
        Number of tokens that the pipeline removes from the beginning of the sequence after encoding, such as the first
        tokens of a chat template. These tokens have no position.
    padding : {"right", "left"}
        Side on which the tokenizer adds padding. Padding on the left shifts the tokens. The positions of the tokens
        are then valid only for runs with the same number of positions.
    multiple : int or None
        Used only for padding on the left: the sequence is padded to the next multiple of this number of tokens. None
        means that the sequence is padded to `length`.
    specials : bool
        True if the tokenizer adds special tokens, such as start-of-text. False if the chat template contains the
        special tokens.
    """

    name: str
    tokenizer: Any
    offset: int
    length: int
    read: Callable[[str], str] = str
    before: str = ""
    after: str = ""
    dropped: int = 0
    padding: Literal["left", "right"] = "right"
    multiple: int | None = None
    specials: bool = True

    def tokenized(self, text: str, **options: Any) -> Any:
        """Return the tokenizer's output for a text, without truncation and padding.

        `options` are further keyword arguments of the tokenizer.
        """
        options = {"add_special_tokens": self.specials} | options
        return self.tokenizer(text, truncation=False, padding=False, verbose=False, **options)


def split_words(text: str, borders: Iterable[int] = ()) -> tuple[Span, ...]:
    """Split a text into words and groups of symbols.

    A word consists of letters and digits, and of hyphens between them ("red-haired"). An English ending with its
    apostrophe ("'s", "'t", "'re") is a word of its own. The name of a textual inversion ("<cat-toy>") is one word.
    Adjacent punctuation marks and other symbols ("?!") are one group.

    Parameters
    ----------
    text : str
    borders : iterable of int
        Positions of characters before which a word is split, too. `elakit.parse` sets borders at brackets inside words,
        in scripts that write words without spaces, such as Chinese.

    Returns
    -------
    tuple of (int, int)
        One pair (start, end) per word or group of symbols. The word is ``text[start:end]``.

    Examples
    --------
    >>> text = "A red-haired girl's car!"
    >>> [text[first:last] for first, last in split_words(text)]
    ['A', 'red-haired', 'girl', "'s", 'car', '!']

    Without a border, the four characters of this Chinese text would be one word:

    >>> split_words("一辆汽车", borders=[2])
    ((0, 2), (2, 4))
    """
    # Python does not count combining accents and vowel signs as word characters; here they belong to their base.
    shown: list[str] = []
    for character in text:
        if unicodedata.category(character).startswith("M"):
            character = "." if not shown or shown[-1].isspace() else shown[-1]
        elif "\x1c" <= character <= "\x1f":
            character = "."  # whitespace in Python, but not in tokenizers
        shown.append(character)
    spans = [match.span() for match in _WORD.finditer("".join(shown))]
    cuts = sorted(set(borders))
    if not cuts:
        return tuple(spans)
    pieces: list[Span] = []
    for first, last in spans:
        inner = cuts[bisect_right(cuts, first) : bisect_left(cuts, last)]
        edges = [first, *inner, last]
        pieces.extend(pairwise(edges))
    return tuple(pieces)


def may_split(text: str, at: int) -> bool:
    """Return True if a bracket before the character at position `at` may split a word.

    Brackets may split words only in scripts that write words without spaces, such as Chinese.

    Examples
    --------
    A bracket may split the Chinese text, which means "red car", but not the English word:

    >>> may_split("红色汽车", 2), may_split("bluebird", 4)
    (True, False)
    """
    if not 0 < at < len(text) or unicodedata.category(text[at]).startswith("M"):
        return False
    return bool(_UNSPACED.match(text[at - 1]) or _UNSPACED.match(text[at]))


def word_of(label: str) -> str:
    """Return a label without "#" and the number, such as the word "red" for the label "red#2".

    Examples
    --------
    >>> word_of("red#2"), word_of("car")
    ('red', 'car')
    """
    return label.partition("#")[0]


def token_title(label: str) -> str:
    """Name of a token for sentences and figures: the label of a word, or the name of a special token.

    Labels of special tokens have angle brackets. "<start>" is start-of-text. "<end>" is end-of-text and all padding,
    whose attention is summed. "<eot>" is end-of-text alone, and "<pad/3>" is the third padding position. A text may
    have two ranges of end-of-text and padding (see `Prompt.ends`). In the second range, the labels are "<eot#2>" and
    "<pad#2/3>".

    Parameters
    ----------
    label : str
        Label along the dimension `token` of a recording.

    Examples
    --------
    >>> token_title("red#2"), token_title("<start>")
    ('red#2', 'start-of-text')
    >>> token_title("<end>"), token_title("<eot>"), token_title("<pad/3>")
    ('end-of-text and padding', 'end-of-text', 'padding 3')
    >>> token_title("<eot#2>"), token_title("<pad#2/3>")
    ('end-of-text of range 2', 'padding 3 of range 2')
    """
    if special := re.fullmatch(r"<(?:pad(?:#(\d+))?/(\d+)|eot#(\d+))>", label):
        pad_range, position, eot_range = special.groups()
        title = f"padding {position}" if position else "end-of-text"
        return f"{title} of range {pad_range or eot_range}" if pad_range or eot_range else title
    return _SPECIAL_TITLES.get(label, label)


def sequence_of(label: str) -> str:
    """Return the name of a token's sequence, such as "t5". The label of the token contains the name after "@".

    If a model has only one token sequence, labels contain no name, and the result is an empty string.

    Examples
    --------
    The label "@/1" belongs to the first token of the symbol "@" in a prompt, and contains no name:

    >>> sequence_of("car@t5"), sequence_of("giraffe/1@clip"), sequence_of("car"), sequence_of("@/1")
    ('t5', 'clip', '', '')
    """
    suffix = re.search(r"@(\w+)$", label)
    return suffix[1] if suffix else ""


def label_words(text: str, words: Sequence[Span]) -> tuple[str, ...]:
    """Return a unique label for each word, in lower case: "car", or "red#1" and "red#2" if the word occurs twice.

    `words` are the positions of the words in `text`, as `split_words` returns them. Some words, such as "background",
    are also labels with another meaning in recordings and measures. Such a word is numbered even if it occurs once.

    Examples
    --------
    >>> text = "a red car, a red background"
    >>> label_words(text, split_words(text))
    ('a#1', 'red#1', 'car', ',', 'a#2', 'red#2', 'background#1')
    """
    plain = [text[slice(*span)].lower() for span in words]
    total, seen = Counter(plain), Counter[str]()
    labels = []
    for word in plain:
        seen[word] += 1
        numbered = total[word] > 1 or word in RESERVED_LABELS
        labels.append(f"{word}#{seen[word]}" if numbered else word)
    return tuple(labels)


def touching(words: Sequence[Span], span: Span) -> list[int]:
    """Return the indices of the words that overlap a given part of a text.

    Parameters
    ----------
    words : sequence of (int, int)
        Start and end of each word in the text, with the end excluded. Words do not overlap, and are in order.
    span : (int, int)
        Start and end of the part of the text, with the end excluded.
    """
    start = bisect_right(words, span[0], key=itemgetter(1))
    stop = bisect_left(words, span[1], key=itemgetter(0))
    return list(range(start, stop))


@dataclass(frozen=True)
class Tokens:
    """Tokens of a prompt in all sequences that the denoiser attends to.

    Attributes
    ----------
    tokens : tuple of Token
        Tokens that represent words, without special tokens, in the order of their positions.
    start : int or None
        Position of start-of-text in the first sequence; None if the first sequence has no start-of-text, as with T5.
    ends : tuple of (int, int or None)
        Ranges of positions that contain end-of-text and padding, in all sequences. A range is a pair (start, stop),
        and excludes the position "stop". If "stop" is None, the range extends to the last position.
    length : int
        Total number of positions of all sequences.
    """

    tokens: tuple[Token, ...]
    start: int | None
    ends: tuple[tuple[int, int | None], ...]
    length: int


def tokenize(text: str, words: Sequence[Span], labels: Sequence[str], sequences: Sequence[TextSequence]) -> Tokens:
    """Find the tokens of all words of a prompt.

    The label of a token begins with the label of the token's word. If the word has several tokens, "/1", "/2" and so on
    follow. If there are several sequences, the name of the sequence follows: "car@clip", "car@t5".

    Parameters
    ----------
    text : str
        The prompt, without brackets.
    words : sequence of (int, int)
        Words of the text, as `split_words` returns them.
    labels : sequence of str
        Labels of the words, as `label_words` returns them.
    sequences : sequence of TextSequence
        Token sequences that the denoiser attends to, such as the sequences of CLIP and T5.

    Returns
    -------
    Tokens

    Raises
    ------
    PromptError
        Raised when the prompt does not fit into the longest sequence. A shorter sequence may contain only the beginning
        of the prompt, without an error.
    ModelError
        Raised when tokens cannot be aligned to words.
    """
    tokens: list[Token] = []
    ends: list[tuple[int, int | None]] = []
    start = None
    longest = max(sequences, key=lambda sequence: sequence.length)
    for nth, sequence in enumerate(sequences):
        read = sequence.before + sequence.read(text) + sequence.after
        spans = [(first + len(sequence.before), last + len(sequence.before)) for first, last in words]
        total, pieces = _align_by_offsets(read, spans, sequence) or _align_by_words(read, spans, sequence)
        total -= sequence.dropped
        pieces = [(index - sequence.dropped, word, piece) for index, word, piece in pieces]
        closing = total - 1 - pieces[-1][0]  # number of end-of-text tokens
        if total > sequence.length and sequence is longest:
            special = total - len(pieces)
            # Truncation removes the end of the text; the last positions remain reserved for end-of-text.
            lost = sorted({word for index, word, _ in pieces if index >= sequence.length - closing})
            words_lost = text[words[lost[0]][0] : words[lost[-1]][1]]
            raise PromptError(
                f"The prompt has {len(pieces)} tokens, but the text encoder takes {sequence.length - special} "
                f"({sequence.length} including {number_of(special, 'special token')}). The prompt would lose "
                f"{_shortened(words_lost)!r}. Shorten the prompt."
            )
        pieces = [piece for piece in pieces if piece[0] < sequence.length - closing]
        shift = _left_padding(sequence, total)
        pieces = [(index + shift, word, piece) for index, word, piece in pieces]
        if nth == 0 and _has_start(sequence, read):
            start = sequence.offset
        last = nth == len(sequences) - 1
        ends.append((sequence.offset + pieces[-1][0] + 1, None if last else sequence.offset + sequence.length))
        if shift:
            ends.append((sequence.offset, sequence.offset + shift))
        suffix = f"@{sequence.name}" if len(sequences) > 1 else ""
        of_word, done = Counter(word for _, word, _ in pieces), Counter[int]()
        for index, word, piece in pieces:
            done[word] += 1
            label = labels[word] if of_word[word] == 1 else f"{labels[word]}/{done[word]}"
            tokens.append(Token(sequence.offset + index, piece, label + suffix, word))
    return Tokens(tuple(tokens), start, tuple(ends), sequences[-1].offset + sequences[-1].length)


def _left_padding(sequence: TextSequence, total: int) -> int:
    """Return the number of padding tokens that the tokenizer adds before a text.

    `total` is the number of tokens of the text without padding. The result is 0 if padding is added on the right.
    """
    if sequence.padding == "right":
        return 0
    return -total % sequence.multiple if sequence.multiple else max(0, sequence.length - total)


def _shortened(text: str, limit: int = 80) -> str:
    """Return a text for an error message, cut after `limit` characters."""
    return text if len(text) <= limit else f"{text[:limit]}…"


def _has_start(sequence: TextSequence, text: str) -> bool:
    """Return True if the tokenizer of the sequence puts a special token, start-of-text, before the text."""
    whole = list(sequence.tokenized(text)["input_ids"])
    bare = list(sequence.tokenized(text, add_special_tokens=False)["input_ids"])
    return whole[:1] != bare[:1]


def _align_by_offsets(
    text: str, words: Sequence[Span], sequence: TextSequence
) -> tuple[int, list[tuple[int, int, str]]] | None:
    """Assign tokens to words by the character offsets that the tokenizer reports.

    Returns the number of all tokens, and a list with one triple per token that belongs to a word. A triple contains the
    index of the token, the index of the word, and the part of the text that the token covers. The result is None if
    the tokenizer reports no usable offsets.
    """
    if not getattr(sequence.tokenizer, "is_fast", False):
        return None
    encoded = sequence.tokenized(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    first_of_prompt, end_of_prompt = len(sequence.before), len(text) - len(sequence.after)
    special, offsets = encoded["special_tokens_mask"], encoded["offset_mapping"]
    pieces: list[tuple[int, int, str]] = []
    covered: set[int] = set()
    for index, (first, last) in enumerate(offsets):
        if special[index] or last <= first_of_prompt or first >= end_of_prompt:
            continue
        # A piece may cover two words (CLIP reads "'s" in "'small'"). It is assigned to the word that it shares most
        # characters with, or to the last of these.
        shared = {at: min(last, words[at][1]) - max(first, words[at][0]) for at in touching(words, (first, last))}
        if not shared:
            if text[first:last].strip():
                return None
            continue  # a space that T5 marks with a token of its own
        covered.update(shared)
        pieces.append((index, max(shared, key=lambda at: (shared[at], at)), text[first:last]))
    return (len(offsets), pieces) if len(covered) == len(words) else None


def _align_by_words(text: str, words: Sequence[Span], sequence: TextSequence) -> tuple[int, list[tuple[int, int, str]]]:
    """Assign tokens to words by encoding each word separately, for tokenizers that report no character offsets.

    Returns the number of all tokens, and a list with one triple per token that belongs to a word. A triple contains the
    index of the token, the index of the word, and the text of the token. A `ModelError` is raised if the tokens of the
    whole text differ from the tokens of the separate words.
    """
    tokenizer = sequence.tokenizer
    whole = list(sequence.tokenized(text)["input_ids"])
    alone: list[tuple[int, int]] = []
    for at, (first, last) in enumerate(words):
        ids = sequence.tokenized(text[first:last], add_special_tokens=False)["input_ids"]
        alone.extend((at, one) for one in ids)
    bare = [one for _, one in alone]
    starts = range(len(whole) - len(bare) + 1)
    start = next((at for at in starts if bare and whole[at] == bare[0] and whole[at : at + len(bare)] == bare), None)
    if start is None:
        raise ModelError(
            f"The tokens of {_shortened(text)!r} cannot be assigned to words. {type(tokenizer).__name__} reports no "
            "usable character offsets, and it gives other tokens if each word is encoded alone. Load the fast "
            "tokenizer of this model (AutoTokenizer with use_fast=True)."
        )
    several = Counter(at for at, _ in alone)
    name = getattr(tokenizer, "convert_ids_to_tokens", None)
    return len(whole), [
        (start + nth, at, _unmarked(str(name(one))) if name and several[at] > 1 else text[slice(*words[at])])
        for nth, (at, one) in enumerate(alone)
    ]


def _unmarked(piece: str) -> str:
    """Return the text of a token without the marks that the tokenizer adds to pieces of a word.

    CLIP's tokenizer adds "</w>" after the last piece of a word. WordPiece adds "##" before all pieces but the first.
    """
    return piece.removesuffix("</w>").removeprefix("##")


def encoder_length(pipe: Pipeline | HasTokenizer, tokenizer: Any) -> int:
    """Return the largest number of tokens that a pipeline's text encoder can read, including special tokens.

    `tokenizer` is the tokenizer of this text encoder.

    Raises
    ------
    ModelError
        Raised when neither the tokenizer nor the configuration of the text encoder states a length.
    """
    length = getattr(tokenizer, "model_max_length", None)
    if length is None or length > 10**6:  # tokenizers report a huge number if they have no limit
        length = getattr(getattr(getattr(pipe, "text_encoder", None), "config", None), "max_position_embeddings", None)
    if length is None:
        raise ModelError(
            "Neither the tokenizer nor the text encoder's configuration states a maximum length. Set "
            "pipe.tokenizer.model_max_length (77 for CLIP)."
        )
    return int(length)
