"""Maps of concepts that are not in the prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, SHORT, TEXT, draw
from tiny import tiny_flux, tiny_pipeline, tiny_sd3
from tiny_families import tiny_aura_flow, tiny_kolors

from elakit.attention import RecordSpec, map_concepts, record
from elakit.errors import RecordingError, SettingError
from elakit.models import adapter_for
from elakit.prompt import parse

FLUX = SHORT | {"height": 32, "width": 48}


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart-alpha", "flux", "sd3"])
def test_the_image_does_not_see_the_concepts(name: str) -> None:
    pipe = FAMILIES[name].make()
    options = FAMILIES[name].options | {"num_images_per_prompt": 2, "height": 32, "width": 48}
    plain = draw(pipe, **options)
    with record(pipe, TEXT) as alone:
        draw(pipe, **options)
    with map_concepts(pipe, TEXT, ["dog", "green giraffe"]) as found, record(pipe, TEXT) as recording:
        assert np.array_equal(plain, draw(pipe, **options))
    np.testing.assert_array_equal(recording.maps(), alone.maps())
    maps = found.maps(image=1)
    assert maps.concept.values.tolist() == ["dog", "green giraffe"]
    assert maps.shape == (2, 2, *recording.sizes[0])
    assert maps.timestep.values.tolist() == recording.nodes()[0]["timestep"].values.tolist()
    assert float(maps.min()) > 0
    if name in ("flux", "sd3"):
        np.testing.assert_allclose(maps.sum("concept"), 1, atol=1e-5)


@pytest.mark.parametrize("name", ["sd", "pixart-alpha", "kolors"])
def test_a_concept_with_the_state_of_a_word_gets_that_word_s_attention(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a prompt whose token gets p, a second token with the same state gets p / (1 + p)."""
    pipe, options = (tiny_kolors(), {}) if name == "kolors" else (FAMILIES[name].make(), FAMILIES[name].options)
    options = options | {"height": 32, "width": 48}
    prompt = parse(TEXT, pipe)
    (car,) = prompt.find("car")
    family: Any = type(adapter_for(pipe))
    encode = family.encode

    def same(self: Any, text: str, *args: Any, **kwargs: Any) -> Any:
        found = encode(self, prompt.text, *args, **kwargs)
        if text != "dog":
            return found
        states = found.inputs["encoder_hidden_states"]
        return replace(found, inputs={"encoder_hidden_states": states[:, [car]].expand(-1, states.shape[1], -1)})

    monkeypatch.setattr(family, "encode", same)
    with (
        map_concepts(pipe, prompt, ["dog"]) as found,
        record(pipe, prompt, RecordSpec(heads="all", dtype="float32")) as recording,
    ):
        draw(pipe, prompt.text, **options)
    for node in recording.nodes():
        p = node["probability"].sel(token="car").isel(image=0)
        expected = (p / (1 + p)).mean(("layer", "head"))
        size = max(node.sizes["y"], node.sizes["x"])
        np.testing.assert_allclose(found.maps(size=size)[:, 0], expected, atol=1e-6)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_in_double_streams_concepts_are_a_text_stream_that_sees_the_image(name: str) -> None:
    """Given the concepts alone as its text, the first block computes for them what the second stream must compute."""
    pipe: Any = tiny_flux() if name == "flux" else tiny_sd3()
    options = FLUX if name == "flux" else FLUX | {"guidance_scale": 1.0}
    adapter = adapter_for(pipe)
    words = ["red dog", "bear"]
    calls: list[Any] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    with map_concepts(pipe, TEXT, words, layers="transformer_blocks.0.attn") as found:
        draw(pipe, num_inference_steps=1, **options)
    handle.remove()
    tokens = [[token.index for token in parse(f"[{word}]", pipe).tokens] for word in words]
    states = [adapter.encode(w).inputs["encoder_hidden_states"][:, at] for w, at in zip(words, tokens, strict=True)]
    attn = pipe.transformer.transformer_blocks[0].attn
    outputs: dict[str, torch.Tensor] = {}
    for part, module in (("text", attn.to_add_out), ("image", attn.to_out[0])):
        module.register_forward_pre_hook(lambda _, args, part=part: outputs.setdefault(part, args[0]))
    with torch.no_grad():
        text = torch.cat(states, dim=1)
        pipe.transformer(**calls[0] | {"encoder_hidden_states": calls[0]["encoder_hidden_states"]})
        image = outputs.pop("image")
        outputs.clear()
        positions = {"txt_ids": torch.zeros(text.shape[1], 3)} if name == "flux" else {}
        pipe.transformer(**calls[0] | {"encoder_hidden_states": text, **positions})
    scores = (image @ outputs["text"].transpose(-1, -2))[0]  # (h*w, tokens)
    by_word = torch.stack([part.mean(-1) for part in scores.split([len(at) for at in tokens], dim=-1)], dim=-1)
    expected = by_word.softmax(-1).T.reshape(2, 4, 6)
    np.testing.assert_allclose(found.maps()[0], expected, atol=1e-5)
    assert float(found.maps().std()) > 1e-4


def test_what_cannot_be_mapped_is_refused() -> None:
    pipe, flux, aura_flow = tiny_pipeline(), tiny_flux(), tiny_aura_flow()
    for words in ([], [""], ["a [dog]"]):
        with pytest.raises(SettingError, match="words"), map_concepts(pipe, TEXT, words):
            pass
    with pytest.raises(SettingError, match="two concepts"), map_concepts(flux, TEXT, ["dog"]):
        pass
    for pipeline, family in ((flux, "FLUX.1"), (aura_flow, "AuraFlow")):
        block = map_concepts(pipeline, TEXT, ["dog", "cat"], layers="single")
        with pytest.raises(RecordingError, match=rf"{family} with layers='single'.*Use layers='double'"), block:
            pass
    with map_concepts(pipe, TEXT, ["dog"]) as found:
        pass
    with pytest.raises(RecordingError, match="no step was finished"):
        found.maps()
    with map_concepts(pipe, TEXT, ["dog"]) as found:
        draw(pipe)
    with pytest.raises(RecordingError, match="recorded maps: 8x8, 4x4"):
        found.maps(size=16)
    with pytest.raises(RecordingError, match="image=3 was not recorded; give index 0, the only one"):
        found.maps(image=3)


def test_an_interrupted_denoiser_call_is_left_out() -> None:
    pipe = tiny_pipeline()
    with map_concepts(pipe, TEXT, ["dog"]) as whole:
        draw(pipe)
    calls = []

    def interrupt(*_: Any) -> None:
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt

    pipe.unet.mid_block.register_forward_pre_hook(interrupt)
    with map_concepts(pipe, TEXT, ["dog"]) as found, pytest.raises(KeyboardInterrupt):
        draw(pipe)
    np.testing.assert_array_equal(found.maps(), whole.maps().isel(step=[0]))


def test_batches_of_different_sizes_do_not_share_a_block() -> None:
    pipe = tiny_pipeline()
    with map_concepts(pipe, TEXT, ["dog"]) as found:
        draw(pipe)
        draw(pipe, num_images_per_prompt=2)
    with pytest.raises(RecordingError, match=r"different numbers of images \(1, 2\)"):
        found.maps()
