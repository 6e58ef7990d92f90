"""One run: a pipeline, recorded and, if asked, guided; and what is known of it afterwards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pandas as pd
import torch
import xarray as xr
from PIL import Image
from torch import Tensor

from elakit.attention import Recording, RecordSpec, open_recording, record
from elakit.bleeding import Bleeding, measure
from elakit.errors import OutputError, RecordingError, SettingError
from elakit.guidance import FromMaps, Guide, Method, Trace
from elakit.judge import Verdict, judge, knows
from elakit.measures.arrays import nearest_size
from elakit.models import EMBEDDED, adapter_for, default_settings, name_of
from elakit.prompt import Prompt, parse
from elakit.regions import localize_steps


@dataclass
class Run:
    """A finished image with its attention.

    Attributes
    ----------
    image : PIL.Image.Image
    prompt : Prompt
    seed : int
    settings : dict
        steps, guidance_scale, height, width, negative_prompt, model, method (None for a plain run).
    recording : Recording or None
        None when the run was not recorded.
    guidance : Trace or None
        What guidance did; None for a plain run.
    """

    image: Image.Image
    prompt: Prompt
    seed: int
    settings: dict[str, Any]
    recording: Recording | None = None
    guidance: Trace | None = None
    _derived: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def label(self) -> str:
        """Short name of the run: "plain" or the method's."""
        return self.guidance.method if self.guidance else "plain"

    def entity_maps(self) -> xr.DataArray:
        """Raw maps of the entities, (step, token, y, x): what regions and measures are taken from.

        Of the decoder, or of all layers where the model has none (PixArt, Stable Diffusion 3, FLUX).
        """
        return self._maps("entities")

    @cached_property
    def regions(self) -> xr.DataArray:
        """Region of each entity at each step, boolean (step, entity, y, x); they never overlap.

        Localized in the recorded maps, as ``elakit.ELA()`` does (`elakit.guidance.FromMaps` with its defaults). The
        regions that a guided run was anchored to are in ``run.guidance.regions``.
        """
        return localize_steps(self.entity_maps(), self._rest().sum("token"), **FromMaps().rule())

    @cached_property
    def verdict(self) -> Verdict | None:
        """What the judge sees in the image; None where it cannot tell.

        It knows the images of the embedded model, and prompts of that model's nouns and colors. Judge others with
        `elakit.judge.judge` and a detector of your own, and pass what it says to `measure`.
        """
        if self.settings.get("model") not in EMBEDDED or not knows(self.prompt):
            return None
        return judge(self.image, self.prompt)

    @cached_property
    def bleeding(self) -> Bleeding:
        """Measures of bleeding, per step and overall; of a judged image also how attention agrees with it.

        That is ``run.measure(run.verdict)``.
        """
        return self.measure(self.verdict)

    def measure(self, truth: Verdict | xr.DataArray | None = None) -> Bleeding:
        """Measure bleeding with your own word on what is in the image.

        Parameters
        ----------
        truth : Verdict or DataArray, bool (entity, y, x), optional
            Where each entity is in the image: a verdict, or masks of the whole image at any resolution, empty for
            what is not there. None leaves the image out.

        Returns
        -------
        Bleeding

        Raises
        ------
        RecordingError
            The run was not recorded.
        SettingError
            A truth of other entities or of another shape than the image's.
        """
        mass = self._rest().mean(("y", "x"))
        there = mass.token.values.tolist()
        attributes, owners = None, None
        if any(entity.attributes for entity in self.prompt.entities):
            attributes = self._maps("attributes")
            owners = dict(zip(attributes.token.values.tolist(), attributes.entity.values.tolist(), strict=True))
        return measure(
            self.entity_maps(),
            self.regions,
            attributes,
            owners,
            start=mass.sel(token="<start>", drop=True) if "<start>" in there else None,
            end=mass.sel(token="<end>", drop=True),
            truth=truth,
        )

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write image, settings, recording and trace to a folder, whole or not at all.

        Parameters
        ----------
        folder : str or Path
        overwrite : bool
            Replace a run that is there; anything else there is never replaced.

        Returns
        -------
        Path

        Raises
        ------
        OutputError
            The folder exists (and is no run, or `overwrite` is off) or cannot be written.
        """
        folder = Path(folder)
        if folder.exists() and not (overwrite and (folder / "run.json").exists()):
            remedy = "pass overwrite=True or " if (folder / "run.json").exists() else ""
            raise OutputError(f"{folder} exists already; {remedy}choose another folder.")
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        try:
            temporary.mkdir(parents=True)
            self.image.save(temporary / "image.png")
            if self.recording is not None:
                self.recording.save(temporary / "recording.zarr")
            if self.guidance is not None and self.guidance.regions is not None:
                regions = self.guidance.regions
                np.savez_compressed(temporary / "regions.npz", masks=regions.values, steps=regions.step.values)
            (temporary / "run.json").write_text(json.dumps(self._to_dict(), indent=1), encoding="utf-8")
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(temporary, folder)
        except OSError as error:
            raise OutputError(
                f"Cannot write the run to {folder}: {error}. Choose a folder you may write to."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return folder

    def _to_dict(self) -> dict[str, Any]:
        trace = None
        if self.guidance is not None:
            trace = {
                "method": self.guidance.method,
                "options": self.guidance.options,
                "entities": self.guidance.entities,
                "rows": self.guidance.rows,
                "searched": self.guidance.searched,
            }
        return {"prompt": self.prompt.to_dict(), "seed": self.seed, "settings": self.settings, "guidance": trace}

    def _analyzed(self) -> Recording:
        if self.recording is None:
            raise RecordingError("This run was not recorded; generate it with record=True to see its attention.")
        return self.recording

    def _maps(self, tokens: str | Sequence[str]) -> xr.DataArray:
        """Maps of the layers and of the size that are analyzed."""
        recording = self._analyzed()
        return recording.maps(tokens, recording.decoder, self._analysis_size())

    def _rest(self) -> xr.DataArray:
        """Maps of start-of-text, where the text encoder has one, and of end-of-text with padding."""
        kept = self._analyzed().tokens
        return self._maps([token for token in ("<start>", "<end>") if token in kept])

    def _analysis_size(self) -> int:
        return nearest_size(max(size) for size in self._analyzed().sizes)


@dataclass(frozen=True, eq=False)
class Progress:
    """A run after one of its steps.

    Attributes
    ----------
    step : int
        The one that has just been made, counted from 0.
    steps : int
        That were asked for.
    latents : Tensor
        As the pipeline keeps them, one row an image.
    runs : callable
        ``runs()`` gives the runs as they are: images decoded from the latents, which are noisy before the end,
        recordings of the steps made, traces so far. What is made of a `Run` can be made of these: measures, regions,
        figures, features. ``runs(decode=False)`` spares the decoder: the images are blank.
    states : sequence
        What the method holds of each image's run, as its ``begin`` gave it; none of a plain run. ELA's are
        `elakit.guidance.Anchors`, and ``anchors.steer(regions)`` steers the run from here on.
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


