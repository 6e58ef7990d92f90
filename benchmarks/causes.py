"""Accuracy of the causes that elakit reports, on failures with known causes: ``python -m benchmarks.causes report``.

A case starts from a prompt and a seed whose image is right. Then a cause is planted by an edit of the attention or of
the states of the text encoder. The case counts if the image of the same seed is then wrong, so that the planted cause
is the reason. `elakit.causes.find` receives the changed run without further information. Null cases are runs whose
image is right, and right runs whose image was replaced by that of another prompt: the image is wrong, but the attention
is not.

Thresholds are chosen (``--split calibrate``) on other pairs of nouns and other seeds than those of the report. Run
``draw`` first, which stores each run in ``work/benchmarks/causes`` when it is complete. If ``draw`` is interrupted, the
same command resumes it.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from tqdm.auto import tqdm

import elakit
from elakit.attention import Edit, edit
from elakit.causes.ranking import MUTUAL
from elakit.cli_options import without_markup
from elakit.models import adapter_for
from elakit.prompt import Entity, Prompt
from elakit.statistics import wilson
from elakit.world.vocabulary import COLORS, NOUNS

OUT = Path("work/benchmarks/causes")
# Seeds of each split. Those for choosing thresholds are even and below 1,000, as in `benchmarks.tune`; no other command
# uses them.
SEEDS = {"calibrate": range(700, 708, 2), "report": range(6000, 6004)}
# Numbers of prompts with and without colors.
PROMPTS = {"calibrate": (8, 6), "report": (9, 7)}
# Words outside picture-world's training vocabulary.
STRANGE = ("zebra", "piano", "robot", "wolf", "teapot", "umbrella", "penguin", "guitar", "castle", "camel", "violin")

Split = Annotated[str, typer.Option(help=f"Split of prompts and seeds: {' or '.join(SEEDS)}.")]

app = typer.Typer(help=without_markup(__doc__), no_args_is_help=True)


@dataclass(frozen=True)
class Truth:
    """Planted cause: its kind, the affected entity, and the other entity and token that it comes from; "" for none."""

    kind: str
    entity: str = ""
    other: str = ""
    token: str = ""


@dataclass(frozen=True)
class Plant:
    """Way of planting a cause.

    Attributes
    ----------
    name : str
        Description for the table.
    colored : bool
        True if both entities need a color of their own.
    make : callable
        Function of a pipeline and a run whose image is right. It returns a context, in which the run is repeated to
        plant the cause, and the planted cause.
    """

    name: str
    colored: bool
    make: Callable[[Any, elakit.Run], tuple[Any, Truth]]


def _parts(run: elakit.Run) -> tuple[Entity, Entity, np.ndarray, np.ndarray]:
    """Return both entities and their masks in the image."""
    first, second = run.prompt.entities
    return first, second, run.verdict.masks[0], run.verdict.masks[1]


def attribute_moved(pipe: Any, run: elakit.Run) -> tuple[Any, Truth]:
    """The first entity's color receives attention in the second entity's region."""
    a, b, _, there = _parts(run)
    (color,) = a.attribute_indices
    change = edit(pipe, run.prompt, Edit(color, add=4, region=there))
    return change, Truth("attribute misplaced", a.label, b.label, _label(run.prompt, color))


def noun_moved(pipe: Any, run: elakit.Run) -> tuple[Any, Truth]:
    """The first noun receives attention in the second entity's region, to which the second noun is confined."""
    a, b, _, there = _parts(run)
    edits = [Edit(a, add=6, region=there), Edit(b, add=-6, region=~there)]
    return edit(pipe, run.prompt, edits), Truth("captured", b.label, a.label)


def noun_copied(pipe: Any, run: elakit.Run) -> tuple[Any, Truth]:
    """The second noun has the attention of the first."""
    a, b, _, _ = _parts(run)
    return edit(pipe, run.prompt, Edit(b, like=a)), Truth("captured", b.label, a.label)


def noun_masked(pipe: Any, run: elakit.Run) -> tuple[Any, Truth]:
    """The second noun receives no attention."""
    b = run.prompt.entities[1]
    return edit(pipe, run.prompt, Edit(b, scale=0)), Truth("token ignored", b.label)


