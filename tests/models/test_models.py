"""Models: what can be loaded, what is refused and how, and what an adapter knows of a pipeline."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    IPNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from tiny import (
    tiny_flux,
    tiny_pipeline,
)

import elakit
from elakit.errors import ModelError, SettingError
from elakit.guidance import AttendAndExcite
from elakit.models import (
    Adapter,
    adapter_for,
    dispatch,
)
from elakit.models.device import compute_dtype


def image(pipe: Any, **options: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(3)
    return pipe("a red car", num_inference_steps=2, generator=generator, output_type="np", **options).images


# -- adapters --------------------------------------------------------------------------------------------------------


def test_layers_and_their_factors_are_those_of_a_pass(pipe: Any) -> None:
    adapter = adapter_for(pipe)
    sizes: dict[str, tuple[int, ...]] = {}
    for layer in adapter.layers():
        layer.block.register_forward_pre_hook(
            lambda _, args, name=layer.name: sizes.update({name: tuple(args[0].shape[-2:])})
        )
    height, width = adapter.latent_size(32, 64)
    embeds = adapter.encode("a red car", guided=False)
    adapter.denoise(torch.zeros(1, 4, height, width), 5, embeds)
    assert list(sizes) == [layer.name for layer in adapter.layers()]  # forward order
    for layer in adapter.layers():
        assert sizes[layer.name] == (height // layer.factor, width // layer.factor)
        assert pipe.unet.get_submodule(layer.name) is layer.module
        assert layer.name.startswith(layer.place)
        assert layer.heads == layer.module.heads


def test_stable_diffusion_1_5_has_its_sixteen_layers(pipe: Any) -> None:
    with torch.device("meta"):
        pipe.unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    adapter = adapter_for(pipe)
    by_place = {place: [x.factor for x in adapter.layers() if x.place == place] for place in ("down", "mid", "up")}
    assert by_place == {"down": [1, 1, 2, 2, 4, 4], "mid": [8], "up": [4, 4, 4, 2, 2, 2, 1, 1, 1]}
    assert {layer.heads for layer in adapter.layers()} == {8}


def test_conditional_rows_follow_the_guidance_of_the_moment(pipe: Any) -> None:
    adapter = adapter_for(pipe)
    assert adapter.conditional_rows(2) == slice(0, 2)  # before any run: no guidance
    pipe._guidance_scale = 7.5
    assert adapter.conditional_rows(6) == slice(3, 6)
    with pytest.raises(ModelError, match="3 rows"):
        adapter.conditional_rows(3)
    pipe._guidance_scale = 1.0
    assert adapter.conditional_rows(3) == slice(0, 3)


def test_perturbed_attention_guidance_keeps_the_middle_rows(pipe: Any) -> None:
    perturbed = StableDiffusionPAGPipeline(**pipe.components, requires_safety_checker=False, pag_applied_layers="mid")
    perturbed._guidance_scale, perturbed._pag_scale = 7.5, 3.0
    assert adapter_for(perturbed).conditional_rows(6) == slice(2, 4)
    perturbed._guidance_scale = 1.0
    assert adapter_for(perturbed).conditional_rows(4) == slice(0, 2)


def test_sizes(pipe: Any) -> None:
    adapter = adapter_for(pipe)
    assert adapter.default_size() == (32, 32)
    assert adapter.latent_size(*adapter.default_size()) == (8, 8)
    assert adapter.text_length() == 20
    for height, width, part in ((30, 32, "height=30"), (32, 0, "width=0"), (-8, 32, "multiple of 4")):
        with pytest.raises(SettingError, match=part):
            adapter.latent_size(height, width)


def test_encoding_and_denoising_are_the_pipelines_own(pipe: Any) -> None:
    adapter = adapter_for(pipe)
    seen: dict[str, Any] = {}

    def listen(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[torch.Tensor]) -> None:
        seen.setdefault("call", (args[0], args[1], kwargs["encoder_hidden_states"], output[0]))

    handle = pipe.unet.register_forward_hook(listen, with_kwargs=True)
    image(pipe, negative_prompt="a dog", guidance_scale=5.0)
    handle.remove()
    sample, timestep, text, predicted = seen["call"]
    conditioning = adapter.encode("a red car", "a dog", guided=True)
    both = [conditioning.call["negative_prompt_embeds"], conditioning.call["prompt_embeds"]]
    assert torch.equal(torch.cat(both), text)
    with torch.no_grad():
        torch.testing.assert_close(adapter.denoise(sample[1:], timestep, conditioning), predicted[1:])
    assert "negative_prompt_embeds" not in adapter.encode("a red car", guided=False).call


def test_pipelines_with_the_same_unet_are_served(pipe: Any) -> None:
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    assert adapter_for(other).layers() == adapter_for(pipe).layers()


def unconditional() -> Any:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
    )
    return DDPMPipeline(unet, DDPMScheduler())


def of_another_transformer() -> Any:
    return SimpleNamespace(transformer=torch.nn.Linear(2, 2))


def guided_thrice() -> Any:
    return StableDiffusionInstructPix2PixPipeline(**tiny_pipeline().components, requires_safety_checker=False)


def without_text() -> Any:
    return tiny_pipeline(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type=None)


def compiled() -> Any:
    pipe = tiny_pipeline()
    wrapper = torch.nn.Module()  # as torch.compile wraps, without the seconds its import takes
    wrapper._orig_mod = pipe.unet
    pipe.unet = wrapper
    return pipe


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (object, "no U-Net; it has no transformer"),
        (unconditional, "UNet2DModel"),
        (of_another_transformer, "its transformer has the class Linear"),
        (guided_thrice, "three passes"),
        (without_text, "no layer of its U-Net attends to text"),
    ],
)
def test_an_unsupported_pipeline_is_refused_with_the_families(make: Any, part: str) -> None:
    with pytest.raises(ModelError, match=part) as error:
        adapter_for(make())
    families = "Stable Diffusion 1.x/2.x; Stable Diffusion XL; PixArt-Alpha/Sigma; Stable Diffusion 3/3.5; FLUX.1"
    assert f"Supported: {families}" in str(error.value)
    assert "docs/developing/adding-a-family.md" in str(error.value)


def test_a_compiled_pipeline_is_refused_with_the_remedy_only() -> None:
    with pytest.raises(ModelError) as error:
        adapter_for(compiled())
    message = str(error.value)
    assert message.endswith("`pipe.unet = pipe.unet._orig_mod`, for recording and guidance.")
    assert "Supported:" not in message


def test_a_near_miss_is_told_without_the_reasons_of_other_kinds() -> None:
    with pytest.raises(ModelError) as error:
        adapter_for(guided_thrice())
    assert str(error.value).startswith(
        "StableDiffusionInstructPix2PixPipeline is not supported: it guides by three passes (text and image, image, "
        "neither). Supported:"
    )


def test_an_adapter_is_kept_with_its_pipeline_while_that_stays_as_it_was() -> None:
    pipe = tiny_pipeline()
    adapter = adapter_for(pipe)
    assert adapter_for(pipe) is adapter
    twin = copy.copy(pipe)
    assert adapter_for(twin).pipe is twin
    whole = copy.deepcopy(pipe)
    assert adapter_for(whole).denoiser is whole.unet
    pipe.unet = tiny_pipeline(seed=1).unet
    assert adapter_for(pipe) is not adapter
    assert adapter_for(pipe).denoiser is pipe.unet
    freed = weakref.ref(pipe)
    del pipe, adapter
    gc.collect()
    assert freed() is None


def test_noise_has_the_precision_in_which_a_quantized_model_computes() -> None:
    """Stored weights of 8 bits, as layerwise casting and quantization leave them, are no type for noise."""
    for pipe in (tiny_pipeline(), tiny_flux()):
        adapter = adapter_for(pipe)
        adapter.denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
        assert next(adapter.denoiser.parameters()).dtype == torch.float8_e4m3fn
        assert adapter.noise(torch.Generator().manual_seed(0), 32, 32).dtype == torch.bfloat16
    packed = torch.nn.Linear(4, 4)
    packed.weight = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)  # as 4-bit weights
    packed.bias = None
    assert compute_dtype(packed) == torch.float32
    packed.compute_dtype = torch.float16  # what bitsandbytes and GGUF layers say
    assert compute_dtype(packed) == torch.float16


def test_a_scheduler_without_sigmas_can_be_guided() -> None:
    """IPNDM keeps noise and signal under other names."""
    pipe = tiny_pipeline()
    pipe.scheduler = IPNDMScheduler()
    settings = {"seed": 1, "steps": 3, "progress": False}
    plain = elakit.generate(pipe, "a [red car] and a [blue bird]", **settings)
    guided = elakit.generate(pipe, "a [red car] and a [blue bird]", guidance=AttendAndExcite(refine=()), **settings)
    assert not np.array_equal(np.asarray(plain.image), np.asarray(guided.image))


class ModularPipeline:
    """Stands for diffusers' class of this name."""


