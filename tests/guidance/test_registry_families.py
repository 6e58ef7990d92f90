"""Every method runs on every family that it is for, wider than high, in a batch as alone; others are refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from guided_families import FAMILIES, PAIR, SIZE, shared
from method_options import OPTIONS

from elakit import generate
from elakit.errors import SettingError
from elakit.guidance import METHODS, build
from elakit.guidance.registry import NEED_REGIONS, TAKE_REGIONS
from elakit.models import adapter_for

# These need image and text in separate layers.
CROSS_ATTENTION_ONLY = {"regional-prompter", "attention-regulation", "densediffusion", "bounded-attention"}
JOINT = {"sd3", "flux"}
# So that they act on random weights, whose attention is nearly flat, with few passes.
ACTING: dict[str, dict[str, Any]] = {
    "ela": {"anchor.needed": None, "anchor.start": 0},
    "attend-and-excite": {"refine": ((0.0, 0.05, 1),)},
    "divide-and-bind": {"refine": ((0.0, 0.05, 1),)},
    "boxdiff": {"refine": ((0.0, 0.05, 1),)},
    "predicated-diffusion": {"refinements": 1},
    "deleaker": {"threshold": -1, "start": 0, "average_from": 0},
    "spdiffusion": {"steps": 1},
    "attention-regulation": {"iterations": 2},
    "bounded-attention": {"iterations": 2},
}
RUN: dict[str, Any] = {"steps": 2, "record": False, "progress": False, **SIZE}


def outputs(family: str, seeds: Any, method: Any = None) -> tuple[Any, torch.Tensor]:
    """Runs of one batch, and the denoiser's output at the last step, (row of guidance, image, ...)."""
    pipe, seen = shared(family), []
    handle = adapter_for(pipe).denoiser.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0]))
    try:
        runs = generate(pipe, PAIR, seed=seeds, guidance=method, **RUN)
    finally:
        handle.remove()
    return runs, seen[-1].detach().unflatten(0, (-1, len(runs) if isinstance(runs, list) else 1))


@cache
def plain(family: str) -> torch.Tensor:
    return outputs(family, [1, 2])[1]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_method_runs_on_every_family_that_it_is_for(family: str, name: str) -> None:
    method = build(METHODS[name], OPTIONS.get(name, {}) | ACTING.get(name, {}))
    if name in CROSS_ATTENTION_ONLY and family in JOINT:
        with pytest.raises(SettingError, match="Use a model with plain cross-attention"):
            generate(shared(family), PAIR, seed=1, guidance=method, **RUN)
        return
    both, output = outputs(family, [1, 2], method)
    acted = False
    for i, run in enumerate(both):
        assert run.image.size == (SIZE["width"], SIZE["height"])
        assert run.guidance.rows
        assert run.guidance.skipped == 0
        assert all(np.isfinite(row["loss"]) for row in run.guidance.rows)
        # SPDiffusion finds no region where two entities have most attention at the same location
        acts = run.guidance.regions is None or bool(run.guidance.regions.any())
        # what a method changes can be too little for an image of 8 bits, but is more than rounding
        assert (float((output - plain(family))[:, i].abs().max()) > 1e-5) == acts
        acted |= acts
        if run.guidance.regions is not None:
            rows, columns = run.guidance.regions.shape[-2:]
            assert columns * 2 == rows * 3
    assert acted
    alone, _ = outputs(family, 2, method)
    first, same = (run.guidance.rows[0]["loss"] for run in (both[1], alone))
    assert first == pytest.approx(same, rel=1e-3, abs=1e-6)
    assert np.abs(np.asarray(both[1].image, int) - np.asarray(alone.image, int)).max() <= 1


def test_the_methods_that_need_regions_are_known_without_their_classes() -> None:
    assert {name for name, method in METHODS.items() if method.needs_regions} == set(NEED_REGIONS)
    assert {name for name, method in METHODS.items() if method.takes_regions} == {*NEED_REGIONS, *TAKE_REGIONS}
