"""Blind comparison of two models by eye: images of the same prompts and noise, shuffled and labeled.

Two steps, with labels in between::

    python -m benchmarks.audit_models draw work/models data/picture-world work/picture-world/model
    (look at work/models/sheets, fill in work/models/labels.csv as for benchmarks.audit)
    python -m benchmarks.audit_models compare work/models

Sheets and label file do not show which model generated an image. Half of the prompts have one entity, half have two.

No model can generate things that are easier to name than those of the scenes it learns from. ``limit`` takes the place
of ``draw`` to measure this limit: its images are composed scenes (first), and the same scenes encoded and decoded by an
autoencoder (second).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderTiny
from PIL import Image
from tqdm.auto import tqdm

import elakit
from benchmarks.audit import chosen_prompts, save_image, single_prompts, write_sheets
from elakit.cli_options import one_line_errors, without_markup
from elakit.errors import SettingError
from elakit.files import write_file
from elakit.generation import generate
from elakit.judge.labels import Label, read_key, read_labels
from elakit.models import EMBEDDED
from elakit.statistics import mcnemar, wilson
from elakit.sweep import suite
from elakit.world.scenes import Subject, compose
from elakit.world.training.config import read_config

FIRST_SEED = 900
Draw = Callable[[str, int], Image.Image]  # image of a prompt and a seed
Folder = Annotated[Path, typer.Argument(help="Folder of the comparison.")]

app = typer.Typer(help=without_markup(__doc__), no_args_is_help=True)


Prompts = Annotated[int, typer.Option(min=1, help="Number of prompts with one entity, and of those with two.")]


@app.command()
def draw(
    folder: Folder,
    first: Annotated[Path, typer.Argument(help="Folder of a pipeline.")],
    second: Annotated[Path, typer.Argument(help="Folder of another pipeline.")],
    prompts: Prompts = 48,
) -> None:
    """Generate images with both models, number them in random order, and write sheets and an empty label file.

    After an interruption, the same command generates the missing images.
    """
    usual = EMBEDDED["picture-world"]
    options = {"steps": usual.steps, "guidance_scale": usual.guidance_scale}

    def images_of(source: Path) -> Draw:
        pipe = elakit.load(source)
        return lambda prompt, seed: generate(pipe, prompt, seed=seed, record=False, progress=False, **options).image

    sources = {"first": first.as_posix(), "second": second.as_posix()}  # as given, without the machine's folders
    _draw_mixed(folder, prompts, sources, {"first": lambda: images_of(first), "second": lambda: images_of(second)})


@app.command()
def limit(
    folder: Folder,
    vae: Annotated[Path, typer.Option(help="Folder of the autoencoder.")] = Path("data/picture-world/vae"),
    config: Annotated[Path | None, typer.Option(help="TOML file of a training. Default: the built-in model's.")] = None,
    prompts: Prompts = 48,
) -> None:
    """Compose a scene for each prompt, also encode and decode it, and write mixed sheets and an empty label file."""
    if not (vae / "config.json").is_file():
        raise SettingError(
            f"{vae} contains no autoencoder: there is no config.json. Give the folder of one with --vae."
        )
    world, pipe = read_config(config).world, elakit.load("picture-world")

    def composed(prompt: str, seed: int) -> Image.Image:
        entities = elakit.parse(prompt, pipe).entities
        subjects = tuple(Subject(entity.noun, next(iter(entity.attributes), None)) for entity in entities)
        return Image.fromarray(compose(subjects, world, np.random.default_rng(seed)).image)

    def rebuilt_by(model: AutoencoderTiny) -> Draw:
        def rebuilt(prompt: str, seed: int) -> Image.Image:
            pixels = torch.from_numpy(np.array(composed(prompt, seed))).permute(2, 0, 1)[None] / 127.5 - 1
            with torch.no_grad():
                seen = model.decode(model.encode(pixels).latents).sample[0].clamp(-1, 1)
            return Image.fromarray(((seen.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())

        return rebuilt

    sources = {"first": "scenes", "second": vae.as_posix()}
    makers = {"first": lambda: composed, "second": lambda: rebuilt_by(AutoencoderTiny.from_pretrained(vae).eval())}
    _draw_mixed(folder, prompts, sources, makers)


def _draw_mixed(folder: Path, count: int, sources: dict[str, str], makers: dict[str, Callable[[], Draw]]) -> None:
    """Make two images per prompt and write them in random order; existing images are kept."""
    if (folder / "labels.csv").exists():
        raise SettingError(f"{folder} already contains labels. Choose another folder, or move labels.csv away.")
    asked = [
        *chosen_prompts(single_prompts(), count, FIRST_SEED),
        *chosen_prompts(suite("attend-and-excite"), count, FIRST_SEED),
    ]
    pairs = [(prompt, seed, model) for prompt, seed in asked for model in ("first", "second")]
    jobs = [pairs[i] for i in np.random.default_rng(FIRST_SEED).permutation(len(pairs))]
    key = {
        str(n): {"prompt": prompt, "seed": seed, "model": model, "source": sources[model]}
        for n, (prompt, seed, model) in enumerate(jobs, 1)
    }
    if (folder / "key.json").exists() and json.loads((folder / "key.json").read_text(encoding="utf-8")) != key:
        raise SettingError(f"{folder} holds images of another comparison. Choose another folder, or delete this one.")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    write_file(folder / "key.json", json.dumps(key, indent=1).encode())
    paths = [folder / "images" / f"{number:04d}.png" for number in range(1, len(jobs) + 1)]
    for name, maker in makers.items():
        make = maker()
        chosen = [
            (path, prompt, seed) for path, (prompt, seed, model) in zip(paths, jobs, strict=True) if model == name
        ]
        for path, prompt, seed in tqdm(chosen, desc=name, unit="image"):
            if not path.exists():
                save_image(make(prompt, seed), path)
    write_sheets(folder, [prompt for prompt, _, _ in jobs], paths)
    print(f"{len(jobs)} images in {folder}. Look at {folder / 'sheets'} and fill in {folder / 'labels.csv'}.")


@app.command()
def compare(folder: Folder) -> None:
    """Print how many things are nameable and how many images are right with each model, and test the differences."""
    key = read_key(folder / "key.json", ("seed", "model"), "Run `draw` first.")
    labels = read_labels(folder / "labels.csv")
    if unknown := set(labels) - set(key):
        raise SettingError(
            f"The labels name images that are not in {folder}: {sorted(unknown)[:5]}. Give the folder of these labels."
        )
    seen: dict[tuple[str, int], dict[str, Label]] = {}
    for number, label in labels.items():
        made = key[number]
        seen.setdefault((made["prompt"], made["seed"]), {})[made["model"]] = label
    both = [pair for pair in seen.values() if len(pair) == 2]
    if not both:
        raise SettingError(f"No prompt is labeled for both models yet. Fill in {folder / 'labels.csv'}.")
    print("| what | first | second | only first | only second | p (McNemar) |\n|---|---|---|---|---|---|")
    singles = [pair for pair in both if len(pair["first"].nameable) == 1]
    others = [pair for pair in both if len(pair["first"].nameable) == 2]
    _row("one entity: nameable", [[one[m].nameable[0] for m in ("first", "second")] for one in singles])
    _row("one entity: image right", [[one[m].right for m in ("first", "second")] for one in singles])
    entities = [[one[m].nameable[i] for m in ("first", "second")] for one in others for i in (0, 1)]
    _row("two entities: each nameable", entities)
    _row("two entities: image right", [[one[m].right for m in ("first", "second")] for one in others])


def _row(what: str, outcomes: list[list[bool]]) -> None:
    """Print a row: the share of successes of each model with its interval, and how often only one model succeeds."""
    if not outcomes:
        return
    table = np.array(outcomes)
    shares = []
    for column in table.T:
        low, high = wilson(int(column.sum()), len(column))
        shares.append(f"{column.mean():.3f} ({low:.3f} to {high:.3f}, n = {len(column)})")
    only = [int((table[:, i] & ~table[:, 1 - i]).sum()) for i in (0, 1)]
    print(f"| {what} | {' | '.join(shares)} | {only[0]} | {only[1]} | {mcnemar(*only):.3f} |")


if __name__ == "__main__":
    with one_line_errors("benchmarks.audit_models"):
        app()
