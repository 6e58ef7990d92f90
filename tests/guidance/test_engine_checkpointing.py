"""Gradient checkpointing: guidance takes the same steps with less memory, and the model is unchanged afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import FROM_FILES, tiny_pipeline

import elakit
from elakit.errors import SettingError
from elakit.guidance import METHODS, LatentStep, checkpointing
from elakit.guidance.engine import frozen, gradient
from elakit.models import adapter_for

PAIR = "a [red car] and a [blue bird]"
HALVES = [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
FEW: dict[str, dict[str, Any]] = {  # fewer passes
    "ela": {"anchor": LatentStep(start=0)},
    "layout-guidance": {"regions": HALVES, "guided": 0.5, "iterations": 2},
    "boxdiff": {"regions": HALVES},
    "conform": {"refinements": 1},
    "initno": {"rounds": 1, "iterations": 2, "last_iterations": 2, "refinements": 1},
    "attend-and-excite": {"refine": ((0.0, 0.5, 2),)},
    "divide-and-bind": {"refine": ((0.0, 0.5, 2),)},
}


def switches(pipe: Any) -> dict[str, tuple[Any, Any]]:
    return {
        name: tuple(vars(module).get(x) for x in ("gradient_checkpointing", "_gradient_checkpointing_func"))
        for name, module in pipe.unet.named_modules()
    }


# the text encoders of transformers 4 do not run in float64
EXACT, ERROR = (torch.float32, 1e-3) if FROM_FILES else (torch.float64, 1e-6)
WITHOUT_GRADIENT = {name for name in METHODS if hasattr(METHODS[name], "hold")}


@pytest.mark.parametrize("name", [name for name in METHODS if name not in WITHOUT_GRADIENT])
def test_every_method_moves_the_latents_as_without(name: str) -> None:
    pipe = tiny_pipeline(EXACT)
    method = METHODS[name](**FEW.get(name, {}))
    options: dict[str, Any] = {"seed": 5, "steps": 2, "guidance": method, "progress": False}
    plain = elakit.generate(pipe, PAIR, **options)
    with checkpointing(pipe):
        run = elakit.generate(pipe, PAIR, **options)
    frame, wanted = run.guidance.to_frame(), plain.guidance.to_frame()
    assert (wanted.moved > 0).any()
    for column in ("loss", "moved"):
        assert frame[column].tolist() == pytest.approx(wanted[column].tolist(), rel=ERROR)
    assert np.abs(np.asarray(run.image, int) - np.asarray(plain.image, int)).max() <= 1
    assert run.recording.steps == plain.recording.steps  # recomputed layers are not recorded
    np.testing.assert_allclose(run.entity_maps(), plain.entity_maps(), atol=1e-3)


def one_pass(pipe: Any, side: int) -> tuple[Any, ...]:
    """Arguments of `gradient` for one image of ELA."""
    adapter, prompt, method = adapter_for(pipe), elakit.parse(PAIR, pipe), elakit.ELA()
    pipe.scheduler.set_timesteps(10)
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(3), dtype=pipe.unet.dtype)
    layers = method.select(adapter.layers(), (side, side))
    conditioning = adapter.encode(prompt.text, guided=False)
    return adapter, method, prompt, layers, latents, pipe.scheduler.timesteps[3], conditioning


def kept(at: tuple[Any, ...]) -> int:
    """Count the bytes that a gradient pass keeps, each storage once, without weights."""
    own = {parameter.untyped_storage().data_ptr() for parameter in at[0].denoiser.parameters()}
    seen: dict[int, torch.Tensor] = {}  # a tensor that is referenced keeps its address

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    with frozen(at[0].denoiser), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradient(*at)
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def test_far_less_is_kept_for_the_backward() -> None:
    pipe = tiny_pipeline()
    at = one_pass(pipe, 32)
    without = kept(at)
    with checkpointing(pipe):
        assert kept(at) < without / 2


@pytest.mark.parametrize("own", [False, True])
def test_the_model_is_left_as_it_was_after_an_error_too(own: bool) -> None:
    pipe = tiny_pipeline()
    if own:  # the user's own checkpointing function
        pipe.unet.enable_gradient_checkpointing(lambda module, *args: module(*args))
    before = switches(pipe)

    def interrupted() -> None:
        with checkpointing(pipe):
            assert pipe.unet.is_gradient_checkpointing
            assert switches(pipe) != before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert switches(pipe) == before
    assert pipe.unet.is_gradient_checkpointing is own


@pytest.mark.parametrize("nth", [1, 2, 9])
def test_an_interrupt_while_weights_are_frozen_leaves_them_as_they_were(
    nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = tiny_pipeline().unet
    freeze, frozen_so_far = torch.nn.Parameter.requires_grad_, 0

    def interrupted(self: torch.nn.Parameter, requires_grad: bool = True) -> torch.Tensor:
        nonlocal frozen_so_far
        changed = freeze(self, requires_grad)
        frozen_so_far += not requires_grad
        if frozen_so_far == nth and not requires_grad:
            raise KeyboardInterrupt
        return changed

    monkeypatch.setattr(torch.nn.Parameter, "requires_grad_", interrupted)
    with pytest.raises(KeyboardInterrupt), frozen(net):
        pass
    assert all(weight.requires_grad for weight in net.parameters())


def test_an_error_inside_a_checkpoint_does_not_spoil_the_next_gradient() -> None:
    pipe = tiny_pipeline(EXACT)
    at = one_pass(pipe, 8)
    wanted = gradient(*at)[1]

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = at[3][0].module.register_forward_hook(fail)
    with checkpointing(pipe), pytest.raises(RuntimeError, match="out of memory"):
        gradient(*at)
    handle.remove()
    torch.testing.assert_close(gradient(*at)[1], wanted, rtol=ERROR, atol=1e-7)
    with checkpointing(pipe):
        torch.testing.assert_close(gradient(*at)[1], wanted, rtol=ERROR, atol=1e-7)


def test_a_model_without_checkpoints_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline()
    monkeypatch.setattr(type(pipe.unet), "_supports_gradient_checkpointing", False)
    with pytest.raises(SettingError, match="UNet2DConditionModel does not support"), checkpointing(pipe):
        pass
