"""Readers of the maps of concepts that are not in the prompt: one class for each kind of attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from elakit.attention.calls import AttentionCall, changing, watching_outputs
from elakit.attention.hooks import Hooks, alone
from elakit.attention.layout import Size
from elakit.attention.running import SeenCall, Watch
from elakit.attention.taps import Attend, rotate, tap
from elakit.errors import RecordingError
from elakit.models import Adapter, AttentionLayer
from elakit.models.adapter import Conditioning, argument
from elakit.models.adapter import Layout as CallLayout
from elakit.models.device import compute_dtype
from elakit.prompt import Prompt, parse


class Reader:
    """Base of the classes that compute the maps of one `map_concepts` block.

    Parameters
    ----------
    adapter : Adapter
    prompt : Prompt or str
        The prompt of the run.
    words : sequence of str
        Concepts.
    begin : callable
        Function that is called as ``begin(timestep)`` at the start of each denoiser call that sees the prompt.
    add : callable
        Function that is called as ``add(maps, size)`` with the maps (image, concept, h*w) of each layer and their size
        (h, w).
    """

    def __init__(
        self,
        adapter: Adapter,
        prompt: Prompt | str,
        words: Sequence[str],
        begin: Callable[[float], None],
        add: Callable[[Tensor, Size], None],
    ) -> None:
        self.adapter: Any = adapter
        self.denoiser: Any = adapter.denoiser
        self.watch = Watch(adapter, parse(prompt, adapter.pipe))
        self.begin = begin
        self.add = add
        self.seen: SeenCall | None = None
        self.words = list(words)
        self.positions = [self._positions(word) for word in words]
        self.counts = [len(each) for each in self.positions]

    def close(self) -> None:
        """Forget the last run, so that its tensors can be freed."""
        self.watch.close()
        self.seen = None

    def before_call(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the arguments of a denoiser call that is about to run, and begin its maps if it sees the prompt."""
        self.seen = self.watch.read(args, kwargs)
        if self.seen is not None:
            self.begin(self.seen.call.timestep)

    def place(self, layers: Sequence[AttentionLayer], hooks: Hooks, stack: ExitStack) -> None:
        """Start to read the layers; reading ends when ``hooks`` are removed and ``stack`` is closed."""
        raise NotImplementedError

    def by_concept(self, values: Tensor) -> Tensor:
        """Average the tokens of each concept; (..., tokens) -> (..., concepts)."""
        return torch.stack([part.mean(-1) for part in values.split(self.counts, dim=-1)], dim=-1)

    def compare(self, image: Tensor, concepts: Tensor) -> Tensor:
        """Compute the maps of ConceptAttention, (rows, concepts, h*w), from attention outputs.

        ``image``, (rows, h*w, c), contains the outputs of the image's locations, and ``concepts``, (rows, tokens, c),
        those of the concepts' tokens. Their dot products are averaged over the tokens of each concept; the maps are the
        softmax of these means over the concepts.
        """
        # Scores can be in the hundreds, where bfloat16 has steps of 1 or more; autocast would use half precision, too.
        with torch.autocast(image.device.type, enabled=False):
            scores = image.float() @ concepts.float().transpose(-1, -2)
        return self.by_concept(scores).softmax(-1).movedim(-1, 1)

    def _positions(self, word: str) -> list[int]:
        """Positions of a concept's tokens in the encoded text that consists of this concept alone."""
        return [token.index for token in parse(f"[{word}]", self.adapter.pipe).tokens]

    @torch.no_grad()
    def _states(self) -> Tensor:
        """Text states of the tokens of all concepts, (tokens, channels)."""
        first = self.adapter.text()[0].offset  # positions before it (AuraFlow's registers) have no text states
        found = []
        for word, positions in zip(self.words, self.positions, strict=True):
            states = _text_states(self.adapter.encode(word, guided=False))
            found.append(states[[position - first for position in positions]])
        return torch.cat(found)


def _text_states(conditioning: Conditioning) -> Tensor:
    """Text states of an encoded prompt, (positions, channels)."""
    inputs = conditioning.inputs
    states: Tensor = inputs["encoder_hidden_states" if "encoder_hidden_states" in inputs else "cap_feats"][0]
    return states


