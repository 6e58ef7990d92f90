"""Training of the judge, a segmenter of images.

The judge is trained on composed scenes, on composed hybrids, and on images that picture-world generates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from elakit.errors import SettingError
from elakit.files import replace_file
from elakit.judge.segmenter import CLASSES, Segmenter
from elakit.models import EMBEDDED
from elakit.resources import data_path
from elakit.world.art import ARTISTS, Drawing, drawings
from elakit.world.backgrounds import background
from elakit.world.mixtures import KINDS, UNCERTAIN, sample_mixture
from elakit.world.scenes import World, caption, sample
from elakit.world.spoiled import sample_spoiled
from elakit.world.training.config import Config
from elakit.world.training.labeled import labeled_loss, read_labeled
from elakit.world.training.loop import Schedule, autocast, train
from elakit.world.training.workers import in_order
from elakit.world.vocabulary import COLORS, NOUNS

# Artists whose drawings the judge never sees in training: per noun, the first one who drew it, if the noun has at least
# `LEAST_ARTISTS` artists.
UNSEEN_ARTISTS = ("noto-v1", "fluent-flat")
LEAST_ARTISTS = 3
# Redrawing takes the last few of the steps, in which a thing remains what and where it is. For hybrids it takes fewer,
# because in more steps the denoiser would turn a hybrid into one of its things.
REDRAW_STEPS, REDRAWN_STEPS, REDRAWN_STEPS_OF_HYBRIDS = 12, (4, 8), (2, 3)
# Least share of the pixels of a generated image of a single thing that must show the thing's noun.
LEAST_SHOWN = 0.04
UNFINISHED = 255  # in `Examples.nouns`: an image in which nothing can be recognized
PART = 1_000  # scenes that one process composes at a time
# Smallest and largest number of steps, out of `REDRAW_STEPS`, after which nothing can be recognized in an image yet.
UNFINISHED_STEPS = (2, 4)
# Weight of the loss on labeled images beside that on composed scenes; it was chosen, not measured.
LABELED_WEIGHT = 0.5
FIRST_SEED_DRAWN = 1_000_000  # of generated examples: far from the seeds that people and benchmarks use


@dataclass(frozen=True)
class Examples:
    """Images with their ground truth, for training or testing the judge.

    The images are composed or generated. Generated images show a single thing, or are unfinished. In an unfinished
    image nothing can be recognized, because generation was stopped after the first few steps.

    Attributes
    ----------
    images : ndarray, uint8, (n, size, size, 3)
    classes : ndarray, uint8, (n, size, size)
        Class of each pixel: 0 for the background, 1 + index of the noun in ``NOUNS`` for a thing, ``UNCERTAIN`` where
        the class is not known. In composed images, the class is not known in unrecognizable shapes, and where a hybrid
        shows two things about equally. In generated images, the class is not known at any pixel.
    mixed : ndarray, bool, (n, size, size)
        True for the pixels of a composed hybrid; all False in generated images.
    spoiled : ndarray, bool, (n, size, size)
        True for the pixels of a composed unrecognizable shape; all False in generated images.
    captions : list of str
        Caption of each image. The caption is "" for unfinished images, and for composed images with an unrecognizable
        shape or without any thing.
    nouns : ndarray, uint8, (n,)
        Kind of each image: 0 for a composed image, ``UNFINISHED`` for an unfinished image. For a generated image of a
        single thing, the value is 1 + index of the noun in ``NOUNS``.
    """

    images: np.ndarray
    classes: np.ndarray
    mixed: np.ndarray
    spoiled: np.ndarray
    captions: list[str]
    nouns: np.ndarray


def unseen(drawing: Drawing) -> bool:
    """True if a drawing is kept out of the training of the judge, so that the judge can be tested with this drawing.

    If at least ``LEAST_ARTISTS`` artists drew a noun, the drawings of the noun by one artist are kept out. This artist
    is the first of ``UNSEEN_ARTISTS`` who drew the noun. For other nouns, no drawing is kept out.

    Examples
    --------
    >>> UNSEEN_ARTISTS, LEAST_ARTISTS
    (('noto-v1', 'fluent-flat'), 3)

    Four artists drew a crown. The drawing by noto-v1, the first of ``UNSEEN_ARTISTS``, is kept out:

    >>> {d.artist: unseen(d) for d in drawings("crown")}
    {'noto': False, 'noto-v1': True, 'fluent-flat': False, 'fluent-3d': False}

    Only one artist drew a bench:

    >>> {d.artist: unseen(d) for d in drawings("bench")}
    {'own': False}
    """
    artists = {d.artist for d in drawings(drawing.noun)}
    first = next((artist for artist in UNSEEN_ARTISTS if artist in artists), None)
    return len(artists) >= LEAST_ARTISTS and drawing.artist == first


def judges_world(world: World) -> World:
    """Settings of the judge's training scenes, derived from `world`, the settings of the denoiser's scenes.

    The judge's scenes may show every pair of nouns. The scenes use all drawings, except the drawings for which `unseen`
    is True. Unusual colors are more frequent than in the denoiser's scenes.
    """
    wide = replace(
        world,
        artists=ARTISTS,
        views=World.views,
        most_drawings=World.most_drawings,
        mirrored=World.mirrored,
        entities=(0.35, 0.35, 0.2, 0.1),
        held_out=0.0,
        natural=0.15,
    )
    return wide.without(unseen)


def compose_examples(config: Config, seed: int | tuple[int, ...], count: int | None = None) -> Examples:
    """Compose scenes, hybrids, occluded things, unrecognizable shapes and empty scenes, in the configured shares.

    Parameters
    ----------
    config : Config
    seed : int or tuple of int
    count : int, optional
        Number of images; by default ``config.judge.scenes``.

    Returns
    -------
    Examples
    """
    settings, rng = config.judge, np.random.default_rng(seed)
    world, count, size = judges_world(config.world), count or config.judge.scenes, config.world.size
    images = np.empty((count, size, size, 3), np.uint8)
    classes, (mixed, spoiled) = np.zeros((count, size, size), np.uint8), np.zeros((2, count, size, size), bool)
    captions = []
    for i in tqdm(range(count), desc="examples", unit="scene", mininterval=5):
        draw = rng.random()
        if draw < settings.mixtures + settings.occluded:
            mixture = sample_mixture(world, rng, KINDS if draw < settings.mixtures else ("occluded",))
            numbers = np.full(256, UNCERTAIN, np.uint8)
            numbers[: 1 + len(mixture.subjects)] = [0, *(1 + NOUNS.index(s.noun) for s in mixture.subjects)]
            images[i], classes[i], mixed[i] = mixture.image, numbers[mixture.owner], mixture.mixed
            captions.append(caption(mixture.subjects))
        elif draw < settings.mixtures + settings.occluded + settings.spoiled:
            ruined = sample_spoiled(world, rng)
            images[i], spoiled[i] = ruined.image, ruined.spoiled
            classes[i][ruined.spoiled] = UNCERTAIN
            if ruined.clean.any():
                classes[i][ruined.clean] = 1 + NOUNS.index(ruined.nouns[1])
            captions.append("")
        elif draw > 1 - settings.empty:
            images[i] = np.rint(background(world.backgrounds, [], size, rng)[0] * 255)
            captions.append("")
        else:
            scene = sample(world, rng)
            images[i] = scene.image
            captions.append(scene.caption)
            for entity in scene.entities:
                classes[i][entity.mask] = 1 + NOUNS.index(entity.subject.noun)
    return Examples(images, classes, mixed, spoiled, captions, np.zeros(count, np.uint8))


def prepare_examples(config: Config, folder: Path, device: torch.device, workers: int = 0) -> Examples:
    """Training examples of the judge: composed images and generated images.

    Some of the composed images are passed through the autoencoder or the denoiser. All examples are kept in
    ``folder/judge-examples.npz``. A resumed training reads the examples from this file. If this file was made with
    other settings, it is replaced. `workers` processes compose the scenes in parts. If `workers` is 0, this process
    composes the scenes.
    """
    path, settings = folder / "judge-examples.npz", config.judge
    made_with = repr(
        (config.world, replace(settings, samples=0, learning_rate=0, channels=(), labels=(), labeled=0), PART)
    )
    if path.exists():
        with np.load(path) as kept:
            if str(kept["made_with"]) == made_with:
                captions = [str(text) for text in kept["captions"]]
                return Examples(
                    kept["images"], kept["classes"], kept["mixed"], kept["spoiled"], captions, kept["nouns"]
                )
    sizes = [min(PART, settings.scenes - start) for start in range(0, settings.scenes, PART)]
    parts = in_order(compose_examples, [(config, (3, i), size) for i, size in enumerate(sizes)], workers)
    examples = _joined(*parts)
    vae = AutoencoderTiny.from_pretrained(folder / "vae").to(device).eval()
    draw = np.random.default_rng(5).random(len(examples.images))
    for rows in _batches(np.flatnonzero(draw < settings.rebuilt), "rebuild"):
        examples.images[rows] = rebuild(examples.images[rows], vae, device)
    pipe = StableDiffusionPipeline.from_pretrained(folder / "model", dtype=torch.float32).to(device)
    # the denoiser would make something of a spoiled drawing
    again, hybrid = (draw > 1 - settings.redrawn) & ~examples.spoiled.any((1, 2)), examples.mixed.any((1, 2))
    for chosen, steps in ((again & ~hybrid, REDRAWN_STEPS), (again & hybrid, REDRAWN_STEPS_OF_HYBRIDS)):
        for rows in _batches(np.flatnonzero(chosen), "redraw"):
            captions = [examples.captions[row] for row in rows]
            examples.images[rows] = redraw(examples.images[rows], captions, pipe, steps, seed=int(rows[0]))
    examples = _joined(examples, draw_singles(pipe, settings.drawn))
    examples = _joined(examples, draw_unfinished(pipe, settings.unfinished))
    with replace_file(path) as part:
        np.savez(part, made_with=made_with, **vars(examples))
    return examples


def draw_singles(pipe: StableDiffusionPipeline, count: int, steps: int = REDRAW_STEPS) -> Examples:
    """Generated images of single things, as examples of imperfect things that are not hybrids.

    The location of the thing in the image is unknown. Each image is assumed to show the thing of its caption and no
    other; an earlier judge confirmed this for 99.5% of such images.

    Parameters
    ----------
    pipe : StableDiffusionPipeline
    count : int
        Number of images.
    steps : int
        Number of denoising steps.

    Returns
    -------
    Examples
    """
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    images, nouns, captions = np.empty((count, size, size, 3), np.uint8), np.empty(count, np.uint8), []
    rng = np.random.default_rng(7)
    pipe.set_progress_bar_config(disable=True)
    for rows in _batches(np.arange(count), "draw"):
        nouns[rows] = 1 + rng.integers(len(NOUNS), size=len(rows))
        colors = rng.integers(-1, len(COLORS), size=len(rows))
        texts = [
            f"a {NOUNS[n - 1]}" if c < 0 else f"a {COLORS[c]} {NOUNS[n - 1]}"
            for n, c in zip(nouns[rows], colors, strict=True)
        ]
        generators = [torch.Generator().manual_seed(FIRST_SEED_DRAWN + int(row)) for row in rows]
        scale = EMBEDDED["picture-world"].guidance_scale
        drawn = pipe(texts, num_inference_steps=steps, guidance_scale=scale, generator=generators, output_type="np")
        images[rows] = np.rint(drawn.images * 255)
        captions += texts
    classes = np.full((count, size, size), UNCERTAIN, np.uint8)
    nothing = np.zeros((count, size, size), bool)
    return Examples(images, classes, nothing, nothing, captions, nouns)


@torch.no_grad()
def draw_unfinished(pipe: StableDiffusionPipeline, count: int) -> Examples:
    """Generate unrecognizable images by stopping after the first few denoising steps.

    Only the first few of ``REDRAW_STEPS`` denoising steps are done. For each batch of 64 images, the number of these
    steps is sampled. ``UNFINISHED_STEPS`` has the smallest and the largest number. At the step at which generation
    stops, the denoiser predicts noise-free latents. The image is decoded from the predicted latents.

    Parameters
    ----------
    pipe : StableDiffusionPipeline
    count : int
        Number of images.

    Returns
    -------
    Examples
    """
    size, device = pipe.unet.config.sample_size * pipe.vae_scale_factor, pipe.unet.device
    images, rng = np.empty((count, size, size, 3), np.uint8), np.random.default_rng(8)
    for rows in _batches(np.arange(count), "unfinished"):
        captions = [f"a {COLORS[rng.integers(len(COLORS))]} {NOUNS[rng.integers(len(NOUNS))]}" for _ in rows]
        tokens = pipe.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids.to(device)
        pipe.scheduler.set_timesteps(REDRAW_STEPS)
        generator = torch.Generator().manual_seed(FIRST_SEED_DRAWN + int(rows[0]))
        shape = (len(rows), pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2)
        with autocast(device):
            states = pipe.text_encoder(tokens).last_hidden_state
            latents = torch.randn(shape, generator=generator).to(device)
            for timestep in pipe.scheduler.timesteps[: int(rng.integers(*UNFINISHED_STEPS, endpoint=True))]:
                step = pipe.scheduler.step(pipe.unet(latents, timestep, states).sample.float(), timestep, latents)
                latents = step.prev_sample
            images[rows] = _pixels(pipe.vae.decode(step.pred_original_sample / pipe.vae.config.scaling_factor).sample)
    classes, nothing = np.full((count, size, size), UNCERTAIN, np.uint8), np.zeros((count, size, size), bool)
    return Examples(images, classes, nothing, nothing, [""] * count, np.full(count, UNFINISHED, np.uint8))


def _joined(*parts: Examples) -> Examples:
    arrays = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("images", "classes", "mixed", "spoiled", "nouns")
    }
    return Examples(captions=[text for part in parts for text in part.captions], **arrays)


@torch.no_grad()
def grow(model: Segmenter, old: dict[str, Tensor]) -> None:
    """Copy the weights of an earlier judge to a new judge, whose last layer may have more outputs.

    The weights of additional outputs are set to zero.

    Parameters
    ----------
    model : Segmenter
        New judge, which is changed in place.
    old : dict of str to Tensor
        Weights of the earlier judge. Both judges have the same numbers of channels.

    Raises
    ------
    SettingError
        The numbers of channels differ, weights are missing, or the earlier judge has more outputs.
    """
    for name, value in model.state_dict().items():
        given = old.get(name)
        fewer = given is not None and name.startswith("head.") and len(given) <= len(value)
        if given is None or (given.shape != value.shape and not fewer):
            found = "is missing" if given is None else f"has shape {tuple(given.shape)}, not {tuple(value.shape)}"
            raise SettingError(
                f"The earlier judge does not fit: {name} {found}. Use the same [judge] channels, or train without "
                "--start."
            )
        if given.shape != value.shape:
            value.zero_()
        value[tuple(slice(0, n) for n in given.shape)] = given


def train_judge(
    config: Config, folder: Path, device: torch.device, start: Path | None = None, workers: int = 0
) -> Segmenter:
    """Train the judge and save it to ``folder/judge/model.safetensors`` (fp16).

    Parameters
    ----------
    config : Config
    folder : Path
        Folder that contains the trained autoencoder in ``vae/`` and the trained pipeline in ``model/``.
    device : torch.device
    start : Path, optional
        Folder of an earlier model. The training starts from the weights of the judge in the subfolder ``judge/``.
    workers : int
        Number of processes that compose scenes. If `workers` is 0, this process composes the scenes.

    Returns
    -------
    Segmenter
        Judge with the moving average of the weights.

    Raises
    ------
    SettingError
        The weights of `start` do not fit the configuration, or a checkpoint was trained with a different number of
        images per step than `config` sets.
    """
    settings = config.judge
    examples = prepare_examples(config, folder, device, workers)
    folders = [data_path(*name.split("/")) for name in settings.labels]
    labeled = read_labeled(folders, config.world.size) if folders else None
    torch.manual_seed(1)
    model = Segmenter(settings.channels)
    if start is not None:
        grow(model, load_file(start / "judge" / "model.safetensors"))
    model.to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((4, step))
        rows = rng.integers(len(examples.images), size=settings.batch)
        images = torch.from_numpy(examples.images[rows]).permute(0, 3, 1, 2).float() / 127.5 - 1
        target = torch.from_numpy(examples.classes[rows])
        marks = torch.from_numpy(np.stack([examples.mixed[rows], examples.spoiled[rows]], 1))
        images, target, marks = _move(_disturb(_restyle(images, target)), target, marks)
        # the loss is taken where the network computes, at half resolution: a pixel of every 2 x 2, another each time
        y, x = rng.integers(2, size=2)
        target, marks = target[:, y::2, x::2].to(device), marks[..., y::2, x::2].to(device)
        if labeled is not None:
            by_eye = labeled.rows(torch.from_numpy(rng.integers(len(labeled), size=settings.labeled)))
            images = torch.cat([images, _moved_alone(by_eye.images)])
        images = images.to(device, memory_format=torch.channels_last)
        with autocast(device):
            scores = model.halved(images)
        scores, on_labeled = scores.float().split([settings.batch, len(images) - settings.batch])
        nouns = torch.from_numpy(examples.nouns[rows]).long().to(device)
        classes, things = F.cross_entropy(scores[:, :CLASSES], target, ignore_index=UNCERTAIN), (target > 0).float()
        unknown = torch.zeros(len(nouns), dtype=torch.bool, device=device)
        if len(drawn := ((nouns > 0) & (nouns < UNFINISHED)).nonzero()[:, 0]):
            alone, shown = _alone(scores[drawn, :CLASSES], nouns[drawn])
            classes = classes + len(drawn) / settings.batch * alone
            things[drawn] = shown
            unknown[drawn] = True  # whether these are recognizable is not known
        if len(early := (nouns == UNFINISHED).nonzero()[:, 0]):
            things[early] = 1 - scores[early, :CLASSES].detach().softmax(1)[:, 0]
            marks[early, 1] = 1
        wrong = F.binary_cross_entropy_with_logits(scores[:, CLASSES:], marks, reduction="none")
        wrong[:, 1][unknown] = 0
        wrong[:, 0][marks[:, 1] > 0] = 0  # whether an unrecognizable shape is a hybrid is no question
        total = classes + 0.3 * (wrong * things[:, None]).sum() / things.sum().clamp(min=1)
        return total if labeled is None else total + LABELED_WEIGHT * labeled_loss(on_labeled, by_eye.to(device))

    schedule = Schedule(settings.samples, settings.batch, settings.learning_rate, average=0.998)
    model = train(model, loss, schedule, folder, "judge")
    (folder / "judge").mkdir(exist_ok=True)
    save_file(
        {name: value.half().contiguous() for name, value in model.state_dict().items()},
        folder / "judge" / "model.safetensors",
    )
    return model


def _moved_alone(images: Tensor) -> Tensor:
    """Mirror labeled images at random, and then change them with `_disturb` and `_move`, like composed images.

    `images` is uint8, (n, 3, h, w). The result is float32 of the same shape, mostly in [-1, 1].
    """
    n, _, height, width = images.shape
    nothing = torch.zeros(n, height, width, dtype=torch.long)
    flipped = torch.where(torch.rand(n, 1, 1, 1) < 0.5, images.flip(-1), images)
    return _move(_disturb(flipped.float() / 127.5 - 1), nothing, nothing[:, None])[0]


def _alone(scores: Tensor, nouns: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of k generated images of single things, and the probability of the thing's noun at each pixel, (k, h, w).

    The loss is low under two conditions. First, every pixel is classified as background or as the noun. Second, the
    pixels at which the noun is most probable are classified as the noun. These pixels are a share ``LEAST_SHOWN`` of
    the image. `scores` are logits of the classes, (k, 25, h, w). `nouns` are the classes of the nouns, (k,).
    """
    log = scores.log_softmax(1)
    of_noun = log[torch.arange(len(nouns)), nouns]
    surest = of_noun.flatten(1).topk(int(LEAST_SHOWN * of_noun[0].numel()), 1).values
    return -torch.logaddexp(log[:, 0], of_noun).mean() - 0.3 * surest.mean(), of_noun.detach().exp()


def rebuild(images: np.ndarray, vae: Any, device: torch.device) -> np.ndarray:
    """Images passed through the autoencoder, uint8, (n, size, size, 3)."""
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).float().to(device) / 127.5 - 1
    with torch.no_grad(), autocast(device):
        decoded = vae.decode(vae.encode(batch).latents).sample
    return _pixels(decoded)


def _pixels(decoded: Tensor) -> np.ndarray:
    """Convert decoded images in [-1, 1], (n, 3, size, size), to uint8, (n, size, size, 3)."""
    return ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def redraw(
    images: np.ndarray, captions: list[str], pipe: StableDiffusionPipeline, steps: tuple[int, int], seed: int
) -> np.ndarray:
    """Add noise to images, and remove the noise with the last few denoising steps.

    Because only the last few steps are done, things stay at their locations.

    Parameters
    ----------
    images : ndarray, uint8, (n, size, size, 3)
    captions : list of str
    pipe : StableDiffusionPipeline
    steps : tuple of int
        Smallest and largest number of steps to do. The number is sampled from this range, both ends included, and is
        the same for all images. Generation would take ``REDRAW_STEPS`` steps, and the last of these steps are done.
    seed : int

    Returns
    -------
    ndarray, uint8, (n, size, size, 3)
        Denoised images.
    """
    device, rng = pipe.unet.device, np.random.default_rng((6, seed))
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).float().to(device) / 127.5 - 1
    tokens = pipe.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids.to(device)
    pipe.scheduler.set_timesteps(REDRAW_STEPS)
    timesteps = pipe.scheduler.timesteps[-int(rng.integers(*steps, endpoint=True)) :]
    with autocast(device):
        latents = pipe.vae.encode(batch).latents * pipe.vae.config.scaling_factor
        states = pipe.text_encoder(tokens).last_hidden_state
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(device)
        latents = pipe.scheduler.add_noise(latents.float(), noise, timesteps[:1].expand(len(latents)))
        for timestep in timesteps:
            predicted = pipe.unet(latents, timestep, states).sample.float()
            latents = pipe.scheduler.step(predicted, timestep, latents).prev_sample
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return _pixels(decoded)


