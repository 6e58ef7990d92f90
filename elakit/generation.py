"""Generation: one call that runs a pipeline, records its attention and, if requested, guides it."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from elakit import checks
from elakit.attention import Recording, RecordSpec
from elakit.attention import record as recorded
from elakit.errors import ModelError, SettingError
from elakit.guidance import Guide, Method
from elakit.guidance.clean import Steps, watched_steps
from elakit.guidance.engine import encoded
from elakit.guidance.metadata import option_values
from elakit.guidance.method import Encodes, NoiseSearch
from elakit.models import Adapter, Conditioning, adapter_for, default_settings, loaded_with, name_of
from elakit.pipeline import Pipeline
from elakit.prompt import Prompt, parse
from elakit.run import Run

_log = logging.getLogger(__name__)

# Arguments of a pipeline's call that `generate` sets.
_OWN = (
    "prompt", "prompt_2", "prompt_3", "prompt_embeds", "pooled_prompt_embeds", "negative_prompt", "negative_prompt_2",
    "negative_prompt_3", "negative_prompt_embeds", "negative_pooled_prompt_embeds", "num_inference_steps",
    "guidance_scale", "height", "width", "latents", "generator", "num_images_per_prompt", "output_type", "return_dict",
    "callback", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Progress:
    """State of a run after one of its steps, which `generate` passes to ``stop_if`` and ``guide_if``.

    Attributes
    ----------
    step : int
        Number of the step that has just ended, counted from 0.
    steps : int
        Number of steps of the whole run.
    latents : torch.Tensor
        Latents in the pipeline's form, one row per image.
    runs : callable
        Function that returns the runs in their present state as a list of `Run`, one per image: ``runs()``. The images
        are decoded from the latents, which are noisy before the end; recordings and traces contain the steps so far.
        Measures, regions, figures and features can be computed from them as from a finished `Run`.
        ``runs(decode=False)`` does not call the VAE decoder, and the images are blank. ``runs(predicted=True)`` decodes
        the clean latents that the step predicts, which show what the image will be; with a scheduler whose prediction
        type is unknown, it decodes the latents themselves.
    states : sequence
        State of the guidance method for each image, as the method's ``begin`` returned it; empty for a plain run. With
        ELA these are `elakit.guidance.Anchors`, and ``anchors.steer(regions)`` sets the regions for the following
        steps.
    """

    step: int
    steps: int
    latents: Tensor
    runs: Callable[..., list[Run]]
    states: Sequence[Any] = ()


GuideIf = Callable[[Progress], bool | Sequence[bool] | None]


class _Stopped(Exception):
    """Ends a pipeline's call after a step."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress


class _Rehearsed(Exception):
    """Ends a rehearsal."""


@overload
def generate(
    pipe: Pipeline,
    prompt: str | Prompt,
    *,
    seed: int = ...,
    steps: int | None = ...,
    guidance_scale: float | None = ...,
    height: int | None = ...,
    width: int | None = ...,
    negative_prompt: str | None = ...,
    guidance: Method | None = ...,
    guide_if: GuideIf | None = ...,
    record: bool | RecordSpec = ...,
    call: Mapping[str, Any] | None = ...,
    stop_if: Callable[[Progress], object] | None = ...,
    predicted: bool = ...,
    progress: bool = ...,
) -> Run: ...
@overload
def generate(
    pipe: Pipeline,
    prompt: str | Prompt,
    *,
    seed: Sequence[int],
    steps: int | None = ...,
    guidance_scale: float | None = ...,
    height: int | None = ...,
    width: int | None = ...,
    negative_prompt: str | None = ...,
    guidance: Method | None = ...,
    guide_if: GuideIf | None = ...,
    record: bool | RecordSpec = ...,
    call: Mapping[str, Any] | None = ...,
    stop_if: Callable[[Progress], object] | None = ...,
    predicted: bool = ...,
    progress: bool = ...,
) -> list[Run]: ...
def generate(
    pipe: Pipeline,
    prompt: str | Prompt,
    *,
    seed: int | Sequence[int] = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    negative_prompt: str | None = None,
    guidance: Method | None = None,
    guide_if: GuideIf | None = None,
    record: bool | RecordSpec = True,
    call: Mapping[str, Any] | None = None,
    stop_if: Callable[[Progress], object] | None = None,
    predicted: bool = False,
    progress: bool = True,
) -> Run | list[Run]:
    """Generate an image, or one image per seed in a batch, with recorded attention and, if requested, guidance.

    The noise depends on the seed alone: a guided run starts from the plain run's noise, and a plain run produces the
    image of ``pipe(prompt, generator=torch.Generator().manual_seed(seed))`` (with PixArt, Sana and HunyuanDiT, without
    resolution binning). In a batch, each image is guided by its own loss; an image of a batch differs from the single
    image only by floating-point rounding.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
        A pipeline from `elakit.load`, or your own. Pipelines that take an image (image-to-image, inpainting,
        ControlNet) receive it through `call`, and cannot be guided.
    prompt : str or Prompt
        Prompt to generate.
    seed : int or sequence of int
        Seed of the initial noise; a sequence generates one image per seed in one batch.
    steps : int, optional
        Number of denoising steps; by default the model's (25 for picture-world, otherwise the pipeline's own default).
    guidance_scale : float, optional
        Classifier-free guidance scale; by default the model's (4 for picture-world). 1 or less switches
        classifier-free guidance off. In guidance-distilled models (FLUX.1) the scale is an input of each pass, and 1
        does not switch guidance off.
    height, width : int, optional
        Size of the image in pixels; by default the model's.
    negative_prompt : str, optional
        Negative prompt for classifier-free guidance; without that, it has no effect. FLUX.1 and FLUX.2 refuse it.
    guidance : Method, optional
        A guidance method, for example ``elakit.ELA()``; None generates without guidance.
    guide_if : callable, optional
        Function that decides which images are guided, such as ``elakit.prediction.load_predictor().guide_if()``. It is
        called with the `Progress` after each step until it returns True, False, or a list with one of these per image;
        None postpones the decision. No image is guided before the decision, and images with the answer False are never
        guided. Default: all images are guided from the start.
    record : bool or RecordSpec
        True records the attention to the prompt's words in every step and layer, averaged over heads; False records
        nothing; a `RecordSpec` selects what is recorded.
    call : mapping, optional
        Further arguments of the pipeline's call, by name: ``{"image": photo, "strength": 0.6}`` for image-to-image.
        They are refused with guidance, whose own passes of the denoiser would not see them.
    stop_if : callable, optional
        Function that is called with the `Progress` after each step, before guidance moves the latents for the next one.
        If it returns True, the run ends: the image is decoded from the latents of that step, and
        ``settings["stopped"]`` is the number of completed steps.
    predicted : bool
        Whether `Run.predicted` keeps the image that each step predicts, for the explorer. This takes one call of the
        VAE decoder per step. Pipelines that take an image refuse it.
    progress : bool
        Whether the pipeline shows its progress bar.

    Returns
    -------
    Run, or list of Run
        A list if `seed` is a sequence.

    Raises
    ------
    SettingError
        Raised when an argument is out of range or of a wrong kind, the pipeline needs an image, or guidance is not
        possible with the pipeline.
    PromptError
        Raised when the prompt cannot be parsed.
    ModelError
        Raised when the pipeline's family is not supported, or supports recording only; with guidance, also when the
        pipeline was loaded within `torch.inference_mode`.
    RecordingError
        Raised when the run cannot be recorded, in the cases of `elakit.record`.

    Warns
    -----
    UserWarning
        Warns when guidance acts at no step, for example because there are too few, and when the pipeline's safety
        checker replaced an image.

    Examples
    --------
    >>> import elakit
    >>> pipe = elakit.load("picture-world")
    >>> run = elakit.generate(pipe, "a [cat] and a [lion]", seed=1, steps=2, progress=False)
    >>> run
    Run('a cat and a lion', seed=1, plain, 2 steps, 128 x 128 pixels, recorded)
    >>> run.regions.dims, bool((run.regions.sum("entity") > 1).any())
    (('step', 'entity', 'y', 'x'), False)
    >>> [r.seed for r in elakit.generate(pipe, "a [cat] and a [lion]", seed=[1, 2], steps=2, progress=False)]
    [1, 2]

    End after two of five steps:

    >>> early = elakit.generate(pipe, "a [cat]", steps=5, stop_if=lambda so_far: so_far.step == 1, progress=False)
    >>> early.settings["stopped"], early.recording.steps
    (2, (0, 1))
    """
    adapter, defaults = adapter_for(pipe), default_settings(pipe)
    seeds = checks.seeds(seed)
    longest = int(getattr(adapter.pipe.scheduler.config, "num_train_timesteps", 1000))
    steps = checks.whole_number(defaults.steps if steps is None else steps, "steps", 1, longest)
    scale = checks.real_number(
        defaults.guidance_scale if guidance_scale is None else guidance_scale, "guidance_scale", 0,
        hint="1 or less switches classifier-free guidance off.",
    )  # fmt: skip
    _check_arguments(negative_prompt, guidance, guide_if, stop_if, record)
    call = _call_arguments(adapter, call, guidance)
    request = _Request(
        adapter=adapter,
        prompt=prompt,
        seeds=seeds,
        steps=steps,
        guidance_scale=scale,
        height=height,
        width=width,
        negative_prompt=negative_prompt,
        guidance=guidance,
        guide_if=guide_if,
        record=record if isinstance(record, RecordSpec) else RecordSpec() if record else None,
        call=call,
        takes_image=_takes_image(adapter, call),
        stop_if=stop_if,
        predicted=checks.boolean(predicted, "predicted"),
        progress=progress,
    )
    _check_possible(request)
    with _normal_mode():
        generation = _Generation(request)
        if generation.guide is not None:
            _warn_if_inactive(generation.guide, steps)
        images, replaced = generation.run()
        runs = generation.collect(images, replaced)
    if hidden := [run.seed for run in runs if run.nsfw]:
        warnings.warn(f"The safety checker replaced the images of seeds {hidden}; they are not judged.", stacklevel=2)
    return runs[0] if checks.is_whole(seed) else runs


@dataclass(frozen=True, eq=False)
class _Request:
    """Arguments of `generate` after their checks, with the model's defaults of steps and scale."""

    adapter: Adapter
    prompt: str | Prompt
    seeds: Sequence[int]
    steps: int
    guidance_scale: float
    height: int | None
    width: int | None
    negative_prompt: str | None
    guidance: Method | None
    guide_if: GuideIf | None
    record: RecordSpec | None
    call: Mapping[str, Any]
    takes_image: bool
    stop_if: Callable[[Progress], object] | None
    predicted: bool
    progress: bool


class _Generation:
    """One call of a pipeline: prepared from a request, then run, then collected as runs.

    Attributes
    ----------
    request : _Request
    prompt : Prompt
    height, width : int
        Size of the image in pixels.
    settings : dict
        `Run.settings` so far.
    arguments : dict
        Arguments of the pipeline's call.
    guide : Guide or None
        Guidance; None for a plain run.
    """

    def __init__(self, request: _Request) -> None:
        self.request, self.adapter, self.pipe = request, request.adapter, request.adapter.pipe
        self.prompt = parse(request.prompt, self.pipe)
        height, width = self.adapter.default_size()
        self.height = checks.whole_number(height if request.height is None else request.height, "height", 1)
        self.width = checks.whole_number(width if request.width is None else request.width, "width", 1)
        latent = self.adapter.latent_size(self.height, self.width)
        conditioning = self.adapter.encode(
            self.prompt.text,
            request.negative_prompt,
            guided=request.guidance_scale > 1,
            size=(self.height, self.width),
            guidance_scale=request.guidance_scale,
        )
        conditioning = encoded(request.guidance, self.adapter, self.prompt, conditioning)
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds]
        self.settings = self._settings()
        self.arguments = self._arguments(conditioning)
        self.guide: Guide | None = None
        if request.guidance is not None:
            self._noise_scale = self.adapter.set_timesteps(request.steps, self.height, self.width)
            self.guide = Guide(self.pipe, request.guidance, self.prompt, conditioning, latent, len(request.seeds))
        self._undecided = request.guide_if is not None
        self._recording: Recording | None = None
        self._watched: Steps | None = None
        self._kept: list[list[Image.Image]] = []  # what each step predicts, one image per seed

    def _settings(self) -> dict[str, Any]:
        request = self.request
        settings = {
            "model": name_of(self.pipe),
            **loaded_with(self.pipe),
            "steps": request.steps,
            "guidance_scale": request.guidance_scale,
            "height": self.height,
            "width": self.width,
            "negative_prompt": request.negative_prompt,
            "scheduler": type(self.pipe.scheduler).__name__,
            "method": request.guidance.name if request.guidance is not None else None,
        }
        return settings | ({"call": _listed(request.call)} if request.call else {})

    def _arguments(self, conditioning: Conditioning) -> dict[str, Any]:
        """Arguments of the pipeline's call, with the noise of the seeds unless the pipeline takes an image."""
        request = self.request
        arguments: dict[str, Any] = {
            "num_inference_steps": request.steps,
            self.adapter.scale_argument: request.guidance_scale,
            "generator": self.generators[0] if len(self.generators) == 1 else self.generators,
            **conditioning.arguments(len(request.seeds)),
            **request.call,
        }
        if request.takes_image:  # its own size is the default
            accepted = inspect.signature(self.pipe.__call__).parameters
            sides = {"height": request.height, "width": request.width}
            return arguments | {name: side for name, side in sides.items() if side is not None and name in accepted}
        noise = torch.cat([self.adapter.noise(generator, self.height, self.width) for generator in self.generators])
        return arguments | {"height": self.height, "width": self.width, "latents": noise}

    def run(self) -> tuple[Sequence[Image.Image], Sequence[bool] | None]:
        """Call the pipeline, recorded and guided.

        Returns
        -------
        images : sequence of PIL.Image.Image
        replaced : sequence of bool or None
            Whether the safety checker replaced each image; None if the pipeline has none.
        """
        request, pipe = self.request, self.pipe
        if self.guide is not None:
            self._start_guidance(self.guide)
        watched = request.predicted or request.stop_if is not None or request.guide_if is not None
        if watched or self.guide is not None:
            self.arguments |= self.adapter.on_step(self._after_step)
        recorder = nullcontext(None) if request.record is None else recorded(pipe, self.prompt, request.record)
        holding = nullcontext() if self.guide is None else self.guide.holding()
        watching = watched_steps(pipe.scheduler) if watched else nullcontext(None)
        _log.info("Generating %r, seeds %s, %s", self.prompt.text, request.seeds, self.settings)
        images: Sequence[Image.Image]
        replaced = None
        with _progress_bar(pipe, request.progress), recorder as self._recording, holding, watching as self._watched:
            try:
                output = pipe(**self.arguments)
                images, replaced = output.images, getattr(output, "nsfw_content_detected", None)
            except _Stopped as stopped:
                self.settings["stopped"] = stopped.progress.step + 1
                images = self.adapter.decode(stopped.progress.latents, self.height, self.width)
                pipe.maybe_free_model_hooks()  # the call's own end was not reached
        if request.takes_image:
            self.settings["width"], self.settings["height"] = images[0].size
        return images, replaced

    def _start_guidance(self, guide: Guide) -> None:
        """Rehearse the first steps for a method that requires it, and move the noise for the first step."""
        if guide.rehearse(lambda enough: _rehearse(self.pipe, self.arguments, self.generators, enough)):
            self.adapter.set_timesteps(self.request.steps, self.height, self.width)  # the run starts again
        if self.request.guide_if is None:
            first = self.pipe.scheduler.timesteps[0]
            self.arguments["latents"] = guide.start(self.arguments["latents"], self._noise_scale, first)

    def _after_step(self, step: int, latents: Tensor) -> Tensor:
        """Pass the progress to ``stop_if`` and ``guide_if``, and move the latents for the next step."""
        request, guide = self.request, self.guide
        if request.predicted:
            self._kept.append(self._images(step, latents, predicted=True))
        so_far = Progress(
            step=step,
            steps=request.steps,
            latents=latents,
            runs=partial(self._present_runs, step, latents),
            states=guide.states if guide else (),
        )
        if request.stop_if is not None and request.stop_if(so_far):
            raise _Stopped(so_far)
        if guide is None:
            return latents
        if self._undecided and request.guide_if is not None and (answer := request.guide_if(so_far)) is not None:
            self._undecided = False
            guide.only(_one_each(answer, len(request.seeds)))
        return latents if self._undecided else guide.on_step_end(step, latents)

    def _present_runs(self, step: int, latents: Tensor, decode: bool = True, predicted: bool = False) -> list[Run]:
        """Runs in their state after a step; see `Progress.runs`."""
        if decode:
            return self._runs(self._images(step, latents, predicted))
        return self._runs([Image.new("RGB", (self.width, self.height))] * len(self.request.seeds))

    def _images(self, step: int, latents: Tensor, predicted: bool) -> list[Image.Image]:
        """Images of the latents after a step, or of the clean latents that the step predicts."""
        clean = self._watched.predicted(step) if predicted and self._watched is not None else None
        return self.adapter.decode(latents if clean is None else clean.to(latents.dtype), self.height, self.width)

    def _runs(self, images: Sequence[Image.Image], replaced: Sequence[bool] | None = None) -> list[Run]:
        """One run per seed, with what has been recorded so far."""
        seeds, recording = self.request.seeds, self._recording
        return [
            Run(
                image=image,
                prompt=self.prompt,
                seed=seed,
                settings=dict(self.settings),
                recording=recording.isel(image=[i]) if recording is not None and len(seeds) > 1 else recording,
                guidance=self.guide.traces[i] if self.guide else None,
                nsfw=bool(replaced and replaced[i]),
                predicted=(
                    tuple(each[i] for each in self._kept)
                    if self.request.predicted and not (replaced and replaced[i])
                    else None
                ),
            )
            for i, (seed, image) in enumerate(zip(seeds, images, strict=True))
        ]

    def collect(self, images: Sequence[Image.Image], replaced: Sequence[bool] | None) -> list[Run]:
        """Finished runs, from the result of `run`; ``settings["guided"]`` is the decision of ``guide_if``."""
        runs = self._runs(images, replaced)
        if self.guide is not None and self.request.guide_if is not None:
            for i, run in enumerate(runs):
                run.settings["guided"] = not self._undecided and i not in self.guide.left_alone
        return runs


