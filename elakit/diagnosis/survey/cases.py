"""One prompt of many: what a worker is given, and what it leaves in the folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import transformers

from elakit.diagnosis import Diagnosis, commands, report
from elakit.diagnosis.procedure import diagnose
from elakit.diagnosis.remedies import check
from elakit.errors import SettingError
from elakit.files import write_file
from elakit.models import load
from elakit.plot.images import data_uri
from elakit.prediction import load_predictor
from elakit.sweep.units import Unit, settle

# Longest side of the images in the summary.
SMALL = 96


@dataclass(frozen=True)
class Case(Unit):
    """One prompt to diagnose: a unit of a sweep, with the remedies that are tried.

    Attributes
    ----------
    remedies : tuple of str
        As `elakit.diagnose` takes them.
    predictor : str, optional
        File of a predictor; by default the shipped one.

    Examples
    --------
    >>> case = Case("picture-world", "a cat and a lion", (0, 1), "ela", remedies=("swapped",))
    >>> case.page == Case("picture-world", "a cat and a lion", (0, 1), "ela").page, case.page.split("-")[:4]
    (False, ['a', 'cat', 'and', 'a'])
    """

    remedies: tuple[str, ...] = ()
    predictor: str | None = None

    @property
    def page(self) -> str:
        """Name of its page: readable, and of no other prompt."""
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:50].strip("-")
        return f"{words or 'prompt'}-{self.key[:8]}.html"


def cases(
    prompts: Iterable[str],
    seeds: Sequence[int],
    *,
    method: str = "ela",
    remedies: bool | Sequence[str] = True,
    model: str = "picture-world",
    steps: int | None = None,
    guidance_scale: float | None = None,
    device: str | None = None,
    dtype: str | None = None,
    predictor: str | Path | None = None,
) -> list[Case]:
    """The cases of some prompts, each prompt once.

    Parameters
    ----------
    prompts : iterable of str
    seeds : sequence of int
    method, remedies, steps, guidance_scale, predictor
        As in `elakit.diagnose`, but by name.
    model, device, dtype
        As `elakit.load` takes them.

    Returns
    -------
    list of Case

    Raises
    ------
    SettingError
        No prompt, no seed or one given twice, an unknown method or remedy.
    """
    texts = list(dict.fromkeys(prompts))
    if not texts:
        raise SettingError("There is no prompt to diagnose; give some.")
    numbers = tuple(int(seed) for seed in seeds)
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise SettingError(f"seeds={list(seeds)}: give one or more whole numbers of 0 or more, each once.")
    tried = tuple(str(name) for name in check(remedies))
    options = settle(method, {})
    scale = None if guidance_scale is None else float(guidance_scale)
    file = None if predictor is None else str(Path(predictor).absolute())
    return [
        Case(
            model, text, numbers, method, options, steps, scale, device=device, dtype=dtype, remedies=tried,
            predictor=file,
        )
        for text in texts
    ]  # fmt: skip


def draw(case: Case, folder: str) -> list[dict[str, Any]]:
    """Diagnose a prompt; write its page, then what was found as JSON.

    Parameters
    ----------
    case : Case
    folder : str

    Returns
    -------
    list of dict
        A row a seed, as a sweep keeps them.
    """
    place = Path(folder)
    found = diagnose(
        _pipeline(case.model, case.device, case.dtype),
        case.prompt,
        seeds=list(case.seeds),
        method=case.guidance() or case.method,
        remedies=case.remedies,
        steps=case.steps,
        guidance_scale=case.guidance_scale,
        predictor=None if case.predictor is None else load_predictor(case.predictor),
    )
    report.write(found, place / "pages" / case.page, commands.command(found))
    kept = {**found.to_dict(), "given": case.prompt, "page": f"pages/{case.page}", "images": _images(found)}
    write_file(place / "cases" / f"{case.key}.json", json.dumps(kept, indent=1).encode())
    settings = found.pairs[0].plain.settings
    return [
        {
            **case.labels(),
            "seed": pair.seed,
            "steps": settings["steps"],
            "guidance_scale": settings["guidance_scale"],
            "success": None if pair.guided_verdict is None else pair.guided_verdict.success,
        }
        for pair in found.pairs
    ]


def _images(found: Diagnosis) -> dict[str, str]:
    """A plain image that is wrong, if one is, and what the best remedy made of it."""
    wrong = [i for i, run in enumerate(found.plain) if run.verdict is None or not run.verdict.success]
    best = found.best
    seeds = [run.seed for run in found.plain]
    fixed = [seeds.index(seed) for seed in best.fixed] if best is not None else []
    shown = (fixed or wrong or [0])[0]
    images = {"plain": data_uri(found.plain[shown].image, SMALL)}
    if best is not None:
        images["best"] = data_uri(best.runs[shown].image, SMALL)
    return images


@lru_cache(maxsize=1)
def _pipeline(model: str, device: str | None, dtype: str | None) -> Any:
    # loading bars of several workers would run into each other, and into the survey's own
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    return load(model, device=device, dtype=dtype)
