"""Blind audit of the judge: agreement of its verdicts with the labels of a person.

Four steps::

    python -m benchmarks.audit draw work/audit      # images, sheets, an empty label file
    (look at work/audit/sheets, fill in work/audit/labels.csv)
    python -m benchmarks.audit judge work/audit     # the judge's verdicts, in work/audit/verdicts.csv
    python -m benchmarks.audit agree work/audit     # agreement of labels and verdicts, with intervals

Images are shuffled and numbered; sheets show number and prompt, but neither the method nor the judge's verdict, which
is computed afterward. The same labels can therefore be compared with another judge. ``benchmarks/audits`` holds the
labels of earlier audits. To measure a person's agreement with themselves, label some images again, and compare the two
label files with ``python -m benchmarks.audit repeat FIRST SECOND``.

The judge's thresholds can be chosen on labels that it was not trained on, never on those of the audit:
``python -m benchmarks.audit thresholds FOLDER...``.

**Label file**: ``elakit/judge/labels.py`` defines columns and values.

**Verdict file**: the prompt, method and seed of each image, followed by the columns of the label file, filled in by the
judge.
"""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

import elakit
from elakit import checks
from elakit.cli_options import one_line_errors, without_markup
from elakit.errors import SettingError
from elakit.files import write_file
from elakit.generation import generate
from elakit.guidance.registry import METHODS as ALL_METHODS
from elakit.guidance.registry import without_regions
from elakit.judge import judge
from elakit.judge.labels import (
    COLUMNS,
    FAULTS,
    Label,
    LabeledImage,
    find_image,
    named_nouns,
    open_image,
    read_images,
    read_key,
    read_labels,
    read_rows,
)
from elakit.judge.segmenter import MIXED, UNRECOGNIZABLE, decide, find_components
from elakit.numbering import number_of
from elakit.statistics import bootstrap, wilson
from elakit.sweep import suite
from elakit.sweep.units import Unit
from elakit.world.vocabulary import COLORS, NOUNS

METHODS = ("plain", "ela", "attend-and-excite", "syngen")
PAIRS, SINGLES = 76, 100
# No training, tuning or test used seeds 800 to 999. The labels in benchmarks/audits are of seeds 800 to 899. Seeds 900
# to 999 were used to compare the images of two models side by side, by eye.
FIRST_SEED = 800
BARS = {"accuracy": "", "kappa": ">= .85", "right": ">= .95", "wrong": ">= .90", "single": ">= .97"}
GRID = tuple(i / 10 for i in range(1, 10))  # thresholds that `thresholds` compares
ORIGIN = ("image", "prompt", "method", "seed")  # a verdict file's columns before those of the labels
SHEET, SIDE = (4, 3), 256  # images per row and column of a sheet, and their side in pixels

Flags = Sequence[bool] | np.ndarray
Folder = Annotated[Path, typer.Argument(help="Folder of the audit.")]
Model = Annotated[
    Path | None, typer.Option(help="Folder of a trained model, whose judge/ is used. Default: the built-in model.")
]

app = typer.Typer(help=without_markup(__doc__), no_args_is_help=True)


class Judged(NamedTuple):
    """The judge's verdict on one image, and how the image was made."""

    prompt: str
    method: str
    seed: int
    label: Label


def read_verdicts(path: Path) -> dict[int, Judged]:
    """Read a file of verdicts, which the command ``judge`` writes.

    Parameters
    ----------
    path : Path

    Returns
    -------
    dict of int to Judged
        Verdicts by the number of the image.

    Raises
    ------
    SettingError
        As in `elakit.judge.labels.read_rows`, or a seed is not a whole number.
    """
    verdicts = {}
    for number, row in read_rows(path, (*ORIGIN, *COLUMNS[1:]), "Run `judge` first.").items():
        seed = row.cells["seed"]
        if not re.fullmatch("[0-9]{1,18}", seed):
            name = f"{path}, line {row.line}: seed"
            checks.refuse(seed, name, "a whole number, 0 or more", hint="Run `judge` again.")
        verdicts[number] = Judged(row.cells["prompt"], row.cells["method"], int(seed), row.label)
    return verdicts