def test_a_modular_pipeline_is_refused_with_what_to_load_instead() -> None:
    pipe = type("FluxModularPipeline", (ModularPipeline,), {})()
    pipe.transformer = tiny_flux().transformer
    with pytest.raises(ModelError, match=r"modular pipeline.*elakit.load`\.$"):
        adapter_for(pipe)


# -- adding a family -------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "developing" / "adding-a-family.md"


def test_the_page_on_adding_a_family_is_right() -> None:
    """Its table lists the members of `Adapter`; the files that it names exist, and so do its examples."""
    page = PAGE.read_text(encoding="utf-8")
    asked = {name for name in vars(Adapter) if not name.startswith("_")} | set(Adapter.__annotations__)
    optional = {"text_arguments", "text_call", "text_limit"}
    assert set(re.findall(r"^\| `(\w+)", page, flags=re.M)) == asked | optional
    assert all(asked - {"pipe", "denoiser"} <= set(dir(family)) for family in dispatch.FAMILIES)
    for named in re.findall(r"`((?:elakit|tests|docs)/[\w./-]+)`", page):
        assert (Path(__file__).parents[2] / named).exists(), named
    examples = re.findall(r"\{literalinclude\} (\S+)", page)
    assert examples
    assert all((PAGE.parent / example).resolve().is_file() for example in examples)
