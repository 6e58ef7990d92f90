"""DeLeaker (Ventura et al., ICLR 2026, arXiv:2510.15015): attention is reweighted where entities leak into each other.

Nothing is optimized: in each layer the attention scores are changed before the softmax. With A the attention
probabilities of a layer (mean over heads) and T_i the text tokens of entity i:

- mask of an entity: M_i = {x : m_i(x) > mean(m_i) + std(m_i)}, with m_i(x) the mean of A(x, t) over t in T_i, averaged
  over all layers and steps so far; the mask is then opened and closed (morphology) with a square of 3 x 3 locations,
  the closing with two iterations;
- image-text weakening: scores of x in M_i to the tokens of every other entity become minus infinity;
- image-text strengthening: scores of x in M_i to T_i are multiplied by 1.2, once for each other entity;
- image-image weakening: for x in M_i and y in M_j, scores become minus infinity where A(x, y) exceeds mean + std of A
  over M_i x M_j.

Equations and settings are those of the paper and of the code that its authors released for FLUX.1 (Apache-2.0). In
that code, with 20 steps and 57 blocks, averaging begins in block 12 of the first step and ends with step 12, and scores
are changed from block 18 of the first step on. Here blocks are given as shares of the layers, and the end of averaging
is given as a share of the steps.

For two entities, probabilities equal those of the released code within 2e-6 (``tests/guidance/test_deleaker.py``).

Intended differences: the masks are those of an entity's noun, and the changes concern its noun and its attributes (the
authors give words by hand, and have no attributes). Minus infinity is -10,000. Maps that are not square are cleaned,
too, which the released code leaves out. With three or more entities, the cuts of all pairs depend on the layer's
probabilities before any cut; the released code computes the probabilities again after each pair, so that the order of
entities matters. In models with separate self- and cross-attention (U-Nets, PixArt), which the authors do not treat,
masks come from the maps of one size, and image-image weakening changes self-attention.
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
    """State of DeLeaker for one image: the sum and number of the entities' maps so far, and the latest masks.

    Attributes
    ----------
    steps : int
        Denoising steps of the run.
    step : int
        Present step, counted from 0.
    size : tuple of int
        (rows, columns) of the maps.
    maps : Tensor, (entity, location), or None
        Sum of the entities' maps over layers and steps; None before the first map is added.
    count : int
        Number of maps per entity in `maps`.
    masks : Tensor, bool, (entity, y, x), or None
        Masks used for the latest layer whose scores were changed; None before the first such layer.
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

    The module `elakit.guidance.deleaker` states the equations and all differences from the source.

    Parameters
    ----------
    strength : float
        Factor by which scores from an entity's mask to its own words are multiplied, once for each other entity; 1 does
        not change them.
    threshold : float
        Number of standard deviations by which an entity's map at a location must exceed the mean of the map, for the
        location to be in the entity's mask.
    image_threshold : float
        Number of standard deviations by which the attention from a location in one entity's mask to a location in
        another's must exceed the mean attention between the two masks to be cut. Has an effect only if `cut_image` is
        True.
    cut_text : bool
        Whether attention from an entity's mask to the words of other entities is cut (set to 0).
    cut_image : bool
        Whether high attention between the masks of different entities is cut (set to 0).
    start : float
        Denoising step, counted from 0, at which scores are first changed. Its fractional part is a share of the
        layers: 0.31 is the first step, after 31% of its layers.
    average_from : float
        Denoising step, counted from 0, at which the average of the maps begins. Its fractional part is a
        share of the layers, as for `start`.
    averaged : float
        Share of the denoising steps after which the average of the maps, and with it the masks, no longer changes.
    guided : float
        Share of the denoising steps in which scores are changed, from the first.
    layers : str
        Layers that are read for the trace: "all", "up" (decoder), "down", "mid" or a glob on layer names such as
        "up_blocks.1.*". Their map size is that of the masks; scores of all layers are changed.
    size : int, optional
        Number of locations along the longer side of the maps that give the masks; by default 16, or the nearest that
        the model has.

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
        """Values that the method keeps for one image during a run, as they are before its first step."""
        return Leaks(steps)

    def hold(
        self, attention: Attention | None, size: tuple[int, int], prompt: Prompt, step: int, state: Leaks
    ) -> ScoreEdit:
        """Return the edit that changes one image's scores in all layers, and adds the entities' maps to `state.maps`.

        `attention` is not used; `size` is (rows, columns) of the maps that are read.
        """
        state.step, state.size = step, size
        return ScoreEdit(lambda site, scores: self._change(site, scores, prompt, state))

    def _change(self, site: Site, scores: Scores, prompt: Prompt, state: Leaks) -> Change | None:
        """Change of one layer's scores; None before `start`, or if no maps have been added up yet."""
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
        """Add the entities' maps of one layer to their sum, unless the share `averaged` of the steps is over.

        `probabilities` is (head, h*w, key); `first` is the key of the first text position.
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
        """Bias that cuts high attention between the masks of different entities: -10,000 where it is cut, else 0.

        Attention between two masks is high if it exceeds the mean attention between them by more than `image_threshold`
        standard deviations. Pairs of locations with an attention of 0 do not count in mean and standard deviation.

        Parameters
        ----------
        mean : Tensor, (h*w, h*w)
            Self-attention from each location (row) to all, averaged over heads.
        masks : Tensor, bool, (entity, h*w)
            Mask of each entity.

        Returns
        -------
        Tensor, (h*w, h*w)
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

        It is the mean attention from one entity's mask to another's noun, averaged over ordered pairs. Before the first
        masks are computed, the mean is weighted by the entity's map instead.
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
    """Open masks with a square of 3 x 3, then close them with two iterations; locations outside the map are ignored."""
    grown = masks[:, None].float()
    for grow in (False, True, True, True, False, False):
        grown = _dilated(grown) if grow else 1 - _dilated(1 - grown)
    return grown[:, 0].bool()


def _dilated(masks: Tensor) -> Tensor:
    return F.max_pool2d(masks, 3, stride=1, padding=1)


def _resized(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks at another size; a location is in a mask if the mask covers at least half of it."""
    if tuple(masks.shape[1:]) == size:
        return masks
    return torch.from_numpy(area_mean(masks.cpu().numpy(), size) >= 0.5).to(masks.device)
