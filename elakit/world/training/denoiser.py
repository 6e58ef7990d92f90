"""Training of text encoder and denoiser together (v-prediction, min-SNR weights), and assembly of the pipeline."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from elakit.errors import SettingError
from elakit.files import replace_folder
from elakit.models import EMBEDDED
from elakit.models.portable import drop_folders, write_portable_names
from elakit.world.tokenizer import train_tokenizer
from elakit.world.training.config import Config
from elakit.world.training.encoded import GrowingScenes
from elakit.world.training.loop import Schedule, autocast, fast_bfloat16, rank_and_world, train
from elakit.world.vocabulary import NOUNS

SAMPLE_PROMPTS = (
    "a red car", "a lion", "a frog", "a blue apple", "an elephant", "a yellow clock", "a purple bow", "a turtle",
    "a cat and a lion", "a turtle and a purple clock", "a red car and a blue bird", "a cat and a frog",
    "a monkey and a green balloon", "a black suitcase and a pink chair", "a bear and a rabbit",
    "a green crown and a bench",
)  # fmt: skip
SHEET_EVERY = 50_000  # samples
CLOSE_UP_SIZES = (0.45, 0.95)  # of the side of a close-up: 22 to 47% of that of a whole scene
CLOSE_UP_DECAY = 0.9  # share of the close-ups after which the learning rate falls
TOKEN_EMBEDDING = "token_embedding.weight"


def build_unet(config: Config, width: int) -> UNet2DConditionModel:
    """Untrained U-Net with text cross-attention at the full and half size of the latents, and in the middle block.

    Parameters
    ----------
    config : Config
    width : int
        Number of channels of the text states.
    """
    settings = config.denoiser
    side = config.world.size // 2 ** (len(config.vae.encoder_blocks) - 1)
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=config.vae.latent_channels,
        out_channels=config.vae.latent_channels,
        layers_per_block=1,
        block_out_channels=settings.channels,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        # diffusers reads this argument as the number of heads (its own documented misnomer)
        attention_head_dim=settings.heads,
        norm_num_groups=16,
    )


def build_text_encoder(config: Config, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Untrained CLIP text encoder for a tokenizer."""
    settings = config.text
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.width,
            intermediate_size=3 * settings.width,
            projection_dim=settings.width,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            max_position_embeddings=settings.positions,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="eager",
        )
    )


