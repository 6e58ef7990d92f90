"""A witness of attention: what `F.scaled_dot_product_attention` really received, as probabilities in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from elakit.attention import Recording
from elakit.models import AttentionLayer


@dataclass
class Seen:
    """One attention call: the layer, and probabilities of all rows, heads, queries and keys."""

    layer: AttentionLayer
    probabilities: Tensor  # (rows, heads, queries, keys), float64

    def text(self, rows: slice, locations: int, words: int) -> Tensor:
        """Attention of the image's locations to the text, (rows, heads, locations, words)."""
        queries = self.probabilities.shape[-2]
        if self.layer.kind == "cross":
            return self.probabilities[rows]
        first = queries - locations if self.layer.text_first else 0
        columns = slice(0, words) if self.layer.text_first else slice(locations, None)
        return self.probabilities[rows, :, first : first + locations, columns]


class _Watching(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.layer: AttentionLayer | None = None
        self.seen: list[Seen] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.layer is not None:
            names = ("query", "key", "value", "attn_mask")
            given = dict(zip(names, args, strict=False)) | kwargs
            query, key = given["query"].double(), given["key"].double()
            scores = query @ key.transpose(-1, -2) * (given.get("scale") or query.shape[-1] ** -0.5)
            mask = given.get("attn_mask")
            if mask is not None and mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, -torch.inf)
            elif mask is not None:
                scores = scores + mask.double()
            self.seen.append(Seen(self.layer, scores.softmax(-1)))
            self.layer = None  # further calls of the layer are those of an IP-Adapter, or of a perturbed copy
        return func(*args, **kwargs)


@contextmanager
def witness(layers: Sequence[AttentionLayer]) -> Iterator[list[Seen]]:
    """The first attention call of each of these layers, each time it runs inside the block."""
    watching = _Watching()
    handles = []
    for layer in layers:

        def enter(*_: Any, layer: AttentionLayer = layer) -> None:
            watching.layer = layer

        handles.append(layer.module.register_forward_pre_hook(enter))
    try:
        with watching:
            yield watching.seen
    finally:
        for handle in handles:
            handle.remove()


def compare(recording: Recording, seen: Sequence[Seen], *, guided: bool, tolerance: float = 1e-5) -> None:
    """Assert that every recorded probability is what the attention call received.

    ``guided``: a batch of more rows than images is [unconditional, conditional, perturbed...].
    """
    prompt, layers = recording.prompt, recording.layers
    where = {layer: node for node in recording.nodes() for layer in node["layer"].values}
    assert len(seen) == len(recording.steps) * len(layers)
    for at, one in enumerate(seen):
        node = where[one.layer.name].sel(layer=one.layer.name).isel(step=at // len(layers))
        kept = torch.from_numpy(node["probability"].values)  # (images, heads, y, x, tokens)
        images, heads, y, x, _ = kept.shape
        rows = slice(images, 2 * images) if guided and len(one.probabilities) > images else slice(0, images)
        keys = one.probabilities.shape[-1]
        words = keys if one.layer.kind == "cross" else keys - y * x
        truth = one.text(rows, y * x, words).unflatten(2, (y, x))
        if heads == 1:
            truth = truth.mean(1, keepdim=True)
        indices = [int(i) for i in node["token_index"].values if i >= 0]
        torch.testing.assert_close(kept[..., :-1].double(), truth[..., indices], atol=tolerance, rtol=0)
        end = truth[..., list(prompt.end_positions(words))].sum(-1)
        torch.testing.assert_close(kept[..., -1].double(), end, atol=tolerance, rtol=0)