def _check_arguments(negative_prompt: Any, guidance: Any, guide_if: Any, stop_if: Any, record: Any) -> None:
    """Refuse arguments of a wrong kind, before anything is computed."""
    if negative_prompt is not None and not isinstance(negative_prompt, str):
        checks.refuse(negative_prompt, "negative_prompt", "text or None")
    if guidance is not None and (
        isinstance(guidance, type) or not all(hasattr(guidance, name) for name in ("loss", "plan", "select"))
    ):
        raise SettingError(f"guidance={guidance!r} is not a guidance method; pass an instance, such as elakit.ELA().")
    for name, function in (("guide_if", guide_if), ("stop_if", stop_if)):
        if function is not None and not callable(function):
            checks.refuse(function, name, "a function that takes an elakit.Progress, or None")
    if guide_if is not None and guidance is None:
        raise SettingError("guide_if selects images to guide, but guidance is None. Give one, such as elakit.ELA().")
    if guide_if is not None and isinstance(guidance, Encodes):
        raise SettingError(
            f"guide_if cannot be used with {type(guidance).__name__}, which changes the text embeddings before the "
            "first step. Leave guide_if out, or use another method, such as elakit.ELA()."
        )
    if not isinstance(record, RecordSpec):
        checks.boolean(record, "record", hint="An elakit.RecordSpec is allowed, too.")


