"""SynGen: an attribute's attention is to be like its noun's, and both unlike that of all other words.

Rassin, Hirsch, Glickman, Ravfogel, Goldberg and Chechik, "Linguistic Binding in Diffusion Models: Enhancing Attribute
Correspondence through Attention Map Alignment", NeurIPS 2023, arXiv:2306.08877, and its official code
(github.com/RoyiRa/Linguistic-Binding-in-Diffusion-Models), checked against its compute_loss.py and
syngen_diffusion_pipeline.py.

With each token's map p brought to a sum of 1 over space, and D(p, q) = (KL(p||q) + KL(q||p)) / 2:

    L = sum over pairs (noun n, attribute m) of  D(m, n) - 1/2 [mean over u of D(n, u) + mean over u of D(m, u)]

u being the prompt's tokens other than the noun and its attributes, function words included. Of words of several tokens
each divergence is that of the least alike piece, before the mean over u. Step 20 over the first 25 of 50 steps, no
refinement, no smoothing, no softmax over tokens. A noun without attributes takes no part unless asked to, and then
loses the whole mean of D(n, u), with a minus.

Decided here: the pairs are those that `elakit.parse` reads (or the brackets say), not a parse of our own; maps are kept
off zero by 1e-9 (their code clips distributions at the least float); a prompt of fewer than two entities, or without
any pair, is left alone. Mistakes of their code that are not kept: gradient passes get latents that have not been
through the scheduler's ``scale_model_input``; the first prompt's pairs serve all later ones; of a batch only the last
image is kept.
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

_OFF_ZERO = 1e-9  # far below any attention that matters; the logarithm of an empty cell stays finite


@dataclass(frozen=True)
class SynGen(ReadsOneSize):
    """SynGen, syntax-guided generation.

    Parameters
    ----------
    step_size : float
        Of every guided step, 20.
    guided : float
        Share of the denoising steps that are guided, from the first; .5.
    lone_nouns : bool
        Whether nouns without attributes are driven from the other words too; they are not in the paper's main results.
    layers, size
        What is read; see `elakit.guidance.reading.ReadsOneSize`.

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
    elakit.errors.SettingError: SynGen(step_size=-1): must be a number of zero or more.
    """

    step_size: float = STEP_SIZE
    guided: float = GUIDED
    lone_nouns: bool = False

    name: ClassVar[str] = "syngen"

    def __post_init__(self) -> None:
        check_numbers(self, "step_size")
        check_guided(self)
        if not isinstance(self.lone_nouns, bool):
            refuse(self, "lone_nouns", "True or False")

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """Equal steps; nothing where only one entity is named, or none has attributes."""
        paired = self.lone_nouns or any(entity.attribute_indices for entity in prompt.entities)
        if len(prompt.entities) < 2 or not paired:
            return []
        return schedule(len(noise), self.step_size, guided=self.guided, last=1)

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: None) -> Loss:
        """The sum over pairs; its terms are "alike", of a noun and its attributes, and "unlike", of all else."""
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
    """Token positions of an entity's attributes, word by word.

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
    """Positions of the prompt's tokens that stand neither for an entity's noun nor for its attributes."""
    own = {*entity.token_indices, *entity.attribute_indices}
    return [token.index for token in prompt.tokens if token.index not in own]


def divergence(maps: Tensor) -> Tensor:
    """Symmetrized Kullback-Leibler divergence of every two maps, each as a distribution over space.

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
    """Mean over other tokens of how far a word's least alike piece is from each; 0 where the prompt has no others."""
    return between[word][:, others].amax(0).mean() if others else between.new_zeros(())
