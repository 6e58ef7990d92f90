"""Attention for an existing image, noised to chosen steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, TEXT
from PIL import Image
from tiny import tiny_pipeline
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


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_encoding_is_the_inverse_of_decoding_up_to_the_autoencoder(name: str) -> None:
    pipe = FAMILIES[name].make()
    adapter = adapter_for(pipe)
    wanted = torch.linspace(-1, 1, adapter.noise(torch.Generator(), 32, 32).numel()).view(1, -1)
    pipe.vae.encode = lambda pixels: type("Found", (), {"latents": decoded[0]})()
    decoded: list[torch.Tensor] = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda latents, **options: (decoded.append(latents), decode(latents, **options))[1]
    latents = wanted.view_as(adapter.noise(torch.Generator(), 32, 32))
    adapter.decode(latents, 32, 32)
    torch.testing.assert_close(adapter.encode_image(IMAGE), latents)


def test_steps_and_sides_are_checked() -> None:
    pipe = tiny_pipeline()
    prompt = parse(TEXT, pipe)
    with pytest.raises(SettingError, match="at=5"):
        record_image(pipe, prompt, IMAGE, at=[5], steps=5)
    with pytest.raises(SettingError, match="width"):
        record_image(pipe, prompt, IMAGE.resize((33, 32)), at=[1], steps=5)
