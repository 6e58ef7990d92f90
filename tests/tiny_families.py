"""Tiny pipelines with random weights of the newer families, with language models as text encoders."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
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
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from tiny import (
    CORPUS,
    CROSS,
    JOINT,
    autoencoder,
    ready,
    sdxl_unet,
    seeded,
    sharpen,
    t5_encoder,
    tiny_flux,
    tiny_t5_tokenizer,
)
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
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
    with seeded(seed):
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
        sharpen(net, *JOINT)
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
    with seeded(seed):
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
        sharpen(net, ".attention.to_q.", ".attention.to_k.")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return ready(diffusers.ZImagePipeline(scheduler, vae, encoder, tokenizer, net))  # type: ignore[call-arg]


def tiny_qwen_image(seed: int = 0) -> Any:
    """Qwen-Image pipeline: two double-stream blocks, an autoencoder of one frame."""
    tokenizer = chat_tokenizer()
    with seeded(seed):
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
        sharpen(net, *JOINT)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = ready(QwenImagePipeline(scheduler, vae, encoder, tokenizer, net))  # type: ignore[call-arg]
    pipe.prompt_template_encode = "<|im_start|>system Describe a car:<|im_end|> <|im_start|>user {}<|im_end|> "
    pipe.prompt_template_encode_start_idx = 10
    return pipe


def tiny_sana(seed: int = 0) -> Any:
    """Sana pipeline: linear self-attention, cross-attention with masks, an autoencoder of factor 4."""
    tokenizer = chat_tokenizer(start=True)
    with seeded(seed):
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
        sharpen(net, *CROSS)
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    return ready(SanaPipeline(tokenizer, encoder, vae, net, scheduler))  # type: ignore[call-arg]


def tiny_lumina2(seed: int = 0) -> Any:
    """Lumina 2 pipeline: two layers whose queries share keys."""
    tokenizer = chat_tokenizer(start=True)
    with seeded(seed):
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
        vae = autoencoder(levels=4, shift_factor=0.1)
        sharpen(net, ".attn.to_q.", ".attn.to_k.")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return ready(Lumina2Pipeline(net, scheduler, vae, encoder, tokenizer))  # type: ignore[call-arg]


def tiny_aura_flow(seed: int = 0) -> Any:
    """AuraFlow pipeline: one double- and two single-stream blocks."""
    tokenizer = tiny_t5_tokenizer()
    with seeded(seed):
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
        sharpen(net, *JOINT)
    return ready(AuraFlowPipeline(tokenizer, encoder, vae, net, FlowMatchEulerDiscreteScheduler()))  # type: ignore[call-arg]


def tiny_chroma(seed: int = 0) -> Any:
    """Chroma pipeline: one double- and one single-stream block."""
    tokenizer = tiny_t5_tokenizer()
    with seeded(seed):
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
        sharpen(net, *JOINT)
    parts = {"vae": vae, "text_encoder": encoder, "tokenizer": tokenizer, "transformer": net}
    return ready(ChromaPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **parts))


def tiny_cogview3_plus(seed: int = 0) -> Any:
    """CogView3-Plus pipeline: two blocks over T5 states."""
    tokenizer = tiny_t5_tokenizer()
    with seeded(seed):
        encoder = t5_encoder(tokenizer, 32)
        net: Any = CogView3PlusTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=32,
            time_embed_dim=8,
            condition_dim=4,
            pos_embed_max_size=16,
            sample_size=8,
        )
        vae = autoencoder()
        sharpen(net, ".attn1.to_q.", ".attn1.to_k.")
    scheduler = CogVideoXDDIMScheduler()
    return ready(CogView3PlusPipeline(tokenizer, encoder, vae, net, scheduler))  # type: ignore[call-arg]


def tiny_cogview4(seed: int = 0) -> Any:
    """CogView4 pipeline: two blocks, text padded on the left to a multiple of 16 tokens."""
    tokenizer = chat_tokenizer("left", start=True)
    with seeded(seed):
        encoder = GlmModel(GlmConfig(vocab_size=len(tokenizer), pad_token_id=0, **_LANGUAGE))
        net: Any = CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=8,
            condition_dim=4,
            pos_embed_max_size=64,
            sample_size=8,
            rope_axes_dim=(16, 16),
        )
        vae = autoencoder()
        sharpen(net, ".attn1.to_q.", ".attn1.to_k.")
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
    )
    return ready(CogView4Pipeline(tokenizer, encoder, vae, net, scheduler))  # type: ignore[call-arg]


def bert_tokenizer(file: Path) -> BertTokenizer:
    """WordPiece of the corpus's words, "gira" and "##ffe"."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(CORPUS.split())), "gira", "##ffe", *"abdo"]
    file.write_text("\n".join(dict.fromkeys(words)), encoding="utf-8")
    return BertTokenizer(str(file), model_max_length=77)


