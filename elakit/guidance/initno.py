"""InitNO: look for starting noise in which every entity has attention, and no two share it.

Guo et al., "InitNO: Boosting Text-to-Image Diffusion Models via Initial Noise Optimization", CVPR 2024
(arXiv:2404.04650), and its official code (github.com/xiefan-guo/initno). With A_i the map of entity i at the first
timestep, prepared as in Attend-and-Excite, and R_i the (smoothed) self-attention of the cell where it is strongest:

    cross    = max over i of (1 - max_p A_i)
    conflict = mean over pairs i < j of sum_p min(R_i, R_j) / sum_p (R_i + R_j)

Noise z0 is changed to z = z0 exp(v / 2) + m; Adam moves m and v, from 0, against cross + conflict (cross alone while it
is above 0.5) while the KL divergence of N(m, exp v) from N(0, 1), a mean over elements, stays at 0.001 or less. It is
good enough once cross < 0.2 and conflict < 0.3. Up to 5 rounds of 10 passes start from noise of their own, the first
from the noise given; if none gets there, the start that came nearest is given 50 more. The draws after the first are a
function of the noise given, so that a run depends on its seed alone.
The code goes on to update latents (its example runs so), with the cross term alone at Attend-and-Excite's step sizes
and guided steps, and so does this; ``guided=0`` only chooses the noise.
Other than the code: KL is kept by shrinking m and v, where the code lets the same Adam descend it for as long as it
takes; refinement, at steps 10 and 20 of 50, follows the cross term down to 0.2, where the code also counts the
conflict, because the engine knows one loss a method; terms of the code for a clean background and for maps that stay
are left out.
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
from elakit.guidance.options import check_guided, check_numbers, check_whole
from elakit.guidance.preprocess import GUIDED, REFINED, STEP_SIZE, entity_maps, schedule, smooth
from elakit.guidance.reading import ReadsOneSize
from elakit.prompt import Prompt

_GATE = 0.5  # the conflict counts once cross is not above it
_ADAM_EPS = 1e-3  # the code's; gradients are of that order, so it shortens the steps
_SCALE = 256.0  # of the loss: gradients survive half precision, and a power of two loses no digit


@dataclass(frozen=True)
class InitNO(ReadsOneSize):
    """Initial noise optimization.

    Parameters
    ----------
    learning_rate : float
        Of Adam, 0.01 by the authors.
    rounds : int
        At most so many draws of noise; 5 by the authors.
    iterations : int
        At most so many passes a round; 10 by the authors.
    last_iterations : int
        At most so many passes from the best draw, when no round was good enough; 50 by the authors.
    stop_cross, stop_conflict : float
        Noise with lower scores is good enough; 0.2 and 0.3 by the authors. `stop_cross` also ends refinement.
    max_kl : float
        Divergence from unit noise that is allowed, 0.001 by the authors.
    step_size : float
        Of the first update of the latents, 20 by the authors; it falls as Attend-and-Excite's does.
    guided : float
        Share of the denoising steps that are guided, from the first; 25 of 50 by the authors. 0: noise alone.
    refinements : int
        At most so many further steps at 0.2 and 0.4 of the denoising steps; 20 by the authors.
    layers, size
        What is read; see `elakit.guidance.reading.ReadsOneSize`.

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
    elakit.errors.SettingError: InitNO(rounds=0): must be a whole number of 1 or more.
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
    reads_self: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_numbers(self, "learning_rate", "stop_cross", "stop_conflict", "max_kl", "step_size")
        check_guided(self)
        check_whole(self, "rounds", "iterations", "last_iterations", least=1)
        check_whole(self, "refinements")

    def search(
        self, noise: Tensor, attend: Callable[[Tensor], Attention], prompt: Prompt
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """Noise that is good enough, or the best there was time for.

        Parameters
        ----------
        noise : Tensor, (1, c, h, w), or packed as the pipeline has it (FLUX)
            Of unit variance.
        attend : callable
            Attention of a pass from given noise; gradients flow.
        prompt : Prompt

        Returns
        -------
        found : Tensor, of the same shape
        rows : list of dict
            One a pass: round, iteration, cross, conflict, kl.
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

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """Updates and refinement; nothing where only one entity is named."""
        if len(prompt.entities) < 2:
            return []
        refine = dict.fromkeys(REFINED[1:], self.stop_cross)
        return schedule(len(noise), self.step_size, guided=self.guided, refine=refine, tries=self.refinements)

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: Any) -> Loss:
        """The cross term; "conflict" is only told."""
        cross, conflict = _scores(attention, prompt)
        return Loss(cross, {"excite": float(cross.detach()), "conflict": float(conflict.detach())})

    def _optimize(
        self,
        start: Tensor,
        attend: Callable[[Tensor], Attention],
        prompt: Prompt,
        iterations: int,
        number: int,
        rows: list[dict[str, Any]],
    ) -> tuple[Tensor, float, bool]:
        """One round: the noise it ends with, the score of its last pass, and whether that was good enough."""
        mean, log_variance = (torch.zeros_like(start).requires_grad_(True) for _ in range(2))
        adam = torch.optim.Adam([mean, log_variance], lr=self.learning_rate, eps=_ADAM_EPS)
        score = math.inf
        for iteration in range(iterations):
            trial = start * (log_variance / 2).exp() + mean
            loss, conflict = _scores(attend(trial), prompt)
            one, other = float(loss.detach()), float(conflict.detach())
            kl = float(_divergence(mean, log_variance))
            rows.append({"round": number, "iteration": iteration, "cross": one, "conflict": other, "kl": kl})
            if one < self.stop_cross and other < self.stop_conflict:
                return trial.detach(), one + other, True
            counts = one <= _GATE
            score = one + (other if counts else 1.0)
            grads = torch.autograd.grad((loss + conflict if counts else loss) * _SCALE, (mean, log_variance))
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


def _scores(attention: Attention, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Cross and conflict."""
    entities = entity_maps(attention.mean, prompt)
    cross = (1 - entities.amax((1, 2))).max()
    strongest = entities.flatten(1).argmax(1)
    reach = smooth(attention.own_mean.flatten(0, 1)[strongest])
    first, second = torch.triu_indices(len(reach), len(reach), 1)
    together = (reach[first] + reach[second]).sum((1, 2))
    shared = torch.minimum(reach[first], reach[second]).sum((1, 2)) / torch.where(together > 0, together, 1)
    return cross, shared.sum() / max(1, len(shared))


def _divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of normal noise from unit noise, as a mean over elements."""
    return (mean.detach() ** 2 + log_variance.detach().expm1() - log_variance.detach()).mean() / 2
