"""DenseDiffusion: raise attention scores inside given regions, and lower them outside.

Kim et al., "Dense Text-to-Image Generation with Attention Modulation", ICCV 2023 (arXiv:2308.12964), and its released
code (github.com/naver-ai/DenseDiffusion, gradio_app.py). Let s be the score of a location for a key in one head, and
let "lowest" and "largest" be the extremes of the location's scores over all keys. The changed score is:

    s' = s + w t^5 (1 - a) (largest - s)    for keys that belong to the location
    s' = s - w t^5 (1 - a) (s - lowest)     for all other keys

Here w is 1 in cross-attention and 0.3 in self-attention, t is the timestep as a share of 1000, and a is the share of
the image that the location's region covers.

In cross-attention, the words of an entity belong to the locations in the entity's region. All other keys, such as
start-of-text and end-of-text, are lowered. In self-attention, the locations of the same region belong to each other.
The rest of the image counts as one more region, without words.

Scores change in all layers in the first 30% of the steps. In the whole run, the words of each entity have the text
states that result from encoding these words as a separate text.

Changed scores equal those of the released code to a relative 1e-6
(``tests/parity/test_scores.py``).

Intended difference: here a box, at the size of a layer, has the locations whose centers lie in the box. The released
code reduces masks to the size of a layer by nearest neighbor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from elakit.attention.rescoring import Change, Scores, Site, check_plain
from elakit.checks import real_number, share
from elakit.guidance.anchoring import confinement
from elakit.guidance.layout import NeedsLayout, layout_masks
from elakit.guidance.method import Attention, Loss, ScoreEdit
from elakit.guidance.options import check_acts
from elakit.guidance.phrases import check_text, phrase_positions, phrases, with_text
from elakit.guidance.reading import EditsFirstSteps, ReadsOneSize
from elakit.models import Adapter, AttentionLayer, Conditioning
from elakit.prompt import Prompt

_FADING = 5  # power of the timestep


@dataclass(frozen=True)
class DenseDiffusion(NeedsLayout, EditsFirstSteps, ReadsOneSize):
    """DenseDiffusion (Kim et al., ICCV 2023): raise attention scores inside given regions, and lower them outside.

    The model must have plain cross-attention layers. The module `elakit.guidance.dense_diffusion` states the equations
    and all differences from the source.

    Parameters
    ----------
    regions : sequence of (left, top, right, bottom), or ndarray, bool, (entity, y, x)
        One region per entity, in the order of the prompt: boxes as fractions of the image, or masks; they may overlap.
    strength : float
        Strength of the change of cross-attention scores, 0 for no change; 1 in the released code.
    self_strength : float
        Strength of the change of self-attention scores, 0 for no change; 0.3 in the released code.
    area : float
        Degree, from 0 to 1, to which scores change less in larger regions; 1 in the released code. The change is
        multiplied by ``1 - area * a``, with a the share of the image that the region covers.
    guided : float
        Share of the denoising steps in which scores change, beginning with the first step; 0.3 in the released code.
    layers, size
        Layers and map size that are read for the trace; see `elakit.guidance.reading.ReadsOneSize`. Scores change in
        all layers.

    Raises
    ------
    SettingError
        No regions are given, a region is empty or leaves the image, or a setting is outside its range.

    Examples
    --------
    >>> DenseDiffusion([(0, 0, 0.5, 1), (0.5, 0, 1, 1)]).self_strength
    0.3
    >>> DenseDiffusion([(0, 0, 0.5, 1), (0.5, 0, 1, 1)], area=2)
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: DenseDiffusion(area=2): must be a number from 0 to 1.
    """

    strength: float = 1.0
    self_strength: float = 0.3
    area: float = 1.0
    guided: float = 0.3

    name: ClassVar[str] = "densediffusion"
    title: ClassVar[str] = "DenseDiffusion"

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("strength", "self_strength"):
            real_number(getattr(self, option), option, 0, owner="DenseDiffusion")
        for option in ("area", "guided"):
            share(getattr(self, option), option, owner="DenseDiffusion")
        if self.strength == 0 and self.self_strength == 0:
            check_acts(self, "strength=0 and self_strength=0", "area")

    def select(self, layers: Sequence[AttentionLayer], latent: tuple[int, int]) -> tuple[AttentionLayer, ...]:
        """Select the layers that are read for the trace, according to the method's options `layers` and `size`.

        The argument `layers` has all cross-attention layers of the model. `latent` is the (height, width) of the
        latent.

        Raises
        ------
        SettingError
            The model has layers other than plain cross-attention: joint attention (FLUX), or layers that are read at
            the attention call (Sana, HunyuanDiT).
        """
        check_plain(layers, "DenseDiffusion")
        return super().select(layers, latent)

    def encode(self, adapter: Adapter, prompt: Prompt, conditioning: Conditioning) -> Conditioning:
        """Text states of the prompt, in which the words of each entity are encoded as a separate text.

        For example, the tokens of "a red car" get the states that the text "a red car" alone has. `conditioning` has
        the text states of a plain run and is not changed; the result is a copy.
        """
        check_text(adapter, conditioning, "DenseDiffusion")
        states = conditioning.inputs["encoder_hidden_states"].clone()
        for phrase in phrases(adapter, prompt):
            states[:, list(phrase.positions)] = phrase.states[:, list(phrase.own)].to(states)
        return with_text(conditioning, states)

    def hold(
        self, attention: Attention | None, size: tuple[int, int], prompt: Prompt, step: int, state: None
    ) -> ScoreEdit:
        """Return the edit that raises scores inside the given regions, and lowers them elsewhere.

        `attention` is not used. `size` is the (rows, columns) of the maps that are read for the trace.
        """
        words = [phrase_positions(prompt, entity) for entity in prompt.entities]

        def change(site: Site, scores: Scores) -> Change | None:
            regions = torch.from_numpy(layout_masks(self.regions, site.size, len(prompt.entities))).flatten(1)
            own = site.layer.reads == "image"
            strength = (self.self_strength if own else self.strength) * site.time**_FADING
            if not strength:
                return None
            values = scores()
            belongs = same_region(regions) if own else of_words(regions, words, values.shape[-1])
            amount = strength * (1 - self.area * covered(regions))[:, None]
            return Change(modulation(values, belongs.to(values.device), amount.to(values)))

        return ScoreEdit(change, layout_masks(self.regions, size, len(prompt.entities)))

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: None) -> Loss:
        """Measure of the attention outside the regions, for the trace only.

        The loss is the sum of two terms. "outside" is the squared share of an entity's attention outside the entity's
        region, averaged over entities. "attributes" is the squared share of an attribute token's attention outside the
        region of its entity, averaged over attribute tokens.
        """
        maps = attention.mean
        masks: np.ndarray = layout_masks(self.regions, (maps.shape[1], maps.shape[2]), len(prompt.entities))
        return confinement(maps, masks, prompt)


def modulation(scores: Tensor, belongs: Tensor, amount: Tensor) -> Tensor:
    """Bias that moves the score of each key toward the largest or the lowest score at a location.

    Scores of keys that belong to the location move toward the location's largest score. Scores of all other keys move
    toward the location's lowest score.

    Parameters
    ----------
    scores : Tensor, (head, location, key)
        Attention scores before the softmax.
    belongs : Tensor, bool, (location, key)
        Whether each key belongs to the location.
    amount : Tensor, (location, 1)
        Length of the move, as a share of the distance to the largest or lowest score.

    Returns
    -------
    Tensor, (head, location, key)
        Bias to be added to the scores.

    Examples
    --------
    >>> scores, belongs = torch.tensor([[[0.0, 1.0, 4.0]]]), torch.tensor([[False, True, False]])
    >>> scores + modulation(scores, belongs, torch.tensor([[0.5]]))
    tensor([[[0.0000, 2.5000, 2.0000]]])
    """
    largest, lowest = scores.amax(-1, keepdim=True), scores.amin(-1, keepdim=True)
    return amount * (torch.where(belongs, largest, lowest) - scores)


def same_region(regions: Tensor) -> Tensor:
    """Matrix that is True for each pair of locations in the same region; bool (entity, n) -> bool (n, n).

    The locations outside all regions count as one more region.
    """
    every = torch.cat([regions, ~regions.any(0, keepdim=True)]).float()
    return (every.T @ every) > 0


def of_words(regions: Tensor, words: Sequence[Sequence[int]], length: int) -> Tensor:
    """Matrix of the text positions that belong to each location; bool (n, `length`) for n locations.

    The words of an entity belong to the locations in the entity's region. `regions` has the region of each entity, bool
    (entity, n). `words` has the text positions of each entity's words. `length` is the number of text positions.
    """
    belongs = torch.zeros(regions.shape[1], length, dtype=torch.bool)
    for region, positions in zip(regions, words, strict=True):
        belongs[:, list(positions)] |= region[:, None]
    return belongs


def covered(regions: Tensor) -> Tensor:
    """Share of the image that the region of each location covers; bool (entity, n) -> (n,).

    The locations outside all regions count as one more region. If a location is in several regions, the shares of these
    regions are added.

    Examples
    --------
    The region has one of four locations; the rest of the image has the other three:

    >>> covered(torch.tensor([[True, False, False, False]]))
    tensor([0.2500, 0.7500, 0.7500, 0.7500])
    """
    every = torch.cat([regions, ~regions.any(0, keepdim=True)]).float()
    return (every.T @ every).sum(1) / regions.shape[1]
