"""Regional attention: lower the attention scores of each entity's words outside its region, without a gradient.

Unlike ELA, this method optimizes no loss and does not move the latent. It acts in the pipeline's own denoiser calls, in
every layer in which the image attends to the text. There it subtracts `strength` from the attention scores of an
entity's words (noun and attributes) at all locations outside the entity's region.

The method `RegionalPrompter` also restricts each entity's words to a part of the image. By default, the parts have
equal width in both methods. The two methods differ in five points:

- Text: in regional attention, the image attends to the whole prompt, and only the words of entities are restricted. In
  Regional Prompter, the words of each entity are encoded as a separate text. Each column of the image attends to one
  separate text only, and words that belong to no entity are not read.
- Strength: regional attention lowers scores by a number, 5 by default. The odds of attention to a word outside its
  region are then multiplied by exp(-5), or .7%. Regional Prompter hides words completely.
- Regions: regional attention orders the parts as the entities lie in the maps of an early step, and divides a tall
  image into rows. Its regions can also be localized in maps or given by hand. Regional Prompter always has columns, in
  the order of the prompt.
- Steps: regional attention starts after 8% of the steps by default. It acts in the first step only if all regions are
  given by hand. Regional Prompter acts in all steps.
- Models: regional attention works with all model families. Regional Prompter works only with plain cross-attention,
  that is, with layers whose only keys are the text.

There are three other related methods:

- Attention Couple, an extension of a Stable Diffusion web UI, gives each region a prompt of its own, as Regional
  Prompter does.
- SPDiffusion (arXiv:2409.01327) first finds a region per entity in the attention maps of two plain steps. Then it
  starts again, and hides the words of all other entities in each region.
- DenseDiffusion (Kim et al., ICCV 2023) takes masks from the user. It raises scores inside a mask and lowers scores
  outside, in self-attention, too.

Regional attention keeps the whole prompt and needs only one run. The regions of entities are parts of equal width
(layout "strips"), localized in maps (layout "maps"), or given by hand.
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
        Source of the regions that are not given by hand. Must be None if all regions are given by hand.

        "strips" (default): the image is divided into strips of equal width, one per entity (`elakit.regions.divide`).
        The strips are ordered as the entities lie in the maps of an early step, and stay the same for the whole run.
        Strips suit entities that stand side by side. They do not suit an entity that wears, holds or is inside another.

        "maps": regions are localized in the maps of the previous step (`FromMaps` with its defaults), again for every
        restricted step.
    strength : float
        Amount subtracted from the attention scores of an entity's words outside the entity's region. With 5 (default),
        the odds of attention to these words are multiplied by exp(-5), about .007.
    start : float, optional
        Share of the denoising steps that run before attention is restricted. By default .08 with layout "strips", .2
        with layout "maps", and 0 if all regions are given by hand. Unless all regions are given by hand, the first
        step is never restricted, because the other regions are found in the maps of an earlier step.
    guided : float
        Length of the part of the run in which attention is restricted, as a share of all denoising steps. The part
        begins after the share `start` of the steps. 1 (default) means until the end of the run.
    every : int
        Interval between restricted steps in the part of the run that `start` and `guided` determine: 1 (default)
        restricts each step of this part, 2 every second step.
    regions : sequence of (left, top, right, bottom), or ndarray, bool, (entity, y, x), optional
        Regions given by hand, one per entity in the order of the prompt: boxes as fractions of the image, or masks. A
        location in two regions is assigned to the smaller region. In a sequence, None stands for an entity without a
        region given by hand. The region of such an entity comes from `layout`, and lies outside the given regions. By
        default all regions come from `layout`.
    layers : str
        Layers whose maps are read: "up", "down", "mid", "double", "single", "all" or a glob on layer names such as
        "up_blocks.1.*". "up" (default) is the decoder; in a model without a decoder, "up" means all layers. Attention
        is restricted in all layers, whether they are read or not.
    size : int, optional
        Number of locations along the longer side of the maps that are read; by default 16, or the nearest number that
        the model has.

    Raises
    ------
    SettingError
        An option is out of range, or has no effect because of another option.

    Warns
    -----
    UserWarning
        At the start of a run, if the image is divided into more than three strips.

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
        """Layers whose maps the method reads, chosen from the argument `layers`.

        The method's own options ``self.layers`` and ``self.size`` determine the choice. `latent` is the (height, width)
        of the latent.
        """
        return layers_of_size(
            decoder_side_layers(layers, self.layers), latent, self.size, NATIVE_SIZE, "RegionalAttention"
        )

    def begin(self, prompt: Prompt, steps: int) -> Anchors:
        """Initial state of one image in a run, which contains only the regions given by hand.

        `steps` is the number of denoising steps and has no effect. If the image is to be divided into more than three
        strips, a UserWarning is issued.
        """
        count = len(prompt.entities) if self.regions is None else sum(region is None for region in self.regions)
        if self.layout != "maps" and count > MOST_STRIPS:
            space = "the image" if self.regions is None else "the area outside the given regions"
            warnings.warn(
                f"RegionalAttention divides {space} into {count} strips, one per entity, which may be too narrow. Use "
                "layout='maps', or give regions by hand with regions=[...].",
                stacklevel=2,
            )
        return Anchors(given=self.regions)

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """One update per denoising step, which states whether attention is restricted in this step.

        Steps after the last update are not restricted. If the prompt has only one entity and no region is given by
        hand, the list is empty. `noise` holds the ratio of noise to signal before each denoising step; only its length
        is used.
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
        """Return the edit that lowers the attention scores of each entity's words outside its region in one step.

        `attention` is the attention in the previous denoiser call; None before the first call. Without `attention`, the
        result is None, unless all regions are given by hand. `size` is the (rows, columns) of the maps that are read.
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
        """Loss for the trace only: squared share of an entity's attention outside its region, averaged over entities.

        The same average over attribute tokens, with the regions of their entities, is added. See
        `elakit.guidance.anchoring.confinement`.
        """
        maps = attention.mean
        masks = self._masks(maps.detach(), prompt, state) if state.held is None else state.held
        return confinement(maps, masks, prompt)

    def _masks(self, maps: Tensor, prompt: Prompt, state: Anchors) -> np.ndarray:
        """Regions for the next denoiser call, bool (entity, y, x), from the maps of the previous call, (token, y, x).

        With layout "strips", the regions are computed once per run, and then kept in ``state.masks``.
        """
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
