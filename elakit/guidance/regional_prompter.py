"""Regional Prompter with equal columns: each column of the image attends to the text of its own entity alone.

Source: sd-webui-regional-prompter by hako-mikan (github.com/hako-mikan/sd-webui-regional-prompter,
scripts/attention.py), an extension of a Stable Diffusion web UI. This method is the extension's mode "Attention" with
the divide mode "Columns" and columns of equal width (ratios 1,1,...). It has no base prompt (a text for the whole
image), and no common prompt (a text added to the text of every column).

The words of each entity, such as "a red car", are encoded as a separate text. In every cross-attention layer and every
step, the locations of a column attend only to the separate text of one entity. The columns, from left to right, follow
the order of the entities in the prompt. This method is the baseline for `RegionalAttention`; the module
`elakit.guidance.regional_attention` lists the differences between the two.

In this implementation, the denoiser gets the text states of the prompt, followed by the text states of all separate
texts. In the prompt, the states of an entity's words are replaced by the states of these words in the separate text.
The column of an entity attends to the following positions:

- the entity's words in the prompt,
- start-of-text of the prompt, whose state is the same in all texts,
- end-of-text and padding of the entity's separate text.

All other positions are hidden from the column. The attention weights are therefore the same as if the column attended
to the separate text alone. Recordings show each word at its position in the prompt.

Differences from the extension:

- Words of the prompt that belong to no entity are not read. The user of the extension divides the whole prompt by hand.
- The pooled text state of Stable Diffusion XL is that of the whole prompt.
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

    Each column of the image attends only to the words of one entity. The module `elakit.guidance.regional_prompter`
    states the source and all differences from it.

    Parameters
    ----------
    layers, size
        Layers whose maps are read for the trace of a run, and the size of these maps; see
        `elakit.guidance.reading.ReadsOneSize`. Neither option changes the image: the columns act in all layers.

    Examples
    --------
    >>> RegionalPrompter().title
    'Regional Prompter'
    """

    name: ClassVar[str] = "regional-prompter"
    title: ClassVar[str] = "Regional Prompter"

    def encode(self, adapter: Adapter, prompt: Prompt, conditioning: Conditioning) -> Conditioning:
        """Text states of the prompt, followed by the text states of one separate text per entity.

        The separate text of an entity consists of the entity's words alone. In the prompt, the states of an entity's
        words are replaced by the states of these words in the separate text. `conditioning` has the states of a plain
        run.
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
                "RegionalPrompter needs a model that puts padding after the words of a text, which "
                f"{adapter.family} does not. Use another model, or elakit.guidance.RegionalAttention()."
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
        """Return the edit that lets each column of the image attend only to the words of one entity.

        `attention` is not used. `size` is the (height, width) of the maps that are read, in locations.
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
        """Loss for the trace only: squared share of an entity's attention outside its column, averaged over entities.

        The same average over attribute tokens, with the columns of their entities, is added. See
        `elakit.guidance.anchoring.confinement`.
        """
        maps = attention.mean
        ranks = in_order(prompt)
        return confinement(maps, columns((maps.shape[1], maps.shape[2]), len(ranks))[ranks], prompt)


def in_order(prompt: Prompt) -> list[int]:
    """Index of each entity's column, counted from 0 at the left; columns follow the order of nouns in the prompt."""
    firsts = [min(entity.token_indices) for entity in prompt.entities]
    return [sorted(firsts).index(first) for first in firsts]


def columns(size: tuple[int, int], count: int) -> np.ndarray:
    """Masks that divide a map into vertical columns of equal width.

    Borders between columns are rounded down to whole locations.

    Parameters
    ----------
    size : tuple of int
        (height, width) of the map, in locations.
    count : int
        Number of columns, and so of masks.

    Returns
    -------
    ndarray, bool, (count, y, x)
        One mask per column, from left to right.

    Examples
    --------
    A map of 1 x 8 locations in three columns: the borders 8/3 and 16/3 are rounded down to 2 and 5.

    >>> columns((1, 8), 3).astype(int)[:, 0].tolist()
    [[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1]]
    """
    borders = [size[1] * i // count for i in range(count + 1)]
    masks = np.zeros((count, *size), bool)
    for mask, first, past in zip(masks, borders[:-1], borders[1:], strict=True):
        mask[:, first:past] = True
    return masks
