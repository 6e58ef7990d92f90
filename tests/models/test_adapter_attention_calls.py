"""Families that are read at their attention call: maps, tokens, images, guidance and edits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from captured import GENERATED, PLAIN, SPECS, TEXT, Witness, compare, draw
from families import lora, offload
from tiny_families import BUILDERS
from torch import Tensor

import elakit
from elakit.attention import Edit, RecordSpec, edit, record
from elakit.errors import ModelError
from elakit.guidance import AttendAndExcite
from elakit.models import adapter_for
from elakit.prompt import parse


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", SPECS)
def test_maps_are_those_of_the_attention_call_and_the_image_stays(name: str, images: int) -> None:
    spec, pipe = SPECS[name], BUILDERS[name]()
    several = {"num_images_per_prompt": images}
    plain = draw(pipe, spec, **several)
    prompt = parse(TEXT, pipe)
    layers = adapter_for(pipe).layers()
    witness = Witness({layer.name: layer.module for layer in layers})
    with record(pipe, prompt, RecordSpec(heads="all", dtype="float32")) as recording, witness:
        assert np.array_equal(plain, draw(pipe, spec, **several))
    compare(spec, pipe, recording, witness, images)


def lora_and_offload(pipe: Any) -> None:
    lora(adapter_for(pipe).denoiser)
    offload(pipe)


def layerwise_casting(pipe: Any) -> None:
    adapter_for(pipe).denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def bfloat16(pipe: Any) -> None:
    pipe.to(dtype=torch.bfloat16)


@pytest.mark.parametrize("way", [lora_and_offload, layerwise_casting, bfloat16], ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", SPECS)
def test_maps_are_those_of_the_attention_call_whatever_way_it_is_run(name: str, way: Callable[[Any], None]) -> None:
    spec, pipe = SPECS[name], BUILDERS[name]()
    way(pipe)
    witness = Witness({layer.name: layer.module for layer in adapter_for(pipe).layers()})
    exact = RecordSpec(heads="all", dtype="float32")
    with record(pipe, parse(TEXT, pipe), exact) as recording, witness:
        draw(pipe, spec)
    compare(spec, pipe, recording, witness, 1)


@pytest.mark.parametrize("name", SPECS)
def test_tokens_stand_where_the_text_encoder_reads_them(name: str) -> None:
    spec, pipe = SPECS[name], BUILDERS[name]()
    read: list[Tensor] = []

    def listen(_: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        mask = kwargs.get("attention_mask")
        # Z-Image and Qwen-Image keep the states of tokens that are no padding.
        read.append(ids[0][mask[0].bool()] if name in ("Z-Image", "Qwen-Image") else ids[0])

    encoder = pipe.text_encoder_2 if name == "FLUX.1 Kontext" else pipe.text_encoder
    encoder.register_forward_pre_hook(listen, with_kwargs=True)
    if name == "HunyuanDiT":  # BERT's tokens, then T5's
        pipe.text_encoder_2.register_forward_pre_hook(listen, with_kwargs=True)
    draw(pipe, spec)
    prompt = parse(TEXT, pipe)
    tokenizer = pipe.tokenizer_2 if name == "FLUX.1 Kontext" else pipe.tokenizer
    ids = read[0].tolist()
    if name == "HunyuanDiT":
        second = next(one for one in read if one.shape == (256,)).tolist()
        for token in prompt.tokens[len(prompt.tokens) // 2 :]:
            assert pipe.tokenizer_2.decode([second[token.index - len(ids)]]).strip() == token.text.strip()
        prompt = replace(prompt, tokens=prompt.tokens[: len(prompt.tokens) // 2])
    for token in prompt.tokens:
        piece = tokenizer.decode([ids[spec.token(token.index, len(ids))]])
        assert piece.strip().removeprefix("##") == token.text.strip(), token  # WordPiece marks later pieces
    end = ids[spec.token(prompt.end_index, len(ids)) :]
    assert not any(word in tokenizer.decode(end) for word in ("car", "giraffe"))


@pytest.mark.parametrize("name", GENERATED)
def test_generate_gives_the_pipelines_own_image(name: str) -> None:
    spec, pipe = SPECS[name], BUILDERS[name]()
    height, width = spec.size
    own = draw(pipe, spec, output_type="pil")[0]
    settings = {"steps": 2, "height": height, "width": width, "progress": False}
    settings["negative_prompt"] = spec.options.get("negative_prompt")
    run = elakit.generate(pipe, TEXT, seed=7, **settings)
    assert np.array_equal(np.asarray(run.image), np.asarray(own))
    assert run.recording.steps == (0, 1)
    assert set(run.bleeding.to_frame()["entity"].dropna()) >= {"car", "giraffe"}
    both = elakit.generate(pipe, TEXT, seed=[3, 7], **settings)
    assert np.abs(np.asarray(both[1].image, int) - np.asarray(own, int)).max() <= 2


@pytest.mark.parametrize("name", GENERATED)
def test_guidance_moves_the_latents_along_the_gradient(name: str) -> None:
    spec, pipe = SPECS[name], BUILDERS[name]()
    height, width = spec.size
    settings = {"seed": 7, "steps": 3, "height": height, "width": width, "progress": False}
    plain = elakit.generate(pipe, TEXT, **settings)
    guided = elakit.generate(pipe, TEXT, guidance=AttendAndExcite(refine=()), **settings)
    assert not np.array_equal(np.asarray(plain.image), np.asarray(guided.image))
    assert any(row["moved"] > 0 for row in guided.guidance.rows)

    adapter = adapter_for(pipe)
    conditioning = adapter.encode(PLAIN, guided=False, size=spec.size)
    adapter.set_timesteps(3, height, width)
    noise = adapter.noise(torch.Generator().manual_seed(0), height, width)
    layer = adapter.layers()[-1]
    car = parse(TEXT, pipe).find("car")[0]

    def share(latents: Tensor) -> Tensor:
        found: list[Tensor] = []
        with elakit.attention.tap([layer], lambda _, attend, size: found.append(attend(slice(0, 1))[..., car].mean())):
            adapter.denoise(latents, pipe.scheduler.timesteps[0], conditioning)
        return found[0]

    latents = noise.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(share(latents), latents)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        change = share(noise + 1e-2 * direction) - share(noise - 1e-2 * direction)
    assert float(change) / 2e-2 == pytest.approx(float(gradient.norm()), rel=0.05)


@pytest.mark.parametrize("name", SPECS)
def test_an_edit_hides_a_word_and_the_recording_shows_it(name: str) -> None:
    spec, pipe = SPECS[name], BUILDERS[name]()
    prompt = parse(TEXT, pipe)
    plain = draw(pipe, spec)
    left = [[True, False]]
    for outer, inner in (("edit", "record"), ("record", "edit")):
        blocks = {"edit": edit(pipe, prompt, Edit("car", scale=0, region=left)), "record": record(pipe, prompt)}
        with blocks[outer] as first, blocks[inner] as second:
            changed = draw(pipe, spec)
        recording = second if inner == "record" else first
        car = recording.maps("car").isel(token=0)
        half = car.sizes["x"] // 2
        assert float(car[..., :half].max()) < 1e-6 < float(car[..., half:].max())
        assert not np.array_equal(plain, changed)
    with edit(pipe, prompt, Edit("car", scale=1)):
        assert np.array_equal(plain, draw(pipe, spec))


def test_sana_has_no_self_attention_maps() -> None:
    adapter = adapter_for(BUILDERS["Sana"]())
    with pytest.raises(ModelError, match="linear self-attention"):
        adapter.self_layers(adapter.layers())
