"""Phrases of a prompt, each encoded as a separate text, for methods that need a text per entity."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from elakit.english import ARTICLES
from elakit.errors import PromptError, SettingError
from elakit.models import Adapter, Conditioning
from elakit.numbering import number_of
from elakit.prompt import Entity, Prompt, parse
from elakit.tokens import split_words

STATES, MASKS = "encoder_hidden_states", "encoder_attention_mask"  # inputs of the denoiser
_CALL = {STATES: "prompt_embeds", MASKS: "prompt_attention_mask"}  # the same as arguments of the pipeline's call


@dataclass(frozen=True)
class Phrase:
    """Words of an entity, such as "a red car", encoded as a separate text.

    Attributes
    ----------
    positions : tuple of int
        Positions of the words' tokens in the prompt.
    own : tuple of int
        Positions of the same tokens in the separate text.
    states : Tensor, (1, position, channel)
        Text states of the separate text.
    mask : Tensor, (1, position), or None
        Attention mask of the separate text; None if the model takes no mask.
    start : int or None
        Position of start-of-text in the separate text; None if the text has no start-of-text.
    """

    positions: tuple[int, ...]
    own: tuple[int, ...]
    states: Tensor
    mask: Tensor | None
    start: int | None


def check_text(adapter: Adapter, conditioning: Conditioning, who: str) -> None:
    """Check that a model takes the prompt as one sequence of text states, and has only plain cross-attention layers.

    Parameters
    ----------
    adapter : Adapter
        Adapter of the model.
    conditioning : Conditioning
        Prompt in the form that the model takes.
    who : str
        Name of the guidance method that needs this kind of model, for the error message.

    Raises
    ------
    SettingError
        The model takes the prompt in another form, or has layers of another kind, such as joint attention.
    """
    plain = all(layer.kind == "cross" and layer.layout is None for layer in adapter.layers())
    if not plain or STATES not in conditioning.inputs or _CALL[STATES] not in conditioning.call:
        raise SettingError(
            f"{who} works only with plain cross-attention to a single sequence of text states, which {adapter.family} "
            "does not have. Use a model with plain cross-attention (Stable Diffusion 1.x, 2.x, XL, PixArt), or another "
            "method, such as elakit.ELA()."
        )


def phrases(adapter: Adapter, prompt: Prompt) -> list[Phrase]:
    """Encode the words of each entity as a separate text.

    Parameters
    ----------
    adapter : Adapter
    prompt : Prompt

    Returns
    -------
    list of Phrase
        One per entity.

    Raises
    ------
    PromptError
        The tokenizer splits the words of an entity into a different number of tokens than in the prompt.
    """
    return [_phrase(adapter, prompt, entity) for entity in prompt.entities]


def phrase_positions(prompt: Prompt, entity: Entity) -> tuple[int, ...]:
    """Positions of the tokens of an entity's phrase, such as "a red and white car", in the prompt.

    The phrase consists of the entity's first word, its last word, and all words between the two. An article directly
    before the first word also belongs to the phrase, even if the prompt marks the entity without the article, as in
    "a [blue clock]".

    Examples
    --------
    Position 0 is start-of-text, and each word is one token:

    >>> import elakit
    >>> prompt = elakit.parse("a [bear] and a [blue clock]", elakit.load("picture-world"))
    >>> phrase_positions(prompt, prompt.entities[1])
    (4, 5, 6)
    """
    word_of = {token.index: token.word for token in prompt.tokens}
    named = [word_of[index] for index in (*entity.token_indices, *entity.attribute_indices)]
    said = [prompt.text[slice(*span)] for span in prompt.words]
    wanted = [entity.text[slice(*span)] for span in split_words(entity.text)]
    first, past = min(named), max(named) + 1
    for start in range(len(said) - len(wanted) + 1):
        if start <= first and past <= start + len(wanted) and said[start : start + len(wanted)] == wanted:
            first, past = start, start + len(wanted)
            break
    if first and said[first - 1].lower() in ARTICLES:  # brackets are often placed after the article
        first -= 1
    return tuple(token.index for token in prompt.tokens if first <= token.word < past)


def end_of_text(prompt: Prompt) -> int | None:
    """Position of end-of-text in the prompt; None if the last word ends the text.

    The last word ends the text in models that put padding before the words.

    Examples
    --------
    Position 0 is start-of-text, and each word is one token:

    >>> import elakit
    >>> end_of_text(elakit.parse("a [bear] and a [clock]", elakit.load("picture-world")))
    6
    """
    return prompt.end_index if prompt.end_index > max(token.index for token in prompt.tokens) else None


def _phrase(adapter: Adapter, prompt: Prompt, entity: Entity) -> Phrase:
    positions = phrase_positions(prompt, entity)
    words = {token.index: token.word for token in prompt.tokens}
    first, last = (prompt.words[words[index]] for index in (positions[0], positions[-1]))
    text = prompt.text[first[0] : last[1]]
    alone = parse(f"[{text}]", adapter.pipe)
    own = tuple(token.index for token in alone.tokens)
    if len(own) != len(positions):
        raise PromptError(
            f"{text!r} has {number_of(len(own), 'token')} when it is encoded alone, but {len(positions)} in the prompt "
            f"{prompt.text!r}; the numbers must be equal. Put spaces around the words of this entity."
        )
    inputs = adapter.encode(alone.text, guided=False).inputs
    return Phrase(positions=positions, own=own, states=inputs[STATES], mask=inputs.get(MASKS), start=alone.start_index)


def with_text(conditioning: Conditioning, states: Tensor, mask: Tensor | None = None, times: int = 1) -> Conditioning:
    """Copy a conditioning, and replace the text states of the prompt in the copy.

    Parameters
    ----------
    conditioning : Conditioning
        Conditioning to copy.
    states : Tensor, (1, position, channel)
        New text states of the prompt.
    mask : Tensor, (1, position), optional
        Attention mask of `states`; by default the mask in `conditioning` stays.
    times : int
        Number of times that the negative prompt's text states are repeated along the positions. The caller chooses this
        number, so that the negative prompt gets as many positions as `states` has. Repetition does not change the
        prediction for the negative prompt, because the copies of a position share the attention of this position.

    Returns
    -------
    Conditioning
    """
    given: dict[str, Tensor] = {STATES: states} | ({} if mask is None else {MASKS: mask})
    call: dict[str, Any] = conditioning.call | {_CALL[name]: value for name, value in given.items()}
    for name in (f"negative_{each}" for each in _CALL.values()):
        if isinstance(call.get(name), Tensor):
            call[name] = call[name].repeat(1, times, *(1,) * (call[name].ndim - 2))
    return replace(conditioning, call=call, inputs=conditioning.inputs | given)
