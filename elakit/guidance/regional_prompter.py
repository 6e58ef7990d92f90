"""Regional Prompter with equal columns: each column of the image attends to the text of its own entity alone.

hako-mikan, sd-webui-regional-prompter (github.com/hako-mikan/sd-webui-regional-prompter, scripts/attention.py), an
extension of a Stable Diffusion web UI. Its settings here are the mode "Attention", the divide mode "Columns", ratios
1,1,... (columns of equal width), no base prompt (a text for the whole image), and no common prompt (a text added to
that of every column). Each entity's words, "a red car", are encoded on their own. In every cross-attention layer and
every step, the locations of column i attend to text i; columns are counted from the left, and texts in the order of the
prompt. This method is the baseline for `RegionalAttention`; the module `elakit.guidance.regional_attention` lists the
differences between the two.

In this implementation the text states of the prompt are followed by those of all separate texts. The states of each
entity's words in the prompt are replaced by those from the entity's separate text. Column i attends to the words of
entity i in the prompt, to end-of-text and padding of text i after the prompt, and to start-of-text, whose state is the
same in all texts. All other positions are hidden from column i. The attention weights are therefore the same as in an
attention to text i alone, and recordings show each word at its position in the prompt.

Differences from the extension: words of the prompt that belong to no entity are not read, because the prompt is
not divided by hand; Stable Diffusion XL's pooled text state is that of the whole prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from elakit.attention.calls import NEVER
from elakit.errors import SettingError
from elakit.guidance.anchoring import confinement
from elakit.guidance.holding import restriction
from elakit.guidance.method import Attention, Loss, ScoreEdit
from elakit.guidance.phrases import MASKS, STATES, check_text, phrase_positions, phrases, with_text
from elakit.guidance.reading import EditsFirstSteps, ReadsOneSize
from elakit.models import Adapter, Conditioning
from elakit.prompt import Prompt


@dataclass(frozen=True, kw_only=True)
class RegionalPrompter(EditsFirstSteps, ReadsOneSize):
    """Regional Prompter (by hako-mikan) with columns of equal width, for models with cross-attention layers.

    The module `elakit.guidance.regional_prompter` states the source and all differences from it.

    Parameters
    ----------
    layers, size
        Layers and map size that are read for the trace of a run; see `elakit.guidance.reading.ReadsOneSize`. They do
        not change the image: the columns act in all layers.

    Examples
    --------
    >>> RegionalPrompter().title
    'Regional Prompter'
    """

    name: ClassVar[str] = "regional-prompter"
    title: ClassVar[str] = "Regional Prompter"

    def encode(self, adapter: Adapter, prompt: Prompt, conditioning: Conditioning) -> Conditioning:
        """Text states of the prompt, followed by those of one separate text per entity.

        The separate text of an entity consists of the entity's words alone. In the states of the prompt, these words
        have the states that they have in the separate text.
        """
        check_text(adapter, conditioning, "RegionalPrompter")
        if len(conditioning.inputs[STATES][0]) != prompt.length:
            raise SettingError(
                f"RegionalPrompter: the model was given {len(conditioning.inputs[STATES][0])} text positions, and the "
                f"prompt has {prompt.length}. Parse the prompt again for this pipeline: elakit.parse(text, pipe)."
            )
        states, mask = conditioning.inputs[STATES].clone(), conditioning.inputs.get(MASKS)
        texts = phrases(adapter, prompt)
        first = 0 if prompt.start_index is None else prompt.start_index + 1
        if any(phrase.own != tuple(range(first, first + len(phrase.own))) for phrase in texts):
            raise SettingError(
                f"RegionalPrompter needs a model whose texts are padded after their words; {adapter.family} pads "
                "elsewhere. Use another model, or elakit.guidance.RegionalAttention()."
            )
        for phrase in texts:
            states[:, list(phrase.positions)] = phrase.states[:, list(phrase.own)].to(states)
        states = torch.cat([states, *(phrase.states.to(states) for phrase in texts)], dim=1)
        if mask is not None:
            mask = torch.cat([mask, *(phrase.mask.to(mask) for phrase in texts if phrase.mask is not None)], dim=1)
        return with_text(conditioning, states, mask, times=1 + len(texts))

    def hold(
        self, attention: Attention | None, size: tuple[int, int], prompt: Prompt, step: int, state: None
    ) -> ScoreEdit:
        """Return the edit that restricts each column to the text of its entity.

        `attention` is not used; `size` is (rows, columns) of the maps that are read.
        """
        start = prompt.start_index
        first = 0 if start is None else start + 1  # position of a text's first word
        seen: list[tuple[int, ...]] = []
        hidden = set(range(prompt.length * (1 + len(prompt.entities)))) - {start}
        for i, entity in enumerate(prompt.entities, start=1):
            positions = phrase_positions(prompt, entity)
            behind = range(prompt.length * i + first + len(positions), prompt.length * (i + 1))
            seen.append((*positions, *behind))
            hidden.difference_update(seen[-1])
        ranks = in_order(prompt)
        return restriction(
            lambda grid: columns(grid, len(ranks))[ranks], seen, -NEVER,
            regions=columns(size, len(ranks))[ranks], hidden=sorted(hidden),
        )  # fmt: skip

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: None) -> Loss:
        """Squared share of each entity's attention outside its own column, for the trace only; see `confinement`."""
        maps = attention.mean
        ranks = in_order(prompt)
        return confinement(maps, columns((maps.shape[1], maps.shape[2]), len(ranks))[ranks], prompt)


def in_order(prompt: Prompt) -> list[int]:
    """Index of each entity's column, counted from the left; nouns have columns in their order in the prompt."""
    firsts = [min(entity.token_indices) for entity in prompt.entities]
    return [sorted(firsts).index(first) for first in firsts]


def columns(size: tuple[int, int], count: int) -> np.ndarray:
    """Masks that divide a map into columns of equal width, with borders rounded down to whole locations.

    Parameters
    ----------
    size : tuple of int
        (rows, columns) of the map.
    count : int
        Number of columns into which it is divided.

    Returns
    -------
    ndarray, bool, (count, y, x)

    Examples
    --------
    >>> columns((1, 8), 3).astype(int)[:, 0].tolist()
    [[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1]]
    """
    borders = [size[1] * i // count for i in range(count + 1)]
    masks = np.zeros((count, *size), bool)
    for mask, first, past in zip(masks, borders[:-1], borders[1:], strict=True):
        mask[:, first:past] = True
    return masks