def _takes_image(adapter: Adapter, call: Mapping[str, Any]) -> bool:
    """True for image-to-image, inpainting, ControlNet and similar calls, which require an image or are given one."""
    if "image" not in inspect.signature(adapter.pipe.__call__).parameters:
        return False
    return call.get("image") is not None or not adapter.image_optional


def _call_arguments(adapter: Adapter, call: Mapping[str, Any] | None, guidance: Method | None) -> dict[str, Any]:
    """Check the further arguments of the pipeline's call."""
    kind = type(adapter.pipe).__name__
    if call is not None and not isinstance(call, Mapping):
        checks.refuse(call, "call", 'a dictionary of arguments of the pipeline, such as {"strength": 0.6}')
    call = dict(call or {})
    takes_image = _takes_image(adapter, call)
    if guidance is not None and (call or takes_image):
        raise SettingError(
            f"guidance={guidance.name} is not possible with {kind if takes_image else 'call=...'}: guidance "
            "computes its own passes of the denoiser, which see neither an image nor further arguments. Generate "
            "without guidance, or use a text-to-image pipeline."
        )
    accepted = inspect.signature(adapter.pipe.__call__).parameters
    for name in call:
        if name in _OWN:
            raise SettingError(f"call={{{name!r}: ...}}: elakit.generate sets this itself; use its own arguments.")
        if name not in accepted:
            allowed = [known for known in accepted if known not in (*_OWN, "self", "kwargs")]
            checks.choice(name, "a key of call", allowed)
    if takes_image and call.get("image") is None:
        raise SettingError(
            f'{kind} needs an image: elakit.generate(pipe, prompt, call={{"image": ...}}). To keep full control, call '
            "the pipeline yourself within `with elakit.record(pipe, prompt) as recording:`."
        )
    return call