class Cross(Reader):
    """Reader for cross-attention that is read by hooks: the concepts' tokens are further keys beside the prompt's."""

    def place(self, layers: Sequence[AttentionLayer], hooks: Hooks, stack: ExitStack) -> None:
        """Start to read the layers."""
        self.beside: dict[str, Tensor] = dict.fromkeys(
            (layer.name for layer in layers), _projected(self.denoiser, self._states())
        )
        stack.enter_context(tap(layers, self.on_attention))

    @torch.no_grad()
    def on_attention(self, layer: AttentionLayer, attend: Attend, size: Size) -> None:
        """Compute the maps of a layer that has just run, and pass them to `add`."""
        if self.seen is None:
            return
        count = sum(self.counts)
        every = attend(self.seen.rows, self.beside[layer.name])  # (images, heads, h*w, text and concept tokens)
        text, own = every.split([every.shape[-1] - count, count], dim=-1)
        alone = own / (text.sum(-1, keepdim=True) + own)  # each token beside the prompt only
        self.add(self.by_concept(alone).mean(1).movedim(-1, 1), size)


class AtCall(Cross):
    """Reader for cross-attention that is read at its attention call (Sana, HunyuanDiT)."""

    @torch.no_grad()
    def place(self, layers: Sequence[AttentionLayer], hooks: Hooks, stack: ExitStack) -> None:
        """Start to read the layers; the concepts' keys are computed once, as neither image nor step changes them."""
        inside: list[str] = []
        keys: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}

        def keep(call: AttentionCall, _: Tensor) -> None:
            if inside:  # only the first attention call of a layer attends to the text
                keys[inside.pop()].append(call.key[:1])

        side = self.adapter.pipe.vae_scale_factor * layers[0].factor  # one patch
        noise = self.adapter.noise(torch.Generator(), side, side)
        with Hooks() as own, alone(own), changing(lambda call: call, keep):
            for layer in layers:
                own.before(layer.module, lambda *_, name=layer.name: inside.append(name))
                own.after(layer.module, lambda *_: inside.clear())
            for word in self.words:
                conditioning = self.adapter.encode(word, guided=False, size=(side, side))
                self.adapter.denoise(noise, 1.0, conditioning)
        for layer in layers:
            if len(keys[layer.name]) < len(self.words):
                raise _without_call(layer)
        self.beside = {
            name: torch.cat([key[:, :, at] for key, at in zip(each, self.positions, strict=True)], dim=2)
            for name, each in keys.items()
        }
        stack.enter_context(tap(layers, self.on_attention))


def _without_call(layer: AttentionLayer) -> RecordingError:
    return RecordingError(
        f"Layer {layer.name} ran without calling F.scaled_dot_product_attention, but its attention is read at this "
        "call. Before `map_concepts`, set the default attention processor of the transformer, and call "
        "`pipe.transformer.set_attention_backend('native')`."
    )


@torch.no_grad()
def _projected(denoiser: Any, states: Tensor) -> Tensor:
    """Text states as the attention layers receive them, before the layers project them to keys.

    A denoiser of PixArt or Kolors projects the states once before all layers; this projection is applied here. For
    other denoisers, the given states are returned.
    """
    projection = getattr(denoiser, "caption_projection", None)
    if getattr(denoiser.config, "encoder_hid_dim_type", None) == "text_proj":
        projection = denoiser.encoder_hid_proj
    elif moved := getattr(denoiser, "text_encoder_hid_proj", None):  # Kolors with an IP-Adapter
        projection = moved
    return states if projection is None else projection(states.to(compute_dtype(denoiser)))


@dataclass(frozen=True)
class _Kept:
    """Keys and values of the image in one layer of the run's denoiser call, and the attention outputs of the image.

    The outputs are None in layers that are not read.
    """

    key: Tensor
    value: Tensor
    output: Tensor | None


