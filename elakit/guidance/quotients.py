"""Quotients whose divisor may be zero, with finite gradients.

The map of a word is zero at all locations if its probabilities there are below the smallest float, or if an edit of the
scores removes the word. Dividing such a map by its sum gives NaN, in the loss and in its gradient, and the engine then
leaves the latent unchanged. With the functions of this module, the loss of every method is defined for such a word: the
quotient is 0. The word itself has no influence on the latent, because the gradient of a softmax is 0 at a probability
of 0; the other words still have theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NOTHING = 1e-30  # divisors up to this count as 0: the gradients of smaller ones can overflow single precision


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Quotient of a part and the whole that contains it, neither of them negative; 0 where the whole is 0.

    Examples
    --------
    >>> ratio(torch.tensor([1.0, 0.0]), torch.tensor([4.0, 0.0]))
    tensor([0.2500, 0.0000])
    """
    # The divisor is replaced, not the quotient: a quotient of NaN has a gradient of NaN even if it is not selected.
    return part / torch.where(whole > _NOTHING, whole, 1)


def unit(vectors: Tensor) -> Tensor:
    """Vectors scaled to length 1; a vector of zeros does not change; (n, m) -> (n, m).

    Examples
    --------
    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    return ratio(vectors, vectors.norm(dim=1, keepdim=True))