def kappa(first: Flags, second: Flags) -> float:
    """Cohen's kappa of two raters: their agreement beyond the one that is expected by chance.

    Parameters
    ----------
    first, second : sequence of bool
        Answers of each rater to the same questions.

    Returns
    -------
    float
        1 for full agreement, 0 for agreement by chance; NaN if both raters answer every question with yes, or every one
        with no.

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


def kappa_interval(
    first: Flags, second: Flags, groups: Sequence[str] | None = None, samples: int = 2000
) -> tuple[float, float]:
    """95% bootstrap interval of `kappa` over images or, with `groups`, over groups such as the images of one prompt."""
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    position = np.unique(groups, return_inverse=True)[1] if groups is not None else np.arange(len(a))
    members = [np.flatnonzero(position == i) for i in range(position.max() + 1)]
    rows = np.random.default_rng(0).integers(len(members), size=(samples, len(members)))
    drawn = (np.concatenate([members[i] for i in row]) for row in rows)
    values = [value for r in drawn if not np.isnan(value := kappa(a[r], b[r]))]
    low, high = np.quantile(values, [0.025, 0.975]) if values else (float("nan"),) * 2
    return float(low), float(high)


def columns(first: Sequence[Label], second: Sequence[Label]) -> list[str]:
    """Rows of a Markdown table: share of equal answers, and kappa, of two raters in every column of the labels.

    Parameters
    ----------
    first, second : sequence of Label
        Labels of the same images. Colors are compared for the entities that both raters find nameable.
    """
    pairs = list(zip(first, second, strict=True))
    entities = [e for a, b in pairs for e in zip(a.nameable, b.nameable, a.color, b.color, strict=True)]
    compared = {
        "nameable, each entity": [(one, two) for one, two, _, _ in entities],
        "color, each entity nameable to both": [(c, d) for one, two, c, d in entities if one and two],
        "hybrid": [(a.hybrid, b.hybrid) for a, b in pairs],
        "extra": [(a.extra, b.extra) for a, b in pairs],
        "right": [(a.right, b.right) for a, b in pairs],
    }
    lines = ["| column | same | Cohen's kappa | yes, first | yes, second |", "|---|---|---|---|---|"]
    for name, values in compared.items():
        if values:
            one, two = (list(column) for column in zip(*values, strict=True))
            same = sum(a == b for a, b in values)
            lines.append(
                f"| {name} | {same} of {len(values)} ({same / len(values):.3f}) | {kappa(one, two):.3f} | "
                f"{sum(one)} | {sum(two)} |"
            )
    return lines


def agreement(by_eye: Sequence[bool], by_judge: Sequence[bool], groups: Sequence[str] | None = None) -> list[str]:
    """Rows of a Markdown table: accuracy, kappa, precision of the verdicts right and wrong, and the confusion matrix.

    Parameters
    ----------
    by_eye, by_judge : sequence of bool
        True for each image that is right, by eye and according to the judge.
    groups : sequence of str, optional
        Group of each image, such as its prompt. Intervals are then bootstrap intervals over groups, because images of
        one prompt are alike.
    """
    eye, said = np.asarray(by_eye, bool), np.asarray(by_judge, bool)
    low, high = kappa_interval(eye, said, groups)
    everything = np.ones(len(eye), bool)
    return [
        _share_of("judge and eye agree", eye == said, everything, groups, BARS["accuracy"]),
        f"| Cohen's kappa | {kappa(eye, said):.3f} ({low:.3f} to {high:.3f}, n = {len(eye)}) | {BARS['kappa']} |",
        _share_of("of those the judge calls right, right by eye", eye, said, groups, BARS["right"]),
        _share_of("of those it calls wrong, wrong by eye", ~eye, ~said, groups, BARS["wrong"]),
        "",
        "| | judge: right | judge: wrong |",
        "|---|---|---|",
        f"| eye: right | {(eye & said).sum()} | {(eye & ~said).sum()} |",
        f"| eye: wrong | {(~eye & said).sum()} | {(~eye & ~said).sum()} |",
    ]


def _share_of(what: str, hits: np.ndarray, among: np.ndarray, groups: Sequence[str] | None, bar: str) -> str:
    """Row of a table: share of `hits` in the images that `among` selects, with an interval, over groups if given."""
    count, total = int((hits & among).sum()), int(among.sum())
    if groups is None or total == 0:
        return _share(what, count, total, bar)
    value, low, high = bootstrap(hits & among, among, groups)
    return f"| {what} | {value:.3f} ({low:.3f} to {high:.3f}, n = {total}) | {bar} |"


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
    ] = PAIRS,
    singles: Annotated[int, typer.Option(help="Number of prompts with one entity, without guidance.")] = SINGLES,
    methods: Annotated[str, typer.Option(help="Comma-separated methods, as in `elakit sweep`.")] = ",".join(METHODS),
    first_seed: Annotated[int, typer.Option(help="Seed of the first prompt; the next ones follow, below 1,000.")] = (
        FIRST_SEED
    ),
) -> None:
    """Generate images, number them in random order, and write sheets and an empty label file.

    Finished images are kept: after an interruption, the same command generates the missing ones.
    """
    if not 0 <= first_seed < 1000:
        raise SettingError(f"The first seed is {first_seed}; audits use seeds from 0 to 999.")
    if (folder / "labels.csv").exists():
        raise SettingError(f"{folder} already contains labels. Choose another folder, or move labels.csv away.")
    chosen = [checks.choice(name.strip(), "--methods", ["plain", *ALL_METHODS]) for name in methods.split(",")]
    for name in set(chosen) - {"plain"}:
        without_regions(name)
    jobs = plan(pairs, singles, chosen, first_seed)
    key = {str(number): dict(zip(ORIGIN[1:], job, strict=True)) for number, job in enumerate(jobs, 1)}
    if (folder / "key.json").exists() and json.loads((folder / "key.json").read_text(encoding="utf-8")) != key:
        raise SettingError(f"{folder} holds images of another draw. Choose another folder, or delete this one.")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    write_file(folder / "key.json", json.dumps(key, indent=1).encode())
    pipe = elakit.load("picture-world")
    paths = [folder / "images" / f"{number:04d}.png" for number in range(1, len(jobs) + 1)]
    for path, (prompt, method, seed) in zip(tqdm(paths, unit="image"), jobs, strict=True):
        if path.exists():
            continue
        unit = Unit("picture-world", prompt, (seed,), method=method)
        run = generate(pipe, prompt, seed=seed, guidance=unit.guidance(), record=False, progress=False)
        save_image(run.image, path)
    write_sheets(folder, [prompt for prompt, _, _ in jobs], paths)
    print(f"{len(jobs)} images in {folder}. Look at {folder / 'sheets'} and fill in {folder / 'labels.csv'}.")


def write_sheets(folder: Path, prompts: Sequence[str], paths: Sequence[Path]) -> None:
    """Write the sheets of images, which are numbered from 1, and an empty label file."""
    (folder / "sheets").mkdir(parents=True, exist_ok=True)
    per_sheet = SHEET[0] * SHEET[1]
    for start in range(0, len(paths), per_sheet):
        stop = min(start + per_sheet, len(paths))
        page = sheet([(i + 1, prompts[i], Image.open(paths[i]).convert("RGB")) for i in range(start, stop)])
        page.save(folder / "sheets" / f"{start + 1:04d}-{stop:04d}.png")
    empty = [""] * (len(COLUMNS) - 1)
    write_rows(folder / "labels.csv", COLUMNS, ([number, *empty] for number in range(1, len(paths) + 1)))


def plan(
    pairs: int = PAIRS, singles: int = SINGLES, methods: Sequence[str] = METHODS, first_seed: int = FIRST_SEED
) -> list[tuple[str, str, int]]:
    """Prompt, method and seed of every image, in the order of the images' numbers.

    Parameters
    ----------
    pairs, singles : int
        Number of prompts with two entities, each of which is generated with every method; and number of prompts with
        one entity, which are generated without guidance.
    methods : sequence of str
        "plain" and names in `elakit.guidance.METHODS`.
    first_seed : int
        Seed of the first prompt with one entity and of the first with two. The next prompts have the next seeds; 999 is
        followed by `first_seed`.
    """
    jobs = [(prompt, "plain", seed) for prompt, seed in chosen_prompts(single_prompts(), singles, first_seed)]
    jobs += [
        (p, method, s) for p, s in chosen_prompts(suite("attend-and-excite"), pairs, first_seed) for method in methods
    ]
    return [jobs[i] for i in np.random.default_rng(first_seed).permutation(len(jobs))]


def save_image(image: Image.Image, path: Path) -> None:
    """Save an image as PNG, completely or not at all."""
    content = io.BytesIO()
    image.save(content, "png")
    write_file(path, content.getvalue())


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write rows below the names of their columns as a CSV file."""
    lines = [",".join(columns), *(",".join(map(str, row)) for row in rows)]
    write_file(path, ("\n".join(lines) + "\n").encode())


