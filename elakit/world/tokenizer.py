"""Tokenizer of picture-world, the built-in model: CLIP's byte-pair encoding, learned from a short list of words.

Each word in the list is one token. Any other word is split into smaller pieces, down to single bytes.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import transformers
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from elakit.world.vocabulary import COLORS, NOUNS

START, END = "<|startoftext|>", "<|endoftext|>"
# Everyday words beside those of the world, so that other prompts do not fall apart into letters.
_OTHER_WORDS = (
    "a an and the with without of in on at by to from near next beside under over above below behind front between "
    "left right top bottom one two three is are that which who it its his her no not image photo drawing small big "
    "large tiny wearing holding sitting standing garden library table street forest room sky grass tree house"
)


def train_tokenizer(vocabulary: int, positions: int) -> CLIPTokenizer:
    """Train a CLIP tokenizer on the words of picture-world and a few everyday words.

    If the vocabulary is large enough, each of these words is one token. Any other word is split into smaller pieces.

    Parameters
    ----------
    vocabulary : int
        Largest number of tokens in the vocabulary. Each of the 256 bytes takes two tokens: one within a word and one at
        the end of a word.
    positions : int
        Largest number of tokens of an encoded prompt, including start-of-text and end-of-text (``model_max_length``).

    Returns
    -------
    transformers.CLIPTokenizer

    Examples
    --------
    The tokenizer ignores upper case, and ``</w>`` marks the end of a word:

    >>> tokenizer = train_tokenizer(1024, 24)
    >>> tokenizer.tokenize("a Red car")
    ['a</w>', 'red</w>', 'car</w>']
    >>> len(tokenizer("zyx")["input_ids"]) > 3  # start-of-text, more than one piece, end-of-text
    True
    """
    merges = _merges(dict.fromkeys((*NOUNS, *COLORS, *_OTHER_WORDS.split())), vocabulary - 514)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return clip_tokenizer(vocab, merges, model_max_length=positions)


def clip_tokenizer(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], **options: Any) -> CLIPTokenizer:
    """Build a CLIP tokenizer from a vocabulary and its merges, with any release of transformers.

    Parameters
    ----------
    vocabulary : mapping of str to int
        Id of each token.
    merges : sequence of pairs of str
        Byte-pair merges, in the order in which they are applied.
    **options
        Further arguments of `CLIPTokenizer`, such as ``model_max_length``.

    Returns
    -------
    transformers.CLIPTokenizer

    Examples
    --------
    ``</w>`` marks the end of a word. The prompt "a" becomes start-of-text, "a" and end-of-text:

    >>> tokens = {"a</w>": 0, "b</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}
    >>> clip_tokenizer(tokens, [])("a").input_ids
    [2, 0, 3]
    """
    if int(transformers.__version__.partition(".")[0]) >= 5:
        return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), **options)
    with tempfile.TemporaryDirectory() as folder:  # the class of transformers 4 reads files only
        files = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        files[0].write_text(json.dumps(dict(vocabulary)), encoding="utf-8")
        # it skips the first line and the one after the last merge
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
        files[1].write_text("\n".join(lines), encoding="utf-8")
        return CLIPTokenizer(str(files[0]), str(files[1]), **options)


def _merges(words: Iterable[str], limit: int) -> list[tuple[str, str]]:
    """Learn at most `limit` byte-pair merges from words.

    Each merge joins the most frequent pair of neighboring pieces. If several pairs are equally frequent, the
    alphabetically first pair is joined.

    The trainer of the package `tokenizers` breaks ties by the order of a hash map. The token ids of this trainer
    therefore differ from run to run. A model whose training is interrupted and resumed needs the same token ids each
    time.
    """
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while len(merges) < limit:
        counts = Counter(pair for word in spelled for pair in pairwise(word))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spelled = [_merge(word, best) for word in spelled]
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged
