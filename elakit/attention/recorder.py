"""Recording attention while a pipeline runs: one context manager around the user's own call."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import xarray as xr
from PIL import Image
from torch import Tensor, nn

from elakit.attention.hooks import Hooks, leave_alone
from elakit.attention.layout import Layout, Moment, NodeLayout, Size, Slots, build_tree, location_labels, node_name
from elakit.attention.recording import Recording
from elakit.attention.running import SeenCall, Watch
from elakit.attention.sinks import Memory, RunningMean, Sink, Staging
from elakit.attention.spec import Plan, RecordSpec, Resolution, select_layers, size_name
from elakit.attention.taps import Attend, tap
from elakit.attention.zarr_store import ZarrStore, free_path, open_tree, save_tree
from elakit.checks import seed as seed_of
from elakit.checks import whole_number
from elakit.errors import ModelError, RecordingError, SettingError
from elakit.models import Adapter, AttentionLayer, adapter_for
from elakit.numbering import number_of, plural
from elakit.pipeline import Pipeline, SupportedPipeline
from elakit.prompt import Prompt, parse

# The active recorder of each denoiser. Pipelines made of the same components share it, so the denoiser is the key.
_ACTIVE: WeakKeyDictionary[nn.Module, _Recorder] = WeakKeyDictionary()


@contextmanager
def record(
    pipe: Pipeline, prompt: Prompt | str, spec: RecordSpec | None = None, store: str | Path | None = None
) -> Iterator[Recording]:
    """Record the cross-attention of the runs of ``pipe`` inside the ``with`` block.

    The image is the same, bit for bit, as without recording. Attention is recorded in every denoiser call. Most
    schedulers make one denoiser call per step; Heun and PNDM make more. In the rows of the batch that see the prompt,
    the attention probabilities are computed in float32. With classifier-free guidance, these rows are the conditional
    half. ``spec`` selects the probabilities to keep.

    The recording contains the attention that the denoiser computes in the run, with its attention masks and LoRA
    weights. Runs of another pipeline with the same denoiser (`AutoPipelineForImage2Image.from_pipe(pipe)`) and
    denoising loops of your own are recorded, too. Runs in other threads, and runs that a callback starts inside a run,
    are not recorded.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
        Pipeline of a supported family. Call it with any arguments (size, scheduler, guidance scale, images per prompt).
    prompt : Prompt or str
        The prompt whose tokens are kept. Pass its ``text`` (brackets removed) to the pipeline.
    spec : RecordSpec, optional
        Selection of what is kept. Default: ``RecordSpec()``, which keeps every word, the mean of the heads, and all
        layers and steps.
    store : str or pathlib.Path, optional
        Folder of a Zarr store. Each step is written to the store as soon as it is finished, instead of being kept in
        memory. The folder must not exist; it is created with the first step. If the run is killed, the store contains
        the steps that had been written. `open_recording` or any other Zarr reader can read them. With
        ``spec.accumulate``, only the mean over the steps is written, at the end of the block.

    Yields
    ------
    Recording
        The recording, which grows with the run and is complete at the end of the block. After an error, the recording
        contains the denoiser calls that were finished. If the block contains several runs, their steps follow each
        other along ``step``. The runs must have the same image size and number of images. With ``store``, the values
        stay on disk until they are used.

    Raises
    ------
    RecordingError
        Raised in these cases:

        * The pipeline is already being recorded.
        * ``spec`` selects words, layers, heads or map sizes that do not exist.
        * The recording would exceed the memory limit ``spec.budget``. This is checked at the first denoiser call.
        * The run has a prompt other than ``prompt``, or several prompts.
        * The size or number of images differs from that of an earlier run in the block.
        * The denoiser has a cache, merged tokens (ToMe), or an attention processor that is not from diffusers.
        * Parts of the denoiser are replaced inside the block.
    SettingError
        Raised when a store is given together with ``RecordSpec(device="model")``.
    PromptError
        Raised when the prompt cannot be parsed.
    ModelError
        Raised when the pipeline's family is not supported.
    OutputError
        Raised when the store cannot be written: its path exists, or the disk is full.

    Notes
    -----
    On the model's device, the maps of each layer are reduced to the selected tokens and heads, and are written to a
    buffer for one step. If this device is an accelerator, the buffer is copied to the host once per step. The run does
    not wait for the copy.

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
    spec = spec or RecordSpec()
    if store is not None and spec.device == "model":
        raise SettingError(
            "RecordSpec(device='model') keeps everything on the model's device until the run is over, but a store is "
            "written during the run. Leave out device='model', or the argument `store`."
        )
    with _recorded(_Recorder(adapter, parse(prompt, pipe), spec, None if store is None else free_path(store))) as found:
        yield found


@torch.no_grad()
def record_image(
    pipe: Pipeline,
    prompt: Prompt | str,
    image: Image.Image,
    *,
    at: Sequence[int] = (5, 10, 15, 20),
    steps: int = 25,
    seed: int = 0,
    spec: RecordSpec | None = None,
) -> Recording:
    """Record attention for an existing image, without generating it.

    For each chosen step, noise is added to the image at the noise level of the step, and the denoiser runs once.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
        Pipeline of a supported family that `elakit.generate` can run.
    prompt : Prompt or str
        Description of the image.
    image : PIL.Image.Image
        Image to record. Its height and width must be multiples of a number that depends on the model. The error message
        names this number. The size should be one that the model was trained on.
    at : sequence of int
        The chosen steps of the schedule, counted from 0. Early steps have more noise.
    steps : int
        Number of steps in the schedule.
    seed : int
        Seed of the noise. The same noise is used at all steps, scaled to the noise level of each step.
    spec : RecordSpec, optional
        Selection of what is kept. Default: ``RecordSpec()``, which keeps every word, the mean of the heads, and all
        layers and steps.

    Returns
    -------
    Recording
        The recording has one denoiser call per element of ``at``, in the same order. Its ``step=i`` has the timestep of
        step ``at[i]`` of the schedule.

    Raises
    ------
    SettingError
        Raised when a step is outside the schedule, or the height or width of the image is not allowed.
    RecordingError, PromptError
        Raised for the reasons listed in `record`.
    ModelError
        Raised when the pipeline's family is not supported, or when elakit cannot encode prompts or images for it.

    References
    ----------
    Helbling et al., "ConceptAttention: diffusion transformers learn highly interpretable features" (ICML 2025). This
    paper reads existing images in the same way.

    Examples
    --------
    Generate an image in 4 steps, and record it at steps 2 and 3 of the schedule, counted from 0:

    >>> import elakit
    >>> pipe = elakit.load("picture-world")
    >>> run = elakit.generate(pipe, "a [red car]", steps=4, progress=False)
    >>> again = elakit.attention.record_image(pipe, "a [red car]", run.image, at=[2, 3], steps=4)
    >>> again.maps("car").sizes["step"]
    2
    """
    adapter = adapter_for(pipe)
    steps = whole_number(steps, "steps", 1)
    wanted = [whole_number(step, "at", 0, steps - 1) for step in at]
    width, height = image.size
    adapter.latent_size(height, width)
    text = parse(prompt, pipe)
    conditioning = adapter.encode(text.text, guided=False, size=(height, width))
    clean = adapter.encode_image(image)
    noise = adapter.noise(torch.Generator("cpu").manual_seed(seed_of(seed)), height, width)
    adapter.set_timesteps(steps, height, width)
    scheduler = adapter.pipe.scheduler
    recorder = _Recorder(adapter, text, spec or RecordSpec(), calls=len(wanted))
    recorder.watch.loop_sees_prompt = True
    with _recorded(recorder) as recording:
        for step in wanted:
            timestep = scheduler.timesteps[step]
            if hasattr(scheduler, "scale_noise"):  # flow matching
                noised = scheduler.scale_noise(clean.to(noise), timestep[None], noise)
            else:
                noised = scheduler.add_noise(clean.to(noise), noise, timestep[None])
                scheduler._step_index = None  # schedulers with a state would count on from the last step
                noised = scheduler.scale_model_input(noised, timestep)
            adapter.denoise(noised, timestep, conditioning)
    adapter.set_timesteps(steps, height, width)
    return recording