def _batches(rows: np.ndarray, what: str) -> Iterator[np.ndarray]:
    for start in tqdm(range(0, len(rows), 64), desc=what, unit="batch", mininterval=5):
        yield rows[start : start + 64]


def _restyle(images: Tensor, target: Tensor) -> Tensor:
    """Make some images look like the work of another artist: other hues, other tones, flat colors, dark outlines.

    `images` is float32, (n, 3, h, w), in [-1, 1]. `target` is the class of each pixel, (n, h, w). Outlines are added
    where the class changes. All other changes affect the whole image, background included.

    The judge should recognize things by their shape. Without these changes, the judge could rely on color, because
    animals mostly have their natural colors in training. The judge could also rely on style, because not every artist
    drew every noun.
    """
    n = len(images)

    def some(share: float) -> Tensor:
        return torch.rand(n, 1, 1, 1) < share

    gray = images.mean(1, keepdim=True)
    mixing = torch.eye(3) + 0.35 * torch.randn(n, 3, 3)
    mixing = mixing / mixing.sum(2, keepdim=True).clamp(min=0.5)  # grays stay nearly gray
    hued = torch.einsum("nij,njyx->niyx", mixing, images - gray) + gray
    images = torch.where(some(0.3), hued, images)
    images = torch.where(some(0.1), gray, images)
    curve = torch.exp(0.4 * torch.randn(n, 1, 1, 1))
    toned = ((images.clamp(-1, 1) + 1) / 2).pow(curve) * 2 - 1
    images = torch.where(some(0.3), toned, images)
    levels = torch.randint(3, 8, (n, 1, 1, 1)).float()
    images = torch.where(some(0.15), ((images + 1) / 2 * levels).round() / levels * 2 - 1, images)
    edge = torch.zeros_like(target, dtype=torch.bool)
    edge[:, 1:] |= target[:, 1:] != target[:, :-1]
    edge[:, :, 1:] |= target[:, :, 1:] != target[:, :, :-1]
    line = F.max_pool2d(edge[:, None].float(), 3, 1, 1)
    return torch.lerp(images, torch.full_like(images, -0.9), line * some(0.15) * torch.rand(n, 1, 1, 1))


