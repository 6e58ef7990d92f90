"""Tiny pipelines with random weights of the families that generate videos."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.wan import pipeline_wan
from tiny import CROSS, ready, seeded, sharpen, t5_encoder, tiny_t5_tokenizer
from transformers import UMT5Config, UMT5EncoderModel


def tiny_wan(seed: int = 0, **parts: Any) -> Any:
    """Wan pipeline: two blocks, an autoencoder of factor 4 in space and 2 in time."""
    if not hasattr(pipeline_wan, "ftfy"):  # the pipeline cleans prompts with it; the tests' prompts are clean
        vars(pipeline_wan)["ftfy"] = SimpleNamespace(fix_text=str)
    tokenizer = tiny_t5_tokenizer()
    with seeded(seed):
        encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        )
        net = wan_transformer()
        vae: Any = AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.1] * 4,
            latents_std=[1.5] * 4,
            scale_factor_temporal=2,
            scale_factor_spatial=4,
        )
    parts = {"vae": vae, "text_encoder": encoder, "tokenizer": tokenizer, "transformer": net} | parts
    return ready(WanPipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts))


def wan_transformer() -> Any:
    """Transformer of two blocks."""
    net: Any = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    sharpen(net, *CROSS)
    return net


def tiny_ltx(seed: int = 0) -> Any:
    """LTX-Video pipeline: two blocks, an autoencoder of factor 8 in space and 4 in time."""
    tokenizer = tiny_t5_tokenizer()
    with seeded(seed):
        encoder = t5_encoder(tokenizer, 16)
        net: Any = LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=24,
            num_layers=2,
            caption_channels=16,
        )
        vae: Any = AutoencoderKLLTXVideo(
            latent_channels=4,
            block_out_channels=(8, 8, 8),
            down_block_types=("LTXVideoDownBlock3D",) * 3,
            decoder_block_out_channels=(8, 8, 8),
            layers_per_block=(1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False),
            decoder_spatio_temporal_scaling=(True, True, False),
            decoder_inject_noise=(False,) * 4,
            downsample_type=("conv",) * 3,
            upsample_residual=(False,) * 3,
            upsample_factor=(1,) * 3,
            patch_size=2,
        )
        sharpen(net, *CROSS)
    parts = {"vae": vae, "text_encoder": encoder, "tokenizer": tokenizer, "transformer": net}
    return ready(LTXPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **parts))


def tiny_cogvideox(seed: int = 0, frames_per_patch: int | None = None) -> Any:
    """CogVideoX pipeline: two blocks, an autoencoder of factor 4 in space and 4 in time."""
    tokenizer = tiny_t5_tokenizer()
    with seeded(seed):
        encoder = t5_encoder(tokenizer, 16)
        net: Any = CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=16,
            num_layers=2,
            sample_width=12,
            sample_height=8,
            sample_frames=9,
            patch_size=2,
            patch_size_t=frames_per_patch,
            use_rotary_positional_embeddings=True,
            max_text_seq_length=226,
        )
        vae: Any = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 3,
            up_block_types=("CogVideoXUpBlock3D",) * 3,
            block_out_channels=(8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
            sample_height=32,
            sample_width=48,
        )
        sharpen(net, ".attn1.to_q.", ".attn1.to_k.")
    parts = {"vae": vae, "text_encoder": encoder, "tokenizer": tokenizer, "transformer": net}
    return ready(CogVideoXPipeline(scheduler=CogVideoXDDIMScheduler(), **parts))


BUILDERS: dict[str, Callable[[], Any]] = {"Wan": tiny_wan, "LTX-Video": tiny_ltx, "CogVideoX": tiny_cogvideox}
