"""Layout guidance: move the attention of each entity into the region given for it, head by head.

Chen et al., "Training-Free Layout Control with Cross-Attention Guidance", WACV 2024 (arXiv:2304.03373; its backward
guidance), and its official code (github.com/silent-chen/layout-guidance). A is the attention map of one token of an
entity in one head, and M is the mask of the entity's region. The layers are those of the middle block and of the first
upward block with cross-attention. In each update, the latent z is replaced by z':

    E = mean over heads, tokens, entities and layers of (1 - sum_p A(p) M(p) / sum_p A(p))^2
    z' = z - 30 sigma^2 * gradient of E

Here p runs over locations, and sigma is the ratio of noise to signal. The latent is updated in the first 10 of 50
steps, at most 5 times per step. As soon as E is at or below 0.2, one last update follows, and guidance ends for the
rest of the run. The corners of boxes are rounded down to whole locations: a corner at the fraction x of the width is at
column int(x * columns). Both rules are those of the official code.

The authors' latents are those of the LMS scheduler: signal plus noise of standard deviation sigma. elakit's engine
moves latents of unit variance, for which the equivalent step size is 30 sigma^2 / (1 + sigma^2). At the first step of
Stable Diffusion, sigma is about 14. The equivalent step size is then about 30, while 30 sigma^2 is about 6000.

The authors let the user choose the tokens of an entity; in elakit they are the tokens of the entity's noun. E and its
gradient equal those of the official code to rounding (``tests/parity/test_losses.py``).

One difference is intended. In the official code, a box that is empty after rounding stays empty. In elakit, such a box
has the locations whose center lies in it. If there are no such locations, the box has the location that contains its
center.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from elakit.guidance.layout import NeedsLayout, layout_masks
from elakit.guidance.method import Attention, Loss, Update
from elakit.guidance.options import check_guided, check_numbers, check_whole
from elakit.guidance.quotients import ratio
from elakit.guidance.reading import ReadsFirstBlocks
from elakit.prompt import Prompt


@dataclass(frozen=True)
class LayoutGuidance(NeedsLayout, ReadsFirstBlocks):
    """Layout guidance (Chen et al., WACV 2024): move the attention of each entity into its given region.

    The module `elakit.guidance.layout_guidance` states the equations and all differences from the source.

    Parameters
    ----------
    regions : sequence of (left, top, right, bottom), or ndarray, bool, (entity, y, x)
        One region per entity, in the order of the prompt: boxes as fractions of the image, or masks; they may overlap.
    step_size : float
        Number c in the step size c sigma^2 / (1 + sigma^2), with sigma the ratio of noise to signal. The official code
        has c = 30 and a step size of c sigma^2, because its latents are not scaled to unit variance.
    guided : float
        Share of the denoising steps that are guided, from the first; 10 of 50 in the official code.
    iterations : int
        Largest number of updates per step; 5 in the official code.
    until : float
        Threshold of the loss. As soon as the loss is at or below it, one last update follows, and guidance ends for the
        rest of the run; 0.2 in the official code.
    layers : str, optional
        Layers that are read: "up", "down", "mid", "all" or a glob on layer names such as "up_blocks.1.*". By default
        the middle block and the first upward block that has cross-attention; in a model without these blocks (PixArt,
        Stable Diffusion 3, FLUX), all layers.

    Raises
    ------
    SettingError
        No regions are given, a region is empty or leaves the image, or a setting is outside its range.

    Examples
    --------
    >>> LayoutGuidance([(0, 0, 0.5, 1), (0.5, 0, 1, 1)]).regions
    ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
    >>> LayoutGuidance(None)
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: LayoutGuidance(regions=...): None is not a layout. Give one box per entity, ...
    """

    step_size: float = 30.0
    guided: float = 0.2
    iterations: int = 5
    until: float = 0.2

    name: ClassVar[str] = "layout-guidance"
    title: ClassVar[str] = "Layout guidance"
    reads_self: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "step_size", "until")
        check_guided(self)
        check_whole(self, "iterations", least=1)

    def begin(self, prompt: Prompt, steps: int) -> Progress:
        """Initial state of one image: no step has met the threshold `until` yet."""
        return Progress()

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """Plan up to `iterations` updates of the latent before each guided step.

        A prompt of one entity gets no updates. `noise` holds the ratio of noise to signal before each denoising step.
        The step size depends on this ratio.
        """
        if len(prompt.entities) < 2:
            return []
        count = round(self.guided * len(noise))
        # 30 sigma^2 in the authors' latents, converted to the latents of unit variance that the engine moves
        sizes = [self.step_size * sigma**2 / (1 + sigma**2) for sigma in noise[:count]]
        return [Update(size, self.iterations - 1, self.until) for size in sizes]

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: Progress) -> Loss:
        """Mean squared share of the entities' attention that lies outside their regions.

        The trace stores this loss as the term "outside". The regions for the trace have the size of the largest maps
        that are read.
        """
        tokens = [token for entity in prompt.entities for token in entity.token_indices]
        owners = [i for i, entity in enumerate(prompt.entities) for _ in entity.token_indices]
        # Every entity has the same weight, however many tokens it has.
        weights = [1 / len(entity.token_indices) for entity in prompt.entities for _ in entity.token_indices]
        losses, grids = [], []
        for layer in attention.cross:
            size = (layer.shape[-2], layer.shape[-1])
            grids.append(layout_masks(self.regions, size, len(prompt.entities), truncate=True))
            maps = layer[:, tokens]
            inside = (maps * torch.from_numpy(grids[-1]).to(maps)[owners]).sum((2, 3))
            outside = (1 - ratio(inside, maps.sum((2, 3)))).square().mean(0)
            losses.append((outside * outside.new_tensor(weights)).sum() / len(prompt.entities))
        total = torch.stack(losses).mean()
        outside_share = float(total.detach())
        enough = state.met(step, outside_share <= self.until)
        return Loss(total, {"outside": outside_share}, max(grids, key=lambda grid: grid.size), enough=enough)


@dataclass
class Progress:
    """State of layout guidance for one image: the first step at which the loss met the threshold `until`.

    The loss meets the threshold if the loss is at or below it.

    Attributes
    ----------
    step : int or None
        First step at which the loss met the threshold, counted from 0; None as long as no step has met it.
    """

    step: int | None = None

    def met(self, step: int, low: bool) -> bool:
        """True if an earlier step met the threshold; the first step that meets the threshold is stored in `step`.

        Parameters
        ----------
        step : int
            Present step, counted from 0.
        low : bool
            Whether the loss at this step meets the threshold.

        Examples
        --------
        >>> progress = Progress()
        >>> [progress.met(0, False), progress.met(0, True), progress.met(0, True), progress.met(1, False)]
        [False, False, False, True]
        """
        if self.step is None and low:
            self.step = step
        return self.step is not None and step > self.step
