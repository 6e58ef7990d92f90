"""Pipelines with random weights in the shapes of known models, and measurement of time and memory.

The cost of recording depends on shapes, not on weights. Nothing from elakit is imported here, so that packages that
cannot be installed together with it are measured on the same pipelines, in separate environments.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

MB = 10**6
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def unet(sdxl: bool, thin: bool) -> UNet2DConditionModel:
    """Build a U-Net with the shapes of SD 1.5 or SDXL; `thin` keeps layers, heads and map sizes, with few channels."""
    if sdxl:
        return UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(20, 40, 80) if thin else (320, 640, 1280),
            norm_num_groups=4 if thin else 32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),  # numbers of heads, despite the name
            cross_attention_dim=64 if thin else 2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=6 * 256 + (32 if thin else 1280),
        )
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(32, 64, 64, 64) if thin else (320, 640, 1280, 1280),
        norm_num_groups=8 if thin else 32,
        attention_head_dim=8,
        cross_attention_dim=64 if thin else 768,
    )


def _fill(net: torch.nn.Module) -> None:
    """Fill a network on the meta device with weights: views of one tensor, so that SDXL fits into little memory.

    Only the queries and keys of cross-attention have large weights of their own, because any two recorders would agree
    on uniform attention.
    """
    shared = 0.02 * torch.randn(max(weight.numel() for weight in net.parameters()))
    for path, module in net.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim == 1:
                values = torch.ones(weight.shape) if name == "weight" else torch.zeros(weight.shape)
            elif path.endswith((".attn2.to_q", ".attn2.to_k")):
                values = torch.randn(weight.shape) * 2.5 / weight.shape[1] ** 0.5
            else:
                values = shared[: weight.numel()].view(weight.shape)
            setattr(module, name, torch.nn.Parameter(values))


def pipeline(sdxl: bool, thin: bool, device: str, dtype: torch.dtype, tokenizer: Any) -> Any:
    """Build a pipeline with random weights and the U-Net of `unet`; its text encoders and autoencoder are small."""
    torch.manual_seed(0)
    with torch.device("meta"):
        net = unet(sdxl, thin).eval()
    _fill(net)

    def encoder(kind: type, width: int) -> Any:
        return kind(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=width,
                projection_dim=width,
                num_hidden_layers=2,
                num_attention_heads=2,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        ).eval()

    parts: dict[str, Any] = {
        "unet": net,
        "vae": AutoencoderKL(
            block_out_channels=(8,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
            latent_channels=4,
        ).eval(),
        "scheduler": EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        "tokenizer": tokenizer,
    }
    if sdxl:
        parts["text_encoder"] = encoder(CLIPTextModel, 32 if thin else 768)
        parts["text_encoder_2"] = encoder(CLIPTextModelWithProjection, 32 if thin else 1280)
        pipe: Any = StableDiffusionXLPipeline(tokenizer_2=tokenizer, add_watermarker=False, **parts)
    else:
        parts["text_encoder"] = encoder(CLIPTextModel, 64 if thin else 768)
        extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = StableDiffusionPipeline(**parts, **extra)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, dtype)


def host_memory(name: str) -> int:
    """Return the memory of this process in bytes, at present (VmRSS) or at its peak (VmHWM); 0 without /proc."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)


def timed(device: str, run: Callable[[], Any]) -> tuple[float, int]:
    """Return the seconds of a run, and the bytes by which its peak memory exceeds the memory before it.

    The memory is that of the GPU on cuda, otherwise that of the process (on Linux).
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # memory freed by earlier runs would hide what this run takes
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
        before = host_memory("VmRSS")
    began = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter() - began, torch.cuda.max_memory_allocated() - before
    return time.perf_counter() - began, host_memory("VmHWM") - before


def machine(device: str) -> str:
    """Describe the machine: processor or GPU, threads and versions."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else _processor()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} cores of {models[0]}" if models else platform.machine()
