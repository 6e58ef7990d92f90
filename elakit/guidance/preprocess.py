"""What the methods that descend from Attend-and-Excite share: how maps are prepared, and when and how far they step.

Chefer et al., "Attend-and-Excite: Attention-Based Semantic Guidance for Text-to-Image Diffusion Models", 2023
(arXiv:2301.13826), and its official code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from elakit.guidance.method import Update
from elakit.prompt import Prompt

NATIVE_SIZE = 16  # side of the maps that the papers read
Refinement = tuple[float, float, int]  # share of the steps at which, what is to be reached, most steps taken
# Their share of the 50 steps: guided up to step 25, refined at steps 0, 10 and 20.
GUIDED = 0.5
REFINED = (0.0, 0.2, 0.4)
STEP_SIZE = 20.0


def entity_maps(maps: Tensor, prompt: Prompt) -> Tensor:
    """Sharpened and smoothed map of each entity: the mean over its noun's tokens.

    Parameters
    ----------
    maps : Tensor, (token, y, x)
        Raw probabilities of all text positions.
    prompt : Prompt

    Returns
    -------
    Tensor, (entity, y, x)
    """
    words = word_softmax(maps, prompt.start_index)
    return smooth(torch.stack([words[list(entity.token_indices)].mean(0) for entity in prompt.entities]))


def word_softmax(maps: Tensor, start: int | None = 0) -> Tensor:
    """Attention without start-of-text, sharpened: softmax over tokens of 100 times the probabilities.

    Parameters
    ----------
    maps : Tensor, (token, y, x)
        Raw probabilities of all text positions.
    start : int or None
        Position of start-of-text, 0; None where a text has none (T5), and the first position is a word's.

    Returns
    -------
    Tensor, (token, y, x)
        Of the same positions, so that token indices still hold; start-of-text, with any before it, and the last
        position are 0.

    Examples
    --------
    >>> maps = torch.tensor([0.7, 0.2, 0.1, 0.0]).view(4, 1, 1)
    >>> [round(value, 3) for value in word_softmax(maps).flatten().tolist()]
    [0.0, 1.0, 0.0, 0.0]
    """
    first = 0 if start is None else start + 1
    inner = (100 * maps[first:-1]).softmax(0)
    return torch.cat([torch.zeros_like(maps[:first]), inner, torch.zeros_like(maps[-1:])])


def smooth(maps: Tensor, sigma: float = 0.5) -> Tensor:
    """Gaussian smoothing with a 3 x 3 kernel, edges reflected.

    The official kernel's weights are exp(-(d / (2 sigma))^2), so its sigma of .5 acts as .707; this is kept.

    Parameters
    ----------
    maps : Tensor, (n, y, x)
        At least 2 x 2.
    sigma : float
        As their code counts it.

    Returns
    -------
    Tensor, (n, y, x)

    Examples
    --------
    >>> spot = torch.zeros(1, 5, 5)
    >>> spot[0, 2, 2] = 1
    >>> [round(value, 3) for value in smooth(spot)[0, 2].tolist()]
    [0.0, 0.122, 0.332, 0.122, 0.0]
    """
    distance = torch.arange(-1, 2, dtype=maps.dtype, device=maps.device)
    weights = torch.exp(-((distance / (2 * sigma)) ** 2))
    kernel = torch.outer(weights, weights)
    kernel = (kernel / kernel.sum()).view(1, 1, 3, 3)
    return F.conv2d(F.pad(maps[:, None], (1, 1, 1, 1), mode="reflect"), kernel)[:, 0]


def schedule(
    steps: int,
    step_size: float,
    *,
    guided: float = GUIDED,
    last: float = 0.5,
    refine: Mapping[float, float | None] | None = None,
    tries: int | Sequence[int] = 20,
) -> list[Update]:
    """When and how far the latent moves.

    Parameters
    ----------
    steps : int
        Denoising steps (calls of the model) of the run.
    step_size : float
        Of the first step; at step i it is ``step_size * sqrt(1 - (1 - last) i / (steps - 1))``.
    guided : float
        Share of the steps that are guided, from the first.
    last : float
        See `step_size`; 1 keeps it constant.
    refine : mapping of float to float or None, optional
        Share of the steps at which refinement takes place -> loss at which it ends (None: it does not). Of shares that
        fall on one step of a short run the last counts.
    tries : int or sequence of int
        Most steps of a refinement, the same for all or one for each.

    Returns
    -------
    list of Update
        One for each guided step.

    Examples
    --------
    >>> updates = schedule(10, 20.0, refine={0.0: 0.95, 0.2: 0.5})
    >>> [round(u.size, 2) for u in updates], [u.until for u in updates]
    ([20.0, 19.44, 18.86, 18.26, 17.64], [0.95, None, 0.5, None, None])
    """
    count = round(guided * steps)
    ends = [tries] * len(refine or {}) if isinstance(tries, int) else list(tries)
    refinements = zip((refine or {}).items(), ends, strict=True)
    when = {round(share * steps): (until, limit) for (share, until), limit in refinements}
    updates = []
    for i in range(count):
        size = step_size * math.sqrt(1 - (1 - last) * i / max(1, steps - 1))
        until, limit = when.get(i, (None, 0))
        updates.append(Update(size, repeats=limit, until=until))
    return updates