@overload
def generate(
    pipe: Any,
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
    stop_if: Callable[[Progress], object] | None = ...,
    progress: bool = ...,
) -> Run: ...
@overload
def generate(
    pipe: Any,
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
    stop_if: Callable[[Progress], object] | None = ...,
    progress: bool = ...,
) -> list[Run]: ...
@torch.inference_mode(False)
def generate(
    pipe: Any,
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
    stop_if: Callable[[Progress], object] | None = None,
    progress: bool = True,
) -> Run | list[Run]:
    """Draw an image, or one a seed in one batch, recorded and, if asked, guided.

    The noise depends on the seed alone: a guided run starts from the plain run's noise, and a plain run draws the
    image of ``pipe(prompt, generator=torch.Generator().manual_seed(seed))`` (PixArt's without resolution binning). In
    a batch each image is guided by its own loss; batches differ from single images by the rounding of the
    arithmetic only.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
        From `elakit.load`, or your own.
    prompt : str or Prompt
    seed : int or sequence of int
        A sequence draws an image for each, in one batch.
    steps : int, optional
        Denoising steps; by default the model's (25 for picture-world, else the pipeline's own default).
    guidance_scale : float, optional
        Of classifier-free guidance; by default the model's (4 for picture-world). FLUX has guidance distilled into the
        model: there it is an input of each pass, and 1 does not switch it off.
    height, width : int, optional
        Pixels; by default the model's.
    negative_prompt : str, optional
        Needs classifier-free guidance: it has no effect with a scale of 1 or less, and FLUX refuses it.
    guidance : Method, optional
        Such as ``elakit.ELA()``; None draws plainly.
    guide_if : callable, optional
        Guide only where it is needed: called with the `Progress` after each step until it answers, with True or False,
        or a list with one for each image; None means to be asked again. Until then nothing is guided, and images
        that do not need it never are. Such as ``elakit.prediction.load_predictor().guide_if()``.
    record : bool or RecordSpec
        True keeps the prompt's words at every step and layer, averaged over heads.
    stop_if : callable, optional
        Called with the `Progress` after each step, before guidance moves the latents for the next one. The run ends
        there once it says yes: the image is then that of the latents as they are, and ``settings["stopped"]`` the
        number of steps made.
    progress : bool
        Show the pipeline's progress bar.

    Returns
    -------
    Run, or list of Run
        A list for a sequence of seeds.

    Raises
    ------
    SettingError
        A number outside its range, a `guidance` that is no method, or a negative prompt for FLUX.
    PromptError, ModelError, RecordingError
        As `parse`, `adapter_for` and `record` raise them.

    Examples
    --------
    >>> import elakit
    >>> pipe = elakit.load("picture-world")
    >>> run = elakit.generate(pipe, "a [cat] and a [lion]", seed=1, steps=2, progress=False)
    >>> run.image.size, run.regions.dims, bool((run.regions.sum("entity") > 1).any())
    ((128, 128), ('step', 'entity', 'y', 'x'), False)
    >>> [r.seed for r in elakit.generate(pipe, "a [cat] and a [lion]", seed=[1, 2], steps=2, progress=False)]
    [1, 2]

    Give up after two of five steps:

    >>> early = elakit.generate(pipe, "a [cat]", steps=5, stop_if=lambda so_far: so_far.step == 1, progress=False)
    >>> early.settings["stopped"], early.recording.steps
    (2, (0, 1))
    """
    adapter = adapter_for(pipe)
    parsed = parse(prompt, pipe)
    defaults = default_settings(pipe)
    steps = _whole("steps", defaults.steps if steps is None else steps, least=1)
    seeds = [_whole("seed", one, least=0) for one in _each(seed)]
    scale = defaults.guidance_scale if guidance_scale is None else float(guidance_scale)
    if not np.isfinite(scale) or scale < 0:
        raise SettingError(
            f"guidance_scale={guidance_scale!r}: must be a number of 0 or more (1 or less switches it off)."
        )
    if guidance is not None and (
        isinstance(guidance, type) or not all(hasattr(guidance, name) for name in ("loss", "plan", "select"))
    ):
        raise SettingError(f"guidance={guidance!r} is no guidance method; pass an instance, such as elakit.ELA().")
    if guide_if is not None and guidance is None:
        raise SettingError("guide_if says which images need guidance, but none is given: guidance=elakit.ELA().")
    full_height, full_width = adapter.default_size()
    height, width = height or full_height, width or full_width
    latent = adapter.latent_size(height, width)
    conditioning = adapter.encode(
        parsed.text, negative_prompt, guided=scale > 1, size=(height, width), guidance_scale=scale
    )
    generators = [torch.Generator("cpu").manual_seed(one) for one in seeds]
    latents = torch.cat([adapter.noise(generator, height, width) for generator in generators])
    settings = {
        "model": name_of(pipe),
        "steps": steps,
        "guidance_scale": scale,
        "height": height,
        "width": width,
        "negative_prompt": negative_prompt,
        "scheduler": type(pipe.scheduler).__name__,
        "method": guidance.name if guidance is not None else None,
    }
    call: dict[str, Any] = {}
    guide = None
    if guidance is not None:
        noise_scale = adapter.set_timesteps(steps, height, width)
        guide = Guide(pipe, guidance, parsed, conditioning, latent, len(seeds))
        if guide_if is None:
            latents = guide.start(latents, noise_scale, pipe.scheduler.timesteps[0])

    def runs_of(images: Sequence[Image.Image], recording: Recording | None) -> list[Run]:
        return [
            Run(
                image,
                parsed,
                one,
                dict(settings),
                recording.isel(image=[i]) if recording is not None and len(seeds) > 1 else recording,
                guide.traces[i] if guide else None,
            )
            for i, (one, image) in enumerate(zip(seeds, images, strict=True))
        ]

    waiting = guide_if is not None

    def after(step: int, latents: Tensor) -> Tensor:
        nonlocal waiting

        def runs(decode: bool = True) -> list[Run]:
            blank = [Image.new("RGB", (width, height))] * len(seeds)
            return runs_of(adapter.decode(latents, height, width) if decode else blank, recording)

        so_far = Progress(step, steps, latents, runs, guide.states if guide else ())
        if stop_if is not None and stop_if(so_far):
            raise _Stopped(so_far)
        if waiting and guide and guide_if is not None and (answer := guide_if(so_far)) is not None:
            waiting = False
            guide.only(_one_each(answer, len(seeds)))
        return guide.on_step_end(step, latents) if guide and not waiting else latents

    if guide is not None or stop_if is not None:
        call = adapter.on_step(after)
    spec = record if isinstance(record, RecordSpec) else RecordSpec()
    holding = nullcontext() if guide is None else guide.holding()
    with _progress_bar(pipe, progress), _recording(pipe, parsed, spec, bool(record)) as recording, holding:
        try:
            images = pipe(
                num_inference_steps=steps,
                guidance_scale=scale,
                height=height,
                width=width,
                latents=latents,
                generator=generators if len(seeds) > 1 else generators[0],
                **conditioning.arguments(len(seeds)),
                **call,
            ).images
        except _Stopped as stopped:
            settings["stopped"] = stopped.progress.step + 1
            images = adapter.decode(stopped.progress.latents, height, width)
            pipe.maybe_free_model_hooks()  # the call's own end was not reached
    runs = runs_of(images, recording)
    if guide is not None and guide_if is not None:
        for i, run in enumerate(runs):
            run.settings["guided"] = not waiting and i not in guide.left_alone
    return runs if isinstance(seed, Sequence) else runs[0]


