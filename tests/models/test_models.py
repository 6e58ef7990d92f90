"""Models: what can be loaded, what is refused and how, and what an adapter knows of a pipeline."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.errors as hub
import numpy as np
import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from httpx import Request, Response
from tiny import (
    autoencoder,
    ready,
    t5_encoder,
    tiny_flux,
    tiny_pipeline,
    tiny_pixart,
    tiny_sd3,
    tiny_sdxl,
    tiny_t5_tokenizer,
)

import elakit.models
from elakit.attention import Edit, edit, record
from elakit.errors import ModelError, SettingError
from elakit.models import EMBEDDED, Adapter, DrawingSettings, adapter_for, default_settings, load
from elakit.prompt import parse


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
    for height, width, part in ((30, 32, "height is 30"), (32, 0, "width is 0"), (-8, 32, "multiple of 4")):
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
        (object, "no UNet; it has no transformer"),
        (unconditional, "UNet2DModel"),
        (of_another_transformer, "its transformer is a Linear"),
        (guided_thrice, "three passes"),
        (without_text, "no layer of its UNet attends to text"),
        (compiled, "_orig_mod"),
    ],
)
def test_an_unsupported_pipeline_is_refused_with_the_families(make: Any, part: str) -> None:
    with pytest.raises(ModelError, match=part) as error:
        adapter_for(make())
    families = "Stable Diffusion 1.x/2.x; Stable Diffusion XL; PixArt-Alpha/Sigma; Stable Diffusion 3/3.5; FLUX.1"
    assert f"Supported: {families}" in str(error.value)
    assert "docs/developing/adding-a-family.md" in str(error.value)


def test_a_near_miss_is_told_without_the_reasons_of_other_kinds() -> None:
    with pytest.raises(ModelError) as error:
        adapter_for(guided_thrice())
    assert str(error.value).startswith(
        "StableDiffusionInstructPix2PixPipeline is not supported: it guides by three passes (text and image, image, "
        "neither). Supported:"
    )


# -- adding a family -------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "developing" / "adding-a-family.md"


def test_the_page_on_adding_a_family_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its example is a whole family that records; what it says an adapter has, `Adapter` has; what it names exists."""
    page = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n# elakit/models/aura_flow\.py\n(.*?)```", page, flags=re.S)
    made: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), made)
    family = made["AuraFlow"]
    asked = {name for name in vars(Adapter) if not name.startswith("_")} | set(Adapter.__annotations__)
    assert set(re.findall(r"^\| `(\w+)", page, flags=re.M)) == asked
    assert asked - {"pipe", "denoiser"} <= set(dir(family))
    for named in re.findall(r"`((?:elakit|tests|docs)/[\w./-]+)`", page):
        assert named == "elakit/models/aura_flow.py" or (Path(__file__).parents[2] / named).exists(), named
    pipe = tiny_aura_flow()
    with pytest.raises(ModelError, match="AuraFlowTransformer2DModel"):
        adapter_for(pipe)
    monkeypatch.setattr(elakit.models, "FAMILIES", (*elakit.models.FAMILIES, family))
    prompt = parse("a [red car]", pipe)
    options = {"max_sequence_length": 12, "height": 32, "width": 48}
    plain = image(pipe, **options)
    with record(pipe, prompt) as recording:
        assert np.array_equal(plain, image(pipe, **options))
    assert recording.maps("car").shape == (2, 1, 4, 6)
    assert len(recording.layers) == 3
    with edit(pipe, prompt, Edit("car", scale=0)), record(pipe, prompt) as recording:
        assert not np.array_equal(plain, image(pipe, **options))
    assert float(recording.maps("car").max()) == 0
    timesteps = pipe.scheduler.timesteps.tolist()
    assert recording.maps("car")["timestep"].values.tolist() == pytest.approx(timesteps)


def tiny_aura_flow() -> Any:
    tokenizer = tiny_t5_tokenizer()
    net: Any = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    pipe: Any = AuraFlowPipeline(
        tokenizer, t5_encoder(tokenizer, 32), autoencoder(), net, FlowMatchEulerDiscreteScheduler()
    )
    return ready(pipe)


