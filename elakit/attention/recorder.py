"""Recording attention while a pipeline runs: one context manager around the user's own call."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from elakit.attention.recording import Recording, build_node, build_tree
from elakit.attention.spec import RecordSpec, readable_bytes, select_layers, size_name
from elakit.attention.taps import probabilities, tap
from elakit.errors import RecordingError
from elakit.models import AttentionLayer, StableDiffusion, adapter_for
from elakit.prompt import Prompt, parse

Size = tuple[int, int]

# The recorder at work on a denoiser. Pipelines made of the same components share it, so the denoiser is the key.
_ACTIVE: WeakKeyDictionary[nn.Module, _Recorder] = WeakKeyDictionary()


@contextmanager
def record(pipe: Any, prompt: Prompt | str, spec: RecordSpec | None = None) -> Iterator[Recording]:
    """Record the cross-attention of whatever runs of ``pipe`` happen inside the ``with`` block.

    The picture is the same, bit for bit, as without recording. Kept are the probabilities of the conditional half, in
    float32 softmax, for each call of the denoiser (a step of most schedulers; Heun and PNDM make more calls).

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
        Of a supported family. Call this very object, as you like (size, scheduler, guidance scale, images per
        prompt): it tells which half of a batch is conditional.
    prompt : Prompt or str
        The prompt whose tokens are kept; pass its ``text`` (brackets removed) to the pipeline. Another text in the
        call cannot be noticed and would get this prompt's labels.
    spec : RecordSpec, optional
        What to keep; default: every word, the mean of the heads, all layers and steps.

    Yields
    ------
    Recording
        Grows with the run and is complete at the end of the block. After an error it holds the calls that were
        finished. Several runs in one block follow each other in it, when they have one size and number of images.

    Raises
    ------
    RecordingError
        When the pipeline is being recorded already; when the run would pass the budget (raised at the first call of
        the denoiser, before it computes anything); when the specification asks for what is not there.
    ModelError
        When the pipeline is of an unsupported family.

    Examples
    --------
    >>> import elakit
    >>> pipe = elakit.load("picture-world")
    >>> prompt = elakit.parse("[red car] and [blue bird]", pipe)
    >>> with elakit.record(pipe, prompt) as recording:
    ...     image = pipe(prompt.text, num_inference_steps=3).images[0]
    >>> recording.maps("car", layers="up", size=16).sizes
    Frozen({'step': 3, 'token': 1, 'y': 16, 'x': 16})
    """
    adapter = adapter_for(pipe)
    if adapter.denoiser in _ACTIVE:
        raise RecordingError(
            "This pipeline is being recorded already. Leave the outer `with record(...)` first; passes that are not to "
            "be recorded go inside `with paused(pipe)`."
        )
    recorder = _Recorder(adapter, parse(prompt, pipe), spec or RecordSpec())
    recording = Recording(recorder.tree)
    with ExitStack() as stack:
        stack.callback(lambda: recording.settle(recorder.finish()))
        stack.callback(_ACTIVE.pop, adapter.denoiser, None)
        _ACTIVE[adapter.denoiser] = recorder
        stack.enter_context(tap(recorder.layers, recorder.on_attention))
        for handle in (
            adapter.denoiser.register_forward_pre_hook(recorder.before_call, with_kwargs=True),
            adapter.denoiser.register_forward_hook(recorder.after_call),
        ):
            stack.callback(handle.remove)
        yield recording


@contextmanager
def paused(pipe: Any) -> Iterator[None]:
    """Run the denoiser without recording it, inside a recording or not: for guidance's own passes.

    Paused calls are not counted either, so that a guided run is keyed as a plain one is.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    """
    recorder = _ACTIVE.get(adapter_for(pipe).denoiser)
    if recorder is None:
        yield
        return
    recorder.pauses += 1
    try:
        yield
    finally:
        recorder.pauses -= 1


@dataclass
class _Buffer:
    """Storage of one map size: (steps, images, layers, heads, y, x, tokens), more steps than filled."""

    layers: tuple[str, ...]
    values: np.ndarray


class _Recorder:
    """State of one recording: what the current call has yielded, and the finished calls in buffers."""

    def __init__(self, adapter: StableDiffusion, prompt: Prompt, spec: RecordSpec) -> None:
        self.adapter = adapter
        self.prompt = prompt
        self.spec = spec
        self.channels = spec.channels(prompt)
        self.layers = select_layers(adapter.layers(), spec.layers)
        self.pauses = 0
        self.calls = 0
        self.expected: int | None = None
        self._steps: list[tuple[int, float, float]] = []  # call, timestep, sigma of each finished call that is kept
        self._shape: tuple[int, Size] | None = None  # images, latent size: fixed by the first call
        self._names: frozenset[str] = frozenset()
        self._step_bytes = 0
        self._capacity = 0
        self._buffers: dict[Size, _Buffer] = {}
        self._counting = False  # inside a call of the pipeline's, not one of a paused pass
        self._rows: slice | None = None  # conditional rows of the call in progress; None: not kept
        self._key = (0, math.nan, math.nan)
        self._pending: dict[Size, list[tuple[AttentionLayer, Tensor]]] = {}

    # -- hooks ---------------------------------------------------------------------------------------------------

    def before_call(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._counting, self._rows = False, None
        self._pending.clear()
        if self.pauses:
            return
        sample = args[0] if args else kwargs["sample"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        if kwargs.get("encoder_attention_mask") is not None:
            raise RecordingError("This run masks text positions (encoder_attention_mask); that is not recorded yet.")
        rows = self.adapter.conditional_rows(sample.shape[0])
        shape = (rows.stop - rows.start, (sample.shape[-2], sample.shape[-1]))
        if self._shape is None:
            self._begin(*shape)
        elif shape != self._shape:
            raise RecordingError(
                f"The recording began with {_shape_text(*self._shape)}, and this call has {_shape_text(*shape)}. "
                "Record runs of different shape each in a block of its own."
            )
        self._counting = True
        if self.spec.keeps(self.calls, self.expected):
            if len(self._steps) == self._capacity:
                self._grow()
            moment = float(torch.as_tensor(timestep).flatten()[0])
            self._key = (self.calls, moment, _sigma(self.adapter.pipe.scheduler, moment))
            self._rows = rows

    def on_attention(self, layer: AttentionLayer, query: Tensor, key: Tensor, size: Size) -> None:
        if self._rows is None or layer.name not in self._names:
            return
        with torch.no_grad():
            kept = probabilities(layer, query[self._rows], key[self._rows])  # (images, heads, h*w, text)
            if self.spec.heads == "mean":
                kept = kept.mean(1, keepdim=True)
            kept = self.channels.gather(kept).unflatten(2, size)
        self._pending.setdefault(size, []).append((layer, kept))

    def after_call(self, *_: Any) -> None:
        if self._rows is not None:
            self._commit()
        self.calls += self._counting
        self._counting, self._rows = False, None

    # -- storage -------------------------------------------------------------------------------------------------

    def _begin(self, images: int, latent: Size) -> None:
        """Plan at the first call, before the denoiser computes anything."""
        self.expected = _expected_calls(self.adapter.pipe)
        kept = sum(self.spec.keeps(call, self.expected) for call in range(self.expected or 1))
        plan = self.spec.plan_layers(self.adapter.layers(), self.prompt, latent, max(kept, 1), images)
        self._step_bytes = plan.bytes // plan.steps
        self._names = frozenset(name for resolution in plan.resolutions for name in resolution.layers)
        self._capacity = kept if self.expected else min(8, self.spec.budget // self._step_bytes)
        self._shape = (images, latent)

    def _grow(self) -> None:
        """Double the buffers of a run that is longer than expected, as far as the budget goes."""
        capacity = min(max(8, 2 * self._capacity), self.spec.budget // self._step_bytes)
        if capacity <= self._capacity:
            raise RecordingError(
                f"Call {self.calls} would take the recording to "
                f"{readable_bytes((self._capacity + 1) * self._step_bytes)}, past its budget of "
                f"{readable_bytes(self.spec.budget)}. Raise RecordSpec(budget=...), or keep fewer steps, layers or "
                "tokens."
            )
        for buffer in self._buffers.values():
            longer = np.empty((capacity, *buffer.values.shape[1:]), buffer.values.dtype)
            longer[: len(self._steps)] = buffer.values[: len(self._steps)]
            buffer.values = longer
        self._capacity = capacity

    def _commit(self) -> None:
        seen = {layer.name for members in self._pending.values() for layer, _ in members}
        if seen != self._names:
            raise RecordingError(
                f"Layers that were to be recorded did not run as expected: {', '.join(sorted(self._names - seen))}. "
                "Load LoRA weights, fuse or replace parts of the pipeline before the recording, not inside it."
            )
        for size, members in self._pending.items():
            step = torch.stack([kept for _, kept in members], dim=1)  # (images, layers, heads, h, w, tokens)
            if size not in self._buffers:
                values = np.empty((self._capacity, *step.shape), self.spec.dtype)
                self._buffers[size] = _Buffer(tuple(layer.name for layer, _ in members), values)
            self._buffers[size].values[len(self._steps)] = step.cpu().numpy()
        self._pending.clear()
        self._steps.append(self._key)  # last: an interrupt above leaves the recording at the step before

    def tree(self) -> xr.DataTree:
        """The finished calls; a view of the buffers while the run goes on."""
        n = len(self._steps)
        order = [layer.name for layer in self.adapter.layers()]
        places = {layer.name: layer.place for layer in self.adapter.layers()}
        nodes = {
            size_name(size): build_node(
                buffer.values[:n],
                steps=self._steps,
                layers=[(name, places[name], order.index(name)) for name in buffer.layers],
                tokens=list(zip(self.channels.labels, self.channels.indices, strict=True)),
                heads=self.spec.heads,
            )
            for size, buffer in self._buffers.items()
            if n
        }
        return build_tree(
            nodes,
            prompt=self.prompt,
            family=self.adapter.family,
            model=type(self.adapter.pipe).__name__,
            calls=self.calls,
            expected=self.expected,
        )

    def finish(self) -> xr.DataTree:
        """The finished calls for good, without the room that a run cut off did not fill."""
        n = len(self._steps)
        for buffer in self._buffers.values():
            if n < len(buffer.values):
                buffer.values = buffer.values[:n].copy()
        return self.tree()


def _shape_text(images: int, latent: Size) -> str:
    return f"{images} image{'s' * (images > 1)} of {size_name(latent)} latents"


def _expected_calls(pipe: Any) -> int | None:
    """Denoiser calls of the run that begins, known once its timesteps are set; None when nothing tells."""
    timesteps = getattr(pipe.scheduler, "timesteps", None)
    if timesteps is None or len(timesteps) == 0 or getattr(pipe.scheduler, "num_inference_steps", 0) is None:
        return None
    # Image-to-image runs take only the last of the scheduler's timesteps; pipelines count theirs in `num_timesteps`.
    own = getattr(pipe, "num_timesteps", None)
    return own if isinstance(own, int) and 0 < own <= len(timesteps) else len(timesteps)


def _sigma(scheduler: Any, timestep: float) -> float:
    """Noise level of the call; nan for schedulers that do not have any (DDIM, PNDM)."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        return math.nan
    index = getattr(scheduler, "step_index", None)
    if index is None:  # some schedulers settle it only in their first step
        index = getattr(scheduler, "begin_index", None)
    if index is None:
        places = (scheduler.timesteps == timestep).nonzero()
        if len(places) == 0:
            return math.nan
        index = int(places[0])
    if hasattr(scheduler, "sigmas_interpol") and not scheduler.state_in_first_order:
        sigmas = scheduler.sigmas_interpol  # the second call of KDPM2's steps
    return float(sigmas[index])
