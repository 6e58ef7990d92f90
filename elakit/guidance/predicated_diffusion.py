"""Predicated Diffusion: losses from logical statements about the prompt, in which attention stands for truth.

Sueyoshi and Matsubara, "Predicated Diffusion: Predicate Logic-Based Attention Guidance for Text-to-Image Diffusion
Models", CVPR 2024 (arXiv:2311.16117), and its released code (pipeline_predicated_diffusion.py, the loss
"attention_product_prob").

The attention of location p to a word is the truth of "p shows the word". The loss of a statement is the negative
logarithm of its truth in product fuzzy logic. There are three kinds of statements:

    existence       some location shows a noun
    correspondence  each location shows a noun if and only if it shows an attribute of this noun
    separation      no location shows both a noun and an attribute of another noun

Let N be the map of the noun, and M the map of the attribute, each scaled to 0..1. Let A be the map of the noun after a
softmax over tokens of 100 times the probabilities, without start-of-text. With mean_p for the mean over locations, the
losses are:

    existence       -log(1 - exp(mean_p log(1 - A + 1e-4)))
    correspondence  mean_p of -log(1 - N (1 - M)) - log(1 - M (1 - N))
    separation      mean_p of -log(1 - N M)

The loss of the image is 0.1 existence + correspondence + 0.3 separation. In this sum, existence is the mean over nouns,
and correspondence is the mean over pairs of a noun and its attribute. Separation is the mean over pairs of a noun and
an attribute of another noun.

The first 25 of 50 steps are guided. The step size falls from 20 at step 0 to 20 sqrt(1/2) at the last step of the run.
At the first step, 5 additional updates are made.

Intended differences:

- The map of a word with several tokens is the mean of the tokens' maps.
- The argument of each logarithm is at least 1e-6, so that the loss stays finite in half precision. The released code
  adds 1e-20 instead.
- The possession term of the released code ("a frog wearing a hat") is not used, because `elakit.parse` reads no
  relations.
- A prompt of fewer than two entities is not guided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elakit.guidance.method import Attention, Loss, Update
from elakit.guidance.options import check_guided, check_numbers, check_whole
from elakit.guidance.preprocess import GUIDED, STEP_SIZE, schedule, word_softmax
from elakit.guidance.quotients import ratio
from elakit.guidance.reading import ReadsOneSize
from elakit.guidance.syngen import attribute_words
from elakit.prompt import Prompt

_SMALL, _LEAST = 1e-4, 1e-6


@dataclass(frozen=True)
class PredicatedDiffusion(ReadsOneSize):
    """Predicated Diffusion (Sueyoshi and Matsubara, CVPR 2024): losses from logical statements about the prompt.

    The loss has three terms. The existence term is small if each noun is shown at some location. The correspondence
    term is small if the same locations show a noun and its attributes. The separation term is small if no location
    shows both a noun and an attribute of another noun. The module `elakit.guidance.predicated_diffusion` states the
    equations and all differences from the source.

    Parameters
    ----------
    step_size : float
        Step size alpha at the first step; 20 in the released code. The step size decreases over the run, to sqrt(1/2)
        times this value at the last step.
    guided : float
        Share of the denoising steps that are guided, beginning with the first step; 25 of 50 in the released code.
    refinements : int
        Number of additional updates at the first step; 5 in the released code.
    existence : float
        Weight of the existence term; 0.1 in the released code. The weight of the correspondence term is 1.
    separation : float
        Weight of the separation term; 0.3 in the released code.
    layers, size
        Layers and map size that are read; see `elakit.guidance.reading.ReadsOneSize`.

    Raises
    ------
    SettingError
        A setting is outside its range.

    Examples
    --------
    >>> PredicatedDiffusion().name
    'predicated-diffusion'
    >>> PredicatedDiffusion(existence=-1)
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: PredicatedDiffusion(existence=-1): must be a finite number, 0 or more.
    """

    step_size: float = STEP_SIZE
    guided: float = GUIDED
    refinements: int = 5
    existence: float = 0.1
    separation: float = 0.3

    name: ClassVar[str] = "predicated-diffusion"
    title: ClassVar[str] = "Predicated Diffusion"

    def __post_init__(self) -> None:
        check_numbers(self, "step_size", "existence", "separation")
        check_guided(self)
        check_whole(self, "refinements")

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """One update per guided step, with decreasing step sizes; an empty list for a prompt of one entity.

        The update of the first step includes a refinement. `noise` holds the ratio of noise to signal before each
        denoising step; only its length is used.
        """
        if len(prompt.entities) < 2:
            return []
        # `None` sets no goal: all extra updates are made
        return schedule(len(noise), self.step_size, guided=self.guided, refine=[(0.0, None, self.refinements)])

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: None) -> Loss:
        """Weighted sum of the three loss terms "existence", "correspondence" and "separation".

        The trace stores each term before its multiplication by the weight. `step` and `state` are not used.
        """
        maps = attention.mean
        sharp = word_softmax(maps, prompt.start_index)
        nouns = [scaled(maps[list(entity.token_indices)].mean(0)) for entity in prompt.entities]
        words = [[scaled(maps[word].mean(0)) for word in attribute_words(prompt, entity)] for entity in prompt.entities]
        exist = [existence(sharp[list(entity.token_indices)].mean(0)) for entity in prompt.entities]
        alike = [
            implied(noun, word) + implied(word, noun) for noun, own in zip(nouns, words, strict=True) for word in own
        ]
        apart = [
            _negative_log(1 - nouns[i] * word)
            for j, own in enumerate(words)
            for word in own
            for i in range(len(nouns))
            if i != j
        ]
        terms = {
            "existence": _mean(exist, maps),
            "correspondence": _mean(alike, maps),
            "separation": _mean(apart, maps),
        }
        total = self.existence * terms["existence"] + terms["correspondence"] + self.separation * terms["separation"]
        return Loss(total, {name: float(term.detach()) for name, term in terms.items()})


def existence(attention: Tensor) -> Tensor:
    """Loss for the statement "some location shows the word".

    Let a be the attention to the word at a location, and let g be the geometric mean of 1.0001 - a, taken over all
    locations. The loss is -log(1 - g). The number is 1.0001 instead of 1 to avoid log(0). For the same reason, the
    argument of the logarithm is at least 1e-6.

    Parameters
    ----------
    attention : Tensor, (y, x)
        Attention to the word, 0 to 1.

    Returns
    -------
    Tensor, scalar

    Examples
    --------
    >>> round(float(existence(torch.tensor([[0.5, 0.5]]))), 3)  # -log(1 - 0.5001)
    0.693
    """
    nowhere = (1 - attention + _SMALL).log().mean().exp()
    return -(1 - nowhere).clamp_min(_LEAST).log()


def implied(one: Tensor, other: Tensor) -> Tensor:
    """Loss for the statement "each location that shows word P also shows word Q".

    Let p and q be the attention to P and Q at a location. The loss is the mean of -log(1 - p (1 - q)) over all
    locations. The argument of the logarithm is at least 1e-6.

    Parameters
    ----------
    one : Tensor, (y, x)
        Attention to P, 0 to 1.
    other : Tensor, (y, x)
        Attention to Q, 0 to 1.

    Returns
    -------
    Tensor, scalar

    Examples
    --------
    The first of two locations has p = 1 and q = 0.5. The second has p = q = 0, and its loss is 0:

    >>> one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.0]])
    >>> round(float(implied(one, other)), 3)  # -log(0.5) / 2
    0.347

    With P and Q exchanged, the first location has p = 0.5 and q = 1, and the loss is 0:

    >>> abs(float(implied(other, one)))
    0.0
    """
    return _negative_log(1 - one * (1 - other))


def scaled(attention: Tensor) -> Tensor:
    """Scale a map to the range from 0 to 1; a constant map becomes 0 everywhere.

    Examples
    --------
    >>> scaled(torch.tensor([[0.1, 0.3, 0.2]])).round(decimals=2)
    tensor([[0.0000, 1.0000, 0.5000]])
    """
    low, high = attention.amin(), attention.amax()
    return ratio(attention - low, high - low)


def _negative_log(truth: Tensor) -> Tensor:
    return -truth.clamp_min(_LEAST).log().mean()


def _mean(terms: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack(list(terms)).mean() if terms else like.new_zeros(())