def _listed(call: Mapping[str, Any]) -> str:
    """Further arguments as text: values of plain ones, names of the others."""
    plain = str | int | float | bool | None
    return ", ".join(f"{name}={value!r}" if isinstance(value, plain) else name for name, value in call.items())


def _check_possible(request: _Request) -> None:
    """Refuse what the pipeline cannot do: predicted images where it takes an image, gradients of inference tensors."""
    pipe = request.adapter.pipe
    if request.predicted and request.takes_image:
        raise SettingError(
            f"predicted=True is not possible with {type(pipe).__name__}, which begins in the middle of its schedule or "
            "takes an image; leave it out, or use a text-to-image pipeline."
        )
    if request.guidance is not None and any(one.is_inference() for one in request.adapter.denoiser.parameters()):
        raise ModelError(
            "Guidance needs gradients, and this pipeline was loaded within torch.inference_mode(). Load it outside."
        )


@contextmanager
def _normal_mode() -> Iterator[None]:
    """Leave `torch.inference_mode`, in which guidance would have no gradient; nothing changes outside of it."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _rehearse(
    pipe: Pipeline, arguments: Mapping[str, Any], generators: Sequence[torch.Generator], enough: Callable[[int], bool]
) -> None:
    """Make the first steps of a plain run, and set the generators back."""
    before = [generator.get_state() for generator in generators]

    def after(step: int, latents: Tensor) -> Tensor:
        if enough(step):
            raise _Rehearsed
        return latents

    try:
        with _progress_bar(pipe, False):
            pipe(**arguments, output_type="latent", **adapter_for(pipe).on_step(after))
    except _Rehearsed:
        pipe.maybe_free_model_hooks()  # the call's own end was not reached
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


def _warn_if_inactive(guide: Guide, steps: int) -> None:
    """Warn when a method acts at no step of a run, as with one or two steps, although none of its switches is 0."""
    acts = any(update.size or update.hold for update in guide.updates) or isinstance(guide.method, NoiseSearch)
    switches = ("step_size", "strength", "guided")
    off = any(name.endswith(switches) and value == 0 for name, value in option_values(guide.method).items())
    if not acts and not off:
        warnings.warn(
            f"{guide.method.name} acts at none of the {steps} steps of this run with {len(guide.prompt.entities)} "
            "entities: the image is the one without guidance. Use more steps, a larger guided share of them, or a "
            "prompt that gives the method something to bind (two entities; for syngen, attributes).",
            stacklevel=3,
        )


@contextmanager
def _progress_bar(pipe: Pipeline, shown: bool) -> Iterator[None]:
    """Switch a pipeline's progress bar on or off, and back afterwards."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": not shown})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def _one_each(answer: bool | Sequence[bool], images: int) -> list[bool]:
    answers = [bool(answer)] * images if isinstance(answer, bool | np.bool_) else [bool(one) for one in answer]
    if len(answers) != images:
        raise SettingError(
            f"guide_if gave {len(answers)} answers for {images} images; give True, False, or one answer per image."
        )
    return answers
