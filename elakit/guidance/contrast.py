"""Contrast of attention maps: maps of one entity attract each other, maps of different entities repel each other.

The loss is that of CONFORM (Meral et al., CVPR 2024, arXiv:2312.06059): NT-Xent, the normalized temperature-scaled
cross-entropy. Each entity and its attributes form one class. The members of a class are the maps of all its tokens, in
this pass and in the last pass of the previous step. With s_ij the cosine of maps i and j, and tau the temperature, the
loss is the mean of the following over all ordered pairs (i, p) of two members of the same class:

    -log( exp(s_ip / tau) / (exp(s_ip / tau) + sum over maps n of other classes of exp(s_in / tau)) )
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from elakit.guidance.memory import Memory
from elakit.guidance.preprocess import smooth
from elakit.guidance.quotients import unit
from elakit.prompt import Prompt


def contrast(maps: Tensor, prompt: Prompt, step: int, memory: Memory, temperature: float) -> Tensor:
    """NT-Xent loss over the entities' maps of this step and of the previous one.

    Parameters
    ----------
    maps : Tensor, (token, y, x)
        Attention probabilities; they are smoothed as in Attend-and-Excite.
    prompt : Prompt
    step : int
        Denoising step, counted from 0.
    memory : Memory
        Memory with the maps of the previous step, in which the call stores those of this step.
    temperature : float
        Temperature tau, above 0.

    Returns
    -------
    Tensor, scalar
        0 if there is only one class, or if no class has two members, as at the first step of a prompt whose entities
        have one token each.
    """
    tokens = [[*entity.token_indices, *entity.attribute_indices] for entity in prompt.entities]
    owners = [i for i, members in enumerate(tokens) for _ in members]
    vectors = smooth(maps[[index for members in tokens for index in members]]).flatten(1)
    classes = torch.tensor(owners, device=maps.device)
    before = memory.recall(step, vectors)
    if before is not None:
        vectors, classes = torch.cat([vectors, before]), classes.repeat(2)
    return _nt_xent(vectors, classes, temperature)


def _nt_xent(vectors: Tensor, classes: Tensor, temperature: float) -> Tensor:
    """NT-Xent loss of vectors with class numbers; 0 if there is only one class, or no class has two members."""
    vectors = unit(vectors)
    scores = vectors @ vectors.T / temperature
    same = classes[:, None] == classes
    pairs = same & ~torch.eye(len(classes), dtype=torch.bool, device=classes.device)
    if not pairs.any() or same.all():
        return vectors.new_zeros(())
    rivals = scores.masked_fill(same, -math.inf).logsumexp(1, keepdim=True)
    return F.softplus(rivals - scores)[pairs].mean()
