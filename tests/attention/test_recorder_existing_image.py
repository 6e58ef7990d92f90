"""Attention for an existing image, noised to chosen steps."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from captured import GENERATED, SPECS, Witness
from captured import compare as compare_captured
from families import FAMILIES, TEXT
from PIL import Image
from tiny import tiny_pipeline
from tiny_families import BUILDERS
from witness import compare, witness

from elakit.attention import RecordSpec, record_image
from elakit.errors import SettingError
from elakit.models import adapter_for
from elakit.prompt import parse

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), "uint8"))
EXACT = RecordSpec(heads="all", dtype="float32")


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart-alpha", "sd3", "flux"])
def test_the_noised_image_is_what_the_denoiser_sees(name: str) -> None:
    pipe = FAMILIES[name].make()
    adapter = adapter_for(pipe)
    given: list[tuple[torch.Tensor, float]] = []

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        latents = args[0] if args else kwargs["hidden_states"]
        given.append((latents, adapter.read_call(args, kwargs).timestep))

    handle = adapter.denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    with witness(adapter.layers()) as seen:
        recording = record_image(pipe, TEXT, IMAGE, at=[3, 1], steps=5, seed=2, spec=EXACT)
    handle.remove()
    compare(recording, seen, guided=False)
    assert recording.steps == (0, 1)
    assert "cut off" not in repr(recording)
    timesteps = [float(pipe.scheduler.timesteps[step]) for step in (3, 1)]
    assert recording.nodes()[0]["timestep"].values.tolist() == pytest.approx(timesteps)
    # by hand: the image's latents and the noise, mixed by the noise level
    clean = adapter.encode_image(IMAGE)
    noise = adapter.noise(torch.Generator().manual_seed(2), 32, 32)
    for (latents, timestep), step in zip(given, (3, 1), strict=True):
        if name in ("sd3", "flux"):
            sigma = float(pipe.scheduler.sigmas[step])
            expected = (1 - sigma) * clean + sigma * noise
        else:
            signal = float(pipe.scheduler.alphas_cumprod[round(timestep)])
            expected = signal**0.5 * clean + (1 - signal) ** 0.5 * noise
        torch.testing.assert_close(latents, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", GENERATED)
def test_families_read_at_their_attention_call_see_the_noised_image(name: str) -> None:
    pipe = BUILDERS[name]()
    adapter = adapter_for(pipe)
    size = (64, 64)
    image = IMAGE.resize(size)
    given: list[tuple[torch.Tensor, float]] = []
    plain = adapter.denoise

    def keep(latents: torch.Tensor, timestep: Any, conditioning: Any) -> Any:
        given.append((latents, float(timestep)))
        return plain(latents, timestep, conditioning)

    seen = Witness({layer.name: layer.module for layer in adapter.layers()})
    with pytest.MonkeyPatch.context() as patch, seen:
        patch.setattr(adapter, "denoise", keep)
        recording = record_image(pipe, TEXT, image, at=[1, 0], steps=2, seed=2, spec=EXACT)
    # the maps: what the two attention calls received, the later step first; only one pass, and all rows see the prompt
    (node,) = recording.nodes()
    assert node["timestep"].values.tolist() == pytest.approx(pipe.scheduler.timesteps.tolist()[::-1])
    pipe.scheduler.timesteps = pipe.scheduler.timesteps.flip(0)
    compare_captured(replace(SPECS[name], size=size, rows="all", second_pass=False), pipe, recording, seen, 1)
    adapter.set_timesteps(2, *size)
    # the latents: the image's and the noise, mixed by the noise level
    clean = adapter.encode_image(image)
    noise = adapter.noise(torch.Generator().manual_seed(2), *size)
    for (latents, timestep), step in zip(given, (1, 0), strict=True):
        assert timestep == float(pipe.scheduler.timesteps[step])
        sigma = float(pipe.scheduler.sigmas[step]) if hasattr(pipe.scheduler, "sigmas") else None
        if name == "Kolors":  # the noise is added, then the sum is scaled to unit variance
            expected = (clean + sigma * noise) / (sigma**2 + 1) ** 0.5
        elif sigma is None:
            signal = float(pipe.scheduler.alphas_cumprod[round(timestep)])
            expected = signal**0.5 * clean + (1 - signal) ** 0.5 * noise
        else:
            expected = (1 - sigma) * clean + sigma * noise
        torch.testing.assert_close(latents, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", ["sd", "flux", *GENERATED])
def test_encoding_is_the_inverse_of_decoding_up_to_the_autoencoder(name: str) -> None:
    pipe = FAMILIES[name].make() if name in FAMILIES else BUILDERS[name]()
    adapter = adapter_for(pipe)
    decoded: list[torch.Tensor] = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda latents, **options: (decoded.append(latents), decode(latents, **options))[1]
    pipe.vae.encode = lambda pixels: SimpleNamespace(
        latent_dist=SimpleNamespace(mode=lambda: decoded[0]), latents=decoded[0]
    )
    noise = adapter.noise(torch.Generator(), 64, 64)
    latents = torch.linspace(-1, 1, noise.numel()).view_as(noise)
    images = adapter.decode(latents, 64, 64)
    torch.testing.assert_close(adapter.encode_image(IMAGE), latents)
    if name.startswith("FLUX.2"):  # its calls keep latents without rows and columns
        assert adapter.decode(pipe._pack_latents(latents), 64, 64) == images


def test_steps_and_sides_are_checked() -> None:
    pipe = tiny_pipeline()
    prompt = parse(TEXT, pipe)
    with pytest.raises(SettingError, match="at=5"):
        record_image(pipe, prompt, IMAGE, at=[5], steps=5)
    with pytest.raises(SettingError, match="width"):
        record_image(pipe, prompt, IMAGE.resize((33, 32)), at=[1], steps=5)
