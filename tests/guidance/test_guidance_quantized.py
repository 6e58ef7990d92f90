"""Models whose weights are stored in fewer bits: recorded as they compute, and guided by the gradient of what they
compute. Libraries that are not installed are skipped; `dev` installs gguf."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, TEXT, denoiser, draw
from tiny import tiny_flux, tiny_pipeline
from torch import Tensor, nn
from witness import compare, witness

import elakit
from elakit.attention import RecordSpec, record
from elakit.errors import SettingError
from elakit.guidance import AttendAndExcite
from elakit.guidance.engine import checkpointing
from elakit.models import adapter_for
from elakit.prompt import parse

SETTINGS: dict[str, Any] = {"seed": 7, "steps": 2, "height": 32, "width": 32, "progress": False}


def linears(net: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Linear layers whose width is a multiple of 32, which GGUF stores in blocks, with their places."""
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Linear) and module.in_features % 32 == 0:
            above, _, last = name.rpartition(".")
            yield net.get_submodule(above), last, module


def layerwise(net: Any) -> Callable[[Tensor], Tensor]:
    """8-bit floats, cast while a layer runs."""
    net.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return Tensor.float


def gguf(net: Any) -> Callable[[Tensor], Tensor]:
    library = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter, dequantize_gguf_tensor

    kind = library.GGMLQuantizationType.Q8_0
    for above, name, module in linears(net):
        packed = torch.from_numpy(library.quants.quantize(module.weight.detach().numpy(), kind))
        layer = GGUFLinear(
            module.in_features, module.out_features, module.bias is not None, compute_dtype=torch.float32
        )
        layer.weight, layer.bias = GGUFParameter(packed, quant_type=kind), module.bias
        setattr(above, name, layer)
    return lambda weight: dequantize_gguf_tensor(weight).float() if hasattr(weight, "quant_type") else weight


def torchao(net: Any) -> Callable[[Tensor], Tensor]:
    library = pytest.importorskip("torchao.quantization")
    library.quantize_(net, library.Int8WeightOnlyConfig())
    return lambda weight: weight.dequantize() if hasattr(weight, "tensor_impl") or hasattr(weight, "qdata") else weight


def quanto(net: Any) -> Callable[[Tensor], Tensor]:
    library = pytest.importorskip("optimum.quanto")
    library.quantize(net, weights=library.qint8)
    library.freeze(net)
    return lambda weight: weight.dequantize() if isinstance(weight, library.QTensor) else weight


def bitsandbytes(net: Any) -> Callable[[Tensor], Tensor]:
    """4-bit floats of the normal distribution's quantiles."""
    library = pytest.importorskip("bitsandbytes")
    for above, name, module in linears(net):
        options = {"compute_dtype": torch.float32, "quant_type": "nf4"}
        layer = library.nn.Linear4bit(module.in_features, module.out_features, module.bias is not None, **options)
        layer.weight = library.nn.Params4bit(
            module.weight.detach().clone(), requires_grad=False, quant_type="nf4", blocksize=64
        )
        layer.bias = module.bias
        setattr(above, name, layer.to("cpu"))
    unpack = library.functional.dequantize_4bit
    return lambda weight: unpack(weight, weight.quant_state) if hasattr(weight, "quant_state") else weight


def bitsandbytes_8bit(net: Any) -> Callable[[Tensor], Tensor]:
    """Integers of 8 bits with a scale per row."""
    library = pytest.importorskip("bitsandbytes")
    for above, name, module in linears(net):
        layer = library.nn.Linear8bitLt(
            module.in_features, module.out_features, module.bias is not None, has_fp16_weights=False
        )
        layer.weight = library.nn.Int8Params(
            module.weight.detach().clone(), requires_grad=False, has_fp16_weights=False
        )
        layer.bias = module.bias
        setattr(above, name, layer.to("cpu"))
    return lambda weight: weight.float() * weight.SCB[:, None] / 127 if hasattr(weight, "SCB") else weight


STORED = (layerwise, gguf, torchao, quanto, bitsandbytes, bitsandbytes_8bit)


def stored(name: str, how: Callable[[Any], Callable[[Tensor], Tensor]]) -> tuple[Any, Any]:
    """A pipeline whose weights are stored in fewer bits, and one whose weights are these numbers in float32."""
    pipe, plain = (tiny_pipeline(block_out_channels=(32, 64)) if name == "sd" else tiny_flux() for _ in range(2))
    net, expected = denoiser(pipe), denoiser(plain)
    unpack = how(net)
    weights, changed = dict(net.named_parameters()), 0
    with torch.no_grad():
        for key, weight in expected.named_parameters():
            value = unpack(weights[key])
            changed += not torch.equal(weight, value)
            weight.copy_(value)
    assert changed > 5
    return pipe, plain


@pytest.mark.parametrize("how", STORED, ids=lambda how: how.__name__)
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_stored_weights_are_recorded_and_guided_as_they_compute(name: str, how: Any) -> None:
    family = FAMILIES[name]
    pipe, plain = stored(name, how)
    exact = RecordSpec(heads="all", dtype="float32")
    with witness(adapter_for(pipe).layers()) as seen, record(pipe, parse(TEXT, pipe), exact) as recording:
        image = draw(pipe, **family.options)
    compare(recording, seen, guided=family.guided)
    np.testing.assert_allclose(image, draw(plain, **family.options), atol=2e-3)
    once = AttendAndExcite(refine=())  # twenty refinements would enlarge what libraries round differently
    guided, known = (elakit.generate(p, TEXT, guidance=once, **SETTINGS).guidance for p in (pipe, plain))
    assert any(row["moved"] > 0 for row in guided.rows)
    for row, other in zip(guided.rows, known.rows, strict=True):
        assert (row["loss"], row["moved"]) == pytest.approx((other["loss"], other["moved"]), rel=1e-3)


def test_layerwise_casting_and_gradient_checkpointing_are_not_combined() -> None:
    pipe = tiny_pipeline()
    layerwise(pipe.unet)
    with checkpointing(pipe), pytest.raises(SettingError, match="or without layerwise casting"):
        elakit.generate(pipe, TEXT, guidance=AttendAndExcite(), **SETTINGS)
    assert {weight.dtype for weight in pipe.unet.parameters()} == {torch.float32, torch.float8_e4m3fn}
