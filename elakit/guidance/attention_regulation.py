"""Attention Regulation: optimize the scores of the nouns in each layer, so that each noun gets its share of attention.

Zhang et al., "Enhancing Semantic Fidelity in Text-to-Image Synthesis: Attention Regulation in Diffusion Models", ECCV
2024 (arXiv:2403.06381), and its released code (github.com/YaNgZhAnG-V5/attention_regulation,
attention_regulation/attn_processor.py, and txt2img.py for the settings). In the first 25 of 50 steps, each
cross-attention layer with 16 x 16 maps adds numbers to the scores of the noun tokens k. For each token and head, these
numbers are a sum of Gaussians over the map, with centers c and weights w[c, k]. The sum is called the addend. The
centers form a grid with distance 2 sigma. The standard deviation sigma is a sixteenth of the map's side. The weights
minimize

    L = mean_k (q90(A_k) - 0.9)^2 + 80 mean_k (mean A_k - min(1, 0.2 n) / n)^2 + 0.09 mean w^2

A_k is the map of token k after the softmax of the scores with the addend. q90(A_k) and mean A_k are the 0.9 quantile
and the mean of this map over locations. n is the number of noun tokens. Gradient descent makes 20 iterations with step
size 100, and returns the addend with the least L. At step t, counted from 0, the sum that is added to the scores is

    0.99^t (0.75 addend of this step + 0.25 addend of the previous step)

Start-of-text and end-of-text keep the attention that they have without the addend. The attention of a location to all
tokens therefore no longer sums to 1.

With the same initial weights, the addend equals that of the released code, up to a relative error of 1e-5
(``tests/parity/test_scores.py``).

Intended differences from the released code:

* Weights start at 0.5, so that a run depends on its seed alone. The released code starts from random weights with this
  mean.
* The addend with the least L is chosen for each image. The released code chooses it for the whole batch.
* sigma is at least one location.
* Padding that is hidden from the image (T5 in PixArt) is not part of the softmax in L.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from elakit.attention.rescoring import Change, Scores, Site, check_plain
from elakit.guidance.method import Attention, Loss, ScoreEdit
from elakit.guidance.options import check_acts, check_guided, check_numbers, check_whole, is_number, number, refuse
from elakit.guidance.phrases import end_of_text
from elakit.guidance.reading import EditsFirstSteps, ReadsOneSize
from elakit.models import AttentionLayer
from elakit.prompt import Prompt

_QUANTILE, _GOAL = 0.9, 0.9
_SHARE = 0.2  # of a location's attention, for each target token
_START = 0.5  # mean of the released code's random weights
_SIGMAS = 16  # standard deviations per side of a map


@dataclass
class Addends:
    """State of Attention Regulation for one image: what each layer added to the attention scores at the previous step.

    Attributes
    ----------
    last : dict of str to Tensor, (head, y, x, target)
        Addend that each layer optimized at the previous step, by the layer's name; empty at the first step. The targets
        are the noun tokens.
    """

    last: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AttentionRegulation(EditsFirstSteps, ReadsOneSize):
    """Attention Regulation (Zhang et al., ECCV 2024), for models with cross-attention layers.

    In each layer and denoising step, gradient descent optimizes an addend: numbers that are added to the attention
    scores of the nouns. The module `elakit.guidance.attention_regulation` states the equations and all differences from
    the source.

    Parameters
    ----------
    step_size : float
        Step size of the gradient descent that optimizes the addend of a layer; 100 in the released code.
    iterations : int
        Number of iterations of the gradient descent in each layer and denoising step; 20 in the released code.
    guided : float
        Share of the denoising steps in which scores are changed, beginning with the first step. The released code
        changes scores in the first 25 of 50 steps.
    share_weight : float
        Weight of the loss term that keeps each noun's mean attention near a goal; 80 in the released code.
    weight_cost : float
        Weight of the loss term that penalizes large addends; 0.09 in the released code.
    memory : float
        Weight of the previous step's addend, from 0 to 1; 0.25 in the released code. The addend of the present step has
        the weight ``1 - memory``.
    decay : float
        Number from 0 to 1; 0.99 in the released code. At step t, counted from 0, the weighted sum of the two addends is
        multiplied by ``decay**t``.
    layers, size
        Layers and map size that are regulated; see `elakit.guidance.reading.ReadsOneSize`.

    Raises
    ------
    SettingError
        A setting is outside its range.

    Examples
    --------
    >>> AttentionRegulation().iterations
    20
    >>> AttentionRegulation(memory=2)
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: AttentionRegulation(memory=2): must be a number from 0 to 1.
    """

    step_size: float = 100.0
    iterations: int = 20
    guided: float = 0.5
    share_weight: float = 80.0
    weight_cost: float = 0.09
    memory: float = 0.25
    decay: float = 0.99

    name: ClassVar[str] = "attention-regulation"
    title: ClassVar[str] = "Attention Regulation"

    def __post_init__(self) -> None:
        check_numbers(self, "step_size", "share_weight", "weight_cost")
        check_whole(self, "iterations", least=1)
        check_guided(self)
        for option in ("memory", "decay"):
            if not is_number(number(self, option), most=1):
                refuse(self, option, "a number from 0 to 1")
        if self.iterations == 1:
            check_acts(self, "iterations=1", "step_size", "weight_cost")

    def begin(self, prompt: Prompt, steps: int) -> Addends:
        """Initial state, without addends."""
        return Addends()

    def select(self, layers: Sequence[AttentionLayer], latent: tuple[int, int]) -> tuple[AttentionLayer, ...]:
        """Layers that the options `layers` and `size` select; `latent` is the (height, width) of the latent.

        Raises
        ------
        SettingError
            A selected layer has no plain cross-attention. For example, FLUX has joint attention. Also raised if a
            selected layer is read at the attention call (Sana, HunyuanDiT).
        """
        chosen = super().select(layers, latent)
        check_plain(chosen, "AttentionRegulation")
        return chosen

    def hold(
        self, attention: Attention | None, size: tuple[int, int], prompt: Prompt, step: int, state: Addends
    ) -> ScoreEdit:
        """Return the edit of one image's attention scores in one denoising step.

        In each layer that is read, the edit optimizes numbers, and adds them to the scores of the nouns. `state` keeps
        these numbers for the next step. `attention` and `size` are not used.
        """
        targets = targets_of(prompt)
        end = end_of_text(prompt)
        kept = tuple(at for at in (prompt.start_index, end) if at is not None)
        seen = None if prompt.start_index is not None or end is None else end + 1

        def change(site: Site, scores: Scores) -> Change | None:
            if not site.read:
                return None
            values = scores().detach()
            bumps = gaussians(site.size).to(values)
            if not len(bumps):
                return None
            maps = values[..., :seen].unflatten(1, site.size)
            first = torch.full((len(maps), len(bumps), len(targets)), _START, dtype=maps.dtype, device=maps.device)
            best = self.optimize(maps, targets, bumps, first)
            before = state.last.get(site.layer.name)
            before = torch.einsum("cyx,hck->hyxk", bumps, first) if before is None else before
            state.last[site.layer.name] = best
            bias = torch.zeros_like(values)
            addend = self.memory * before + (1 - self.memory) * best
            bias[..., targets] = self.decay**step * addend.flatten(1, 2)
            return Change(bias, kept)

        return ScoreEdit(change)

    def optimize(self, scores: Tensor, targets: Sequence[int], bumps: Tensor, weights: Tensor) -> Tensor:
        """Optimize an addend by gradient descent, and return the addend of the best iteration.

        An addend is an array of numbers that are added to the attention scores of the target tokens, the noun tokens.
        The best iteration has the least loss ``strength + share_weight * share + weight_cost * square``. Here,
        ``strength`` and ``share`` are the results of `objective`, and ``square`` is the mean square of the Gaussians'
        weights.

        Parameters
        ----------
        scores : Tensor, (head, y, x, key)
            Scores without the addend, before the softmax.
        targets : sequence of int
            Positions of the target tokens among the keys.
        bumps : Tensor, (center, y, x)
            Gaussians, from `gaussians`.
        weights : Tensor, (head, center, target)
            Initial weights of the Gaussians.

        Returns
        -------
        Tensor, (head, y, x, target)
            Addend, the weighted sum of the Gaussians.
        """
        best, least = torch.zeros_like(scores[..., : len(targets)]), float("inf")
        index = torch.tensor(targets, device=scores.device)
        with torch.enable_grad():
            for _ in range(self.iterations):
                weights = weights.detach().requires_grad_(True)
                addend = torch.einsum("cyx,hck->hyxk", bumps, weights)
                maps = scores.index_add(3, index, addend).softmax(-1)[..., targets]
                terms = objective(maps.movedim(-1, 1))
                loss = terms[0] + self.share_weight * terms[1] + self.weight_cost * weights.square().mean()
                if float(loss.detach()) < least:
                    best, least = addend.detach(), float(loss.detach())
                # heads are independent: each descends on its own loss, of which `loss` is the mean
                (slope,) = torch.autograd.grad(loss * len(scores), weights)
                weights = weights - self.step_size * slope
        return best

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: Addends) -> Loss:
        """Loss that the trace stores: the term "strength", plus `share_weight` times the term "share".

        The function `objective` computes both terms from the mean maps of the regulated layers. This loss is not
        optimized; `optimize` has a loss of its own for each layer.
        """
        strength, shares = objective(attention.mean[targets_of(prompt)][None])
        terms = {"strength": strength, "share": shares}
        total = strength + self.share_weight * shares
        return Loss(total, {name: float(term.detach()) for name, term in terms.items()})


def targets_of(prompt: Prompt) -> list[int]:
    """Positions of the nouns' tokens, in the order of the prompt."""
    return sorted({index for entity in prompt.entities for index in entity.token_indices})


