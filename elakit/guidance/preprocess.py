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
    """Map of each entity, prepared as in Attend-and-Excite.

    The maps of all tokens are sharpened by `word_softmax`. The sharpened maps are averaged over the tokens of each
    entity's noun, and then smoothed by `smooth`.

    Parameters
    ----------
    maps : Tensor, (token, y, x)
        Raw attention probabilities of all text positions.
    prompt : Prompt
    normalize_eot : bool
        Whether end-of-text and padding are left out of the softmax over tokens. If False, only start-of-text and the
        last position are left out.

    Returns
    -------
    Tensor, (entity, y, x)
    """
    words = word_softmax(maps, prompt.start_index, prompt.end_index if normalize_eot else None)
    return smooth(torch.stack([words[list(entity.token_indices)].mean(0) for entity in prompt.entities]))


def word_softmax(maps: Tensor, start: int | None = 0, end: int | None = None) -> Tensor:
    """Sharpened attention maps: the softmax over tokens of 100 times the attention probabilities.

    Start-of-text and one or more positions at the end are left out of the softmax.

    Parameters
    ----------
    maps : Tensor, (token, y, x)
        Raw attention probabilities of all text positions.
    start : int or None
        Position of start-of-text; None if the text has no start-of-text (T5). The softmax begins after start-of-text,
        or at the first position of the text.
    end : int, optional
        Position at which the softmax ends: this position and all later positions are left out. By default, only the
        last position is left out, as in the official code for Stable Diffusion 1.x. In the official code for 2.x
        (``normalize_eot``), `end` is the position of end-of-text.

    Returns
    -------
    Tensor, (token, y, x)
        Sharpened maps of all text positions, with 0 at the positions that are left out.

    Examples
    --------
    Four text positions at one location, of which the first and the last are left out:

    >>> maps = torch.tensor([0.7, 0.2, 0.1, 0.0]).view(4, 1, 1)
    >>> [round(value, 3) for value in word_softmax(maps).flatten().tolist()]
    [0.0, 1.0, 0.0, 0.0]
    """
    first = 0 if start is None else start + 1
    past = len(maps) - 1 if end is None else end
    inner = (100 * maps[first:past]).softmax(0)
    return torch.cat([torch.zeros_like(maps[:first]), inner, torch.zeros_like(maps[past:])])


