"""Edits of attention scores in the pipeline's denoiser calls, and restrictions of words to regions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elakit.attention.hooks import Hooks
from elakit.attention.rescoring import Change, Scores, Site, changeable_layers, rescored
from elakit.attention.running import Watch
from elakit.attention.taps import Attend, tap
from elakit.guidance.method import Attention, ScoreEdit
from elakit.measures.arrays import area_mean
from elakit.models import Adapter, AttentionLayer


class Holder:
    """Hooks that edit attention scores in a run's denoiser calls and store the attention of the latest call.

    The hooks act inside ``with holder():``. `hold` sets the edits, and `attention` returns the stored attention.

    Parameters
    ----------
    adapter : Adapter
    layers : sequence of AttentionLayer
        Layers whose attention is stored. Scores are edited in all layers in which the image attends to the text or to
        itself. Layers of linear self-attention (Sana) have no scores and are not edited.
    images : int
        Number of images in the batch.
    reads_self : bool
        Whether the self-attention of the layers' blocks is stored, too.
    """

    def __init__(
        self,
        adapter: Adapter,
        layers: Sequence[AttentionLayer],
        images: int,
        *,
        reads_self: bool = False,
    ) -> None:
        self.adapter = adapter
        self.layers = layers
        self.beside = adapter.self_layers(layers) if reads_self else ()
        self.changeable = changeable_layers(adapter)
        self.held: list[ScoreEdit | None] = [None] * images
        self._watch = Watch(adapter)
        self._reads = True  # whether passes are read
        self._rows: slice | None = None  # rows of the current pass that see the prompt; None: not read
        self._read: dict[AttentionLayer, Tensor] = {}  # (image, 1, token, y, x), or (image, 1, y, x, y, x)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Context in which attention is read and scores are edited."""

        def change(site: Site, scores: Scores) -> Change | None:
            return self.change(site.image, site, scores)

        try:
            with ExitStack() as stack:
                hooks = stack.enter_context(Hooks())
                stack.enter_context(tap([*self.beside, *self.layers], self._collect))
                stack.enter_context(rescored(self.adapter, self.changeable, change, read=self.layers))
                hooks.before(self.adapter.denoiser, self._before)
                yield
        finally:
            self._watch.close()

    @property
    def seen(self) -> bool:
        """True as soon as the attention of one pass has been read."""
        return bool(self._read)

    def attention(self, image: int) -> Attention:
        """Attention of one image in the latest denoiser call whose attention was stored.

        If scores were edited in this call, the attention is computed from the edited scores. Only the conditional half
        is included. The attention is averaged over heads: the head dimension has length 1.
        """
        cross, own = (tuple(self._read[layer][image] for layer in some) for some in (self.layers, self.beside))
        return Attention(cross, own)

    def hold(self, held: Sequence[ScoreEdit | None], *, read: bool = True) -> None:
        """Set the score edits of the following denoiser calls, and whether attention is read in these calls.

        Parameters
        ----------
        held : sequence of ScoreEdit or None
            One item per image; None for no edit.
        read : bool
            Whether attention is read. Reading takes time.
        """
        self.held = list(held)
        self._reads = read

    def change(self, image: int, site: Site, scores: Scores) -> Change | None:
        """Change of the attention scores of one image in one layer; None for no change.

        `image` is the index of the image in the batch of the run. `site` describes the layer, and ``scores()`` computes
        the scores before the change.
        """
        held = self.held[image]
        return None if held is None else held.change(site, scores)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen = self._watch.read(args, kwargs) if self._reads else None
        self._rows = None if seen is None else seen.rows

    def _collect(self, layer: AttentionLayer, attend: Attend, size: tuple[int, int]) -> None:
        if self._rows is not None:
            # only the mean over heads is needed; all heads of a large model would take gigabytes
            mean = attend(self._rows).detach().mean(1, keepdim=True)
            mean = mean.unflatten(2, size)
            self._read[layer] = mean.unflatten(-1, size) if layer in self.beside else mean.movedim(-1, 2)


def restriction(
    masks: np.ndarray | Callable[[tuple[int, int]], np.ndarray],
    tokens: Sequence[Sequence[int]],
    strength: float,
    *,
    regions: np.ndarray | None = None,
    hidden: Sequence[int] = (),
) -> ScoreEdit:
    """Edit that lowers the attention scores of each entity's words at the locations outside the entity's region.

    The edit acts in all layers that attend to the text.

    Parameters
    ----------
    masks : ndarray, bool, (entity, y, x), or callable
        Region of each entity. An array may have any resolution. An empty mask in an array means that the entity has no
        region and is not restricted. A callable gets the (rows, columns) of a layer's maps and returns masks of this
        size. An empty mask from a callable means that the scores of the entity's words are lowered at every location.
    tokens : sequence of sequence of int
        Token positions of each entity's words.
    strength : float
        Amount subtracted from the scores of an entity's words at locations outside the entity's mask. If a location of
        a layer is only partly outside the mask, the amount is multiplied by the share of the location that is outside.
    regions : ndarray, bool, (entity, y, x), optional
        Regions for the trace. By default they are `masks` if `masks` is an array; otherwise there are none.
    hidden : sequence of int
        Token positions whose scores are lowered by `strength` at every location.

    Returns
    -------
    ScoreEdit

    Examples
    --------
    A map has a left and a right location, and the text has three tokens. The word at position 1 is restricted to the
    left location. The bias has one row per location and one column per token:

    >>> layer = AttentionLayer("attn2", "up", 1, nn.Identity(), nn.Identity(), 1)
    >>> left = restriction(np.array([[[True, False]]]), [(1,)], 4.0)
    >>> left.change(Site(layer, (1, 2), 0, 1.0, 3, text=slice(0, 3)), None).bias
    tensor([[[ 0.,  0.,  0.],
             [ 0., -4.,  0.]]])
    """
    made: dict[tuple[tuple[int, int], int], Tensor | None] = {}

    def bias_of(size: tuple[int, int], positions: int) -> Tensor | None:
        if callable(masks):
            share = torch.from_numpy(masks(size)).float().flatten(1)
            restricted = [True] * len(share)
        else:
            share = torch.from_numpy(area_mean(masks, size)).float().flatten(1)
            restricted = [bool(mask.any()) for mask in masks]
        bias = torch.zeros(size[0] * size[1], positions)
        for words, inside, acts in zip(tokens, share, restricted, strict=True):
            if acts:
                bias[:, list(words)] -= strength * (1 - inside[:, None])
        bias[:, list(hidden)] -= strength
        return bias[None] if bool(bias.any()) else None

    def change(site: Site, scores: Scores) -> Change | None:
        if site.text is None:
            return None
        key = site.size, site.text.stop - site.text.start
        if key not in made:
            made[key] = bias_of(*key)
        bias = made[key]
        return None if bias is None else Change(bias, keys=site.text)

    return ScoreEdit(change, masks if regions is None and isinstance(masks, np.ndarray) else regions)
