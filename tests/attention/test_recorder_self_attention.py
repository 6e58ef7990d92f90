"""Self-attention that is kept beside the maps, and maps that are propagated along it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from captured import SPECS
from diffusers.models.attention_processor import AttnProcessor
from tiny import tiny_flux, tiny_pipeline, tiny_pixart, tiny_sd3, tiny_sdxl
from tiny_families import BUILDERS
from witness import witness

from elakit.attention import RecordSpec, SelfAttention, open_recording, record
from elakit.attention.aggregate import refined
from elakit.errors import RecordingError, SettingError
from elakit.models import adapter_for
from elakit.prompt import Prompt, parse

TEXT = "a [red car] and a [blue bird]"


def draw(pipe: Any, text: str, steps: int = 3, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return pipe(prompt=text, num_inference_steps=steps, generator=generator, output_type="latent", **options).images


class Watching(AttnProcessor):
    """A plain processor that keeps the probabilities that a layer computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        scores, attn.get_attention_scores = attn.get_attention_scores, self._keep(attn)
        try:
            return super().__call__(attn, *args, **kwargs)
        finally:
            attn.get_attention_scores = scores

    def _keep(self, attn: Any) -> Any:
        compute = type(attn).get_attention_scores

        def keep(*args: Any) -> torch.Tensor:
            self.seen.append(compute(attn, *args))
            return self.seen[-1]

        return keep


def test_it_is_the_mean_of_what_the_layers_of_its_size_computed() -> None:
    pipe = tiny_pipeline()
    prompt = parse(TEXT, pipe)
    plain = draw(pipe, prompt.text)
    spec = RecordSpec(self_attention=8, dtype="float32")
    with record(pipe, prompt, spec) as recording:
        assert torch.equal(draw(pipe, prompt.text), plain)
    beside = [name for name in recording.layers if name in recording.tree["8x8"]["layer"].values]
    watchers = {name.replace("attn2", "attn1"): Watching() for name in beside}
    pipe.unet.set_attn_processor(
        {name: watchers.get(name.removesuffix(".processor"), AttnProcessor()) for name in pipe.unet.attn_processors}
    )
    draw(pipe, prompt.text)
    # (steps, layers, heads of the conditional half, locations, locations)
    seen = torch.stack([torch.stack([w.seen[step] for w in watchers.values()]) for step in range(3)])
    expected = seen.unflatten(2, (2, -1))[:, :, 1].mean((1, 2))
    kept = recording.tree["self-8x8"]["probability"].values.reshape(3, 64, 64)
    np.testing.assert_allclose(kept, expected, atol=1e-5)
    assert spec.plan(pipe, prompt, steps=3).bytes == recording.nbytes
    assert recording.sizes == ((8, 8), (4, 4))
    assert "self-attention 8x8" in repr(recording)


def node(matrix: np.ndarray, size: tuple[int, int]) -> xr.Dataset:
    values = matrix.reshape(1, 1, 1, 1, *size, -1)
    return xr.Dataset({"probability": (("step", "image", "layer", "head", "y", "x", "token"), values)})


def test_locations_that_attend_to_each_other_share_their_values() -> None:
    maps = np.array([[[[1.0, 0.0], [0.5, 0.5]]]], np.float32)
    alone = np.eye(4)
    np.testing.assert_array_equal(refined(maps, node(alone, (2, 2)), 0, 3), maps)
    together = np.full((4, 4), 0.25)
    np.testing.assert_allclose(refined(maps, node(together, (2, 2)), 0, 1), np.full((1, 1, 2, 2), 0.5))
    # The two locations of the first row attend to each other equally, the others to themselves.
    rows = np.eye(4)
    rows[:2, :2] = 0.5
    np.testing.assert_allclose(refined(maps, node(rows, (2, 2)), 0, 1), [[[[0.5, 0.5], [0.5, 0.5]]]])
    # The first location attends to the second only and takes its value; the second keeps its own.
    hop = np.eye(4)
    hop[0] = [0, 1, 0, 0]
    np.testing.assert_allclose(refined(maps, node(hop, (2, 2)), 0, 1)[0, 0], [[0, 0], [0.5, 0.5]])


