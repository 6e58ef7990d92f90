"""Preparation of maps, and schedules of updates, for methods that build on Attend-and-Excite.

Chefer et al., "Attend-and-Excite: Attention-Based Semantic Guidance for Text-to-Image Diffusion Models", 2023
(arXiv:2301.13826), and its official code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from skimage.filters import threshold_otsu
from torch import Tensor
from torch.nn import functional as F

from elakit.guidance.method import Update
from elakit.prompt import Prompt

NATIVE_SIZE = 16  # longer side of the maps that the papers read at 512 pixels
Refinement = tuple[float, float, int]  # (share of the steps, goal, largest number of extra updates)
# The authors' schedule of 50 steps, as shares: guided up to step 25, refined at steps 0, 10 and 20.
GUIDED = 0.5
REFINED = (0.0, 0.2, 0.4)
STEP_SIZE = 20.0
REFINEMENTS: tuple[Refinement, ...] = tuple(zip(REFINED, (0.05, 0.5, 0.8), (20, 20, 20), strict=True))
_LEVELS = 255  # the official code computes Otsu's threshold on maps quantized to 8 bits


def entity_maps(maps: Tensor, prompt: Prompt, *, normalize_eot: bool = False) -> Tensor:
    """Sharpened and smoothed map of each entity: the mean over its noun's tokens.

    Parameters
    ----------
    maps : Tensor, (token, y, x)
        Raw probabilities of all text positions.
    prompt : Prompt
    normalize_eot : bool
        Whether end-of-text and padding are left out of the softmax over tokens, see `word_softmax`.

    Returns
    -------
    Tensor, (entity, y, x)
    """
    words = word_softmax(maps, prompt.start_index, prompt.end_index if normalize_eot else None)
    return smooth(torch.stack([words[list(entity.token_indices)].mean(0) for entity in prompt.entities]))


def word_softmax(maps: Tensor, start: int | None = 0, end: int | None = None) -> Tensor:
    """Sharpened attention without start-of-text: the softmax over tokens of 100 times the probabilities.

    Parameters
    ----------
    maps : Tensor, (token, y, x)
        Raw probabilities of all text positions.
    start : int or None
        Position of start-of-text; None if the text has none (T5), so that its first position is a word.
    end : int, optional
        First of the positions at the end that are left out of the softmax; by default the last position, as in the
        official code for Stable Diffusion 1.x. With the position of end-of-text, end-of-text and padding are left out,
        as in the official code for 2.x (its ``normalize_eot``).

    Returns
    -------
    Tensor, (token, y, x)
        Values of all positions, so that token indices stay valid; 0 at the positions that are left out.

    Examples
    --------
    >>> maps = torch.tensor([0.7, 0.2, 0.1, 0.0]).view(4, 1, 1)
    >>> [round(value, 3) for value in word_softmax(maps).flatten().tolist()]
    [0.0, 1.0, 0.0, 0.0]
    """
    first = 0 if start is None else start + 1
    past = len(maps) - 1 if end is None else end
    inner = (100 * maps[first:past]).softmax(0)
    return torch.cat([torch.zeros_like(maps[:first]), inner, torch.zeros_like(maps[past:])])


def smooth(maps: Tensor, sigma: float = 0.5) -> Tensor:
    """Gaussian smoothing with a 3 x 3 kernel and reflected edges.

    As in the official code of Attend-and-Excite, the weight at distance d is exp(-(d / (2 sigma))^2), and the nine
    weights are divided by their sum. The default sigma of 0.5 is therefore a standard deviation of 0.707 locations.

    Parameters
    ----------
    maps : Tensor, (n, y, x)
        Maps of at least 2 x 2 locations.
    sigma : float
        Width in the formula above: the standard deviation in locations, divided by the square root of 2.

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


def quantized_otsu(maps: Tensor) -> np.ndarray:
    """Otsu masks as in the official code of InitNO and Self-Cross, with thresholds of maps quantized to 8 bits.

    Parameters
    ----------
    maps : Tensor, (n, y, x)
        Between 0 and 1.

    Returns
    -------
    ndarray, bool, (n, y, x)
        Locations at or above the threshold. As in the official code, the threshold is the highest gray level of Otsu's
        lower class, so that locations at this level belong to the mask.

    Examples
    --------
    >>> quantized_otsu(torch.tensor([[[0.0, 0.1, 0.9, 0.8]]])).astype(int).tolist()
    [[[0, 1, 1, 1]]]
    """
    values = maps.detach().cpu().numpy()
    levels = (values * _LEVELS).astype(np.uint16)
    thresholds = [threshold_otsu(level) / _LEVELS for level in levels]
    return np.stack([value >= threshold for value, threshold in zip(values, thresholds, strict=True)])