@contextmanager
def _recorded(recorder: _Recorder) -> Iterator[Recording]:
    """Connect ``recorder`` to its denoiser inside the ``with`` block, and yield the recording."""
    denoiser = recorder.adapter.denoiser
    if denoiser in _ACTIVE:
        raise RecordingError(
            "This pipeline is already being recorded. Exit the outer `with record(...)` block first. To run the "
            "pipeline inside that block without recording it, use `with elakit.attention.paused(pipe):`."
        )
    recording = Recording(recorder.tree)
    with ExitStack() as stack:
        stack.callback(lambda: recording.settle(recorder.finish()))
        stack.callback(_ACTIVE.pop, denoiser, None)
        _ACTIVE[denoiser] = recorder
        hooks = stack.enter_context(Hooks())
        stack.enter_context(tap(recorder.layers, recorder.on_attention))
        hooks.before(denoiser, recorder.before_call)
        hooks.after(denoiser, recorder.after_call)
        yield recording


@contextmanager
def paused(pipe: Pipeline) -> Iterator[None]:
    """Make recording and edits ignore the denoiser's passes inside the ``with`` block.

    Use the block for passes of your own, for example those of a guidance method. These passes are not counted, so a
    guided run has the same call numbers as a plain run.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
        Pipeline whose denoiser is recorded or edited.

    Raises
    ------
    ModelError
        Raised when the pipeline's family is not supported.

    Examples
    --------
    The run inside `paused` is not recorded; the run after it is recorded, with 2 steps:

    >>> import elakit
    >>> pipe = elakit.load("picture-world")
    >>> prompt = elakit.parse("a [red car]", pipe)
    >>> with elakit.record(pipe, prompt) as recording:
    ...     with paused(pipe):
    ...         other = pipe("a blue bird", num_inference_steps=1)
    ...     image = pipe(prompt.text, num_inference_steps=2).images[0]
    >>> len(recording.steps)
    2
    """
    with leave_alone(adapter_for(pipe).denoiser):
        yield


