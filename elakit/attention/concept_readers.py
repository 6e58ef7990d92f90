"""Classes that compute maps of concepts that are not in the prompt, one class for each kind of attention."""

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
    """Base of the classes that compute the maps of concepts for one `map_concepts` block.

    Parameters
    ----------
    adapter : Adapter
        Adapter of the pipeline.
    prompt : Prompt or str
        The prompt of the run.
    words : sequence of str
        The concepts: words or phrases that need not be in the prompt.
    begin : callable
        Function ``begin(timestep)``. It is called at the start of each denoiser call that sees the prompt.
    add : callable
        Function ``add(maps, size)``. It is called for each layer with the maps of the concepts, (image, concept, h*w).
        ``size`` is the (h, w) of these maps.
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
        """Read the arguments of a denoiser call that is about to run.

        If the denoiser call sees the prompt, ``self.begin`` is called with its timestep.
        """
        self.seen = self.watch.read(args, kwargs)
        if self.seen is not None:
            self.begin(self.seen.call.timestep)

    def place(self, layers: Sequence[AttentionLayer], hooks: Hooks, stack: ExitStack) -> None:
        """Start to read the attention of ``layers``.

        Reading ends when ``hooks`` are removed and ``stack`` is closed.
        """
        raise NotImplementedError

    def by_concept(self, values: Tensor) -> Tensor:
        """Average values over the tokens of each concept; (..., tokens) -> (..., concepts)."""
        return torch.stack([part.mean(-1) for part in values.split(self.counts, dim=-1)], dim=-1)

    def compare(self, image: Tensor, concepts: Tensor) -> Tensor:
        """Compute maps of concepts from attention outputs, as the method ConceptAttention does.

        At each location, the output of the image is compared with the output of each concept token by their dot
        product. The dot products are averaged over the tokens of each concept. The maps are the softmax of these means
        over the concepts.

        Parameters
        ----------
        image : torch.Tensor, (rows, h*w, channels)
            Attention outputs of the image's locations.
        concepts : torch.Tensor, (rows, tokens, channels)
            Attention outputs of the concepts' tokens.

        Returns
        -------
        torch.Tensor, (rows, concepts, h*w)
            The maps.
        """
        # Scores can be in the hundreds, where bfloat16 has steps of 1 or more; autocast would use half precision, too.
        with torch.autocast(image.device.type, enabled=False):
            scores = image.float() @ concepts.float().transpose(-1, -2)
        return self.by_concept(scores).softmax(-1).movedim(-1, 1)

    def _positions(self, word: str) -> list[int]:
        """Return the positions of a concept's tokens in a text that consists of this concept alone."""
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
    """Reader that computes maps of concepts from cross-attention, by hooks on the layers.

    For the maps, the keys of the concepts' tokens are appended to the keys of the prompt. The run itself is not
    changed.
    """

    def place(self, layers: Sequence[AttentionLayer], hooks: Hooks, stack: ExitStack) -> None:
        """Start to read the attention of ``layers``."""
        self.beside: dict[str, Tensor] = dict.fromkeys(
            (layer.name for layer in layers), _projected(self.denoiser, self._states())
        )
        stack.enter_context(tap(layers, self.on_attention))

    @torch.no_grad()
    def on_attention(self, layer: AttentionLayer, attend: Attend, size: Size) -> None:
        """Compute the concept maps of a layer that has just run, and pass the maps to ``self.add``.

        ``attend`` returns the attention probabilities of the layer. ``size`` is the (h, w) of the layer's maps.
        """
        if self.seen is None:
            return
        count = sum(self.counts)
        every = attend(self.seen.rows, self.beside[layer.name])  # (images, heads, h*w, text and concept tokens)
        text, own = every.split([every.shape[-1] - count, count], dim=-1)
        alone = own / (text.sum(-1, keepdim=True) + own)  # each token beside the prompt only
        self.add(self.by_concept(alone).mean(1).movedim(-1, 1), size)


class AtCall(Cross):
    """Reader that computes maps of concepts from cross-attention, at the attention calls of Sana and HunyuanDiT."""

    @torch.no_grad()
    def place(self, layers: Sequence[AttentionLayer], hooks: Hooks, stack: ExitStack) -> None:
        """Compute the keys of the concepts, and start to read the attention of ``layers``.

        The keys are computed only once, because they do not depend on the image or the step.
        """
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
        f"Layer {layer.name} ran without calling F.scaled_dot_product_attention, the function at which its attention "
        "is read. Before `map_concepts`, set the default attention processor of the transformer, and call "
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
    """Keys, values and attention outputs of the image in one layer, kept from the run's denoiser call.

    ``output`` is None if no maps are computed from the layer.
    """

    key: Tensor
    value: Tensor
    output: Tensor | None


class TextPass(Reader):
    """Reader that computes maps of concepts from joint attention, at the layers' attention calls.

    After each denoiser call of the run, the denoiser is called a second time, with the concepts as its text. In this
    second call, the concepts attend to each other and to the image. The keys and values of the image come from the
    run's own call.
    """

    def place(self, layers: Sequence[AttentionLayer], hooks: Hooks, stack: ExitStack) -> None:
        """Place hooks on ``layers``, which are read, and on all earlier layers of the denoiser.

        The concepts' states must pass through the earlier layers before they reach ``layers``.
        """
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
        """Read the arguments of a denoiser call of the run that is about to start.

        The second denoiser call, which has the concepts as its text, is ignored.
        """
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
        """Run a second denoiser call after a denoiser call of the run, with the concepts as its text.

        Raises
        ------
        RecordingError
            Raised when a layer did not call `F.scaled_dot_product_attention`, so that its attention could not be read.
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
        """Join the concepts' keys and values with those of the image that were kept from the run.

        ``call`` is an attention call of the second denoiser call, which has the concepts as its text. In the returned
        call, the kept keys and values replace those of ``call`` that belong to the image.
        """
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
    """Concatenate the attention outputs of all heads; (rows, heads, n, d) -> (rows, n, heads x d)."""
    return output.transpose(1, 2).flatten(2)


class Stream(Reader):
    """Reader that computes maps of concepts for FLUX.1 and Stable Diffusion 3, by hooks on the double-stream blocks.

    After each double-stream block of the run, a hook computes what the block would do if the concepts were its text. In
    this computation, the concepts attend to each other and to the image. The hook does not change the block's own
    result.
    """

    def place(self, layers: Sequence[AttentionLayer], hooks: Hooks, stack: ExitStack) -> None:
        """Start to read the attention of ``layers``.

        The states of the concepts are computed in all double-stream blocks, including blocks that are not read.
        """
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
    """Compute the attention outputs of concepts in one layer: the concepts attend to each other and to the image.

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
        Attention outputs of the concepts' tokens: the heads are concatenated, and the output projection is not applied.
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
