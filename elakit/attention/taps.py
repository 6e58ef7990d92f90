"""Reading what attention layers compute, by hooks alone: no processor is replaced, nothing is computed twice.

A tap hands over the queries and keys as the layer's own projections put them out, so that LoRA, attention slicing,
fused attention kernels and IP-Adapters go on working, and turns them into probabilities only where someone asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from elakit.errors import RecordingError
from elakit.models import AttentionLayer

OnAttention = Callable[[AttentionLayer, Tensor, Tensor, tuple[int, int]], None]


@contextmanager
def tap(layers: Sequence[AttentionLayer], on_attention: OnAttention) -> Iterator[None]:
    """Call ``on_attention(layer, query, key, (h, w))`` each time one of the layers runs.

    Parameters
    ----------
    layers : sequence of AttentionLayer
    on_attention : callable
        ``query`` is (B, h*w, heads*d) and ``key`` (B, tokens, heads*d), as the layer computed them, gradients
        included, after the layer's own query and key normalisation where it has one. ``(h, w)`` is read off the input
        of the module around the layer. An error it raises ends the pass.

    Raises
    ------
    RecordingError
        When a layer runs with fused projections, whose keys cannot be read apart.

    Notes
    -----
    Hooks sit on ``to_q`` and ``to_k`` as they are on entry: load LoRA weights before. All hooks are removed on exit,
    whatever happens.

    Examples
    --------
    >>> import torch
    >>> from diffusers.models.transformers.transformer_2d import Transformer2DModel
    >>> block = Transformer2DModel(2, 4, in_channels=8, norm_num_groups=4, cross_attention_dim=6)
    >>> module = block.transformer_blocks[0].attn2
    >>> layer = AttentionLayer("attn2", "up", module.heads, module, block, factor=1)
    >>> def show(layer, query, key, size):
    ...     print(layer.name, tuple(query.shape), tuple(key.shape), size)
    >>> with torch.no_grad(), tap([layer], show):
    ...     _ = block(torch.randn(1, 8, 3, 5), encoder_hidden_states=torch.randn(1, 7, 6))
    attn2 (1, 15, 8) (1, 7, 8) (3, 5)
    """
    for layer in layers:
        if type(getattr(layer.module, "processor", None)).__name__.startswith("Fused"):
            raise RecordingError(
                f"Layer {layer.name} computes its keys and values in one fused projection, so its keys cannot be read. "
                "Call `pipe.unfuse_qkv_projections()` first, and fuse again afterwards if you like."
            )
    with ExitStack() as hooks:
        for layer in layers:
            _hook(layer, on_attention, hooks)
        yield


def _hook(layer: AttentionLayer, on_attention: OnAttention, hooks: ExitStack) -> None:
    size: list[tuple[int, int]] = []
    halves: dict[str, Tensor] = {}
    module: Any = layer.module

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        picture = args[0] if args else kwargs["hidden_states"]
        size[:] = [(picture.shape[-2], picture.shape[-1])]
        halves.clear()  # of a pass that broke off between query and key

    def keep(which: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            halves[which] = output
            if len(halves) < 2:
                return
            query, key = halves.pop("query"), halves.pop("key")
            query = _normed(getattr(module, "norm_q", None), query, layer.heads)
            key = _normed(getattr(module, "norm_k", None), key, layer.heads)
            on_attention(layer, query, key, size[0])

        return hook

    for handle in (
        layer.block.register_forward_pre_hook(enter, with_kwargs=True),
        module.to_q.register_forward_hook(keep("query")),
        module.to_k.register_forward_hook(keep("key")),
    ):
        hooks.callback(handle.remove)


def _normed(norm: nn.Module | None, x: Tensor, heads: int) -> Tensor:
    """Apply a layer's normalisation of queries or keys, which acts on each head; (B, n, heads*d) -> the same."""
    return x if norm is None else norm(x.unflatten(-1, (heads, -1))).flatten(-2)


def probabilities(layer: AttentionLayer, query: Tensor, key: Tensor) -> Tensor:
    """Attention probabilities, softmax over the text.

    Parameters
    ----------
    layer : AttentionLayer
    query : torch.Tensor, (B, n, heads*d)
    key : torch.Tensor, (B, tokens, heads*d)

    Returns
    -------
    torch.Tensor, (B, heads, n, tokens)
        float32 whatever the model's precision (float64 stays float64); each row sums to 1; differentiable.

    Examples
    --------
    >>> import torch
    >>> from diffusers.models.attention_processor import Attention
    >>> module = Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4)
    >>> layer = AttentionLayer("attn2", "up", module.heads, module, module, factor=1)
    >>> p = probabilities(layer, torch.randn(1, 15, 8).bfloat16(), torch.randn(1, 7, 8).bfloat16())
    >>> p.dtype, tuple(p.shape), bool(torch.allclose(p.sum(-1), torch.ones(1)))
    (torch.float32, (1, 2, 15, 7), True)
    """
    precision = torch.float64 if query.dtype == torch.float64 else torch.float32
    # Autocast would put the product back into half precision.
    with torch.autocast(query.device.type, enabled=False):
        q = query.to(precision).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        k = key.to(precision).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        scale: Any = layer.module.scale
        return (q @ k.transpose(-1, -2) * scale).softmax(dim=-1)