# -- loading ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a test may damage."""
    target = tmp_path / "copy"
    for file in (path for path in folder.rglob("*") if path.is_file()):
        (target / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        (target / file.relative_to(folder)).write_bytes(file.read_bytes())
    return target


def change_index(folder: Path, **changes: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(elakit.models, "hf_hub_download", refuse)


@pytest.mark.usefixtures("no_network")
def test_a_folder_gives_the_pipeline_that_was_saved(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        pipe = load(folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    assert np.array_equal(image(pipe), image(tiny_pipeline()))
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    half = load(str(folder), device="cpu", dtype="bfloat16")
    assert {part.dtype for part in (half.unet, half.vae, half.text_encoder)} == {torch.bfloat16}


@pytest.mark.usefixtures("no_network")
def test_an_embedded_model_is_looked_up_in_the_shipped_data(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elakit.models, "data_path", lambda *parts: folder.parent.joinpath("tiny"))
    pipe = load("picture-world", device="cpu")
    assert pipe.unet.dtype == torch.float32
    model = EMBEDDED["picture-world"]
    assert default_settings(pipe) == DrawingSettings(model.steps, model.guidance_scale)
    monkeypatch.setattr(elakit.models, "data_path", lambda *parts: tmp_path.joinpath(*parts))
    with pytest.raises(ModelError, match="missing from this installation"):
        load("picture-world")


def test_other_pipelines_keep_their_own_defaults(pipe: Any) -> None:
    assert default_settings(pipe) == DrawingSettings(50, 7.5)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("image-wrld", "Did you mean 'picture-world'"),
        ("Picture World", "Did you mean 'picture-world'"),
        ("sd15", "Unknown model 'sd15'"),
        ("", "Unknown model ''"),
        ("models/of/mine", "Unknown model 'models/of/mine'"),
        ("./runs/model", "Unknown model"),
        ("/no/such/folder", "Unknown model"),
    ],
)
def test_a_name_that_can_be_nothing_fails_at_once(name: str, part: str) -> None:
    with pytest.raises(ModelError, match=part) as error:
        load(name)
    for expected in ("picture-world", "folder", "hub id"):
        assert expected in str(error.value)


@pytest.mark.usefixtures("no_network")
def test_paths_that_hold_no_pipeline_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        load(tmp_path)
    weights = tmp_path / "v1-5.safetensors"
    weights.write_bytes(b"")
    with pytest.raises(ModelError, match="single file"):
        load(weights)


def hub_error(kind: type[Exception]) -> Exception:
    if issubclass(kind, hub.HfHubHTTPError):
        return kind("refused", response=Response(404, request=Request("GET", "https://hub")))
    return kind("refused")


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        (hub.LocalEntryNotFoundError, "cannot be reached"),
        (hub.RepositoryNotFoundError, "no such model is on the hub"),
        (hub.GatedRepoError, "license"),
        (hub.RemoteEntryNotFoundError, "not a diffusers pipeline"),
        (hub.HfHubHTTPError, "refused"),
    ],
)
def test_a_hub_id_that_cannot_be_had_says_why(kind: Any, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise hub_error(kind)

    monkeypatch.setattr(elakit.models, "hf_hub_download", fail)
    with pytest.raises(ModelError, match=part) as error:
        load("someone/some-model")
    assert "'someone/some-model'" in str(error.value)
    assert "picture-world" in str(error.value)


def test_a_wrong_family_is_refused_before_its_weights_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elakit.models, "hf_hub_download", lambda *_: str(tmp_path / "index.json"))
    sana = {"_class_name": "SanaPipeline", "transformer": ["diffusers", "SanaTransformer2DModel"]}
    without = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    for index, part in ((sana, "a SanaTransformer2DModel"), (without, "UNet2DModel, which does not attend")):
        (tmp_path / "index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError, match=part):
            load("someone/some-model")


@pytest.mark.parametrize("make", [tiny_sdxl, tiny_sd3, tiny_pixart, tiny_flux])
@pytest.mark.usefixtures("no_network")
def test_every_family_is_loaded_from_a_folder(make: Any, tmp_path: Path) -> None:
    pipe = make()
    pipe.save_pretrained(tmp_path)
    loaded = load(tmp_path, device="cpu")
    assert adapter_for(loaded).family == adapter_for(pipe).family
    assert [layer.name for layer in adapter_for(loaded).layers()] == [x.name for x in adapter_for(pipe).layers()]


def test_code_that_comes_with_a_model_is_never_run(copy: Path, tmp_path: Path) -> None:
    marker = tmp_path / "was_run"
    code = f"open({str(marker)!r}, 'w')\nclass Mine: pass\n"
    (copy / "mine.py").write_text(code)
    (copy / "unet" / "mine.py").write_text(code)
    change_index(copy, _class_name=["mine", "Mine"])
    with pytest.raises(ModelError, match="runs no code"):
        load(copy)
    change_index(copy, _class_name="StableDiffusionPipeline", unet=["mine", "Mine"])
    with pytest.raises(ModelError, match="takes its unet from 'mine'"):
        load(copy)
    assert not marker.exists()


def test_pickled_weights_are_refused(copy: Path) -> None:
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        weights = copy / f"{part}.safetensors"
        saved = weights.read_bytes()
        torch.save({}, weights.with_suffix(".bin"))
        weights.unlink()
        with pytest.raises(ModelError, match="safetensors"):
            load(copy, device="cpu")
        weights.write_bytes(saved)


def test_a_damaged_folder_says_so(copy: Path) -> None:
    (copy / "unet" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="could not be loaded"):
        load(copy, device="cpu")
    (copy / "model_index.json").write_text("[")
    with pytest.raises(ModelError, match="cannot be read"):
        load(copy, device="cpu")


@pytest.mark.parametrize(
    ("options", "part"),
    [({"device": "gpu"}, "'gpu'"), ({"device": "cuda:99"}, "cuda:99"), ({"dtype": "int8"}, "float32, float16")],
)
def test_devices_and_precisions_that_do_not_exist(folder: Path, options: dict[str, Any], part: str) -> None:
    if torch.cuda.is_available() and "device" in options and "cuda" in options["device"]:
        pytest.skip("tells what happens on a machine without CUDA")
    with pytest.raises(SettingError, match=part):
        load(folder, **options)
