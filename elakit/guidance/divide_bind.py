"""Divide & Bind: raise the total variation of each entity's attention, and align its attributes' attention with it.

Li, Keuper, Zhang and Khoreva, "Divide & Bind Your Attention for Improved Generative Semantic Nursing", BMVC 2023,
arXiv:2307.10864, and its official code (github.com/boschresearch/Divide-and-Bind), checked against
divide_and_bind/pipeline_divide_and_bind.py, divide_and_bind/pipeline_divide_and_bind_latest.py (a later version of the
same pipeline), utils/ptp_utils.py and utils/test_utils.py.

With the sharpened and smoothed maps A' and the schedule of Attend-and-Excite:

    TV_s = mean |A'_s(y, x+1) - A'_s(y, x)| + mean over y >= 1 of |A'_s(y, x) - A'_s(last row, x)|
    L = max over entities s of (-TV_s + c JSD(P_r, P_s))

where r is the attribute of s and JSD the Jensen-Shannon divergence. The second term of TV is the released code's; the
paper's total variation compares neighboring rows (``variation="repaired"``). A'_r is first scaled to the maximum of
A'_s. With u_s the softmax over space of A'_s, and u_r the softmax over space of the scaled A'_r,

    P_s = ReLU(u_s - q max u_s) + 1e-5,    P_r = ReLU(u_r - q max u_s) + 1e-5,    q = .3 if TV_s < .1, else .2

P is not normalized again. c is 1 from step 0, 5 from step 10 and 10 from step 20 of 50. Attributes are read from the
layers with maps finer than the entities' (64 and 32 rows in Stable Diffusion), subsampled to the entities' size; in a
model without finer maps they are read from the same layers as the entities. The update is repeated at steps 0, 10 and
20 until the smallest TV is at least .05, .2 and .3, at most 50, 20 and 20 times, respectively; one more update follows.

Loss and gradient equal those of the official code to rounding, for both values of `variation`
(``tests/parity/test_losses.py``). The released total variation is 1.2 to 1.4 times the repaired one on blobs and 1.4
to 1.6 times on picture-world's maps; the thresholds of refinement belong to the released one, so with
``variation="repaired"`` they are divided by 1.5.

Intended differences: words of several tokens have the mean of their maps; an entity with several attributes has the
mean of their divergences (the official code takes one attribute per entity); an attribute with almost no attention is
scaled up by at most the noun's maximum / 1e-8; guided steps and refinements are given as shares of the run's steps; a
prompt of fewer than two entities is not guided. The official code has three peculiarities that we take to be mistakes
and do not keep: its refinement compares the TV before its latest update, so it takes one update more than needed; its
later version ignores the given limits of updates, and makes up to 100 updates at step 0 and 50 at the later
refinements; and its gradient passes get latents that have not been through the scheduler's ``scale_model_input``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from elakit.attention.spec import select_layers
from elakit.guidance.method import Attention, Loss, Update
from elakit.guidance.options import check_guided, check_numbers, check_refine, refuse
from elakit.guidance.preprocess import GUIDED, REFINED, STEP_SIZE, Refinement, schedule, smooth, word_softmax
from elakit.guidance.reading import ReadsOneSize
from elakit.guidance.syngen import attribute_words
from elakit.models import AttentionLayer
from elakit.prompt import Prompt

_FAINT = 1e-8
# The thresholds of refinement belong to the released total variation, which is about 1.5 times the repaired one.
_THRESHOLD_SCALE = {"released": 1.0, "repaired": 1.5}


@dataclass(frozen=True)
class DivideAndBind(ReadsOneSize):
    """Divide & Bind (Li et al., BMVC 2023): raise the total variation of each map, and align attributes.

    The module `elakit.guidance.divide_bind` states the equations and all differences from the source.

    Parameters
    ----------
    step_size : float
        Step size alpha at the first step; 20 in the official code. It decreases over the run, from this value at the
        first step to sqrt(1/2) times this value at the last.
    guided : float
        Share of the denoising steps that are guided, from the first; 25 of 50 in the official code.
    binding : sequence of (float, float)
        Weights of the alignment of attributes, each as (share of the steps after which it applies, weight); () for no
        alignment.
    refine : sequence of (float, float, int)
        Refinements, each with three values: the step at which it takes place, as a share of all steps; the total
        variation that every entity's map has to reach, on the scale of the official code; and the largest number of
        additional latent steps. () for none.
    variation : {"released", "repaired"}
        Total variation in the loss: "released" is that of the official code, which compares the last row of the map
        with each row from the second on; "repaired" is that of the paper, which compares neighboring rows. With
        "repaired", the thresholds of `refine` are divided by 1.5, the mean ratio of the two.
    layers, size
        Layers and size of the entities' maps; see `elakit.guidance.reading.ReadsOneSize`. Attributes are read from
        those of `layers` whose maps are finer than the entities' or, if there are none, from the entities' layers.

    Raises
    ------
    SettingError
        A setting is outside its range.

    Examples
    --------
    >>> DivideAndBind().name
    'divide-and-bind'
    >>> DivideAndBind(guided=-0.5)
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: DivideAndBind(guided=-0.5): must be a number from 0 to 1 (a share of the steps).
    """

    step_size: float = STEP_SIZE
    guided: float = GUIDED
    binding: tuple[tuple[float, float], ...] = tuple(zip(REFINED, (1.0, 5.0, 10.0), strict=True))
    refine: tuple[Refinement, ...] = tuple(zip(REFINED, (0.05, 0.2, 0.3), (50, 20, 20), strict=True))
    variation: str = "released"

    name: ClassVar[str] = "divide-and-bind"
    title: ClassVar[str] = "Divide & Bind"

    def __post_init__(self) -> None:
        check_numbers(self, "step_size")
        check_guided(self)
        check_refine(self, "total variation to reach")
        if self.variation not in _THRESHOLD_SCALE:
            refuse(self, "variation", "'released' (the official code's) or 'repaired' (the paper's)")
        rule = (
            "a sequence of (share of the steps from 0 to 1, finite weight of 0 or more), such as ((0.0, 1.0), (0.2, "
            "5.0))"
        )
        try:
            entries = tuple((float(share), float(weight)) for share, weight in self.binding)
        except (TypeError, ValueError):
            refuse(self, "binding", rule)
        if not all(0 <= share <= 1 and 0 <= weight < float("inf") for share, weight in entries):
            refuse(self, "binding", rule)
        object.__setattr__(self, "binding", entries)

    def select(self, layers: Sequence[AttentionLayer], latent: tuple[int, int]) -> tuple[AttentionLayer, ...]:
        """Selected layers of the entities' map size and, unless the option `binding` is empty, of finer maps."""
        entities = super().select(layers, latent)
        finer = entities[0].factor if self.binding else 0
        return tuple(layer for layer in select_layers(layers, self.layers) if layer in entities or layer.factor < finer)

    def begin(self, prompt: Prompt, steps: int) -> int:
        """Number of steps of the run, on which the weight of the binding depends."""
        return steps

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """Updates with decreasing step sizes, and refinements at some steps; no update for a prompt of one entity.

        `noise` holds the ratio of noise to signal before each denoising step; only the number of steps is used.
        """
        if len(prompt.entities) < 2:
            return []
        scale = _THRESHOLD_SCALE[self.variation]
        refine = [(share, -least / scale, most) for share, least, most in self.refine]
        return schedule(len(noise), self.step_size, guided=self.guided, refine=refine)

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: int) -> Loss:
        """Largest loss among the entities.

        Parameters
        ----------
        attention : Attention
        prompt : Prompt
        step : int
            Denoising step, counted from 0.
        state : int
            Number of steps of the run.

        Returns
        -------
        Loss
            Its terms are the unweighted means over entities of "variation" (total variation; smaller is worse) and
            "binding" (divergence of the attributes' maps from the entity's; larger is worse).
        """
        maps, finer = (smooth(word_softmax(mean, prompt.start_index)) for mean in coarse_and_finer(attention.cross))
        entities = torch.stack([maps[list(entity.token_indices)].mean(0) for entity in prompt.entities])
        measure = released_variation if self.variation == "released" else total_variation
        variation = measure(entities)
        unbound = torch.stack([
            _unbound(noun, [finer[word].mean(0) for word in attribute_words(prompt, entity)], 0.3 if low else 0.2)
            for entity, noun, low in zip(prompt.entities, entities, (variation < 0.1).tolist(), strict=True)
        ])  # fmt: skip
        total = (self._weight(step, state) * unbound - variation).amax()
        terms = {"variation": float(variation.detach().mean()), "binding": float(unbound.detach().mean())}
        return Loss(total, terms, goal=-float(variation.detach().amin()))

    def _weight(self, step: int, steps: int) -> float:
        """Weight of the binding at a step; 0 before the first share of steps in `binding`."""
        held = [(share, weight) for share, weight in self.binding if round(share * steps) <= step]
        return max(held)[1] if held else 0.0


