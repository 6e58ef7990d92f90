"""Numbers in the card of picture-world: ``python -m benchmarks.picture_world all``, or one of its parts.

The parts print rows of a Markdown table, with 95% Wilson intervals of shares; ``sheet`` and ``scenes`` write an image.
Verdicts on generated images are kept in ``work/benchmarks``, so that an interrupted part is resumed; ``--fresh``
generates all images again.
"""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import AutoencoderTiny
from PIL import Image
from scipy.stats import binomtest
from tqdm.auto import tqdm

import elakit
from elakit.cli_options import one_line_errors, without_markup
from elakit.judge import FAILURES, Verdict, judge
from elakit.judge.segmenter import LEAST_AREA, find_things, segment
from elakit.measures.agreement import agreement_iou
from elakit.measures.masks import downscale
from elakit.models import EMBEDDED
from elakit.resources import data_path
from elakit.sweep import suite
from elakit.sweep import table as bench_table
from elakit.world.mixtures import KINDS, sample_mixture
from elakit.world.scenes import Scene, World, sample
from elakit.world.spoiled import KINDS as SPOILED
from elakit.world.spoiled import sample_spoiled
from elakit.world.training.config import read_config
from elakit.world.training.judge import judges_world, rebuild, unseen
from elakit.world.vocabulary import COLORS, NOUNS

PARTS = ("vae", "judge", "singles", "pairs", "layout", "three", "words", "attention", "cost", "sheet")
SEEDS = 4
BATCH = 12
# Shares of test scenes with one, two and three things. They do not follow the settings of the training scenes.
SHARES = (0.6, 0.3, 0.1)
STEPS, GUIDANCE_SCALE = EMBEDDED["picture-world"].steps, EMBEDDED["picture-world"].guidance_scale
Out = Annotated[Path, typer.Option(help="Folder for verdicts and the contact sheet.")]
Scale = Annotated[float, typer.Option(help="Classifier-free guidance scale.")]
Every = Annotated[int, typer.Option(help="Use only every n-th prompt.")]
Seeds = Annotated[int, typer.Option(help="Number of seeds, starting at 0.")]
Fresh = Annotated[bool, typer.Option(help="Generate all images again.")]
Scenes = Annotated[int, typer.Option(help="Number of composed scenes per test.")]

app = typer.Typer(help=without_markup(__doc__), no_args_is_help=True)


def show(what: str, hits: Any, bar: str = "") -> None:
    """Print a row of the table: the share of true values in `hits`, its interval, and the share to reach, `bar`."""
    hits = np.asarray(hits, bool)
    low, high = binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    print(f"| {what} | {hits.mean():.3f} ({low:.3f} to {high:.3f}, n = {len(hits)}) | {bar} |", flush=True)


def test_world() -> World:
    """World of the test scenes: that of picture-world, with the shares of scenes in `SHARES`."""
    return replace(read_config().world, entities=SHARES)


def right(scene: Scene, image: Image.Image, pipe: Any) -> tuple[bool, list[tuple[str | None, str | None]]]:
    """Return True if the judge finds exactly the entities of a scene in their colors; and pairs of colors.

    There is one pair (requested, found) for each entity that has a color and is found.
    """
    verdict = judge(image, elakit.parse(" and ".join(f"a [{e.subject.words}]" for e in scene.entities), pipe))
    colors = [(c, verdict.colors[e]) for e, c in verdict.asked.items() if c and verdict.present[e]]
    return verdict.success and not verdict.extra, colors


def of_judge(scenes: list[Scene], pipe: Any) -> tuple[list[bool], list[bool]]:
    seen = [right(scene, Image.fromarray(scene.image), pipe) for scene in tqdm(scenes, leave=False)]
    return [r for r, _ in seen], [asked == got for _, colors in seen for asked, got in colors]