def single_prompts() -> list[str]:
    """Prompts of single entities: every noun without a color and in every color."""
    return [f"a {color} {noun}" if color else f"a {noun}" for noun in NOUNS for color in (None, *COLORS)]


def chosen_prompts(prompts: Sequence[str], count: int, first_seed: int) -> list[tuple[str, int]]:
    """Choose prompts at random, without repetition, and give them the seeds from `first_seed` to 999, repeatedly."""
    rng = np.random.default_rng((first_seed, len(prompts)))
    chosen = rng.choice(len(prompts), min(count, len(prompts)), replace=False)
    return [(prompts[int(p)], first_seed + i % (1000 - first_seed)) for i, p in enumerate(chosen)]


def sheet(images: Sequence[tuple[int, str, Image.Image]]) -> Image.Image:
    """Sheet of numbered images with their prompts, without methods and verdicts."""
    columns, rows = SHEET[0], -(-len(images) // SHEET[0])
    page = Image.new("RGB", (columns * (SIDE + 8), rows * (SIDE + 26)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for i, (number, prompt, image) in enumerate(images):
        x, y = i % columns * (SIDE + 8) + 4, i // columns * (SIDE + 26) + 22
        page.paste(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (x, y))
        pen.text((x, y - 20), f"{number}: {prompt}", fill="black", font=font)
    return page


@app.command("judge")
def judge_images(folder: Folder = Path("work/audit"), model: Model = None) -> None:
    """Judge the images with the judge of this checkout or of another model, and write verdicts.csv."""
    key = read_key(folder / "key.json", ("method", "seed"), "Run `draw` first.")
    pipe = elakit.load("picture-world")
    detector = None if model is None else lambda seen, _: decide(find_components(seen, model))
    rows, different = [], set()
    for number, made in tqdm(key.items(), unit="image", leave=False):
        prompt = elakit.parse(made["prompt"], pipe)
        image = open_image(find_image(folder, number) or folder / "images" / f"{number:04d}.png")
        different.add(image.tobytes())
        verdict = Label.of(judge(image, prompt, detector), prompt)
        rows.append((number, *(made[name] for name in ORIGIN[1:]), *verdict.values()))
    write_rows(folder / "verdicts.csv", (*ORIGIN, *COLUMNS[1:]), rows)
    print(f"{len(rows)} verdicts on {len(different)} different images in {folder / 'verdicts.csv'}.")


@app.command()
def agree(
    folder: Folder = Path("work/audit"),
    labels: Annotated[Path | None, typer.Option(help="Label file; by default labels.csv in the folder.")] = None,
) -> None:
    """Compare the labels with the verdicts that `judge` wrote."""
    found, verdicts = read_labels(labels or folder / "labels.csv"), read_verdicts(folder / "verdicts.csv")
    if unknown := set(found) - set(verdicts):
        raise SettingError(
            f"The labels name images that are not in {folder}: {sorted(unknown)[:5]}. Give the folder of these labels."
        )
    if not found:
        raise SettingError(f"No image is labeled yet. Fill in {labels or folder / 'labels.csv'}.")
    for number, label in found.items():
        shown = verdicts[number]
        if len(label.nameable) != len(shown.label.nameable):
            raise SettingError(
                f"Image {number} shows {shown.prompt!r}: {number_of(len(shown.label.nameable), 'entity')}, but its row "
                f"has labels for {len(label.nameable)}. Correct the row of this image in the label file."
            )
    singles = {number: label for number, label in found.items() if len(label.nameable) == 1}
    pairs = {number: label for number, label in found.items() if number not in singles}
    print("| what | measured | wanted |\n|---|---|---|")
    if singles:
        by_judge = [verdicts[number].label for number in singles]
        for who, seen, bar in (("eye", list(singles.values()), BARS["single"]), ("the judge", by_judge, "")):
            print(_share(f"single things: nameable by {who}", sum(all(s.nameable) for s in seen), len(seen), bar))
            print(_share(f"single things: right by {who}", sum(s.right for s in seen), len(seen), ""))
    for method in dict.fromkeys(verdicts[number].method for number in pairs):
        chosen = [number for number in pairs if verdicts[number].method == method]
        print(_share(f"{method}: right by eye", sum(pairs[n].right for n in chosen), len(chosen), ""))
        print(_share(f"{method}: right by the judge", sum(verdicts[n].label.right for n in chosen), len(chosen), ""))
    if not pairs:
        return
    said = {number: verdicts[number].label for number in pairs}
    prompts = [verdicts[number].prompt for number in pairs]
    print("\n".join(agreement([p.right for p in pairs.values()], [v.right for v in said.values()], prompts)))
    print("\n" + "\n".join(columns(list(pairs.values()), list(said.values()))))
    print("\n" + "\n".join(_nouns({number: verdicts[number].prompt for number in pairs}, pairs, said)))
    print("\n| images of pairs | reason | number | images |\n|---|---|---|---|")
    for what, wrong, right in (
        ("judge: right, eye: wrong", pairs, said),
        ("judge: wrong, eye: right", said, pairs),
    ):
        for fault in FAULTS:
            numbers = [n for n in sorted(pairs) if right[n].right and fault in wrong[n].faults]
            print(f"| {what} | {fault} | {len(numbers)} | {', '.join(map(str, numbers))} |")


def _nouns(prompts: Mapping[int, str], eye: Mapping[int, Label], said: Mapping[int, Label]) -> list[str]:
    """Rows of a Markdown table: how many entities of each noun are nameable by eye and found by the judge."""
    counts: dict[str, np.ndarray] = {}
    for number, prompt in prompts.items():
        for i, noun in enumerate(named_nouns(prompt)):
            row = (1, eye[number].nameable[i], said[number].nameable[i])
            counts[noun] = counts.get(noun, 0) + np.array(row, int)
    ordered = sorted(counts.items(), key=lambda item: (item[1][1] / item[1][0], item[0]))
    return [
        "| noun in images of pairs | entities | nameable by eye | found by the judge |",
        "|---|---|---|---|",
        *(f"| {noun} | {total} | {seen} | {found} |" for noun, (total, seen, found) in ordered),
    ]


@app.command()
def repeat(
    first: Annotated[Path, typer.Argument(help="Label file.")],
    second: Annotated[
        Path, typer.Argument(help="Labels of some of the same images, made without a look at the first.")
    ],
) -> None:
    """Compare two sets of labels of the same images; their agreement is the ceiling for that with any judge."""
    one, two = read_labels(first), read_labels(second)
    both = [number for number in two if number in one]
    if not both:
        raise SettingError(f"No image is labeled in both {first} and {second}. Label some images of one file again.")
    for name, chosen in (
        ("pairs", [n for n in both if len(one[n].nameable) == 2]),
        ("single things", [n for n in both if len(one[n].nameable) == 1]),
    ):
        if chosen:
            print(f"{len(chosen)} {name}\n")
            print("\n".join(columns([one[n] for n in chosen], [two[n] for n in chosen])) + "\n")


@app.command()
def thresholds(
    folders: Annotated[list[Path], typer.Argument(help="Folders of labeled images, with seeds below 800.")],
    model: Model = None,
) -> None:
    """Compare thresholds of the judge on labeled images of pairs on which it was not trained.

    The kappa of the best thresholds is too high as an estimate, because they were chosen on the same images. To
    estimate it, set these thresholds and repeat the audit, whose images have other seeds.
    """
    images = [one for folder in folders for one in development_images(folder) if len(one.label.nameable) == 2]
    if not images:
        raise SettingError(
            f"{', '.join(map(str, folders))}: no image of a pair is labeled, and the thresholds are chosen on these. "
            "Label some of them, or give another folder."
        )
    pipe = elakit.load("picture-world")
    eye, prompts = np.array([one.label.right for one in images]), [one.prompt for one in images]
    said: dict[tuple[float, float], list[bool]] = {
        both: [] for both in sorted({*itertools.product(GRID, GRID), (MIXED, UNRECOGNIZABLE)})
    }
    for one in tqdm(images, unit="image", leave=False):
        image, prompt = open_image(one.path), elakit.parse(one.prompt, pipe)
        components = find_components(image, model)  # the network runs once, and the grid uses its output
        right: dict[tuple[tuple[bool, bool], ...], bool] = {}
        for (mixed, unrecognizable), answers in said.items():
            decisions = tuple((c.mixed > mixed, c.unrecognizable > unrecognizable) for c in components)
            if decisions not in right:
                things = decide(components, mixed, unrecognizable)
                right[decisions] = judge(image, prompt, lambda *_, found=things: found).success
            answers.append(right[decisions])
    # rounded, so that equal values are equal; + 0.0 removes the sign of -0.0
    kappas = {both: round(kappa(eye, answers), 9) + 0.0 for both, answers in said.items()}
    best = max(kappas, key=lambda both: -np.inf if np.isnan(kappas[both]) else kappas[both])
    print(f"{len(images)} images of pairs, {eye.sum()} right by eye\n")
    print("| hybrid above | unrecognizable above | kappa | judged right: right by eye | judged wrong: wrong by eye | |")
    print("|---|---|---|---|---|---|")
    for both, answers in said.items():
        ours = np.array(answers)
        mark = "best" if kappas[both] == kappas[best] else ""
        shares = f"{_part(eye[ours])} | {_part(~eye[~ours])}"
        print(f"| {both[0]:g} | {both[1]:g} | {kappas[both]:.3f} | {shares} | {mark} |")
    print()
    for what, both in (("first of the best", best), ("of the built-in judge", (MIXED, UNRECOGNIZABLE))):
        low, high = kappa_interval(eye, said[both], prompts)
        print(f"Thresholds {both[0]:g} and {both[1]:g} ({what}): kappa {kappas[both]:.3f} ({low:.3f} to {high:.3f})")


def _part(hits: np.ndarray) -> str:
    return f"{hits.mean():.3f} ({hits.sum()} of {len(hits)})" if len(hits) else "no image"


def development_images(folder: Path) -> list[LabeledImage]:
    """Labeled images of a folder, all of which must have development seeds, that is, seeds below those of the audit.

    Parameters
    ----------
    folder : Path

    Raises
    ------
    SettingError
        As in `elakit.judge.labels.read_images`, or the folder has images with seeds of the audit.
    """
    path = folder / "key.json"
    for number, made in read_key(path, ("seed",)).items():
        name = f"{path}, image {number}: seed"
        hint = "The other seeds test the judge, so nothing is chosen on them. Give a folder of other images."
        checks.whole_number(made["seed"], name, 0, FIRST_SEED - 1, hint=hint)
    return read_images(folder)


if __name__ == "__main__":
    with one_line_errors("benchmarks.audit"):
        app()
