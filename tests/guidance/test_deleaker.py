"""DeLeaker: the authors' probabilities, and the changes that it makes to the attention of pipelines."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_flux, tiny_pipeline, tiny_pixart, tiny_sd3
from tiny_families import BUILDERS

import elakit
from elakit.attention import Site
from elakit.guidance import DeLeaker
from elakit.models import adapter_for
from elakit.prompt import Entity, Prompt, Token

DATA = Path(__file__).parents[1] / "data" / "parity" / "deleaker.npz"
TEXT = "a [red car] and a [blue giraffe]"
# So that masks of random weights are not empty.
EAGER = DeLeaker(threshold=-1, start=0, average_from=0)


def of_two() -> Prompt:
    """Entities at the position 1, and at 3 and 4, of six."""
    words = {"cat": (1,), "lion": (3, 4)}
    tokens = tuple(
        Token(at, name, f"{name}/{at}", number) for number, (name, where) in enumerate(words.items()) for at in where
    )
    return Prompt(
        "cat lion", tuple(Entity(name, name, (), where, (), name) for name, where in words.items()), tokens, 6, 6
    )


def scores_of(given: torch.Tensor, masked: bool = False) -> torch.Tensor:
    return given


def test_probabilities_equal_those_of_the_released_code() -> None:
    """Four blocks in two steps; averages of the first step alone, changes from its second block on."""
    with np.load(DATA) as stored:
        logits, wanted = (torch.from_numpy(stored[name]).double() for name in ("logits", "probabilities"))
    method, prompt = DeLeaker(average_from=0.5, start=0.5, averaged=0.5), of_two()
    state, layer = method.begin(prompt, 2), adapter_for(tiny_flux()).layers()[0]
    for nth, (given, expected) in enumerate(zip(logits, wanted, strict=True)):
        step, block = divmod(nth, 2)
        if block == 0:
            edit = method.hold(None, (8, 8), prompt, step, state)
        site = Site(layer, (8, 8), 0, 1.0, 70, slice(0, 6), slice(6, 70), block / 2)
        change = edit.change(site, partial(scores_of, given))
        found = given if change is None else given + change.bias
        np.testing.assert_allclose(found.softmax(-1), expected, atol=2e-6)
    plain = logits.softmax(-1)
    assert float((wanted[1:] - plain[1:]).abs().max()) > 0.1
    assert float((wanted[1:, :, :, 6:] < 1e-9).double().mean()) > 0.001  # attention between entities was cut


FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd": (tiny_pipeline, {}),
    "pixart": (tiny_pixart, {}),
    "sd3": (tiny_sd3, {}),
    "flux": (tiny_flux, {"height": 64, "width": 64}),
    "flux2": (BUILDERS["FLUX.2"], {"height": 64, "width": 96}),
    "cogview4": (BUILDERS["CogView4"], {"height": 64, "width": 64}),
    "sana": (BUILDERS["Sana"], {"height": 64, "width": 64}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_entities_do_not_read_each_others_words_in_the_next_pass(name: str) -> None:
    make, size = FAMILIES[name]
    pipe = make()
    settings = {"seed": 3, "steps": 3, "progress": False, **size}
    plain = elakit.generate(pipe, TEXT, **settings)
    run = elakit.generate(pipe, TEXT, guidance=EAGER, **settings)
    assert not np.array_equal(np.asarray(plain.image), np.asarray(run.image))
    frame = run.guidance.to_frame()
    assert len(frame) == 3
    car = run.guidance.regions.sel(entity=run.prompt.entities[0].label, step=2).values.astype(bool)
    size_of = f"{car.shape[0]}x{car.shape[1]}"
    node = next(one for one in run.recording.nodes("text") if one.attrs["size"] == size_of)
    label = next(token.label for token in run.prompt.tokens if token.index in run.prompt.entities[1].token_indices)
    # of the last layer, for which the masks in the trace were made
    cut, before = (
        one["probability"].isel(step=-1, image=0).sel(token=label).values[-1][..., car]
        for one in (node, next(one for one in plain.recording.nodes("text") if one.attrs["size"] == size_of))
    )
    assert float(cut.max()) < 1e-6 < float(before.max())


def test_an_image_in_a_batch_equals_the_single_run() -> None:
    pipe = tiny_flux()
    settings = {"steps": 3, "progress": False, "height": 64, "width": 64, "guidance": EAGER}
    both = elakit.generate(pipe, TEXT, seed=[3, 5], **settings)
    alone = elakit.generate(pipe, TEXT, seed=5, **settings)
    assert np.abs(np.asarray(both[1].image, int) - np.asarray(alone.image, int)).max() <= 2


def test_without_any_change_the_image_stays() -> None:
    pipe = tiny_pipeline()
    settings = {"seed": 3, "steps": 2, "progress": False}
    none = DeLeaker(strength=1, cut_text=False, cut_image=False, threshold=-0.6, start=0, average_from=0)
    plain, run = (elakit.generate(pipe, TEXT, guidance=one, **settings) for one in (None, none))
    assert np.abs(np.asarray(plain.image, int) - np.asarray(run.image, int)).max() <= 1
