"""InitNO: a search for initial noise in which every entity has attention and the entities' attention does not overlap.

Guo et al., "InitNO: Boosting Text-to-Image Diffusion Models via Initial Noise Optimization", CVPR 2024
(arXiv:2404.04650), and its official code (github.com/xiefan-guo/initno). A_i is the map of entity i at the first
timestep, sharpened and smoothed as in Attend-and-Excite. R_i is the smoothed self-attention of the location where A_i
is largest. There are three loss terms, with p for locations:

    cross    = max over i of (1 - max_p A_i)
    conflict = mean over pairs i < j of sum_p min(R_i, R_j) / sum_p (R_i + R_j)
    clean    = the entities' attention in the background, see `elakit.guidance.preprocess.clean_background`

*Search.* The initial noise z0 is replaced by z = z0 exp(v / 2) + m, where m and v are 0 at first. Adam changes m and v
to minimize cross + clean + conflict. As long as cross is above 0.5, conflict is left out of this sum. The KL divergence
of N(m, exp v) from N(0, 1), averaged over elements, stays at most 0.001. Noise is accepted if cross < 0.2 and conflict
< 0.3. The search ends as soon as noise is accepted.

The search has at most 5 rounds of at most 10 passes each. The first round starts from the run's noise. Every later
round starts from new random noise. The seed of the new noise is derived from the run's noise, so that a run depends on
its seed alone. If none of these rounds finds accepted noise, one more round of at most 50 passes follows. This last
round starts from the initial noise of the round with the lowest score. The score of a round is cross + conflict at the
last pass of the round. If cross is above 0.5 at that pass, the score is cross + 1.

*Guidance.* As in the example of the official code, the latents then move along the negative gradient of cross. Step
sizes and guided steps are those of Attend-and-Excite. There is a refinement at steps 10 and 20 of 50, counted from 0.
The loss of a refinement is cross + 0.1 clean + 0.1 alignment + conflict. Alignment is the distance of the maps from
their running average (`elakit.guidance.preprocess.RunningMaps`). A refinement ends when cross is at most 0.2 and
conflict at most 0.3. With ``guided=0`` the method only searches for noise.

The terms and their gradients equal those of the official code (``tests/parity/test_losses.py``). For conflict, the
relative difference is at most 5e-7, because the official code adds 1e-6 to the denominator. Two differences are
intended. The KL divergence is kept at its limit by scaling m and v down; the official code takes more steps of Adam
instead. Refinement stops at the pass that meets its goal; the official code takes one more update.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from elakit.guidance.method import Attention, Loss, Update
from elakit.guidance.options import check_acts, check_guided, check_numbers, check_whole
from elakit.guidance.preprocess import (
    GUIDED,
    REFINED,
    STEP_SIZE,
    RunningMaps,
    clean_background,
    entity_maps,
    schedule,
    smooth,
)
from elakit.guidance.quotients import ratio
from elakit.guidance.reading import ReadsOneSize
from elakit.prompt import Prompt

_GATE = 0.5  # the conflict counts once cross is not above this value
_ADAM_EPS = 1e-3  # the official code's; gradients are of that order, so it shortens the steps
_SCALE = 256.0  # factor of the loss: gradients survive half precision, and a power of two loses no digit


@dataclass(frozen=True)
class InitNO(ReadsOneSize):
    """InitNO, initial noise optimization (Guo et al., CVPR 2024): a search for initial noise, followed by guided steps.

    The module `elakit.guidance.initno` states the equations and all differences from the source.

    Parameters
    ----------
    learning_rate : float
        Learning rate of Adam in the search for the noise; 0.01 in the official code.
    rounds : int
        Largest number of rounds of the search, each of which starts from other noise; 5 in the official code.
    iterations : int
        Largest number of passes per round; 10 in the official code.
    last_iterations : int
        Largest number of passes of one more round; 50 in the official code. This round takes place only if no noise
        was accepted before. It starts from the same noise as the best earlier round. The module
        `elakit.guidance.initno` defines the score by which rounds are compared.
    stop_cross : float
        Threshold of the cross term, which is 1 minus the attention of the least attended entity; 0.2 in the official
        code. Noise is accepted if the cross term and the conflict term are both below their thresholds. A refinement
        ends if both terms are at or below their thresholds.
    stop_conflict : float
        Threshold of the conflict term, which measures the overlap of the entities' self-attention; 0.3 in the official
        code.
    max_kl : float
        Largest KL divergence of the noise from the standard normal distribution; 0.001 in the official code.
    step_size : float
        Step size alpha at the first step; 20 in the official code. It decreases over the run, from this value at the
        first step to sqrt(1/2) times this value at the last.
    guided : float
        Share of the denoising steps that are guided, from the first; 25 of 50 in the official code. With 0, the method
        only searches for the noise.
    refinements : int
        Largest number of latent steps per refinement; 20 in the official code. Refinements take place after 20% and
        after 40% of the denoising steps.
    layers, size
        Layers and map size that are read; see `elakit.guidance.reading.ReadsOneSize`.

    Raises
    ------
    SettingError
        A setting is outside its range.

    Examples
    --------
    >>> InitNO().name
    'initno'
    >>> InitNO(rounds=0)
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: InitNO(rounds=0): must be a whole number, 1 or more.
    """

    learning_rate: float = 0.01
    rounds: int = 5
    iterations: int = 10
    last_iterations: int = 50
    stop_cross: float = 0.2
    stop_conflict: float = 0.3
    max_kl: float = 0.001
    step_size: float = STEP_SIZE
    guided: float = GUIDED
    refinements: int = 20

    name: ClassVar[str] = "initno"
    title: ClassVar[str] = "InitNO"
    reads_self: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_numbers(self, "learning_rate", "stop_cross", "stop_conflict", "max_kl", "step_size")
        check_guided(self)
        check_whole(self, "rounds", "iterations", "last_iterations", least=1)
        check_whole(self, "refinements")
        if self.guided == 0:
            check_acts(self, "guided=0", "step_size", "refinements")

    def search(
        self, noise: Tensor, attend: Callable[[Tensor], Attention], prompt: Prompt
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """Search for initial noise that gives every entity attention, with little overlap between entities.

        Noise is accepted if the cross term is below `stop_cross` and the conflict term is below `stop_conflict`. If no
        noise is accepted, the noise with which the last round ends is returned.

        Parameters
        ----------
        noise : Tensor, (1, c, h, w), or packed as the pipeline has it (FLUX)
            Noise of unit variance.
        attend : callable
            ``attend(noise)`` returns the differentiable attention that this noise gives at the first timestep.
        prompt : Prompt

        Returns
        -------
        found : Tensor, of the same shape
            The noise for the run.
        rows : list of dict
            One dictionary per pass. "round" is the number of the round, and "iteration" is the number of the pass
            within the round; both count from 0. "cross", "conflict" and "clean" are the loss terms. "kl" is the KL
            divergence of the noise from the standard normal distribution.
        """
        generator = torch.Generator().manual_seed(zlib.crc32(noise.detach().cpu().float().numpy().tobytes()))
        rows: list[dict[str, Any]] = []
        starts: list[tuple[float, Tensor]] = []
        start = noise
        for number in range(self.rounds):
            found, score, enough = self._optimize(start, attend, prompt, self.iterations, number, rows)
            if enough:
                return found, rows
            starts.append((score, start))
            start = torch.randn(noise.shape, generator=generator).to(noise)
        best = min(starts, key=lambda one: one[0])[1]
        return self._optimize(best, attend, prompt, self.last_iterations, self.rounds, rows)[0], rows

    def begin(self, prompt: Prompt, steps: int) -> RunningMaps:
        """Initial state of one image: a running average of its attention maps, which is still empty.

        The running average is needed for the alignment term of refinement.
        """
        return RunningMaps()

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """Plan one update of the latent per guided step, with decreasing step sizes and at most two refinements.

        A prompt of one entity gets no updates. `noise` holds the ratio of noise to signal before each denoising step;
        only the number of steps is used.
        """
        if len(prompt.entities) < 2:
            return []
        refine = [(share, 1.0, self.refinements) for share in REFINED[1:]]
        return schedule(len(noise), self.step_size, guided=self.guided, refine=refine)

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: RunningMaps) -> Loss:
        """Loss of the guided steps: 1 minus the largest attention of the least attended entity.

        This loss is the cross term; the trace calls it "excite". Refinement follows another loss: cross + conflict +
        0.1 clean + 0.1 alignment. The conflict term is the overlap of the entities' self-attention. The clean term is
        the entities' attention in the background. The alignment term is the distance of the entities' maps from their
        running average. The search for initial noise does not use this method.
        """
        scores = _scores(attention, prompt)
        refinement = scores.cross + 0.1 * scores.clean + 0.1 * state.distance(scores.entities) + scores.conflict
        terms = {"excite": float(scores.cross.detach()), "conflict": float(scores.conflict.detach())}
        # the goal is met where both terms are at most their thresholds
        goal = max(_ratio(terms["excite"], self.stop_cross), _ratio(terms["conflict"], self.stop_conflict))
        terms["clean"] = float(scores.clean.detach())
        return Loss(scores.cross, terms, goal=goal, refinement=refinement)

    def _optimize(
        self,
        start: Tensor,
        attend: Callable[[Tensor], Attention],
        prompt: Prompt,
        iterations: int,
        number: int,
        rows: list[dict[str, Any]],
    ) -> tuple[Tensor, float, bool]:
        """Run one round of the search: change the noise until it is accepted, or until the last pass.

        Parameters
        ----------
        start : Tensor
            Initial noise of the round.
        attend, prompt
            The same as for `search`.
        iterations : int
            Largest number of passes.
        number : int
            Number of the round, counted from 0, which is written to `rows`.
        rows : list of dict
            List to which one dictionary per pass is appended; `search` describes the keys.

        Returns
        -------
        noise : Tensor
            Accepted noise, or else the noise after the last update.
        score : float
            Sum of the cross term and the conflict term at the last pass; lower is better. If noise is not accepted and
            the cross term is above 0.5, the conflict term counts as 1.
        accepted : bool
            Whether the cross term is below `stop_cross` and the conflict term is below `stop_conflict`.
        """
        mean, log_variance = (torch.zeros_like(start).requires_grad_(True) for _ in range(2))
        adam = torch.optim.Adam([mean, log_variance], lr=self.learning_rate, eps=_ADAM_EPS)
        score = math.inf
        for iteration in range(iterations):
            trial = start * (log_variance / 2).exp() + mean
            scores = _scores(attend(trial), prompt)
            row = {name: float(getattr(scores, name).detach()) for name in ("cross", "conflict", "clean")}
            kl = float(_divergence(mean, log_variance))
            rows.append({"round": number, "iteration": iteration, **row, "kl": kl})
            if row["cross"] < self.stop_cross and row["conflict"] < self.stop_conflict:
                return trial.detach(), row["cross"] + row["conflict"], True
            score = row["cross"] + (row["conflict"] if row["cross"] <= _GATE else 1.0)
            grads = torch.autograd.grad(scores.objective() * _SCALE, (mean, log_variance))
            if not all(bool(torch.isfinite(grad).all()) for grad in grads):
                break
            mean.grad, log_variance.grad = (grad / _SCALE for grad in grads)
            adam.step()
            with torch.no_grad():
                while (kl := float(_divergence(mean, log_variance))) > self.max_kl:
                    # Nearly quadratic in both; the margin makes sure that this ends.
                    shrink = 0.999 * math.sqrt(self.max_kl / kl)
                    mean.mul_(shrink)
                    log_variance.mul_(shrink)
        return (start * (log_variance / 2).exp() + mean).detach(), score, False


@dataclass(frozen=True)
class _Scores:
    """Loss terms of InitNO for one pass, each a scalar, and the entities' maps from which they are computed.

    `entities` holds the maps, sharpened and smoothed, (entity, y, x). The other attributes are the loss terms.
    """

    cross: Tensor
    conflict: Tensor
    clean: Tensor
    entities: Tensor

    def objective(self) -> Tensor:
        """Loss that the search minimizes: cross + clean, plus conflict if cross is at most 0.5."""
        total = self.cross + self.clean
        return total + self.conflict if float(self.cross.detach()) <= _GATE else total


def _ratio(value: float, threshold: float) -> float:
    return value / threshold if threshold else math.inf if value else 0.0


def _scores(attention: Attention, prompt: Prompt) -> _Scores:
    """Loss terms of one pass, and the entities' maps, from the attention of this pass."""
    entities = entity_maps(attention.mean, prompt)
    cross = (1 - entities.amax((1, 2))).max()
    strongest = entities.flatten(1).argmax(1)
    reach = smooth(attention.own_mean.flatten(0, 1)[strongest])
    first, second = torch.triu_indices(len(reach), len(reach), 1)
    shared = ratio(torch.minimum(reach[first], reach[second]).sum((1, 2)), (reach[first] + reach[second]).sum((1, 2)))
    conflict = shared.sum() / max(1, len(shared))
    return _Scores(cross=cross, conflict=conflict, clean=clean_background(entities), entities=entities)


def _divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(log_variance)) from N(0, 1), averaged over elements."""
    return (mean.detach() ** 2 + log_variance.detach().expm1() - log_variance.detach()).mean() / 2
