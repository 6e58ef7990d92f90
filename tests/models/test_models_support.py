"""The support table in docs/support.md says what the adapters do.

``python tests/models/test_models_support.py`` writes it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import captured
import families
import tiny_families
import tiny_videos
import torch
from PIL import Image
from tiny import tiny_flux, tiny_pipeline, tiny_pixart, tiny_sd3, tiny_sdxl

from elakit.attention import map_concepts
from elakit.errors import ModelError, RecordingError
from elakit.models import FAMILIES, adapter_for
from elakit.models.video import VideoAdapter

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
INDEPENDENT = "projections, norms and rotary embeddings recomputed in float64"
WITNESS = "query, key and mask of the attention call, in float64"
RECOMPUTED = {
    "Stable Diffusion 1.x/2.x": tiny_pipeline,
    "Stable Diffusion XL": tiny_sdxl,
    "PixArt-Alpha/Sigma": tiny_pixart,
    "Stable Diffusion 3/3.5": tiny_sd3,
    "FLUX.1": tiny_flux,
}
BUILDERS = RECOMPUTED | tiny_families.BUILDERS | tiny_videos.BUILDERS


def table() -> str:
    """A row per family, from what its adapter does with a tiny pipeline."""
    lines = [
        "| family | record | edit | generate and guide | several images | self-attention | existing image | "
        "words not in the prompt | maps checked against |",
        f"|{' --- |' * 9}",
    ]
    for family in FAMILIES:
        adapter: Any = adapter_for(BUILDERS[family.family]())
        layers = adapter.layers()
        like = all(layer.kind == "cross" and layer.layout is None for layer in layers)
        video = isinstance(adapter, VideoAdapter)
        try:
            own = adapter.self_layers(layers)
            self_attention = "yes" if own[0].module is not layers[0].module else "share of the joint softmax"
        except ModelError:
            self_attention = "no" if video else "no: linear attention"
        checked = INDEPENDENT if family.family in RECOMPUTED else WITNESS
        cells = [
            family.family,
            "yes, each frame" if video else "yes",
            "yes" if like else "yes, without `like`",
            "yes" if adapter.encodes else "no",
            "yes",
            self_attention,
            "yes" if _encodes(adapter) else "no",
            _kind_of_concepts(adapter.pipe),
            checked,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _encodes(adapter: Any) -> bool:
    """True if the latents of an existing image have the form that the denoiser takes."""
    try:
        latents = adapter.encode_image(Image.new("RGB", (64, 64)))
    except (ModelError, AttributeError):
        return False
    return bool(latents.shape == adapter.noise(torch.Generator(), 64, 64).shape)


def _kind_of_concepts(pipe: Any) -> str:
    """Kind of the values of maps of words that are not in the prompt."""
    try:
        with map_concepts(pipe, "a [red car]", ["frog", "clock"]) as found:
            return found.kind
    except RecordingError:
        return "no"


def test_the_support_table_says_what_the_adapters_do() -> None:
    page = PAGE.read_text(encoding="utf-8")
    _, _, rest = page.partition(BEGIN)
    found, _, _ = rest.partition(END)
    assert found == table(), "run `python tests/models/test_models_support.py`"


def test_maps_and_image_of_every_family_are_compared_with_its_attention_calls() -> None:
    # by test_adapter_attention_calls.py at the call, by test_adapter_hooks.py from the layers' inputs and weights
    recomputed = {adapter_for(family.make()).family for family in families.FAMILIES.values()}
    assert recomputed.isdisjoint(captured.SPECS)
    # of videos, by test_video.py
    assert {family.family for family in FAMILIES} <= recomputed | set(captured.SPECS) | set(tiny_videos.BUILDERS)


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + table() + END + after, encoding="utf-8")