class TextPass(Reader):
    """Reader for joint attention that is read at its attention call.

    A second denoiser call has the concepts as its text; they attend to each other and to the keys and values of the
    image, which were kept from the run's own call.
    """

    def place(self, layers: Sequence[AttentionLayer], hooks: Hooks, stack: ExitStack) -> None:
        """Place hooks on the layers that are read, and on all earlier ones: the concepts' states pass through them."""
        self.states = self._states()
        self.chosen = {layer.name for layer in layers}
        every = self.adapter.layers()
        self.layers = every[: max(at for at, one in enumerate(every) if one.name in self.chosen) + 1]
        self.hooks = hooks
        self.kept: dict[str, _Kept] = {}
        self.inside: AttentionLayer | None = None
        self.given: tuple[Any, Any] | None = None  # arguments of the run's denoiser call
        stack.callback(self.kept.clear)
        for layer in self.layers:
            hooks.before(layer.module, lambda *_, layer=layer: setattr(self, "inside", layer))
            hooks.after(layer.module, lambda *_: setattr(self, "inside", None))
        hooks.after(self.denoiser, self.after_call)
        stack.enter_context(watching_outputs(self._keep))

    def before_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read a denoiser call of the run that is about to start; the second call, for the concepts, is not read."""
        if self.given is not None:
            return
        self.kept.clear()
        super().before_call(module, args, kwargs)
        if self.seen is not None:
            self.layout = self._layout(args, kwargs)

    def _layout(self, args: Any, kwargs: Any) -> CallLayout:
        layout: CallLayout = self.layers[0].layout(args, kwargs)
        return layout

    def _keep(self, call: AttentionCall, output: Tensor) -> None:
        layer, self.inside = self.inside, None  # only a layer's first attention call attends to the text
        if layer is None or self.seen is None or self.given is not None:
            return
        rows, (first, count) = self.seen.rows, self.layout.text
        image = slice(first + count, None) if layer.text_first else slice(0, first)
        locations = slice(self.layout.image, self.layout.image + math.prod(self.layout.size))
        self.kept[layer.name] = _Kept(
            call.key[rows][..., image, :],
            call.value[rows][..., image, :],
            _by_row(output[rows][..., locations, :]) if layer.name in self.chosen else None,
        )

    @torch.no_grad()
    def after_call(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
        """Run a second denoiser call, with the concepts as its text.

        Raises
        ------
        RecordingError
            Raised when a layer ran without the attention call at which it is read.
        """
        if self.seen is None or self.given is not None:
            return
        for layer in self.layers:
            if layer.name not in self.kept:
                raise _without_call(layer)
        self.given = args, kwargs
        try:
            of_text = self.adapter.text_call(
                self.states, [at for each in self.positions for at in each], args, kwargs, self.seen.rows
            )
            self.text = self._layout((), of_text).text
            with alone(self.hooks), changing(self._join, self._compare):
                self.denoiser(**of_text)
        finally:
            self.given = self.seen = self.inside = None
            self.kept.clear()

    def _join(self, call: AttentionCall) -> AttentionCall:
        """Replace the image's keys and values in a call of the second pass by those that were kept from the run."""
        if self.inside is None:
            return call
        first, count = self.text
        kept = self.kept[self.inside.name]

        def joined(own: Tensor, image: Tensor) -> Tensor:
            return torch.cat([own[..., first : first + count, :], image], dim=-2)

        return replace(call, key=joined(call.key, kept.key), value=joined(call.value, kept.value), mask=None)

    def _compare(self, _: AttentionCall, output: Tensor) -> None:
        layer, self.inside = self.inside, None
        image = None if layer is None else self.kept[layer.name].output
        if image is None:
            return
        first = self.text[0] + self.adapter.text()[0].offset
        concepts = _by_row(output[..., first : first + len(self.states), :])
        self.add(self.compare(image, concepts), self.layout.size)


def _by_row(output: Tensor) -> Tensor:
    """Outputs of all heads side by side; (rows, heads, n, d) -> (rows, n, channels)."""
    return output.transpose(1, 2).flatten(2)


