"""SPDiffusion: find a region per entity in two plain steps, start again, and hide the other entities' words in it.

Zhang et al., "SPDiffusion: Semantic Protection Diffusion Models for Multi-concept Text-to-image Generation"
(arXiv:2409.01327), and its released code (github.com/zy1xxx/SPDiffusion, SPD_Pipeline.py and run.py). The attention of
the first two steps of a plain run is averaged over steps, heads and the layers of one map size. With ``scaled`` the
scaling of a map to 0..1:

    seed     locations where scaled(cross-attention of the noun) > 0.9, the outermost rows and columns left out
    S        scaled(mean self-attention of each location to the seed)
    region   locations where scaled(relu(S - mean of the other entities' S)) > 0.1

The run then starts again from the same noise. At each step, in every layer, the locations of an entity's region do not
attend to the nouns and attributes of the other entities.

Regions on given tensors equal those of the released code
(``tests/parity/test_scores.py``).

Intended differences: all entities are protected (in the released code only those with an attribute); only the
conditional pass is changed (in the released code also the same positions of the unconditional pass, which are padding
there); in layers coarser than the maps, which Stable Diffusion XL does not have, a location belongs to a region if the
region covers more than half of it; an entity whose map is constant gets no region (the released code divides by zero).
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
        Region of each entity; None before the plain steps have been read.
    """

    regions: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class SPDiffusion(EditsFirstSteps, ReadsOneSize):
    """SPDiffusion (Zhang et al., arXiv:2409.01327): hide each entity's words in the regions of the others.

    The module `elakit.guidance.spdiffusion` states the equations and all differences from the source.

    Parameters
    ----------
    steps : int
        Number of plain steps in which the regions are found, before the run starts again; 2 in the released code.
    cross_threshold : float
        Cross-attention to an entity's noun, scaled to 0..1, above which a location belongs to the seed of the entity's
        region; 0.9 in the released code.
    self_threshold : float
        Score of a location for an entity above which the location is in the entity's region; 0.1 in the released code.
        With S the location's self-attention to an entity's seed, scaled to 0..1, the score is the entity's S minus the
        mean S of the other entities. Negative scores count as 0, and the scores are scaled to 0..1 again.
    guided : float
        Share of the denoising steps in which words are hidden, from the first; all in the released code.
    layers, size
        Layers and map size that are read; see `elakit.guidance.reading.ReadsOneSize`. Words are hidden in all layers.

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
        """Initial state, without regions."""
        return Protection()

    def rehearse(self, passes: Sequence[Attention], prompt: Prompt, state: Protection) -> None:
        """Find the regions in the mean attention of the plain steps."""
        cross = torch.stack([seen.mean for seen in passes]).mean(0)
        own = torch.stack([seen.own_mean for seen in passes]).mean(0)
        state.regions = self.find(entity_means(cross, prompt), own)

    def find(self, entities: Tensor, own: Tensor) -> np.ndarray:
        """Find the regions of the entities.

        Parameters
        ----------
        entities : Tensor, (entity, y, x)
            Cross-attention of the nouns.
        own : Tensor, (y, x, y, x)
            Self-attention from each location (first y, x) to all (last y, x).

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
        """Return the edit that hides each entity's words in the regions of the others.

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
        """Squared share of each entity's attention in the regions of the others, for the trace; see `confinement`."""
        if state.regions is None:
            self.rehearse(
                [Attention((attention.mean.detach()[None],), (attention.own_mean.detach()[None],))], prompt, state
            )
        assert state.regions is not None
        return confinement(attention.mean, _allowed(state.regions), prompt, state.regions)


def _allowed(regions: np.ndarray) -> np.ndarray:
    """Locations that may attend to each entity's words, outside the others' regions; bool (entity, y, x)."""
    return np.stack([~np.delete(regions, i, axis=0).any(0) for i in range(len(regions))])


def _allowed_at(regions: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Result of `_allowed` at the size of a layer; a location belongs to a region that covers more than half of it."""
    return _allowed(area_mean(regions, size) > 0.5)