def open_run(folder: str | Path) -> Run:
    """Open a run that `Run.save` wrote.

    Parameters
    ----------
    folder : str or Path

    Returns
    -------
    Run

    Raises
    ------
    OutputError
        The folder holds no run.
    """
    folder = Path(folder)
    try:
        table = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        with Image.open(folder / "image.png") as file:
            image = file.copy()
    except (OSError, json.JSONDecodeError) as error:
        raise OutputError(
            f"{folder} holds no elakit run ({error}). Give a folder that `run.save(...)` wrote."
        ) from error
    recording = open_recording(folder / "recording.zarr") if (folder / "recording.zarr").exists() else None
    trace = None
    if table["guidance"] is not None:
        kept = table["guidance"]
        trace = Trace(kept["method"], kept["options"], tuple(kept["entities"]), kept["rows"], kept.get("searched", []))
        if (folder / "regions.npz").exists():
            with np.load(folder / "regions.npz") as regions:
                trace._regions.update(zip(regions["steps"].tolist(), regions["masks"], strict=True))
    return Run(image, Prompt.from_dict(table["prompt"]), table["seed"], table["settings"], recording, trace)


def compare(runs: list[Run]) -> pd.DataFrame:
    """Overall measures of several runs side by side: one row a measure, one column a run.

    Parameters
    ----------
    runs : list of Run
        Of one prompt.
    """
    columns = {
        f"{run.label} (seed {run.seed})": run.bleeding.overall().set_index(["measure", "entity", "other"])["value"]
        for run in runs
    }
    return pd.DataFrame(columns)


def _recording(pipe: Any, prompt: Prompt, spec: RecordSpec, wanted: bool) -> Any:
    return record(pipe, prompt, spec) if wanted else nullcontext(None)


@contextmanager
def _progress_bar(pipe: Any, shown: bool) -> Iterator[None]:
    """Switch a pipeline's progress bar on or off, and back afterwards."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": not shown})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def _each(seed: int | Sequence[int]) -> Sequence[int]:
    if isinstance(seed, str | bytes) or (isinstance(seed, Sequence) and not seed):
        raise SettingError(f"seed={seed!r}: must be a whole number, or a list with one for each image.")
    return seed if isinstance(seed, Sequence) else [seed]


def _one_each(answer: bool | Sequence[bool], images: int) -> list[bool]:
    answers = [bool(answer)] * images if isinstance(answer, bool | np.bool_) else [bool(one) for one in answer]
    if len(answers) != images:
        raise SettingError(f"guide_if gave {len(answers)} answers for {images} images; give True, False, or one each.")
    return answers


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise SettingError(f"{name}={value!r}: must be a whole number of {least} or more.")
    return int(value)
