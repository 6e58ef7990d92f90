"""Regional attention: lower the attention scores of each entity's words outside its region, without a gradient.

This is not ELA: no loss is computed and no latent is moved. In the denoiser's own passes the attention scores of an
entity's words (noun and attributes) are lowered by `strength` outside its region, in every cross-attention layer.

Both this method and `RegionalPrompter` restrict words to parts of the image in every pass, and by default these parts
are of equal width. The two methods differ in the following:

- Text: in regional attention the image attends to the states of the whole prompt. Start-of-text, end-of-text and words
  that belong to no entity are not restricted. In Regional Prompter each column attends to its entity's words, which are
  encoded without the rest of the prompt, with end-of-text and padding of their own; words that belong to no entity are
  not read.
- Strength: regional attention lowers scores by a number (5 by default), so that the odds of attention to a word outside
  its region are multiplied by exp(-5), or .7%. Regional Prompter hides words completely.
- Regions: regional attention orders the parts as an early step shows the entities, divides a tall image into rows, and
  can take regions from maps or from the user. Regional Prompter has columns in the order of the prompt.
- Steps: regional attention starts at 8% of the run by default, and restricts the first step only if all regions are
  given by hand. Regional Prompter acts in all steps.
- Families: regional attention works with all of them, Regional Prompter with those that have separate layers of
  cross-attention.

Other related methods. Attention Couple (an extension of a Stable Diffusion web UI) gives regions prompts of their own,
as Regional Prompter does. SPDiffusion (arXiv:2409.01327) finds a region per entity in the attention maps of two plain
steps, then runs again with the scores of the other entities' words at minus infinity in each region. DenseDiffusion
(Kim et al., ICCV 2023) raises scores inside and lowers them outside given masks, in self-attention, too. Regional
attention keeps the whole prompt and needs one run. It assigns strips to the entities in the order in which an early
step's maps show them (layout "strips"), localizes regions in the maps (layout "maps"), or takes regions given by hand.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from elakit.checks import choice, real_number, refuse, share, whole_number
from elakit.guidance.anchoring import confinement
from elakit.guidance.ela import decoder_side_layers
from elakit.guidance.holding import restriction
from elakit.guidance.layout import Layout, apart, check_layout, layout_masks
from elakit.guidance.localization import Anchors, FromMaps, complete, entity_means, is_complete
from elakit.guidance.method import Attention, Loss, ScoreEdit, Update, layers_of_size
from elakit.guidance.preprocess import NATIVE_SIZE
from elakit.models import AttentionLayer
from elakit.prompt import Prompt
from elakit.regions import divide

START = {"strips": 0.08, "maps": 0.2}  # default start: the order of the entities is visible before their shapes are
MOST_STRIPS = 3  # narrower strips cut entities apart


@dataclass(frozen=True, kw_only=True)
class RegionalAttention:
    """Regional attention: lower the attention scores of each entity's words outside its region, without a gradient.

    Parameters
    ----------
    layout : {"strips", "maps"}, optional
        Source of the regions. "strips" (default): strips of equal width (`elakit.regions.divide`) in the order in which
        the maps of an early step show the entities, for the whole run; strips suit entities that stand side by side,
        not one that wears, holds or is inside another. "maps": regions localized in the maps of the previous step
        (`FromMaps` with its defaults), again at every step. Must be None if regions are given for all entities.
    strength : float
        Amount subtracted from the scores of an entity's words outside its region; 5 multiplies the odds of attention to
        these words by .007.
    start : float, optional
        Share of the denoising steps before the first restricted step. By default .08 for "strips", .2 for "maps", and 0
        if all regions are given by hand. Regions that are not given by hand come from the maps of an earlier step;
        attention is then never restricted in the first step.
    guided : float
        Length of the part of the run in which attention is restricted, as a share of all denoising steps. This part
        begins at `start`, and ends at `start` + `guided` or at the end of the run; 1 (default) restricts to the end.
    every : int
        Interval of the restricted steps in this part: 1 (default) for each step, n for every n-th step.
    regions : sequence of (left, top, right, bottom), or ndarray, bool, (entity, y, x), optional
        Regions given by hand, in the order of the prompt: boxes as fractions of the image, or masks. A location in two
        regions is assigned to the smaller one. In a sequence, None stands for an entity whose region comes from
        `layout`, in the remaining locations. By default all regions come from `layout`.
    layers : str
        Layers whose maps are read: "up" (decoder; all layers of a model that has none), "down", "mid", "double",
        "single", "all" or a glob on layer names such as "up_blocks.1.*". Attention is restricted in all layers.
    size : int, optional
        Number of locations along the longer side of the maps read; by default 16, or the nearest that the model has.

    Raises
    ------
    SettingError
        An option is out of range, or has no effect together with another one.

    Warns
    -----
    UserWarning
        At the start of a run, if the image is divided into strips for more than three entities.

    Examples
    --------
    >>> RegionalAttention(strength=3).strength
    3
    >>> RegionalAttention(layout="columns")
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: RegionalAttention(layout='columns'): must be one of 'strips', 'maps'.
    """

    layout: Literal["strips", "maps"] | None = None
    strength: float = 5.0
    start: float | None = None
    guided: float = 1.0
    every: int = 1
    regions: Layout | None = None
    layers: str = "up"
    size: int | None = None

    name: ClassVar[str] = "regional-attention"
    title: ClassVar[str] = "Regional attention"
    takes_regions: ClassVar[bool] = True
    needs_regions: ClassVar[bool] = False
    steerable: ClassVar[bool] = True
    reads_self: ClassVar[bool] = False

    def __post_init__(self) -> None:
        own: dict[str, Any] = {"owner": "RegionalAttention"}
        real_number(self.strength, "strength", 0, **own)
        if self.start is not None:
            share(self.start, "start", **own)
        share(self.guided, "guided", **own)
        whole_number(self.every, "every", 1, **own)
        if self.size is not None:
            whole_number(self.size, "size", 1, **own)
        if self.regions is not None:
            given = check_layout(self.regions, "RegionalAttention(regions=...)", partial=True)
            object.__setattr__(self, "regions", given)
        if self.layout is not None:
            choice(self.layout, "layout", ("strips", "maps"), **own)
            if is_complete(self.regions):
                refuse(
                    self.layout, "layout", "None if all regions are given by hand", **own,
                    hint="Leave it out, or give None in `regions` for entities whose regions come from the layout.",
                )  # fmt: skip

    def select(self, layers: Sequence[AttentionLayer], latent: tuple[int, int]) -> tuple[AttentionLayer, ...]:
        """Layers that the options `layers` and `size` select; `latent` is the (height, width) of the latent."""
        return layers_of_size(
            decoder_side_layers(layers, self.layers), latent, self.size, NATIVE_SIZE, "RegionalAttention"
        )

    def begin(self, prompt: Prompt, steps: int) -> Anchors:
        """Values that the method keeps for one image during a run, as they are before its first step."""
        count = len(prompt.entities) if self.regions is None else sum(region is None for region in self.regions)
        if self.layout != "maps" and count > MOST_STRIPS:
            space = "the image" if self.regions is None else "what the given regions leave of the image"
            warnings.warn(
                f"RegionalAttention: {count} entities get strips of 1/{count} of {space}, which may be too narrow for "
                "them. Use layout='maps', or give regions by hand with regions=[...].",
                stacklevel=2,
            )
        return Anchors(given=self.regions)

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """Edits of scores in the restricted steps; none for a prompt of one entity without regions given by hand.

        `noise` holds the ratio of noise to signal before each denoising step; only the number of steps is used.
        """
        if len(prompt.entities) < 2 and self.regions is None:
            return []
        given = is_complete(self.regions)
        start = (0.0 if given else START[self.layout or "strips"]) if self.start is None else self.start
        # regions that are not given by hand are known after the first pass
        first = max(round(start * len(noise)), 0 if given else 1)
        last = min(round(start * len(noise)) + round(self.guided * len(noise)), len(noise))
        return [Update(0.0, hold=i >= first and (i - first) % self.every == 0) for i in range(last)]

    def direction(self, gradient: Tensor) -> Tensor:
        """Not used, because the method computes no gradient."""
        return gradient

    def hold(
        self, attention: Attention | None, size: tuple[int, int], prompt: Prompt, step: int, state: Anchors
    ) -> ScoreEdit | None:
        """Return the edit that restricts attention in one step; None if the regions are not known yet.

        `attention` is that of the previous denoiser call, None before the first one; `size` is (rows, columns) of the
        maps that are read.
        """
        if attention is not None:
            masks = self._masks(attention.mean, prompt, state)
        elif state.given is not None and is_complete(state.given):
            masks = apart(layout_masks(state.given, size, len(prompt.entities)))
        else:
            return None
        state.held = masks
        words = [(*e.token_indices, *e.attribute_indices) for e in prompt.entities]
        return restriction(masks, words, self.strength)

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: Anchors) -> Loss:
        """Squared share of attention outside the regions, for the trace only; see `confinement`."""
        maps = attention.mean
        masks = self._masks(maps.detach(), prompt, state) if state.held is None else state.held
        return confinement(maps, masks, prompt)

    def _masks(self, maps: Tensor, prompt: Prompt, state: Anchors) -> np.ndarray:
        """Regions for the next pass, from the maps of the latest one; (token, y, x) -> bool (entity, y, x)."""
        if state.masks is not None:
            return state.masks
        strips, rule = self.layout != "maps", FromMaps()
        entities, background = entity_means(maps, prompt), rule.rest(maps, prompt)
        if not strips:
            if state.given is None:
                return rule.masks(entities, background)
            return complete(state.given, entities, background, rule)
        if state.given is None:
            state.masks = divide(entities)
        else:
            masks = apart(layout_masks(state.given, (entities.shape[1], entities.shape[2]), len(entities)))
            others = [i for i, region in enumerate(state.given) if region is None]
            if others:
                masks[others] = divide(entities[others], np.logical_not(masks.any(0)))
            state.masks = masks
        return state.masks
