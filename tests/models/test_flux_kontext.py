"""Maps of FLUX Kontext in bfloat16 and in float32."""

from __future__ import annotations

import numpy as np
import torch
from captured import PLAIN, SPECS, TEXT
from tiny_families import tiny_kontext

from elakit.attention import RecordSpec, record

NOISE = torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(7)).bfloat16()


def words(dtype: torch.dtype, scale: float) -> np.ndarray:
    """Attention to the prompt's words in the first step from the same noise."""
    pipe, spec = tiny_kontext().to(dtype=dtype), SPECS["FLUX.1 Kontext"]
    height, width = spec.size
    settings = {"height": height, "width": width, "num_inference_steps": 1, "guidance_scale": scale}
    with record(pipe, TEXT, RecordSpec(heads="all", dtype="float32")) as recording:
        pipe(prompt=PLAIN, latents=NOISE.to(dtype), output_type="latent", **spec.options | settings)
    (node,) = recording.nodes()
    return node["probability"].sel(token=[token.label for token in recording.prompt.tokens]).values


def test_maps_in_bfloat16_differ_from_those_in_float32_because_diffusers_rounds_the_guidance() -> None:
    rounded = float(torch.tensor(3.5, dtype=torch.bfloat16) * 1000) / 1000
    assert rounded == 3.504
    half, exact, shifted = words(torch.bfloat16, 3.5), words(torch.float32, 3.5), words(torch.float32, rounded)
    assert np.abs(exact - shifted).max() > 0.02  # the high frequencies of the embedding of 3504 are other numbers
    assert np.abs(half - shifted).max() < 0.5 * np.abs(half - exact).max() < 0.02
