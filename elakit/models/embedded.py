"""Built-in models, and the default settings of pipelines."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path

from elakit.errors import ModelError
from elakit.pipeline import Pipeline
from elakit.resources import data_path


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that is shipped with elakit and needs no network.

    Attributes
    ----------
    name : str
        The name that `load` takes.
    folder : str
        Name of the model's folder in the ``data`` folder that is shipped with elakit.
    summary : str
        Description in one line, which ``elakit models`` shows.
    steps : int
        Default number of denoising steps.
    guidance_scale : float
        Default classifier-free guidance scale.
    size : int
        Default height and default width in pixels; the image is square.
    """

    name: str
    folder: str
    summary: str
    steps: int
    guidance_scale: float
    size: int

    @property
    def path(self) -> Path:
        """Folder of the model in this installation."""
        return data_path(self.folder)


EMBEDDED: dict[str, EmbeddedModel] = {
    model.name: model
    for model in (
        EmbeddedModel(
            name="picture-world",
            folder="picture-world",
            summary="small Stable Diffusion pipeline trained on composed scenes of 24 nouns and 11 colors",
            steps=25,
            guidance_scale=4.0,
            size=128,
        ),
    )
}


@dataclass(frozen=True)
class GenerationSettings:
    """Default settings of a pipeline's call.

    Attributes
    ----------
    steps : int
        Number of denoising steps.
    guidance_scale : float
        Classifier-free guidance scale, or the scale that is an input of a guidance-distilled model.
    """

    steps: int
    guidance_scale: float


def default_settings(pipe: Pipeline) -> GenerationSettings:
    """Default number of steps and default guidance scale of a pipeline.

    A built-in model has defaults of its own. For any other pipeline, the defaults of its ``__call__`` are returned.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline

    Returns
    -------
    GenerationSettings
        The ``guidance_scale`` is 1 if the pipeline's call has no default guidance scale.

    Raises
    ------
    ModelError
        Raised when the pipeline's call takes no ``num_inference_steps``, or elakit does not support the pipeline.

    Examples
    --------
    >>> import elakit
    >>> default_settings(elakit.load("picture-world"))
    GenerationSettings(steps=25, guidance_scale=4.0)
    """
    if (model := EMBEDDED.get(name_of(pipe))) is not None:
        return GenerationSettings(model.steps, model.guidance_scale)
    parameters = inspect.signature(type(pipe).__call__).parameters
    if "num_inference_steps" not in parameters:
        raise ModelError(
            f"{type(pipe).__name__} takes no `num_inference_steps`, which elakit.generate sets. Use a standard "
            "text-to-image pipeline, such as StableDiffusionPipeline."
        )
    from elakit.models.dispatch import adapter_for  # loads diffusers

    name = adapter_for(pipe).scale_argument
    scale = parameters[name].default if name in parameters else None
    return GenerationSettings(
        int(parameters["num_inference_steps"].default), float(scale) if isinstance(scale, int | float) else 1.0
    )


def name_of(pipe: Pipeline) -> str:
    """Name with which `load` can load a pipeline again.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline

    Returns
    -------
    str
        Hub id, folder, or name of the built-in model from which the pipeline was loaded. If the pipeline was not
        loaded, the name of its class.

    Examples
    --------
    >>> import elakit
    >>> name_of(elakit.load("picture-world"))
    'picture-world'
    """
    source = str(getattr(pipe.config, "_name_or_path", "") or type(pipe).__name__)
    embedded = [model.name for model in EMBEDDED.values() if Path(source) == model.path]
    return embedded[0] if embedded else source


def loaded_with(pipe: Pipeline) -> dict[str, str | None]:
    """Arguments ``variant`` and ``lora`` that were given to `load` for a pipeline.

    Together with the model's name, these arguments determine the weights of the pipeline.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline

    Returns
    -------
    dict of str to (str or None)
        Value of each argument, by name; None if the argument was not given.

    Examples
    --------
    >>> import elakit
    >>> loaded_with(elakit.load("picture-world"))
    {'variant': None, 'lora': None}
    """
    return {name: getattr(pipe.config, f"_{name}", None) for name in ("variant", "lora")}
