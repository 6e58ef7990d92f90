"""ELA: localize a region for each entity in its attention, and anchor the entity there.

Zhang et al., "Easing Concept Bleeding in Diffusion via Entity Localization and Anchoring", ICML 2024
(PMLR 235:58955-58966).
Known from the paper: decoder maps at 16 x 16, start-of-text read beside the entities, regions by differentiation and
binarization that do not overlap, one loss term an entity, z' = z - alpha * gradient, a slight step. Not public, and
therefore options here: the exact rules, the loss formula, the guided steps and alpha.

`ELA` has what measured best on the embedded model (46 prompts, seeds 0, 2, 4 and 6; docs/evidence.md), and that departs
from the paper: the maps of an early step only say who is to be left of whom, the image is divided accordingly, and
words are kept to their part in the denoiser's own passes, which takes no gradient. `PaperELA` is the paper's way.
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
from elakit.guidance.method import Attention, Hold, Loss, Update, nearest_size
from elakit.guidance.preprocess import GUIDED, STEP_SIZE
from elakit.models import AttentionLayer
from elakit.models.adapter import decoder_side
from elakit.prompt import Prompt
from elakit.regions import THRESHOLD, divide, localize

NATIVE_SIZE = 16  # side of the maps the paper reads
LATE = 0.2  # share of the steps before guidance begins where each step localizes regions
EARLY = 0.08  # where the image is divided, and attention held
GRADIENT_GUIDED = 0.3  # share of the steps that are guided where a gradient is taken


@dataclass
class Anchors:
    """What an image's run is anchored to, beside what each step localizes.

    Whoever changes it, in the middle of a run too, steers the run from the next guided step on.

    Attributes
    ----------
    masks : ndarray, bool (entity, y, x), or None
        Regions of all entities once they are locked; None while each step localizes its own.
    given : layout or None
        Regions by hand, as `ELA` takes them.
    held : ndarray, bool (entity, y, x), or None
        Regions that the last pass was held to.
    """

    masks: np.ndarray | None = None
    given: Layout | None = None
    held: np.ndarray | None = None

    def steer(self, given: Layout | None) -> None:
        """Anchor to regions by hand from here on; what was locked is localized once more.

        Raises
        ------
        SettingError
            It is no layout.

        Examples
        --------
        >>> anchors = Anchors()
        >>> anchors.steer([(0, 0, 0.5, 1), None])  # the second entity is still localized
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
    anchoring : {"logits", "gradient"}, optional
        How an entity is held in its region: by its words' attention scores in the denoiser's own passes, which are made
        `push` lower outside, or by a loss on its map and a step of the latent along the gradient, as in the paper. By
        default "logits", and "gradient" where regions are given by hand: it also brings an entity to where the model
        would not have put it.
    localization : {"strips", "maps"}
        Regions: strips of equal width, in the order in which early maps have the entities, kept for the whole run
        (`elakit.regions.divide`); or where the maps of each guided step have the entity, as in the paper
        (`elakit.regions.localize`). Strips suit entities that stand beside each other, not one that
        wears, holds or is inside another.
    push : float
        Subtracted from the scores of an entity's words, attributes too, outside its region; for "logits" only.
    start : float, optional
        Share of the denoising steps that are made before guidance begins. By default 0 where regions are given by hand
        and for strips with "gradient", .08 for strips with "logits", and .2 where the maps of each step give the
        regions: in the first few steps these are nearly noise, and holding entities there does harm. With "logits"
        regions are localized in the pass before, so that the first one is never held unless they are given.
    guided : float, optional
        Share of the denoising steps that are guided, from there on; by default all with "logits", .3 with "gradient".
    every : int
        Of these, every so manieth is guided.
    step_size : float
        alpha of z' = z - alpha * gradient. With ``gradient="normalized"`` it is the root mean square of the
        latent's change (latents have unit variance at the start). As `decay` and `gradient`, for "gradient" only.
    decay : float
        Step size at the end of the guided steps, as a share of `step_size`; linear in between.
    gradient : {"normalized", "raw"}
    enough : float, optional
        An image whose loss is not above this at a guided step is left alone from there on; by default none is.
    outside : float
        Weight of (1 - share of the entity's attention that lies in its region) squared: the closest published form
        is that of layout guidance (Chen et al., 2024). The loss is traced with "logits" too.
    presence : float
        Weight of 1 - the largest attention inside the region.
    intrusion : float
        Weight of the mean attention inside the other entities' regions, relative to the mean in its own.
    attributes : float
        Weight of the `outside` term of each attribute's attention, with the region of its entity.
    layers : str
        Layers read: "up" (decoder; all layers of a model that has none, such as PixArt, Stable Diffusion 3 and FLUX),
        "down", "mid", "double", "single", "all" or a name pattern. Attention is held in all layers.
    size : int, optional
        Longer side of the maps read; by default 16, or what the model has nearest to it.
    lock_from : int, optional
        Denoising step from which the regions stay as they are; by default ``localization="maps"`` localizes them at
        every guided step.
    regions : sequence of (left, top, right, bottom), or ndarray, bool, (entity, y, x), optional
        Where each entity belongs, in the order of the prompt, given by hand instead of localized: boxes in shares of
        the image, or masks. A cell of two entities goes to the smaller region. In a sequence None stands for an
        entity that is localized, in the cells that the others leave it.
    background : {"start+end", "start"}
        Attention that stands for the background in ``localization="maps"``: of start-of-text alone, as in the paper's
        figure, or with that of end-of-text and padding. In Stable Diffusion start-of-text holds nearly all of it, in
        picture-world the padding does. Models that read the prompt with T5 alone (PixArt, FLUX) have no start-of-text;
        there it is end-of-text and padding either way.
    differentiation, binarization, threshold, subtract_pedestal, min_cells
        Of ``localization="maps"``; see `elakit.regions.localize`.

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

    anchoring: Literal["logits", "gradient"] | None = None
    localization: Literal["strips", "maps"] = "strips"
    push: float = 5.0
    start: float | None = None
    guided: float | None = None
    every: int = 1
    step_size: float = 0.1
    decay: float = 0.5
    gradient: Literal["normalized", "raw"] = "normalized"
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
    binarization: str = "background"
    threshold: float = THRESHOLD
    subtract_pedestal: bool = True
    min_cells: int | None = None

    name: ClassVar[str] = "ela"
    reads_self: ClassVar[bool] = False

    def __post_init__(self) -> None:
        def refuse(option: str, rule: str) -> None:
            raise SettingError(f"ELA({option}={getattr(self, option)!r}): {rule}.")

        for option in ("push", "step_size", "outside", "presence", "intrusion", "attributes", "decay"):
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
        choices = {
            "localization": ("strips", "maps"),
            "gradient": ("normalized", "raw"),
            "background": ("start+end", "start"),
        }
        for option, (one, other) in choices.items():
            if getattr(self, option) not in (one, other):
                refuse(option, f"must be {one!r} or {other!r}")
        if self.anchoring not in ("logits", "gradient", None):
            refuse("anchoring", "must be 'logits', 'gradient', or None for the one that suits the regions")
        if self.lock_from is not None and self.lock_from < 0:
            refuse("lock_from", "must be a denoising step, 0 or more, or None")
        if self.regions is not None:
            object.__setattr__(self, "regions", check_layout(self.regions, "ELA(regions=...)", partial=True))

    @property
    def holds(self) -> bool:
        """Whether attention is held in the denoiser's own passes, without a gradient."""
        return self.anchoring == "logits" or (self.anchoring is None and self.regions is None)

    @staticmethod
    def paper() -> PaperELA:
        """As near to the paper as is known: see `PaperELA`."""
        return PaperELA()

    def select(self, layers: Sequence[AttentionLayer], latent: tuple[int, int]) -> tuple[AttentionLayer, ...]:
        """The layers of the chosen side whose maps are of the chosen size."""
        wanted = decoder_side(layer.place for layer in layers) if self.layers == "up" else self.layers
        return nearest_size(select_layers(layers, wanted), latent, self.size, NATIVE_SIZE, "ELA")

    def rule(self) -> dict[str, Any]:
        """Its options of `elakit.regions.localize`."""
        names = ("differentiation", "binarization", "threshold", "subtract_pedestal", "min_cells")
        return {name: getattr(self, name) for name in names}

    def begin(self, prompt: Prompt, steps: int) -> Anchors:
        """A run starts without locked regions."""
        return Anchors(given=self.regions)

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """Passes that are held, or steps linear from `step_size` to `decay` of it; nothing for one entity without a
        region."""
        if len(prompt.entities) < 2 and self.regions is None:
            return []
        start = self._start() if self.start is None else self.start
        guided = (1.0 if self.holds else GRADIENT_GUIDED) if self.guided is None else self.guided
        first, count = round(start * len(noise)), round(guided * len(noise))
        sizes = np.linspace(self.step_size, self.step_size * self.decay, max(count, 1))[:count]
        updates = [Update(0.0, hold=True) if self.holds else Update(float(size)) for size in sizes]
        idle = Update(0.0)
        return [*[idle] * first, *(update if step % self.every == 0 else idle for step, update in enumerate(updates))]

    def _start(self) -> float:
        """Share of the steps before guidance, where none is asked for."""
        if self.regions is not None:
            return 0.0
        if self.localization == "maps":
            return LATE
        return EARLY if self.holds else 0.0

    def hold(
        self, attention: Attention | None, size: tuple[int, int], prompt: Prompt, step: int, state: Anchors
    ) -> Hold | None:
        """Words of each entity, kept to its region. Before the first pass only regions given by hand are known."""
        if attention is not None:
            masks = self._anchored(attention.mean, prompt, step, state)
        elif state.given is not None and all(region is not None for region in state.given):
            masks = apart(layout_masks(state.given, size, len(prompt.entities)))
        else:
            return None
        state.held = masks
        return Hold(masks, tuple((*e.token_indices, *e.attribute_indices) for e in prompt.entities), self.push)

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
        entities = _entities(maps, prompt)
        masks = state.held if self.holds else None
        if masks is None:
            masks = self._anchored(maps, prompt, step, state)
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

    def _anchored(self, maps: Tensor, prompt: Prompt, step: int, state: Anchors) -> np.ndarray:
        """Regions to anchor to; maps (token, y, x) -> bool (entity, y, x)."""
        if state.masks is not None:
            return state.masks
        masks = self._regions(_entities(maps.detach(), prompt), self._background(maps.detach(), prompt), state.given)
        if self.localization == "strips" or (self.lock_from is not None and step >= self.lock_from):
            state.masks = masks
        return masks

    def _regions(self, entities: Tensor, background: Tensor, given: Layout | None) -> np.ndarray:
        """Regions given by hand, and those of the other entities, localized in the cells that are left."""
        strips = self.localization == "strips"
        if given is None:
            return divide(entities) if strips else localize(entities, background, **self.rule()).masks
        masks = apart(layout_masks(given, (entities.shape[1], entities.shape[2]), len(entities)))
        rest = [i for i, region in enumerate(given) if region is None]
        if not rest:
            return masks
        free = np.asarray(~masks.any(0))
        if strips:
            masks[rest] = divide(entities[rest], free)
            return masks
        taken = torch.from_numpy(~free).to(entities.device)
        # of no more use there than where it is least
        lowest = entities[rest].masked_fill(taken, math.inf).amin((1, 2), keepdim=True)
        visible = torch.where(taken, lowest.nan_to_num(posinf=0), entities[rest])
        masks[rest] = localize(visible, background, **self.rule()).masks & free
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

    anchoring: Literal["logits", "gradient"] | None = "gradient"
    localization: Literal["strips", "maps"] = "maps"
    step_size: float = STEP_SIZE
    decay: float = math.sqrt(0.75)
    gradient: Literal["normalized", "raw"] = "raw"
    start: float | None = 0.0
    guided: float | None = GUIDED
    presence: float = 0.0
    intrusion: float = 0.0
    background: Literal["start+end", "start"] = "start"
    subtract_pedestal: bool = False

    name: ClassVar[str] = "ela-paper"


def _entities(maps: Tensor, prompt: Prompt) -> Tensor:
    """Map of each entity, the mean of its tokens'; (token, y, x) -> (entity, y, x)."""
    return torch.stack([maps[list(e.token_indices)].mean(0) for e in prompt.entities])


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
