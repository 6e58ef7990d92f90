"""Divide & Bind: raise the total variation of the entities' maps, and align each attribute's map with its entity's map.

Li, Keuper, Zhang and Khoreva, "Divide & Bind Your Attention for Improved Generative Semantic Nursing", BMVC 2023,
arXiv:2307.10864, and its official code (github.com/boschresearch/Divide-and-Bind), checked against
divide_and_bind/pipeline_divide_and_bind.py, divide_and_bind/pipeline_divide_and_bind_latest.py (a later version of the
same pipeline), utils/ptp_utils.py and utils/test_utils.py.

Let A'_s be the map of entity s, and A'_r the map of the entity's attribute r, both sharpened and smoothed as in
Attend-and-Excite. The loss L combines the total variation TV_s of the entity's map with the Jensen-Shannon divergence
(JSD) between the two maps:

    TV_s = mean |A'_s(y, x+1) - A'_s(y, x)| + mean over y >= 1 of |A'_s(y, x) - A'_s(last row, x)|
    L = max over entities s of (-TV_s + c JSD(P_r, P_s))

The second term of TV_s is that of the released code. In the paper, this term compares neighboring rows
(``variation="repaired"``). For the divergence, A'_r is first scaled to the maximum of A'_s. Let u_s be the softmax of
A'_s over locations, and u_r the softmax of the scaled A'_r over locations. Then:

    P_s = ReLU(u_s - q max u_s) + 1e-5,    P_r = ReLU(u_r - q max u_s) + 1e-5,    q = .3 if TV_s < .1, else .2

P_s and P_r are not normalized again. The weight c is 1 from step 0, 5 from step 10 and 10 from step 20 of 50.

As in Attend-and-Excite, the first 25 of 50 steps are guided, and the step size falls from 20 at step 0 to 20 sqrt(1/2)
at the last step of the run. At three steps, the update is repeated until the total variation of every entity reaches a
goal, or until a largest number of updates; one more update follows:

- step 0: goal .05, at most 50 updates;
- step 10: goal .2, at most 20 updates;
- step 20: goal .3, at most 20 updates.

Attributes are read from layers with finer maps than the entities: 64 and 32 rows in Stable Diffusion. These maps are
subsampled to the size of the entities' maps. In a model without finer maps, attributes are read from the same layers as
the entities.

Loss and gradient equal those of the official code to rounding, for both values of `variation`
(``tests/parity/test_losses.py``). The released total variation is larger than the repaired total variation: 1.2 to 1.4
times on blobs, and 1.4 to 1.6 times on picture-world's maps. The goals above belong to the released total variation.
With ``variation="repaired"``, they are divided by 1.5.

Intended differences:

- The map of a word of several tokens is the mean of the tokens' maps.
- The divergence of an entity with several attributes is the mean over the attributes. The official code takes one
  attribute per entity.
- An attribute with almost no attention is scaled up by a factor of at most 1e8 times the maximum of A'_s.
- Guided steps and refinements are given as shares of the run's steps.
- A prompt of fewer than two entities is not guided.

The official code has three peculiarities that we take to be mistakes and do not keep:

- Its refinement compares the goal with the total variation before the latest update, so that it makes one update more
  than needed.
- Its later version ignores the given limits of updates. It makes up to 100 updates at step 0, and up to 50 at each
  later refinement.
- Its gradient passes get latents that have not been through the scheduler's ``scale_model_input``.
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
    """Divide & Bind (Li et al., BMVC 2023): raise the total variation of entities' maps, and align attributes.

    Each attribute's map is aligned with the map of its entity. The module `elakit.guidance.divide_bind` states the
    equations and all differences from the source.

    Parameters
    ----------
    step_size : float
        Step size alpha at the first step; 20 in the official code. The step size decreases over the run, to sqrt(1/2)
        times this value at the last step.
    guided : float
        Share of the denoising steps that are guided, beginning with the first step; 25 of 50 in the official code.
    binding : sequence of (float, float)
        Weights of the alignment of attributes in the loss, as pairs (start, weight), with the start as a share of the
        steps. Each weight applies until the next start. () for no alignment.
    refine : sequence of (float, float, int)
        Refinements, each with three values: the step of the refinement, as a share of all steps; the total variation
        that every entity's map has to reach; and the largest number of additional latent steps. () for no refinement.
    variation : {"released", "repaired"}
        Formula of the total variation. "released" is the formula of the official code, which compares the last row of
        the map with each row from the second on. "repaired" is the formula of the paper, which compares neighboring
        rows. With "repaired", the total variations in `refine` are divided by 1.5, the mean ratio of the two formulas.
    layers, size
        Layers and map size from which entities are read; see `elakit.guidance.reading.ReadsOneSize`. Attributes are
        read from the layers with finer maps among `layers`. If no layer has finer maps, attributes are read from the
        same layers as entities.

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
            refuse(self, "variation", "'released' (as in the official code) or 'repaired' (as in the paper)")
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
        """Select the layers that are read, according to the method's options `layers`, `size` and `binding`.

        Entities are read from layers with maps of one size. Attributes are read from layers with finer maps, which are
        selected only if `binding` is not empty. The argument `layers` has all cross-attention layers of the model.
        `latent` is the (height, width) of the latent.
        """
        entities = super().select(layers, latent)
        finer = entities[0].factor if self.binding else 0
        return tuple(layer for layer in select_layers(layers, self.layers) if layer in entities or layer.factor < finer)

    def begin(self, prompt: Prompt, steps: int) -> int:
        """State of the method: the number of steps of the run, from which the starts in `binding` are computed."""
        return steps

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """One update per guided step, with decreasing step sizes; an empty list for a prompt of one entity.

        At the steps that the option `refine` lists, the update includes a refinement. `noise` holds the ratio of noise
        to signal before each denoising step; only its length is used.
        """
        if len(prompt.entities) < 2:
            return []
        scale = _THRESHOLD_SCALE[self.variation]
        refine = [(share, -least / scale, most) for share, least, most in self.refine]
        return schedule(len(noise), self.step_size, guided=self.guided, refine=refine)

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: int) -> Loss:
        """Loss of the entity with the largest loss.

        The loss of an entity is the weighted divergence of its attributes' maps from its own map, minus the total
        variation of its own map.

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
            The total is the largest loss of an entity. The terms are means over entities, without weights: "variation"
            is the total variation (smaller is worse), "binding" is the divergence (larger is worse).
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
        """Weight of the attributes' divergence in the loss at a denoising step.

        The option `binding` has pairs (start, weight). The weight with the latest start that has been reached applies;
        before the first start, the weight is 0. `step` counts from 0; `steps` is the number of steps of the run.
        """
        held = [(share, weight) for share, weight in self.binding if round(share * steps) <= step]
        return max(held)[1] if held else 0.0


def coarse_and_finer(layers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Average the layers with the smallest maps, and average all other layers separately.

    Parameters
    ----------
    layers : sequence of Tensor, each (head, token, y, x)
        Maps of each layer.

    Returns
    -------
    coarse : Tensor, (token, y, x)
        Mean over heads and over the layers with the smallest maps.
    finer : Tensor, (token, y, x)
        Mean over heads and over all other layers, each subsampled to the size of `coarse`. If there are no other
        layers, `finer` equals `coarse`.

    Examples
    --------
    The first layer has the larger maps. Every second location of these maps is kept:

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
    """Total variation of each map; (n, y, x) -> (n,).

    It is the mean absolute difference of neighbors along x, plus the mean absolute difference of neighbors along y.

    Examples
    --------
    >>> total_variation(torch.tensor([[[0.0, 1.0, 0.0], [0.0, 1.0, 3.0]]]))  # (1 + 1 + 1 + 2) / 4 + (0 + 0 + 3) / 3
    tensor([2.2500])
    """
    return maps.diff(dim=2).abs().mean((1, 2)) + maps.diff(dim=1).abs().mean((1, 2))


def released_variation(maps: Tensor) -> Tensor:
    """Total variation as in the official code, which compares rows with the last row; (n, y, x) -> (n,).

    It is the sum of two means. The first is the mean absolute difference of neighbors along x. The second is the mean
    absolute difference between the last row and each row from the second on. The last row itself counts in the second
    mean, with a difference of 0.

    Examples
    --------
    >>> released_variation(torch.tensor([[[0.0, 1.0, 0.0], [0.0, 1.0, 3.0], [0.0, 1.0, 0.0]]]))  # 7 / 6 + 3 / 6
    tensor([1.6667])
    """
    return maps.diff(dim=2).abs().mean((1, 2)) + (maps[:, 1:] - maps[:, -1:]).abs().mean((1, 2))


def _unbound(noun: Tensor, attributes: list[Tensor], share: float) -> Tensor:
    """Mean Jensen-Shannon divergence between the noun's map and each attribute's map; 0 without attributes.

    All maps have shape (y, x), and they are prepared before they are compared. Each attribute's map is first scaled to
    the maximum of the noun's map. The noun's map and the scaled maps are then replaced by their softmax over locations.
    From each softmax, `share` times the maximum of the noun's softmax is subtracted. Negative results become 0.
    """
    if not attributes:
        return noun.new_zeros(())
    words = torch.stack(attributes)
    scaled = words * (noun.amax() / words.amax((1, 2), keepdim=True).clamp_min(_FAINT))
    x, y = noun.flatten().softmax(0), scaled.flatten(1).softmax(1)
    p, q = ((spread - share * x.amax()).relu() + 1e-5 for spread in (x, y))
    m = ((p + q) / 2).log()
    return ((p * (p.log() - m) + q * (q.log() - m)).sum(1) / 2).mean()
