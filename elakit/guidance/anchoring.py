"""Anchoring part of ELA: a loss that is small where each entity's attention stays in its region, and a latent step."""

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
from elakit.prompt import Prompt

TERMS = ("outside", "presence", "intrusion", "attributes")
NEEDED, ENOUGH = 0.9, 0.7
LATE = 0.16  # default start of guidance where regions are localized: earlier maps are nearly noise


@dataclass(frozen=True, kw_only=True)
class LatentStep:
    """Anchoring by a loss on the maps and a step of the latent against its gradient.

    The form of the step is the paper's, ``z' = z - step_size * gradient``. The loss is ours: one weighted sum of four
    terms, each a mean over entities (or attributes).

    Parameters
    ----------
    start : float, optional
        Share of the denoising steps before guidance starts. By default .16 where regions are localized, because earlier
        maps are nearly noise, and 0 where all regions are given by hand.
    guided : float
        Share of the denoising steps that are guided, counted from `start`.
    every : int
        Guide every n-th of these steps only.
    step_size : float
        Step size alpha. With ``gradient="normalized"`` it is the root mean square of the change of the latent, whose
        initial noise has unit variance.
    decay : float
        Step size at the last guided step, as a share of `step_size`; linear in between.
    gradient : {"normalized", "raw"}
        Whether the gradient is scaled to a root mean square of 1.
    needed : float, optional
        An image whose shortfall is at most this value at its first guided step is not guided at all: its entities are
        where they belong. The shortfall, a column of the trace, is the largest squared share of an entity's attention
        outside its region, plus 1 minus the lowest of the entities' largest attention inside theirs. The default was
        chosen on picture-world, where the shortfall shows better than the loss which images will fail. Where a model's
        shortfalls are always larger, every image is guided; None guides every image, too.
    enough : float, optional
        An image whose shortfall is at most this value at a later guided step is not changed from then on.
    outside : float
        Weight of the squared share of each entity's attention that lies outside its region. The closest published
        form is the loss of layout guidance (Chen et al., WACV 2024).
    presence : float
        Weight of 1 minus the largest attention inside the region.
    intrusion : float
        Weight of the mean attention inside the regions of the other entities, relative to the mean inside its own.
    attributes : float
        Weight of the `outside` term of each attribute's map, with the region of its entity.

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

    def plan(self, steps: int, *, localized: bool) -> list[Update]:
        """Updates of a run: step sizes fall linearly from `step_size` to `decay` times that.

        Parameters
        ----------
        steps : int
            Denoising steps of the run.
        localized : bool
            Whether any region is localized, not given by hand.
        """
        start = (LATE if localized else 0.0) if self.start is None else self.start
        first, count = round(start * steps), round(self.guided * steps)
        sizes = np.linspace(self.step_size, self.step_size * self.decay, max(count, 1))[:count]
        idle = Update(0.0)
        return [*[idle] * first, *(Update(float(s)) if i % self.every == 0 else idle for i, s in enumerate(sizes))]

    def direction(self, gradient: Tensor) -> Tensor:
        """The raw gradient, or the gradient scaled to a root mean square of 1."""
        if self.gradient == "raw":
            return gradient
        return gradient / gradient.pow(2).mean().sqrt().clamp_min(torch.finfo(gradient.dtype).tiny)

    def loss(self, maps: Tensor, masks: np.ndarray, prompt: Prompt, *, first: bool = False) -> Loss:
        """Anchoring loss.

        Parameters
        ----------
        maps : Tensor, (token, y, x)
            Attention probabilities.
        masks : ndarray, bool, (entity, y, x)
            Regions, constants of the loss.
        prompt : Prompt
        first : bool
            Whether this is the first guided step of the image, in which `needed` counts instead of `enough`.

        Returns
        -------
        Loss
            Its terms are the unweighted means of "outside", "presence", "intrusion" and "attributes", and the
            "shortfall", which is not part of the loss.
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
    """Share of each map's attention outside its region; (n, y, x) -> (n,)."""
    return 1 - (maps * regions).sum((1, 2)) / maps.sum((1, 2))


def peaks(maps: Tensor, regions: Tensor) -> Tensor:
    """Largest attention of each map inside its region; (n, y, x) -> (n,)."""
    return maps.masked_fill(~regions, 0).amax((1, 2))


def shortfall(maps: Tensor, regions: Tensor) -> float:
    """Lack of anchoring of the weakest entities: 0 if every entity has all of its attention in its region.

    The sum of the largest squared `outside_share` and of 1 minus the lowest of the `peaks`.

    Parameters
    ----------
    maps : Tensor, (entity, y, x)
        Attention probabilities.
    regions : Tensor, bool, (entity, y, x)

    Returns
    -------
    float
        From 0 to 2. Maxima, and not means, because one neglected entity is enough for an image to fail; without
        attributes, because prompts with and without colors then share one scale.

    Examples
    --------
    >>> maps = torch.tensor([[[1.0, 0.0]], [[0.25, 0.25]]])
    >>> shortfall(maps, torch.tensor([[[True, False]], [[False, True]]]))  # half of the second is outside, its peak .25
    1.0
    """
    return float(outside_share(maps, regions).square().amax() + (1 - peaks(maps, regions)).amax())


def intrusion(maps: Tensor, regions: Tensor) -> Tensor:
    """Mean attention in the other entities' regions, relative to that plus the mean in its own; (n, y, x) -> (n,)."""
    areas = regions.sum((1, 2)).clamp_min(1).to(maps.dtype)
    means = torch.einsum("eyx,fyx->ef", maps, regions.to(maps.dtype)) / areas
    own = means.diagonal()
    others = (means.sum(1) - own) / max(1, len(maps) - 1)
    return others / (own + others)


def confinement(maps: Tensor, masks: np.ndarray, prompt: Prompt, regions: np.ndarray | None = None) -> Loss:
    """Squared shares of attention outside the masks, for the trace of methods without a loss.

    Parameters
    ----------
    maps : Tensor, (token, y, x)
    masks : ndarray, bool, (entity, y, x)
        Where each entity's words may be attended to.
    prompt : Prompt
    regions : ndarray, bool, (entity, y, x), optional
        Regions of the loss, if they are not the masks.

    Returns
    -------
    Loss
        The sum of its terms "outside" (mean over entities) and "attributes" (mean over attribute tokens).
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
