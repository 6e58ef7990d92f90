"""Restriction of attention in the denoiser's own passes: words are attended to in their regions only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from elakit.attention import biased
from elakit.attention.hooks import Hooks
from elakit.attention.rescoring import Change, Scores, Site, rescored
from elakit.attention.running import Watch
from elakit.attention.taps import Attend, tap
from elakit.guidance.method import Attention, Hold, Rescore
from elakit.measures.arrays import area_mean
from elakit.models import Adapter, AttentionLayer


class Holder:
    """Restrictions of the images of a run, and the attention of the last pass.

    Parameters
    ----------
    adapter : Adapter
    layers : sequence of AttentionLayer
        Layers whose attention is read; all layers are restricted.
    images : int
        Number of images in the batch.
    reads_self : bool
        Whether the self-attention of the layers' blocks is read, too.
    rescored : sequence of AttentionLayer
        Layers whose scores a `Rescore` changes.
    """

    def __init__(
        self,
        adapter: Adapter,
        layers: Sequence[AttentionLayer],
        images: int,
        *,
        reads_self: bool = False,
        rescored: Sequence[AttentionLayer] = (),
    ) -> None:
        self.adapter = adapter
        self.layers = layers
        self.beside = adapter.self_layers(layers) if reads_self else ()
        self.rescored = rescored
        self.held: list[Hold | Rescore | None] = [None] * images
        self._watch = Watch(adapter)
        self._reads = True  # whether passes are read
        self._rows: slice | None = None  # rows of the current pass that see the prompt; None: not read
        self._read: dict[AttentionLayer, Tensor] = {}  # (image, 1, token, y, x), or (image, 1, y, x, y, x)
        self._made: dict[tuple[tuple[int, int], int], Tensor | None] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Context in which passes are read and restricted."""
        try:
            with ExitStack() as stack:
                hooks = stack.enter_context(Hooks())
                stack.enter_context(tap([*self.beside, *self.layers], self._collect))
                if self.rescored:
                    stack.enter_context(rescored(self.adapter, self.rescored, self._change))
                else:
                    stack.enter_context(biased(self.adapter.pipe, self._bias))
                hooks.before(self.adapter.denoiser, self._before)
                yield
        finally:
            self._watch.close()

    @property
    def seen(self) -> bool:
        """True once a pass has been read."""
        return bool(self._read)

    def attention(self, image: int) -> Attention:
        """Attention of the last pass that saw the prompt, with its restriction."""
        cross, own = (tuple(self._read[layer][image] for layer in some) for some in (self.layers, self.beside))
        return Attention(cross, own)

    def hold(self, held: Sequence[Hold | Rescore | None], *, read: bool = True) -> None:
        """Set the restrictions from the next pass on, and whether passes are read, which takes time."""
        self.held = list(held)
        self._reads = read
        self._made.clear()

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen = self._watch.read(args, kwargs) if self._reads else None
        self._rows = None if seen is None else seen.rows

    def _collect(self, layer: AttentionLayer, attend: Attend, size: tuple[int, int]) -> None:
        if self._rows is not None:
            # only the mean over heads is needed; all heads of a large model would take gigabytes
            mean = attend(self._rows).detach().mean(1, keepdim=True)
            mean = mean.unflatten(2, size)
            self._read[layer] = mean.unflatten(-1, size) if layer in self.beside else mean.movedim(-1, 2)

    def _change(self, site: Site, scores: Scores) -> Change | None:
        held = self.held[site.image]
        return held.change(site, scores) if isinstance(held, Rescore) else None

    def _bias(self, layer: AttentionLayer, size: tuple[int, int], text: int) -> Tensor | None:
        if not any(self.held):
            return None
        if (size, text) not in self._made:
            bias = torch.zeros(len(self.held), size[0] * size[1], text)
            for row, held in zip(bias, self.held, strict=True):
                if isinstance(held, Hold):
                    _push(row, held, size)
            self._made[size, text] = bias if bool(bias.any()) else None
        return self._made[size, text]


def _push(bias: Tensor, held: Hold, size: tuple[int, int]) -> None:
    """Subtract the strength outside the regions; in place, (h*w, text positions)."""
    if callable(held.masks):
        share = torch.from_numpy(held.masks(size)).float().flatten(1)
        restricted = [True] * len(share)
    else:
        share = torch.from_numpy(area_mean(held.masks, size)).float().flatten(1)
        restricted = [bool(mask.any()) for mask in held.masks]
    for positions, inside, acts in zip(held.tokens, share, restricted, strict=True):
        if acts:
            bias[:, list(positions)] -= held.strength * (1 - inside[:, None])
    bias[:, list(held.hidden)] -= held.strength