def smooth(maps: Tensor, sigma: float = 0.5) -> Tensor:
    """Smooth maps with a Gaussian kernel of 3 x 3 locations; maps are reflected at their edges.

    The weight of a location at distance d is exp(-(d / (2 sigma))^2), divided by the sum of the nine weights. This is
    the formula in the official code of Attend-and-Excite. The standard deviation of this kernel is not sigma, but sigma
    times the square root of 2: 0.707 locations by default.

    Parameters
    ----------
    maps : Tensor, (n, y, x)
        Maps of at least 2 x 2 locations.
    sigma : float
        Width of the kernel, in locations: the standard deviation divided by the square root of 2.

    Returns
    -------
    Tensor, (n, y, x)

    Examples
    --------
    The middle row of a map whose only value is a 1 at the center:

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
    """Binarize maps by Otsu's threshold, as in the official code of InitNO and Self-Cross.

    The values of a map are rounded down to gray levels from 0 to 255. Otsu's method divides these gray levels into a
    lower and an upper class. The threshold is the highest gray level of the lower class. The mask also contains the
    locations at this gray level, as in the official code.

    Parameters
    ----------
    maps : Tensor, (n, y, x)
        Maps with values between 0 and 1.

    Returns
    -------
    ndarray, bool, (n, y, x)
        Mask of each map: True at or above the threshold of the map.

    Examples
    --------
    The lower class is 0.0 and 0.1. The gray level of 0.1 is the threshold, so that 0.1 is in the mask:

    >>> quantized_otsu(torch.tensor([[[0.0, 0.1, 0.9, 0.8]]])).astype(int).tolist()
    [[[0, 1, 1, 1]]]
    """
    values = maps.detach().cpu().numpy()
    levels = (values * _LEVELS).astype(np.uint16)
    thresholds = [threshold_otsu(level) / _LEVELS for level in levels]
    return np.stack([value >= threshold for value, threshold in zip(values, thresholds, strict=True)])


def clean_background(maps: Tensor) -> Tensor:
    """Clean-background term in the losses of InitNO and Self-Cross: strong attention in the background of a map.

    The foreground of a map is a connected component of the map's Otsu mask (`quantized_otsu`): the component that
    contains the largest value of the map. Each location is connected to 4 neighbors. All locations outside the
    foreground are background.

    If the largest background value exceeds the smallest foreground value, the map contributes the largest background
    value to the term. Otherwise the map contributes 0. The term is the sum over all maps.

    Parameters
    ----------
    maps : Tensor, (n, y, x)
        Maps with values between 0 and 1.

    Returns
    -------
    Tensor, scalar

    Examples
    --------
    The foreground is 0.9 and 0.8. The background value 0.85 exceeds 0.8:

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
    """Exponential moving average of an image's maps, for the alignment term in the losses of InitNO and Self-Cross.

    Attributes
    ----------
    average : Tensor, (n, y, x), or None
        Average of all maps so far; None as long as there are no maps. The first maps are the first average. Later maps
        change the average to 0.9 times the previous average plus 0.1 times the new maps.
    """

    average: Tensor | None = None

    def distance(self, maps: Tensor) -> Tensor:
        """Add maps to the moving average, and return the distance of these maps from the new average.

        `maps` is (n, y, x). The distance of one map is the mean absolute difference over all locations. The result is a
        scalar, the sum over the n maps. The new average is 0.9 times the previous average plus 0.1 times `maps`; the
        first maps are the first average.

        Examples
        --------
        The first map is 0.5. The second map is 1.0, and the new average is 0.9 * 0.5 + 0.1 * 1.0 = 0.55:

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
    """Updates with the decreasing step sizes of Attend-and-Excite, and with refinements at some steps.

    Parameters
    ----------
    steps : int
        Number of denoising steps of the run.
    step_size : float
        Step size at the first step. The step size at step i, counted from 0, is
        ``step_size * sqrt(1 - (1 - last) i / (steps - 1))``.
    guided : float
        Share of the denoising steps that are guided, beginning with the first step; 0.5 by default.
    last : float
        Square of a ratio: the step size at the last step of the run, divided by the step size at the first step. With
        1, the step size is constant.
    refine : sequence of (float, float or None, int)
        Refinements, each with three values. The first value is the step of the refinement, as a share of all steps. The
        second is the loss at or below which the refinement ends; None means that all latent steps are made. The third
        is the largest number of latent steps. If several refinements fall on the same step, only the last of these
        refinements takes place.

    Returns
    -------
    list of Update
        One per guided step.

    Examples
    --------
    Five of ten steps are guided. The refinement at step 0 ends at a loss of 0.95, and the refinement at step 2 at 0.5:

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
    """Updates of Attend-and-Excite and BoxDiff, with refinements until the attention of every entity reaches a goal.

    Let a be the attention of the entity with the least attention. A refinement ends as soon as 1 - a is at most
    `Update.until`. For a goal of 0.75, `Update.until` is therefore 0.25.

    Parameters
    ----------
    steps : int
        Number of denoising steps of the run.
    prompt : Prompt
    step_size : float
        Step size at the first step; `schedule` has the formula for the later steps.
    guided : float
        Share of the denoising steps that are guided, beginning with the first step.
    refine : sequence of (float, float, int)
        Refinements, each with three values: the step of the refinement, as a share of all steps; the attention that
        every entity has to reach; and the largest number of latent steps.

    Returns
    -------
    list of Update
        One per guided step; an empty list for a prompt with only one entity.

    Examples
    --------
    Three of ten steps are guided, and step 2 has a refinement with the goal 0.75:

    >>> import elakit
    >>> prompt = elakit.parse("a [red car] and a [bird]", elakit.load("picture-world"))
    >>> [update.until for update in excitation(10, prompt, 20.0, guided=0.3, refine=[(0.2, 0.75, 20)])]
    [None, None, 0.25]
    """
    if len(prompt.entities) < 2:
        return []
    losses = [(share, 1 - least, most) for share, least, most in refine]
    return schedule(steps, step_size, guided=guided, refine=losses)
