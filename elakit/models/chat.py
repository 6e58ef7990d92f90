"""Token sequences of prompts inside a chat template, for text encoders that are language models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from elakit.errors import ModelError
from elakit.tokens import TextSequence

_MARK = "ELAKITPROMPT"  # stands for the prompt while the template is read


def chat_sequence(
    name: str,
    tokenizer: Any,
    render: Callable[[str], str],
    *,
    length: int,
    dropped: int = 0,
    specials: bool = True,
    padded: bool = True,
) -> TextSequence:
    """Token sequence of a prompt inside a chat template.

    Parameters
    ----------
    name : str
        Name of the sequence, such as "chat".
    tokenizer : transformers tokenizer or processor
    render : callable
        Function, ``render(prompt)``, that returns the text to tokenize: the template with the prompt in it.
    length : int
        Largest number of positions that the denoiser sees. Padding counts if ``padded`` is True. The ``dropped``
        tokens never count.
    dropped : int
        Number of leading tokens whose states the pipeline discards.
    specials : bool
        True if the tokenizer adds special tokens to the text.
    padded : bool
        True if the text is padded to ``length`` positions, and the denoiser sees the padding. The tokenizer decides on
        which side it pads.

    Returns
    -------
    TextSequence

    Raises
    ------
    ModelError
        Raised when the template does not contain the prompt exactly once and unchanged.
    """
    parts = render(_MARK).split(_MARK)
    if len(parts) != 2:
        raise ModelError(
            f"The chat template of {type(tokenizer).__name__} contains the prompt {len(parts) - 1} times instead of "
            "once, so the prompt's tokens cannot be found. Use the tokenizer that belongs to the model."
        )
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor of texts and images
    side: Literal["left", "right"] = "left" if padded and tokenizer.padding_side == "left" else "right"
    return TextSequence(
        name=name,
        tokenizer=tokenizer,
        offset=0,
        length=length,
        before=parts[0],
        after=parts[1],
        dropped=dropped,
        padding=side,
        specials=specials,
    )
