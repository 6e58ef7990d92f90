"""FOCUS: make the maps of one entity's words similar, and the maps of different entities different.

Bill, Simsar and Hofmann, "FOCUS: Optimal Control for Multi-Entity World Modeling in Text-to-Image Generation"
(arXiv:2510.02315; the first version has the title "Optimal Control Meets Flow Matching"), and the test-time control of
the released code (github.com/ericbill21/FOCUS: src/losses.py, src/controller.py, src/sd3/pipeline.py).

Maps show the attention of the image to the text in the two-stream blocks. The maps are averaged over heads and blocks
and blurred with a Gaussian of 3 x 3 locations and standard deviation 1. The tokens of an entity are those of its
attributes and its noun. The mean map of an entity is the mean over these tokens.

J is the Jensen-Shannon divergence of n maps, divided by log n. Each map is first raised to the power of 3 and
normalized to a sum of 1. The loss is:

    L = 1/2 [C + 1 - J(mean maps of all entities)]

C is the mean of J(maps of one entity's tokens) over all entities with more than one token, or 0 if there are no such
entities.

In each step, the released code adds lambda * 2 s (s + e) / (1 - s + e) * gradient of L to the velocity. Here e is
0.001, and s is the share of noise: the latent is (1 - s) image + s noise.

The divergences equal those of the released code to rounding (``tests/parity/test_scores.py``). Three differences are
intended:

- The released code changes the velocity of the pass from which the gradient is taken. elakit moves the latent before
  the pass instead, by the same amount times the change of s in the step. The difference is of second order in this
  change.
- For FLUX, the released code has the opposite sign, which raises L. elakit does not follow it. The opposite sign is
  taken for an oversight, because the released code for Stable Diffusion 3 has a comment on the sign.
- In models without two-stream blocks, all layers of one map size are read. There, s is the standard deviation of the
  noise divided by the sum of the standard deviations of noise and signal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from elakit.attention.spec import select_layers
from elakit.guidance.method import Attention, Loss, Update, layers_of_size
from elakit.guidance.options import check_guided, check_numbers
from elakit.guidance.preprocess import NATIVE_SIZE, smooth
from elakit.guidance.reading import ReadsOneSize
from elakit.models import AttentionLayer
from elakit.prompt import Prompt

_SMALL, _POWER = 1e-10, 3
_BLUR = math.sqrt(0.5)  # `smooth` counts a standard deviation of 1 as this
_END = 1e-3
_CLAMPED = 999.0  # ratios of noise to signal above this were computed with a signal of 0.001


@dataclass(frozen=True, kw_only=True)
class FOCUS(ReadsOneSize):
    """FOCUS (Bill et al., arXiv:2510.02315), for models with joint attention (Stable Diffusion 3, FLUX).

    The module `elakit.guidance.focus` states the equations and all differences from the source.

    Parameters
    ----------
    strength : float
        Factor lambda of the gradient; 4 in the example and the FLUX notebook of the released code, 10 in its Stable
        Diffusion 3.5 notebook, 1 by default in its script.
    guided : float
        Share of the denoising steps that are guided, from the first; all in the released code.
    layers, size
        Layers and map size that are read; see `elakit.guidance.reading.ReadsOneSize`. In a model with
        two-stream blocks, "all" means these blocks.

    Raises
    ------
    SettingError
        A setting is outside its range.

    Examples
    --------
    >>> FOCUS().strength
    4.0
    >>> FOCUS(strength=-1)
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: FOCUS(strength=-1): must be a finite number, 0 or more.
    """

    strength: float = 4.0
    guided: float = 1.0

    name: ClassVar[str] = "focus"
    title: ClassVar[str] = "FOCUS"

    def __post_init__(self) -> None:
        check_numbers(self, "strength")
        check_guided(self)

    def select(self, layers: Sequence[AttentionLayer], latent: tuple[int, int]) -> tuple[AttentionLayer, ...]:
        """Layers that the options `layers` and `size` select; their maps all have the same size.

        If the model has two-stream blocks, ``layers="all"`` selects only these blocks.
        """
        chosen = select_layers(layers, self.layers)
        if self.layers == "all":
            chosen = tuple(layer for layer in chosen if layer.kind == "joint") or chosen
        return layers_of_size(chosen, latent, self.size, NATIVE_SIZE, "FOCUS")

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """Plan one update of the latent per guided step.

        Let s be the share of noise in the latent before a denoising step. The step size is ``strength * control(s)``
        times the decrease of s during this denoising step. A prompt of one entity gets no updates. `noise` holds the
        ratio of noise to signal before each denoising step.
        """
        if len(prompt.entities) < 2:
            return []
        shares = [noise_share(ratio) for ratio in noise]
        sizes = [self.strength * control(now) * abs(now - after) for now, after in pairwise([*shares, 0.0])]
        return [Update(size) for size in sizes[: round(self.guided * len(noise))]]

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: None) -> Loss:
        """Mean of the terms "coherence" and "separation", both from 0 to 1.

        "coherence" is 0 if, within each entity, the maps of all words are equal. "separation" is 0 if the mean maps of
        different entities are disjoint.
        """
        maps = smooth(attention.mean, _BLUR).flatten(1)
        groups = [maps[[*entity.token_indices, *entity.attribute_indices]] for entity in prompt.entities]
        alike = [divergence(group) for group in groups if len(group) > 1]
        terms = {
            "coherence": torch.stack(alike).mean() if alike else maps.new_zeros(()),
            "separation": 1 - divergence(torch.stack([group.mean(0) for group in groups])),
        }
        total = (terms["coherence"] + terms["separation"]) / 2
        return Loss(total, {name: float(term.detach()) for name, term in terms.items()})


def divergence(maps: Tensor) -> Tensor:
    """Jensen-Shannon divergence of maps, divided by log n, so that it is from 0 (equal maps) to 1 (disjoint maps).

    Each map is first raised to the power of 3, and then normalized to a sum of 1.

    Parameters
    ----------
    maps : Tensor, (n, location)
        At least two maps, not negative.

    Returns
    -------
    Tensor, scalar

    Examples
    --------
    >>> float(divergence(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))), float(divergence(torch.ones(2, 3)))
    (1.0, 0.0)
    """
    peaked = maps**_POWER
    each = peaked / peaked.sum(1, keepdim=True).clamp_min(_SMALL)
    mixed = each.mean(0, keepdim=True)
    relative = (each * ((each + _SMALL).log() - (mixed + _SMALL).log())).sum(1)
    return relative.mean() / math.log(len(maps))


def noise_share(ratio: float) -> float:
    """Share of noise in a latent with a given ratio of noise to signal.

    The share is ratio / (1 + ratio) for a ratio up to 999. For a higher ratio, it is ratio / 1000, but at most 1.

    The limit of 999 comes from flow matching: it belongs to a signal of 0.001. If the signal is lower,
    `elakit.guidance.engine.noise_levels` divides the noise by 0.001, so that the ratio is 1000 times the share of
    noise. A ratio above 1000 occurs only in diffusion with almost no signal.

    Parameters
    ----------
    ratio : float
        Ratio of noise to signal (standard deviations), from `elakit.guidance.engine.noise_levels`.

    Returns
    -------
    float

    Examples
    --------
    >>> noise_share(1.0), noise_share(1000.0), noise_share(4096.0)
    (0.5, 1.0, 1.0)
    """
    return min(ratio * 1e-3, 1.0) if ratio > _CLAMPED else ratio / (1 + ratio)


def control(share: float) -> float:
    """Return the number by which the loss's gradient is multiplied before it is added to the velocity.

    The option `strength` (lambda in the paper) is a further factor. The number is 2 s (s + e) / (1 - s + e), with s the
    share of noise and e = 0.001.

    Examples
    --------
    >>> control(0.5), round(control(1.0), 6)
    (1.0, 2002.0)
    """
    return 2 * (share + _END) / (1 - share + _END) * share
