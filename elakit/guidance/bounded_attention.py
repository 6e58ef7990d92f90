"""Bounded Attention: hide subjects from each other in cross- and self-attention, and move them into given regions.

Dahary et al., "Be Yourself: Bounded Attention for Multi-Subject Text-to-Image Generation", ECCV 2024
(arXiv:2403.16990), and its released code (github.com/omer11a/bounded-attention, bounded_attention.py, and run_sd.py for
the settings of Stable Diffusion). A subject is an entity of the prompt, and M_s is the region of subject s. Attention
is bounded in all layers and in every pass:

    cross-attention   the words of s are hidden outside M_s; function words (see `function_words`) are hidden
                      everywhere, and end-of-text is hidden in the background
    self-attention    locations of M_s do not attend to locations of other subjects, in the conditional and the
                      unconditional pass

In the first 15 of 50 steps, M_s is the given region of s. In these steps, the latent also moves along the negative raw
gradient of the loss

    L = sum_s 1.5 (1 - cross_s)^2 + 0.5 (1 - self_s)^2,    cross_s and self_s = inside / (inside + n background)

Here, n is the number of subjects. "inside" is a sum of attention over heads and the locations of M_s. "background" is
the same sum over heads and the locations of no region. For cross_s, both sums contain the attention to the words of s
and to end-of-text. For self_s, both sums contain the attention to the locations of M_s. The sums are averaged over the
layers of the middle block and of the first upward block with cross-attention. In the passes that compute this gradient,
the words of s are also visible in the background, and end-of-text is visible everywhere.

The latent moves at most 5 times per step. As soon as L / n is at most 0.2, one last update of the step is made. The
step size falls from 8 toward 2.

After the first 15 steps, the regions are found in the image. At every fifth step, the mean self-attention of all passes
so far is divided into clusters of locations, three per subject. Each cluster is assigned to the subject with the
largest overlap if this overlap is at least 0.2, and otherwise to no subject. The overlap is computed as follows:

* The cross-attention A of a subject is sharpened to sigmoid(10 (A / max A - 0.2)).
* The sharpened map is scaled linearly to the range from 0 to 1, and set to 0 outside the subject's last region. The
  result is the map c.
* The overlap is the sum of c over the cluster, divided by the smaller of two numbers: the sum of c over all locations,
  and the area of the cluster.

On given tensors, the loss and the assignment of clusters equal those of the released code
(``tests/parity/test_scores.py``).

Intended differences from the released code:

* k-means has 10 starts with fixed seeds and 20 iterations. The released code has 100 random starts.
* The words that are hidden everywhere come from a list. The released code uses a part-of-speech tagger.
* L / n is compared with 0.2 for each image. The released code compares it for a batch.

For Stable Diffusion XL, the released code has other settings: step sizes 18 and 5, and the layers of the first upward
block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from torch import Tensor

from elakit.attention.calls import NEVER
from elakit.attention.rescoring import Change, Scores, Site, check_plain
from elakit.english import ARTICLES
from elakit.guidance.layout import NeedsLayout, layout_masks
from elakit.guidance.method import Attention, Loss, ScoreEdit, Update
from elakit.guidance.options import check_acts, check_guided, check_numbers, check_whole
from elakit.guidance.phrases import end_of_text
from elakit.guidance.quotients import ratio
from elakit.guidance.reading import ReadsFirstBlocks
from elakit.models import AttentionLayer
from elakit.prompt import Prompt

# Words that name and describe nothing: the released code hides them everywhere, by their tags.
FUNCTION_WORDS: frozenset[str] = ARTICLES | {
    "this", "that", "these", "those", "some", "any", "each", "every", "no", "and", "or", "but", "nor", "of", "in", "on",
    "at", "by", "for", "from", "to", "with", "without", "into", "onto", "over", "under", "above", "below", "between",
    "behind", "beside", "near", "next", "inside", "outside", "through", "across", "around", "along", "against", "as",
    "than", "he", "she", "it", "they", "his", "her", "its", "their", "who", "which", "what", "where", "when", "one",
    "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "left", "right", "top", "bottom",
}  # fmt: skip
_STARTS, _ITERATIONS = 10, 20  # of k-means
_SHARPNESS, _CROSS, _COVERED = 10.0, 0.2, 0.2
_SMALL = 1e-5
_REFINED = 0.1  # share of the steps from one clustering to the next


@dataclass
class Bounds:
    """State of the method Bounded Attention for one image: mean attention so far, and the regions found in it.

    Attributes
    ----------
    steps : int
        Number of denoising steps of the run.
    masks : ndarray, bool, (entity, y, x), or None
        Regions found by clustering the locations of the image; None as long as the given regions are used.
    cross : Tensor, (entity, location), or None
        Attention to the last token of each entity's noun, averaged over denoiser calls, layers and heads; None before
        the first call.
    own : Tensor, (location, location), or None
        Self-attention from each location (row) to all locations, averaged over denoiser calls, layers and heads; None
        before the first call.
    passes : int
        Number of denoiser calls over which `cross` and `own` are averaged.
    size : tuple of int
        (rows, columns) of the maps that `cross` and `own` contain in flattened form.
    centers : ndarray, (cluster, location), or None
        Cluster centers of the last clustering, from which the next clustering starts; None before the first clustering.
    """

    steps: int
    masks: np.ndarray | None = None
    cross: Tensor | None = None
    own: Tensor | None = None
    passes: int = 0
    size: tuple[int, int] = (0, 0)
    centers: np.ndarray | None = None

    def add(self, attention: Attention, nouns: Sequence[int]) -> None:
        """Add the attention of one more denoiser call to the means `cross` and `own`.

        In `attention`, only the layers with the largest maps are used. `nouns` has one text position per entity: the
        last token of the entity's noun.
        """
        largest = max(layer.shape[-2:].numel() for layer in attention.cross)
        cross = torch.stack([layer.mean(0) for layer in attention.cross if layer.shape[-2:].numel() == largest]).mean(0)
        own = torch.stack([layer.mean(0) for layer in attention.own if layer.shape[-2:].numel() == largest]).mean(0)
        self.size = (cross.shape[1], cross.shape[2])
        latest = cross[list(nouns)].flatten(1), own.flatten(2).flatten(0, 1)
        self.passes += 1
        if self.cross is None or self.own is None:
            self.cross, self.own = latest
        else:
            self.cross = self.cross + (latest[0] - self.cross) / self.passes
            self.own = self.own + (latest[1] - self.own) / self.passes


@dataclass(frozen=True)
class BoundedAttention(NeedsLayout, ReadsFirstBlocks):
    """Bounded Attention (Dahary et al., ECCV 2024): keep the attention of each entity in its given region.

    In all denoising steps, attention scores are changed before the softmax. In the first steps, the latent also moves
    along the gradient of a loss. The model must have plain cross-attention layers. The module
    `elakit.guidance.bounded_attention` states the equations and all differences from the source.

    Parameters
    ----------
    regions : sequence of (left, top, right, bottom), or ndarray, bool, (entity, y, x)
        One region per entity, in the order of the prompt: boxes as fractions of the image, or masks. If the regions
        cover the whole image, the loss is 0 and the latent does not move; attention scores still change.
    step_size : float
        Step size at the first guided step; 8 in the released code for Stable Diffusion.
    last_step_size : float
        Value toward which the step size changes linearly; 2 in the released code for Stable Diffusion. The step size
        would reach this value one step after the last guided step.
    guided : float
        Share of the denoising steps in which the latent moves, beginning with the first step; 15 of 50 in the released
        code. In later steps, the given regions are replaced by regions found by clustering the attention of the image.
    iterations : int
        Largest number of updates of the latent per denoising step; 5 in the released code.
    until : float
        Threshold of the loss divided by the number of entities; 0.2 in the released code. An update with a loss at or
        below the threshold is still made, and is the last update of its denoising step.
    cross : float
        Weight of the loss term for cross-attention; 1.5 in the released code.
    own : float
        Weight of the loss term for self-attention; 0.5 in the released code.
    clusters : int
        Number of clusters per entity in the clustering after the guided steps; 3 in the released code.
    layers : str, optional
        Layers that the loss reads: "up", "down", "mid", "all" or a glob on layer names such as "up_blocks.1.*". By
        default the middle block and the first upward block with cross-attention, or all layers in PixArt. Attention
        scores change in all layers, whatever the loss reads.

    Raises
    ------
    SettingError
        No regions are given, a region is empty or leaves the image, or a setting is outside its range.

    Examples
    --------
    >>> BoundedAttention([(0, 0, 0.5, 1), (0.5, 0, 1, 1)]).iterations
    5
    >>> BoundedAttention([(0, 0, 0.5, 1), (0.5, 0, 1, 1)], clusters=0)
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: BoundedAttention(clusters=0): must be a whole number, 1 or more.
    """

    step_size: float = 8.0
    last_step_size: float = 2.0
    guided: float = 0.3
    iterations: int = 5
    until: float = 0.2
    cross: float = 1.5
    own: float = 0.5
    clusters: int = 3

    name: ClassVar[str] = "bounded-attention"
    title: ClassVar[str] = "Bounded Attention"
    reads_self: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "step_size", "last_step_size", "until", "cross", "own")
        check_guided(self)
        check_whole(self, "iterations", "clusters", least=1)
        if self.guided == 0:
            check_acts(self, "guided=0", "step_size", "last_step_size", "iterations", "until")
        if self.guided == 1:
            check_acts(self, "guided=1", "clusters")
        if self.iterations == 1:
            check_acts(self, "iterations=1", "until")

    def select(self, layers: Sequence[AttentionLayer], latent: tuple[int, int]) -> tuple[AttentionLayer, ...]:
        """Select the layers that the loss reads, according to the method's option `layers`.

        By default, these are the layers of the middle block and of the first upward block. The argument `layers` has
        all cross-attention layers of the model. `latent`, the (height, width) of the latent, is not used.

        Raises
        ------
        SettingError
            The model has layers other than plain cross-attention: joint attention (FLUX), or layers that are read at
            the attention call (Sana, HunyuanDiT).
        """
        check_plain(layers, "BoundedAttention")
        return super().select(layers, latent)

    def begin(self, prompt: Prompt, steps: int) -> Bounds:
        """State of one image before a run of `steps` denoising steps: no attention stored, the given regions in use."""
        return Bounds(steps)

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """One update per denoising step; an empty list if the prompt names only one entity.

        Every update edits attention scores. The first updates also move the latent; the option `guided` is their share
        of all updates. `noise` holds the ratio of noise to signal before each denoising step; only its length is used.
        """
        if len(prompt.entities) < 2:
            return []
        count = round(self.guided * len(noise))
        slope = (self.last_step_size - self.step_size) / max(1, count)
        guided = [Update(self.step_size + slope * i, self.iterations - 1, self.until, hold=True) for i in range(count)]
        return [*guided, *[Update(0.0, hold=True)] * (len(noise) - count)]

    def hold(
        self, attention: Attention | None, size: tuple[int, int], prompt: Prompt, step: int, state: Bounds
    ) -> ScoreEdit:
        """Return the edit of attention scores that keeps each entity's attention in its region.

        In the guided steps, the regions are the given regions. In later steps, the regions are found by clustering the
        locations of the image, based on the attention of all calls so far. `attention` is the attention of the previous
        denoiser call, or None before the first call. `size` is the (rows, columns) of the maps in the first layer that
        the loss reads.
        """
        if attention is not None:
            state.add(attention, [entity.token_indices[-1] for entity in prompt.entities])
        first = round(self.guided * state.steps)
        every = max(1, round(_REFINED * state.steps))
        if step >= first and (state.masks is None or step % every == 0) and state.passes:
            self._refine(state)
        found, function, count = state.masks, function_words(prompt), len(prompt.entities)

        def change(site: Site, scores: Scores) -> Change:
            grid = layout_masks(self.regions, site.size, count) if found is None else resized(found, site.size)
            masks = torch.from_numpy(grid).flatten(1)
            if site.layer.reads == "image":
                return Change(hidden_subjects(masks)[None], unconditional=True)
            return Change(hidden_words(masks, prompt, function, site.keys, guidance=site.gradient)[None])

        return ScoreEdit(change, layout_masks(self.regions, size, count) if found is None else found)

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: Bounds) -> Loss:
        """Loss that is small if the attention of each entity lies in its region and not in the background.

        The loss is the weighted sum of a term for cross-attention and a term for self-attention. The trace stores these
        terms as "cross" and "self": means over entities, without the weights.
        """
        count = len(prompt.entities)
        end = end_of_text(prompt)
        ends = [] if end is None else [end]
        contexts = [[*entity.token_indices, *entity.attribute_indices, *ends] for entity in prompt.entities]
        cross, own = [], []
        for layer in attention.cross:
            masks = self._masks(layer, count)
            seen = torch.stack([layer[:, context].sum(1) for context in contexts])
            cross.append(shares(seen, masks))
        for layer in attention.own:
            masks = self._masks(layer, count)
            seen = torch.einsum("hyxuv,nuv->nhyx", layer, masks.to(layer))
            own.append(shares(seen, masks))
        parts = {"cross": _beside(cross, count), "self": _beside(own, count)}
        total = count * (self.cross * parts["cross"] + self.own * parts["self"])
        return Loss(
            total,
            {name: float(part.detach()) for name, part in parts.items()},
            max((layout_masks(self.regions, (m.shape[-2], m.shape[-1]), count) for m in attention.cross), key=np.size),
            goal=float(total.detach()) / count,
        )

    def _masks(self, layer: Tensor, count: int) -> Tensor:
        """Masks of the user's regions, at the size of one layer's maps; bool (entity, y, x).

        `layer` is the attention in the layer; its last two dimensions are (y, x). `count` is the number of entities.
        """
        masks = layout_masks(self.regions, (layer.shape[-2], layer.shape[-1]), count)
        return torch.from_numpy(masks).to(layer.device)

    def _refine(self, state: Bounds) -> None:
        """Find new regions by clustering the mean attention in `state`, and store them as `state.masks`."""
        assert state.cross is not None
        assert state.own is not None
        count = len(state.cross)
        given = layout_masks(self.regions, state.size, count)
        labels, state.centers = clustered(state.own, min(self.clusters * count, len(state.own)), state.centers)
        state.masks = assigned(labels, state.cross, given if state.masks is None else state.masks, given)


def shares(seen: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to each entity, summed once inside the entity's region and once in the background.

    Parameters
    ----------
    seen : Tensor, (entity, head, y, x)
        Attention from each location to each entity.
    masks : Tensor, bool, (entity, y, x)
        Region of each entity.

    Returns
    -------
    inside : Tensor, (entity,)
        Sum over heads and over the locations of the entity's region.
    background : Tensor, (entity,)
        Sum over heads and over the locations outside all regions.
    """
    background = ~masks.any(0)
    inside = (seen * masks[:, None]).sum((1, 2, 3))
    return inside, (seen * background).sum((1, 2, 3))


