"""Recording attention while a pipeline runs: one context manager around the user's own call."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import xarray as xr
from torch import Tensor, nn

from elakit.attention.recording import Recording
from elakit.attention.spec import Plan, RecordSpec, select_layers, size_name
from elakit.attention.store import (
    SELF,
    Layout,
    Memory,
    Moment,
    RunningMean,
    Sink,
    Size,
    Slots,
    Staging,
    ZarrStore,
    build_tree,
    free_path,
    open_tree,
    save_tree,
)
from elakit.attention.taps import Attend, leave_alone, tap
from elakit.errors import ModelError, RecordingError, SettingError
from elakit.models import Adapter, AttentionLayer, adapter_for
from elakit.prompt import Prompt, parse

# The recorder at work on a denoiser. Pipelines made of the same components share it, so the denoiser is the key.
_ACTIVE: WeakKeyDictionary[nn.Module, _Recorder] = WeakKeyDictionary()


@contextmanager
def record(
    pipe: Any, prompt: Prompt | str, spec: RecordSpec | None = None, store: str | Path | None = None
) -> Iterator[Recording]:
    """Record the cross-attention of whatever runs of ``pipe`` happen inside the ``with`` block.

    The image is the same, bit for bit, as without recording. Kept are the probabilities of the conditional half, in
    float32 softmax, for each call of the denoiser (a step of most schedulers; Heun and PNDM make more calls).

    Each layer's maps are brought down to the chosen tokens and heads where they are computed, into one buffer that is
    as large as a step; from an accelerator it goes to the host in one copy a step, which nothing waits for.

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
    store : str or pathlib.Path, optional
        Folder of a Zarr store to write each step to when it is finished, instead of keeping it in memory. It must not
        be there yet, and appears with the first step; a run that is killed leaves the steps before in it, for
        `open_recording` or any reader of Zarr. With ``spec.accumulate`` it is written at the end.

    Yields
    ------
    Recording
        Grows with the run and is complete at the end of the block. After an error it holds the calls that were
        finished. Several runs in one block follow each other in it, when they have one size and number of images.
        With a store its values stay on disk until they are used.

    Raises
    ------
    RecordingError
        When the pipeline is being recorded already; when the run would pass the budget (raised at the first call of
        the denoiser, before it computes anything); when the specification asks for what is not there.
    ModelError
        When the pipeline is of an unsupported family.
    OutputError
        When the store cannot be written: its path is taken, or the disk is full.

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
    spec = spec or RecordSpec()
    if store is not None and spec.device == "model":
        raise SettingError(
            "RecordSpec(device='model') keeps everything on the model's device until the run is over, but a store is "
            "written as the run goes. Leave one of them out."
        )
    recorder = _Recorder(adapter, parse(prompt, pipe), spec, None if store is None else free_path(store))
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
    """Run the denoiser without recording or editing it, inside a recording or not: for guidance's own passes.

    Paused calls are not counted either, so that a guided run is keyed as a plain one is.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    """
    denoiser = adapter_for(pipe).denoiser
    recorder = _ACTIVE.get(denoiser)
    with leave_alone(denoiser):  # edits look there
        if recorder is None:
            yield
            return
        recorder.pauses += 1
        try:
            yield
        finally:
            recorder.pauses -= 1


