"""Scores change in every family as the function says, and layers in which they cannot be changed are refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, TEXT, Seen, draw, observe
from tiny import tiny_pipeline, tiny_sd3
from tiny_families import BUILDERS
from torch.overrides import _get_current_function_mode_stack

from elakit import generate
from elakit.attention import Change, Site, changeable_layers, rescored
from elakit.errors import RecordingError, SettingError
from elakit.guidance import DeLeaker
from elakit.models import adapter_for
from elakit.prompt import parse

NEWER = {"height": 64, "width": 96, "num_inference_steps": 2}
MAKERS = {name: (family.make, family.options | {"num_inference_steps": 2}) for name, family in FAMILIES.items()}
MAKERS |= {name: (BUILDERS[name], NEWER) for name in ("Kolors", "CogView4", "Qwen-Image")}
# with binning, the pipelines would generate images of about a megapixel
MAKERS |= {name: (BUILDERS[name], NEWER | {"use_resolution_binning": False}) for name in ("HunyuanDiT", "Sana")}


def first_of(pipe: Any, options: dict[str, Any]) -> Seen:
    """Attention of the first layer in the first call."""
    return observe(pipe, lambda: draw(pipe, **options))[1][0]


@pytest.mark.parametrize("name", MAKERS)
def test_a_bias_multiplies_the_odds_of_a_word_in_every_family(name: str) -> None:
    make, options = MAKERS[name]
    pipe = make()
    adapter = adapter_for(pipe)
    car = parse(TEXT, pipe).find("car")[0]
    sites: list[Site] = []

    def louder(site: Site, scores: Any) -> Change | None:
        if site.text is None:
            return None
        sites.append(site)
        bias = torch.zeros(1, site.size[0] * site.size[1], site.text.stop - site.text.start)
        bias[..., car] = math.log(3)
        return Change(bias, keys=site.text)

    before = first_of(pipe, options).maps[..., car].double()
    with rescored(adapter, changeable_layers(adapter), louder):
        after = first_of(pipe, options).maps[..., car].double()
    np.testing.assert_allclose(after, 3 * before / (1 + 2 * before), atol=1e-5)

    def run() -> None:
        with rescored(adapter, changeable_layers(adapter), louder):
            draw(pipe, **options)

    outside = observe(pipe, run)[1][0]  # a reader outside the block sees the same
    np.testing.assert_allclose(outside.maps[..., car].double(), after, atol=1e-6)
    assert {site.layer.name for site in sites} == {layer.name for layer in adapter.layers()}
    positions = [site.position for site in sites[: len(adapter.layers())]]
    assert sorted(positions) == positions
    assert not _get_current_function_mode_stack()


@pytest.mark.parametrize("name", MAKERS)
def test_scores_are_those_that_the_softmax_gets_and_nothing_changes_without_a_change(name: str) -> None:
    make, options = MAKERS[name]
    pipe = make()
    adapter = adapter_for(pipe)
    computed: list[torch.Tensor] = []

    def look(site: Site, scores: Any) -> None:
        if site.text is not None and not computed:
            computed.append(scores(masked=True).softmax(-1)[..., site.text])
        return

    plain = draw(pipe, **options)
    with rescored(adapter, changeable_layers(adapter), look):
        seen = first_of(pipe, options)
        assert np.array_equal(draw(pipe, **options), plain)
    np.testing.assert_allclose(computed[0].detach(), seen.maps[0], atol=1e-5)


def test_sliced_attention_is_changed_alike() -> None:
    """It makes no attention call; the change goes through the mask."""
    pipe = tiny_pipeline()
    method = DeLeaker(threshold=-1, start=0, average_from=0)
    options: dict[str, Any] = {"seed": 3, "steps": 2, "record": False, "progress": False}
    usual = generate(pipe, TEXT, guidance=method, **options)
    pipe.enable_attention_slicing("max")
    sliced = generate(pipe, TEXT, guidance=method, **options)
    plain = generate(pipe, TEXT, **options)
    difference = np.abs(np.asarray(sliced.image, int) - np.asarray(usual.image, int)).max()
    assert difference <= 1 < np.abs(np.asarray(sliced.image, int) - np.asarray(plain.image, int)).max()


def test_a_layer_without_an_attention_call_is_refused_where_the_change_would_be_added() -> None:
    pipe = tiny_sd3()
    adapter = adapter_for(pipe)

    class Silent:
        def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **_: Any) -> Any:
            return hidden_states, encoder_hidden_states

    Silent.__module__ = "diffusers.silent"
    adapter.layers()[0].module.processor = Silent()
    blocked = rescored(adapter, adapter.layers(), lambda site, scores: None)
    with blocked, pytest.raises(RecordingError, match=r"without calling F\.scaled_dot_product_attention"):
        draw(pipe, **FAMILIES["sd3"].options)
    assert not _get_current_function_mode_stack()


def test_weights_cannot_be_kept_in_joint_attention() -> None:
    pipe = tiny_sd3()
    adapter = adapter_for(pipe)
    kept = rescored(adapter, adapter.layers(), lambda site, scores: Change(torch.zeros_like(scores()), kept=(0,)))
    with kept, pytest.raises(SettingError, match="use a model with plain cross-attention"):
        draw(pipe, **FAMILIES["sd3"].options)


def test_rows_without_the_prompt_change_only_if_the_change_says_so() -> None:
    pipe = tiny_pipeline()
    adapter = adapter_for(pipe)
    layer = changeable_layers(adapter)[1]
    found: dict[bool, list[torch.Tensor]] = {}
    for both in (False, True):
        outputs: list[torch.Tensor] = []
        handle = layer.module.register_forward_hook(lambda _, args, output, seen=outputs: seen.append(output))

        def change(site: Site, scores: Any, both: bool = both) -> Change:
            return Change(5 * torch.eye(site.keys)[None], unconditional=both)

        with rescored(adapter, [layer], change):
            draw(pipe, num_inference_steps=1)
        draw(pipe, num_inference_steps=1)
        handle.remove()
        found[both] = outputs
    (without, plain), (whole, _) = found[False], found[True]
    assert torch.equal(without[0], plain[0])
    assert not torch.allclose(whole[0], plain[0], atol=1e-4)
    torch.testing.assert_close(without[1], whole[1])
