"""One call of a pipeline for `elakit.generate`: its preparation, its steps, and the resulting runs."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from elakit import checks
from elakit.attention import Recording, RecordSpec
from elakit.attention import record as recorded
from elakit.errors import SettingError
from elakit.guidance import Guide, Method
from elakit.guidance.clean import Steps, watched_steps
from elakit.guidance.engine import encoded
from elakit.models import Adapter, Conditioning, adapter_for, loaded_with, name_of
from elakit.numbering import number_of
from elakit.pipeline import Pipeline
from elakit.prompt import Prompt, parse
from elakit.run import Run

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Progress:
    """State of a run after one step: the argument of the functions ``stop_if`` and ``guide_if`` of `generate`.

    Attributes
    ----------
    step : int
        Number of the step that has just ended, counted from 0.
    steps : int
        Number of steps of the whole run.
    latents : torch.Tensor
        Latents after this step in the pipeline's format, one row per image.
    runs : callable
        ``runs()`` returns a list with one unfinished `Run` per image. Recordings and traces contain the steps so far.
        Measures, regions and figures can be computed as for finished runs. The images are decoded from the present
        latents, so they are noisy before the last step.

        ``runs(decode=False)`` does not call the VAE decoder, and the images are black. ``runs(predicted=True)`` decodes
        the clean latents that the step predicts, so the images resemble the final images. If the scheduler's prediction
        type is unknown, ``runs(predicted=True)`` decodes the present latents.
    states : sequence
        State of the guidance method for each image, as the method's ``begin`` returned it; empty for a plain run. With
        ELA, each state is an `elakit.guidance.Anchors`. Its method ``steer(regions)`` sets the regions for the
        following steps.
    """

    step: int
    steps: int
    latents: Tensor
    runs: Callable[..., list[Run]]
    states: Sequence[Any] = ()


GuideIf = Callable[[Progress], bool | Sequence[bool] | None]


class _Stopped(Exception):
    """Raised to end a pipeline's call when ``stop_if`` returns True; `progress` is the state at that step."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress


class _Rehearsed(Exception):
    """Raised to end the plain steps that a guidance method observes before the run itself."""


@dataclass(frozen=True, eq=False)
class Request:
    """Checked arguments of `elakit.generate`.

    The model's defaults replace a missing number of steps and a missing guidance scale. ``seeds`` is always a sequence,
    even for a single seed. ``record`` is None if nothing is recorded. ``predicted`` is True if each run keeps the
    images that its steps predict.

    Two fields are not arguments of `elakit.generate`. ``adapter`` is the adapter of the pipeline. ``takes_image`` is
    True if the pipeline's call receives an input image.
    """

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


class PipelineCall:
    """One call of a pipeline: the constructor prepares the call, `run` makes it, and `collect` returns the runs.

    Attributes
    ----------
    request : Request
        Checked arguments of `elakit.generate`.
    prompt : Prompt
        The parsed prompt.
    height, width : int
        Size of the image in pixels that the caller requested, or the model's default size. If the call takes an input
        image, the result may have the size of the input image instead.
    settings : dict
        Settings of the call, which `collect` copies to ``settings`` of each run.
    arguments : dict
        Arguments of the pipeline's ``__call__``.
    guide : Guide or None
        Object that applies the guidance method during the call; None for a plain run.
    """

    def __init__(self, request: Request) -> None:
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
        """Arguments of the pipeline's ``__call__`` by name.

        The argument ``latents`` is the initial noise, sampled from the seeds. If the call takes an input image, this
        argument is absent.
        """
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
        """Call the pipeline, with the recording and the guidance that the request asks for.

        Returns
        -------
        images : sequence of PIL.Image.Image
            One image per seed.
        replaced : sequence of bool or None
            For each image, True if the safety checker replaced it. None if no safety checker was applied.
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
        """Prepare the guidance method: first let it observe plain steps, then let it change the initial noise.

        Some methods observe no plain steps, and some do not change the noise. The plain steps start from the initial
        noise of the run. The run itself then starts at its first step. If the request has ``guide_if``, the noise is
        never changed.
        """
        if guide.rehearse(lambda enough: _rehearse(self.pipe, self.arguments, self.generators, enough)):
            self.adapter.set_timesteps(self.request.steps, self.height, self.width)  # the run starts again
        if self.request.guide_if is None:
            first = self.pipe.scheduler.timesteps[0]
            self.arguments["latents"] = guide.start(self.arguments["latents"], self._noise_scale, first)

    def _after_step(self, step: int, latents: Tensor) -> Tensor:
        """Call ``stop_if`` and ``guide_if`` after a step, and return the latents for the next step.

        Guidance may have moved the returned latents. ``step`` counts from 0.
        """
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
        """Unfinished runs after a step, one per image.

        ``step`` counts from 0, and ``latents`` are the latents after this step. If ``decode`` is False, the images of
        the runs are black. If ``predicted`` is True, the images show the clean latents that the step predicts.
        """
        if decode:
            return self._runs(self._images(step, latents, predicted))
        return self._runs([Image.new("RGB", (self.width, self.height))] * len(self.request.seeds))

    def _images(self, step: int, latents: Tensor, predicted: bool) -> list[Image.Image]:
        """Images decoded after a step: from ``latents``, or from the clean latents that the step predicts.

        If ``predicted`` is True, the clean latents are decoded. If the clean latents are unknown, ``latents`` are
        decoded instead.
        """
        clean = self._watched.predicted(step) if predicted and self._watched is not None else None
        return self.adapter.decode(latents if clean is None else clean.to(latents.dtype), self.height, self.width)

    def _runs(self, images: Sequence[Image.Image], replaced: Sequence[bool] | None = None) -> list[Run]:
        """One run per seed, with the given images and everything that was recorded so far.

        ``replaced`` states for each image whether the safety checker replaced it. None: no image was replaced.
        """
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
        """Finished runs, one per image, from ``images`` and ``replaced``, the results of `run`.

        If the request has ``guide_if``, ``settings["guided"]`` of each run states whether its image was guided.
        """
        runs = self._runs(images, replaced)
        if self.guide is not None and self.request.guide_if is not None:
            for i, run in enumerate(runs):
                run.settings["guided"] = not self._undecided and i not in self.guide.left_alone
        return runs


def _listed(call: Mapping[str, Any]) -> str:
    """Text that lists the arguments in ``call``, which `elakit.generate` passes on to the pipeline.

    An argument whose value is a number, text, True, False or None is listed as "name=value", any other as "name".
    """
    plain = str | int | float | bool | None
    return ", ".join(f"{name}={value!r}" if isinstance(value, plain) else name for name, value in call.items())


def _rehearse(
    pipe: Pipeline, arguments: Mapping[str, Any], generators: Sequence[torch.Generator], enough: Callable[[int], bool]
) -> None:
    """Run plain steps, which a guidance method observes before the run itself.

    The plain steps end when ``enough(step)`` returns True. Then the states of the random generators are restored, so
    that the run itself uses the same random numbers.
    """
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


@contextmanager
def _progress_bar(pipe: Pipeline, shown: bool) -> Iterator[None]:
    """Context in which a pipeline's progress bar is shown or hidden. At its end, the previous setting is restored."""
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
            f"guide_if returned {number_of(len(answers), 'value')} for {number_of(images, 'image')}. Return True or "
            "False for all images, or a list with one value per image."
        )
    return answers
