"""Blind audit of the judge: agreement of its verdicts with the labels of a person.

Three steps::

    python -m benchmarks.audit draw work/audit                # images, sheets, an empty label file
    (look at work/audit/sheets, fill in work/audit/labels.csv)
    python -m benchmarks.audit agree work/audit               # agreement with the judge, with intervals

Images are shuffled and numbered; sheets show number and prompt, but neither the method nor the judge's verdict, which
is computed afterward. The same labels can therefore be compared with another judge.

**Label file** (CSV, one row per image)::

    image,first_nameable,first_color,second_nameable,second_color,hybrid,extra
    17,1,1,1,0,0,0

All values are 1 or 0. ``*_nameable``: a person who has not read the prompt would name the thing as the prompt does.
``*_color``: the thing has the color that the prompt asks for; if it asks for none, 1 unless the thing clearly took the
color of the other one. ``hybrid``: two things are fused. ``extra``: a nameable thing was not asked for, or appears more
often than asked for. The columns of the second entity are empty for single things. A row whose columns are all empty is
not labeled yet and is left out. An image is right by eye if every entity is nameable and has its color and nothing is
fused, which is also the judge's definition of success.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

import elakit
from elakit.errors import SettingError
from elakit.files import write_file
from elakit.generation import generate
from elakit.judge import Verdict, judge
from elakit.statistics import wilson
from elakit.sweep import suite
from elakit.sweep.units import Unit
from elakit.world.vocabulary import COLORS, NOUNS

COLUMNS = ("image", "first_nameable", "first_color", "second_nameable", "second_color", "hybrid", "extra")
METHODS = ("plain", "ela", "attend-and-excite", "syngen")
FIRST_SEED = 800  # seeds 800 to 999: below 1,000, and used by no training, tuning or test
BARS = {"accuracy": "", "kappa": ">= .85", "right": ">= .95", "wrong": ">= .90", "single": ">= .97"}
SHEET, SIDE = (6, 5), 192  # images per row and column of a sheet, and their side in pixels

Folder = Annotated[Path, typer.Argument(help="Folder of the audit.")]

app = typer.Typer(help=__doc__, no_args_is_help=True)


@dataclass(frozen=True)
class Label:
    """Labels of one image, given by a person; the module's docstring defines them.

    Attributes
    ----------
    nameable, color : tuple of bool
        One label for each of the one or two entities.
    hybrid, extra : bool
        Labels of the image.
    """

    nameable: tuple[bool, ...]
    color: tuple[bool, ...]
    hybrid: bool
    extra: bool

    @property
    def right(self) -> bool:
        """True if all entities are nameable and have their colors, and none is fused."""
        return all(self.nameable) and all(self.color) and not self.hybrid


def read_labels(path: Path) -> dict[int, Label]:
    """Read a label file.

    Parameters
    ----------
    path : Path
        A label file as described at the top of this module.

    Returns
    -------
    dict of int to Label
        Labels by the number of the image; rows that are not filled in are left out.

    Raises
    ------
    SettingError
        The file cannot be read, has other columns, contains a value that is neither 0 nor 1 or a row that is filled in
        partly, or has two rows for the same image.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), tuple(reader.fieldnames or ())
    except OSError as error:
        raise SettingError(
            f"Cannot read the labels {path}: {error}. Run `draw` first, and fill in its file."
        ) from error
    if columns != COLUMNS:
        raise SettingError(f"{path} has the columns {', '.join(columns)}; it must have {', '.join(COLUMNS)}.")
    labels: dict[int, Label] = {}
    for line, row in enumerate(rows, 2):
        values = [(row[name] or "").strip() for name in COLUMNS[1:]]
        if not any(values):
            continue
        second = values[2:4]
        if set(values[:2] + values[4:]) - {"0", "1"} or (second != ["", ""] and set(second) - {"0", "1"}):
            raise SettingError(
                f"{path}, line {line}: values must be 0 or 1, all of them filled in (the second entity's may both be "
                f"empty), not {', '.join(repr(value) for value in values)}."
            )
        number = int(row["image"])
        if number in labels:
            raise SettingError(f"{path}, line {line}: image {number} is labeled twice. Keep one of the rows.")
        seen = [value == "1" for value in values if value]
        labels[number] = Label(tuple(seen[:-2:2]), tuple(seen[1:-2:2]), seen[-2], seen[-1])
    return labels


