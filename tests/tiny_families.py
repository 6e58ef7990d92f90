"""Tiny pipelines with random weights of the newer families, with language models as text encoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)
from tiny import CORPUS, _sharpen, autoencoder, ready, t5_encoder, tiny_flux, tiny_t5_tokenizer
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    Gemma2Config,
    Gemma2Model,
    MistralConfig,
    MistralModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
)

_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{{ message['content'][0]['text'] }}{% endif %}"
    "<|im_end|> {% endfor %}"
)
_LANGUAGE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 2048,
}


def chat_tokenizer(padding_side: str = "right", start: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the corpus's words with a chat template, and a start token if asked."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    specials = ["<pad>", "<bos>", "<|im_start|>", "<|im_end|>"]
    trainer = BpeTrainer(
        vocab_size=10_000, initial_alphabet=sorted(ByteLevel.alphabet()), special_tokens=specials, show_progress=False
    )
    backend.train_from_iterator([f" {word}" for word in CORPUS.split() for _ in range(2)], trainer)
    if start:
        backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=_CHAT,
        padding_side=padding_side,
        model_max_length=2048,
    )


def _qwen(tokenizer: Any) -> Any:
    return Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **_LANGUAGE))


def tiny_flux2(seed: int = 0, klein: bool = False) -> Any:
    """FLUX.2 pipeline (dev or Klein): one double- and two single-stream blocks."""
    tokenizer = chat_tokenizer("right" if klein else "left")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = _qwen(tokenizer) if klein else MistralModel(MistralConfig(vocab_size=len(tokenizer), **_LANGUAGE))
        net: Any = diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=not klein,
        )
        vae: Any = diffusers.AutoencoderKLFlux2(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
            latent_channels=4,
        )
        _sharpen(net, ".attn.to_q.", ".attn.to_k.", ".attn.add_k_proj.")
    parts = {"vae": vae, "text_encoder": encoder, "tokenizer": tokenizer, "transformer": net}
    kind: Any = diffusers.Flux2KleinPipeline if klein else diffusers.Flux2Pipeline
    pipe = ready(kind(scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), **parts))
    # The defaults name layers that the tiny encoder does not have.
    plain = kind.encode_prompt

    class Tiny(kind):
        def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
            return plain(self, *args, **{**kwargs, "text_encoder_out_layers": (1, 2, 3)})

    Tiny.__name__ = kind.__name__
    pipe.__class__ = Tiny
    return pipe


def tiny_z_image(seed: int = 0) -> Any:
    """Z-Image pipeline: one block of each refiner and two layers."""
    tokenizer = chat_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = _qwen(tokenizer)
        net: Any = diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 6, 6],
            axes_lens=[256, 64, 64],
        )
        with torch.no_grad():
            net.x_pad_token.normal_()
            net.cap_pad_token.normal_()
        vae = autoencoder(shift_factor=0.1)
        _sharpen(net, ".attention.to_q.", ".attention.to_k.")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return ready(diffusers.ZImagePipeline(scheduler, vae, encoder, tokenizer, net))  # type: ignore[call-arg]


def tiny_qwen_image(seed: int = 0) -> Any:
    """Qwen-Image pipeline: two double-stream blocks, an autoencoder of one frame."""
    tokenizer = chat_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = _qwen(tokenizer)
        net: Any = QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
        )
        vae: Any = AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.1] * 4,
            latents_std=[1.5] * 4,
        )
        _sharpen(net, ".attn.to_q.", ".attn.to_k.", ".attn.add_k_proj.")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = ready(QwenImagePipeline(scheduler, vae, encoder, tokenizer, net))  # type: ignore[call-arg]
    pipe.prompt_template_encode = "<|im_start|>system Describe a car:<|im_end|> <|im_start|>user {}<|im_end|> "
    pipe.prompt_template_encode_start_idx = 10
    return pipe


def tiny_sana(seed: int = 0) -> Any:
    """Sana pipeline: linear self-attention, cross-attention with masks, an autoencoder of factor 4."""
    tokenizer = chat_tokenizer(start=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Gemma2Model(Gemma2Config(vocab_size=len(tokenizer), **_LANGUAGE))
        net: Any = SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=32,
            timestep_scale=0.5,
            qk_norm="rms_norm_across_heads",
        )
        vae: Any = AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "ResBlock", "ResBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "ResBlock"),
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41,
        )
        _sharpen(net, ".attn2.to_q.", ".attn2.to_k.")
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    return ready(SanaPipeline(tokenizer, encoder, vae, net, scheduler))  # type: ignore[call-arg]


def tiny_lumina2(seed: int = 0) -> Any:
    """Lumina 2 pipeline: two layers whose queries share keys."""
    tokenizer = chat_tokenizer(start=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Gemma2Model(Gemma2Config(vocab_size=len(tokenizer), **_LANGUAGE))
        net: Any = Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(256, 64, 64),
            cap_feat_dim=16,
        )
        vae = autoencoder(
            shift_factor=0.1,
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        _sharpen(net, ".attn.to_q.", ".attn.to_k.")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return ready(Lumina2Pipeline(net, scheduler, vae, encoder, tokenizer))  # type: ignore[call-arg]


def tiny_aura_flow(seed: int = 0) -> Any:
    """AuraFlow pipeline: one double- and two single-stream blocks."""
    tokenizer = tiny_t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = t5_encoder(tokenizer, 32)
        net: Any = AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pos_embed_max_size=64,
        )
        vae = autoencoder()
        _sharpen(net, ".attn.to_q.", ".attn.to_k.", ".attn.add_k_proj.")
    return ready(AuraFlowPipeline(tokenizer, encoder, vae, net, FlowMatchEulerDiscreteScheduler()))  # type: ignore[call-arg]


def tiny_chroma(seed: int = 0) -> Any:
    """Chroma pipeline: one double- and one single-stream block."""
    tokenizer = tiny_t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = t5_encoder(tokenizer, 32)
        net: Any = ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        )
        vae = autoencoder(shift_factor=0.1)
        _sharpen(net, ".attn.to_q.", ".attn.to_k.", ".attn.add_k_proj.")
    parts = {"vae": vae, "text_encoder": encoder, "tokenizer": tokenizer, "transformer": net}
    return ready(ChromaPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **parts))


def tiny_kontext() -> Any:
    """FLUX Kontext pipeline of the components of the tiny FLUX."""
    parts = {name: part for name, part in tiny_flux().components.items() if part is not None}
    return ready(FluxKontextPipeline(**parts))


BUILDERS: dict[str, Callable[[], Any]] = {
    "FLUX.2": tiny_flux2,
    "FLUX.2 Klein": lambda: tiny_flux2(klein=True),
    "Z-Image": tiny_z_image,
    "Qwen-Image": tiny_qwen_image,
    "Sana": tiny_sana,
    "Lumina 2": tiny_lumina2,
    "AuraFlow": tiny_aura_flow,
    "Chroma": tiny_chroma,
    "FLUX.1 Kontext": tiny_kontext,
}
if not hasattr(diffusers, "Flux2KleinPipeline"):
    # the lowest release of diffusers that elakit supports does not have these families
    BUILDERS |= dict.fromkeys(("FLUX.2", "FLUX.2 Klein", "Z-Image"), lambda: pytest.skip("needs a newer diffusers"))
