"""Recording of videos: maps with frames, compared with what the attention calls receive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captured import PLAIN, TEXT, Witness
from PIL import Image
from tiny_videos import BUILDERS, tiny_cogvideox, tiny_wan, wan_transformer
from torch import Tensor

import elakit
from elakit.attention import Edit, Recording, RecordSpec, edit, map_concepts, open_recording, record, record_image
from elakit.errors import ModelError, PromptError, RecordingError
from elakit.models import adapter_for
from elakit.models.dispatch import refuse_index
from elakit.prompt import parse


@dataclass
class Spec:
    """A run of a family, and the form of its attention calls, known from its code in diffusers."""

    make: Callable[[], Any]
    width: int = 48  # in pixels
    frames: int = 9  # of the video
    maps: tuple[int, int, int] = (3, 4, 6)  # frames, rows, columns
    text_first: bool = False
    second_pass: bool = False  # of the negative prompt, in each step; otherwise it is the first half of the rows


SPECS = {
    "Wan": Spec(BUILDERS["Wan"], frames=5, second_pass=True),
    "LTX-Video": Spec(BUILDERS["LTX-Video"], width=64, maps=(3, 4, 8)),
    "CogVideoX": Spec(BUILDERS["CogVideoX"], text_first=True),
    # The pipeline adds frames until they divide into pairs.
    "CogVideoX 1.5": Spec(lambda: tiny_cogvideox(frames_per_patch=2), maps=(2, 4, 6), text_first=True),
}


def draw(pipe: Any, spec: Spec, videos: int = 1, **options: Any) -> np.ndarray:
    """Videos of a short run of the prompt."""
    settings = {"height": 32, "width": spec.width, "num_frames": spec.frames, "num_inference_steps": 2}
    settings |= {"negative_prompt": ["a dog"] * videos, "output_type": "np"} | options
    return np.asarray(pipe(prompt=[PLAIN] * videos, generator=torch.Generator().manual_seed(7), **settings).frames)


def recorded(name: str, spec: RecordSpec | None = None, videos: int = 1) -> Recording:
    pipe = SPECS[name].make()
    with record(pipe, TEXT, spec) as recording:
        draw(pipe, SPECS[name], videos)
    return recording


@pytest.mark.parametrize("videos", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPECS)
def test_maps_are_those_of_the_attention_call_and_the_video_stays(name: str, dtype: torch.dtype, videos: int) -> None:
    spec = SPECS[name]
    pipe = spec.make().to(dtype=dtype)
    plain = draw(pipe, spec, videos)
    layers = adapter_for(pipe).layers()
    witness = Witness({layer.name: layer.module for layer in layers})
    with record(pipe, TEXT, RecordSpec(heads="all", dtype="float32")) as recording, witness:
        assert np.array_equal(plain, draw(pipe, spec, videos))
    calls = [witness.seen[i : i + len(layers)] for i in range(0, len(witness.seen), len(layers))]
    calls = calls[::2] if spec.second_pass else calls  # the negative prompt comes second
    assert len(calls) == 2
    frames, rows, columns = spec.maps
    (node,) = recording.nodes()
    assert node["timestep"].values.tolist() == pytest.approx(pipe.scheduler.timesteps.tolist())
    kept = node["probability"]
    for step, call in enumerate(calls):
        for layer, truth in call:
            truth = truth[-videos:]
            first = truth.shape[-1] - frames * rows * columns if spec.text_first else 0
            for token in recording.prompt.tokens:
                found = kept.sel(layer=layer, step=step, token=token.label).values  # (frame of all videos, head, y, x)
                expected = truth[:, :, first : first + frames * rows * columns, token.index]
                for place, each in enumerate(found):
                    video, frame = divmod(place, frames)
                    at = frame * rows * columns
                    there = expected[video, :, at : at + rows * columns].reshape(-1, rows, columns)
                    np.testing.assert_allclose(each, there, atol=1e-5)
    assert len(found) == videos * frames
    maps = recording.maps("red", image=videos - 1)
    assert dict(maps.sizes) == {"step": 2, "token": 1, "frame": frames, "y": rows, "x": columns}
    red = kept.sel(token="red").mean(("layer", "head"))[:, -frames:]
    np.testing.assert_allclose(maps.values[:, 0], red, atol=1e-6)
    assert float(maps.std("frame").max()) > 1e-4  # frames differ, so that a wrong order would be noticed


@pytest.mark.parametrize("name", BUILDERS)
def test_tokens_stand_where_the_text_encoder_reads_them(name: str) -> None:
    pipe = BUILDERS[name]()
    read: list[Tensor] = []
    pipe.text_encoder.register_forward_pre_hook(lambda _, args: read.append(args[0][0]))
    draw(pipe, SPECS[name])
    for token in parse(TEXT, pipe).tokens:
        assert pipe.tokenizer.decode([int(read[0][token.index])]).strip() == token.text.strip()
    assert len(read[0]) == adapter_for(pipe).text_length()


def test_a_frame_of_a_recording_is_a_recording_of_images(tmp_path: Path) -> None:
    whole = recorded("Wan", videos=2)
    assert whole.frames == 3
    assert "videos of 3 frames: 2" in repr(whole)
    stored = open_recording(whole.save(tmp_path / "run"))
    for recording in (whole, stored, stored.sel(image=[0, 1])):
        for normalize in (None, "sum", "tokens"):
            maps = recording.maps("entities", normalize=normalize, image=1)
            assert maps.entity.values.tolist() == ["car", "giraffe"]
            for number in (0, 2, -1):
                one = recording.frame(number)
                assert one.frames == 0
                assert one.maps("entities", normalize=normalize, image=1).equals(maps.isel(frame=number))
    second = stored.sel(image=1, step=0)
    assert second.maps("car").equals(stored.maps("car", steps=0, image=1).assign_attrs(image=0))
    assert second.isel(step=0).frames == 3
    with pytest.raises(RecordingError, match=r"no frame 3: give an index from 0 to 2"):
        whole.frame(3)
    with pytest.raises(RecordingError, match="no frame 0: the recording is of images"):
        whole.frame(0).frame(0)
    with pytest.raises(RecordingError, match=r"isel\(image=0\) .* Select a video with sel\(image=...\)"):
        whole.isel(image=0)
    with pytest.raises(RecordingError, match="image=2 was not recorded; give an index from 0 to 1"):
        whole.maps("car", image=2)


def test_a_store_and_a_mean_over_steps_have_the_same_frames(tmp_path: Path) -> None:
    pipe, spec = tiny_wan(), SPECS["Wan"]
    with record(pipe, TEXT, store=tmp_path / "run") as stored:
        draw(pipe, spec)
    assert stored.frames == open_recording(tmp_path / "run").frames == 3
    mean = recorded("Wan", RecordSpec(accumulate=True)).maps("car")
    np.testing.assert_allclose(mean.values[0], stored.maps("car").values.mean(0), atol=1e-4)


def test_a_plan_counts_frames_as_images() -> None:
    pipe = tiny_wan()
    planned = RecordSpec().plan(pipe, TEXT, steps=2, height=32, width=48, images=3)
    assert planned.bytes == recorded("Wan").nbytes
    assert adapter_for(pipe).default_size() == (480, 832)
    assert adapter_for(tiny_cogvideox()).default_size() == (32, 48)


def test_figures_show_one_frame(tmp_path: Path) -> None:
    recording = recorded("Wan")
    figure = elakit.plot.token_maps(recording.frame(1), tokens=["car"], steps=1)
    assert len([trace for trace in figure.data if trace.type == "heatmap"]) == 1
    with pytest.raises(RecordingError, match=r"videos of 3 frames, .* an index from 0 to 2"):
        elakit.plot.token_maps(recording)
    given = {"image": Image.new("RGB", (48, 32)), "prompt": recording.prompt, "seed": 7, "settings": {}}
    with pytest.raises(RecordingError, match="A run has one image, but the recording has videos of 3 frames"):
        elakit.Run(**given, recording=recording)
    run = elakit.Run(**given, recording=recording.frame(1))
    assert set(run.bleeding.to_frame()["entity"].dropna()) >= {"car", "giraffe"}
    assert elakit.explore(run).to_html(tmp_path / "frame.html").exists()


@pytest.mark.parametrize("name", BUILDERS)
def test_an_edit_hides_a_word_in_the_same_part_of_every_frame(name: str) -> None:
    pipe, spec = BUILDERS[name](), SPECS[name]
    prompt = parse(TEXT, pipe)
    plain = draw(pipe, spec)
    with edit(pipe, prompt, Edit("car", scale=0, region=[[True, False]])), record(pipe, prompt) as recording:
        changed = draw(pipe, spec)
    car = recording.maps("car")
    half = car.sizes["x"] // 2
    assert float(car[..., :half].max()) < 1e-6 < float(car[..., half:].max(("step", "token", "y", "x")).min())
    assert not np.array_equal(plain, changed)
    with edit(pipe, prompt, Edit("car", scale=1)):
        assert np.array_equal(plain, draw(pipe, spec))


@pytest.mark.parametrize("name", BUILDERS)
def test_what_needs_images_is_refused(name: str) -> None:
    pipe, spec = BUILDERS[name](), SPECS[name]
    with pytest.raises(ModelError, match=f"{name} can be recorded, but `elakit.generate` and guidance do not support"):
        elakit.generate(pipe, TEXT, steps=1, height=32, width=spec.width, progress=False)
    with pytest.raises(ModelError, match=f"{name} can be recorded"):
        record_image(pipe, TEXT, Image.new("RGB", (64, 64)))
    with (
        pytest.raises(RecordingError, match="`map_concepts` does not support"),
        map_concepts(pipe, TEXT, ["frog", "clock"]),
    ):
        pass
    with (
        pytest.raises(RecordingError, match="attends to the locations of all frames"),
        record(pipe, TEXT, RecordSpec(self_attention=6)),
    ):
        pass


def test_relatives_are_refused() -> None:
    pipe = tiny_wan(transformer_2=wan_transformer())
    index = dict(pipe.config) | {"_class_name": "WanPipeline"}  # as in model_index.json
    for refuse in (lambda: adapter_for(pipe), lambda: refuse_index("It", index)):
        with pytest.raises(ModelError, match="divided between two transformers"):
            refuse()
    index = {"_class_name": "WanImageToVideoPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    with pytest.raises(ModelError, match="Wan is supported with WanPipeline only"):
        refuse_index("It", index)
    for name in ("Wan", "LTX-Video", "CogVideoX"):
        pipe = BUILDERS[name]()
        refuse_index("It", dict(pipe.config) | {"_class_name": type(pipe).__name__})
    with pytest.raises(PromptError, match="write the prompt as the pipeline reads it"):
        parse("a  [red car]", tiny_wan())


def test_runs_of_different_length_are_not_mixed() -> None:
    pipe, spec = tiny_wan(), SPECS["Wan"]
    with record(pipe, TEXT):
        draw(pipe, spec)
        with pytest.raises(
            RecordingError, match="1 video of 3 frames of 8x12 latents, but this denoiser call has 1 video of 2"
        ):
            draw(pipe, spec, num_frames=3)
