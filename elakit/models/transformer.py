"""Base of the adapters for pipelines that denoise with a transformer.

All maps of such a pipeline have the same size, the size of the grid of patches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
from PIL import Image
from torch import nn

from elakit.errors import ModelError
from elakit.models.adapter import (
    AttentionLayer,
    Call,
    Conditioning,
    Kind,
    Layout,
    OtherKind,
    Place,
    argument,
    call_default,
    compiled,
    decoded,
    encoded,
    is_a,
    modular,
    running,
    stacked_rows,
)
from elakit.models.device import compute_dtype
from elakit.models.encoding import PromptEncoder
from elakit.models.unet import check_sides, seeded_noise, self_layer, step_callback
from elakit.pipeline import Pipeline, TransformerPipeline
from elakit.tokens import TextSequence


class TransformerAdapter(PromptEncoder):
    """Base of the adapters for pipelines with a transformer.

    The adapter of a family is a subclass. For recording, the subclass describes the layers and the text of the family.
    For `elakit.generate` and guidance, the subclass also encodes prompts (``_encode``). It also converts the
    scheduler's timestep to the number that the transformer receives (``_given``).

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline

    Raises
    ------
    ModelError
        Raised when the pipeline is of another family; the message states the difference.
    """

    family: ClassVar[str]
    models: ClassVar[tuple[str, ...]]  # class names of the transformer
    index_models: ClassVar[tuple[str, ...]] = ()  # further names in a model_index.json
    scale_argument: ClassVar[str] = "guidance_scale"
    pipe: TransformerPipeline

    def __init__(self, pipe: Pipeline) -> None:
        reason = self.refusal(pipe)
        if reason is not None:
            raise ModelError(
                f"{type(pipe).__name__} is not a supported {self.family} pipeline: {reason}. Pass the pipeline to "
                "elakit.models.adapter_for, which chooses the adapter."
            )
        self.pipe = cast(TransformerPipeline, pipe)
        self.denoiser: nn.Module = self.pipe.transformer
        self._layers = self._make_layers()

    @classmethod
    def refusal(cls, pipe: Pipeline) -> str | None:
        """Reason why this family does not support a pipeline; None if the pipeline is supported."""
        if reason := modular(pipe):
            return reason
        transformer = getattr(pipe, "transformer", None)
        if transformer is None:
            return OtherKind("it has no transformer")
        plain = getattr(transformer, "_orig_mod", transformer)
        if not is_a(plain, *cls.models):
            return OtherKind(f"its transformer has the class {type(plain).__name__}")
        return compiled(transformer, "pipe.transformer") or cls._refusal_of_relative(type(pipe).__name__)

    @classmethod
    def refusal_of_index(cls, index: Mapping[str, Any]) -> str | None:
        """Reason why this family does not support a model; None if the model is supported.

        ``index`` is the content of the model's ``model_index.json``. Weights are not needed for this decision.
        """
        transformer = (index.get("transformer") or [None, None])[1]
        if transformer is None:
            return OtherKind("it has no transformer")
        if transformer not in cls.models + cls.index_models:
            return OtherKind(f"its transformer has the class {transformer}")
        return cls._refusal_of_relative(str(index.get("_class_name")))

    @classmethod
    def _refusal_of_relative(cls, pipeline: str) -> str | None:
        """Reason why this family does not support a pipeline class, although the class has the family's transformer.

        ``pipeline`` is the name of the class. The result is None if the class is supported.
        """
        return None

    @property
    def image_optional(self) -> bool:
        """True if the pipeline's call takes an image, but also generates from text alone."""
        return False

    def is_current(self) -> bool:
        """True if the pipeline still has the denoiser of this adapter, and that denoiser is not compiled."""
        transformer = getattr(self.pipe, "transformer", None)
        return transformer is self.denoiser and compiled(transformer, "pipe.transformer") is None

    def _make_layers(self) -> tuple[AttentionLayer, ...]:
        raise NotImplementedError

    def _layers_at_call(
        self, stack: str, attention: str, place: Place, kind: Kind = "cross", *, text_first: bool = False
    ) -> tuple[AttentionLayer, ...]:
        """Create one `AttentionLayer` for each block in a list of blocks of the denoiser.

        The attention of these layers is read at the attention call.

        Parameters
        ----------
        stack : str
            Name of the denoiser's attribute that contains the list of blocks.
        attention : str
            Name of the attribute of each block that contains the attention module.
        place, kind, text_first
            Values of these attributes in each `AttentionLayer`.
        """
        return tuple(
            AttentionLayer(
                name=f"{stack}.{i}.{attention}",
                place=place,
                heads=getattr(block, attention).heads,
                module=getattr(block, attention),
                block=self.denoiser,
                factor=self._patch,
                kind=kind,
                text_first=text_first,
                takes_mask=False,
                grid=self._grid,
                layout=self._layout,
            )
            for i, block in enumerate(getattr(self.denoiser, stack))
        )

    def _layout(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Layout:
        """Positions of image and text in the attention calls: among the queries and among the keys.

        The positions are found from ``args`` and ``kwargs``, the arguments of the denoiser call.
        """
        raise NotImplementedError

    @property
    def _patch(self) -> int:
        return int(self.pipe.transformer.config.patch_size)

    def _grid(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
        """Number of rows and columns of patches, found from the arguments of a denoiser call."""
        latents = argument(args, kwargs, 0, "hidden_states")
        return latents.shape[-2] // self._patch, latents.shape[-1] // self._patch

    def layers(self) -> tuple[AttentionLayer, ...]:
        """Layers in which the image attends to the text, in forward order."""
        return self._layers

    def read_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Batch size, timestep and latent size of a denoiser call, found from the arguments of the call."""
        latents = argument(args, kwargs, 0, "hidden_states")
        timestep = torch.as_tensor(kwargs["timestep"])
        return Call(latents.shape[0], float(timestep.flatten()[0]), (latents.shape[-2], latents.shape[-1]))

    def conditional_rows(self, batch: int) -> slice:
        """Slice of the rows that see the prompt, in a denoiser call with ``batch`` rows.

        The slice depends on whether the pipeline uses classifier-free guidance, which can change between calls. Some
        pipelines (PixArt) have no attribute ``do_classifier_free_guidance``. For these pipelines, the local variables
        of the running ``__call__`` are read. If no ``__call__`` is running, all rows see the prompt.

        Raises
        ------
        ModelError
            Raised when the rows cannot be divided into equal parts, one for each pass that the pipeline stacks in the
            batch.
        """
        guided = getattr(self.pipe, "do_classifier_free_guidance", None)
        if guided is None:
            guided = running(self.pipe).get("do_classifier_free_guidance", False)
        return stacked_rows(self.pipe, batch, bool(guided))

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the latent for an image of ``height`` x ``width`` pixels.

        This is the size of the latent before it is divided into patches.

        Raises
        ------
        SettingError
            Raised when ``height`` or ``width`` is not a positive multiple of ``vae_scale_factor`` times the patch size.
        """
        factor = self.pipe.vae_scale_factor
        check_sides(height, width, factor * self._patch)
        return height // factor, width // factor

    def default_size(self) -> tuple[int, int]:
        """Default height and width of an image, in pixels."""
        side = self.pipe.transformer.config.sample_size * self.pipe.vae_scale_factor
        return side, side

    def denoise(
        self, latents: torch.Tensor, timestep: torch.Tensor | float | int, conditioning: Conditioning
    ) -> torch.Tensor:
        """Output of the denoiser in one pass that sees the prompt.

        The output is differentiable if gradients are enabled.

        Parameters
        ----------
        latents : torch.Tensor, (n, ...)
            Latents in the pipeline's format, already scaled by the scheduler's ``scale_model_input``.
        timestep : torch.Tensor, float or int
            The scheduler's timestep.
        conditioning : Conditioning
            The encoded prompt.

        Returns
        -------
        torch.Tensor, (n, ...)
            Output of the denoiser, including a learned variance if the model predicts one.
        """
        return self.denoiser(
            hidden_states=latents,
            timestep=self._given(timestep, latents),
            **conditioning.rows(len(latents), latents.dtype),
            return_dict=False,
        )[0]

    def _given(self, timestep: torch.Tensor | float | int, latents: torch.Tensor) -> torch.Tensor:
        """Number that the model receives as its timestep, one value for each row of ``latents``.

        ``timestep`` is the scheduler's timestep.
        """
        return torch.as_tensor(timestep, device=latents.device).expand(len(latents))

    def text_call(
        self,
        states: torch.Tensor,
        positions: Sequence[int],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        rows: slice,
    ) -> dict[str, Any]:
        """Arguments, by name, of a new denoiser call with another text and with only one or a few patches of the image.

        The new call is derived from a given denoiser call. `elakit.attention.map_concepts` makes the new call to read
        the attention outputs of its text. Only families with joint attention that is read at the attention call need
        this method.

        Parameters
        ----------
        states : torch.Tensor, (tokens, channels)
            Text states of the new call, the same for all rows.
        positions : sequence of int
            Position of each state's token, counted from 0 in the text from which the state was encoded. States from
            several texts may have the same position.
        args, kwargs : sequence, mapping
            Arguments of the given denoiser call.
        rows : slice
            Rows of the batch of the given call. The new call has these rows only.

        Returns
        -------
        dict of str to Any
            Keyword arguments of the new call.
        """
        return self._with_text(self._of_rows(args, kwargs, rows), states, positions)

    def _with_text(self, given: dict[str, Any], states: torch.Tensor, positions: Sequence[int]) -> dict[str, Any]:
        """Arguments, by name, of a denoiser call with another text and with only one patch of the image.

        ``given`` are the arguments of a denoiser call of the run. After that call, `elakit.attention.map_concepts`
        makes the new call with the returned arguments. In each layer, `map_concepts` replaces the keys and values of
        the patch by the keys and values that the whole image had in the run's call. ``states``, (tokens, channels), are
        the text states of the new call. ``positions`` has the position of each state's token in the text from which the
        state was encoded.
        """
        latents = given["hidden_states"]
        return given | {
            "hidden_states": latents[..., : self._patch, : self._patch],
            "encoder_hidden_states": repeated_text(states, latents),
        }

    def _of_rows(self, args: Sequence[Any], kwargs: Mapping[str, Any], rows: slice) -> dict[str, Any]:
        """Arguments of a denoiser call, by name, cut to the given ``rows`` of the batch.

        ``args`` and ``kwargs`` are the arguments for the whole batch.
        """
        names = list(inspect.signature(type(self.denoiser).forward).parameters)[1:]
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        batch = len(given[names[0]])

        def cut(value: Any) -> Any:
            return value[rows] if isinstance(value, torch.Tensor | list) and len(value) == batch else value

        return {name: cut(value) for name, value in given.items()}

    def self_layers(self, beside: Sequence[AttentionLayer]) -> tuple[AttentionLayer, ...]:
        """Self-attention layers, one for each layer in ``beside``.

        For a layer with cross-attention, the result contains the self-attention layer of the same block. For a layer
        with joint attention, the result contains the layer itself, with ``reads="image"``. In joint attention, image
        and text are keys of one softmax. The attention of a location to all image locations therefore sums to less than
        1.

        Raises
        ------
        ModelError
            Raised when a block has no self-attention.
        """
        return tuple(
            self_layer(self.denoiser, layer) if layer.kind == "cross" else replace(layer, reads="image")
            for layer in beside
        )

    @property
    def _channels(self) -> int:
        """Number of channels of the latent."""
        return int(self.pipe.transformer.config.in_channels)

    def noise(self, generator: torch.Generator, height: int, width: int) -> torch.Tensor:
        """Initial noise of unit variance for an image of ``height`` x ``width`` pixels: a latent, (1, c, h, w)."""
        shape = (1, self._channels, *self.latent_size(height, width))
        return seeded_noise(shape, generator, self.pipe._execution_device, self._noise_dtype)

    @property
    def _noise_dtype(self) -> torch.dtype:
        """Floating-point type in which the pipeline keeps its latents."""
        return compute_dtype(self.denoiser)

    def set_timesteps(self, steps: int, height: int, width: int) -> float:
        """Set the scheduler's timesteps as the pipeline's call does, and return the scale of the initial noise.

        The first latents of a run are the result of `noise` times this scale. ``height`` and ``width`` are those of the
        image in pixels.
        """
        self.pipe.scheduler.set_timesteps(steps, device=self.pipe._execution_device)
        return float(getattr(self.pipe.scheduler, "init_noise_sigma", 1.0))

    def _shift(self, height: int, width: int, largest: float) -> float:
        """Shift (``mu``) of the timesteps of flow matching for an image of ``height`` x ``width`` pixels.

        The shift is computed as in diffusers' pipelines. ``largest`` is used as ``max_shift`` if the scheduler's
        configuration has no ``max_shift``.
        """
        rows, columns = self.latent_size(height, width)
        return self._flow_shift((rows // self._patch) * (columns // self._patch), largest)

    def _flow_shift(self, patches: int, largest: float) -> float:
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        config = self.pipe.scheduler.config
        shift: float = calculate_shift(
            patches,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", largest),
        )
        return shift

    def _set_flow(self, steps: int, shift: float) -> None:
        """Set the scheduler's timesteps for flow matching.

        The scheduler receives ``steps`` noise levels at equal distances, from 1 to 1/``steps``. It shifts the noise
        levels by ``shift`` (``mu``). A scheduler with ``use_flow_sigmas`` computes the noise levels itself.
        """
        from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps

        scheduler = self.pipe.scheduler
        own = getattr(scheduler.config, "use_flow_sigmas", False)  # then the scheduler computes the noise levels itself
        sigmas = None if own else np.linspace(1.0, 1 / steps, steps)
        retrieve_timesteps(scheduler, steps, self.pipe._execution_device, sigmas=sigmas, mu=shift)

    def decode(self, latents: torch.Tensor, height: int, width: int) -> list[Image.Image]:
        """Decode latents, (n, c, h, w), to images of ``height`` x ``width`` pixels.

        The latents may come from any step of a run.
        """
        return decoded(self.pipe, latents)

    def encode_image(self, image: Image.Image) -> torch.Tensor:
        """Encode an image as latents, (1, c, h, w).

        Raises
        ------
        ModelError
            Raised when the family overrides `decode`, but not this method.
        """
        if type(self).decode is not TransformerAdapter.decode:
            raise ModelError(
                f"elakit cannot encode an existing image for {self.family} yet. Record a run of the pipeline instead: "
                "`with elakit.record(pipe, prompt) as recording:`."
            )
        return encoded(self.pipe, image)

    def on_step(self, move: Callable[[int, torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        """Arguments that make the pipeline's call replace the latents by ``move(step, latents)`` after each step.

        ``step`` is the index of the completed step, counted from 0 along the scheduler's timesteps.
        """
        return step_callback(move)

    def text(self) -> tuple[TextSequence, ...]:
        """Token sequences, in the order in which the denoiser sees them."""
        raise NotImplementedError

    def text_length(self) -> int:
        """Number of text positions, including padding, in a call of the pipeline with default arguments.

        A call with another ``max_sequence_length`` has another number of positions.
        """
        last = self.text()[-1]
        return last.offset + last.length

    def _t5_length(self) -> int:
        """Number of positions of the last text encoder.

        This number is the default of ``max_sequence_length`` in the pipeline's call.
        """
        return int(call_default(self.pipe, "max_sequence_length"))


def repeated_text(states: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Repeat text states, (tokens, channels), for each row of ``latents``.

    The result, (rows, tokens, channels), has the precision of ``latents``.
    """
    return states.to(latents.dtype).expand(len(latents), -1, -1)
