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

    The paper names the two stages (differentiation and binarization) and shows one result; the exact rules are not
    public. The default rules and threshold reproduce the two regions of the paper's method figure (IoU .80 and .93).

    Parameters
    ----------
    differentiation : {"argmax", "subtract-max", "subtract-mean", "none"}
        Rule for the score of an entity at each location: "argmax" gives the entity's map where it is the largest of
        all entities' maps, else 0; "subtract-max" and "subtract-mean" give its map minus the largest or the mean of the
        others, at least 0; "none" gives its map.
    binarization : {"background", "otsu", "mean-std", "quantile"}
        Rule for the threshold above which an entity's score puts a location in the entity's region: `threshold` times
        the attention of the background at the same location ("background"), Otsu's threshold of the entity's scores
        ("otsu"), their mean plus their standard deviation ("mean-std"), or their quantile `quantile` ("quantile").
    threshold : float, optional
        Share of the background's attention at a location that an entity's score there must exceed; .1125 by default.
        Only for ``binarization="background"``.
    quantile : float, optional
        Quantile of an entity's scores above which locations are in its region; .8 by default. Only for
        ``binarization="quantile"``.
    background : {"start+end", "start"}, optional
        Tokens whose attention stands for the background: "start+end" (default) for start-of-text, end-of-text and
        padding, or "start" for start-of-text alone, as in the paper's figure. In Stable Diffusion nearly all of this
        attention is on start-of-text, in picture-world on the padding. Models that read the prompt with T5 alone
        (PixArt, FLUX) have no start-of-text; both values then mean end-of-text and padding. Only for
        ``binarization="background"``.
    subtract_pedestal : bool
        Whether the smallest value of each entity's map is subtracted before differentiation.
    smooth : float
        Standard deviation, in locations, of a Gaussian filter applied to the maps first; 0 switches it off.
    min_area : int, optional
        Smallest area of a region, in locations; by default 2% of the map. A smaller region is enlarged to it.
    lock_from : int, optional
        Denoising step, counted from 0: the regions localized at the first guided step at or after it are kept until the
        end of the run. By default regions are localized again at every guided step.

    Raises
    ------
    SettingError
        An option is unknown, out of range, or has no effect together with the others.

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
        """Settings for the maps of the paper's method figure: start-of-text as background, no pedestal subtracted.

        Examples
        --------
        >>> FromMaps.figure().background
        'start'
        """
        return cls(background="start", subtract_pedestal=False)

    def rule(self) -> dict[str, Any]:
        """Keyword arguments for `elakit.regions.localize` that these options stand for."""
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
        """Regions of the entities.

        Parameters
        ----------
        entities : Tensor, (entity, y, x)
            Attention probabilities.
        background : Tensor, (y, x)
            Attention of the background, from `rest`.

        Returns
        -------
        ndarray, bool, (entity, y, x)
        """
        return localize(entities, background, **self.rule()).masks

    def rest(self, maps: Tensor, prompt: Prompt) -> Tensor:
        """Attention that stands for the background; (token, y, x) -> (y, x)."""
        end = maps[list(prompt.end_positions(len(maps)))].sum(0)
        if prompt.start_index is None:
            return end
        start = maps[prompt.start_index]
        return start if self.background == "start" else start + end

    def locks(self, step: int) -> bool:
        """True if the regions of a denoising step, counted from 0, are kept for the following steps."""
        return self.lock_from is not None and step >= self.lock_from


@dataclass
class Anchors:
    """State of the regions of one image during a run.

    Changing the state, for example through `steer`, takes effect at the next guided step.

    Attributes
    ----------
    masks : ndarray, bool (entity, y, x), or None
        Locked regions of all entities; None while regions are localized at each step.
    given : layout or None
        Regions given by hand; None if there are none.
    held : ndarray, bool (entity, y, x), or None
        Regions to which a method restricted attention in the last pass; None if attention was not restricted.
    began : bool
        Whether an anchoring loss has been computed for the image in this run.
    first : int
        Step at which anchoring starts, counted from 0; in the steps before it, the entities' maps are moved apart.
    memory : Memory
        Maps of the previous step, for the loss that moves the entities' maps apart.
    steered : bool
        Whether regions were changed during the run. The image is then guided again, even if its guidance had ended.
    """

    masks: np.ndarray | None = None
    given: Layout | None = None
    held: np.ndarray | None = None
    began: bool = False
    steered: bool = False
    first: int = 0
    memory: Memory = field(default_factory=Memory)

    def steer(self, given: Layout | None) -> None:
        """Replace the regions given by hand, from the next guided step on, and localize all others again.

        Parameters
        ----------
        given : layout or None
            One region per entity, with None for each entity whose region is to be localized. None in place of the
            whole layout localizes all entities.

        Raises
        ------
        SettingError
            `given` is not a layout, or a region is empty or leaves the image.

        Examples
        --------
        >>> anchors = Anchors()
        >>> anchors.steer([(0, 0, 0.5, 1), None])  # the second entity is still localized
        >>> anchors.given
        ((0.0, 0.0, 0.5, 1.0), None)
        """
        self.given = None if given is None else check_layout(given, "Anchors.steer", partial=True)
        self.masks = None
        self.steered = True


def entity_means(maps: Tensor, prompt: Prompt) -> Tensor:
    """Map of each entity, the mean over the tokens of its noun; (token, y, x) -> (entity, y, x)."""
    return torch.stack([maps[list(entity.token_indices)].mean(0) for entity in prompt.entities])


def is_complete(given: Layout | None) -> bool:
    """True if a layout is given and has a region for every entity."""
    return given is not None and all(region is not None for region in given)


def complete(given: Layout, entities: Tensor, background: Tensor, rule: FromMaps) -> np.ndarray:
    """Regions of all entities: those given by hand, and the others localized in the remaining locations.

    Parameters
    ----------
    given : layout
        One region per entity; None stands for an entity that is localized.
    entities : Tensor, (entity, y, x)
        Attention of the entities.
    background : Tensor, (y, x)
        Attention of the background, from `FromMaps.rest`.
    rule : FromMaps
        Rules by which the other regions are localized.

    Returns
    -------
    ndarray, bool, (entity, y, x)
        Disjoint regions.
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
