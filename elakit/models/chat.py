"""Text sequences of language models: a prompt inside a chat template."""

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
    specials: bool | None = None,
    padded: bool = True,
) -> TextSequence:
    """Token sequence of a prompt inside a template.

    Parameters
    ----------
    name : str
        Name of the sequence.
    tokenizer : transformers tokenizer or processor
    render : callable
        ``render(prompt)`` gives the text that is tokenized.
    length : int
        Number of positions, padding included.
    dropped : int
        Number of leading tokens whose states the pipeline discards.
    specials : bool, optional
        Whether the tokenizer adds special tokens to the text; default: True.
    padded : bool
        Whether the padding reaches the denoiser; if so, its side matters.

    Raises
    ------
    ModelError
        When the template changes or repeats the prompt.
    """
    parts = render(_MARK).split(_MARK)
    if len(parts) != 2:
        raise ModelError(
            f"The chat template of {type(tokenizer).__name__} contains the prompt {len(parts) - 1} times instead of "
            "once, so its tokens cannot be found. Use the tokenizer that belongs to the model."
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
        specials=True if specials is None else specials,
    )
