"""Changes of attention scores that are computed from the scores themselves, in cross- and self-attention layers.

`elakit.attention.edit` adds what is known before a pass. Here a function is called as each layer runs, with the layer's
scores before the softmax, and returns what is added to them. Hooks pass it through the attention mask that layers
accept, so no processor is replaced, and a recording contains the changed attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from elakit.attention.calls import NEVER, additive
from elakit.attention.hooks import Hooks, is_left_alone
from elakit.attention.running import Watch
from elakit.attention.taps import check_processor, scores_mask
from elakit.errors import SettingError
from elakit.models import Adapter, AttentionLayer
from elakit.models.adapter import argument

Scores = Callable[[], Tensor]


@dataclass(frozen=True)
class Change:
    """Change of a layer's scores in one image.

    Attributes
    ----------
    bias : Tensor, (head or 1, h*w, keys)
        Added to the scores before the softmax.
    kept : tuple of int
        Keys whose weights stay what they were without the bias, so that the weights of a location no longer sum to 1.
        A recording shows the weights before this correction.
    unconditional : bool
        Whether the rows that do not see the prompt get the bias, too.
    """

    bias: Tensor
    kept: tuple[int, ...] = ()
    unconditional: bool = False


@dataclass(frozen=True)
class Site:
    """Layer, image and time at which scores are changed.

    Attributes
    ----------
    layer : AttentionLayer
    size : tuple of int
        (h, w) of the layer's maps.
    image : int
        Number of the image in the batch.
    time : float
        Timestep as a share of those of the training, from 1 (noise) to 0.
    keys : int
        Number of keys: text positions, or locations.
    """

    layer: AttentionLayer
    size: tuple[int, int]
    image: int
    time: float
    keys: int


ChangeOf = Callable[[Site, Scores], Change | None]


@contextmanager
def rescored(
    adapter: Adapter, layers: Sequence[AttentionLayer], change_of: ChangeOf, *, own_passes: bool = False
) -> Iterator[None]:
    """Change the scores of some layers in each pass inside the block.

    Parameters
    ----------
    adapter : Adapter
    layers : sequence of AttentionLayer
        Layers of cross-attention, and of self-attention as `Adapter.self_layers` gives them.
    change_of : callable
        ``change_of(site, scores)`` is called as a layer runs, for each image of the batch; ``scores()`` computes the
        scores of its row that sees the prompt, (head, h*w, keys), in at least float32. None changes nothing.
    own_passes : bool
        Act in the passes of guidance itself, all of whose rows see the prompt, instead of those of the pipeline.

    Raises
    ------
    SettingError
        When image and text share one softmax in a layer (Stable Diffusion 3, FLUX).
    """
    check_layers(adapter, layers)
    running = _Running(adapter, change_of, own_passes)
    try:
        with Hooks() as hooks:
            hooks.before(adapter.denoiser, running.begin)
            for layer in layers:
                check_processor(layer)
                _LayerHook(running, layer).place(hooks)
            yield
    finally:
        running.watch.close()


def check_layers(adapter: Adapter, layers: Sequence[AttentionLayer]) -> None:
    """Refuse layers whose scores cannot be changed.

    Raises
    ------
    SettingError
        When image and text share one softmax in a layer, or the layer is read where it is computed.
    """
    for layer in layers:
        if layer.kind != "cross" or layer.layout is not None:
            raise SettingError(
                f"{adapter.family}: the scores of layer {layer.name} cannot be changed, because it is not a plain "
                "cross- or self-attention layer. Use a model with cross-attention (Stable Diffusion 1.x, 2.x, XL, "
                "PixArt), or another method, such as elakit.ELA()."
            )


class _Running:
    """The pass in progress: its rows, and those that see the prompt."""

    def __init__(self, adapter: Adapter, change_of: ChangeOf, own_passes: bool) -> None:
        self.adapter = adapter
        self.change_of = change_of
        self.own_passes = own_passes
        self.watch = Watch(adapter)
        self.training_steps = int(getattr(adapter.pipe.scheduler.config, "num_train_timesteps", 1000))
        self.batch = 0
        self.time = 0.0
        self.rows: slice | None = None

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.rows = None
        if self.own_passes:
            if not is_left_alone(self.adapter.denoiser):
                return
            call = self.adapter.read_call(args, kwargs)
            self.rows = slice(0, call.batch)
        else:
            seen = self.watch.read(args, kwargs)
            if seen is None:
                return
            call, self.rows = seen.call, seen.rows
        self.batch, self.time = call.batch, call.timestep / self.training_steps


class _LayerHook:
    """Changes the scores of one layer."""

    def __init__(self, running: _Running, layer: AttentionLayer) -> None:
        self.running = running
        self.layer = layer
        self.size = (0, 0)
        self.missing: Tensor | None = None  # what the kept weights add to the layer's output

    def place(self, hooks: Hooks) -> None:
        hooks.before(self.layer.block, self._enter_block)
        hooks.before(self.layer.module, self._enter, first=True)
        hooks.after(self.layer.module, self._leave)

    def _enter_block(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.size = self.layer.grid(args, kwargs)

    def _enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.missing = None
        rows, batch = self.running.rows, self.running.batch
        if rows is None:
            return None
        image = argument(args, kwargs, 0, "hidden_states")
        words = argument(args, kwargs, 1, "encoder_hidden_states")
        words = words[0] if isinstance(words, tuple) else words  # an IP-Adapter comes in a tuple
        keys = image if words is None or self.layer.reads == "image" else words
        first, past, _ = rows.indices(batch)
        changes: dict[int, Change] = {}
        for row in range(first, past):
            site = Site(layer=self.layer, size=self.size, image=row - first, time=self.running.time, keys=keys.shape[1])
            change = self.running.change_of(site, partial(self._scores, image[row], keys[row]))
            if change is not None:
                changes[row] = change
        if not changes:
            return None
        shape = (batch, self.layer.heads, image.shape[1], keys.shape[1])
        bias = torch.zeros(shape, dtype=image.dtype, device=image.device)
        for row, change in changes.items():
            all_of_image = range(row - first, batch, past - first)
            bias[list(all_of_image) if change.unconditional else row] = change.bias.clamp(min=NEVER).to(bias)
        given = scores_mask(argument(args, kwargs, 2, "attention_mask"), self.layer, batch, keys.shape[1])
        given = None if given is None else additive(given, bias.dtype)
        for row, change in changes.items():
            if change.kept:
                self._keep(row, image, keys, change, bias, given)
        mask = (bias if given is None else bias + given).flatten(0, 1)
        if len(args) > 2:
            return (*args[:2], mask, *args[3:]), kwargs
        return args, {**kwargs, "attention_mask": mask}

    def _scores(self, image: Tensor, keys: Tensor) -> Tensor:
        """Scores of one row, (head, h*w, keys); queries and keys are projected once more, as masks come first."""
        module: Any = self.layer.module
        if self.layer.reads != "image" and getattr(module, "norm_cross", None):
            keys = module.norm_encoder_hidden_states(keys[None])[0]
        query, key = (x.unflatten(-1, (self.layer.heads, -1)) for x in (module.to_q(image), module.to_k(keys)))
        query, key = (
            x if norm is None else norm(x)
            for x, norm in zip((query, key), (getattr(module, n, None) for n in ("norm_q", "norm_k")), strict=True)
        )
        precision = torch.promote_types(query.dtype, torch.float32)
        scores: Tensor = module.scale * torch.einsum("nhd,khd->hnk", query.to(precision), key.to(precision))
        return scores

    def _keep(self, row: int, image: Tensor, keys: Tensor, change: Change, bias: Tensor, given: Tensor | None) -> None:
        """Note what the kept weights of a row add to the layer's output."""
        module: Any = self.layer.module
        scores = self._scores(image[row], keys[row])
        if given is not None:
            scores = scores + given[row if len(given) > 1 else 0]
        kept = list(change.kept)
        differences = (scores.softmax(-1) - (scores + bias[row]).softmax(-1))[..., kept]
        if self.layer.reads != "image" and getattr(module, "norm_cross", None):
            keys = module.norm_encoder_hidden_states(keys)
        values = module.to_v(keys[row, kept]).unflatten(-1, (self.layer.heads, -1)).to(differences)
        added = torch.einsum("hnk,khd->nhd", differences, values).flatten(1).to(image.dtype)
        projected = module.to_out[0](added) - module.to_out[0](torch.zeros_like(added[:1]))
        if self.missing is None:
            self.missing = torch.zeros_like(image)
        self.missing[row] = projected / module.rescale_output_factor

    def _leave(self, _: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        missing, self.missing = self.missing, None
        return None if missing is None else output + missing
