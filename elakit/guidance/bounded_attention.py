"""Bounded Attention: hide subjects from each other in cross- and self-attention, and move them into given regions.

Dahary et al., "Be Yourself: Bounded Attention for Multi-Subject Text-to-Image Generation", ECCV 2024
(arXiv:2403.16990), and its released code (github.com/omer11a/bounded-attention, bounded_attention.py, and run_sd.py for
the settings of Stable Diffusion). In all layers and passes, with M_s the region of subject s:

    cross-attention   the words of s are hidden outside M_s; function words (see `function_words`) are hidden
                      everywhere, and end-of-text is hidden in the background
    self-attention    locations of M_s do not attend to locations of other subjects, in the conditional and the
                      unconditional pass

In the first 15 of 50 steps, M_s is the given region of s, and the latent also moves along the negative raw gradient of

    L = sum_s 1.5 (1 - cross_s)^2 + 0.5 (1 - self_s)^2,    cross_s and self_s = inside / (inside + n background)

at most 5 times per step, with n the number of subjects. The first update at which L / n is at most 0.2 is still made,
and is the last one of its step. The step size falls from 8 toward 2. "inside" is the sum of attention over heads and
the locations of M_s, "background" the sum over heads and the locations of no region. Both are averaged over the layers
of the middle block and of the first upward block with cross-attention. In cross-attention they sum the attention to the
words of s and to end-of-text, in self-attention the attention to the locations of M_s. In the passes from which this
gradient is computed, words are also visible in the background, and end-of-text everywhere.

After the first 15 steps the regions are found in the image: at every fifth step, the mean self-attention of all passes
so far is clustered (three clusters per subject). Let A be the cross-attention of a subject, and c its sharpened form:
sigmoid(10 (A / max A - 0.2)), scaled linearly to the range from 0 to 1, and set to 0 outside the subject's last region.
The overlap of a cluster and the subject is the sum of c over the cluster, divided by the sum of c over all locations or
by the area of the cluster, whichever is smaller. Each cluster is assigned to the subject with the largest overlap if
this overlap is at least 0.2, else to no subject.

On given tensors the loss and the assignment of clusters equal those of the released code
(``tests/parity/test_scores.py``).

Intended differences: k-means has 10 starts with fixed seeds and 20 iterations (100 random starts in the released code);
the words that are hidden everywhere come from a list instead of a part-of-speech tagger; L / n is compared with 0.2 for
each image, not for a batch. Settings for Stable Diffusion XL in the released code: step sizes 18 and 5, layers of the
first upward block.
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
    """State of Bounded Attention for one image.

    Attributes
    ----------
    steps : int
        Denoising steps of the run.
    masks : ndarray, bool, (entity, y, x), or None
        Regions found by clustering; None as long as the given regions are used.
    cross : Tensor, (entity, location), or None
        Cross-attention of the last token of each noun, mean over passes and layers; None before the first pass.
    own : Tensor, (location, location), or None
        Self-attention, mean over passes and layers; None before the first pass.
    passes : int
        Number of passes in `cross` and `own`.
    size : tuple of int
        (rows, columns) of the maps in `cross` and `own`.
    centers : ndarray or None
        Centers of the last clustering, from which the next one starts.
    """

    steps: int
    masks: np.ndarray | None = None
    cross: Tensor | None = None
    own: Tensor | None = None
    passes: int = 0
    size: tuple[int, int] = (0, 0)
    centers: np.ndarray | None = None

    def add(self, attention: Attention, nouns: Sequence[int]) -> None:
        """Include the attention of one more pass in the means; `nouns` has one text position per entity.

        Only those layers of the pass are used that have the largest maps.
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
    """Bounded Attention (Dahary et al., ECCV 2024), with given regions, for models with cross-attention layers.

    The module `elakit.guidance.bounded_attention` states the equations and all differences from the source.

    Parameters
    ----------
    regions : sequence of (left, top, right, bottom), or ndarray, bool, (entity, y, x)
        One region per entity, in the order of the prompt: boxes as fractions of the image, or masks. If they leave no
        background, the loss is 0: attention is bounded, and the latent does not move.
    step_size : float
        Step size at the first guided step; 8 in the released code for Stable Diffusion.
    last_step_size : float
        Value toward which the step size changes linearly; it would be reached one step after the last guided step. 2 in
        the released code for Stable Diffusion.
    guided : float
        Share of the denoising steps in which the latent moves, from the first; 15 of 50 in the released code. In later
        steps the regions are found by clustering the attention of the image.
    iterations : int
        Largest number of updates per step; 5 in the released code.
    until : float
        Threshold of the loss per entity: the first update at which the loss is at or below it is still made, and is the
        last one of its step; 0.2 in the released code.
    cross : float
        Weight of cross-attention in the loss; 1.5 in the released code.
    own : float
        Weight of self-attention in the loss; 0.5 in the released code.
    clusters : int
        Number of clusters per entity from which regions are found after the guided steps; 3 in the released code.
    layers : str, optional
        Layers that the loss reads: "up", "down", "mid", "all" or a glob on layer names such as "up_blocks.1.*". By
        default the middle block and the first upward block with cross-attention (all layers of PixArt). Attention is
        bounded in all layers.

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
        """Layers that the option `layers` selects; by default those of the middle and the first upward block.

        Raises
        ------
        SettingError
            The model has layers that are not plain cross-attention, such as joint attention (FLUX), or that are read at
            the attention call (Sana, HunyuanDiT).
        """
        check_plain(layers, "BoundedAttention")
        return super().select(layers, latent)

    def begin(self, prompt: Prompt, steps: int) -> Bounds:
        """Initial state, in which the given regions are used."""
        return Bounds(steps)

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """Updates that edit scores in all steps, and also move the latent in a share `guided` of them, from the first.

        There is no update if the prompt names only one entity. `noise` holds the ratio of noise to signal before each
        denoising step; only the number of steps is used.
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
        """Return the edit that keeps attention in the given regions or, after the guided steps, in clusters.

        `attention` is that of the previous denoiser call, None before the first one; `size` is (rows, columns) of the
        maps that are read.
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
        """Loss L; the trace stores its terms "cross" and "self" as means over entities, without weights."""
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
        """Given regions at the size of a layer's maps; bool (entity, y, x).

        `layer` is the attention of the layer, (..., y, x); `count` is the number of entities.
        """
        masks = layout_masks(self.regions, (layer.shape[-2], layer.shape[-1]), count)
        return torch.from_numpy(masks).to(layer.device)

    def _refine(self, state: Bounds) -> None:
        """Replace the regions of the state by regions clustered from the attention of the passes so far."""
        assert state.cross is not None
        assert state.own is not None
        count = len(state.cross)
        given = layout_masks(self.regions, state.size, count)
        labels, state.centers = clustered(state.own, min(self.clusters * count, len(state.own)), state.centers)
        state.masks = assigned(labels, state.cross, given if state.masks is None else state.masks, given)


def shares(seen: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of attention over heads and locations: inside each entity's region, and in the background; each (entity,).

    `seen` is the attention to each entity, (entity, head, y, x); `masks` are the regions, bool (entity, y, x).
    """
    background = ~masks.any(0)
    inside = (seen * masks[:, None]).sum((1, 2, 3))
    return inside, (seen * background).sum((1, 2, 3))


