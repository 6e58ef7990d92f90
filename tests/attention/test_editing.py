"""Edits change attention where, when and as much as they say, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from families import FAMILIES, IMAGES, TEXT, draw, ip_adapter, observe
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_flux, tiny_pipeline, tiny_sd3
from torch.overrides import _get_current_function_mode_stack

from elakit.attention import paused, record, tap
from elakit.attention.editing import Edit, edit
from elakit.errors import RecordingError, SettingError
from elakit.generation import generate
from elakit.guidance import ELA
from elakit.models import adapter_for
from elakit.prompt import parse

LEFT = np.array([[True, False]])


@pytest.mark.parametrize("name", FAMILIES)
def test_an_edit_that_changes_nothing_leaves_the_image_as_it_is(name: str) -> None:
    family = FAMILIES[name]
    pipe = family.make()
    plain = draw(pipe, **family.options)
    nothing = [
        Edit("car"),
        Edit("car", scale=2, add=-math.log(2)),
        Edit("car", scale=0, region=np.zeros((3, 5))),
        Edit(["car", "<end>"], scale=0, steps=slice(2, None)),
    ]
    with edit(pipe, TEXT, nothing):
        assert np.array_equal(plain, draw(pipe, **family.options))
    with edit(pipe, TEXT, []):
        assert np.array_equal(plain, draw(pipe, **family.options))


CROSS = [name for name in FAMILIES if adapter_for(FAMILIES[name].make()).layers()[0].kind == "cross"]


@pytest.mark.parametrize("name", CROSS)
def test_logits_are_replaced_by_another_tokens_in_the_region(name: str) -> None:
    family = FAMILIES[name]
    pipe = family.make()
    (car,), (red,) = (parse(TEXT, pipe).find(word) for word in ("car", "red"))
    plain, before = observe(pipe, lambda: draw(pipe, **family.options))
    with edit(pipe, TEXT, Edit("car", like="red", region=LEFT)):
        changed, after = observe(pipe, lambda: draw(pipe, **family.options))
    first, now = before[0].maps, after[0].maps
    logits = first.log()
    logits[..., car] = logits[..., red]  # logits up to a constant at each location
    by_hand = logits.softmax(-1)
    inside = torch.zeros(before[0].size, dtype=torch.bool)
    inside[:, : before[0].size[1] // 2] = True
    inside = inside.flatten()
    torch.testing.assert_close(now[:, :, inside], by_hand[:, :, inside], atol=1e-5, rtol=0)
    torch.testing.assert_close(now[:, :, ~inside], first[:, :, ~inside], atol=1e-6, rtol=0)
    assert not np.array_equal(plain, changed)


@pytest.mark.parametrize("name", CROSS)
def test_a_token_made_like_itself_changes_nothing(name: str) -> None:
    family = FAMILIES[name]
    pipe = family.make()
    plain = draw(pipe, **family.options)
    with edit(pipe, TEXT, Edit("car", like="car")):
        assert np.array_equal(plain, draw(pipe, **family.options))


def test_what_cannot_be_replaced_says_so() -> None:
    with pytest.raises(SettingError, match="Give two"):
        Edit("car", like="red", scale=0)
    pipe = tiny_flux()
    with pytest.raises(RecordingError, match="Use scale or add"), edit(pipe, TEXT, Edit("car", like="red")):
        pass


@pytest.mark.parametrize("name", FAMILIES)
def test_in_the_region_weights_are_scaled_and_elsewhere_they_are_left(name: str) -> None:
    family = FAMILIES[name]
    pipe = family.make()
    prompt = parse(TEXT, pipe)
    outputs: list[torch.Tensor] = []

    def listen(_: Any, __: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    layer = adapter_for(pipe).layers()[0]
    layer.module.register_forward_hook(listen)
    plain, before = observe(pipe, lambda: draw(pipe, **family.options))
    with edit(pipe, prompt, Edit("giraffe", scale=3.0, add=0.5, region=LEFT)):
        changed, after = observe(pipe, lambda: draw(pipe, **family.options))
    first, now = before[0].maps, after[0].maps  # later layers have another input
    pieces = list(prompt.find("giraffe"))
    factor = 3 * math.exp(0.5)
    share = first[..., pieces].sum(-1, keepdim=True)
    factors = torch.ones(first.shape[-1])
    factors[pieces] = factor
    by_hand = first * factors / (1 + (factor - 1) * share)
    inside = torch.zeros(before[0].size, dtype=torch.bool)
    inside[:, : before[0].size[1] // 2] = True
    inside = inside.flatten()
    torch.testing.assert_close(now[:, :, inside], by_hand[:, :, inside], atol=1e-5, rtol=0)
    torch.testing.assert_close(now[:, :, ~inside], first[:, :, ~inside], atol=1e-6, rtol=0)
    assert not np.array_equal(plain, changed)
    # Not only the recorded values: the layer's output has changed too, there and for those rows only.
    was, _, became, _ = outputs  # of two steps
    rows = adapter_for(pipe).conditional_rows(len(was)) if not family.guided else slice(1, 2)
    change = (became - was).abs()
    assert float(change[rows, -len(inside) :][:, inside].amax()) > 1e-5
    assert float(change[rows, -len(inside) :][:, ~inside].amax()) < 1e-5
    if family.guided:
        assert float(change[0].max()) < 1e-5


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "pixart-alpha"])
def test_what_is_masked_gets_nothing_in_any_layer(name: str) -> None:
    family = FAMILIES[name]
    pipe = family.make()
    prompt = parse(TEXT, pipe)
    with edit(pipe, prompt, Edit(prompt.entities[0], scale=0)):
        _, seen = observe(pipe, lambda: draw(pipe, **family.options))
    for one in seen:
        assert float(one.maps[..., list(prompt.find("car"))].max()) == 0
        if adapter_for(pipe).layers()[0].kind == "cross":
            torch.testing.assert_close(one.maps.sum(-1), torch.ones_like(one.maps[..., 0]))


def test_steps_and_layers_are_chosen(pipe: Any) -> None:
    prompt = parse(TEXT, pipe)
    (car,) = prompt.find("car")
    chosen = Edit("car", scale=0, steps=[1], layers="up")
    with edit(pipe, prompt, chosen):
        _, seen = observe(pipe, lambda: draw(pipe, num_inference_steps=3))
    layers = adapter_for(pipe).layers()
    for at, one in enumerate(seen):
        masked = at // len(layers) == 1 and one.layer.startswith("up")
        assert (float(one.maps[..., car].max()) == 0) == masked
    assert [call for call in range(6) if Edit("car", scale=0, steps=slice(1, 5, 2)).acts(call)] == [1, 3]
    first = Edit(np.int64(0), scale=0, steps=np.int64(2))  # numbers of NumPy count like Python's
    assert [call for call in range(6) if first.acts(call)] == [2]


def test_edits_act_together_and_blocks_nest() -> None:
    for make in (tiny_pipeline, tiny_sd3, tiny_flux):
        pipe = make()
        options = FAMILIES[{"tiny_sd3": "sd3", "tiny_flux": "flux"}.get(make.__name__, "sd")].options
        prompt = parse(TEXT, pipe)
        one, two = Edit("car", scale=3.0), Edit(["car", "blue"], add=1.0, region=LEFT)
        with edit(pipe, prompt, [one, two]):
            together = draw(pipe, **options)
        with edit(pipe, prompt, one), edit(pipe, prompt, two):
            nested = draw(pipe, **options)
        np.testing.assert_allclose(together, nested, atol=1e-4)
        assert not _get_current_function_mode_stack()


@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
@pytest.mark.parametrize("error", [RuntimeError("out of luck"), KeyboardInterrupt()])
def test_everything_is_restored_whatever_happens(name: str, error: BaseException) -> None:
    family = FAMILIES[name]
    pipe = family.make()
    plain = draw(pipe, **family.options)
    module: Any = adapter_for(pipe).layers()[-1].module

    def fail(*_: Any) -> None:
        raise error

    handle = (module.to_out if name != "flux" else module.norm_k).register_forward_hook(fail)
    inside = module.to_out[0].register_forward_hook(fail) if name != "flux" else handle
    with pytest.raises(type(error)), edit(pipe, TEXT, Edit("car", scale=0)):
        draw(pipe, **family.options)
    handle.remove()
    inside.remove()
    assert not _get_current_function_mode_stack()
    hooked = [m for m in adapter_for(pipe).denoiser.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooked == []
    assert np.array_equal(plain, draw(pipe, **family.options))


def test_slicing_and_fused_projections_are_edited_alike() -> None:
    pipe = tiny_pipeline()
    change = Edit("car", scale=0.2, region=LEFT)
    with edit(pipe, TEXT, change):
        usual = draw(pipe)
        pipe.enable_attention_slicing("max")
        sliced = draw(pipe)
        pipe.disable_attention_slicing()
        pipe.fuse_qkv_projections(vae=False)
        fused = draw(pipe)
    np.testing.assert_allclose(sliced, usual, atol=1e-4)
    np.testing.assert_allclose(fused, usual, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_is_edited_too(name: str) -> None:
    family = FAMILIES[name]
    pipe = family.make().to(dtype=torch.bfloat16)
    options = family.options | {"output_type": "pt"}
    prompt = parse(TEXT, pipe)
    plain = draw(pipe, **options)
    with edit(pipe, prompt, [Edit("car", scale=0), Edit("giraffe", scale=2.5, region=LEFT)]):
        changed, seen = observe(pipe, lambda: draw(pipe, **options))
    assert not torch.equal(plain, changed)
    assert max(float(one.maps[..., list(prompt.find("car"))].max()) for one in seen) == 0


def test_autocast_is_edited_too(pipe: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), edit(pipe, TEXT, Edit("car", scale=0)):
        _, seen = observe(pipe, lambda: draw(pipe))
    assert max(float(one.maps[..., 3].max()) for one in seen) == 0


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_prompt_is_left_as_it_is(name: str) -> None:
    """The attention of a layer to the image of an IP-Adapter has keys that are not words, and is not edited."""
    family = FAMILIES[name]
    pipe = family.make()
    ip_adapter(pipe)
    prompt = parse(TEXT, pipe)
    options = family.options | IMAGES[name]
    plain = draw(pipe, **options)
    with edit(pipe, prompt, Edit("car")):
        assert np.array_equal(plain, draw(pipe, **options))
    with edit(pipe, prompt, Edit("car", scale=0)):
        changed, seen = observe(pipe, lambda: draw(pipe, **options))
    assert not np.array_equal(plain, changed)
    for one in seen:
        assert one.maps.shape[-1] == {"sd3": 34, "flux": 14}.get(name, 20)
        assert float(one.maps[..., list(prompt.find("car"))].max()) == 0


def test_guidance_in_an_edited_run_sees_the_model_as_it_is(pipe: Any) -> None:
    """Passes of guidance itself are neither edited nor counted, so an edit acts in the intended steps."""
    adapter = adapter_for(pipe)
    prompt = parse(TEXT, pipe)
    embeds = adapter.encode(prompt.text, guided=False)
    own: list[float] = []

    def own_pass(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        def note(layer: Any, attend: Any, size: Any) -> None:
            own.append(float(attend(slice(None))[..., 3].max()))

        with paused(pipe), tap(adapter.layers()[:1], note):
            adapter.denoise(tensors["latents"], timestep, embeds)
        return tensors

    with edit(pipe, prompt, Edit("car", scale=0, steps=[2])), record(pipe, prompt) as recording:
        draw(pipe, num_inference_steps=3, callback_on_step_end=own_pass)
    assert min(own) > 0
    car = recording.maps("car").max(("token", "y", "x"))
    assert (car.values == 0).tolist() == [False, False, True]


def test_edits_do_not_act_in_the_gradient_passes_of_a_method(pipe: Any) -> None:
    """The loss of the first step, whose latent is the same, does not see the edit; the run does."""
    text = "a [red car] and a [blue bird]"
    options: dict[str, Any] = {"seed": 1, "steps": 2, "guidance": ELA(), "progress": False}
    plain = generate(pipe, text, **options)
    with edit(pipe, text, Edit("car", scale=0, region=LEFT)):
        edited = generate(pipe, text, **options)
    assert plain.guidance is not None
    assert edited.guidance is not None
    assert edited.guidance.rows[0]["loss"] == plain.guidance.rows[0]["loss"]
    assert float(edited.entity_maps()[0, 0].sum()) < float(plain.entity_maps()[0, 0].sum())


@given(
    scale=st.floats(0, 20),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=12),
)
@settings(max_examples=25, deadline=None)
def test_a_region_of_any_resolution_acts_by_its_share(scale: float, shares: list[float]) -> None:
    """One row of attention over two tokens, computed by hand."""
    pipe = _pipe()
    prompt = parse(TEXT, pipe)
    layer = adapter_for(pipe).layers()[0]
    region = np.array(shares)[:, None]
    seen: dict[str, torch.Tensor] = {}
    embeds = adapter_for(pipe).encode(prompt.text, guided=False)
    latents = torch.linspace(-2, 2, 256).reshape(1, 4, 8, 8)

    def run(key: str) -> None:
        with tap([layer], lambda layer, attend, size: seen.update({key: attend(slice(None))})), torch.no_grad():
            adapter_for(pipe).denoise(latents, 10, embeds)

    run("plain")
    with edit(pipe, prompt, Edit("car", scale=scale, region=region, layers=layer.name)):
        run("edited")
    (car,) = prompt.find("car")
    rows = np.repeat(shares, 8).reshape(8, -1).mean(1)  # each of 8 rows covers as many eighths of a share as there are
    area = torch.tensor(rows).repeat_interleave(8)
    factor = (1 + area * (scale - 1)).float()
    p = seen["plain"][0, :, :, car]
    torch.testing.assert_close(seen["edited"][0, :, :, car], factor * p / (1 + (factor - 1) * p), atol=1e-5, rtol=0)


_PIPES: list[Any] = []


def _pipe() -> Any:
    if not _PIPES:
        _PIPES.append(tiny_pipeline())
    return _PIPES[0]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"scale": -1.0}, "scale is -1.0"),
        ({"scale": math.inf}, "scale is inf"),
        ({"add": 1000.0}, "-100 to 100"),
        ({"add": math.nan}, "-100 to 100"),
        ({"tokens": []}, r"tokens is \[\]; give a word"),
        ({"tokens": None}, "tokens is None; give a word"),
        ({"steps": -1}, "counted from the start"),
        ({"steps": slice(-3, None)}, "counted from the start"),
        ({"steps": 1.5}, "whole number, 0 or more"),
        ({"steps": slice(0, 3, -1)}, "stride"),
        ({"region": np.ones(4)}, "shape \\(y, x\\)"),
        ({"region": np.full((2, 2), 2.0)}, "outside 0 to 1"),
        ({"region": np.full((2, 2), np.nan)}, "outside 0 to 1"),
        ({"region": xr.DataArray(np.ones((2, 2)), dims=("step", "x"))}, "give y and x only"),
    ],
)
def test_edits_that_make_no_sense_are_refused(options: dict[str, Any], part: str) -> None:
    with pytest.raises(SettingError, match=part):
        Edit(**{"tokens": "car", **options})


def test_a_named_region_acts_in_any_order_of_its_dimensions(pipe: Any) -> None:
    region = xr.DataArray(LEFT, dims=("y", "x"))
    images = []
    for same in (LEFT, region, region.transpose("x", "y")):
        with edit(pipe, TEXT, Edit("car", scale=0, region=same)):
            images.append(draw(pipe))
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0], images[2])
    assert not np.array_equal(images[0], draw(pipe))


def test_what_is_not_there_is_refused_before_the_run(pipe: Any) -> None:
    with pytest.raises(RecordingError, match="'zebra' is not in"), edit(pipe, TEXT, Edit("zebra", scale=0)):
        pass
    with (
        pytest.raises(RecordingError, match="No layer matches 'double'"),
        edit(pipe, TEXT, Edit("car", layers="double")),
    ):
        pass
    with pytest.raises(RecordingError, match="no start-of-text"), edit(tiny_flux(), TEXT, Edit("<start>", scale=0)):
        pass
