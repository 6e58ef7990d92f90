"""Anchoring part of ELA: a loss that is small if each entity's attention is in its region, and latent steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from elakit.checks import choice, real_number, refuse, share, whole_number
from elakit.guidance.localization import entity_means
from elakit.guidance.method import Loss, Update
from elakit.guidance.quotients import ratio
from elakit.prompt import Prompt

TERMS = ("outside", "presence", "intrusion", "attributes")
NEEDED, ENOUGH = 0.9, 0.7
LATE = 0.16  # default start of guidance where regions are localized: earlier maps are nearly noise


@dataclass(frozen=True, kw_only=True)
class LatentStep:
    """Anchoring of ELA: a loss on the maps, and latent steps along its negative gradient.

    The form of the step is the paper's, ``z' = z - step_size * gradient``. The loss is ours: a weighted sum of four
    terms, each a mean over entities (or attributes).

    Parameters
    ----------
    start : float, optional
        Share of the denoising steps before guidance starts. By default .16 if regions are localized, because earlier
        maps are nearly noise, and 0 if all regions are given by hand.
    guided : float
        Share of the denoising steps that are guided, from `start` on.
    every : int
        Interval of the guided steps: 1 guides each step, n every n-th step.
    step_size : float
        Step size alpha at the first guided step. With ``gradient="normalized"`` it is the root mean square of the
        change of the latent, whose initial noise has unit variance.
    decay : float
        Step size at the last guided step as a share of `step_size`; it changes linearly in between.
    gradient : {"normalized", "raw"}
        Gradient along which the latent moves: scaled to a root mean square of 1 ("normalized"), or not scaled ("raw").
    needed : float, optional
        Threshold of the shortfall at the first guided step: an image with a shortfall at or below this value is not
        anchored at all. The shortfall, a column of the trace, is the sum of two values: the largest squared share of
        any entity's attention outside its region, and 1 minus the smallest of the entities' peaks, where the peak of an
        entity is its largest attention inside its region. None anchors every image. The default was chosen on
        picture-world, where the shortfall predicts failing images better than the loss does. If all shortfalls of a
        model exceed the default, every image is anchored.
    enough : float, optional
        Threshold of the shortfall at each later guided step: if the shortfall is at or below this value, anchoring of
        the image ends, and the latent does not move at this step either. With None, anchoring does not end early.
    outside : float
        Weight of the squared share of an entity's attention outside its region. The closest published form is the loss
        of layout guidance (Chen et al., WACV 2024).
    presence : float
        Weight of 1 minus an entity's largest attention inside its region.
    intrusion : float
        Weight of an entity's intrusion: its mean attention in the regions of the other entities, divided by the sum of
        this mean and its mean attention in its own region.
    attributes : float
        Weight of the squared share of an attribute's attention outside the region of its entity.

    Raises
    ------
    SettingError
        An option is out of range, or all weights are 0.

    Examples
    --------
    >>> LatentStep(guided=0.5).guided
    0.5
    >>> LatentStep(guided=2)
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: LatentStep(guided=2): must be a number from 0 to 1.
    """

    start: float | None = None
    guided: float = 0.4
    every: int = 1
    step_size: float = 0.1
    decay: float = 0.5
    gradient: Literal["normalized", "raw"] = "normalized"
    needed: float | None = NEEDED
    enough: float | None = ENOUGH
    outside: float = 1.0
    presence: float = 1.0
    intrusion: float = 0.5
    attributes: float = 1.0

    def __post_init__(self) -> None:
        own: dict[str, Any] = {"owner": "LatentStep"}
        if self.start is not None:
            share(self.start, "start", **own)
        share(self.guided, "guided", **own)
        whole_number(self.every, "every", 1, **own)
        for option in ("step_size", "decay", *TERMS):
            real_number(getattr(self, option), option, 0, **own)
        for option in ("needed", "enough"):
            if getattr(self, option) is not None:
                real_number(getattr(self, option), option, 0, **own)
        choice(self.gradient, "gradient", ("normalized", "raw"), **own)
        if not any(getattr(self, term) for term in TERMS):
            refuse(0, "outside", "above 0 if presence, intrusion and attributes are 0", **own)

    def starts_at(self, *, localized: bool) -> float:
        """Share of the run before anchoring starts: `start` or its default; `localized` is described at `plan`."""
        return (LATE if localized else 0.0) if self.start is None else self.start

    def plan(self, steps: int, *, localized: bool) -> list[Update]:
        """Updates of a run; their step sizes change linearly from `step_size` to `decay` times `step_size`.

        Parameters
        ----------
        steps : int
            Denoising steps of the run.
        localized : bool
            Whether at least one entity's region is localized in the maps instead of given by hand.
        """
        first, count = round(self.starts_at(localized=localized) * steps), round(self.guided * steps)
        sizes = np.linspace(self.step_size, self.step_size * self.decay, max(count, 1))[:count]
        idle = Update(0.0)
        return [*[idle] * first, *(Update(float(s)) if i % self.every == 0 else idle for i, s in enumerate(sizes))]

    def direction(self, gradient: Tensor) -> Tensor:
        """The raw gradient, or the gradient scaled to a root mean square of 1."""
        if self.gradient == "raw":
            return gradient
        return gradient / gradient.pow(2).mean().sqrt().clamp_min(torch.finfo(gradient.dtype).tiny)

    def loss(self, maps: Tensor, masks: np.ndarray, prompt: Prompt, *, first: bool = False) -> Loss:
        """Anchoring loss of one image at one step.

        Parameters
        ----------
        maps : Tensor, (token, y, x)
            Attention probabilities.
        masks : ndarray, bool, (entity, y, x)
            Regions; no gradient passes through them.
        prompt : Prompt
        first : bool
            Whether this is the first guided step of the image, at which the shortfall is compared with `needed` instead
            of `enough`.

        Returns
        -------
        Loss
            Its terms are "outside", "presence", "intrusion" and "attributes" without their weights, and "shortfall",
            which is not part of the total. For a word without any attention, "outside", "presence" and "attributes"
            have their largest value, 1, and "intrusion" is 0.
        """
        entities, regions = entity_means(maps, prompt), torch.from_numpy(masks).to(maps.device)
        terms = {
            "outside": outside_share(entities, regions).square().mean(),
            "presence": (1 - peaks(entities, regions)).mean(),
            "intrusion": intrusion(entities, regions).mean(),
            "attributes": attributes_outside(maps, regions, prompt),
        }
        total = torch.stack([getattr(self, name) * term for name, term in terms.items()]).sum()
        least = self.needed if first else self.enough
        values = {name: float(term.detach()) for name, term in terms.items()}
        values["shortfall"] = shortfall(entities.detach(), regions)
        enough = least is not None and values["shortfall"] <= least
        return Loss(total, values, masks, enough=enough)


def outside_share(maps: Tensor, regions: Tensor) -> Tensor:
    """Share of each map's attention outside its region, 1 for a map without any attention; (n, y, x) -> (n,).

    Examples
    --------
    >>> outside_share(torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]]), torch.tensor([[[True, False]], [[True, False]]]))
    tensor([0.7500, 1.0000])
    """
    return 1 - ratio((maps * regions).sum((1, 2)), maps.sum((1, 2)))


def peaks(maps: Tensor, regions: Tensor) -> Tensor:
    """Largest attention of each map inside its region; (n, y, x) -> (n,)."""
    return maps.masked_fill(~regions, 0).amax((1, 2))


def shortfall(maps: Tensor, regions: Tensor) -> float:
    """Shortfall of an image, which measures how badly its weakest entities are anchored.

    It is the sum of the largest squared `outside_share` of any entity, and of 1 minus the smallest of the entities'
    `peaks`. The two may come from different entities. They are extremes instead of means because one neglected entity
    makes an image fail. Attributes do not count, so that prompts with and without them have the same scale.

    Parameters
    ----------
    maps : Tensor, (entity, y, x)
        Attention probabilities.
    regions : Tensor, bool, (entity, y, x)

    Returns
    -------
    float
        From 0 (every entity has all its attention in its region, with a peak of 1) to 2.

    Examples
    --------
    >>> maps = torch.tensor([[[1.0, 0.0]], [[0.25, 0.25]]])
    >>> shortfall(maps, torch.tensor([[[True, False]], [[False, True]]]))  # second: .5^2 + (1 - .25)
    1.0
    """
    return float(outside_share(maps, regions).square().amax() + (1 - peaks(maps, regions)).amax())


def intrusion(maps: Tensor, regions: Tensor) -> Tensor:
    """Mean attention of each map in the other regions, divided by the sum of this mean and that in its own region.

    Maps are (n, y, x), and the result is (n,). The value is 0 for a map without attention in any region.
    """
    areas = regions.sum((1, 2)).clamp_min(1).to(maps.dtype)
    means = torch.einsum("eyx,fyx->ef", maps, regions.to(maps.dtype)) / areas
    own = means.diagonal()
    others = (means.sum(1) - own) / max(1, len(maps) - 1)
    return ratio(others, own + others)


def confinement(maps: Tensor, masks: np.ndarray, prompt: Prompt, regions: np.ndarray | None = None) -> Loss:
    """Loss that the trace stores for methods that optimize none: squared shares of attention outside the masks.

    Parameters
    ----------
    maps : Tensor, (token, y, x)
        Attention probabilities.
    masks : ndarray, bool, (entity, y, x)
        Locations at which each entity's words may receive attention.
    prompt : Prompt
    regions : ndarray, bool, (entity, y, x), optional
        Regions that the trace stores; by default the masks. The loss does not depend on the regions.

    Returns
    -------
    Loss
        Sum of the terms "outside" (squared share of each entity's attention outside its mask, mean over entities) and
        "attributes" (the same for each attribute token and the mask of its entity, mean over these tokens).
    """
    inside = torch.from_numpy(masks).to(maps.device)
    terms = {
        "outside": outside_share(entity_means(maps, prompt), inside).square().mean(),
        "attributes": attributes_outside(maps, inside, prompt),
    }
    total = terms["outside"] + terms["attributes"]
    return Loss(
        total, {name: float(term.detach()) for name, term in terms.items()}, masks if regions is None else regions
    )


def attributes_outside(maps: Tensor, regions: Tensor, prompt: Prompt) -> Tensor:
    """Mean squared `outside_share` over attribute tokens, each with the region of its entity; 0 without attributes."""
    owners: Sequence[tuple[int, int]] = [
        (token, i) for i, entity in enumerate(prompt.entities) for token in entity.attribute_indices
    ]
    if not owners:
        return maps.new_zeros(())
    tokens, entities = (list(column) for column in zip(*owners, strict=True))
    return outside_share(maps[tokens], regions[entities]).square().mean()
