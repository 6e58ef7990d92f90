"""Localization part of ELA: rules that find regions in attention maps, and the state of the regions during a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from elakit.checks import boolean, choice, real_number, refuse, whole_number
from elakit.guidance.layout import Layout, apart, check_layout, layout_masks
from elakit.guidance.memory import Memory
from elakit.prompt import Prompt
from elakit.regions import BINARIZATIONS, DIFFERENTIATIONS, THRESHOLD, Binarization, Differentiation, localize

Background = Literal["start+end", "start"]
QUANTILE = 0.8


@dataclass(frozen=True, kw_only=True)
class FromMaps:
    """Rules by which regions are localized in the attention maps of each guided step.

    Localization has two stages. Differentiation compares the maps of all entities, and gives each entity a score at
    every location. Binarization puts a location in an entity's region if the entity's score there exceeds a threshold.
    The paper on ELA names the two stages, but their exact rules are not public. The default rules reproduce the two
    regions of the paper's method figure with IoU .80 and .93.

    Parameters
    ----------
    differentiation : {"argmax", "subtract-max", "subtract-mean", "none"}
        Rule for the score of an entity at a location. "argmax": the value of the entity's map if this value is the
        largest of all entities' values, else 0. "subtract-max": the value minus the largest value of the other
        entities, at least 0. "subtract-mean": the value minus the mean value of the other entities, at least 0. "none":
        the value itself.
    binarization : {"background", "otsu", "mean-std", "quantile"}
        Rule for the threshold that an entity's score must exceed. "background": `threshold` times the attention of the
        background at the same location. "otsu": Otsu's threshold of the entity's scores. "mean-std": the mean plus the
        standard deviation of the entity's scores. "quantile": the quantile `quantile` of the entity's scores.
    threshold : float, optional
        Factor of the background's attention, 0 or more; .1125 by default. Only for ``binarization="background"``.
    quantile : float, optional
        Quantile of the scores that is the threshold, 0 to 1; .8 by default. Only for ``binarization="quantile"``.
    background : {"start+end", "start"}, optional
        Tokens whose summed attention stands for the background. "start+end" (default): start-of-text, end-of-text and
        padding. "start": start-of-text alone, as in the paper's figure. Models that read the prompt with T5 alone
        (PixArt, FLUX) have no start-of-text; both values then mean end-of-text and padding. Only for
        ``binarization="background"``.
    subtract_pedestal : bool
        Whether the smallest value of each entity's map is subtracted before differentiation.
    smooth : float
        Standard deviation, in locations, of a Gaussian filter that is applied to the maps first; 0 applies no filter.
    min_area : int, optional
        Smallest area of a region, in locations; by default 2% of the map. Smaller regions are enlarged to this area.
    lock_from : int, optional
        Denoising step, counted from 0, at which the regions are locked: the regions localized at this step are kept
        until the end of the run. If the step is not guided, the next guided step counts. By default, regions are
        localized again at every guided step.

    Raises
    ------
    SettingError
        An option is unknown, is out of range, or has no effect with this `binarization`.

    Examples
    --------
    >>> FromMaps().rule()["threshold"]
    0.1125
    >>> FromMaps(binarization="otsu", threshold=0.2)
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: FromMaps(threshold=0.2): must be None with binarization='otsu'. ...
    """

    differentiation: Differentiation = "argmax"
    binarization: Binarization = "background"
    threshold: float | None = None
    quantile: float | None = None
    background: Background | None = None
    subtract_pedestal: bool = True
    smooth: float = 0.0
    min_area: int | None = None
    lock_from: int | None = None

    def __post_init__(self) -> None:
        own: dict[str, Any] = {"owner": "FromMaps"}
        choice(self.differentiation, "differentiation", DIFFERENTIATIONS, **own)
        choice(self.binarization, "binarization", BINARIZATIONS, **own)
        needed = {"threshold": "background", "background": "background", "quantile": "quantile"}
        for option, binarization in needed.items():
            value = getattr(self, option)
            if value is None:
                continue
            if self.binarization != binarization:
                refuse(
                    value, option, f"None with binarization={self.binarization!r}", **own,
                    hint=f"It has an effect with binarization={binarization!r} only.",
                )  # fmt: skip
            if option == "background":
                choice(value, option, ("start+end", "start"), **own)
            else:
                real_number(value, option, 0, 1 if option == "quantile" else None, **own)
        boolean(self.subtract_pedestal, "subtract_pedestal", **own)
        real_number(self.smooth, "smooth", 0, **own)
        for option in ("min_area", "lock_from"):
            if getattr(self, option) is not None:
                whole_number(getattr(self, option), option, 0, **own)

    @classmethod
    def figure(cls) -> FromMaps:
        """Rules for the attention maps that the method figure of the paper on ELA shows.

        The background is start-of-text alone, and the smallest value of a map is not subtracted from the map.

        Examples
        --------
        >>> FromMaps.figure().background
        'start'
        """
        return cls(background="start", subtract_pedestal=False)

    def rule(self) -> dict[str, Any]:
        """Options of this object, as keyword arguments of `elakit.regions.localize`.

        The options `background` and `lock_from` are left out, because `elakit.regions.localize` does not have them. If
        `threshold` or `quantile` is None, its default value is returned.
        """
        return {
            "differentiation": self.differentiation,
            "binarization": self.binarization,
            "threshold": THRESHOLD if self.threshold is None else self.threshold,
            "quantile": QUANTILE if self.quantile is None else self.quantile,
            "subtract_pedestal": self.subtract_pedestal,
            "smooth": self.smooth,
            "min_area": self.min_area,
        }

    def masks(self, entities: Tensor, background: Tensor) -> np.ndarray:
        """Localize the region of each entity by these rules.

        Parameters
        ----------
        entities : Tensor, (entity, y, x)
            Attention map of each entity, as probabilities.
        background : Tensor, (y, x)
            Attention of the background: the result of `rest`.

        Returns
        -------
        ndarray, bool, (entity, y, x)
            Region of each entity. The regions are disjoint.
        """
        return localize(entities, background, **self.rule()).masks

    def rest(self, maps: Tensor, prompt: Prompt) -> Tensor:
        """Attention of the background: the sum of the maps of some special tokens; (token, y, x) -> (y, x).

        The tokens are start-of-text, end-of-text and padding, or start-of-text alone if the option `background` is
        "start". In a text without start-of-text (T5), the tokens are always end-of-text and padding. `maps` has one map
        per text position.
        """
        end = maps[list(prompt.end_positions(len(maps)))].sum(0)
        if prompt.start_index is None:
            return end
        start = maps[prompt.start_index]
        return start if self.background == "start" else start + end

    def locks(self, step: int) -> bool:
        """True if the regions of step `step` are to be kept until the end of the run.

        The result is True from step `lock_from` on; both numbers count from 0. If `lock_from` is None, the result is
        False.
        """
        return self.lock_from is not None and step >= self.lock_from


@dataclass
class Anchors:
    """State of the regions of one image during a run with `ELA` or `RegionalAttention`.

    A change of the state, for example by `steer`, takes effect at the next guided step.

    Attributes
    ----------
    masks : ndarray, bool (entity, y, x), or None
        Regions of all entities that are kept until the end of the run; None while regions are found again at each step.
    given : layout or None
        Regions given by hand: one box or mask per entity, in the order of the prompt. An item that is None stands for
        an entity whose region the method finds. If `given` itself is None, the method finds all regions.
    held : ndarray, bool (entity, y, x), or None
        Regions to which `RegionalAttention` restricted attention most recently; None before the first restriction.
    began : bool
        Whether ELA has computed the loss that anchors entities in their regions for this image.
    first : int
        First step at which ELA anchors the entities in their regions, counted from 0. In the earlier steps, ELA moves
        the maps of the entities apart.
    memory : Memory
        Maps of the previous step, for the loss with which ELA moves the maps of the entities apart.
    steered : bool
        Whether regions were changed during the run. If True, the image is guided again, even if its guidance had ended.
    """

    masks: np.ndarray | None = None
    given: Layout | None = None
    held: np.ndarray | None = None
    began: bool = False
    steered: bool = False
    first: int = 0
    memory: Memory = field(default_factory=Memory)

    def steer(self, given: Layout | None) -> None:
        """Replace the regions given by hand, from the next guided step on.

        The method finds the regions of entities without a given region again.

        Parameters
        ----------
        given : layout or None
            One region per entity, in the order of the prompt: a box (left, top, right, bottom) as fractions of the
            image, or a boolean mask (y, x). An item that is None stands for an entity whose region the method finds. If
            `given` itself is None, the method finds all regions.

        Raises
        ------
        SettingError
            `given` is not a sequence of boxes and masks, or a region is empty or leaves the image.

        Examples
        --------
        >>> anchors = Anchors()
        >>> anchors.steer([(0, 0, 0.5, 1), None])  # a box for the first entity; the method finds the second region
        >>> anchors.given
        ((0.0, 0.0, 0.5, 1.0), None)
        """
        self.given = None if given is None else check_layout(given, "Anchors.steer", partial=True)
        self.masks = None
        self.steered = True


def entity_means(maps: Tensor, prompt: Prompt) -> Tensor:
    """One map per entity: the mean map of the tokens of the entity's noun; (token, y, x) -> (entity, y, x)."""
    return torch.stack([maps[list(entity.token_indices)].mean(0) for entity in prompt.entities])