def _disturb(images: Tensor) -> Tensor:
    """Add a little noise and blur, and change contrast and brightness a little, differently for each image."""
    n = len(images)
    blurred = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), 5, 1)
    amount = torch.rand(n, 1, 1, 1) * (torch.rand(n, 1, 1, 1) < 0.5)
    images = torch.lerp(images, blurred, amount)
    images = images * (1 + 0.15 * torch.randn(n, 1, 1, 1)) + 0.08 * torch.randn(n, 3, 1, 1)
    return images + 0.06 * torch.rand(n, 1, 1, 1) * torch.randn_like(images)


def _move(images: Tensor, target: Tensor, marks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn, stretch, shear and bend a random half of the images, together with their ground truth.

    The results imitate the shapes that other artists would draw. `target` is the class of each pixel, (n, h, w).
    `marks` is other ground truth per pixel, such as the masks of hybrids, (n, c, h, w).
    """
    n = len(images)
    moved = torch.rand(n) < 0.5
    angle = torch.randn(n) * 0.15
    stretch = 1 + 0.15 * torch.randn(n, 2)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(n, 2, 2)
    shear = torch.eye(2).repeat(n, 1, 1)
    shear[:, 0, 1] = torch.randn(n) * 0.15
    matrix = turn @ shear * stretch[:, None]
    matrix = torch.where(moved[:, None, None], matrix, torch.eye(2))
    grid = F.affine_grid(F.pad(matrix, (0, 1)), list(images.shape), align_corners=False)
    bend = F.interpolate(torch.randn(n, 2, 6, 6) * 0.04, size=images.shape[-2:], mode="bicubic", align_corners=False)
    grid = grid + (bend * moved[:, None, None, None]).permute(0, 2, 3, 1)
    # border padding smears things that are cut by the edge, and their truth in the same way
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    truth = torch.cat([target[:, None].float(), marks.float()], 1)
    truth = F.grid_sample(truth, grid, mode="nearest", padding_mode="border", align_corners=False)
    return images, truth[:, 0].long(), truth[:, 1:]
