"""Anchoring in ELA: latent steps that lower a loss, which is small if each entity's attention is in its own region."""

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
    """Anchoring part of ELA: a loss on the attention maps, and latent steps along the negative gradient of this loss.

    A latent step has the form of the ELA paper (Zhang et al., ICML 2024): ``z' = z - step_size * gradient``. The loss
    is our own: a weighted sum of four terms. The terms "outside", "presence" and "intrusion" are means over the
    entities. The term "attributes" is a mean over the attributes.

    Parameters
    ----------
    start : float, optional
        Share of the denoising steps before guidance starts. By default 0 if all regions are given by hand, otherwise
        0.16, because the maps of earlier steps are nearly noise.
    guided : float
        Length of the guided phase that begins after `start`, as a share of the denoising steps.
    every : int
        Interval of the guided steps within the guided phase. 1 guides every step, and n guides every n-th step.
    step_size : float
        Step size alpha at the first guided step. With ``gradient="normalized"``, it is the root mean square by which a
        latent step changes the latent. For comparison, the initial noise has unit variance.
    decay : float
        Step size at the end of the guided phase, divided by `step_size`. In between, the step size changes linearly.
    gradient : {"normalized", "raw"}
        Gradient that the latent steps use. "normalized" is scaled to a root mean square of 1; "raw" is not scaled.
    needed : float, optional
        Threshold of the shortfall at the first guided step. An image is not anchored at all if its shortfall is at or
        below this threshold. None anchors every image. The shortfall, a column of the trace, is the sum of two values.
        The first value is the largest squared share of an entity's attention outside its region. The second value is 1
        minus the smallest peak; the peak of an entity is its largest attention inside its region. The default was
        chosen on picture-world, where the shortfall predicts failing images better than the loss does. If all
        shortfalls of another model exceed the default, every image is anchored.
    enough : float, optional
        Threshold of the shortfall at each later guided step. If the shortfall of an image is at or below this
        threshold, anchoring of the image ends, without a latent step at this guided step. With None, anchoring does not
        end early.
    outside : float
        Weight of the squared share of an entity's attention outside its region. The closest published form is the loss
        of layout guidance (Chen et al., WACV 2024).
    presence : float
        Weight of 1 minus an entity's largest attention inside its region.
    intrusion : float
        Weight of an entity's intrusion, ``a / (a + b)``. Here, a is the mean of the entity's attention over the regions
        of the other entities, and b is the mean over its own region.
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
        """Share of the denoising steps before anchoring starts: the option `start`, or its default.

        The default is 0.16 if `localized` is True, and otherwise 0. `localized` is True if at least one entity's region
        is localized in the maps instead of given by hand.
        """
        return (LATE if localized else 0.0) if self.start is None else self.start

    def plan(self, steps: int, *, localized: bool) -> list[Update]:
        """One update per denoising step of a run, up to the end of the guided phase.

        The step sizes of guided steps change linearly from `step_size` to `decay` times `step_size`. The step size is 0
        at steps before the guided phase, and at steps that `every` leaves out.

        Parameters
        ----------
        steps : int
            Number of denoising steps of the run.
        localized : bool
            Whether at least one entity's region is localized in the maps instead of given by hand.
        """
        first, count = round(self.starts_at(localized=localized) * steps), round(self.guided * steps)
        sizes = np.linspace(self.step_size, self.step_size * self.decay, max(count, 1))[:count]
        idle = Update(0.0)
        return [*[idle] * first, *(Update(float(s)) if i % self.every == 0 else idle for i, s in enumerate(sizes))]

    def direction(self, gradient: Tensor) -> Tensor:
        """The gradient itself if the option `gradient` is "raw"; else the gradient, scaled.

        The scaled gradient has a root mean square of 1.
        """
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
            Whether this is the first guided step of the image. The first guided step compares the shortfall with the
            option `needed`, later steps with the option `enough`.

        Returns
        -------
        Loss
            The total is the weighted sum of the terms "outside", "presence", "intrusion" and "attributes". These four
            terms are stored without their weights. The term "shortfall" is stored, too, but is not part of the total.
            A word without any attention counts as 1, the largest value, in "outside", "presence" and "attributes", and
            as 0 in "intrusion".
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
    """Share of each map's attention that lies outside the map's region; 1 for a map without any attention.

    `maps` and the boolean `regions` are (n, y, x), one region per map. The result is (n,).

    Examples
    --------
    >>> outside_share(torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]]), torch.tensor([[[True, False]], [[True, False]]]))
    tensor([0.7500, 1.0000])
    """
    return 1 - ratio((maps * regions).sum((1, 2)), maps.sum((1, 2)))


def peaks(maps: Tensor, regions: Tensor) -> Tensor:
    """Largest attention of each map inside the map's region.

    `maps` and the boolean `regions` are (n, y, x), one region per map. The result is (n,).
    """
    return maps.masked_fill(~regions, 0).amax((1, 2))


def shortfall(maps: Tensor, regions: Tensor) -> float:
    """Shortfall of an image, which measures how badly its weakest entities are anchored.

    The shortfall is the sum of two values. The first value is the largest squared share of an entity's attention
    outside its region (`outside_share`). The second value is 1 minus the smallest peak; the peak of an entity is its
    largest attention inside its region (`peaks`). The two values may come from different entities. Both values are
    extremes instead of means, because one neglected entity makes an image fail. Attributes are ignored, so that
    shortfalls are comparable between prompts with and without attributes.

    Parameters
    ----------
    maps : Tensor, (entity, y, x)
        Attention probabilities.
    regions : Tensor, bool, (entity, y, x)

    Returns
    -------
    float
        Number from 0 to 2. It is 0 if every entity has all its attention in its region, with a peak of 1.

    Examples
    --------
    >>> maps = torch.tensor([[[1.0, 0.0]], [[0.25, 0.25]]])
    >>> shortfall(maps, torch.tensor([[[True, False]], [[False, True]]]))  # second entity: .5^2 + (1 - .25)
    1.0
    """
    return float(outside_share(maps, regions).square().amax() + (1 - peaks(maps, regions)).amax())


def intrusion(maps: Tensor, regions: Tensor) -> Tensor:
    """Intrusion of each map, ``a / (a + b)``, which compares its attention in the other regions and in its own region.

    Here, a is the mean attention of the map over the regions of the other maps, and b is the mean over its own region.
    `maps` and the boolean `regions` are (n, y, x), one region per map. The result is (n,). It is 0 for a map without
    attention in any region.
    """
    areas = regions.sum((1, 2)).clamp_min(1).to(maps.dtype)
    means = torch.einsum("eyx,fyx->ef", maps, regions.to(maps.dtype)) / areas
    own = means.diagonal()
    others = (means.sum(1) - own) / max(1, len(maps) - 1)
    return ratio(others, own + others)


def confinement(maps: Tensor, masks: np.ndarray, prompt: Prompt, regions: np.ndarray | None = None) -> Loss:
    """Loss in the trace of methods that do not optimize a loss: squared shares of attention outside masks.

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
        Sum of two terms. "outside" is the mean over entities of the squared share of an entity's attention outside its
        mask. "attributes" is the mean over attribute tokens of the squared share of a token's attention outside the
        mask of its entity.
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
    """Mean over attribute tokens of the squared share of a token's attention outside the region of its entity.

    `maps` are (token, y, x), and the boolean `regions` are (entity, y, x). The result is a scalar, and 0 if the prompt
    has no attributes.
    """
    owners: Sequence[tuple[int, int]] = [
        (token, i) for i, entity in enumerate(prompt.entities) for token in entity.attribute_indices
    ]
    if not owners:
        return maps.new_zeros(())
    tokens, entities = (list(column) for column in zip(*owners, strict=True))
    return outside_share(maps[tokens], regions[entities]).square().mean()