def is_complete(given: Layout | None) -> bool:
    """True if `given` has a region for every entity; False if `given` is None or one of its items is None."""
    return given is not None and all(region is not None for region in given)


def complete(given: Layout, entities: Tensor, background: Tensor, rule: FromMaps) -> np.ndarray:
    """Find the regions of the entities without a given region, in the locations that no given region covers.

    Parameters
    ----------
    given : layout
        Regions given by hand: one box or mask per entity; None for each entity whose region is to be localized.
    entities : Tensor, (entity, y, x)
        Attention maps of all entities.
    background : Tensor, (y, x)
        Attention of the background: the result of `FromMaps.rest`.
    rule : FromMaps
        Rules by which the missing regions are localized.

    Returns
    -------
    ndarray, bool, (entity, y, x)
        Regions of all entities. They are disjoint: a location in several given regions is assigned to the smallest of
        these regions.
    """
    masks = apart(layout_masks(given, (entities.shape[1], entities.shape[2]), len(entities)))
    others = [i for i, region in enumerate(given) if region is None]
    if others:
        taken = torch.from_numpy(masks.any(0)).to(entities.device)
        # a location that is taken must not attract an entity: it gets the lowest value of the entity's free locations
        lowest = entities[others].masked_fill(taken, math.inf).amin((1, 2), keepdim=True)
        visible = torch.where(taken, lowest.nan_to_num(posinf=0), entities[others])
        masks[others] = rule.masks(visible, background) & ~masks.any(0)
    return masks