class Stream(Reader):
    """Reader for FLUX.1 and Stable Diffusion 3, in which hooks compute states of the concepts block by block.

    After each double-stream block of the run, a hook computes what the block would do with the concepts as its text:
    they attend to each other and to the image. The block itself computes the same as without the hook.
    """

    def place(self, layers: Sequence[AttentionLayer], hooks: Hooks, stack: ExitStack) -> None:
        """Start to read the layers; the states of the concepts are computed in all double-stream blocks."""
        self.states = self._states()
        chosen = {layer.name for layer in layers}
        for number, block in enumerate(self.denoiser.transformer_blocks):
            layer = next(one for one in self.adapter.layers() if one.module is block.attn)
            hooks.before(block.attn.to_out[0], self._keep_output)
            hooks.after(block, self._step(layer, first=number == 0, keeps=layer.name in chosen))
        hooks.before(self.denoiser, self._note_size(layers[0]))

    def _note_size(self, layer: AttentionLayer) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            self.size = layer.grid(args, kwargs)

        return hook

    def _keep_output(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self.output = args[0]  # attention outputs of the image's locations, (rows, h*w, channels)

    def _step(self, layer: AttentionLayer, *, first: bool, keeps: bool) -> Any:
        @torch.no_grad()
        def hook(block: Any, args: Any, kwargs: Any, _: Any) -> None:
            if self.seen is None:
                return
            rows, output = self.seen.rows, self.output
            image, temb = (argument(args, kwargs, place, name) for place, name in ((0, "hidden_states"), (2, "temb")))
            rotary = argument(args, kwargs, 3, "image_rotary_emb") if layer.text_first else None  # FLUX.1
            temb = temb[rows] if len(temb) > 1 else temb
            if first:
                begin = self.denoiser.context_embedder(self.states.to(image.dtype))
                self.stream = begin.expand(rows.stop - rows.start, -1, -1)
            ends = bool(getattr(block, "context_pre_only", False))  # the text stream ends in this block
            if ends:
                concept = block.norm1_context(self.stream, temb)
            else:
                concept, gate, shift, scale, gate_mlp = block.norm1_context(self.stream, emb=temb)
            own = _concept_attention(layer, concept, block.norm1(image[rows], emb=temb)[0], rotary)
            if keeps:
                self.add(self.compare(output[rows], own), self.size)
            if ends:
                return
            self.stream = self.stream + gate.unsqueeze(1) * block.attn.to_add_out(own)
            normed = block.norm2_context(self.stream) * (1 + scale[:, None]) + shift[:, None]
            self.stream = self.stream + gate_mlp.unsqueeze(1) * block.ff_context(normed)

        return hook


def _concept_attention(layer: AttentionLayer, concept: Tensor, image: Tensor, rotary: Any) -> Tensor:
    """Attention outputs of concepts in one layer, in which the concepts attend to each other and to the image.

    Parameters
    ----------
    layer : AttentionLayer
        Joint attention of a double-stream block. Its projections compute queries, keys and values here.
    concept : Tensor, (rows, tokens, channels)
        Hidden states of the concepts' tokens, after the block's first norm.
    image : Tensor, (rows, h*w, channels)
        Hidden states of the image alone, after the block's first norm.
    rotary : tuple of Tensor or None
        Rotary embedding (cos, sin) of text and image; None if the model has none.

    Returns
    -------
    Tensor, (rows, tokens, channels)
        Outputs of all heads side by side, before the output projection.
    """
    module: Any = layer.module

    def heads(x: Tensor, norm: nn.Module | None = None) -> Tensor:
        x = x.unflatten(-1, (layer.heads, -1))
        return x if norm is None else norm(x)

    query = heads(module.add_q_proj(concept), module.norm_added_q)
    keys = [heads(module.add_k_proj(concept), module.norm_added_k), heads(module.to_k(image), module.norm_k)]
    values = [heads(module.add_v_proj(concept)), heads(module.to_v(image))]
    if rotary is not None:  # text has position 0, where the rotation is the identity
        keys[1] = rotate(keys[1], [turn[-image.shape[1] :] for turn in rotary])
    query, key, value = (x.transpose(1, 2) for x in (query, torch.cat(keys, dim=1), torch.cat(values, dim=1)))
    scores = query.float() @ key.float().transpose(-1, -2) / math.sqrt(query.shape[-1])
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)
