"""Regional Prompter: a column's attention is the attention to its own text, whatever else the prompt says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from guided_families import SIZE, shared
from tiny import tiny_pipeline
from torch import Tensor

from elakit import generate
from elakit.errors import SettingError
from elakit.guidance import METHODS, RegionalPrompter
from elakit.guidance.regional_prompter import columns
from elakit.models import adapter_for
from elakit.prompt import parse

PAIR = "a [red car] and a [blue bird]"


def outputs(pipe: Any, run: Any) -> list[tuple[Tensor, Tensor]]:
    """Input and output of the first cross-attention layer in each call of a run."""
    seen: list[tuple[Tensor, Tensor]] = []
    layer = adapter_for(pipe).layers()[0]
    handle = layer.module.register_forward_hook(
        lambda _, args, kwargs, output: seen.append((args[0], output)), with_kwargs=True
    )
    try:
        run()
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart-alpha", "pixart-sigma"])
def test_each_column_attends_to_its_own_text_alone(name: str) -> None:
    pipe = shared(name)
    adapter = adapter_for(pipe)
    layer: Any = adapter.layers()[0]
    seen = outputs(
        pipe,
        lambda: generate(
            pipe, PAIR, seed=2, steps=2, guidance=RegionalPrompter(), record=False, progress=False, **SIZE
        ),
    )
    image, output = seen[0]
    size = (8, 12) if image.shape[1] == 96 else (4, 6)
    left = torch.from_numpy(columns(size, 2)[0]).flatten()
    for text, inside in (("a red car", left), ("a blue bird", ~left)):
        inputs = adapter.encode(text, guided=False, size=(32, 48)).rows(1, image.dtype)
        given: dict[str, Any] = {}
        if "encoder_attention_mask" in inputs:
            given["attention_mask"] = (1 - inputs["encoder_attention_mask"].to(image.dtype))[:, None] * -1e4
        states = inputs["encoder_hidden_states"]
        projection = getattr(adapter.denoiser, "caption_projection", None)
        states = states if projection is None else projection(states)
        with torch.no_grad():
            alone = layer.module(image[-1:], encoder_hidden_states=states, **given)[0]
        torch.testing.assert_close(output[-1][inside], alone[inside], atol=1e-5, rtol=1e-4)
    # the row without the prompt attends as it does without the division
    if len(image) > 1:
        plain = outputs(pipe, lambda: generate(pipe, PAIR, seed=2, steps=2, record=False, progress=False, **SIZE))
        torch.testing.assert_close(output[0], plain[0][1][0], atol=1e-5, rtol=1e-4)


def test_words_are_recorded_in_their_own_columns() -> None:
    pipe = tiny_pipeline()
    run = generate(pipe, PAIR, seed=2, steps=3, guidance=RegionalPrompter(), progress=False)
    car, bird = run.entity_maps().isel(step=-1).values
    half = car.shape[1] // 2
    assert float(car[:, half:].max()) < 1e-6 < float(car[:, :half].min())
    assert float(bird[:, :half].max()) < 1e-6 < float(bird[:, half:].min())
    assert run.guidance is not None
    assert run.guidance.to_frame().outside.max() < 1e-6


def test_columns_are_in_the_order_of_the_prompt_and_equal() -> None:
    masks = columns((2, 9), 3)
    assert masks.sum((1, 2)).tolist() == [6, 6, 6]
    assert masks[0, 0, :3].all()
    assert (columns((4, 2), 3).sum(0) == 1).all()  # a map narrower than the columns still belongs to someone


def test_a_batch_is_made_of_single_runs() -> None:
    pipe = tiny_pipeline()
    options: dict[str, Any] = {"steps": 3, "guidance": RegionalPrompter(), "record": False, "progress": False}
    for run in generate(pipe, PAIR, seed=[1, 2], **options):
        alone = generate(pipe, PAIR, seed=run.seed, **options)
        assert np.abs(np.asarray(alone.image, int) - np.asarray(run.image, int)).max() <= 1


def test_words_of_no_entity_are_not_read() -> None:
    pipe = tiny_pipeline()
    options: dict[str, Any] = {"seed": 1, "steps": 2, "guidance": RegionalPrompter(), "record": False}
    short = generate(pipe, "a [red car] and a [blue bird]", progress=False, **options)
    longer = generate(pipe, "[a red car] with [a blue bird] of clock", progress=False, **options)
    assert np.abs(np.asarray(short.image, int) - np.asarray(longer.image, int)).max() <= 1


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize("method", ["regional-prompter", "densediffusion"])
def test_models_with_joint_attention_are_refused(method: str, name: str) -> None:
    halves = [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
    guidance = METHODS[method](**({"regions": halves} if METHODS[method].needs_regions else {}))
    with pytest.raises(SettingError, match="Use a model with plain cross-attention"):
        generate(shared(name), PAIR, steps=2, guidance=guidance, progress=False, **SIZE)


def test_text_that_is_changed_from_the_start_cannot_wait_for_a_decision() -> None:
    with pytest.raises(SettingError, match="guide_if cannot be used with RegionalPrompter"):
        generate(tiny_pipeline(), PAIR, steps=2, guidance=RegionalPrompter(), guide_if=lambda so_far: True)


def test_a_prompt_for_another_length_of_text_is_refused() -> None:
    prompt = parse(PAIR, tiny_pipeline(length=16))
    adapter = adapter_for(tiny_pipeline())
    with pytest.raises(SettingError, match="20 text positions, and the prompt has 16"):
        RegionalPrompter().encode(adapter, prompt, adapter.encode(prompt.text))