def build_scheduler() -> DDIMScheduler:
    """DDIM scheduler with the noise schedule of Stable Diffusion, for a model trained with v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


@torch.no_grad()
def grow(model: Any, tokenizer: CLIPTokenizer, old: StableDiffusionPipeline) -> None:
    """Copy the weights of an earlier model to a new model, which may have more latent channels.

    The weights of additional latent channels are set to zero. Token embeddings are copied by token, not by id, because
    a model with other captions has another vocabulary.

    Parameters
    ----------
    model : nn.ModuleDict
        New model, which is changed in place. ``model["text"]`` is the text encoder, and ``model["unet"]`` is the U-Net.
        The architecture is the same as in `old`, except that there may be more latent channels.
    tokenizer : CLIPTokenizer
        Tokenizer of the new model.
    old : StableDiffusionPipeline
        Pipeline of the earlier model.

    Raises
    ------
    SettingError
        The architectures differ in more than the latent channels.
    """
    known = old.tokenizer.get_vocab()
    rows = [(index, known[token]) for token, index in tokenizer.get_vocab().items() if token in known]
    for part, source in ((model["text"], old.text_encoder), (model["unet"], old.unet)):
        values, sources = part.state_dict(), source.state_dict()
        for name, value in values.items():
            given = sources.get(name)
            if given is not None and name.endswith(TOKEN_EMBEDDING):
                new, theirs = torch.tensor(rows).T
                value[new] = given[theirs]
                continue
            grown = name in ("conv_in.weight", "conv_out.weight", "conv_out.bias")
            if given is None or (given.shape != value.shape and not grown):
                found = "is missing" if given is None else f"has shape {tuple(given.shape)}, not {tuple(value.shape)}"
                raise SettingError(
                    f"The weights of the earlier model do not fit: {name} {found}. "
                    "Use the same [text] and [denoiser] architecture, or train without --start."
                )
            if given.shape != value.shape:
                value.zero_()
            value[tuple(slice(0, n) for n in given.shape)] = given


def train_denoiser(
    config: Config, folder: Path, device: torch.device, start: Path | None = None, workers: int = 0
) -> StableDiffusionPipeline:
    """Train text encoder and U-Net on scenes, and save the pipeline to ``folder/model``.

    Parameters
    ----------
    config : Config
    folder : Path
        Folder that contains the trained autoencoder in ``vae/``.
    device : torch.device
    start : Path, optional
        Folder of an earlier pipeline, from whose weights the training starts.
    workers : int
        Number of processes that compose scenes in advance. If `workers` is 0, this process composes the scenes.

    Returns
    -------
    StableDiffusionPipeline
        Pipeline with the moving average of the weights.

    Raises
    ------
    SettingError
        The weights of `start` do not fit the configuration, or a checkpoint was trained with a different number of
        images per step than `config` sets.
    """
    settings, processes = config.denoiser, rank_and_world()[1]
    vae = AutoencoderTiny.from_pretrained(folder / "vae").to(device).eval()
    tokenizer = train_tokenizer(config.text.vocabulary, config.text.positions)
    torch.manual_seed(0)
    text = build_text_encoder(config, tokenizer)
    unet = build_unet(config, config.text.width)
    if fast_bfloat16(device):
        # eager attention: on CPU the backward of fused attention in bf16 took over a third of a step (in fp32, fused
        # attention is the faster of the two)
        unet.set_attn_processor(AttnProcessor())
    # trained beside the U-Net and discarded: it reads what the second decoder block knows of the things' outlines
    outlines = nn.Conv2d(settings.channels[1], 1 + len(NOUNS), 1)
    model: Any = nn.ModuleDict({"text": text, "unet": unet, "outlines": outlines}).to(device)
    if settings.compiled:
        unet.to(memory_format=torch.channels_last)  # the faster one when compiled only
    if start is not None and not (folder / "denoiser.pt").exists():
        grow(
            model,
            tokenizer,
            StableDiffusionPipeline.from_pretrained(start, torch_dtype=torch.float32, local_files_only=True),
        )
    scheduler = build_scheduler()
    alphas = scheduler.alphas_cumprod.to(device)
    empty = tokenizer([""], padding="max_length", return_tensors="pt").input_ids.to(device)
    # one program per size of image: one for any size is slower
    network: Any = torch.compile(unet, dynamic=False) if settings.compiled else unet
    seen: list[Tensor] = []
    unet.up_blocks[1].register_forward_hook(lambda module, given, features: seen.append(features))

    def fit(config: Config, folder: Path) -> Any:
        """Train on scenes with the settings of `config`, and return the model with averaged weights.

        Checkpoints, scenes and sheets of sample images are written to `folder`.
        """
        settings, drawn = config.denoiser, -1
        data = GrowingScenes(config, folder, vae, tokenizer, device, workers)

        def loss(step: int) -> Tensor:
            batch = data.batch(step * settings.batch * processes, settings.batch)
            latents, tokens = batch.latents.to(device).float(), batch.tokens.to(device)
            tokens = torch.where(_chance(settings.drop_text, len(tokens), device)[:, None], empty, tokens)
            noise = torch.randn_like(latents)
            times = torch.randint(len(alphas), (len(tokens),), device=device)
            signal = alphas[times].view(-1, 1, 1, 1)
            noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
            target = signal.sqrt() * noise - (1 - signal).sqrt() * latents
            with autocast(device):
                states = model["text"](torch.cat([tokens, empty])).last_hidden_state
                states, neutral = states[:-1], states[-1:]
                ended = (tokens == tokenizer.eos_token_id) & _chance(settings.neutral_end, len(tokens), device)[:, None]
                states = torch.where(ended[..., None], neutral, states)
                predicted = network(noisy, times, states).sample.float()
                named = model["outlines"](seen.pop()).float()
            weight = loss_weights(alphas[times], settings.min_snr, settings.least_weight)
            total = (weight * (predicted - target).pow(2).mean((1, 2, 3))).mean()
            # weighted with the share of signal: in noise alone nothing has a place yet
            wrong = F.cross_entropy(named, batch.classes.to(device).long(), reduction="none").mean((1, 2))
            return total + settings.outlines * (signal.flatten() * wrong).mean()

        def checkpoint(average: Any, step: int) -> None:
            nonlocal drawn
            pipe = assemble(average, vae, tokenizer, scheduler)
            save_pipeline(pipe, folder / "model")
            seen_samples = step * settings.batch * processes
            sheet, last = seen_samples // SHEET_EVERY, step == schedule.steps
            if last or sheet != drawn:  # a sheet takes as long as many steps
                sample_sheet(pipe, config.world.size).save(folder / f"samples-{seen_samples:08d}.png")
                drawn = sheet

        schedule = Schedule(
            settings.samples,
            settings.batch,
            settings.learning_rate,
            settings.warmup,
            decay_from=settings.decay_from,
            average=settings.average,
            processes=processes,
        )
        return train(model, loss, schedule, folder, "denoiser", checkpoint_seconds=300, on_checkpoint=checkpoint)

    if settings.close_ups and not (folder / "denoiser.pt").exists():
        model.load_state_dict(fit(close_up(config), folder / "close-ups").state_dict())
    return assemble(fit(config, folder), vae, tokenizer, scheduler)


def loss_weights(signal: Tensor, min_snr: float, least: float) -> Tensor:
    """Weights of the squared error of a v-prediction: min-SNR weights (arXiv 2303.09556) with a lower bound.

    With the signal-to-noise ratio r = signal / (1 - signal), the min-SNR weight is min(r, min_snr) / (r + 1). Min-SNR
    alone nearly ignores the noisiest timesteps, at which the model decides where things are. The lower bound applies
    only where there is more noise than signal.

    Parameters
    ----------
    signal : Tensor
        Share of the noisy latents' variance that is signal (``alphas_cumprod``).
    min_snr : float
        Upper bound of the signal-to-noise ratio.
    least : float
        Lower bound of the weights. It is at most 0.5, which is the weight where signal and noise are equal.

    Returns
    -------
    Tensor
        One weight for each value of `signal`.

    Examples
    --------
    The lower bound raises the first weight from 0.01 to 0.1. For the last weight, r is 99, which `min_snr` reduces to
    5; the weight is 5 / 100:

    >>> loss_weights(torch.tensor([0.01, 0.5, 0.8, 0.99]), min_snr=5.0, least=0.1)
    tensor([0.1000, 0.5000, 0.8000, 0.0500])
    """
    ratio = signal / (1 - signal)
    weights = ratio.clamp(max=min_snr) / (ratio + 1)
    return torch.where(ratio < 1, weights.clamp(min=least), weights)


def close_up(config: Config) -> Config:
    """Settings of the first part of the training, derived from the settings of the whole training.

    The first part uses images with half the side of a scene. Training on such an image takes a fraction of the time.
    Each image shows a single thing, which fills most of the image. The thing has about as many pixels as a small thing
    in a scene.

    Examples
    --------
    A scene has a side of 128 pixels. The images of the first part have half this side:

    >>> from elakit.world.training.config import read_config
    >>> close_up(read_config()).world.size
    64
    """
    settings = config.denoiser
    return dataclasses.replace(
        config,
        world=dataclasses.replace(
            config.world, size=config.world.size // 2, entities=(1.0,), single_sizes=CLOSE_UP_SIZES
        ),
        denoiser=dataclasses.replace(
            settings, samples=settings.close_ups, batch=2 * settings.batch, decay_from=CLOSE_UP_DECAY
        ),
    )


def assemble(model: Any, vae: Any, tokenizer: CLIPTokenizer, scheduler: DDIMScheduler) -> StableDiffusionPipeline:
    """Pipeline of the given parts, with the text encoder ``model["text"]`` and the U-Net ``model["unet"]``."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model["text"],
        tokenizer=tokenizer,
        unet=model["unet"],
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_pipeline(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Write a pipeline to a folder as fp16 safetensors, completely or not at all; an existing folder is replaced."""
    half = StableDiffusionPipeline(
        **{
            name: copy.deepcopy(part).half() if isinstance(part, nn.Module) else part
            for name, part in pipe.components.items()
        },
        requires_safety_checker=False,
    )
    with replace_folder(folder) as part:
        half.save_pretrained(part, safe_serialization=True)
        write_portable_names(part)
        drop_folders(part)


def sample_sheet(pipe: StableDiffusionPipeline, size: int, prompts: tuple[str, ...] = SAMPLE_PROMPTS) -> Image.Image:
    """Sheet with one generated image per prompt, eight images per row.

    Each image is generated from seed 0 with a side of `size` pixels, and then enlarged to twice this side.
    """
    images = pipe(
        list(prompts),
        height=size,
        width=size,
        num_inference_steps=20,
        guidance_scale=EMBEDDED["picture-world"].guidance_scale,
        generator=[torch.Generator().manual_seed(0) for _ in prompts],
    ).images
    side = 2 * images[0].width
    sheet = Image.new("RGB", (8 * side, side * ((len(prompts) + 7) // 8)))
    for i, image in enumerate(images):
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (i % 8 * side, i // 8 * side))
    return sheet


def _chance(probability: float, count: int, device: torch.device) -> Tensor:
    return torch.rand(count, device=device) < probability
