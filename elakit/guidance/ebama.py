"""EBAMA: attributes attract their object, the object is repelled by all other words, and no object is neglected.

Zhang, Yu and Wu, "Object-Conditioned Energy-Based Attention Map Alignment in Text-to-Image Diffusion Models", ECCV
2024, arXiv:2404.07389, and the official code (github.com/YasminZhang/EBAMA). This module was checked against five files
of that code: compute_loss.py, diffusion_pipeline.py, syngen_diffusion_pipeline.py, inference.py and ours.py.

The object of an entity is its noun. A is the raw attention map of a token, and d = 1 - cosine of two such maps. As in
Attend-and-Excite, A' is the softmax over tokens of 100 A, smoothed over locations. The loss is:

    L = sum over objects s of [sum over attributes m of s of d(m, s) - k_s * mean over tokens u of d(s, u)]
        - .5 sum over objects s of max over locations of A'_s

Here u runs over all tokens of the prompt, function words included, except the tokens of s and its attributes. The
factor k_s is the number of attributes of s, or 1 if s has no attribute. The factor is needed because the official code
repels once per pair of object and attribute.

An object or an attribute can have several tokens. Let t be a token of the attribute m. Then d(t, s) is the largest
distance between t and a token of s, and d(m, s) is the sum of d(t, s) over all t. Likewise, d(s, u) is the largest
distance between u and a token of s. A'_s is the map of the first token of s.

The step size is 20 in each of the first 26 of 50 steps. There is no refinement.

Loss and gradient equal those of the official code to rounding (``tests/parity/test_losses.py``). Two differences are
intended. A prompt of fewer than two entities is not guided. Latents pass through the scheduler's ``scale_model_input``
before a gradient pass; the official code does not scale them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from elakit.guidance.method import Attention, Loss, Update
from elakit.guidance.options import check_guided, check_numbers
from elakit.guidance.preprocess import STEP_SIZE, schedule, smooth, word_softmax
from elakit.guidance.quotients import unit
from elakit.guidance.reading import ReadsOneSize
from elakit.guidance.syngen import attribute_words, other_tokens
from elakit.prompt import Prompt


@dataclass(frozen=True)
class EBAMA(ReadsOneSize):
    """EBAMA, energy-based attention map alignment (Zhang et al., ECCV 2024).

    The module `elakit.guidance.ebama` states the equations and all differences from the source.

    Parameters
    ----------
    step_size : float
        Step size at every guided step; 20 in the official code.
    guided : float
        Share of the denoising steps that are guided, from the first; 26 of 50 in the official code.
    intensity : float
        Weight of the term that raises each entity's largest attention; 0.5 in the official code.
    layers, size
        Layers and map size that are read; see `elakit.guidance.reading.ReadsOneSize`.

    Raises
    ------
    SettingError
        A setting is outside its range.

    Examples
    --------
    >>> EBAMA().name
    'ebama'
    >>> EBAMA(intensity=-1)
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: EBAMA(intensity=-1): must be a finite number, 0 or more.
    """

    step_size: float = STEP_SIZE
    guided: float = 0.52
    intensity: float = 0.5

    name: ClassVar[str] = "ebama"
    title: ClassVar[str] = "EBAMA"

    def __post_init__(self) -> None:
        check_numbers(self, "step_size", "intensity")
        check_guided(self)

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """Plan one update of the latent per guided step, all with the same step size.

        A prompt of one entity gets no updates. `noise` holds the ratio of noise to signal before each denoising step;
        only the number of steps is used.
        """
        if len(prompt.entities) < 2:
            return []
        return schedule(len(noise), self.step_size, guided=self.guided, last=1)

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: None) -> Loss:
        """Sum of the terms "attract" and "repel" and of the weighted term "intensity".

        "attract" is small if the map of each attribute resembles the map of its noun. "repel" is small if the map of
        each noun differs from the maps of the other words. "intensity" is the sum of each entity's largest attention,
        with a minus sign. The trace stores "intensity" without its weight.
        """
        maps = attention.mean
        attract = repel = maps.new_zeros(())
        for entity in prompt.entities:
            noun, rest = list(entity.token_indices), other_tokens(prompt, entity)
            attributes = attribute_words(prompt, entity)
            for word in attributes:
                attract = attract + unlikeness(maps[noun], maps[word]).amax(0).sum()
            if rest:
                repel = repel - max(1, len(attributes)) * unlikeness(maps[noun], maps[rest]).amax(0).mean()
        first = [entity.token_indices[0] for entity in prompt.entities]
        strongest = -smooth(word_softmax(maps, prompt.start_index)[first]).amax((1, 2)).sum()
        terms = {"attract": attract, "repel": repel, "intensity": strongest}
        total = attract + repel + self.intensity * strongest
        return Loss(total, {name: float(term.detach()) for name, term in terms.items()})


def unlikeness(some: Tensor, others: Tensor) -> Tensor:
    """Dissimilarity of each map in `some` and each map in `others`: 1 minus the cosine similarity of the two maps.

    `some` has shape (n, y, x), `others` has shape (m, y, x), and the result has shape (n, m). The dissimilarity is 1 if
    one of the two maps is 0 at all locations.

    Examples
    --------
    >>> import torch
    >>> unlikeness(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[3.0, 0.0]], [[3.0, 4.0]], [[0.0, 0.0]]]))
    tensor([[0.0000, 0.4000, 1.0000]])
    """
    return 1 - unit(some.flatten(1)) @ unit(others.flatten(1)).T
