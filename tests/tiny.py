"""Tiny pipelines with random weights, one per family, with all parts of real ones; an image takes less than a
second."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import BPE, Unigram
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    T5TokenizerFast,
)

from elakit.world.tokenizer import clip_tokenizer

# Before release 5, transformers reads the vocabulary of a tokenizer from files.
FROM_FILES = int(transformers.__version__.partition(".")[0]) < 5

SCHEDULERS: dict[str, type] = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-ancestral": EulerAncestralDiscreteScheduler,
    "pndm": PNDMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "heun": HeunDiscreteScheduler,
    "kdpm2": KDPM2DiscreteScheduler,
    "lms": LMSDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
    "deis": DEISMultistepScheduler,
    "lcm": LCMScheduler,
}

# "giraffe", "crocodile" and other words outside this corpus split into pieces.
CORPUS = "a an the and of on in with red blue green black white car bird dog cat frog apple clock chair lion bear"

START, END = "<|startoftext|>", "<|endoftext|>"


@cache
def _vocabulary() -> tuple[dict[str, int], list[Any]]:
    """Train a byte-level BPE on the words of the corpus; ids in the order of CLIP: bytes, bytes that end a word,
    merges, specials."""
    backend = Tokenizer(BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    letters = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=10_000, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False)
    backend.train_from_iterator([word for word in CORPUS.split() for _ in range(2)], trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    pieces = letters + [f"{letter}</w>" for letter in letters] + ["".join(pair) for pair in merges] + [START, END]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, merges


def tiny_tokenizer(length: int = 20) -> CLIPTokenizer:
    """Build a CLIP tokenizer for any text; ``length`` positions include start, end and padding."""
    return clip_tokenizer(*_vocabulary(), model_max_length=length)


def tiny_unet(**changes: Any) -> Any:
    """Build a U-Net for 8x8 latents with cross-attention at 8x8 and 4x4, in down, mid and up blocks."""
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


def sdxl_unet(**changes: Any) -> Any:
    """Build a U-Net with SDXL's further conditions, without attention at the latent's own size."""
    settings: dict[str, Any] = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "cross_attention_dim": 32,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    }
    return tiny_unet(**settings, **changes)


def _clip_encoder(tokenizer: CLIPTokenizer, length: int, kind: type = CLIPTextModel) -> Any:
    return kind(
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


def autoencoder(levels: int = 3, **changes: Any) -> Any:
    """Build an autoencoder; three levels reduce the height and width of an image to a quarter, four to an eighth."""
    settings: dict[str, Any] = {
        "block_out_channels": (8,) * levels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "mid_block_add_attention": False,
    }
    return AutoencoderKL(**{**settings, **changes})


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Context in which weights are random by a seed; torch's global generator is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


# Projections of queries and keys: in cross-attention, and in attention of image and text together.
CROSS = (".attn2.to_q.", ".attn2.to_k.")
JOINT = (".attn.to_q.", ".attn.to_k.", ".attn.add_k_proj.")


def sharpen(net: torch.nn.Module, *names: str) -> None:
    """Make attention less uniform than fresh weights do, so that a wrong token, head or position shows in a test."""
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if any(part in name for part in names):
                weight.mul_(4)
            elif any(f".norm{which}." in name for which in ("_q", "_k", "_added_q", "_added_k")):
                weight.copy_(1 + torch.randn_like(weight))


def tiny_pipeline(
    dtype: torch.dtype = torch.float32, scheduler: str = "ddim", seed: int = 0, length: int = 20, **unet: Any
) -> StableDiffusionPipeline:
    """Build a Stable Diffusion pipeline with random weights: 8x8 latents, images of 32x32 pixels.

    Parameters
    ----------
    dtype : torch.dtype
    scheduler : str
        One of `SCHEDULERS`.
    seed : int
        Seed of the weights; torch's global generator is not changed.
    length : int
        Text positions.
    **unet
        Changes to the U-Net's configuration.
    """
    tokenizer = tiny_tokenizer(length)
    with seeded(seed):
        text_encoder = _clip_encoder(tokenizer, length)
        net = tiny_unet(**unet)
        vae = autoencoder()
    sharpen(net, *CROSS)
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


def tiny_t5_tokenizer() -> T5Tokenizer:
    """Build a unigram tokenizer of the corpus's words, "gira", "ffe" and letters; ``</s>`` ends a text."""
    words = [(f"▁{word}", -3.0) for word in CORPUS.split()]
    pieces = [("▁gira", -4.0), ("ffe", -4.0), ("▁", -5.0)]
    letters = [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz,.!'"]
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary = [*specials, *dict(words + pieces + letters).items()]
    if not FROM_FILES:
        return T5Tokenizer(vocab=vocabulary, extra_ids=0)
    backend = Tokenizer(Unigram(vocabulary, unk_id=2))
    backend.pre_tokenizer, backend.decoder = Metaspace(), MetaspaceDecoder()
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=backend, extra_ids=0)


