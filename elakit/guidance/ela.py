"""ELA: localise a region for each entity in its attention, and anchor the entity there.

Zhang et al., "Easing Concept Bleeding in Diffusion via Entity Localization and Anchoring", ICML 2024
(PMLR 235:58955-58966).
Known from the paper: decoder maps at 16 x 16, start-of-text read beside the entities, regions by differentiation and
binarisation that do not overlap, one loss term an entity, z' = z - alpha * gradient, a slight step. Not public, and
therefore options here with our own defaults: the exact rules, the loss formula, the guided steps and alpha. Step size,
start and guided share were chosen on the embedded model (46 prompts, seeds 0, 2, 4 and 6; docs/howto/guide.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from elakit.attention.spec import select_layers
from elakit.errors import SettingError
from elakit.guidance.layout import Layout, apart, check_layout, layout_masks
from elakit.guidance.method import Attention, Loss, Update, nearest_size
from elakit.guidance.preprocess import GUIDED, STEP_SIZE
from elakit.models import AttentionLayer
from elakit.models.adapter import decoder_side
from elakit.prompt import Prompt
from elakit.regions import THRESHOLD, localize

NATIVE_SIZE = 16  # side of the maps the paper reads
LATE = 0.2  # share of the steps before guidance begins where regions are localised


@dataclass
class Anchors:
    """What a picture's run is anchored to, beside what each step localises.

    Whoever changes it, in the middle of a run too, steers the run from the next guided step on.

    Attributes
    ----------
    masks : ndarray, bool (entity, y, x), or None
        Regions of all entities once they are locked; None while each step localises its own.
    given : layout or None
        Regions by hand, as `ELA` takes them.
    """

    masks: np.ndarray | None = None
    given: Layout | None = None

    def steer(self, given: Layout | None) -> None:
        """Anchor to regions by hand from here on; what was locked is localised once more.

        Raises
        ------
        SettingError
            It is no layout.

        Examples
        --------
        >>> anchors = Anchors()
        >>> anchors.steer([(0, 0, 0.5, 1), None])  # the second entity is still localised
        >>> anchors.given
        ((0.0, 0.0, 0.5, 1.0), None)
        """
        self.given = None if given is None else check_layout(given, "Anchors.steer", partial=True)
        self.masks = None


@dataclass(frozen=True)
class ELA:
    """Entity Localization and Anchoring.

    Parameters
    ----------
    step_size : float
        alpha of z' = z - alpha * gradient. With ``gradient="normalised"`` it is the root mean square of the
        latent's change (latents have unit variance at the start).
    decay : float
        Step size at the end of the guided steps, as a share of `step_size`; linear in between.
    gradient : {"normalised", "raw"}
    start : float, optional
        Share of the denoising steps that are made before guidance begins. In the first few the maps are nearly noise:
        regions found there are no entity's, and holding entities in them harms pictures that would have come out right.
        By default .2, and 0 where regions are given by hand, which are right from the first step on.
    guided : float
        Share of the denoising steps that are guided, from there on.
    every : int
        Of these, every so manieth is guided.
    enough : float, optional
        A picture whose loss is not above this at a guided step is left alone from there on; by default none is.
    outside : float
        Weight of (1 - share of the entity's attention that lies in its region) squared: the closest published form
        is that of layout guidance (Chen et al., 2024).
    presence : float
        Weight of 1 - the largest attention inside the region.
    intrusion : float
        Weight of the mean attention inside the other entities' regions, relative to the mean in its own.
    attributes : float
        Weight of the `outside` term of each attribute's attention, with the region of its entity.
    layers : str
        Layers read: "up" (decoder; all layers of a model that has none, such as PixArt, Stable Diffusion 3 and FLUX),
        "down", "mid", "double", "single", "all" or a name pattern.
    size : int, optional
        Longer side of the maps read; by default 16, or what the model has nearest to it.
    lock_from : int, optional
        Denoising step from which the regions stay as they are; by default they are localised at every guided step.
    regions : sequence of (left, top, right, bottom), or ndarray, bool, (entity, y, x), optional
        Where each entity belongs, in the order of the prompt, given by hand instead of localised: boxes in shares of
        the picture, or masks. A cell of two entities goes to the smaller region. In a sequence None stands for an
        entity that is localised, in the cells that the others leave it.
    background : {"start+end", "start"}
        Attention that stands for the background in localisation: of start-of-text alone, as in the paper's figure, or
        with that of end-of-text and padding. In Stable Diffusion start-of-text holds nearly all of it, in picture-world
        the padding does. Models that read the prompt with T5 alone (PixArt, FLUX) have no start-of-text; there it is
        end-of-text and padding either way.
    differentiation, binarisation, threshold, subtract_pedestal, min_cells
        Localisation; see `elakit.regions.localize`.

    Raises
    ------
    SettingError
        A setting is outside its range.

    Examples
    --------
    >>> ELA().name
    'ela'
    >>> ELA(guided=2)
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: ELA(guided=2): must be between 0 and 1 (a share of the denoising steps).
    """

    step_size: float = 0.1
    decay: float = 0.5
    gradient: Literal["normalised", "raw"] = "normalised"
    start: float | None = None
    guided: float = 0.3
    every: int = 1
    enough: float | None = None
    outside: float = 1.0
    presence: float = 1.0
    intrusion: float = 0.5
    attributes: float = 1.0
    layers: str = "up"
    size: int | None = None
    lock_from: int | None = None
    regions: Layout | None = None
    background: Literal["start+end", "start"] = "start+end"
    differentiation: str = "argmax"
    binarisation: str = "background"
    threshold: float = THRESHOLD
    subtract_pedestal: bool = True
    min_cells: int | None = None

    name: ClassVar[str] = "ela"
    reads_self: ClassVar[bool] = False

    def __post_init__(self) -> None:
        def refuse(option: str, rule: str) -> None:
            raise SettingError(f"ELA({option}={getattr(self, option)!r}): {rule}.")

        for option in ("step_size", "outside", "presence", "intrusion", "attributes", "decay"):
            value = getattr(self, option)
            if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
                refuse(option, "must be a number of zero or more")
        for option in ("start", "guided"):
            if (share := getattr(self, option)) is not None and not 0 <= share <= 1:
                refuse(option, "must be between 0 and 1 (a share of the denoising steps)")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            refuse("every", "must be a whole number of 1 (every step) or more")
        if self.enough is not None and not self.enough >= 0:
            refuse("enough", "must be a loss, 0 or more, or None")
        if self.gradient not in ("normalised", "raw"):
            refuse("gradient", "must be 'normalised' or 'raw'")
        if self.background not in ("start+end", "start"):
            refuse("background", "must be 'start+end' or 'start'")
        if self.lock_from is not None and self.lock_from < 0:
            refuse("lock_from", "must be a denoising step, 0 or more, or None")
        if self.regions is not None:
            object.__setattr__(self, "regions", check_layout(self.regions, "ELA(regions=...)", partial=True))

    @staticmethod
    def paper() -> PaperELA:
        """As near to the paper as is known: see `PaperELA`."""
        return PaperELA()

    def select(self, layers: Sequence[AttentionLayer], latent: tuple[int, int]) -> tuple[AttentionLayer, ...]:
        """The layers of the chosen side whose maps are of the chosen size."""
        wanted = decoder_side(layer.place for layer in layers) if self.layers == "up" else self.layers
        return nearest_size(select_layers(layers, wanted), latent, self.size, NATIVE_SIZE, "ELA")

    def localisation(self) -> dict[str, Any]:
        """Its options of `elakit.regions.localize`."""
        names = ("differentiation", "binarisation", "threshold", "subtract_pedestal", "min_cells")
        return {name: getattr(self, name) for name in names}

    def begin(self, prompt: Prompt, steps: int) -> Anchors:
        """A run starts without locked regions."""
        return Anchors(given=self.regions)

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """Linear from `step_size` to `decay` of it over the guided steps; nothing for one entity without a region."""
        if len(prompt.entities) < 2 and self.regions is None:
            return []
        start = (LATE if self.regions is None else 0) if self.start is None else self.start
        first, count = round(start * len(noise)), round(self.guided * len(noise))
        sizes = np.linspace(self.step_size, self.step_size * self.decay, max(count, 1))[:count]
        guided = [Update(float(size) if step % self.every == 0 else 0.0) for step, size in enumerate(sizes)]
        return [*[Update(0.0)] * first, *guided]

    def direction(self, gradient: Tensor) -> Tensor:
        """The raw gradient, or the gradient brought to a root mean square of one."""
        if self.gradient == "raw":
            return gradient
        return gradient / gradient.pow(2).mean().sqrt().clamp_min(torch.finfo(gradient.dtype).tiny)

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: Anchors) -> Loss:
        """Anchoring loss: the mean over entities of the weighted terms.

        Parameters
        ----------
        attention : Attention
        prompt : Prompt
        step : int
        state : Anchors

        Returns
        -------
        Loss
            Its terms are the unweighted means of "outside", "presence", "intrusion", "attributes".
        """
        maps = attention.mean
        entities = torch.stack([maps[list(e.token_indices)].mean(0) for e in prompt.entities])
        masks = state.masks
        if masks is None:
            background = self._background(maps, prompt)
            masks = self._regions(entities.detach(), background.detach(), state.given)
            if self.lock_from is not None and step >= self.lock_from:
                state.masks = masks
        regions = torch.from_numpy(masks).to(maps.device)
        terms = {
            "outside": _outside(entities, regions).mean(),
            "presence": (1 - entities.masked_fill(~regions, 0).amax((1, 2))).mean(),
            "intrusion": _intrusion(entities, regions).mean(),
            "attributes": _attributes(maps, regions, prompt),
        }
        total = sum((getattr(self, name) * term for name, term in terms.items()), start=maps.new_zeros(()))
        enough = self.enough is not None and float(total.detach()) <= self.enough
        return Loss(total, {name: float(term.detach()) for name, term in terms.items()}, masks, enough=enough)

    def _regions(self, entities: Tensor, background: Tensor, given: Layout | None) -> np.ndarray:
        """Regions given by hand, and those of the other entities, localised in the cells that are left."""
        if given is None:
            return localize(entities, background, **self.localisation()).masks
        masks = apart(layout_masks(given, (entities.shape[1], entities.shape[2]), len(entities)))
        rest = [i for i, region in enumerate(given) if region is None]
        if not rest:
            return masks
        taken = torch.from_numpy(masks.any(0)).to(entities.device)
        # of no more use there than where it is least
        lowest = entities[rest].masked_fill(taken, math.inf).amin((1, 2), keepdim=True)
        visible = torch.where(taken, lowest.nan_to_num(posinf=0), entities[rest])
        masks[rest] = localize(visible, background, **self.localisation()).masks & ~masks.any(0)
        return masks

    def _background(self, maps: Tensor, prompt: Prompt) -> Tensor:
        """Attention that stands for the background; (token, y, x) -> (y, x)."""
        end = maps[list(prompt.end_positions(len(maps)))].sum(0)
        if prompt.start_index is None:
            return end
        return maps[prompt.start_index] + end if self.background == "start+end" else maps[prompt.start_index]


@dataclass(frozen=True)
class PaperELA(ELA):
    """ELA as near to the paper as is known, for comparison; `ELA` has what measures better.

    Known, and kept: decoder maps at 16 x 16 compared with start-of-text alone, regions that do not overlap, one term an
    entity (or attribute) that holds its attention in its region, a slight step along the raw gradient. Not public, and
    filled in: the threshold (fitted to the authors' figure, `elakit.regions.THRESHOLD`), the term's form (layout
    guidance's), and the steps: Attend-and-Excite's 20, falling to sqrt(3/4) of it over the first half of the run.

    Examples
    --------
    >>> PaperELA() == ELA.paper(), PaperELA().name, PaperELA().presence
    (True, 'ela-paper', 0.0)
    """

    step_size: float = STEP_SIZE
    decay: float = math.sqrt(0.75)
    gradient: Literal["normalised", "raw"] = "raw"
    start: float | None = 0.0
    guided: float = GUIDED
    presence: float = 0.0
    intrusion: float = 0.0
    background: Literal["start+end", "start"] = "start"
    subtract_pedestal: bool = False

    name: ClassVar[str] = "ela-paper"


def _outside(maps: Tensor, regions: Tensor) -> Tensor:
    """(1 - share of each map's mass inside its region) squared; (n, y, x) -> (n,)."""
    return (1 - (maps * regions).sum((1, 2)) / maps.sum((1, 2))).square()


def _intrusion(maps: Tensor, regions: Tensor) -> Tensor:
    """Mean of each map over the other entities' regions, relative to its mean over its own; (n, y, x) -> (n,)."""
    cells = regions.sum((1, 2)).clamp_min(1).to(maps.dtype)
    means = torch.einsum("eyx,fyx->ef", maps, regions.to(maps.dtype)) / cells
    own = means.diagonal()
    others = (means.sum(1) - own) / max(1, len(maps) - 1)
    return others / (own + others)


def _attributes(maps: Tensor, regions: Tensor, prompt: Prompt) -> Tensor:
    """Mean `_outside` of every attribute token, with the region of the entity it belongs to; 0 without attributes."""
    owners = [(token, i) for i, entity in enumerate(prompt.entities) for token in entity.attribute_indices]
    if not owners:
        return maps.new_zeros(())
    tokens, entities = (list(column) for column in zip(*owners, strict=True))
    return _outside(maps[tokens], regions[entities]).mean()
