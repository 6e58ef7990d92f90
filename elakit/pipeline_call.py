"""One call of a pipeline: prepared from a checked request, recorded and guided step by step, and collected as runs."""

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
    """State of a run after one of its steps, which `generate` passes to ``stop_if`` and ``guide_if``.

    Attributes
    ----------
    step : int
        Number of the step that has just ended, counted from 0.
    steps : int
        Number of steps of the whole run.
    latents : torch.Tensor
        Latents in the pipeline's format, one row per image.
    runs : callable
        ``runs()`` returns the runs in their present state, as a list of one `Run` per image. The images are decoded
        from the latents, which are noisy before the end; recordings and traces contain the steps so far. Measures,
        regions, figures and features can be computed from these runs as from finished ones. With
        ``runs(decode=False)``, the VAE decoder is not called, and the images are blank. With ``runs(predicted=True)``,
        the images are decoded from the clean latents that the step predicts, and show what the final image will be
        like; if the scheduler's prediction type is unknown, they are decoded from the latents themselves.
    states : sequence
        State of the guidance method for each image, as the method's ``begin`` returned it; empty for a plain run. With
        ELA, each state is an `elakit.guidance.Anchors`, whose method ``steer(regions)`` sets the regions for the
        following steps.
    """

    step: int
    steps: int
    latents: Tensor
    runs: Callable[..., list[Run]]
    states: Sequence[Any] = ()


GuideIf = Callable[[Progress], bool | Sequence[bool] | None]


class _Stopped(Exception):
    """Raised to end a pipeline's call after the step at which ``stop_if`` returned True."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress


class _Rehearsed(Exception):
    """Raised to end the plain steps that `_rehearse` runs."""


@dataclass(frozen=True, eq=False)
class Request:
    """Arguments of `generate` after their checks, with the model's default steps and guidance scale filled in.

    Two fields are not arguments of `generate`: ``adapter`` is the adapter of the pipeline, and ``takes_image`` is True
    if the pipeline's call requires an image or was given one. ``seeds`` has all seeds, also if there is only one.
    ``record`` is None if nothing is recorded. ``predicted`` is True if the image that each step predicts is kept.
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
    """One call of a pipeline: prepared from a request, then run, then collected as runs.

    Attributes
    ----------
    request : Request
    prompt : Prompt
    height, width : int
        Requested size of the image in pixels, by default the model's. If the call takes an input image, the result may
        have the size of that image instead.
    settings : dict
        `Run.settings` so far.
    arguments : dict
        Arguments of the pipeline's call.
    guide : Guide or None
        Guidance; None for a plain run.
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
        """Call the pipeline, with the recording and the guidance of the request.

        Returns
        -------
        images : sequence of PIL.Image.Image
            One image per seed.
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
        """Let the guidance method observe some plain steps if it needs them, and change the initial noise.

        The plain steps start from the noise of the run; the run itself then starts again from its first step. The noise
        is not changed if the request has ``guide_if``.
        """
        if guide.rehearse(lambda enough: _rehearse(self.pipe, self.arguments, self.generators, enough)):
            self.adapter.set_timesteps(self.request.steps, self.height, self.width)  # the run starts again
        if self.request.guide_if is None:
            first = self.pipe.scheduler.timesteps[0]
            self.arguments["latents"] = guide.start(self.arguments["latents"], self._noise_scale, first)

    def _after_step(self, step: int, latents: Tensor) -> Tensor:
        """Pass the progress to ``stop_if`` and ``guide_if``, and return the latents, which guidance may have moved."""
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
        """Finished runs, from the images and flags that `run` returned.

        If the request has ``guide_if``, ``settings["guided"]`` of each run is the decision for its image.
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
    """Run plain steps until ``enough(step)`` returns True, then restore the states of the random generators.

    A guidance method observes these steps before the run, which starts again from the same noise.
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
            f"guide_if gave {number_of(len(answers), 'answer')} for {number_of(images, 'image')}; give True, False, or "
            "one answer per image."
        )
    return answers
