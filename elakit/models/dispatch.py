"""Choice of the adapter for a pipeline, and the error for a pipeline that belongs to no supported family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elakit.errors import ModelError
from elakit.models.adapter import Adapter, OtherKind, Remediable
from elakit.models.aura_flow import AuraFlow
from elakit.models.chroma import Chroma
from elakit.models.cogvideox import CogVideoX
from elakit.models.cogview3_plus import CogView3Plus
from elakit.models.cogview4 import CogView4
from elakit.models.flux import Flux
from elakit.models.flux2 import Flux2
from elakit.models.hunyuan_dit import HunyuanDiT
from elakit.models.kolors import Kolors
from elakit.models.ltx import LTXVideo
from elakit.models.lumina2 import Lumina2
from elakit.models.pixart import PixArt
from elakit.models.qwen_image import QwenImage
from elakit.models.sana import Sana
from elakit.models.sd3 import StableDiffusion3
from elakit.models.sdxl import StableDiffusionXL
from elakit.models.stable_diffusion import StableDiffusion
from elakit.models.wan import Wan
from elakit.models.z_image import ZImage
from elakit.pipeline import Pipeline

FAMILIES: tuple[type[Adapter], ...] = (
    StableDiffusion,
    StableDiffusionXL,
    PixArt,
    StableDiffusion3,
    Flux,
    Flux2,
    ZImage,
    QwenImage,
    Sana,
    Chroma,
    AuraFlow,
    Lumina2,
    CogView3Plus,
    CogView4,
    HunyuanDiT,
    Kolors,
    Wan,
    LTXVideo,
    CogVideoX,
)

_KEPT = "_elakit_adapter"  # where a pipeline keeps its adapter: they are freed together


def adapter_for(pipe: Pipeline) -> Adapter:
    """Adapter that reads and runs a pipeline.

    Calls with the same pipeline return the same adapter, until the pipeline's denoiser is replaced.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline

    Returns
    -------
    Adapter

    Raises
    ------
    ModelError
        Raised when the pipeline belongs to no supported family; the message states why, and lists the families.

    Examples
    --------
    >>> adapter_for("a string")
    Traceback (most recent call last):
    ...
    elakit.errors.ModelError: str is not supported: it has no U-Net; it has no transformer. Supported: Stable...
    """
    kept = getattr(pipe, "__dict__", {}).get(_KEPT)
    # A copied pipeline still has the adapter of the original.
    if kept is not None and kept.pipe is pipe and kept.is_current():
        adapter: Adapter = kept
        return adapter
    reasons = []
    for family in FAMILIES:
        reason = family.refusal(pipe)
        if reason is None:
            adapter = family(pipe)
            vars(pipe)[_KEPT] = adapter
            return adapter
        reasons.append(reason)
    raise unsupported(type(pipe).__name__, reasons)


def refuse_index(what: str, index: Mapping[str, Any]) -> None:
    """Raise a `ModelError` if no family supports a model, according to the model's ``model_index.json``.

    ``index`` is the content of this file. ``what`` names the model in the message.
    """
    reasons = [family.refusal_of_index(index) for family in FAMILIES]
    if None not in reasons:
        raise unsupported(what, [reason for reason in reasons if reason is not None])


def unsupported(what: str, reasons: Sequence[str]) -> ModelError:
    """Error for a pipeline of no supported family.

    ``what`` names the pipeline in the message. ``reasons`` has one reason per family: why the family refuses the
    pipeline. If one of the reasons is a `Remediable`, which states how to turn the pipeline into a supported one, the
    message shows this reason alone. Otherwise the message shows several reasons, followed by the supported families.
    Reasons of the class `OtherKind`, such as "it has no U-Net", are shown only if there are no other reasons.
    """
    if remedy := next((reason for reason in reasons if isinstance(reason, Remediable)), None):
        return ModelError(f"{what} is not supported as it is: {remedy}.")
    near = [reason for reason in reasons if not isinstance(reason, OtherKind)]
    kinds = list(dict.fromkeys(near or reasons))
    families = "; ".join(family.family for family in FAMILIES)
    return ModelError(
        f"{what} is not supported: {'; '.join(kinds)}. Supported: {families}. Load a pipeline of one of these "
        "families, or add a new family in one file: docs/developing/adding-a-family.md in the repository describes how."
    )
