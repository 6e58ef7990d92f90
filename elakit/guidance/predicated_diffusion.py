"""Predicated Diffusion: predicate logic on the prompt, with attention as the truth of "a location shows the word".

Sueyoshi and Matsubara, "Predicated Diffusion: Predicate Logic-Based Attention Guidance for Text-to-Image Diffusion
Models", CVPR 2024 (arXiv:2311.16117), and its released code (pipeline_predicated_diffusion.py, the loss
"attention_product_prob"). In product fuzzy logic a proposition's loss is the negative logarithm of its truth:

    existence       exists p: noun(p)                     -log(1 - exp(mean_p log(1 - A'_noun(p) + 1e-4)))
    correspondence  for all p: noun(p) <-> attribute(p)   mean_p of -log(1 - N (1 - M)) - log(1 - M (1 - N))
    separation      for all p: not (noun(p) and m(p))     mean_p of -log(1 - N M), m an attribute of another noun

A' is the softmax over tokens of 100 times the probabilities, without start-of-text; N and M are the raw maps of noun
and attribute, each scaled to 0..1. The loss is 0.1 times the mean existence term over nouns, plus the mean
correspondence term over pairs of noun and attribute, plus 0.3 times the mean separation term over pairs of an attribute
and another noun. The step size at step i of n is 20 sqrt(1 - i / (2 (n - 1))) over the first 25 of 50 steps, with 5
additional updates at the first step.

Intended differences: words of several tokens have the mean of their maps; 1 - N (1 - M) and its like are kept at 1e-6
or above, so that the loss stays finite in half precision (the released code adds 1e-20); the possession term ("a frog
wearing a hat") is not used, because `elakit.parse` reads no relations; a prompt of fewer than two entities is not
guided.
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
    """Predicated Diffusion (Sueyoshi and Matsubara, CVPR 2024): losses from the prompt in predicate logic.

    The module `elakit.guidance.predicated_diffusion` states the equations and all differences from the source.

    Parameters
    ----------
    step_size : float
        Step size alpha at the first step; 20 in the released code. It decreases over the run, from this value at the
        first step to sqrt(1/2) times this value at the last.
    guided : float
        Share of the denoising steps that are guided, from the first; 25 of 50 in the released code.
    refinements : int
        Number of additional updates at the first step; 5 in the released code.
    existence : float
        Weight of the existence term (some location shows the noun), relative to the correspondence term, whose weight
        is 1; 0.1 in the released code.
    separation : float
        Weight of the separation term (no location shows a noun and another noun's attribute), relative to the
        correspondence term, whose weight is 1; 0.3 in the released code.
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
        """Updates with decreasing step sizes, the first with a refinement; no update for a prompt of one entity.

        `noise` holds the ratio of noise to signal before each denoising step; only the number of steps is used.
        """
        if len(prompt.entities) < 2:
            return []
        # `None` sets no goal: all extra updates are made
        return schedule(len(noise), self.step_size, guided=self.guided, refine=[(0.0, None, self.refinements)])

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: None) -> Loss:
        """Weighted sum of "existence", "correspondence" and "separation"; the trace stores them without weights."""
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

    The loss is -log(1 - g), with g the geometric mean of 1.0001 - attention over locations. The 0.0001 avoids log(0);
    for the same reason 1 - g is at least 1e-6.

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

    The loss is the mean of -log(1 - p (1 - q)) over locations, with p and q the attention to P and Q. The argument of
    the logarithm is at least 1e-6.

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
    >>> one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.0]])
    >>> round(float(implied(one, other)), 3), abs(float(implied(other, one)))  # log(2) / 2
    (0.347, 0.0)
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
