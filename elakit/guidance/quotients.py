"""Quotients whose divisor may be zero, with finite gradients.

A word's map can be zero at all locations: if the probabilities are below the smallest float, or if an edit of the
scores removes the word. The sum of such a map is 0. Without this module, a division by the sum gives NaN in the loss
and in the gradient, and the engine then leaves the latent unchanged.

With the functions of this module, the quotient is 0, so that the loss is defined. Such a word has no influence on the
latent, because the gradient of a softmax is 0 at a probability of 0. The other words keep their influence.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NOTHING = 1e-30  # divisors up to this count as 0: the gradients of smaller ones can overflow single precision


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Divide each part by its whole, element by element; the quotient is 0 where the whole is 0.

    A part is at most as large as its whole. Both are nonnegative.

    Examples
    --------
    >>> ratio(torch.tensor([1.0, 0.0]), torch.tensor([4.0, 0.0]))
    tensor([0.2500, 0.0000])
    """
    # The divisor is replaced, not the quotient: a quotient of NaN has a gradient of NaN even if it is not selected.
    return part / torch.where(whole > _NOTHING, whole, 1)


def unit(vectors: Tensor) -> Tensor:
    """Scale each row to length 1; a row of zeros does not change; (n, m) -> (n, m).

    Examples
    --------
    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    return ratio(vectors, vectors.norm(dim=1, keepdim=True))