@app.command()
def vae(
    scenes: Scenes = 200,
    folder: Annotated[Path | None, typer.Option(help="Autoencoder to measure. Default: the built-in one.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="Second autoencoder, which is measured on the same crops.")
    ] = None,
    out: Out = Path("work/benchmarks"),
) -> None:
    """Measure the autoencoder: PSNR of crops around things, and whether the judge finds the same classes after it.

    Crops show things whose longer side is 25 to 50% of the scene's; a sheet of crops is written, too.
    """
    shipped = data_path("picture-world", "vae")
    paths = {"autoencoder": folder or shipped} | ({"compared": against} if against else {})
    models = {name: AutoencoderTiny.from_pretrained(path).eval() for name, path in paths.items()}
    world = replace(test_world(), entities=(0.0, 0.5, 0.3, 0.2))
    rng = np.random.default_rng(1_000_002)
    composed = [sample(world, rng) for _ in range(scenes)]
    images = np.stack([scene.image for scene in composed])
    crops = [(i, e.box) for i, scene in enumerate(composed) for e in scene.entities if _medium(e.box, world.size)]
    rebuilt, values = {}, {}
    for name, model in models.items():
        parts = [rebuild(images[i : i + 32], model, torch.device("cpu")) for i in range(0, scenes, 32)]
        rebuilt[name] = np.concatenate(parts)
        values[name] = np.array([_psnr(images[i], rebuilt[name][i], box) for i, box in crops])
        what = f"{name}: PSNR on {len(crops)} crops of things at 25 to 50% of the side"
        print(f"| {what} | {values[name].mean():.2f} dB | |", flush=True)
    if against:
        gain = values["autoencoder"] - values["compared"]
        resampled = gain[np.random.default_rng(0).integers(len(gain), size=(2000, len(gain)))].mean(1)
        low, high = np.quantile(resampled, [0.025, 0.975])
        print(f"| autoencoder: gain on the same crops | {gain.mean():.2f} dB ({low:.2f} to {high:.2f}) | >= 3 dB |")
    out.mkdir(parents=True, exist_ok=True)
    _strip([images, *reversed(rebuilt.values())], crops[:: max(1, len(crops) // 48)]).save(out / "autoencoder.png")
    same = []
    for start in range(0, scenes, 50):
        before, after = segment(images[start : start + 50]).classes, segment(rebuilt["autoencoder"][start : start + 50])
        same += [_classes(a) == _classes(b) for a, b in zip(before, after.classes, strict=True)]
    show("autoencoder: judged classes the same after it", same, ">= .98")


def _medium(box: tuple[int, int, int, int], size: int) -> bool:
    return 0.25 <= max(box[2] - box[0], box[3] - box[1]) / size <= 0.5


def _psnr(image: np.ndarray, other: np.ndarray, box: tuple[int, int, int, int], margin: int = 2) -> float:
    left, top, right, bottom = (
        max(0, value + d) for value, d in zip(box, (-margin, -margin, margin, margin), strict=True)
    )
    difference = (image.astype(float) - other)[top:bottom, left:right] / 255
    return float(-10 * np.log10(max(1e-9, (difference**2).mean())))


def _strip(rows: list[np.ndarray], crops: list[tuple[int, tuple[int, int, int, int]]], side: int = 112) -> Image.Image:
    """Crops, twelve in a line: the original above, its reconstructions below it."""
    lines, height = -(-len(crops) // 12), len(rows) * side + 8
    page = Image.new("RGB", (12 * side, lines * height), "white")
    for k, (i, (left, top, right, bottom)) in enumerate(crops):
        half = max(right - left, bottom - top) // 2 + 2
        x, y = (left + right) // 2, (top + bottom) // 2
        for r, images in enumerate(rows):
            crop = Image.fromarray(images[i]).crop((x - half, y - half, x + half, y + half))
            page.paste(
                crop.resize((side, side), Image.Resampling.BICUBIC), (k % 12 * side, k // 12 * height + r * side)
            )
    return page


def _classes(seen: np.ndarray) -> set[int]:
    return {int(c) for c in np.unique(seen) if c and (seen == c).mean() >= LEAST_AREA}


@app.command("judge")
def judge_(scenes: Scenes = 1000) -> None:
    """Measure the judge: entities and colors in new scenes and by unseen artists, hybrids, unrecognizable shapes."""
    pipe, world = elakit.load("picture-world"), test_world()
    rng = np.random.default_rng(9_000_000)
    whole, colors = of_judge([sample(world, rng) for _ in range(scenes)], pipe)
    show("judge: picture-world's scenes, all entities right", whole, ">= .97")
    show("judge: color right on these", colors, ">= .97")
    shares = replace(world, artists=World().artists)
    known = shares.without(unseen)
    whole, colors = of_judge([sample(known, rng) for _ in range(scenes)], pipe)
    show("judge: scenes of all artists it learned from, all entities right", whole, ">= .97")
    show("judge: color right on these", colors, ">= .97")
    tested = [noun for noun in NOUNS if any(unseen(d) for d in shares.drawings(noun))]
    strange = shares.without(lambda drawing: not unseen(drawing))
    new = (sample(strange, rng) for _ in itertools.count())
    new = list(itertools.islice((s for s in new if all(e.subject.noun in tested for e in s.entities)), scenes))
    whole, colors = of_judge(new, pipe)
    show(f"judge: artist it never saw ({len(tested)} nouns), all entities right", whole, ">= .91")
    wide = judges_world(world)
    told: dict[str, list[bool]] = {}
    for i in tqdm(range(scenes), leave=False):
        mixture = sample_mixture(wide, rng, (KINDS[i % len(KINDS)],))
        told.setdefault(mixture.kind, []).append(_mixed(mixture.image))
    pairs = replace(wide, entities=(0.0, 1.0, 0.0)).without(unseen)
    apart = [not _mixed(sample(pairs, rng).image) for _ in tqdm(range(scenes // 2), leave=False)]
    behind = [not _mixed(sample_mixture(wide, rng, ("occluded",)).image) for _ in tqdm(range(scenes // 2), leave=False)]
    hits = [hit for row in told.values() for hit in row]
    show("judge: hybrids told from pairs (all of the following)", [*hits, *apart, *behind], ">= .95")
    for kind, row in told.items():
        show(f"judge: hybrids seen as such, {kind}", row)
    show("judge: pairs side by side seen as pairs", apart)
    show("judge: pairs partly behind each other seen as pairs", behind)
    ruined = [sample_spoiled(wide, rng, (SPOILED[i % len(SPOILED)],)) for i in tqdm(range(scenes // 2), leave=False)]
    for kind in SPOILED:
        show(f"judge: {kind} shapes not named", [not _named(r.image, r.spoiled) for r in ruined if r.kind == kind])
    show("judge: clean things beside them named", [_named(r.image, r.clean) for r in ruined if r.clean.any()])


def _named(image: np.ndarray, mask: np.ndarray) -> bool:
    """True if recognizable things cover at least half of the mask."""
    found = [thing.mask for thing in find_things(Image.fromarray(image)) if thing.recognizable]
    return bool(found) and bool(np.any(found, 0)[mask].mean() >= 0.5)


def _mixed(image: np.ndarray) -> bool:
    return any(thing.mixed_with for thing in find_things(Image.fromarray(image)))


def benchmark_prompts() -> list[str]:
    table = json.loads(data_path("prompts", "attend_and_excite.json").read_text(encoding="utf-8"))
    return [prompt for group in table.values() for prompt in group]


def single_prompts() -> list[str]:
    return [f"a {c} {n}" if c else f"a {n}" for n in NOUNS for c in (None, *COLORS)]


def verdicts(
    name: str,
    prompts: list[str],
    seeds: range,
    out: Path,
    fresh: bool,
    neutral: bool = False,
    scale: float = GUIDANCE_SCALE,
) -> list[dict]:
    """Verdicts on the images of every prompt and seed; verdicts in the file of an earlier run are reused."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / (f"{name}.jsonl" if scale == GUIDANCE_SCALE else f"{name}-scale-{scale:g}.jsonl")
    if fresh:
        path.unlink(missing_ok=True)
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {(row["prompt"], row["seed"]) for row in kept}
    jobs = [(prompt, seed) for seed in seeds for prompt in prompts if (prompt, seed) not in known]
    pipe = elakit.load("picture-world")
    pipe.set_progress_bar_config(disable=True)
    with path.open("a") as file, tqdm(total=len(jobs), desc=name, unit="image", mininterval=10) as bar:
        for start in range(0, len(jobs), BATCH):
            part = jobs[start : start + BATCH]
            for (prompt, seed), image in zip(part, draw(pipe, part, neutral, scale), strict=True):
                verdict = judge(image, elakit.parse(prompt, pipe))
                row = {
                    "prompt": prompt,
                    "seed": seed,
                    "success": verdict.success,
                    "present": all(verdict.present.values()),
                    "failures": verdict.failures,
                    "extra": verdict.extra,
                    "said": str(verdict),
                    "shift": _shift(verdict),
                }
                kept.append(row)
                file.write(json.dumps(row) + "\n")
            file.flush()
            bar.update(len(part))
    wanted = {(prompt, seed) for prompt in prompts for seed in seeds}
    return [row for row in kept if (row["prompt"], row["seed"]) in wanted]


def _shift(verdict: Verdict) -> list[float] | None:
    """Vector from the center of the first entity to that of the second, in pixels (x, y); None if one is missing."""
    if len(verdict.entities) != 2 or not verdict.masks.any((1, 2)).all():
        return None
    first, second = (np.argwhere(mask).mean(0)[::-1] for mask in verdict.masks)
    return [float(value) for value in second - first]


def of_sweep(folder: Path) -> list[dict]:
    """Verdicts of the plain images of a sweep of the suite attend-and-excite, in the form of `verdicts`."""
    table = bench_table(folder).query("method == 'plain' and suite == 'attend-and-excite'")
    return [
        {
            "prompt": row.prompt,
            "seed": int(row.seed),
            "success": bool(row.success),
            "present": row.present == 1,
            "failures": [name for name in FAILURES if getattr(row, name.replace(" ", "_"))],
        }
        for row in table.itertuples()
    ]


@torch.no_grad()
def draw(
    pipe: Any, jobs: list[tuple[str, int]], neutral: bool = False, scale: float = GUIDANCE_SCALE
) -> list[Image.Image]:
    """Generate an image per (prompt, seed); `neutral` gives end-of-text and padding the states of an empty prompt."""
    prompts = [prompt for prompt, _ in jobs]
    tokens = pipe.tokenizer([*prompts, ""], padding="max_length", return_tensors="pt").input_ids
    states = pipe.text_encoder(tokens).last_hidden_state
    states, empty = states[:-1], states[-1:]
    if neutral:
        states = torch.where((tokens[:-1] == pipe.tokenizer.eos_token_id)[..., None], empty, states)
    generators = [torch.Generator().manual_seed(seed) for _, seed in jobs]
    return pipe(
        prompt_embeds=states,
        negative_prompt_embeds=empty.expand_as(states),
        num_inference_steps=STEPS,
        guidance_scale=scale,
        generator=generators,
    ).images


@app.command()
def singles(
    seeds: Seeds = SEEDS,
    out: Out = Path("work/benchmarks"),
    fresh: Fresh = False,
    scale: Scale = GUIDANCE_SCALE,
    every: Every = 1,
) -> None:
    """Measure single entities: 24 nouns, without a color and in 11 colors."""
    rows = verdicts("singles", single_prompts()[::every], range(seeds), out, fresh, scale=scale)
    show(
        f"single entities, seeds 0 to {seeds - 1}, scale {scale:g}: noun and color right",
        [r["success"] for r in rows],
        ">= .95",
    )
    show("single entities: noun right", [r["present"] for r in rows])
    show("single entities: nothing else in the image", [not r["extra"] for r in rows])


@app.command()
def pairs(
    seeds: Seeds = SEEDS,
    out: Out = Path("work/benchmarks"),
    fresh: Fresh = False,
    scale: Scale = GUIDANCE_SCALE,
    every: Every = 1,
    sweep: Annotated[
        Path | None, typer.Option(help="Folder of a sweep, whose plain images are used instead of new ones.")
    ] = None,
) -> None:
    """Measure the 276 prompts of Attend-and-Excite: success, and kinds of failure."""
    if sweep is None:
        rows = verdicts("pairs", benchmark_prompts()[::every], range(seeds), out, fresh, scale=scale)
    else:
        rows = of_sweep(sweep)
    drawn = ", ".join(map(str, sorted({row["seed"] for row in rows})))
    show(f"A&E prompts, seeds {drawn}, scale {scale:g}: success", [r["success"] for r in rows], ".35 to .70")
    failed = [r for r in rows if not r["success"]]
    for kind in FAILURES:
        if failed:
            show(f"A&E prompts: {kind} among the failures", [kind in r["failures"] for r in failed], ">= .10")
    show("A&E prompts: all present", [r["present"] for r in rows])
    table = json.loads(data_path("prompts", "attend_and_excite.json").read_text(encoding="utf-8"))
    for group, prompts in table.items():
        if chosen := [r["success"] for r in rows if r["prompt"] in set(prompts)]:
            show(f"A&E prompts: success, {group}", chosen)
    held = read_config().world.held_out_pairs()
    for what, never in (("shown together in training", False), ("never shown together", True)):
        chosen = [r for r in rows if (frozenset(n for n in NOUNS if n in r["prompt"].split()) in held) == never]
        if chosen:
            show(f"A&E prompts: success, nouns {what}", [r["success"] for r in chosen])


@app.command()
def layout(seeds: Seeds = SEEDS, out: Out = Path("work/benchmarks"), fresh: Fresh = False, every: Every = 1) -> None:
    """Measure the layout of right images of "a X and a Y": shares with things side by side and above each other."""
    prompts = [prompt for prompt in benchmark_prompts()[::every] if " and " in prompt]
    rows = [r for r in verdicts("pairs", prompts, range(seeds), out, fresh) if r["success"] and r["shift"]]
    steep = np.array([abs(r["shift"][1]) / max(1e-6, abs(r["shift"][0])) for r in rows])
    show(
        "right images of two things: side by side (direction within 30 degrees of the horizontal)",
        steep < 0.577,
        "<= .60",
    )
    show("right images of two things: one above the other (within 30 degrees of the vertical)", steep > 1.732, ">= .15")
    show("right images of two things: centers farther apart sideways than vertically", steep < 1)


@app.command()
def three(seeds: Seeds = SEEDS, out: Out = Path("work/benchmarks"), fresh: Fresh = False) -> None:
    """Measure prompts with three things: success."""
    rows = verdicts("three", list(suite("three-entities")), range(seeds), out, fresh)
    show("three things: success", [r["success"] for r in rows], ">= .20")
    show("three things: all present", [r["present"] for r in rows])


@app.command()
def words(seeds: Seeds = SEEDS, out: Out = Path("work/benchmarks"), fresh: Fresh = False, every: Every = 1) -> None:
    """Measure images of pairs as they are, and with end-of-text and padding of an empty prompt (only words matter)."""
    prompts = benchmark_prompts()[::every]
    plain = verdicts("pairs", prompts, range(seeds), out, fresh)
    neutral = verdicts("neutral", prompts, range(seeds), out, fresh, neutral=True)
    show("A&E prompts: all present, as it is", [r["present"] for r in plain])
    show("A&E prompts: all present, end and padding neutral", [r["present"] for r in neutral], "at most .15 less")
    show("A&E prompts: success, end and padding neutral", [r["success"] for r in neutral])


@app.command()
def attention(
    count: Annotated[int, typer.Option(help="Number of prompts, at most 276.")] = 276,
    seed: Annotated[int, typer.Option(help="Seed of the initial noise.")] = 0,
) -> None:
    """Measure the IoU of the nouns' decoder maps at 16 x 16 (Otsu) and the judge's masks, on right images."""
    pipe = elakit.load("picture-world")
    found = []
    for text in tqdm(benchmark_prompts()[:: max(1, 276 // count)], unit="image", mininterval=10):
        run = elakit.generate(pipe, text, seed=seed, progress=False)
        verdict = judge(run.image, run.prompt)
        if verdict.success:
            maps = run.recording.maps("entities", "up", 16).mean("step").values
            found += agreement_iou(maps, downscale(verdict.masks, maps.shape[-2:])).tolist()
    print(
        f"| noun's decoder map (Otsu) against judge's mask, mean IoU of {len(found)} | {np.mean(found):.3f} | >= .5 |"
    )


@app.command()
def cost(images: Annotated[int, typer.Option(help="Number of images of each kind, in turn.")] = 5) -> None:
    """Measure the time of an image with and without recording, and the peak memory of the process."""
    pipe = elakit.load("picture-world")
    pipe.set_progress_bar_config(disable=True)
    draw(pipe, [("a cat", 0)])
    plain, recorded = [], []
    for seed in range(images):
        began = time.perf_counter()
        draw(pipe, [("a cat and a lion", seed)])
        middle = time.perf_counter()
        elakit.generate(pipe, "a cat and a lion", seed=seed, progress=False)
        plain.append(middle - began)
        recorded.append(time.perf_counter() - middle)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"| a recorded image, 25 steps, batch 1, median of {images} | {np.median(recorded):.2f} s | <= 3 s |")
    print(f"| its time relative to a plain one | {np.median(np.array(recorded) / plain):.2f} | |")
    print(f"| peak memory of the process | {peak:.2f} GiB | < 2 GB |")


@app.command()
def scenes(
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("work/benchmarks/scenes.png"),
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 1_000_003,
) -> None:
    """Write a sheet of 36 random scenes without selection: 12 of one thing, 16 of two, 5 of three and 3 of four."""
    rng, page = np.random.default_rng(seed), Image.new("RGB", (6 * 128, 6 * 128))
    counts = rng.permutation([1] * 12 + [2] * 16 + [3] * 5 + [4] * 3)
    for i, count in enumerate(counts):
        alone = replace(test_world(), entities=tuple(float(k == count - 1) for k in range(count)))
        scene = sample(alone, rng)
        page.paste(Image.fromarray(scene.image), (i % 6 * 128, i // 6 * 128))
        print(f"{scene.layout}: {scene.caption}")
    out.parent.mkdir(parents=True, exist_ok=True)
    page.save(out, optimize=True)


@app.command()
def sheet(
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("work/benchmarks/contact_sheet.png"),
) -> None:
    """Write a sheet of 36 images from seeds 0 to 35 without selection: prompts with one, two and three things."""
    pipe = elakit.load("picture-world")
    pipe.set_progress_bar_config(disable=True)
    jobs = list(zip(sheet_prompts(), range(36), strict=True))
    images = [p for start in range(0, 36, BATCH) for p in draw(pipe, jobs[start : start + BATCH])]
    side = images[0].width
    page = Image.new("RGB", (6 * side, 6 * side))
    for i, image in enumerate(images):
        page.paste(image, (i % 6 * side, i // 6 * side))
    out.parent.mkdir(parents=True, exist_ok=True)
    page.save(out, optimize=True)
    for row in range(6):
        print("; ".join(prompt for prompt, _ in jobs[6 * row : 6 * row + 6]))


def sheet_prompts() -> list[str]:
    """Prompts of the sheet in random order: 18 of single things, 15 pairs of the benchmark and 3 of three things."""
    rng = np.random.default_rng(0)
    nouns = rng.permutation(NOUNS)
    single = [f"a {rng.choice(COLORS)} {n}" if i % 2 else f"a {n}" for i, n in enumerate(nouns[:18])]
    pairs_ = [str(p) for p in rng.choice(benchmark_prompts(), 15, replace=False)]
    three = ["a red bird, a green car and a dog", "a cat, a lion and a frog", "a blue bowl next to an apple and a bear"]
    order = rng.permutation(36)
    every = [*single, *pairs_, *three]
    return [every[i] for i in order]


@app.command("all")
def all_(fresh: Fresh = False) -> None:
    """Run all parts, each in a process of its own."""
    for part in PARTS:
        command = [sys.executable, "-m", "benchmarks.picture_world", part]
        subprocess.run(command + ["--fresh"] * (fresh and part in ("singles", "pairs", "three", "words")), check=True)


if __name__ == "__main__":
    with one_line_errors("benchmarks.picture_world"):
        app()