def objective(maps: Tensor) -> tuple[Tensor, Tensor]:
    """First two terms of the loss, "strength" and "share", which compare the maps of the target tokens with goals.

    "strength" is the squared difference between a map's 0.9 quantile over locations and the goal 0.9. "share" is the
    squared difference between a map's mean over locations and the goal min(1, 0.2 n) / n, where n is the number of
    target tokens. Both terms are averaged over heads and target tokens.

    Parameters
    ----------
    maps : Tensor, (head, target, y, x)
        Attention probabilities.

    Returns
    -------
    strength, share : Tensor, scalar

    Examples
    --------
    Two maps with the value 0.5 at every location:

    >>> [round(float(term), 4) for term in objective(torch.full((1, 2, 4, 4), 0.5))]  # (.5 - .9)^2, (.5 - .2)^2
    [0.16, 0.09]
    """
    count = maps.shape[1]
    quantiles = torch.quantile(maps.flatten(2), _QUANTILE, dim=-1)
    goal = min(1.0, _SHARE * count) / count
    return (quantiles - _GOAL).square().mean(), (maps.mean((2, 3)) - goal).square().mean()


def gaussians(size: tuple[int, int]) -> Tensor:
    """Gaussians around the centers of a regular grid, each with the value 1 at its center.

    The standard deviation sigma is 1/16 of the map's longer side, rounded down, but at least one location. The row and
    column indices of the centers, counted from 0, are the multiples 2 sigma, 4 sigma and so on that lie inside the map.

    Parameters
    ----------
    size : tuple of int
        (rows, columns) of the map.

    Returns
    -------
    Tensor, (center, y, x)
        Its first dimension has length 0 if the map is too small for a center.

    Examples
    --------
    A 16 x 16 map has 7 x 7 centers. A 4 x 4 map has one center, at row 2 and column 2:

    >>> gaussians((16, 16)).shape, [round(value, 2) for value in gaussians((4, 4))[0, 2].tolist()]
    (torch.Size([49, 16, 16]), [0.14, 0.61, 1.0, 0.61])
    """
    sigma = max(1, max(size) // _SIGMAS)
    rows, columns = (torch.arange(side, dtype=torch.float32) for side in size)
    bumps = [
        torch.exp(-((rows[:, None] - y) ** 2 + (columns - x) ** 2) / (2 * sigma**2))
        for x in range(2 * sigma, size[1], 2 * sigma)
        for y in range(2 * sigma, size[0], 2 * sigma)
    ]
    return torch.stack(bumps) if bumps else torch.zeros(0, *size)