def clean_background(maps: Tensor) -> Tensor:
    """Clean-background term of InitNO and Self-Cross: attention outside the component that contains the maximum.

    The foreground of a map is the 4-connected component of its Otsu mask (`quantized_otsu`) that contains the map's
    largest value; all other locations are background. A map contributes its largest background value if that exceeds
    its smallest foreground value, else 0. The term is the sum over maps.

    Parameters
    ----------
    maps : Tensor, (n, y, x)

    Returns
    -------
    Tensor, scalar

    Examples
    --------
    >>> clean_background(torch.tensor([[[0.9, 0.8, 0.0, 0.1, 0.0, 0.85]]]))
    tensor(0.8500)
    """
    total = maps.new_zeros(())
    for values, mask in zip(maps, quantized_otsu(maps), strict=True):
        components, _ = ndimage.label(mask)
        peak = np.unravel_index(int(values.detach().argmax()), values.shape)
        foreground = torch.from_numpy((components == components[peak]) & mask).to(values.device)
        outside = values.masked_fill(foreground, 0).amax()
        if bool(outside > values.masked_fill(~foreground, 1).amin()):
            total = total + outside
    return total


@dataclass
class RunningMaps:
    """Exponential moving average of an image's maps over passes, for the alignment term of InitNO and Self-Cross.

    Attributes
    ----------
    average : Tensor, (n, y, x), or None
        0.9 times the previous average plus 0.1 times the latest maps. After the first pass the average equals the maps
        of that pass; before it, the average is None.
    """

    average: Tensor | None = None

    def distance(self, maps: Tensor) -> Tensor:
        """Add maps to the average; return the mean absolute difference of each from its new average, summed over maps.

        Examples
        --------
        >>> running = RunningMaps()
        >>> [round(float(running.distance(torch.full((1, 2, 2), value))), 2) for value in (0.5, 1.0)]
        [0.0, 0.45]
        """
        latest = maps.detach()
        self.average = latest if self.average is None else 0.9 * self.average + 0.1 * latest
        return (maps - self.average).abs().mean((1, 2)).sum()


def schedule(
    steps: int,
    step_size: float,
    *,
    guided: float = GUIDED,
    last: float = 0.5,
    refine: Sequence[tuple[float, float | None, int]] = (),
) -> list[Update]:
    """Updates with the step sizes of Attend-and-Excite, and refinements at given shares of the steps.

    Parameters
    ----------
    steps : int
        Denoising steps of the run.
    step_size : float
        Step size at the first step; at step i it is ``step_size * sqrt(1 - (1 - last) i / (steps - 1))``.
    guided : float
        Share of the steps that are guided, from the first; 0.5 by default.
    last : float
        Squared ratio of the step size at the last step of the run to that at the first; 1 keeps the step size constant.
    refine : sequence of (float, float or None, int)
        Refinements, each with three values: the step at which it takes place, as a share of all steps; the loss at
        or below which it ends, or None to make all its latent steps; and its largest number of latent steps. If several
        refinements fall on the same step of a short run, only the last of them takes place.

    Returns
    -------
    list of Update
        One per guided step.

    Examples
    --------
    >>> updates = schedule(10, 20.0, guided=0.5, refine=[(0.0, 0.95, 20), (0.2, 0.5, 20)])
    >>> [round(u.size, 2) for u in updates], [u.until for u in updates]
    ([20.0, 19.44, 18.86, 18.26, 17.64], [0.95, None, 0.5, None, None])
    """
    count = round(guided * steps)
    when = {round(share * steps): (until, limit) for share, until, limit in refine}
    updates = []
    for i in range(count):
        size = step_size * math.sqrt(1 - (1 - last) * i / max(1, steps - 1))
        until, limit = when.get(i, (None, 0))
        updates.append(Update(size, repeats=limit, until=until))
    return updates


def excitation(
    steps: int, prompt: Prompt, step_size: float, *, guided: float, refine: Sequence[Refinement]
) -> list[Update]:
    """Updates of Attend-and-Excite and BoxDiff, whose refinements raise every entity's attention to given values.

    Parameters
    ----------
    steps, step_size, guided
        See `schedule`.
    prompt : Prompt
    refine : sequence of (float, float, int)
        Refinements, each with three values: the step at which it takes place, as a share of all steps; the attention
        that every entity has to reach; and the largest number of latent steps in the refinement. The loss is 1 minus
        the attention of the least attended entity, so `Update.until` is 1 minus the attention to reach.

    Returns
    -------
    list of Update
        One per guided step; an empty list for a prompt with only one entity.

    Examples
    --------
    >>> import elakit
    >>> prompt = elakit.parse("a [red car] and a [bird]", elakit.load("picture-world"))
    >>> [update.until for update in excitation(10, prompt, 20.0, guided=0.3, refine=[(0.2, 0.75, 20)])]
    [None, None, 0.25]
    """
    if len(prompt.entities) < 2:
        return []
    losses = [(share, 1 - least, most) for share, least, most in refine]
    return schedule(steps, step_size, guided=guided, refine=losses)