class _Recorder:
    """State of one recording: the denoiser call in progress, and the sink, which stores the finished calls.

    ``store`` is the folder of a Zarr store, or None. ``calls`` is the number of denoiser calls to expect; None if the
    scheduler's timesteps determine it.
    """

    def __init__(
        self,
        adapter: Adapter,
        prompt: Prompt,
        spec: RecordSpec,
        store: Path | None = None,
        calls: int | None = None,  # number of calls, if it is not that of the scheduler's timesteps
    ) -> None:
        self.adapter = adapter
        self.prompt = prompt
        self.spec = spec
        self.store = store
        self.channels = spec.channels(prompt)
        self.watch = Watch(adapter, prompt)
        self.layers = select_layers(adapter.layers(), spec.layers)
        if spec.own is not None:
            beside = select_layers(adapter.layers(), spec.own.layers or spec.layers)
            try:
                self.layers += adapter.self_layers(beside)
            except ModelError as error:
                raise RecordingError(f"self_attention={spec.own.size} cannot be recorded: {error}") from error
        self.calls = 0
        self.expected = calls
        self._kept = 0  # calls handed to the sink
        self._shape: tuple[int, int, Size] | None = None  # images, frames, latent size: fixed by the first call
        self._plan: Plan | None = None
        self._planned = 0  # steps to make room for
        self._places: dict[tuple[str, str], tuple[str, int]] = {}  # (reads, layer): its node and its index there
        self._averaged: dict[str, int] = {}  # nodes of self-attention that are a mean, with their number of layers
        self._sink: Sink | None = None
        self._call: SeenCall | None = None  # the call in progress
        self._keeps = False  # whether it is kept
        self._moment: Moment = (0, math.nan, math.nan)
        self._slots: Slots | None = None  # tensors for the values of the call in progress
        self._seen: set[tuple[str, str]] = set()

    # -- hooks ---------------------------------------------------------------------------------------------------

    def before_call(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call, self._keeps, self._slots = None, False, None
        self._seen.clear()
        seen = self.watch.read(args, kwargs)
        if seen is None:
            return
        shape = (seen.rows.stop - seen.rows.start, seen.call.frames, seen.call.latent)
        if self._shape is None:
            self._begin(seen.adapter, *shape)
        elif shape != self._shape:
            raise RecordingError(
                f"The recording began with {_shape_text(*self._shape)}, but this denoiser call has "
                f"{_shape_text(*shape)}. Record runs that differ in size or number of images in separate "
                "`with record(...)` blocks."
            )
        self._call = seen
        self._keeps = self.spec.keeps(self.calls, self.expected)
        if self._keeps:
            if self._sink is not None:
                self._sink.reserve(self._kept)
            timestep = seen.call.timestep
            self._moment = (self.calls, timestep, _sigma(seen.adapter.pipe.scheduler, timestep))

    def on_attention(self, layer: AttentionLayer, attend: Attend, size: Size) -> None:
        key = (layer.reads, layer.name)
        if self._call is None or not self._keeps or key not in self._places:
            return
        own = layer.reads == "image"
        with torch.no_grad():
            kept = attend(self._call.rows)  # (images, heads, h*w, keys)
            if not own:
                kept = self.channels.gather(kept, self._call.text)
            kept = _selected_heads(kept, self.spec.own.heads if own and self.spec.own else self.spec.heads)
            if self._slots is None:
                self._slots = self._open_sink(kept).slots()
            node, place = self._places[key]
            slot = self._slots[node][:, place]
            # The frames of a video follow each other as images do.
            kept = kept.unflatten(2, (max(self._call.call.frames, 1), *size)).movedim(2, 1).flatten(0, 1)
            if kept.shape != slot.shape:
                raise RecordingError(
                    f"Layer {layer.name} has maps of shape {tuple(kept.shape)} (image, head, y, x, token), but for "
                    f"{_shape_text(*self._shape or (0, 0, size))} elakit expected {tuple(slot.shape)}. Leave the layer "
                    "out with RecordSpec(layers=...), and please report this error."
                )
            layers = self._averaged.get(node)
            if layers is None:
                slot.copy_(kept)
            elif any(self._places[other][0] == node for other in self._seen):
                slot.add_(kept / layers)
            else:
                slot.copy_(kept / layers)
        self._seen.add(key)

    def after_call(self, *_: Any) -> None:
        if self._keeps:
            self._commit()
        self.calls += self._call is not None
        self._call, self._keeps, self._slots = None, False, None

    # -- storage -------------------------------------------------------------------------------------------------

    def _begin(self, adapter: Adapter, images: int, frames: int, latent: Size) -> None:
        """Plan the recording at the first denoiser call of the block, before this call computes anything.

        ``images`` is the number of images or videos, ``frames`` the number of frames of each video (0 for images), and
        ``latent`` the height and width of the latent.
        """
        self.expected = self.expected or _expected_calls(adapter.pipe)
        kept = sum(self.spec.keeps(call, self.expected) for call in range(self.expected or 1))
        maps = images * max(frames, 1)
        plan = self.spec.plan_layers(self.adapter.layers(), self.prompt, latent, max(kept, 1), maps)
        for resolution in plan.resolutions:
            node = node_name(resolution.size, resolution.keys)
            for place, layer in enumerate(self._layers_of(resolution)):
                self._places[layer.reads, layer.name] = (node, 0 if resolution.averaged else place)
            if resolution.averaged:
                self._averaged[node] = len(resolution.layers)
        self._planned = kept if self.expected else min(8, self.spec.budget // plan.step_bytes)
        self._plan = plan
        self._shape = (images, frames, latent)

    def _layers_of(self, resolution: Resolution) -> list[AttentionLayer]:
        layers = [layer for layer in self.adapter.layers() if layer.name in resolution.layers]
        return list(self.adapter.self_layers(layers)) if resolution.keys == "image" else layers

    def _open_sink(self, kept: Tensor) -> Sink:
        """Return the sink, the object that stores the values of finished denoiser calls.

        If there is no sink yet, it is created for the device of ``kept``, which are the first values to store.
        """
        if self._sink is None:
            assert self._plan is not None
            layout = self._layout(self._plan)
            limit = self.spec.budget // self._plan.step_bytes
            host = torch.device("cpu")
            sink: Sink
            if self.spec.accumulate:
                sink = RunningMean(layout, kept.device)
            elif self.spec.device == "model":
                sink = Memory(layout, self._planned, limit, kept.device)
            else:
                sink = (
                    ZarrStore(layout, self.store, limit) if self.store else Memory(layout, self._planned, limit, host)
                )
                sink = sink if kept.device == host else Staging(sink, kept.device)
            sink.reserve(self._kept)
            self._sink = sink
        return self._sink

    def _layout(self, plan: Plan) -> Layout:
        order = {layer.name: number for number, layer in enumerate(self.adapter.layers())}
        nodes = {}
        for each in plan.resolutions:
            rows, columns = each.size
            members = self._layers_of(each)
            layers = [
                (layer.name, str(layer.place), order[beside])
                for layer, beside in zip(members, each.layers, strict=True)
            ]
            own = each.keys == "image"
            tokens = location_labels(each.size) if own else list(zip(*self.channels.named, strict=True))
            heads = self.spec.own.heads if own and self.spec.own else self.spec.heads
            nodes[node_name(each.size, each.keys)] = NodeLayout(
                shape=(plan.images, 1 if each.averaged else len(layers), each.heads, rows, columns, len(tokens)),
                layers=[("mean", "mean", 0)] if each.averaged else layers,
                tokens=tokens,
                heads=heads if isinstance(heads, str) else tuple(heads),
                keys=each.keys,
            )
        return Layout(nodes=nodes, dtype=getattr(torch, self.spec.dtype), about=self._about())

    def _about(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "family": self.adapter.family,
            "model": type(self.adapter.pipe).__name__,
            "expected": self.expected,
            "frames": self._shape[1] if self._shape else 0,
        }

    def _commit(self) -> None:
        if missing := self._places.keys() - self._seen:
            names = sorted({name for _, name in missing})
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise RecordingError(
                f"Some layers that are to be recorded did not run: {', '.join(names[:3])}{more}. Do not change "
                "the pipeline inside the `with record(...)` block. Load LoRA weights, replace parts and disable caches "
                "before it."
            )
        assert self._sink is not None
        self._sink.commit(self._moment)
        self._kept += 1

    def tree(self) -> xr.DataTree:
        """Return the recording's tree with the denoiser calls that are finished so far."""
        return self._empty() if self._sink is None else self._sink.tree(self.calls)

    def finish(self) -> xr.DataTree:
        """Return the recording's tree with all finished denoiser calls.

        If there is a store that does not contain the tree yet, the tree is written to the store. The recorder is not
        used afterwards.
        """
        self.watch.close()
        sink, self._slots = self._sink, None
        if self.store is None or isinstance(sink, (ZarrStore, Staging)):
            return self._empty() if sink is None else sink.finish(self.calls)
        # A mean, or an empty recording: written only now.
        tree = self._empty() if sink is None else sink.finish(self.calls)
        return open_tree(save_tree(tree, self.store, overwrite=False))

    def _empty(self) -> xr.DataTree:
        return build_tree({}, calls=self.calls, **self._about())


def _selected_heads(probabilities: Tensor, heads: Any) -> Tensor:
    """Reduce probabilities, (images, heads, ...), to the selected heads, or to the mean of all heads."""
    if isinstance(heads, str):
        return probabilities.mean(1, keepdim=True) if heads == "mean" else probabilities
    # One by one: an index would have to be copied to the device.
    return torch.stack([probabilities[:, head] for head in heads], dim=1)


def _shape_text(images: int, frames: int, latent: Size) -> str:
    what = f"{plural('video', images)} of {number_of(frames, 'frame')}" if frames else plural("image", images)
    return f"{images} {what} of {size_name(latent)} latents"


def _expected_calls(pipe: SupportedPipeline) -> int | None:
    """Return the number of denoiser calls of the run that begins, or None if this number is unknown.

    The number is known as soon as the scheduler's timesteps are set.
    """
    timesteps = getattr(pipe.scheduler, "timesteps", None)
    if timesteps is None or len(timesteps) == 0 or getattr(pipe.scheduler, "num_inference_steps", 0) is None:
        return None
    # Image-to-image runs use only the last timesteps of the scheduler; pipelines count theirs in `num_timesteps`.
    own = getattr(pipe, "num_timesteps", None)
    return own if isinstance(own, int) and 0 < own <= len(timesteps) else len(timesteps)


def _sigma(scheduler: Any, timestep: float) -> float:
    """Return the noise level of a denoiser call; nan if the scheduler has no noise levels (DDIM, PNDM)."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        return math.nan
    index = getattr(scheduler, "step_index", None)
    if index is None:  # some schedulers set it only in their first step
        index = getattr(scheduler, "begin_index", None)
    if index is None:
        places = (scheduler.timesteps == timestep).nonzero()
        if len(places) == 0:
            return math.nan
        index = int(places[0])
    if hasattr(scheduler, "sigmas_interpol") and not scheduler.state_in_first_order:
        sigmas = scheduler.sigmas_interpol  # the second call of a step of KDPM2
    return float(sigmas[index])