def kappa(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Cohen's kappa of two raters: their agreement beyond the one that is expected by chance.

    Parameters
    ----------
    first, second : sequence of bool
        Answers of each rater to the same questions.

    Returns
    -------
    float
        1 for full agreement, 0 for agreement by chance; NaN if both raters always give the same answer.

    References
    ----------
    Cohen, "A Coefficient of Agreement for Nominal Scales", Educational and Psychological Measurement 20, 1960.

    Examples
    --------
    >>> kappa([True, True, False, False], [True, False, False, False])
    0.5
    """
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    observed = float((a == b).mean())
    chance = float(a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean()))
    return (observed - chance) / (1 - chance) if chance < 1 else float("nan")


def kappa_interval(first: Sequence[bool], second: Sequence[bool], samples: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of `kappa`, resampling images."""
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    rows = np.random.default_rng(0).integers(len(a), size=(samples, len(a)))
    values = [value for r in rows if not np.isnan(value := kappa(a[r], b[r]))]
    low, high = np.quantile(values, [0.025, 0.975]) if values else (float("nan"),) * 2
    return float(low), float(high)


def agreement(by_eye: Sequence[bool], by_judge: Sequence[bool]) -> list[str]:
    """Rows of a Markdown table: accuracy, kappa, precision of both verdicts, and the confusion matrix.

    Parameters
    ----------
    by_eye, by_judge : sequence of bool
        True for each image that is right.
    """
    eye, said = np.asarray(by_eye, bool), np.asarray(by_judge, bool)
    low, high = kappa_interval(eye, said)
    return [
        _share("judge and eye agree", int((eye == said).sum()), len(eye), BARS["accuracy"]),
        f"| Cohen's kappa | {kappa(eye, said):.3f} ({low:.3f} to {high:.3f}, n = {len(eye)}) | {BARS['kappa']} |",
        _share("of those the judge calls right, right by eye", int(eye[said].sum()), int(said.sum()), BARS["right"]),
        _share("of those it calls wrong, wrong by eye", int((~eye)[~said].sum()), int((~said).sum()), BARS["wrong"]),
        "",
        "| | judge: right | judge: wrong |",
        "|---|---|---|",
        f"| eye: right | {(eye & said).sum()} | {(eye & ~said).sum()} |",
        f"| eye: wrong | {(~eye & said).sum()} | {(~eye & ~said).sum()} |",
    ]


def _share(what: str, count: int, total: int, bar: str) -> str:
    if total == 0:
        return f"| {what} | no image | {bar} |"
    low, high = wilson(count, total)
    return f"| {what} | {count / total:.3f} ({low:.3f} to {high:.3f}, n = {total}) | {bar} |"


@app.command()
def draw(
    folder: Folder = Path("work/audit"),
    pairs: Annotated[
        int, typer.Option(help="Number of prompts with two entities, each generated with every method.")
    ] = 76,
    singles: Annotated[int, typer.Option(help="Number of prompts with one entity, without guidance.")] = 100,
    methods: Annotated[str, typer.Option(help="Comma-separated methods, as in `elakit sweep`.")] = ",".join(METHODS),
    first_seed: Annotated[int, typer.Option(help="Seed of the first prompt; the next ones follow, below 1,000.")] = (
        FIRST_SEED
    ),
) -> None:
    """Generate images, number them in random order, and write sheets and an empty label file."""
    if not 0 <= first_seed < 1000:
        raise SettingError(f"The first seed is {first_seed}; audits use seeds from 0 to 999.")
    if (folder / "labels.csv").exists():
        raise SettingError(f"{folder} already contains labels. Choose another folder, or move labels.csv away.")
    jobs = [(prompt, "plain", seed) for prompt, seed in _prompts(single_prompts(), singles, first_seed)]
    chosen = [name.strip() for name in methods.split(",")]
    jobs += [(p, method, s) for p, s in _prompts(suite("attend-and-excite"), pairs, first_seed) for method in chosen]
    order = np.random.default_rng(first_seed).permutation(len(jobs))
    pipe = elakit.load("picture-world")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    key, images = {}, []
    for number, i in enumerate(tqdm(order, unit="image"), 1):
        prompt, method, seed = jobs[i]
        unit = Unit("picture-world", prompt, (seed,), method=method)
        run = generate(pipe, prompt, seed=seed, guidance=unit.guidance(), record=False, progress=False)
        run.image.save(folder / "images" / f"{number:04d}.png")
        key[number] = {"prompt": prompt, "method": method, "seed": int(seed)}
        images.append((number, prompt, run.image))
    write_file(folder / "key.json", json.dumps(key, indent=1).encode())
    for start in range(0, len(images), SHEET[0] * SHEET[1]):
        page = images[start : start + SHEET[0] * SHEET[1]]
        (folder / "sheets").mkdir(exist_ok=True)
        sheet(page).save(folder / "sheets" / f"{page[0][0]:04d}-{page[-1][0]:04d}.png")
    lines = [",".join(COLUMNS), *(f"{number}" + "," * (len(COLUMNS) - 1) for number, _, _ in images)]
    write_file(folder / "labels.csv", ("\n".join(lines) + "\n").encode())
    print(f"{len(images)} images in {folder}. Look at {folder / 'sheets'} and fill in {folder / 'labels.csv'}.")


def single_prompts() -> list[str]:
    """Prompts of single entities: every noun without a color and in every color."""
    return [f"a {color} {noun}" if color else f"a {noun}" for noun in NOUNS for color in (None, *COLORS)]


def _prompts(prompts: Sequence[str], count: int, first_seed: int) -> list[tuple[str, int]]:
    """Some prompts, chosen at random without repetition, each with a seed of its own below 1,000."""
    rng = np.random.default_rng((first_seed, len(prompts)))
    chosen = rng.choice(len(prompts), min(count, len(prompts)), replace=False)
    return [(prompts[int(p)], first_seed + i % (1000 - first_seed)) for i, p in enumerate(chosen)]


def sheet(images: Sequence[tuple[int, str, Image.Image]]) -> Image.Image:
    """Sheet of numbered images with their prompts, without methods and verdicts."""
    columns, rows = SHEET[0], -(-len(images) // SHEET[0])
    page = Image.new("RGB", (columns * (SIDE + 8), rows * (SIDE + 22)), "white")
    pen = ImageDraw.Draw(page)
    for i, (number, prompt, image) in enumerate(images):
        x, y = i % columns * (SIDE + 8) + 4, i // columns * (SIDE + 22) + 18
        page.paste(image.resize((SIDE, SIDE), Image.Resampling.NEAREST), (x, y))
        pen.text((x, y - 15), f"{number}: {prompt}", fill="black")
    return page


@app.command()
def agree(
    folder: Folder = Path("work/audit"),
    labels: Annotated[Path | None, typer.Option(help="Label file; by default labels.csv in the folder.")] = None,
) -> None:
    """Judge the images, and compare the verdicts with the labels."""
    found = read_labels(labels or folder / "labels.csv")
    key = {int(number): row for number, row in json.loads((folder / "key.json").read_text(encoding="utf-8")).items()}
    if unknown := set(found) - set(key):
        raise SettingError(f"The labels name images that are not in {folder}: {sorted(unknown)[:5]}.")
    if not found:
        raise SettingError(f"No image is labeled yet. Fill in {labels or folder / 'labels.csv'}.")
    pipe = elakit.load("picture-world")
    pairs: list[tuple[str, Label, Verdict]] = []
    singles: list[Label] = []
    for number, label in tqdm(sorted(found.items()), unit="image", leave=False):
        prompt = elakit.parse(key[number]["prompt"], pipe)
        if len(label.nameable) != len(prompt.entities):
            raise SettingError(
                f"Image {number} shows {key[number]['prompt']!r}: {len(prompt.entities)} entities, but "
                f"{len(label.nameable)} are labeled."
            )
        if len(prompt.entities) == 1:
            singles.append(label)
            continue
        image = Image.open(folder / "images" / f"{number:04d}.png").convert("RGB")
        pairs.append((key[number]["method"], label, judge(image, prompt)))
    print("| what | measured | wanted |\n|---|---|---|")
    if singles:
        print(_share("single things: nameable", sum(all(s.nameable) for s in singles), len(singles), BARS["single"]))
        print(_share("single things: nameable and in their color", sum(s.right for s in singles), len(singles), ""))
    for method in dict.fromkeys(method for method, _, _ in pairs):
        rows = [(label, verdict) for name, label, verdict in pairs if name == method]
        print(_share(f"{method}: right by eye", sum(label.right for label, _ in rows), len(rows), ""))
        print(_share(f"{method}: right by the judge", sum(v.success for _, v in rows), len(rows), ""))
    if pairs:
        print("\n".join(agreement([p[1].right for p in pairs], [p[2].success for p in pairs])))
        hybrids = [(label.hybrid, verdict.mixture) for _, label, verdict in pairs]
        print(f"\nCohen's kappa of hybrids: {kappa(*zip(*hybrids, strict=True)):.3f}")


if __name__ == "__main__":
    try:
        app()
    except SettingError as error:
        sys.exit(str(error))
