"""Causes in the text encoder: similarity of the nouns' states, and attributes that leak into the state of a noun.

In a causal text encoder such as CLIP's, every token attends to the tokens before it. In "a red car and a bird", the
state of "bird" may therefore contain "red". This leakage is measured by encoding the prompt again without "red".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from elakit.models import adapter_for
from elakit.pipeline import Pipeline
from elakit.prompt import Entity, Prompt, parse
from elakit.tokens import sequence_of

# Lengths below this count as zero.
NOTHING = 1e-12


@dataclass(frozen=True)
class Leak:
    """Leakage of an attribute into the state of another entity's noun.

    Attributes
    ----------
    entity : str
        Label of the entity whose noun is analyzed.
    other : str
        Label of the entity that the attribute describes.
    token : str
        Label of the attribute.
    share : float
        Effect of the attribute on the noun's state. 0: no effect. 1: the same effect as if the attribute described this
        noun. `text_states` has the formula.
    change : float
        Norm of the change of the noun's state when the attribute is removed from the prompt, divided by the norm of
        the noun's state.
    """

    entity: str
    other: str
    token: str
    share: float
    change: float


@dataclass(frozen=True)
class States:
    """Properties of the text states of a prompt's nouns: norms, similarity, leakage and numbers of tokens.

    Attributes
    ----------
    entities : tuple of str
        Labels of the entities.
    length : tuple of float
        Norm of each noun's state, divided by the median norm of the states of all tokens of the prompt's words.
    alike : ndarray, (entity, entity)
        Cosine similarity of the nouns' states: 1 for equal states, about 0 for unrelated states. The mean state of all
        tokens of the prompt's words is subtracted first.
    leaks : tuple of Leak
        Leakage of each attribute into the noun of each other entity.
    pieces : tuple of int
        Number of tokens of each noun; if the pipeline has several tokenizers, the minimum over the tokenizers.
    """

    entities: tuple[str, ...]
    length: tuple[float, ...]
    alike: np.ndarray
    leaks: tuple[Leak, ...]
    pieces: tuple[int, ...]


def text_states(pipe: Pipeline, prompt: Prompt) -> States:
    """Analyze the text states of a prompt's nouns: norms, similarity, and leakage of other entities' attributes.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    prompt : Prompt
        A prompt that was parsed for `pipe`.

    Returns
    -------
    States

    Raises
    ------
    ModelError
        The pipeline's family is not supported.

    Notes
    -----
    `Leak.share` measures how much of attribute w leaked into noun v. Let s(v | text) be the state of v in a text: the
    mean over the tokens of v. Let u be the attributes that describe v, if there are any. The share is
    ``<s(v | prompt) - s(v | prompt without w), d> / <d, d>`` with ``d = s(v | "a w v") - s(v | "a u v")``.

    Examples
    --------
    In picture-world, an earlier "red" leaks into the state of "bird". A later "red" does not leak into the state of
    "car":

    >>> import elakit
    >>> pipe = elakit.load("picture-world")
    >>> into_bird, = text_states(pipe, elakit.parse("a [red car] and a [bird]", pipe)).leaks
    >>> into_bird.token, into_bird.share > 0.2
    ('red', True)
    >>> into_car, = text_states(pipe, elakit.parse("a [car] and a [red bird]", pipe)).leaks
    >>> abs(into_car.share) < 1e-6
    True
    """
    encoder = _Encoder(pipe)
    states = encoder.states(prompt.text)
    words = states[[token.index for token in prompt.tokens]]
    nouns = np.stack([states[list(entity.token_indices)].mean(0) for entity in prompt.entities])
    usual = float(np.median(np.linalg.norm(words, axis=1)))
    apart = nouns - words.mean(0)
    lengths = np.maximum(np.linalg.norm(apart, axis=1), NOTHING)
    return States(
        entities=tuple(entity.label for entity in prompt.entities),
        length=tuple(float(length) for length in np.linalg.norm(nouns, axis=1) / max(usual, NOTHING)),
        alike=(apart @ apart.T) / (lengths[:, None] * lengths),
        leaks=tuple(_leaks(encoder, prompt)),
        pieces=tuple(_pieces(prompt, entity) for entity in prompt.entities),
    )


def _leaks(encoder: _Encoder, prompt: Prompt) -> Iterator[Leak]:
    for owner in prompt.entities:
        for word in dict.fromkeys(t.word for t in prompt.tokens if t.index in owner.attribute_indices):
            for entity in prompt.entities:
                if entity is owner:
                    continue
                here = encoder.noun(_marked(prompt, entity))
                moved = here - encoder.noun(_marked(prompt, entity, without=word))
                said = prompt.text[slice(*prompt.words[word])]
                own = " ".join(["a", *entity.attributes, f"[{entity.noun}]"])
                toward = encoder.noun(f"a {said} [{entity.noun}]") - encoder.noun(own)
                yield Leak(
                    entity=entity.label,
                    other=owner.label,
                    token=prompt.word_labels[word],
                    share=float(moved @ toward) / max(float(toward @ toward), NOTHING),
                    change=float(np.linalg.norm(moved)) / max(float(np.linalg.norm(here)), NOTHING),
                )


class _Encoder:
    """Text encoder of a pipeline with a cache of encoded texts."""

    def __init__(self, pipe: Pipeline) -> None:
        self.pipe = pipe
        self.adapter = adapter_for(pipe)
        self._states: dict[str, np.ndarray] = {}

    def states(self, text: str) -> np.ndarray:
        """Output of the text encoder for a text: (position in the token sequence, channel)."""
        if text not in self._states:
            encoded = self.adapter.encode(text, guided=False).inputs["encoder_hidden_states"]
            self._states[text] = encoded[0].detach().cpu().double().numpy()
        return self._states[text]

    def noun(self, marked: str) -> np.ndarray:
        """State of the noun that brackets mark in a text such as "a red [car]": the mean over the noun's tokens."""
        prompt = parse(marked, self.pipe)
        return self.states(prompt.text)[list(prompt.entities[0].token_indices)].mean(0)


def _marked(prompt: Prompt, entity: Entity, without: int | None = None) -> str:
    """Text of the prompt with brackets around the noun of an entity.

    `without` is the index of a word in `Prompt.words` that is left out of the text; None leaves out no word.
    """
    spans = prompt.words
    noun = next(token.word for token in prompt.tokens if token.index in entity.token_indices)
    text = prompt.text
    changes = [(spans[noun], f"[{entity.noun}]")] + ([] if without is None else [(spans[without], "")])
    for (first, last), instead in sorted(changes, reverse=True):
        text = text[:first] + instead + text[last:]
    return " ".join(text.split())


def _pieces(prompt: Prompt, entity: Entity) -> int:
    """Number of tokens of an entity's noun.

    If the pipeline has several tokenizers (Stable Diffusion 3), this is the minimum over the tokenizers.
    """
    return min(Counter(sequence_of(t.label) for t in prompt.tokens if t.index in entity.token_indices).values())
