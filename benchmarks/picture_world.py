"""The figures of the embedded model's card: ``python -m benchmarks.picture_world``."""

from __future__ import annotations

import time
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from tqdm.auto import tqdm

import elakit
from elakit.judge import judge
from elakit.judge.verdict import segment
from elakit.world.scenes import sample
from elakit.world.training.autoencoder import psnr
from elakit.world.training.config import read_config
from elakit.world.training.data import compose_scenes
from elakit.world.training.judge import rebuild
from elakit.world.vocabulary import COLOURS, NOUNS


def draw(pipe, prompts: list[str], seed: int, batch: int = 16) -> list[Image.Image]:
    pictures: list[Image.Image] = []
    for start in tqdm(range(0, len(prompts), batch), unit="batch", leave=False):
        part = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed) for _ in part]
        pictures += pipe(part, num_inference_steps=25, guidance_scale=4.0, generator=generators).images
    return pictures


def main(
    scenes: Annotated[int, typer.Option(help="Held-out scenes for autoencoder and judge.")] = 500,
    singles: Annotated[int, typer.Option(help="Prompts of one noun and at most one colour, of 288.")] = 96,
) -> None:
    """Measure autoencoder, judge and denoiser; ``python -m benchmarks.ela`` measures pairs."""
    pipe = elakit.load("picture-world")
    pipe.set_progress_bar_config(disable=True)
    world = read_config().world
    rng = np.random.default_rng(9_000_000)
    print(f"autoencoder PSNR: {psnr(pipe.vae, compose_scenes(world, 256, seed=1_000_001)):.1f} dB on 256 new scenes")
    right, colours = [], []
    for _ in range(scenes):
        scene = sample(world, rng)
        words = " and ".join(f"a [{entity.subject.words}]" for entity in scene.entities)
        verdict = judge(Image.fromarray(scene.image), elakit.parse(words, pipe))
        right.append(verdict.success)
        colours += [verdict.colours[e] == c for e, c in verdict.asked.items() if c and verdict.present[e]]
    print(f"judge on {scenes} new scenes: whole scene right {np.mean(right):.3f}, colour right {np.mean(colours):.3f}")
    data = compose_scenes(world, 3 * 128, seed=1_000_002)
    before, after = segment(data.pictures[::3]), segment(rebuild(data, pipe.vae, 128, torch.device("cpu")))
    same = [set(np.unique(a)[1:]) == set(np.unique(b)[1:]) for a, b in zip(before, after, strict=True)]
    print(f"judged classes the same after the autoencoder: {np.mean(same):.3f} of 128 scenes")
    every = [f"a {c} {n}" if c else f"a {n}" for n in NOUNS for c in (None, *COLOURS)]
    prompts = [every[i] for i in np.random.default_rng(0).permutation(len(every))[:singles]]
    verdicts = [
        judge(picture, elakit.parse(text, pipe)) for text, picture in zip(prompts, draw(pipe, prompts, 0), strict=True)
    ]
    there, success = ([f(v) for v in verdicts] for f in (lambda v: all(v.present.values()), lambda v: v.success))
    print(
        f"single entities: noun and colour right {np.mean(success):.3f}, noun right {np.mean(there):.3f} "
        f"({len(prompts)} of the {len(every)} combinations, seed 0)"
    )
    began = time.perf_counter()
    elakit.generate(pipe, "a cat and a lion", seed=0, progress=False)
    print(f"one recorded picture of 25 steps: {time.perf_counter() - began:.2f} s")


if __name__ == "__main__":
    typer.run(main)