def tiny_hunyuan_dit(seed: int = 0) -> Any:
    """HunyuanDiT pipeline: four blocks with a skip connection, BERT and T5 states."""
    with TemporaryDirectory() as folder:
        tokenizer = bert_tokenizer(Path(folder) / "vocab.txt")
    second = tiny_t5_tokenizer()
    with seeded(seed):
        bert = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
        )
        net: Any = HunyuanDiT2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=16,
            num_layers=4,
            cross_attention_dim=16,
            cross_attention_dim_t5=32,
            pooled_projection_dim=16,
        )
        parts = {"text_encoder": BertModel(bert), "text_encoder_2": t5_encoder(second, 32)}
        vae = autoencoder(levels=4)
        sharpen(net, *CROSS)
    parts |= {"tokenizer": tokenizer, "tokenizer_2": second, "vae": vae, "transformer": net}
    pipe = HunyuanDiTPipeline(
        scheduler=DDPMScheduler(prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **parts,
    )
    return ready(pipe)


class _GlmTokenizer(PreTrainedTokenizerFast):
    """Chat tokenizer that pads on the left and returns positions, as ChatGLM's does."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        found = super().__call__(*args, **options)
        if options.get("return_tensors") == "pt":
            found["position_ids"] = (found["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return found


def tiny_kolors(seed: int = 0) -> Any:
    """Kolors pipeline: the tiny SDXL's U-Net over the states of a ChatGLM."""
    tokenizer = chat_tokenizer("left", start=True)
    tokenizer.__class__ = _GlmTokenizer
    with seeded(seed):
        config = ChatGLMConfig(
            num_layers=2,
            padded_vocab_size=len(tokenizer),
            hidden_size=16,
            ffn_hidden_size=32,
            kv_channels=8,
            num_attention_heads=2,
            seq_length=256,
            original_rope=True,
            multi_query_attention=True,
            add_qkv_bias=True,
            use_cache=True,  # as in the published configuration; transformers 4 has no default
        )
        encoder = ChatGLMModel(config, empty_init=False)
        with torch.no_grad():
            for weight in encoder.parameters():
                weight.normal_(std=0.3)
        net = sdxl_unet(encoder_hid_dim=16, encoder_hid_dim_type="text_proj")
        vae = autoencoder()
        sharpen(net, *CROSS)
    return ready(_kolors_pipeline()(vae, encoder, tokenizer, net, EulerDiscreteScheduler()))


def _kolors_pipeline() -> Any:
    """Class of the pipeline; its module imports sentencepiece, which only the tokenizer of real checkpoints needs."""
    if find_spec("sentencepiece") is not None:
        return importlib.import_module("diffusers.pipelines.kolors.pipeline_kolors").KolorsPipeline
    sys.modules["sentencepiece"] = stand_in = ModuleType("sentencepiece")
    vars(stand_in)["SentencePieceProcessor"] = None
    try:
        return importlib.import_module("diffusers.pipelines.kolors.pipeline_kolors").KolorsPipeline
    finally:
        del sys.modules["sentencepiece"]


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
    "CogView3-Plus": tiny_cogview3_plus,
    "CogView4": tiny_cogview4,
    "HunyuanDiT": tiny_hunyuan_dit,
    "Kolors": tiny_kolors,
    "FLUX.1 Kontext": tiny_kontext,
}
if not hasattr(diffusers, "Flux2KleinPipeline"):
    # the lowest release of diffusers that elakit supports does not have these families
    BUILDERS |= dict.fromkeys(("FLUX.2", "FLUX.2 Klein", "Z-Image"), lambda: pytest.skip("needs a newer diffusers"))
