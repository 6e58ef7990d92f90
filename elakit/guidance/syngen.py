"""SynGen: the maps of an attribute and its noun should match each other and differ from the maps of other words.

Rassin, Hirsch, Glickman, Ravfogel, Goldberg and Chechik, "Linguistic Binding in Diffusion Models: Enhancing Attribute
Correspondence through Attention Map Alignment", NeurIPS 2023, arXiv:2306.08877, and its official code
(github.com/RoyiRa/Linguistic-Binding-in-Diffusion-Models, compute_loss.py and syngen_diffusion_pipeline.py).

Each token's map p is normalized to sum 1 over space. The divergence of two maps is D(p, q) = (KL(p||q) + KL(q||p)) / 2.
The loss is

    L = sum over pairs (noun n, attribute m) of  D(m, n) - 1/2 [mean over u of D(n, u) + mean over u of D(m, u)]

where u runs over the prompt's tokens other than the noun and its attributes, function words included. If a noun or an
attribute has several tokens, D is the largest of the divergences of these tokens. In D(n, u) and D(m, u), the largest
divergence is taken for each u separately.

By default, a noun without attributes does not contribute to the loss. With ``lone_nouns``, the noun contributes minus
the mean over u of D(n, u), without the factor 1/2. The step size is 20 in each of the first 25 of 50 steps. There is no
refinement, no smoothing and no softmax over tokens.

The loss and its gradient agree with those of the official code to a relative 5e-7 (``tests/parity/test_losses.py``).

Intended differences:

- The pairs of noun and attribute are those of `elakit.parse`, which also reads brackets in the prompt.
- 1e-9 is added to each map. The official code instead clips distributions at the smallest float.
- A prompt of fewer than two entities is not guided. A prompt without attributes is guided only with ``lone_nouns``.

Three mistakes of the official code are corrected:

- The gradient passes get latents that the scheduler's ``scale_model_input`` has not scaled.
- The pairs of the first prompt are used for all later prompts.
- Only the last image of a batch is kept.
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
        Share of the denoising steps that are guided, beginning with the first step; 25 of 50 in the official code.
    lone_nouns : bool
        Whether nouns without attributes are also separated from other words; False in the paper's main results.
    layers, size
        Layers whose maps are read, and the size of these maps; see `elakit.guidance.reading.ReadsOneSize`.

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
        """One update per guided step, all with the same step size; an empty list for a prompt of one entity.

        If the prompt names no attribute and `lone_nouns` is False, the list is empty, too. `noise` holds the ratio of
        noise to signal before each denoising step; only its length is used.
        """
        paired = self.lone_nouns or any(entity.attribute_indices for entity in prompt.entities)
        if len(prompt.entities) < 2 or not paired:
            return []
        return schedule(len(noise), self.step_size, guided=self.guided, last=1)

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: None) -> Loss:
        """Loss of one image, the sum of the terms "alike" and "unlike".

        "alike" is the divergence between the maps of a noun and of its attribute, summed over all pairs of noun and
        attribute. "unlike" is minus the mean divergence of these maps from the maps of other words, summed over the
        same pairs. With `lone_nouns`, "unlike" also includes nouns without attributes.
        """
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
    """Token positions of an entity's attributes, one list per attribute.

    Examples
    --------
    The attribute "turquoise" has two tokens, at positions 1 and 2; the attribute "old" has one token, at position 3:

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
    """Positions of all tokens of the prompt, except the tokens of an entity's noun and attributes."""
    own = {*entity.token_indices, *entity.attribute_indices}
    return [token.index for token in prompt.tokens if token.index not in own]


def divergence(maps: Tensor) -> Tensor:
    """Symmetrized Kullback-Leibler divergence, in nats, of each pair of maps.

    Each map is first normalized to sum 1. The divergence of two normalized maps p and q is (KL(p||q) + KL(q||p)) / 2.

    Parameters
    ----------
    maps : Tensor, (n, y, x)

    Returns
    -------
    Tensor, (n, n)
        Divergence of each pair of maps; 0 on the diagonal.

    Examples
    --------
    The maps are normalized to (.5, .5) and (.8, .2). Their divergence is (.8 - .5) ln 4 / 2 = .208.

    >>> import torch
    >>> divergence(torch.tensor([[[0.1, 0.1]], [[0.4, 0.1]]])).round(decimals=3)
    tensor([[0.0000, 0.2080],
            [0.2080, 0.0000]])
    """
    flat = maps.flatten(1) + _OFF_ZERO
    p = flat / flat.sum(1, keepdim=True)
    log = p.log()
    return ((p[:, None] - p) * (log[:, None] - log)).sum(-1) / 2


def _apart(between: Tensor, word: list[int], others: list[int]) -> Tensor:
    """Mean divergence of a word from other tokens; 0 if there are no other tokens.

    If the word has several tokens, its divergence from another token is the largest of these tokens' divergences.

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
