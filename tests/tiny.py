"""Tiny pipelines with random weights: everything a Stable Diffusion pipeline has, in well under a second a picture."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SCHEDULERS: dict[str, type] = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-ancestral": EulerAncestralDiscreteScheduler,
    "pndm": PNDMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "heun": HeunDiscreteScheduler,
}

# "giraffe", "crocodile" and other words outside this corpus split into pieces.
CORPUS = "a an the and of on in with red blue green black white car bird dog cat frog apple clock chair lion bear"

START, END = "<|startoftext|>", "<|endoftext|>"


@cache
def _vocabulary() -> tuple[dict[str, int], list[Any]]:
    """Byte-level BPE of the corpus's words, ids in CLIP's order: bytes, bytes ending a word, merges, specials."""
    backend = Tokenizer(BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    letters = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=10_000, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False)
    backend.train_from_iterator([word for word in CORPUS.split() for _ in range(2)], trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    pieces = letters + [f"{letter}</w>" for letter in letters] + ["".join(pair) for pair in merges] + [START, END]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, merges


def tiny_tokenizer(length: int = 20) -> CLIPTokenizer:
    """CLIP tokenizer that takes any text; ``length`` positions with start, end and padding."""
    vocabulary, merges = _vocabulary()
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), model_max_length=length)


def tiny_unet(**changes: Any) -> Any:
    """UNet of 8x8 latents with cross-attention at 8x8 and 4x4, on the down, mid and up sides."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
    }
    return UNet2DConditionModel(**{**settings, **changes})


def tiny_pipeline(
    dtype: torch.dtype = torch.float32, scheduler: str = "ddim", seed: int = 0, length: int = 20, **unet: Any
) -> StableDiffusionPipeline:
    """Stable Diffusion pipeline of random weights: 8x8 latents, pictures of 32x32 pixels.

    Parameters
    ----------
    dtype : torch.dtype
    scheduler : {"ddim", "euler", "euler-ancestral", "pndm", "dpm++", "heun"}
    seed : int
        Of the weights; torch's own generator is left as it was.
    length : int
        Text positions.
    **unet
        Changes to the UNet's configuration.
    """
    tokenizer = tiny_tokenizer(length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=length,
                projection_dim=16,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        net = tiny_unet(**unet)
        vae: Any = AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=4,
            latent_channels=4,
            mid_block_add_attention=False,
        )
    with torch.no_grad():
        # Fresh weights attend almost evenly; sharper maps let a test see a wrong token, head or position.
        for name, weight in net.named_parameters():
            if ".attn2.to_q." in name or ".attn2.to_k." in name:
                weight.mul_(4)
    settings: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    settings["steps_offset"] = 1
    if scheduler == "ddim":
        settings |= {"clip_sample": False, "set_alpha_to_one": False}
    elif scheduler == "pndm":
        settings |= {"skip_prk_steps": True, "set_alpha_to_one": False}
    pipe: Any = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=net.eval(),
        scheduler=SCHEDULERS[scheduler](**settings),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe if dtype == torch.float32 else pipe.to(dtype=dtype)
