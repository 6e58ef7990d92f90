"""SPDiffusion: find a region per entity in plain steps, then start again and hide other entities' words in the region.

Zhang et al., "SPDiffusion: Semantic Protection Diffusion Models for Multi-concept Text-to-image Generation"
(arXiv:2409.01327), and its released code (github.com/zy1xxx/SPDiffusion, SPD_Pipeline.py and run.py).

First, two plain steps are run. Their attention is averaged over steps, heads and the layers of one map size. Let
``scaled`` be the scaling of a map to 0..1. For each entity, three things are computed:

    seed     locations where scaled(cross-attention of the noun) > 0.9, without the outermost rows and columns
    S        scaled(mean self-attention from each location to the seed)
    region   locations where scaled(relu(S - mean of the other entities' S)) > 0.1

Then the run starts again from the same noise. At every step, in every layer, the locations of an entity's region do not
attend to the nouns and attributes of the other entities.

Regions on given tensors equal those of the released code
(``tests/parity/test_scores.py``).

Intended differences:

- All entities are protected. In the released code, only entities with an attribute are protected.
- Only the conditional half of each denoiser call is changed, that is, the rows that see the prompt. The released code
  also changes the same positions in the other half, in which these positions are padding.
- In layers coarser than the maps, a location belongs to a region if the region covers more than half of the location.
  Stable Diffusion XL has no such layers.
- An entity whose map is constant gets no region. The released code divides by zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from elakit.attention.calls import NEVER
from elakit.checks import share, whole_number
from elakit.errors import SettingError
from elakit.guidance.anchoring import confinement
from elakit.guidance.holding import restriction
from elakit.guidance.localization import entity_means
from elakit.guidance.method import Attention, Loss, ScoreEdit
from elakit.guidance.predicated_diffusion import scaled
from elakit.guidance.reading import EditsFirstSteps, ReadsOneSize
from elakit.measures.arrays import area_mean
from elakit.prompt import Prompt


@dataclass
class Protection:
    """State of SPDiffusion for one image.

    Attributes
    ----------
    regions : ndarray, bool, (entity, y, x), or None
        Region of each entity; None until the regions have been found in the plain steps before the guided run.
    """

    regions: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class SPDiffusion(EditsFirstSteps, ReadsOneSize):
    """SPDiffusion (Zhang et al., arXiv:2409.01327): hide each entity's words in other entities' regions.

    The module `elakit.guidance.spdiffusion` states the equations and all differences from the source.

    Parameters
    ----------
    steps : int
        Number of plain steps before the guided run. The regions are found in the attention of these steps; then the run
        starts again from the same noise. 2 in the released code.
    cross_threshold : float
        Threshold, 0 to 1, for the seed from which an entity's region is found; 0.9 in the released code. A location
        belongs to the seed if its cross-attention to the entity's noun, scaled to 0..1, exceeds the threshold.
    self_threshold : float
        Threshold, 0 to 1, for the region of an entity; 0.1 in the released code. A location belongs to the region if
        its score exceeds the threshold. The score is the location's self-attention to the entity's seed, minus the mean
        of its self-attention to the seeds of the other entities. Each self-attention is scaled to 0..1 before the
        subtraction. Afterwards, negative scores are set to 0, and the scores are scaled to 0..1 again.
    guided : float
        Share of the denoising steps in which words are hidden, beginning with the first step; 1 in the released code.
    layers, size
        Layers whose maps are read to find the regions, and the size of these maps; see
        `elakit.guidance.reading.ReadsOneSize`. Words are hidden in all layers.

    Raises
    ------
    SettingError
        A setting is outside its range.

    Examples
    --------
    >>> SPDiffusion().self_threshold
    0.1
    >>> SPDiffusion(steps=0)
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: SPDiffusion(steps=0): must be a whole number, 1 or more.
    """

    steps: int = 2
    cross_threshold: float = 0.9
    self_threshold: float = 0.1
    guided: float = 1.0

    name: ClassVar[str] = "spdiffusion"
    title: ClassVar[str] = "SPDiffusion"
    reads_self: ClassVar[bool] = True

    def __post_init__(self) -> None:
        whole_number(self.steps, "steps", 1, owner="SPDiffusion")
        for option in ("cross_threshold", "self_threshold", "guided"):
            share(getattr(self, option), option, owner="SPDiffusion")

    def begin(self, prompt: Prompt, steps: int) -> Protection:
        """Initial state of one image, without regions."""
        return Protection()

    def rehearse(self, passes: Sequence[Attention], prompt: Prompt, state: Protection) -> None:
        """Find the regions of one image in the attention of its plain steps, and store them in `state`.

        `passes` has the attention of each plain step; the function averages it over these steps.
        """
        cross = torch.stack([seen.mean for seen in passes]).mean(0)
        own = torch.stack([seen.own_mean for seen in passes]).mean(0)
        state.regions = self.find(entity_means(cross, prompt), own)

    def find(self, entities: Tensor, own: Tensor) -> np.ndarray:
        """Find the region of each entity in the attention of the plain steps, averaged over these steps.

        Parameters
        ----------
        entities : Tensor, (entity, y, x)
            Cross-attention map of each entity's noun.
        own : Tensor, (y, x, y, x)
            Self-attention from each location (first y, x) to all locations (last y, x).

        Returns
        -------
        ndarray, bool, (entity, y, x)
            Regions of three or more entities may overlap. If the prompt has exactly two entities, and both have the
            same seed, both regions are empty.
        """
        height, width = entities.shape[1:]
        flat = own.reshape(height * width, height * width)
        similar = torch.stack([scaled(flat[:, seed].mean(1)) for seed in self._seeds(entities).flatten(1)])
        others = (similar.sum(0) - similar) / max(1, len(similar) - 1)
        kept = torch.stack([scaled((one - other).relu()) for one, other in zip(similar, others, strict=True)])
        found: np.ndarray = (kept > self.self_threshold).unflatten(1, (height, width)).cpu().numpy()
        return found

    def _seeds(self, entities: Tensor) -> Tensor:
        """Seed of each entity: the locations with the largest cross-attention to its noun; bool (entity, y, x)."""
        inner = torch.zeros_like(entities[0], dtype=torch.bool)
        inner[1:-1, 1:-1] = True
        if not bool(inner.any()):  # maps of less than 3 rows or columns have nothing but a border
            inner[:] = True
        seeds = []
        for one in entities:
            sharp = scaled(scaled(one) * inner)
            # nothing exceeds a threshold of 1, and nothing of a constant map: the largest values are the seed
            seeds.append((sharp > self.cross_threshold) | (sharp == sharp.amax()))
        return torch.stack(seeds)

    def hold(
        self, attention: Attention | None, size: tuple[int, int], prompt: Prompt, step: int, state: Protection
    ) -> ScoreEdit:
        """Return the edit that hides each entity's words in the regions of all other entities.

        `attention` and `size` are not used.

        Raises
        ------
        SettingError
            The plain steps have not been read, because the run was not started by `elakit.generate`.
        """
        if state.regions is None:
            raise SettingError(
                "SPDiffusion has no regions yet, because it finds them in plain steps before the run: generate images "
                "with elakit.generate(..., guidance=...), which runs these steps."
            )
        words = [(*entity.token_indices, *entity.attribute_indices) for entity in prompt.entities]
        return restriction(partial(_allowed_at, state.regions), words, -NEVER, regions=state.regions)

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: Protection) -> Loss:
        """Loss for the trace only: mean over entities of the squared share of attention in other entities' regions.

        The same mean over the tokens of the entities' attributes is added. See `elakit.guidance.anchoring.confinement`.
        """
        if state.regions is None:
            self.rehearse(
                [Attention((attention.mean.detach()[None],), (attention.own_mean.detach()[None],))], prompt, state
            )
        assert state.regions is not None
        return confinement(attention.mean, _allowed(state.regions), prompt, state.regions)


def _allowed(regions: np.ndarray) -> np.ndarray:
    """Locations that may attend to each entity's words: those outside the regions of all other entities.

    `regions` and the result are bool (entity, y, x).
    """
    return np.stack([~np.delete(regions, i, axis=0).any(0) for i in range(len(regions))])


def _allowed_at(regions: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Locations that may attend to each entity's words, bool (entity, y, x), at the size of a layer's maps.

    These locations lie outside the regions of all other entities. A location of the layer belongs to a region if the
    region covers more than half of the location. `size` is the (rows, columns) of the layer's maps.
    """
    return _allowed(area_mean(regions, size) > 0.5)