def t5_encoder(tokenizer: T5Tokenizer, width: int) -> Any:
    """Build a T5 encoder with random weights and states of ``width`` channels."""
    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )


def ready(pipe: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Switch off dropout and the progress bar of a pipeline."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe if dtype == torch.float32 else pipe.to(dtype=dtype)


def tiny_sdxl(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Build an SDXL pipeline: no attention at the latent's own size, two text encoders side by side."""
    tokenizer, length = tiny_tokenizer(), 20
    with seeded(seed):
        encoders = _clip_encoder(tokenizer, length), _clip_encoder(tokenizer, length, CLIPTextModelWithProjection)
        net = sdxl_unet()
        vae = autoencoder()
        sharpen(net, *CROSS)
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizer,
        tokenizer_2=tiny_tokenizer(),
        unet=net,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    return ready(pipe, dtype)


def tiny_pixart(dtype: torch.dtype = torch.float32, seed: int = 0, sigma: bool = False) -> Any:
    """Build a PixArt pipeline, Alpha or Sigma: T5 tokens, patches of 2x2. Call it without resolution binning."""
    tokenizer = tiny_t5_tokenizer()
    with seeded(seed):
        encoder = t5_encoder(tokenizer, 16)
        net: Any = PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=8,
            patch_size=2,
            norm_num_groups=4,
        )
        vae = autoencoder()
        sharpen(net, *CROSS)
    kind: Any = PixArtSigmaPipeline if sigma else PixArtAlphaPipeline
    pipe = kind(
        tokenizer=tokenizer, text_encoder=encoder, vae=vae, transformer=net, scheduler=DPMSolverMultistepScheduler()
    )
    return ready(pipe, dtype)


def tiny_sd3(dtype: torch.dtype = torch.float32, seed: int = 0, t5: bool = True, **transformer: Any) -> Any:
    """Build a Stable Diffusion 3.5 pipeline: joint attention, norms of queries and keys, CLIP and T5 tokens."""
    tokenizer, length = tiny_tokenizer(), 20
    with seeded(seed):
        first, second = (_clip_encoder(tokenizer, length, CLIPTextModelWithProjection) for _ in range(2))
        t5_tokenizer = tiny_t5_tokenizer() if t5 else None
        third = t5_encoder(t5_tokenizer, 32) if t5_tokenizer else None
        settings: dict[str, Any] = {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 16,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0,),
        }
        net: Any = SD3Transformer2DModel(**{**settings, **transformer})
        vae = autoencoder(shift_factor=0.06)
        sharpen(net, *JOINT)
    pipe: Any = StableDiffusion3Pipeline(
        transformer=net,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=third,
        tokenizer_3=t5_tokenizer,
    )
    return ready(pipe, dtype)


def tiny_flux(dtype: torch.dtype = torch.float32, seed: int = 0, **transformer: Any) -> Any:
    """Build a FLUX pipeline: one double- and two single-stream blocks, packed latents, distilled guidance."""
    tokenizer, t5_tokenizer = tiny_tokenizer(), tiny_t5_tokenizer()
    with seeded(seed):
        first, second = _clip_encoder(tokenizer, 20), t5_encoder(t5_tokenizer, 32)
        settings: dict[str, Any] = {
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 6, 6),
        }
        net: Any = FluxTransformer2DModel(**{**settings, **transformer})
        vae = autoencoder(shift_factor=0.1)
        sharpen(net, *JOINT)
    pipe: Any = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=t5_tokenizer,
        transformer=net,
    )
    return ready(pipe, dtype)
