"""Map preparation and schedules shared by the methods that descend from Attend-and-Excite.

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
        Leave end-of-text and padding out of the softmax over tokens, see `word_softmax`.

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
        Position of start-of-text, 0; None where the text has none (T5) and the first position is a word's.
    end : int, optional
        First position that is left out of the softmax. By default the last position alone is left out, as the
        official code does for Stable Diffusion 1.x; for 2.x it leaves out end-of-text and padding (its
        ``normalize_eot``), which is the position of end-of-text here.

    Returns
    -------
    Tensor, (token, y, x)
        All positions, so that token indices stay valid; those left out are 0.

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

    The official kernel's weights are exp(-(d / (2 sigma))^2), so its sigma of 0.5 acts as 0.707; this is kept.

    Parameters
    ----------
    maps : Tensor, (n, y, x)
        At least 2 x 2.
    sigma : float
        Width in the official code's convention.

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
    """Otsu masks as the codes of InitNO and Self-Cross compute them: the threshold is that of the map in 8 bits.

    Parameters
    ----------
    maps : Tensor, (n, y, x)
        Between 0 and 1.

    Returns
    -------
    ndarray, bool, (n, y, x)
        Locations at or above the threshold, which is the highest level of the lower class: locations of that level
        belong to the mask, as in the official code.

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
    """The clean-background term of InitNO and Self-Cross: attention outside the component that holds the maximum.

    For each map, the component of its Otsu mask (`quantized_otsu`, 4-connected) around the largest value is the
    foreground. The map contributes its largest background value where that exceeds the smallest foreground value.

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
    """Exponential average of the maps of all passes of an image, for the alignment term of InitNO and Self-Cross.

    Attributes
    ----------
    average : Tensor, optional
        0.9 times the average before plus 0.1 times the latest maps; the first maps themselves after the first pass.
    """

    average: Tensor | None = None

    def distance(self, maps: Tensor) -> Tensor:
        """Sum over maps of the mean absolute difference from the average, which these maps then enter.

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
    """When and how far the latent moves.

    Parameters
    ----------
    steps : int
        Denoising steps (calls of the model) of the run.
    step_size : float
        Step size of the first step; at step i it is ``step_size * sqrt(1 - (1 - last) i / (steps - 1))``.
    guided : float
        Share of the steps that are guided, from the first.
    last : float
        See `step_size`; 1 keeps it constant.
    refine : sequence of (float, float or None, int)
        Refinements: the share of the steps at which each takes place, the loss at which it ends (None: it makes all its
        updates), and the largest number of updates. Where several shares fall on one step of a short run, the last one
        counts.

    Returns
    -------
    list of Update
        One per guided step.

    Examples
    --------
    >>> updates = schedule(10, 20.0, refine=[(0.0, 0.95, 20), (0.2, 0.5, 20)])
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
    """Schedule of Attend-and-Excite, which BoxDiff shares: every entity's attention is raised to given values.

    Parameters
    ----------
    steps, step_size, guided
        See `schedule`.
    prompt : Prompt
    refine : sequence of (float, float, int)
        Refinements: the share of the steps, the attention that every entity has to reach, and the largest number of
        updates. The loss of a refinement is 1 - the attention of the most neglected entity.

    Returns
    -------
    list of Update
        One per guided step; none where the prompt names only one entity.

    Examples
    --------
    >>> import elakit
    >>> prompt = elakit.parse("a [red car] and a [bird]", elakit.load("picture-world"))
    >>> [update.until for update in excitation(10, prompt, 20.0, guided=0.3, refine=[(0.2, 0.5, 20)])]
    [None, None, 0.5]
    """
    if len(prompt.entities) < 2:
        return []
    losses = [(share, 1 - least, most) for share, least, most in refine]
    return schedule(steps, step_size, guided=guided, refine=losses)