def noun_spread(pipe: Any, run: elakit.Run) -> tuple[Any, Truth]:
    """The second noun has the attention of "and", which is spread over the image."""
    b = run.prompt.entities[1]
    return edit(pipe, run.prompt, Edit(b, like="and")), Truth("never localized", b.label)


def start_raised(pipe: Any, run: elakit.Run) -> tuple[Any, Truth]:
    """Start-of-text receives attention instead of words."""
    return edit(pipe, run.prompt, Edit("<start>", add=8)), Truth("start-of-text competition", token="<start>")


def start_raised_there(pipe: Any, run: elakit.Run) -> tuple[Any, Truth]:
    """Start-of-text receives attention in the second entity's region, to which the second noun is confined."""
    _, b, _, there = _parts(run)
    edits = [Edit("<start>", add=8, region=there), Edit(b, add=-6, region=~there)]
    return edit(pipe, run.prompt, edits), Truth("start-of-text competition", b.label, token="<start>")


def noun_split(pipe: Any, run: elakit.Run) -> tuple[Any, Truth]:
    """The second noun receives attention in two corners instead of in its entity's region."""
    b = run.prompt.entities[1]
    corners = np.zeros((16, 16), bool)
    corners[:5, :5] = corners[-5:, -5:] = True
    edits = [Edit(b, add=10, region=corners), Edit(b, add=-10, region=~corners)]
    return edit(pipe, run.prompt, edits), Truth("region split", b.label)


