"""Recording and guidance on an NVIDIA GPU: ``pytest -m cuda``. Skipped without one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, PLAIN, TEXT
from witness import compare, witness

import elakit
from elakit.attention import RecordSpec, SelfAttention, record, recorder
from elakit.models import adapter_for
from elakit.prompt import parse

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Queries and keys are rounded before they are read, and multiplied in another order.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}
EXACT = RecordSpec(heads="all", dtype="float32")


def latents(pipe: Any, **options: Any) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(7)
    settings = {"num_inference_steps": 2, "generator": generator, "output_type": "latent"} | options
    found: torch.Tensor = pipe(PLAIN, **settings).images
    return found


def on_gpu(name: str, dtype: str = "float32") -> Any:
    return FAMILIES[name].make().to("cuda", DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_image_is_bit_identical_and_the_numbers_are_right(name: str, dtype: str) -> None:
    pipe, options = on_gpu(name, dtype), FAMILIES[name].options
    prompt = parse(TEXT, pipe)
    plain = latents(pipe, **options)
    with witness(adapter_for(pipe).layers()) as seen, record(pipe, prompt, EXACT) as recording:
        assert torch.equal(plain, latents(pipe, **options))
    for one in seen:
        one.probabilities = one.probabilities.cpu()
    compare(recording, seen, guided=FAMILIES[name].guided, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("name", FAMILIES)
def test_no_layer_makes_the_host_wait_for_the_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, options = on_gpu(name, "float16"), FAMILIES[name].options
    prompt = parse(TEXT, pipe)
    original = recorder._Recorder.on_attention

    def strict(self: Any, *args: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            original(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(recorder._Recorder, "on_attention", strict)
    for spec in (RecordSpec(), RecordSpec(heads=[1, 0]), RecordSpec(self_attention=SelfAttention(size=4, heads="all"))):
        with record(pipe, prompt, spec) as recording:
            latents(pipe, **options, **({} if "height" in options else {"height": 32, "width": 32}))
        assert recording.steps == (0, 1)


@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_offloaded_models_are_recorded_alike(name: str, how: str) -> None:
    options = FAMILIES[name].options
    pipe = on_gpu(name)
    prompt = parse(TEXT, pipe)
    with record(pipe, prompt, EXACT) as expected:
        plain = latents(pipe, **options)
    offloaded = FAMILIES[name].make()
    getattr(offloaded, how)()
    with record(offloaded, prompt, EXACT) as recording:
        assert torch.equal(plain.cpu(), latents(offloaded, **options).cpu())
    np.testing.assert_allclose(recording.maps(), expected.maps(), atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", "model"])
def test_a_batch_of_eight_is_recorded_as_eight_images(device: Any) -> None:
    pipe = on_gpu("sdxl", "float16")
    prompt = parse(TEXT, pipe)
    plain = latents(pipe, num_images_per_prompt=8)
    with record(pipe, prompt, RecordSpec(device=device)) as recording:
        assert torch.equal(plain, latents(pipe, num_images_per_prompt=8))
    assert recording.nodes()[0].sizes["image"] == 8
    for image in range(8):
        assert np.isfinite(recording.maps(image=image)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_guided_runs_move_the_latents_and_stay_finite(name: str, dtype: str) -> None:
    pipe = on_gpu(name, dtype)
    size = {"height": 32, "width": 32}
    runs = elakit.generate(pipe, TEXT, seed=[1, 2], steps=2, guidance=elakit.ELA(), progress=False, **size)
    plain = elakit.generate(pipe, TEXT, seed=[1, 2], steps=2, progress=False, **size)
    for run, other in zip(runs, plain, strict=True):
        assert run.guidance is not None
        assert all(np.isfinite(row["loss"]) for row in run.guidance.rows)
        assert np.isfinite(np.asarray(other.image)).all()
