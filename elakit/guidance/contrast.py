"""Contrast of attention maps: maps of one entity attract each other, maps of different entities repel each other.

The loss is that of CONFORM (Meral et al., CVPR 2024, arXiv:2312.06059): NT-Xent, the normalized temperature-scaled
cross-entropy. Each entity forms one class, together with its attributes. The members of the class are the maps of all
tokens of the entity's noun and attributes: in this denoiser call, and in the last call of the previous step.

Let s_ij be the cosine similarity of maps i and j, and tau the temperature. For two members i and p of the same class,
let

    l(i, p) = -log( exp(s_ip / tau) / (exp(s_ip / tau) + sum over n of exp(s_in / tau)) )

where n runs over the maps of all other classes. The loss is the mean of l(i, p) over all ordered pairs (i, p).
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
    """Contrastive loss (NT-Xent) on the entities' maps of this step and of the previous step.

    The maps of an entity and its attributes form one class. The loss is small if maps of the same class are similar,
    and maps of different classes are not.

    Parameters
    ----------
    maps : Tensor, (token, y, x)
        Attention probabilities of all text positions; the function smooths them as in Attend-and-Excite.
    prompt : Prompt
    step : int
        Denoising step, counted from 0.
    memory : Memory
        Memory with the maps of the previous step. The function also stores the maps of this step in the memory.
    temperature : float
        Temperature tau, above 0, by which the similarities of maps are divided.

    Returns
    -------
    Tensor, scalar
        0 if there is only one class, or if every class has only one map. At the first step, a class has only one map
        if its entity is a single token without attributes.
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
    """Contrastive loss (NT-Xent): small if vectors of the same class are similar, and vectors of other classes are not.

    `vectors` is (n, m); `classes` has the class number of each vector, (n,). The loss is 0 if there is only one class,
    or if every class has only one vector.
    """
    vectors = unit(vectors)
    scores = vectors @ vectors.T / temperature
    same = classes[:, None] == classes
    pairs = same & ~torch.eye(len(classes), dtype=torch.bool, device=classes.device)
    if not pairs.any() or same.all():
        return vectors.new_zeros(())
    rivals = scores.masked_fill(same, -math.inf).logsumexp(1, keepdim=True)
    return F.softplus(rivals - scores)[pairs].mean()
