"""The function `generate`, which checks its arguments and warns the user; `elakit.pipeline_call` calls the pipeline."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, overload

import torch

from elakit import checks
from elakit.attention import RecordSpec
from elakit.errors import ModelError, SettingError
from elakit.guidance import Guide, Method
from elakit.guidance.metadata import option_values
from elakit.guidance.method import Encodes, NoiseSearch, check_method
from elakit.models import Adapter, adapter_for, default_settings
from elakit.numbering import number_of, plural
from elakit.pipeline import Pipeline
from elakit.pipeline_call import GuideIf, PipelineCall, Progress, Request
from elakit.prompt import Prompt
from elakit.run import Run

# Arguments of a pipeline's call that `generate` sets.
_OWN = (
    "prompt", "prompt_2", "prompt_3", "prompt_embeds", "pooled_prompt_embeds", "negative_prompt", "negative_prompt_2",
    "negative_prompt_3", "negative_prompt_embeds", "negative_pooled_prompt_embeds", "num_inference_steps",
    "guidance_scale", "height", "width", "latents", "generator", "num_images_per_prompt", "output_type", "return_dict",
    "callback", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
)  # fmt: skip


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
    """Generate one image, or a batch with one image per seed, with recorded attention and optional guidance.

    The initial noise depends on the seed alone, so plain and guided runs with the same seed start from the same noise.
    A plain run produces the same image as ``pipe(prompt, generator=torch.Generator().manual_seed(seed))``. For PixArt,
    Sana and HunyuanDiT, this call also needs ``use_resolution_binning=False``. In a batch, each image is guided by its
    own loss. Except for floating-point rounding, each image of a batch equals the image that its seed gives without a
    batch.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
        A pipeline from `elakit.load`, or your own. Image-to-image, inpainting and ControlNet pipelines receive their
        input image through `call`, and cannot be guided.
    prompt : str or Prompt
        Prompt to generate.
    seed : int or sequence of int
        Seed of the initial noise; a sequence generates one image per seed in one batch.
    steps : int, optional
        Number of denoising steps. The default is 25 for picture-world, and otherwise the pipeline's own default.
    guidance_scale : float, optional
        Classifier-free guidance scale. The default is 4 for picture-world, and otherwise the pipeline's own default. A
        scale of 1 or less switches classifier-free guidance off. In guidance-distilled models (FLUX.1), by contrast,
        the scale is an input of the denoiser, and a scale of 1 does not switch guidance off.
    height, width : int, optional
        Size of the image in pixels. The default is the usual size of the model.
    negative_prompt : str, optional
        Negative prompt. It has an effect only with classifier-free guidance. FLUX.1 and FLUX.2 refuse it.
    guidance : Method, optional
        A guidance method, for example ``elakit.ELA()``; None generates without guidance.
    guide_if : callable, optional
        Function that decides which images are guided, such as ``elakit.prediction.load_predictor().guide_if()``. The
        function is called with the `Progress` of the run after each step, until it decides. It returns True or False
        for all images, a list with True or False for each image, or None to postpone the decision. No image is guided
        before the decision, and images with False are never guided. By default, all images are guided from the start.
    record : bool or RecordSpec
        True records the attention to the prompt's words in every step and layer, averaged over heads. False records
        nothing. A `RecordSpec` selects what is recorded.
    call : mapping, optional
        Further arguments of the pipeline's call, by name, such as ``{"image": photo, "strength": 0.6}`` for
        image-to-image. With guidance, further arguments raise a SettingError, because the denoiser calls of the
        guidance method would not receive them.
    stop_if : callable, optional
        Function that is called with the `Progress` of the run after each step, before guidance moves the latents for
        the next step. If the function returns True, the run ends. The image is then decoded from the latents of the
        last completed step, and ``settings["stopped"]`` is the number of completed steps.
    predicted : bool
        Whether `Run.predicted` keeps the image that each step predicts, which `elakit.explore` can show. Each step then
        needs an additional call of the VAE decoder. True is not allowed for pipelines that take an image.
    progress : bool
        Whether the pipeline shows its progress bar.

    Returns
    -------
    Run, or list of Run
        One run if `seed` is an int; a list with one run per seed if `seed` is a sequence.

    Raises
    ------
    SettingError
        Raised when an argument is out of range or of the wrong type, the pipeline needs an image, or guidance is not
        possible with the pipeline.
    PromptError
        Raised when the prompt cannot be parsed.
    ModelError
        Raised when this function does not support the pipeline's family, even if `elakit.record` supports it. Also
        raised when guidance is requested and the pipeline was loaded within `torch.inference_mode`.
    RecordingError
        Raised when the run cannot be recorded, for the reasons listed in `elakit.record`.

    Warns
    -----
    UserWarning
        Warns when guidance acts at no step, for example because the run has too few steps. Also warns when a guided
        step left the latents unchanged because the gradient was not finite. Also warns when the pipeline's safety
        checker replaced an image.

    Examples
    --------
    >>> import elakit
    >>> pipe = elakit.load("picture-world")
    >>> run = elakit.generate(pipe, "a [cat] and a [lion]", seed=1, steps=2, progress=False)
    >>> run
    Run('a cat and a lion', seed=1, plain, 2 steps, 128 x 128 pixels, recorded)

    At each step, no location is in the regions of two entities:

    >>> run.regions.dims, bool((run.regions.sum("entity") > 1).any())
    (('step', 'entity', 'y', 'x'), False)

    Several seeds give one run each:

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
    request = Request(
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
        prepared = PipelineCall(request)
        if prepared.guide is not None:
            _warn_if_inactive(prepared.guide, steps)
        images, replaced = prepared.run()
        runs = prepared.collect(images, replaced)
    _warn_if_skipped(runs)
    if hidden := [run.seed for run in runs if run.nsfw]:
        warnings.warn(
            f"The safety checker replaced the {plural('image', len(hidden))} of {plural('seed', len(hidden))} "
            f"{', '.join(map(str, hidden))} by {'a black image' if len(hidden) == 1 else 'black images'}. Black images "
            "are not judged. Load the pipeline with safety_checker=None, or choose other seeds.",
            stacklevel=2,
        )
    return runs[0] if checks.is_whole(seed) else runs


def _check_arguments(negative_prompt: Any, guidance: Any, guide_if: Any, stop_if: Any, record: Any) -> None:
    """Refuse arguments of a wrong kind, before anything is computed."""
    if negative_prompt is not None and not isinstance(negative_prompt, str):
        checks.refuse(negative_prompt, "negative_prompt", "text or None")
    if guidance is not None:
        check_method(guidance)
    for name, function in (("guide_if", guide_if), ("stop_if", stop_if)):
        if function is not None and not callable(function):
            checks.refuse(function, name, "a function that takes an elakit.Progress, or None")
    if guide_if is not None and guidance is None:
        raise SettingError(
            "guide_if selects images to guide, but guidance is None. Give a method, such as guidance=elakit.ELA()."
        )
    if guide_if is not None and isinstance(guidance, Encodes):
        raise SettingError(
            f"guide_if cannot be used with {type(guidance).__name__}, which changes the text embeddings before the "
            "first step. Leave guide_if out, or use another method, such as elakit.ELA()."
        )
    if not isinstance(record, RecordSpec):
        checks.boolean(record, "record", hint="An elakit.RecordSpec is allowed, too.")


def _takes_image(adapter: Adapter, call: Mapping[str, Any]) -> bool:
    """True if the pipeline requires an input image, or if `call` contains one, as in image-to-image and ControlNet."""
    if "image" not in inspect.signature(adapter.pipe.__call__).parameters:
        return False
    return call.get("image") is not None or not adapter.image_optional


def _call_arguments(adapter: Adapter, call: Mapping[str, Any] | None, guidance: Method | None) -> dict[str, Any]:
    """Check the argument `call` of `generate`, and return it as a dictionary.

    With guidance, `call` must be empty, and the pipeline must not require an image.
    """
    kind = type(adapter.pipe).__name__
    if call is not None and not isinstance(call, Mapping):
        checks.refuse(call, "call", 'a dictionary of arguments of the pipeline, such as {"strength": 0.6}')
    call = dict(call or {})
    takes_image = _takes_image(adapter, call)
    if guidance is not None and (call or takes_image):
        other = "use a text-to-image pipeline, and give it no image" if takes_image else "leave call out"
        raise SettingError(
            f"guidance={guidance.name} is not possible with {kind if takes_image else 'call=...'}: the denoiser calls "
            f"of guidance receive neither an image nor further arguments. Leave guidance out, or {other}."
        )
    accepted = inspect.signature(adapter.pipe.__call__).parameters
    for name in call:
        if name in _OWN:
            raise SettingError(
                f"call={{{name!r}: ...}}: elakit.generate sets this argument itself. Use the arguments of "
                "elakit.generate instead, such as steps= and seed=."
            )
        if name not in accepted:
            allowed = [known for known in accepted if known not in (*_OWN, "self", "kwargs")]
            checks.choice(name, "key in call", allowed)
    if takes_image and call.get("image") is None:
        raise SettingError(
            f'{kind} needs an image. Pass it in call: elakit.generate(pipe, prompt, call={{"image": ...}}). Or call '
            "the pipeline yourself within `with elakit.record(pipe, prompt) as recording:`."
        )
    return call


def _check_possible(request: Request) -> None:
    """Refuse the option `predicted` if the pipeline takes an image; refuse guidance if gradients are impossible.

    Gradients are impossible if the pipeline was loaded within `torch.inference_mode`.
    """
    pipe = request.adapter.pipe
    if request.predicted and request.takes_image:
        raise SettingError(
            f"predicted=True is not possible with an image as input, which {type(pipe).__name__} takes in this call. "
            "Leave predicted out, or generate from text alone."
        )
    if request.guidance is not None and any(one.is_inference() for one in request.adapter.denoiser.parameters()):
        raise ModelError(
            "Guidance needs gradients, but this pipeline was loaded within torch.inference_mode(). Load the pipeline "
            "outside torch.inference_mode()."
        )


@contextmanager
def _normal_mode() -> Iterator[None]:
    """Context that switches `torch.inference_mode` off, because guidance cannot compute gradients in that mode.

    Inside the context, `torch.no_grad` applies instead. If inference mode is not on, the context has no effect.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _warn_if_inactive(guide: Guide, steps: int) -> None:
    """Warn if guidance acts at no step of a run, for example because the run has only one or two steps.

    There is no warning if an option of the method, such as ``guided=0``, switches guidance off.
    """
    acts = any(update.size or update.hold for update in guide.updates) or isinstance(guide.method, NoiseSearch)
    switches = ("step_size", "strength", "guided")
    options = option_values(guide.method)
    off = any(name.endswith(switches) and value == 0 for name, value in options.items())
    if not acts and not off:
        shares = [f"a larger {name}, " for name, value in options.items() if name.endswith("guided") and value != 1]
        warnings.warn(
            f"{guide.method.name} acts at no step of this run ({number_of(steps, 'step')}, "
            f"{number_of(len(guide.prompt.entities), 'entity')}), so the image is the same as without guidance. Use "
            f"more steps, {''.join(shares)}or a prompt with two entities (for syngen: with attributes).",
            stacklevel=3,
        )


def _warn_if_skipped(runs: Sequence[Run]) -> None:
    """Warn when steps were not guided because their gradients were NaN or infinite."""
    skipped = {run.seed: run.guidance.skipped for run in runs if run.guidance is not None and run.guidance.skipped}
    if skipped:
        counts = ", ".join(f"{number_of(count, 'step')} of seed {seed}" for seed, count in skipped.items())
        warnings.warn(
            f"Guidance skipped {counts}, because the gradient of {runs[0].label}'s loss was NaN or infinite. "
            "`run.guidance.to_frame()` marks the skipped steps. If the model was loaded in half precision, load it in "
            "float32. In a method of your own, check the loss for divisions by zero.",
            stacklevel=3,
        )