def nouns_swapped(pipe: Any, run: elakit.Run) -> tuple[Any, Truth]:
    """After a third of the steps, the nouns exchange their attention."""
    a, b, _, _ = _parts(run)
    late = slice(run.settings["steps"] // 3, None)
    edits = [Edit(a, like=b, steps=late), Edit(b, like=a, steps=late)]
    return edit(pipe, run.prompt, edits), Truth("regions swap", a.label, b.label)


def state_zeroed(pipe: Any, run: elakit.Run) -> tuple[Any, Truth]:
    """The second noun's text state is zero."""
    b = run.prompt.entities[1]
    zero = torch.zeros(pipe.text_encoder.config.hidden_size)
    return states(pipe, b.noun, lambda own: zero), Truth("token ignored", b.label)


def state_replaced(pipe: Any, run: elakit.Run) -> tuple[Any, Truth]:
    """The second noun has the text state of the first."""
    a, b, _, _ = _parts(run)
    other = state(pipe, run.prompt.text, a.noun)
    change = states(pipe, b.noun, lambda own: other, beside=a.noun)
    return change, Truth("text states alike", b.label, a.label)


def state_leaked(pipe: Any, run: elakit.Run) -> tuple[Any, Truth]:
    """The second noun has the text state that it has in a prompt with the first entity's color, "a red bird"."""
    a, b, _, _ = _parts(run)
    painted = state(pipe, f"a {a.attributes[0]} {b.noun}", b.noun)
    change = states(pipe, b.noun, lambda own: painted, beside=a.attributes[0])
    return change, Truth("text leakage", b.label, a.label, _label(run.prompt, a.attribute_indices[0]))


def state_mixed(pipe: Any, run: elakit.Run) -> tuple[Any, Truth]:
    """The second noun's text state is the mean of its own and that of the first entity's color."""
    a, b, _, _ = _parts(run)
    color = state(pipe, run.prompt.text, a.attributes[0])
    change = states(pipe, b.noun, lambda own: (own + color) / 2, beside=a.attributes[0])
    return change, Truth("text leakage", b.label, a.label, _label(run.prompt, a.attribute_indices[0]))


PLANTS = (
    Plant("color attends to the other object", True, attribute_moved),
    Plant("noun attends to the other's region", False, noun_moved),
    Plant("noun has the other noun's attention", False, noun_copied),
    Plant("noun masked", False, noun_masked),
    Plant("noun attends to every location", False, noun_spread),
    Plant("start-of-text raised", False, start_raised),
    Plant("start-of-text raised in the noun's region", False, start_raised_there),
    Plant("noun attends to two corners", False, noun_split),
    Plant("nouns swapped after a third of the steps", False, nouns_swapped),
    Plant("text state zeroed", False, state_zeroed),
    Plant("text state of the other noun", False, state_replaced),
    Plant("text state with the other entity's color", True, state_leaked),
    Plant("text state mixed with the other entity's color", True, state_mixed),
)


def state(pipe: Any, text: str, word: str) -> torch.Tensor:
    """Return the text state of a word in a text, (channels,)."""
    (position,) = elakit.parse(f"[{text}]" if "[" not in text else text, pipe).find(word)
    return adapter_for(pipe).encode(text, guided=False).inputs["encoder_hidden_states"][0, position].clone()


@contextmanager
def states(
    pipe: Any, word: str, change: Callable[[torch.Tensor], torch.Tensor], beside: str | None = None
) -> Iterator[None]:
    """Context in which `change` replaces the text state of a word in all texts, or in those that contain `beside`."""

    def number(one: str) -> int:
        (found,) = pipe.tokenizer(one, add_special_tokens=False)["input_ids"]
        return int(found)

    wanted, needed = number(word), number(beside or word)

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        for row, text in enumerate(ids.tolist()):
            if needed in text:
                for position, each in enumerate(text):
                    if each == wanted:
                        output[0][row, position] = change(output[0][row, position])

    handle = pipe.text_encoder.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _label(prompt: Prompt, position: int) -> str:
    return next(token.label for token in prompt.tokens if token.index == position)


def prompts(split: str) -> Iterator[tuple[bool, str]]:
    """Yield (True if it has colors, prompt) for the prompts of a split; no pair of nouns is in both splits.

    Prompts with and without colors alternate.
    """
    rng = np.random.default_rng(20)
    pairs = list(itertools.combinations(NOUNS, 2))
    rng.shuffle(pairs)
    chosen = pairs[list(SEEDS).index(split) :: 2]
    for i, pair in enumerate(chosen):
        nouns = rng.permutation(pair)
        colors = rng.permutation(COLORS)[:2] if i % 2 else ("", "")
        yield (
            bool(i % 2),
            " and ".join(f"a [{f'{color} {noun}'.strip()}]" for color, noun in zip(colors, nouns, strict=True)),
        )


@app.command()
def draw(split: Split = "report") -> None:
    """Generate the runs of a split; existing ones are kept."""
    pipe = elakit.load("picture-world")
    left = {True: PROMPTS[split][0], False: PROMPTS[split][1]}
    for colored, text in prompts(split):
        if not any(left.values()):
            break
        if not left[colored]:
            continue
        folder = OUT / split / "-".join(text.replace("[", "").replace("]", "").split())
        if not (folder / "done.json").exists():
            _draw(pipe, text, colored, SEEDS[split], folder)
        left[colored] -= json.loads((folder / "done.json").read_text())["right"] is not None
    for i, noun in enumerate(STRANGE):
        if i % 2 == list(SEEDS).index(split) and not (folder := OUT / split / f"strange {noun}").exists():
            text = f"a [{noun}] and a [car]" if i % 4 < 2 else f"a [cat] and a [{noun}]"
            elakit.generate(pipe, text, seed=SEEDS[split][0], progress=False).save(folder)


def _draw(pipe: Any, text: str, colored: bool, seeds: range, folder: Path) -> None:
    """Generate a prompt with the first seed whose image is right: one run without and one with each planted cause."""
    drawn = (elakit.generate(pipe, text, seed=seed, progress=False) for seed in seeds)
    right = next((run for run in drawn if run.verdict.success), None)
    if right is not None:
        right.save(folder / "clean", overwrite=True)
        for plant in PLANTS:
            if plant.colored == colored:
                context, _ = plant.make(pipe, right)
                with context:
                    broken = elakit.generate(pipe, right.prompt, seed=right.seed, progress=False)
                broken.save(folder / plant.name, overwrite=True)
    folder.mkdir(parents=True, exist_ok=True)
    done = {"text": text, "colored": colored, "right": right.seed if right else None}
    (folder / "done.json").write_text(json.dumps(done))
    print(done, flush=True)


@dataclass(frozen=True)
class Case:
    """Planted cause and reported cause of a run."""

    plant: str
    truth: Truth
    prompt: str
    failed: bool
    named: elakit.causes.Cause | None
    findings: elakit.causes.Findings

    @property
    def right(self) -> bool:
        """True if the first reported cause has the kind, the affected entity and the source of the planted one.

        Without a planted cause, it is True if no cause is reported.
        """
        if self.named is None or not self.truth.kind:
            return self.named is None and not self.truth.kind
        truth, named = self.truth, self.named
        if named.kind != truth.kind or (truth.token and named.token != truth.token):
            return False
        if truth.kind in MUTUAL:
            return {named.entity, named.other} == {truth.entity, truth.other}
        return truth.entity in ("", named.entity) and truth.other in ("", named.other)


def cases(split: str) -> Iterator[Case]:
    """Yield the analyzed runs of a split."""
    pipe = elakit.load("picture-world")
    folders = sorted(folder for folder in (OUT / split).iterdir() if (folder / "clean").exists())
    for i, folder in enumerate(tqdm(folders, leave=False)):
        clean = elakit.open_run(folder / "clean")
        yield _case(pipe, "nothing", Truth(""), clean)
        other = elakit.open_run(folders[i - 1] / "clean").image
        yield _case(pipe, "nothing, but the image of another run", Truth(""), replace(clean, image=other))
        for plant in PLANTS:
            if (folder / plant.name).exists():
                context, truth = plant.make(pipe, clean)
                with context:
                    yield _case(pipe, plant.name, truth, elakit.open_run(folder / plant.name))
    for folder in sorted((OUT / split).glob("strange *")):
        run = elakit.open_run(folder)
        noun = folder.name.partition(" ")[2]
        yield _case(pipe, "noun outside the training vocabulary", Truth("ambiguous word", noun), run)


def _case(pipe: Any, plant: str, truth: Truth, run: elakit.Run) -> Case:
    findings = elakit.causes.find(pipe, [run])
    failed = run.verdict is None or not run.verdict.success
    return Case(
        plant=plant,
        truth=truth,
        prompt=run.prompt.text,
        failed=failed,
        named=next(iter(findings.causes), None),
        findings=findings,
    )


@app.command()
def report(
    split: Split = "report",
    verbose: Annotated[bool, typer.Option(help="Also print each case that is not identified correctly.")] = False,
) -> None:
    """Find the causes of the runs of `draw`, and print the share of correct ones and the confusion matrix."""
    found = list(cases(split))
    counted = [case for case in found if case.failed or case.plant == "nothing"]
    names = dict.fromkeys(case.plant for case in found)
    print("| planted cause | cases | image became wrong | cause identified |")
    print("|---|---|---|---|")
    for name in names:
        mine = [case for case in counted if case.plant == name]
        print(f"| {name} | {sum(case.plant == name for case in found)} | {len(mine)} | {_share(mine)} |")
    planted = [case for case in counted if case.truth.kind]
    tried = sum(bool(case.truth.kind) for case in found)
    print(f"| **all planted causes** | {tried} | {len(planted)} | **{_share(planted)}** |")
    nulls = [case for case in counted if not case.truth.kind]
    print(f"| **all without a planted cause** | {len(nulls)} | | **{_share(nulls)}** |\n")
    kinds = [*dict.fromkeys(case.truth.kind for case in planted), ""]
    named = [*dict.fromkeys([*kinds, *(case.named.kind for case in counted if case.named)])]
    named.append(named.pop(named.index("")))
    print("| planted (rows), identified (columns) | " + " | ".join(kind or "none" for kind in named) + " |")
    print("|---" * (len(named) + 1) + "|")
    for kind in kinds:
        row = Counter(case.named.kind if case.named else "" for case in counted if case.truth.kind == kind)
        print(f"| {kind or 'nothing'} | " + " | ".join(str(row[other] or "") for other in named) + " |")
    print("\n| confidence of the first cause | cases | correct |\n|---|---|---|")
    for low, high in ((0.0, 0.6), (0.6, 0.75), (0.75, 0.9), (0.9, 1.01)):
        within = [case for case in counted if case.named and low <= case.named.confidence < high]
        print(f"| {low:.2f} to {min(high, 1):.2f} | {len(within)} | {_share(within)} |")
    if verbose:
        for case in counted:
            if not case.right:
                print("", case.plant, case.truth, case.findings, sep="\n")


def _share(found: list[Case]) -> str:
    right = sum(case.right for case in found)
    low, high = wilson(right, len(found))
    return f"{right} of {len(found)} ({low:.2f} to {high:.2f})" if found else "–"


if __name__ == "__main__":
    app()