@pytest.mark.parametrize(
    ("make", "options"),
    [(tiny_pipeline, {}), (tiny_sdxl, {}), (tiny_pixart, {"use_resolution_binning": False})],
)
def test_refined_maps_come_at_its_size_from_memory_and_disk(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    pipe = make()
    prompt = parse(TEXT, pipe)
    side = max(RecordSpec().plan(pipe, prompt, steps=1).resolutions[-1].size)
    spec = RecordSpec(self_attention=side)
    with record(pipe, prompt, spec) as kept:
        draw(pipe, prompt.text, num_images_per_prompt=2, **options)
    with record(pipe, prompt, spec, store=tmp_path / "run.zarr"):
        draw(pipe, prompt.text, num_images_per_prompt=2, **options)
    opened = open_recording(tmp_path / "run.zarr")
    maps = kept.maps("entities", refine=2, image=1)
    assert maps.shape[-2:] == (side, side)
    xr.testing.assert_identical(maps, opened.maps("entities", refine=2, image=1))
    part = opened.sel(step=[0, 2], image=1, token="car")
    np.testing.assert_array_equal(part.maps("car", refine=2), kept.maps("car", steps=[0, 2], refine=2, image=1))
    one = kept.isel(step=-1)
    np.testing.assert_array_equal(one.maps("bird", refine=1), kept.maps("bird", steps=-1, refine=1))
    # Rows of self-attention sum to 1, so maps stay between their minimum and maximum.
    raw = kept.maps("entities", size=side)
    assert float(maps.max()) <= float(kept.maps("entities", image=1).max()) + 1e-3
    assert float(raw.min()) >= 0


def test_a_mean_over_steps_keeps_it_too() -> None:
    pipe = tiny_pipeline()
    prompt = parse(TEXT, pipe)
    with record(pipe, prompt, RecordSpec(self_attention=4, dtype="float32")) as each:
        draw(pipe, prompt.text)
    with record(pipe, prompt, RecordSpec(self_attention=4, dtype="float32", accumulate=True)) as mean:
        draw(pipe, prompt.text)
    whole = each.tree["self-4x4"]["probability"].mean("step")
    np.testing.assert_allclose(mean.tree["self-4x4"]["probability"][0], whole, atol=1e-6)


def test_what_cannot_be_had_is_said() -> None:
    pipe = tiny_pipeline()
    prompt = parse(TEXT, pipe)
    with record(pipe, prompt) as recording:
        draw(pipe, prompt.text, steps=1)
    with pytest.raises(RecordingError, match=r"RecordSpec\(self_attention=16\)"):
        recording.maps("car", refine=1)
    with pytest.raises(RecordingError, match="8x8, 4x4"):
        RecordSpec(self_attention=5).plan(pipe, prompt, steps=1)
    with pytest.raises(SettingError, match="longer side"):
        RecordSpec(self_attention=0)
    with record(pipe, prompt, RecordSpec(self_attention=4)) as recording:
        draw(pipe, prompt.text, steps=1)
    with pytest.raises(SettingError, match="refine is -1"):
        recording.maps("car", refine=-1)


JOINT = {
    "sd3": (tiny_sd3, {"max_sequence_length": 14}),
    "flux": (tiny_flux, {"max_sequence_length": 14, "height": 32, "width": 32}),
}


@pytest.mark.parametrize("name", JOINT)
def test_in_joint_attention_it_is_the_attention_to_the_keys_of_the_image(name: str, tmp_path: Path) -> None:
    """Compared with what the attention call received; with the text's share it sums to 1."""
    make, options = JOINT[name]
    pipe = make()
    prompt = parse(TEXT, pipe)
    plain = draw(pipe, prompt.text, steps=1, **options)
    own = SelfAttention(size=4, heads="all", each_layer=True)
    spec = RecordSpec(self_attention=own, heads="all", dtype="float32")
    path = tmp_path / "run.zarr"
    with witness(adapter_for(pipe).layers()) as seen, record(pipe, prompt, spec, store=path) as recording:
        assert torch.equal(plain, draw(pipe, prompt.text, steps=1, **options))
    assert spec.plan(pipe, prompt, steps=1, height=32, width=32).bytes == recording.nbytes
    (node,) = open_recording(path).nodes("image")
    for one, layer in zip(seen, recording.layers, strict=True):
        row = len(one.probabilities) - 1  # the last one sees the prompt
        image = slice(-16, None) if one.layer.text_first else slice(0, 16)
        truth = one.probabilities[row][:, image, image]
        kept = node["probability"].sel(layer=layer).isel(step=0, image=0).values.reshape(2, 16, 16)
        np.testing.assert_allclose(kept, truth, atol=1e-6)
    one_layer = recording.layers[-1]
    total = recording.self_attention(layers=one_layer, head=1).sum(("y_key", "x_key"))
    text = recording.sel(layer=one_layer, head=1).maps().sum("token")
    np.testing.assert_allclose(total + text, 1, atol=1e-5)
    assert recording.self_attention().dims == ("step", "y", "x", "y_key", "x_key")
    assert np.isfinite(recording.maps("car", refine=1)).all()


def test_layers_and_heads_of_self_attention_are_selected(pipe: Any, prompt: Prompt) -> None:
    every = SelfAttention(size=8, heads="all", each_layer=True)
    with record(pipe, prompt, RecordSpec(self_attention=every, dtype="float32")) as whole:
        draw(pipe, prompt.text, steps=2)
    part = SelfAttention(size=8, layers="up", heads=[1], each_layer=True)
    with record(pipe, prompt, RecordSpec(self_attention=part, layers="down", dtype="float32")) as some:
        draw(pipe, prompt.text, steps=2)
    with record(pipe, prompt, RecordSpec(self_attention=8, dtype="float32")) as mean:
        draw(pipe, prompt.text, steps=2)
    np.testing.assert_allclose(some.self_attention(), whole.self_attention("up", head=1), atol=1e-6)
    np.testing.assert_allclose(mean.self_attention(), whole.self_attention(), atol=1e-6)
    np.testing.assert_allclose(mean.maps("car", refine=1, size=8), whole.maps("car", refine=1, size=8), atol=1e-5)
    with pytest.raises(RecordingError, match="No layer matches 'mid'"):
        whole.self_attention("mid")
    with pytest.raises(RecordingError, match="head=5 was not recorded"):
        whole.self_attention(head=5)
    for wrong in ({"size": 0}, {"size": 8, "heads": []}, {"size": 8, "each_layer": 1}):
        with pytest.raises(SettingError):
            SelfAttention(**wrong)


# The patches of the image are the last queries and keys.
@pytest.mark.parametrize(
    "name", ["FLUX.2", "AuraFlow", "Chroma", "Qwen-Image", "CogView3-Plus", "CogView4", "HunyuanDiT"]
)
def test_layers_read_at_their_attention_call_have_it_too(name: str) -> None:
    pipe = BUILDERS[name]()
    prompt = parse(TEXT, pipe)
    size = {"height": 64, "width": 96} if name in ("FLUX.2", "HunyuanDiT") else {"height": 32, "width": 48}
    options = {"use_resolution_binning": False} if name == "HunyuanDiT" else {}
    adapter = adapter_for(pipe)
    spec = RecordSpec(self_attention=SelfAttention(size=6, heads="all", each_layer=True), dtype="float32")
    with witness(adapter.self_layers(adapter.layers())) as seen, record(pipe, prompt, spec) as recording:
        draw(pipe, prompt.text, steps=1, **size, **options)
    (node,) = recording.nodes("image")
    for one, layer in zip(seen, node["layer"].values, strict=False):
        truth = one.probabilities[0][:, -24:, -24:]
        kept = node["probability"].sel(layer=layer).isel(step=0, image=0).values.reshape(-1, 24, 24)
        if SPECS[name].rows == "second half":  # of the guided batch
            truth = one.probabilities[1][:, -24:, -24:]
        np.testing.assert_allclose(kept, truth, atol=1e-5)
