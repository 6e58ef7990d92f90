"""Maps of concepts that are not in the prompt: words that the image is compared with while it is generated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from elakit.attention.hooks import Hooks
from elakit.attention.layout import Size
from elakit.attention.running import SeenCall, Watch
from elakit.attention.spec import select_layers
from elakit.attention.taps import Attend, rotate, tap
from elakit.errors import RecordingError, SettingError
from elakit.measures.arrays import resize
from elakit.models import Adapter, AttentionLayer, adapter_for
from elakit.models.adapter import argument, is_a
from elakit.models.device import compute_dtype
from elakit.pipeline import Pipeline
from elakit.prompt import Prompt, parse


class ConceptMaps:
    """Maps of concepts in the runs of one `map_concepts` block.

    Attributes
    ----------
    concepts : tuple of str
    kind : {"probability", "similarity"}
        Kind of the values; see `map_concepts`.
    """

    def __init__(self, concepts: Sequence[str], kind: str) -> None:
        self.concepts = tuple(concepts)
        self.kind = kind
        self._timesteps: list[float] = []
        self._sums: list[dict[Size, tuple[np.ndarray, int]]] = []  # per step and size: sum over layers, their number

    def maps(self, image: int = 0, size: int | None = None) -> xr.DataArray:
        """Return the maps, the mean over layers and heads.

        Parameters
        ----------
        image : int
            Index of the image in the batch.
        size : int, optional
            Use only layers whose maps have this larger side. Default: all, resized to the largest.

        Returns
        -------
        xarray.DataArray, (step, concept, y, x)
            float32, with ``timestep(step)``.

        Raises
        ------
        RecordingError
            When nothing was recorded, or no map has that size.
        """
        if not self._sums:
            raise RecordingError("No maps of concepts were recorded: no step was finished inside the block.")
        sizes = sorted((one for one in self._sums[0] if size is None or max(one) == size), reverse=True)
        if not sizes:
            there = ", ".join(f"{y}x{x}" for y, x in self._sums[0])
            raise RecordingError(f"No maps have size {size}; there are {there}. Give the larger side.")
        steps = []
        for found in self._sums:
            layers = sum(found[one][1] for one in sizes)
            steps.append(sum(resize(found[one][0][image], sizes[0]) for one in sizes) / np.float32(layers))
        return xr.DataArray(
            np.stack(steps),
            dims=("step", "concept", "y", "x"),
            coords={
                "step": np.arange(len(steps)),
                "timestep": ("step", self._timesteps),
                "concept": list(self.concepts),
            },
            name=f"concept {self.kind}",
        )

    def begin(self, timestep: float) -> None:
        """Begin a denoiser call."""
        self._timesteps.append(timestep)
        self._sums.append({})

    def add(self, maps: Tensor, size: Size) -> None:
        """Add the maps (image, concept, h*w) of one layer to the call in progress."""
        values = maps.float().cpu().numpy().reshape(*maps.shape[:2], *size)
        total, count = self._sums[-1].get(size, (0, 0))
        self._sums[-1][size] = (total + values, count + 1)


@contextmanager
def map_concepts(
    pipe: Pipeline, prompt: Prompt | str, words: Sequence[str], *, layers: str | Sequence[str] = "all"
) -> Iterator[ConceptMaps]:
    """Map concepts that need not be in the prompt onto the images of the runs inside the ``with`` block.

    The image is the same, bit for bit, as without the block: the concepts attend to the image, and the image does not
    attend to them.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
        Pipeline of Stable Diffusion, SDXL, Kolors, PixArt, FLUX.1 or Stable Diffusion 3.
    prompt : Prompt or str
        The prompt that the pipeline is called with.
    words : sequence of str
        Concepts: words or short phrases. FLUX.1 and Stable Diffusion 3 need at least two.
    layers : str or sequence of str
        As in `select_layers`. In FLUX only double stream blocks are used.

    Yields
    ------
    ConceptMaps
        Its values are not attention of the run, because the run has no such token:

        * cross-attention, kind "probability": the attention that a token of the concept would get if it were
          appended to the prompt, ``exp(s_c) / (sum_t exp(s_t) + exp(s_c))``, the mean over the tokens of a concept;
        * FLUX.1 and Stable Diffusion 3, kind "similarity": ConceptAttention. The concepts are a second text stream that
          attends to itself and to the image; the map is the softmax over the concepts of the dot product between the
          attention outputs of a location and of each concept.

    Raises
    ------
    SettingError
        When no concept is given, or only one for FLUX.1 or Stable Diffusion 3.
    RecordingError
        When the family, or the selected layers, cannot map concepts; in the cases of `elakit.record`.

    References
    ----------
    Helbling et al., "ConceptAttention: diffusion transformers learn highly interpretable features" (ICML 2025)

    Examples
    --------
    >>> import elakit
    >>> from elakit.attention import map_concepts
    >>> pipe = elakit.load("picture-world")
    >>> prompt = elakit.parse("a [red car]", pipe)
    >>> with map_concepts(pipe, prompt, ["frog", "clock"]) as found:
    ...     image = pipe(prompt.text, num_inference_steps=2).images[0]
    >>> found.maps(size=16).sizes
    Frozen({'step': 2, 'concept': 2, 'y': 16, 'x': 16})
    """
    adapter = adapter_for(pipe)
    words = [words] if isinstance(words, str) else list(words)
    chosen = select_layers(adapter.layers(), layers)
    cross = all(layer.kind == "cross" and layer.layout is None for layer in chosen)
    streams = is_a(adapter.denoiser, "FluxTransformer2DModel", "SD3Transformer2DModel")
    double = [layer for layer in chosen if layer.kind == "joint"] if streams else []
    if not words or (not cross and len(words) < 2):
        raise SettingError(
            f"words={words!r}: give {'one concept' if cross else 'two concepts'} or more, such as 'sky'."
        )
    if not cross and not double:
        raise RecordingError(
            f"{adapter.family} with layers={layers!r}: concepts that are not in the prompt can be mapped in the "
            "cross-attention of Stable Diffusion, SDXL, Kolors and PixArt, and in the double stream blocks of FLUX.1 "
            "and Stable Diffusion 3. Add the words to the prompt and record the run with `elakit.record`."
        )
    states = [_states(adapter, word) for word in words]
    found = ConceptMaps(words, "probability" if cross else "similarity")
    reader: _Reader = (_Cross if cross else _Stream)(adapter, parse(prompt, pipe), found, states)
    with ExitStack() as stack:
        stack.callback(reader.watch.close)
        hooks = stack.enter_context(Hooks())
        hooks.before(adapter.denoiser, reader.before_call)
        reader.place(chosen if cross else double, hooks, stack)
        yield found


@torch.no_grad()
def _states(adapter: Adapter, concept: str) -> Tensor:
    """Text states of the tokens of a concept, (tokens, channels)."""
    if not concept.strip() or any(bracket in concept for bracket in "[]"):
        raise SettingError(f"words has {concept!r}; give words or short phrases without brackets, such as 'sky'.")
    tokens = [token.index for token in parse(f"[{concept}]", adapter.pipe).tokens]
    states: Tensor = adapter.encode(concept, guided=False).inputs["encoder_hidden_states"]
    return states[0, tokens]


class _Reader:
    """Computes the maps of one block."""

    def __init__(self, adapter: Adapter, prompt: Prompt, found: ConceptMaps, states: Sequence[Tensor]) -> None:
        self.watch = Watch(adapter, prompt)
        self.denoiser: Any = adapter.denoiser
        self.found = found
        self.states = torch.cat(list(states))
        self.counts = [len(each) for each in states]
        self.seen: SeenCall | None = None

    def before_call(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen = self.watch.read(args, kwargs)
        if self.seen is not None:
            self.found.begin(self.seen.call.timestep)

    def place(self, layers: Sequence[AttentionLayer], hooks: Hooks, stack: ExitStack) -> None:
        raise NotImplementedError

    def by_concept(self, values: Tensor) -> Tensor:
        """Average the tokens of each concept; (..., tokens) -> (..., concepts)."""
        return torch.stack([part.mean(-1) for part in values.split(self.counts, dim=-1)], dim=-1)


class _Cross(_Reader):
    """Concepts beside the prompt in cross-attention."""

    def place(self, layers: Sequence[AttentionLayer], hooks: Hooks, stack: ExitStack) -> None:
        self.projected = _projected(self.denoiser, self.states)
        stack.enter_context(tap(layers, self.on_attention))

    @torch.no_grad()
    def on_attention(self, layer: AttentionLayer, attend: Attend, size: Size) -> None:
        if self.seen is None:
            return
        every = attend(self.seen.rows, self.projected)  # (images, heads, h*w, text and concept tokens)
        text, own = every.split([every.shape[-1] - len(self.states), len(self.states)], dim=-1)
        alone = own / (text.sum(-1, keepdim=True) + own)  # each token beside the prompt only
        self.found.add(self.by_concept(alone).mean(1).movedim(-1, 1), size)


@torch.no_grad()
def _projected(denoiser: Any, states: Tensor) -> Tensor:
    """Text states as the keys see them: behind the denoiser's own projection in PixArt and Kolors."""
    projection = getattr(denoiser, "caption_projection", None)
    if getattr(denoiser.config, "encoder_hid_dim_type", None) == "text_proj":
        projection = denoiser.encoder_hid_proj
    elif moved := getattr(denoiser, "text_encoder_hid_proj", None):  # Kolors with an IP-Adapter
        projection = moved
    return states if projection is None else projection(states.to(compute_dtype(denoiser)))


class _Stream(_Reader):
    """Concepts as a second text stream through the double stream blocks of FLUX.1 or Stable Diffusion 3."""

    def place(self, layers: Sequence[AttentionLayer], hooks: Hooks, stack: ExitStack) -> None:
        chosen = {layer.name for layer in layers}
        for number, block in enumerate(self.denoiser.transformer_blocks):
            layer = next(one for one in self.watch.adapter.layers() if one.module is block.attn)
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
                scores = output[rows] @ own.transpose(-1, -2)  # (images, h*w, concept tokens)
                self.found.add(self.by_concept(scores.float()).softmax(-1).movedim(-1, 1), self.size)
            if ends:
                return
            self.stream = self.stream + gate.unsqueeze(1) * block.attn.to_add_out(own)
            normed = block.norm2_context(self.stream) * (1 + scale[:, None]) + shift[:, None]
            self.stream = self.stream + gate_mlp.unsqueeze(1) * block.ff_context(normed)

        return hook


def _concept_attention(layer: AttentionLayer, concept: Tensor, image: Tensor, rotary: Any) -> Tensor:
    """Attention outputs of concepts, which attend to each other and to the image; (rows, tokens, channels)."""
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