class _Recorder:
    """State of one recording: the call in progress, and the sink that takes the finished ones."""

    def __init__(self, adapter: Adapter, prompt: Prompt, spec: RecordSpec, store: Path | None = None) -> None:
        self.adapter = adapter
        self.prompt = prompt
        self.spec = spec
        self.store = store
        self.channels = spec.channels(prompt)
        self.layers = select_layers(adapter.layers(), spec.layers)
        if spec.self_attention is not None:
            try:
                self.layers += adapter.self_layers(self.layers)
            except ModelError as error:
                raise RecordingError(f"self_attention={spec.self_attention} cannot be kept: {error}") from error
        self.pauses = 0
        self.calls = 0
        self.expected: int | None = None
        self._kept = 0  # calls handed to the sink
        self._shape: tuple[int, Size] | None = None  # images, latent size: fixed by the first call
        self._plan: Plan | None = None
        self._planned = 0  # steps to make room for
        self._places: dict[str, tuple[str, int]] = {}  # node of each layer, and its number among those there
        self._shares: dict[str, float] = {}  # of layers of self-attention, which are averaged, in the mean
        self._sink: Sink | None = None
        self._counting = False  # inside a call of the pipeline's, not one of a paused pass
        self._rows: slice | None = None  # conditional rows of the call in progress; None: not kept
        self._moment: Moment = (0, math.nan, math.nan)
        self._slots: Slots | None = None  # where the call in progress puts its values
        self._seen: set[str] = set()

    # -- hooks ---------------------------------------------------------------------------------------------------

    def before_call(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._counting, self._rows, self._slots = False, None, None
        self._seen.clear()
        if self.pauses:
            return
        call = self.adapter.read_call(args, kwargs)
        if not call.conditional:
            return
        rows = self.adapter.conditional_rows(call.batch)
        shape = (rows.stop - rows.start, call.latent)
        if self._shape is None:
            self._begin(*shape)
        elif shape != self._shape:
            raise RecordingError(
                f"The recording began with {_shape_text(*self._shape)}, and this call has {_shape_text(*shape)}. "
                "Record runs of different shape each in a block of its own."
            )
        self._counting = True
        if self.spec.keeps(self.calls, self.expected):
            if self._sink is not None:
                self._sink.reserve(self._kept)
            self._moment = (self.calls, call.timestep, _sigma(self.adapter.pipe.scheduler, call.timestep))
            self._rows = rows

    def on_attention(self, layer: AttentionLayer, attend: Attend, size: Size) -> None:
        if self._rows is None or layer.name not in self._places:
            return
        with torch.no_grad():
            kept = attend(self._rows)  # (images, heads, h*w, text positions or cells)
            share = self._shares.get(layer.name)
            if share is None:
                kept = self.channels.gather(kept)
            if self.spec.heads == "mean" or share is not None:
                kept = kept.mean(1, keepdim=True)
            elif self.spec.wanted_heads is not None:
                # One by one: an index would have to be copied to the device.
                kept = torch.stack([kept[:, head] for head in self.spec.wanted_heads], dim=1)
            if self._slots is None:
                self._slots = self._open_sink(kept).slots()
            node, place = self._places[layer.name]
            slot = self._slots[node][:, place]
            kept = kept.unflatten(2, size)
            if kept.shape != slot.shape:
                raise RecordingError(
                    f"Layer {layer.name} has maps (image, head, y, x, token) of {tuple(kept.shape)}, but "
                    f"{tuple(slot.shape)} were planned from {_shape_text(*self._shape or (0, size))}. Leave it out "
                    "with RecordSpec(layers=...), and please report it."
                )
            if share is None:
                slot.copy_(kept)
            elif self._shares.keys() & self._seen:
                slot.add_(kept * share)
            else:
                slot.copy_(kept * share)
        self._seen.add(layer.name)

    def after_call(self, *_: Any) -> None:
        if self._rows is not None:
            self._commit()
        self.calls += self._counting
        self._counting, self._rows, self._slots = False, None, None

    # -- storage -------------------------------------------------------------------------------------------------

    def _begin(self, images: int, latent: Size) -> None:
        """Plan at the first call, before the denoiser computes anything."""
        self.expected = _expected_calls(self.adapter.pipe)
        kept = sum(self.spec.keeps(call, self.expected) for call in range(self.expected or 1))
        plan = self.spec.plan_layers(self.adapter.layers(), self.prompt, latent, max(kept, 1), images)
        self._places = {
            name: (size_name(resolution.size), place)
            for resolution in plan.resolutions
            if not resolution.of_self
            for place, name in enumerate(resolution.layers)
        }
        for resolution in plan.resolutions:
            if resolution.of_self:
                beside = [layer for layer in self.adapter.layers() if layer.name in resolution.layers]
                names = [layer.name for layer in self.adapter.self_layers(beside)]
                self._shares = dict.fromkeys(names, 1 / len(names))
                self._places |= dict.fromkeys(names, (SELF + size_name(resolution.size), 0))
        self._planned = kept if self.expected else min(8, self.spec.budget // plan.step_bytes)
        self._plan = plan
        self._shape = (images, latent)

    def _open_sink(self, kept: Tensor) -> Sink:
        """The sink, made when the first values tell on which device they are."""
        if self._sink is None:
            assert self._plan is not None
            layout = self._layout(self._plan)
            most = self.spec.budget // self._plan.step_bytes
            host = torch.device("cpu")
            sink: Sink
            if self.spec.accumulate:
                sink = RunningMean(layout, kept.device)
            elif self.spec.device == "model":
                sink = Memory(layout, self._planned, most, kept.device)
            else:
                sink = ZarrStore(layout, self.store, most) if self.store else Memory(layout, self._planned, most, host)
                sink = sink if kept.device == host else Staging(sink, kept.device)
            sink.reserve(self._kept)
            self._sink = sink
        return self._sink

    def _layout(self, plan: Plan) -> Layout:
        layers = self.adapter.layers()
        about = {layer.name: (layer.name, layer.place, order) for order, layer in enumerate(layers)}
        shapes: dict[str, tuple[int, ...]] = {}
        named: dict[str, list[tuple[str, str, int]]] = {}
        tokens: dict[str, list[tuple[str, int]]] = {}
        for each in plan.resolutions:
            rows, columns = each.size
            if each.of_self:
                node = SELF + size_name(each.size)
                shapes[node] = (plan.images, 1, 1, rows, columns, rows * columns)
                named[node] = [("mean", "mean", 0)]
                tokens[node] = [(f"{i // columns},{i % columns}", i) for i in range(rows * columns)]
            else:
                node = size_name(each.size)
                shapes[node] = (plan.images, len(each.layers), each.heads, rows, columns, len(plan.tokens))
                named[node] = [about[name] for name in each.layers]
                tokens[node] = list(zip(self.channels.labels, self.channels.indices, strict=True))
        return Layout(
            shapes=shapes,
            layers=named,
            tokens=tokens,
            heads=self.spec.wanted_heads or str(self.spec.heads),
            dtype=getattr(torch, self.spec.dtype),
            about=self._about(),
        )

    def _about(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "family": self.adapter.family,
            "model": type(self.adapter.pipe).__name__,
            "expected": self.expected,
        }

    def _commit(self) -> None:
        if missing := self._places.keys() - self._seen:
            raise RecordingError(
                f"Layers that were to be recorded did not run as expected: {', '.join(sorted(missing))}. "
                "Load LoRA weights, fuse or replace parts of the pipeline before the recording, not inside it."
            )
        assert self._sink is not None
        self._sink.commit(self._moment)
        self._kept += 1

    def tree(self) -> xr.DataTree:
        """The finished calls so far."""
        return self._empty() if self._sink is None else self._sink.tree(self.calls)

    def finish(self) -> xr.DataTree:
        """The finished calls for good."""
        sink, self._slots = self._sink, None
        if self.store is None or isinstance(sink, (ZarrStore, Staging)):
            return self._empty() if sink is None else sink.finish(self.calls)
        # A mean, or nothing at all: written only now.
        tree = self._empty() if sink is None else sink.finish(self.calls)
        return open_tree(save_tree(tree, self.store, overwrite=False))

    def _empty(self) -> xr.DataTree:
        return build_tree({}, calls=self.calls, **self._about())


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