def _beside(layers: Sequence[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """Mean over entities of (1 - q)^2, with q = inside / (inside + count * background).

    "inside" is the attention to an entity inside its region, "background" the attention to the entity outside all
    regions. If both are 0, q is 0. `layers` has one pair (inside, background) per layer, as `shares` returns it. Both
    are averaged over layers before q is computed. `count` is the number of entities.
    """
    inside, background = (torch.stack(list(part)).mean(0) for part in zip(*layers, strict=True))
    return (1 - ratio(inside, inside + count * background)).square().mean()


def hidden_words(masks: Tensor, prompt: Prompt, function: Sequence[int], length: int, *, guidance: bool) -> Tensor:
    """Bias of cross-attention scores that hides the words of each entity from locations outside its region.

    Parameters
    ----------
    masks : Tensor, bool, (entity, location)
        Region of each entity.
    prompt : Prompt
        Prompt with the entities of `masks`, in the same order.
    function : sequence of int
        Text positions of function words, such as articles. These positions are hidden from all locations.
    length : int
        Number of text positions.
    guidance : bool
        True for a denoiser call from which a gradient is computed: each entity's words are then also visible in the
        background. False for a call of the pipeline: end-of-text is then hidden in the background.

    Returns
    -------
    Tensor, (location, text position)
        0 where a location attends to a position, -10,000 where the position is hidden.
    """
    background = ~masks.any(0)
    bias = torch.zeros(masks.shape[1], length)
    bias[:, list(function)] = NEVER
    for mask, entity in zip(masks, prompt.entities, strict=True):
        seen = mask | background if guidance else mask
        for position in (*entity.token_indices, *entity.attribute_indices):
            bias[:, position] = torch.where(seen, 0.0, NEVER)
    if not guidance and (end := end_of_text(prompt)) is not None:
        bias[background, end] = NEVER
    return bias


def hidden_subjects(masks: Tensor) -> Tensor:
    """Bias of self-attention scores that hides the regions of different entities from each other.

    Parameters
    ----------
    masks : Tensor, bool, (entity, location)
        Region of each entity.

    Returns
    -------
    Tensor, (location, location)
        -10,000 if both locations are in regions, but not in the same region; else 0.

    Examples
    --------
    The first location is in the first region, the second location in the second region, and the third in no region. A 1
    marks a pair of locations that are hidden from each other.

    >>> hidden_subjects(torch.tensor([[True, False, False], [False, True, False]])).bool().int().tolist()
    [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    """
    inside = masks.any(0)
    alike = (masks.float().T @ masks.float()) > 0
    return torch.where(inside[:, None] & inside & ~alike, NEVER, 0.0)


def function_words(prompt: Prompt) -> list[int]:
    """Text positions of the function words in a prompt.

    Function words are articles, prepositions, conjunctions, pronouns, numerals, and the words "left", "right", "top"
    and "bottom"; `FUNCTION_WORDS` lists them. A function word that is the noun or an attribute of an entity is left
    out.

    Examples
    --------
    Position 0 is start-of-text, so the prompt's first word "a" has position 1:

    >>> import elakit
    >>> function_words(elakit.parse("a [bear] and a [clock]", elakit.load("picture-world")))  # a, and, a
    [1, 3, 4]
    """
    named = {i for entity in prompt.entities for i in (*entity.token_indices, *entity.attribute_indices)}
    said = [prompt.text[slice(*span)].lower() for span in prompt.words]
    return [t.index for t in prompt.tokens if said[t.word] in FUNCTION_WORDS and t.index not in named]


def clustered(own: Tensor, clusters: int, centers: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Cluster the locations of an image by their self-attention with k-means.

    Parameters
    ----------
    own : Tensor, (location, location)
        Self-attention from each location (row) to all locations. Before the clustering, each column is divided by its
        maximum.
    clusters : int
        Number of clusters.
    centers : ndarray, (cluster, location), or None
        Cluster centers to start from. With None, k-means runs from several starts with fixed seeds, and the result with
        the smallest distances to the cluster centers is kept.

    Returns
    -------
    labels : ndarray, int, (location,)
        Index of each location's cluster.
    centers : ndarray, (cluster, location)
        Centers of the clusters, from which the next clustering can start.
    """
    features = (own / (own.amax(0, keepdim=True) + _SMALL)).double().cpu().numpy()
    if centers is not None and len(centers) == clusters:
        found, labels = kmeans2(features, centers, iter=_ITERATIONS, minit="matrix")
        return labels, found
    trials = [kmeans2(features, clusters, iter=_ITERATIONS, minit="++", seed=start) for start in range(_STARTS)]
    spread = [float(((features - found[labels]) ** 2).sum()) for found, labels in trials]
    found, labels = trials[int(np.argmin(spread))]
    return labels, found


def assigned(labels: np.ndarray, cross: Tensor, last: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Assign clusters of locations to entities; the region of an entity consists of all its clusters.

    A cluster is assigned to the entity with which it has the largest overlap. If this overlap is below 0.2, the cluster
    is assigned to no entity. An entity without a cluster gets the region given by the user. The given region is then
    removed from the regions of the other entities.

    Parameters
    ----------
    labels : ndarray, int, (location,)
        Index of each location's cluster.
    cross : Tensor, (entity, location)
        Attention from each location to the noun of each entity.
    last : ndarray, bool, (entity, y, x)
        Regions found by the previous clustering; at the first clustering, the regions given by the user.
    given : ndarray, bool, (entity, y, x)
        Regions given by the user.

    Returns
    -------
    ndarray, bool, (entity, y, x)
        New region of each entity.

    Notes
    -----
    The overlap of a cluster and an entity is computed in three steps:

    1. The attention A to the entity is sharpened: c = sigmoid(10 (A / max A - 0.2)).
    2. c is scaled linearly to the range from 0 to 1, and set to 0 outside the entity's region in `last`.
    3. The sum of c over the cluster is divided by the smaller of two numbers: the sum of c over all locations, and the
       number of locations in the cluster.
    """
    sharp = torch.sigmoid(_SHARPNESS * (cross / (cross.amax(1, keepdim=True) + _SMALL) - _CROSS))
    low, high = sharp.amin(1, keepdim=True), sharp.amax(1, keepdim=True)
    soft = ((sharp - low) / (high - low + _SMALL)).double().cpu().numpy() * last.reshape(len(last), -1)
    parts = np.stack([labels == one for one in range(labels.max() + 1)])
    least = np.minimum(soft.sum(1)[:, None], parts.sum(1))
    covered = np.divide(soft @ parts.T, least, out=np.zeros_like(least), where=least > 0)
    owner, score = covered.argmax(0), covered.max(0)
    masks = np.stack([(owner == i)[labels] & (score >= _COVERED)[labels] for i in range(len(cross))]).reshape(
        last.shape
    )
    for i, mask in enumerate(masks):
        if not mask.any():
            masks &= ~given[i]
            masks[i] = given[i]
    return masks


def resized(masks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Masks resized to `size`, (rows, columns), by nearest-neighbor interpolation; bool (entity, y, x)."""
    found: np.ndarray = F.interpolate(torch.from_numpy(masks)[None].float(), size=size, mode="nearest-exact")[0].numpy()
    return found > 0.5
