"""ELA: localize a region for each entity in its attention, and anchor the entity there.

Zhang et al., "Easing Concept Bleeding in Diffusion via Entity Localization and Anchoring", ICML 2024
(PMLR 235:58955-58966).

The paper specifies decoder maps at 16 x 16 and the use of start-of-text's map besides the maps of the entities. It also
specifies disjoint regions by differentiation and binarization, one loss term per entity, and a small step
``z' = z - alpha * gradient``. It does not specify the exact rules of differentiation and binarization, the form of the
loss, the guided steps and alpha. This module is therefore *our reading of ELA*: whatever the paper leaves open is an
option here, with a default chosen by measurements on the built-in model.

In the first steps, the maps are too noisy to localize anything, so the entities' maps are only moved apart. This
separation is not in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from elakit.attention.spec import select_layers
from elakit.checks import refuse, whole_number
from elakit.errors import SettingError
from elakit.guidance.anchoring import LatentStep
from elakit.guidance.layout import Layout, check_layout
from elakit.guidance.localization import Anchors, FromMaps, complete, entity_means, is_complete
from elakit.guidance.method import Attention, Loss, Update, layers_of_size
from elakit.guidance.preprocess import NATIVE_SIZE
from elakit.guidance.separation import Separation
from elakit.models import AttentionLayer
from elakit.models.adapter import decoder_side
from elakit.prompt import Prompt


@dataclass(frozen=True, kw_only=True)
class ELA:
    """ELA (Zhang et al., ICML 2024) in our reading: localize one region per entity, and anchor the entity there.

    Parameters
    ----------
    localize : FromMaps
        Rules by which regions are localized in the attention maps.
    anchor : LatentStep
        Loss, step sizes and guided steps of anchoring.
    separate : Separation
        Latent steps that move the entities' maps apart before anchoring starts. If all regions are given by hand,
        anchoring starts at the first step by default, so that there is no separation.
    regions : sequence of (left, top, right, bottom), or ndarray, bool, (entity, y, x), optional
        Regions given by hand, in the order of the prompt: boxes as fractions of the image, or masks. A location in two
        regions is assigned to the smaller one. In a sequence, None stands for an entity that is localized in the
        remaining locations. By default all entities are localized.
    layers : str
        Layers that are read: "up", "down", "mid", "double", "single", "all" or a glob on layer names such as
        "up_blocks.1.*". "up" selects the decoder. In a model without a decoder (PixArt, Stable Diffusion 3, FLUX), "up"
        selects all layers.
    size : int, optional
        Number of locations along the longer side of the maps that are read. By default the coarsest maps of `layers`
        are read: 16 locations in Stable Diffusion 1.5 at 512 pixels, as in the paper, and 8 in picture-world. The
        coarsest maps show best whether an entity is in its region. The gradient pass ends at the last layer that is
        read.

    Raises
    ------
    SettingError
        An option is out of range, or has no effect in combination with another option.

    References
    ----------
    Zhang et al., "Easing Concept Bleeding in Diffusion via Entity Localization and Anchoring", ICML 2024,
    PMLR 235:58955-58966.

    Examples
    --------
    >>> ELA(anchor=LatentStep(step_size=0.05)).anchor.step_size
    0.05
    >>> ELA(regions=[(0, 0, 0.5, 1), (0.5, 0, 1, 1)], localize=FromMaps(smooth=1))
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: ELA(localize=...): must be omitted if all regions are given by hand. ...
    """

    localize: FromMaps = field(default_factory=FromMaps)
    anchor: LatentStep = field(default_factory=LatentStep)
    separate: Separation = field(default_factory=Separation)
    regions: Layout | None = None
    layers: str = "up"
    size: int | None = None

    name: ClassVar[str] = "ela"
    title: ClassVar[str] = "ELA"
    takes_regions: ClassVar[bool] = True
    needs_regions: ClassVar[bool] = False
    steerable: ClassVar[bool] = True
    reads_self: ClassVar[bool] = False
    # a term of the loss, and the parts that had no effect in a run without it
    parts_of_terms: ClassVar[dict[str, tuple[str, ...]]] = {
        "contrast": ("separate",),
        "shortfall": ("anchor", "localize"),
    }

    def __post_init__(self) -> None:
        for option, kind in (("localize", FromMaps), ("anchor", LatentStep), ("separate", Separation)):
            if not isinstance(getattr(self, option), kind):
                refuse(getattr(self, option), option, f"a {kind.__name__}, such as {kind.__name__}()", owner="ELA")
        if self.size is not None:
            whole_number(self.size, "size", 1, owner="ELA")
        if self.regions is not None:
            object.__setattr__(self, "regions", check_layout(self.regions, "ELA(regions=...)", partial=True))
        if is_complete(self.regions) and self.localize != FromMaps():
            raise SettingError(
                "ELA(localize=...): must be omitted if all regions are given by hand. Omit it, or give None in "
                "`regions` for the entities that are to be localized."
            )

        if self.separate not in (Separation(), Separation(step_size=0)) and self._start == 0:
            refuse(
                self.separate, "separate", "left out if anchoring starts at the first step",
                owner="ELA", hint="Or let anchoring start later, for example with anchor=LatentStep(start=0.2).",
            )  # fmt: skip

        if self.regions is not None:  # what a user asks for is always done
            for option in ("needed", "enough"):
                default = getattr(LatentStep(), option)
                if getattr(self.anchor, option) not in (None, default):
                    refuse(
                        getattr(self.anchor, option), f"anchor.{option}", "left out if regions are given by hand",
                        owner="ELA", hint="Images with regions by hand are anchored up to the last guided step.",
                    )  # fmt: skip

    def select(self, layers: Sequence[AttentionLayer], latent: tuple[int, int]) -> tuple[AttentionLayer, ...]:
        """Layers that the options `layers` and `size` select; if `size` is None, the layers with the coarsest maps."""
        chosen = decoder_side_layers(layers, self.layers)
        if self.size is not None:
            return layers_of_size(chosen, latent, self.size, NATIVE_SIZE, "ELA")
        coarsest = max(layer.factor for layer in chosen)
        return tuple(layer for layer in chosen if layer.factor == coarsest)

    def begin(self, prompt: Prompt, steps: int) -> Anchors:
        """Initial state of one image: the regions given by hand, and the step at which anchoring starts."""
        return Anchors(given=self.regions, first=round(self._start * steps))

    @property
    def _localized(self) -> bool:
        """True if at least one entity's region is localized instead of given by hand."""
        return not is_complete(self.regions)

    @property
    def _start(self) -> float:
        """Share of the denoising steps before anchoring starts; these steps move the entities' maps apart."""
        return self.anchor.starts_at(localized=self._localized)

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """Updates for separation, followed by updates for anchoring.

        The methods `Separation.plan` and `LatentStep.plan` return these updates. With a prompt of one entity there is
        nothing to separate, and the entity is anchored only if `regions` is given. `noise` holds the ratio of noise to
        signal before each denoising step; only the number of steps is used.
        """
        if len(prompt.entities) < 2 and self.regions is None:
            return []
        updates = self.anchor.plan(len(noise), localized=self._localized)
        if len(prompt.entities) > 1:
            first = round(self._start * len(noise))
            updates[:first] = self.separate.plan(first)
        return updates

    def direction(self, gradient: Tensor) -> Tensor:
        """The raw or the normalized gradient, as `anchor` specifies."""
        return self.anchor.direction(gradient)

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: Anchors) -> Loss:
        """Loss of separation in the first steps of a run; loss of anchoring in all later steps.

        `Separation.loss` computes the loss of separation. `LatentStep.loss` computes the loss of anchoring from the
        entities' regions at this step.
        """
        maps = attention.mean
        if step < state.first:
            return self.separate.loss(maps, prompt, step, state.memory)
        loss = self.anchor.loss(maps, self._masks(maps.detach(), prompt, step, state), prompt, first=not state.began)
        state.began = True
        # whether an image needs no guidance was chosen for localized regions; what a user asks for is always done
        return loss if state.given is None else replace(loss, enough=False)

    def _masks(self, maps: Tensor, prompt: Prompt, step: int, state: Anchors) -> np.ndarray:
        """Regions of the entities at a step, bool (entity, y, x), from the maps of all tokens, (token, y, x)."""
        if state.masks is not None:
            return state.masks
        entities, background = entity_means(maps, prompt), self.localize.rest(maps, prompt)
        if state.given is None:
            masks = self.localize.masks(entities, background)
        else:
            masks = complete(state.given, entities, background, self.localize)
        if self.localize.locks(step):
            state.masks = masks
        return masks


def decoder_side_layers(layers: Sequence[AttentionLayer], pattern: str) -> tuple[AttentionLayer, ...]:
    """Layers that match a pattern; if the model has no decoder, the pattern "up" selects all its layers."""
    wanted: Any = decoder_side(layer.place for layer in layers) if pattern == "up" else pattern
    return select_layers(layers, wanted)