def coarse_and_finer(layers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean map of the layers with the smallest maps, and mean map of all other layers, subsampled to the same size.

    Parameters
    ----------
    layers : sequence of Tensor, each (head, token, y, x)

    Returns
    -------
    coarse, finer : Tensor, (token, y, x)
        Means over layers and heads. Both are the same if all layers have maps of one size.

    Examples
    --------
    >>> layer = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    >>> [maps.flatten().tolist() for maps in coarse_and_finer([layer, layer[..., :2] * 10])]
    [[10.0, 20.0], [1.0, 3.0]]
    """
    size = min((tuple(layer.shape[2:]) for layer in layers), key=math.prod)
    coarse = [layer.mean(0) for layer in layers if tuple(layer.shape[2:]) == size]
    finer = [F.interpolate(layer, size, mode="nearest").mean(0) for layer in layers if tuple(layer.shape[2:]) != size]
    mean = torch.stack(coarse).mean(0)
    return mean, torch.stack(finer).mean(0) if finer else mean


def total_variation(maps: Tensor) -> Tensor:
    """Mean absolute difference of neighbors along x, plus the same along y; (n, y, x) -> (n,).

    Examples
    --------
    >>> total_variation(torch.tensor([[[0.0, 1.0, 0.0], [0.0, 1.0, 3.0]]]))  # (1 + 1 + 1 + 2) / 4 + (0 + 0 + 3) / 3
    tensor([2.2500])
    """
    return maps.diff(dim=2).abs().mean((1, 2)) + maps.diff(dim=1).abs().mean((1, 2))


def released_variation(maps: Tensor) -> Tensor:
    """Total variation as in the official code, which compares rows with the last row; (n, y, x) -> (n,).

    It is the mean absolute difference of neighbors along x, plus the mean absolute difference between the last row and
    each row from the second on. The last row, which differs from itself by 0, counts in the second mean.

    Examples
    --------
    >>> released_variation(torch.tensor([[[0.0, 1.0, 0.0], [0.0, 1.0, 3.0], [0.0, 1.0, 0.0]]]))  # 7 / 6 + 3 / 6
    tensor([1.6667])
    """
    return maps.diff(dim=2).abs().mean((1, 2)) + (maps[:, 1:] - maps[:, -1:]).abs().mean((1, 2))


def _unbound(noun: Tensor, attributes: list[Tensor], share: float) -> Tensor:
    """Mean divergence of the attributes' maps from the noun's map, each (y, x); 0 without attributes.

    Each attribute's map is scaled to the maximum of the noun's map. Then each map is replaced by its softmax over
    locations. From each softmax, `share` times the maximum of the noun's softmax is subtracted, and negative results
    become 0. The divergence is that of Jensen and Shannon.
    """
    if not attributes:
        return noun.new_zeros(())
    words = torch.stack(attributes)
    scaled = words * (noun.amax() / words.amax((1, 2), keepdim=True).clamp_min(_FAINT))
    x, y = noun.flatten().softmax(0), scaled.flatten(1).softmax(1)
    p, q = ((spread - share * x.amax()).relu() + 1e-5 for spread in (x, y))
    m = ((p + q) / 2).log()
    return ((p * (p.log() - m) + q * (q.log() - m)).sum(1) / 2).mean()
