"""SynGen: an attribute's attention should match its noun's and differ from that of all other words.

Rassin, Hirsch, Glickman, Ravfogel, Goldberg and Chechik, "Linguistic Binding in Diffusion Models: Enhancing Attribute
Correspondence through Attention Map Alignment", NeurIPS 2023, arXiv:2306.08877, and its official code
(github.com/RoyiRa/Linguistic-Binding-in-Diffusion-Models), checked against its compute_loss.py and
syngen_diffusion_pipeline.py.

With each token's map p normalized to sum 1 over space, and D(p, q) = (KL(p||q) + KL(q||p)) / 2:

    L = sum over pairs (noun n, attribute m) of  D(m, n) - 1/2 [mean over u of D(n, u) + mean over u of D(m, u)]

where u runs over the prompt's tokens other than the noun and its attributes, function words included. If a word has
several tokens, D is the largest of the divergences of its tokens. For D(n, u) and D(m, u) the largest one is taken for
each u, before the mean over u. The step size is 20 over the first 25 of 50 steps. There is no refinement, no smoothing
and no softmax over tokens. A noun without attributes is ignored by default; with ``lone_nouns`` it contributes minus
the mean of D(n, u), without the factor 1/2.

Loss and gradient equal those of the official code to a relative 5e-7 (``tests/parity/test_losses.py``). Intended
differences: the pairs are those of `elakit.parse` (or of the brackets); 1e-9 is added to each map, where the official
code clips distributions at the smallest float; a prompt of fewer than two entities, or without any pair, is not guided.
The official code has three mistakes that are not kept: its gradient passes get latents that have not been through the
scheduler's ``scale_model_input``; it uses the pairs of the first prompt for all later prompts; and it keeps only the
last image of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from elakit.guidance.method import Attention, Loss, Update
from elakit.guidance.options import check_guided, check_numbers, refuse
from elakit.guidance.preprocess import GUIDED, STEP_SIZE, schedule
from elakit.guidance.reading import ReadsOneSize
from elakit.prompt import Entity, Prompt

_OFF_ZERO = 1e-9  # far below any attention that matters; the logarithm of an empty location stays finite


@dataclass(frozen=True)
class SynGen(ReadsOneSize):
    """SynGen (Rassin et al., NeurIPS 2023): align attributes with their nouns, and separate both from other words.

    The module `elakit.guidance.syngen` states the equations and all differences from the source.

    Parameters
    ----------
    step_size : float
        Step size at every guided step; 20 in the official code.
    guided : float
        Share of the denoising steps that are guided, from the first; 25 of 50 in the official code.
    lone_nouns : bool
        Whether nouns without attributes are separated from other words, too; False in the paper's main results.
    layers, size
        Layers and map size that are read; see `elakit.guidance.reading.ReadsOneSize`.

    Raises
    ------
    SettingError
        A setting is outside its range.

    Examples
    --------
    >>> SynGen().name
    'syngen'
    >>> SynGen(step_size=-1)
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: SynGen(step_size=-1): must be a finite number, 0 or more.
    """

    step_size: float = STEP_SIZE
    guided: float = GUIDED
    lone_nouns: bool = False

    name: ClassVar[str] = "syngen"
    title: ClassVar[str] = "SynGen"

    def __post_init__(self) -> None:
        check_numbers(self, "step_size")
        check_guided(self)
        if not isinstance(self.lone_nouns, bool):
            refuse(self, "lone_nouns", "True or False")

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """Updates with equal step sizes; no update for a prompt of one entity.

        Unless `lone_nouns` is True, there is also no update if the prompt names no attribute.
        `noise` holds the ratio of noise to signal before each denoising step; only the number of steps is used.
        """
        paired = self.lone_nouns or any(entity.attribute_indices for entity in prompt.entities)
        if len(prompt.entities) < 2 or not paired:
            return []
        return schedule(len(noise), self.step_size, guided=self.guided, last=1)

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: None) -> Loss:
        """Sum of the terms "alike" (divergence within pairs) and "unlike" (minus the divergence from other words)."""
        tokens = [token.index for token in prompt.tokens]
        at = {index: i for i, index in enumerate(tokens)}
        between = divergence(attention.mean[tokens])
        alike = unlike = between.new_zeros(())
        for entity in prompt.entities:
            noun = [at[i] for i in entity.token_indices]
            rest = [at[i] for i in other_tokens(prompt, entity)]
            attributes = [[at[i] for i in word] for word in attribute_words(prompt, entity)]
            for word in attributes:
                alike = alike + between[word][:, noun].amax()
                unlike = unlike - (_apart(between, noun, rest) + _apart(between, word, rest)) / 2
            if self.lone_nouns and not attributes:
                unlike = unlike - _apart(between, noun, rest)
        return Loss(alike + unlike, {"alike": float(alike.detach()), "unlike": float(unlike.detach())})


def attribute_words(prompt: Prompt, entity: Entity) -> list[list[int]]:
    """Token positions of an entity's attributes, one list per word.

    Examples
    --------
    >>> from elakit.prompt import Token
    >>> tokens = Token(1, "tur", "turquoise/1", 0), Token(2, "quoise", "turquoise/2", 0), Token(3, "old", "old", 1)
    >>> car = Entity("turquoise old car", "car", ("turquoise", "old"), (4,), (1, 2, 3), "car")
    >>> attribute_words(Prompt("turquoise old car", (car,), tokens, 5, 8), car)
    [[1, 2], [3]]
    """
    own = set(entity.attribute_indices)
    words: dict[int, list[int]] = {}
    for token in prompt.tokens:
        if token.index in own:
            words.setdefault(token.word, []).append(token.index)
    return list(words.values())


def other_tokens(prompt: Prompt, entity: Entity) -> list[int]:
    """Positions of the prompt's tokens except those of an entity's noun and attributes."""
    own = {*entity.token_indices, *entity.attribute_indices}
    return [token.index for token in prompt.tokens if token.index not in own]


def divergence(maps: Tensor) -> Tensor:
    """Symmetrized Kullback-Leibler divergence, in nats, of each pair of maps as distributions over space.

    Parameters
    ----------
    maps : Tensor, (n, y, x)

    Returns
    -------
    Tensor, (n, n)

    Examples
    --------
    >>> import torch
    >>> divergence(torch.tensor([[[0.1, 0.1]], [[0.4, 0.1]]])).round(decimals=3)  # (.8 - .5) ln 4 / 2
    tensor([[0.0000, 0.2080],
            [0.2080, 0.0000]])
    """
    flat = maps.flatten(1) + _OFF_ZERO
    p = flat / flat.sum(1, keepdim=True)
    log = p.log()
    return ((p[:, None] - p) * (log[:, None] - log)).sum(-1) / 2


def _apart(between: Tensor, word: list[int], others: list[int]) -> Tensor:
    """Mean divergence of a word from other tokens; 0 without other tokens.

    The divergence from one other token is the largest of those between this token and the tokens of the word.

    Parameters
    ----------
    between : Tensor, (token, token)
        Divergence of each pair of tokens, from `divergence`.
    word : list of int
        Rows of `between` that belong to the tokens of the word.
    others : list of int
        Columns of `between` that belong to the other tokens.
    """
    return between[word][:, others].amax(0).mean() if others else between.new_zeros(())
