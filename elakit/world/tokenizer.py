"""The embedded model's tokenizer: CLIP's byte-pair encoding, learnt from the captions of the world.

Words of the world are one token each; any other text is spelt in smaller pieces, down to bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from elakit.world.vocabulary import COLOURS, NOUNS

START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's way to split a text before merging bytes: contractions, words, single digits, other symbols.
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# Everyday words beside those of the world, so that other prompts do not fall apart into letters.
_OTHER_WORDS = (
    "a an and the with without of in on at by to from near next beside under over above below behind front between "
    "left right top bottom one two three is are that which who it its his her no not picture photo drawing small big "
    "large tiny wearing holding sitting standing garden library table street forest room sky grass tree house"
)


def train_tokenizer(vocabulary: int, positions: int, texts: Iterable[str] = ()) -> CLIPTokenizer:
    """Learn a CLIP tokenizer.

    Parameters
    ----------
    vocabulary : int
        Number of tokens at most; 512 of them spell single bytes.
    positions : int
        Length of an encoded prompt, start and end included.
    texts : iterable of str
        Captions to learn from, beside the world's words.

    Returns
    -------
    transformers.CLIPTokenizer

    Examples
    --------
    >>> tokenizer = train_tokenizer(1024, 24)
    >>> tokenizer.tokenize("a Red car")
    ['a</w>', 'red</w>', 'car</w>']
    >>> len(tokenizer("zyx")["input_ids"]) > 3
    True
    """
    bpe = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=END))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        special_tokens=[],
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(texts), trainer)
    vocab, merges = _complete(bpe, letters)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=positions)


def _corpus(texts: Iterable[str]) -> Iterator[str]:
    for _ in range(100):
        yield " ".join((*NOUNS, *COLOURS, _OTHER_WORDS))
    yield from texts


def _complete(bpe: Tokenizer, letters: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary: every byte, every byte that ends a word, the merges in order, start and end of text."""
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [token for token in ("".join(pair) for pair in merges) if token not in set(tokens)]
    tokens = list(dict.fromkeys(tokens)) + [START, END]
    return {token: i for i, token in enumerate(tokens)}, merges
