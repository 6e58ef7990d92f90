"""DeLeaker (Ventura et al., ICLR 2026, arXiv:2510.15015): attention is reweighted where entities leak into each other.

No loss is optimized: in each layer the attention scores are changed before the softmax. Let A(x, k) be the attention
probability of location x for key k in a layer (mean over heads), and T_i the text tokens of entity i.

- Mask: the map m_i of entity i is the mean of A(x, t) over the tokens t in T_i, averaged over all layers and steps so
  far. The mask M_i of the entity has the locations x at which m_i(x) > mean(m_i) + std(m_i). It is cleaned by
  morphology with a square of 3 x 3 locations: one opening, then one closing of two iterations.
- Image-text weakening: scores from locations in M_i to the tokens of every other entity become minus infinity.
- Image-text strengthening: scores from locations in M_i to the tokens T_i are multiplied by 1.2, once for each other
  entity.
- Image-image weakening: the score from a location x in M_i to a location y in the mask M_j of another entity becomes
  minus infinity if A(x, y) exceeds mean + std of A over all such pairs (x, y).

Equations and settings are those of the paper and of the code that its authors released for FLUX.1 (Apache-2.0). That
code has 20 steps and 57 blocks. It averages maps from block 12 of the first step to the end of step 12, and changes
scores from block 18 of the first step on. Here a block is given as a share of the layers, and the end of averaging as a
share of the steps.

For two entities, probabilities equal those of the released code within 2e-6 (``tests/guidance/test_deleaker.py``).

Intended differences:

- The mask of an entity comes from the maps of its noun, and the changes concern its noun and its attributes. The
  authors give the words of an entity by hand, and have no attributes.
- Minus infinity is -10,000.
- Masks that are not square are cleaned, too. The released code cleans only square masks.
- With three or more entities, image-image weakening uses the layer's probabilities before any change for all pairs of
  entities. The released code computes the probabilities again after each pair, so that the order of entities matters.
- In models with separate self- and cross-attention (U-Nets, PixArt), masks come from maps of one size, and image-image
  weakening changes self-attention. The authors do not treat such models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from elakit.attention.calls import NEVER
from elakit.attention.rescoring import Change, Scores, Site
from elakit.checks import boolean, real_number, share
from elakit.guidance.method import Attention, Loss, ScoreEdit
from elakit.guidance.options import check_acts
from elakit.guidance.reading import EditsFirstSteps, ReadsOneSize
from elakit.measures.arrays import area_mean
from elakit.prompt import Prompt


@dataclass
class Leaks:
    """State of DeLeaker for one image: the sum of the entities' maps so far, and the entities' latest masks.

    Attributes
    ----------
    steps : int
        Number of denoising steps of the run.
    step : int
        Current denoising step, counted from 0.
    size : tuple of int
        (rows, columns) of the maps and masks.
    maps : Tensor, (entity, location), or None
        Sum of each entity's maps over layers and steps; None before the first map is added.
    count : int
        Number of maps in the sum of each entity.
    masks : Tensor, bool, (entity, y, x), or None
        Locations where an entity's averaged map is high, as used in the latest layer with changed scores; None before
        the first such layer.
    """

    steps: int
    step: int = 0
    size: tuple[int, int] = (0, 0)
    maps: Tensor | None = None  # (entity, h*w), sum over layers
    count: int = 0
    masks: Tensor | None = None  # bool, (entity, h, w)


@dataclass(frozen=True, kw_only=True)
class DeLeaker(EditsFirstSteps, ReadsOneSize):
    """DeLeaker (Ventura et al., ICLR 2026): reweight attention between entities, without a gradient.

    The mask of an entity has the locations where the entity's map, averaged over layers and steps, is high. The module
    `elakit.guidance.deleaker` states the equations and all differences from the source.

    Parameters
    ----------
    strength : float
        Factor by which scores from an entity's mask to the entity's own words are multiplied, once for each other
        entity; 1 for no change.
    threshold : float
        A location is in an entity's mask if the entity's averaged map at this location exceeds the mean of the map by
        more than this number of standard deviations.
    image_threshold : float
        Attention between the masks of two entities is cut if it exceeds the mean attention between these masks by more
        than this number of standard deviations. Without effect if `cut_image` is False.
    cut_text : bool
        Whether attention from an entity's mask to the words of other entities is cut (set to 0).
    cut_image : bool
        Whether high attention between the masks of different entities is cut (set to 0).
    start : float
        Denoising step, counted from 0, from which scores are changed. The fractional part is a share of the layers:
        0.31 means the first step, after 31% of the layers.
    average_from : float
        Denoising step, counted from 0, from which maps are averaged. The fractional part is a share of the layers, as
        for `start`.
    averaged : float
        Share of the denoising steps after which maps are no longer averaged, so that the masks no longer change.
    guided : float
        Share of the denoising steps in which scores are changed, beginning with the first step.
    layers : str
        Layers that are read for the trace: "all", "up" (decoder), "down", "mid" or a glob on layer names such as
        "up_blocks.1.*". The masks have the size of these layers' maps. Scores are changed in all layers.
    size : int, optional
        Number of locations along the longer side of the maps from which the masks are computed; by default 16, or the
        nearest size that the model has.

    Raises
    ------
    SettingError
        An option is out of range.

    Examples
    --------
    >>> DeLeaker(strength=1.5).strength
    1.5
    >>> DeLeaker(guided=2)
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: DeLeaker(guided=2): must be a number from 0 to 1...
    """

    strength: float = 1.2
    threshold: float = 1.0
    image_threshold: float = 1.0
    cut_text: bool = True
    cut_image: bool = True
    start: float = 0.31
    average_from: float = 0.2
    averaged: float = 0.6
    guided: float = 1.0

    name: ClassVar[str] = "deleaker"
    title: ClassVar[str] = "DeLeaker"

    def __post_init__(self) -> None:
        own: dict[str, Any] = {"owner": "DeLeaker"}
        for name in ("strength", "start", "average_from"):
            real_number(getattr(self, name), name, 0, **own)
        for name in ("threshold", "image_threshold"):
            real_number(getattr(self, name), name, **own)
        for name in ("cut_text", "cut_image"):
            boolean(getattr(self, name), name, **own)
        for name in ("averaged", "guided"):
            share(getattr(self, name), name, **own)
        if not self.cut_image:
            check_acts(self, "cut_image=False", "image_threshold")

    def begin(self, prompt: Prompt, steps: int) -> Leaks:
        """State of one image before a run of `steps` denoising steps, without any maps or masks."""
        return Leaks(steps)

    def hold(
        self, attention: Attention | None, size: tuple[int, int], prompt: Prompt, step: int, state: Leaks
    ) -> ScoreEdit:
        """Return the edit that changes one image's attention scores in all layers.

        When the edit is applied, it also adds the entities' maps to `state.maps`. `attention` is not used. `size` is
        the (rows, columns) of the maps from which the masks are computed.
        """
        state.step, state.size = step, size
        return ScoreEdit(lambda site, scores: self._change(site, scores, prompt, state))

    def _change(self, site: Site, scores: Scores, prompt: Prompt, state: Leaks) -> Change | None:
        """Change of one layer's attention scores; None before the step `start`, or if `state.maps` is still None.

        `site` describes the layer, and ``scores()`` computes the layer's scores. From the step `average_from` on, the
        entities' maps in the layer are first added to `state.maps`.
        """
        now = state.step + site.position
        logits = scores(masked=True)
        probabilities = logits.softmax(-1)
        if site.text is not None and site.size == state.size and now >= self.average_from:
            self._average(probabilities, site.text.start, prompt, state)
        if now < self.start or state.maps is None:
            return None
        state.masks = _clean(_above(state.maps / state.count, self.threshold).unflatten(1, state.size))
        masks = _resized(state.masks, site.size).flatten(1)
        change = torch.zeros_like(logits)
        if site.text is not None:
            self._change_text(change, logits, site.text.start, masks, prompt)
        if site.own is not None and self.cut_image:
            change[:, :, site.own] += self._cuts(probabilities[:, :, site.own].mean(0), masks)
        return Change(change.clamp(min=NEVER))

    def _average(self, probabilities: Tensor, first: int, prompt: Prompt, state: Leaks) -> None:
        """Add the entities' maps in one layer to the sum `state.maps`.

        After the share `averaged` of the denoising steps, the sum no longer changes; only an empty sum still gets its
        first maps. `probabilities` is the layer's attention, (head, location, key). `first` is the index of the first
        key that is a text position.
        """
        if state.maps is not None and state.step >= math.ceil(self.averaged * state.steps):
            return
        mean = probabilities.mean(0)
        maps = torch.stack([mean[:, [first + at for at in e.token_indices]].mean(1) for e in prompt.entities])
        state.maps = maps if state.maps is None else state.maps + maps
        state.count += 1

    def _change_text(self, change: Tensor, logits: Tensor, first: int, masks: Tensor, prompt: Prompt) -> None:
        words = [[first + at for at in (*e.token_indices, *e.attribute_indices)] for e in prompt.entities]
        factor = self.strength ** (len(words) - 1) - 1
        for mask, own in zip(masks, words, strict=True):
            change[:, :, own] += factor * logits[:, :, own] * mask[:, None]
        if self.cut_text:
            for i, j in permutations(range(len(words)), 2):
                shared = sorted(set(words[j]) - set(words[i]))  # an adjective of both entities belongs to both
                change[:, :, shared] += NEVER * masks[i][:, None]

    def _cuts(self, mean: Tensor, masks: Tensor) -> Tensor:
        """Bias that cuts high attention between the masks of different entities.

        Take two masks, and all pairs of a location in the first mask and a location in the second. The attention of a
        pair is high if it exceeds the mean over these pairs by more than `image_threshold` standard deviations. Pairs
        with an attention of 0 are left out of mean and standard deviation.

        Parameters
        ----------
        mean : Tensor, (h*w, h*w)
            Self-attention from each location (row) to all locations, averaged over heads.
        masks : Tensor, bool, (entity, h*w)
            Mask of each entity.

        Returns
        -------
        Tensor, (h*w, h*w)
            -10,000 for each pair of locations with high attention between different masks, else 0.
        """
        cuts = torch.zeros_like(mean)
        for i, j in permutations(range(len(masks)), 2):
            across = masks[i][:, None] & masks[j]
            found = mean[across & (mean != 0)]
            if len(found) > 1:
                limit = found.mean() + self.image_threshold * found.std()
                cuts[across & (mean > limit)] = NEVER
        return cuts

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: Leaks) -> Loss:
        """Attention from the entities' masks to the nouns of other entities, for the trace only.

        For two entities e and f, the attention to the noun of f is averaged over the locations in the mask of e. The
        loss is the mean over all ordered pairs (e, f). Before the first masks are computed, the average is taken over
        all locations, with the map of e as weights.
        """
        maps = torch.stack([attention.mean[list(e.token_indices)].mean(0) for e in prompt.entities])
        weights = maps if state.masks is None else state.masks.to(maps)
        shares = weights / weights.sum((1, 2), keepdim=True).clamp(min=1e-9)
        pairs = [(shares[i] * maps[j]).sum() for i, j in permutations(range(len(maps)), 2)]
        total = torch.stack(pairs).mean() if pairs else maps.sum() * 0
        masks = None if state.masks is None else state.masks.cpu().numpy()
        return Loss(total, {"leak": float(total.detach())}, masks)


def _above(maps: Tensor, deviations: float) -> Tensor:
    """Locations where a map exceeds its mean by a number of standard deviations; (entity, n) -> bool (entity, n)."""
    return maps > maps.mean(1, keepdim=True) + deviations * maps.std(1, keepdim=True)


def _clean(masks: Tensor) -> Tensor:
    """Clean masks by morphology with a square of 3 x 3 locations: one opening, then one closing of two iterations.

    At the border of the map, the part of the square outside the map is ignored. `masks` is bool (entity, y, x).
    """
    grown = masks[:, None].float()
    for grow in (False, True, True, True, False, False):
        grown = _dilated(grown) if grow else 1 - _dilated(1 - grown)
    return grown[:, 0].bool()


def _dilated(masks: Tensor) -> Tensor:
    return F.max_pool2d(masks, 3, stride=1, padding=1)


def _resized(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks resized to `size`, (rows, columns); a location is in a mask if the mask covers at least half of it."""
    if tuple(masks.shape[1:]) == size:
        return masks
    return torch.from_numpy(area_mean(masks.cpu().numpy(), size) >= 0.5).to(masks.device)