def _beside(layers: Sequence[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """Mean over entities of (1 - inside / (inside + count * background))^2; an entity without attention counts as 1.

    `layers` has a pair (inside, background) per layer, each (entity,), from `shares`; the formula uses their means over
    layers. `count` is the number of entities.
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
    function : sequence of int
        Positions that are hidden everywhere.
    length : int
        Number of text positions.
    guidance : bool
        Whether the bias is for a pass from which the gradient is computed. In such a pass words are visible in the
        background, too. In the other passes, end-of-text is hidden in the background.

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
    """Bias of self-attention scores, (location, location), that hides regions of different subjects from each other.

    It is -10,000 for two locations in regions of different subjects, else 0.

    Examples
    --------
    >>> hidden_subjects(torch.tensor([[True, False, False], [False, True, False]])).bool().int().tolist()
    [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    """
    inside = masks.any(0)
    alike = (masks.float().T @ masks.float()) > 0
    return torch.where(inside[:, None] & inside & ~alike, NEVER, 0.0)


def function_words(prompt: Prompt) -> list[int]:
    """Positions of the tokens of function words, which are listed in `FUNCTION_WORDS`.

    They are articles, prepositions, conjunctions, pronouns, numerals, and the words "left", "right", "top" and
    "bottom". A function word that is the noun or an attribute of an entity is left out.

    Examples
    --------
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
        Self-attention from each location (row) to all. The function divides each column by its maximum first.
    clusters : int
        Number of clusters.
    centers : ndarray, (cluster, location), or None
        Centers to start from; None for several starts with fixed seeds, of which the best is kept.

    Returns
    -------
    labels : ndarray, int, (location,)
        Cluster of each location.
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
    """Assign each cluster to an entity, and return the region of each entity: all its clusters together.

    Let A be the cross-attention of an entity, and c its sharpened form: sigmoid(10 (A / max A - 0.2)), scaled linearly
    to the range from 0 to 1, and set to 0 outside the entity's region in `last`. The overlap of a cluster and the
    entity is the sum of c over the cluster, divided by the sum of c over all locations or by the number of locations in
    the cluster, whichever is smaller. A cluster is assigned to the entity with the largest overlap if this overlap is
    at least 0.2, else to no entity. An entity without a cluster gets its given region, which is removed from the other
    regions.

    Parameters
    ----------
    labels : ndarray, int, (location,)
        Cluster of each location.
    cross : Tensor, (entity, location)
        Cross-attention of the nouns.
    last, given : ndarray, bool, (entity, y, x)
        Regions of the previous clustering (at first the given ones), and the regions given by the user.

    Returns
    -------
    ndarray, bool, (entity, y, x)
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
    """Masks at another size, by nearest neighbor."""
    found: np.ndarray = F.interpolate(torch.from_numpy(masks)[None].float(), size=size, mode="nearest-exact")[0].numpy()
    return found > 0.5
