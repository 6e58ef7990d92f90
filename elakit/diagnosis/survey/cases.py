"""Cases of a survey. A case is one prompt to diagnose; its results are an HTML page and a JSON file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from elakit import checks
from elakit.diagnosis import Diagnosis, commands, report
from elakit.diagnosis.procedure import diagnose
from elakit.diagnosis.trials import check
from elakit.errors import OutputError, SettingError
from elakit.files import read_json, write_json
from elakit.models import load
from elakit.models.library import hide_loading_bars
from elakit.plot.image_figures import data_uri
from elakit.prediction import load_predictor
from elakit.seeds import seed_list
from elakit.sweep.options import canonical_options
from elakit.sweep.units import Unit, check_prompts, checked_sizes

# Longest side of the images in the summary, in pixels.
SMALL = 96


@dataclass(frozen=True)
class Case(Unit):
    """One prompt of a survey, with the settings of its diagnosis.

    A case has all fields of `elakit.sweep.units.Unit`: model, prompt, seeds, guidance method and settings. Two more
    fields are added:

    Attributes
    ----------
    remedies : tuple of str
        Names of the remedies to try, as in `elakit.diagnose`.
    predictor : str, optional
        Path of a file with a failure predictor. None stands for the predictor that is part of elakit.

    Examples
    --------
    The name of a case's HTML page begins with the words of the prompt. Cases with different settings have different
    pages, even if the prompt is the same:

    >>> case = Case("picture-world", "a cat and a lion", (0, 1), "ela", remedies=("swapped",))
    >>> case.page == Case("picture-world", "a cat and a lion", (0, 1), "ela").page, case.page.split("-")[:4]
    (False, ['a', 'cat', 'and', 'a'])
    """

    remedies: tuple[str, ...] = ()
    predictor: str | None = None

    @property
    def page(self) -> str:
        """File name of the case's HTML page: the first words of the prompt, and a part of a hash of all settings."""
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:50].strip("-")
        return f"{words or 'prompt'}-{self.key[:8]}.html"

    def complete(self, folder: Path) -> bool:
        """True if the folder of a survey contains readable results of the case."""
        try:
            return case_file(folder, self.key).exists() and bool(read_case(case_file(folder, self.key)))
        except OutputError:
            return False


def plan_cases(
    prompts: Iterable[str],
    seeds: Sequence[int],
    *,
    method: str = "ela",
    options: Mapping[str, Any] | None = None,
    remedies: bool | Sequence[str] = True,
    model: str = "picture-world",
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    scheduler: str | None = None,
    lora: str | None = None,
    variant: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    predictor: str | Path | None = None,
) -> list[Case]:
    """List the cases of a survey, one per distinct prompt.

    Parameters
    ----------
    prompts : iterable of str
        Prompts; a repeated prompt counts once.
    seeds : sequence of int
        Distinct seeds.
    method : str
        Name of the guidance method.
    options : mapping of str to object, optional
        Options of the method that differ from their defaults.
    remedies : bool or sequence of str
        Names of the remedies to try in addition to the method. True stands for the default remedies, False for none.
    steps, guidance_scale, negative_prompt, height, width
        As in `elakit.diagnose`.
    model, scheduler, lora, variant, device, dtype
        As in `elakit.load`.
    predictor : str or Path, optional
        File written by `elakit.prediction.Predictor.save`; by default the predictor that is part of elakit.

    Returns
    -------
    list of Case

    Raises
    ------
    SettingError
        There is no prompt or no seed; `prompts` is a single string; a seed is repeated; a number is out of range; or
        the method, an option or a remedy is unknown.
    """
    check_prompts(prompts)
    texts = list(dict.fromkeys(prompts))
    if not texts:
        raise SettingError("There is no prompt to diagnose. Give at least one.")
    numbers = tuple(seed_list(seeds))
    tried = tuple(str(name) for name in check(remedies))
    steps, height, width = checked_sizes(steps, height, width)
    if guidance_scale is not None:
        guidance_scale = checks.real_number(guidance_scale, "guidance_scale", 0)
    return [
        Case(
            model=model,
            prompt=text,
            seeds=numbers,
            method=method,
            options=canonical_options(method, options or {}),
            steps=steps,
            guidance_scale=guidance_scale,
            device=device,
            dtype=dtype,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            scheduler=scheduler,
            lora=lora,
            variant=variant,
            remedies=tried,
            predictor=None if predictor is None else str(Path(predictor).absolute()),
        )
        for text in texts
    ]


def diagnose_case(case: Case, folder: str) -> list[dict[str, Any]]:
    """Diagnose the prompt of a case, and write its page and its results as JSON.

    Parameters
    ----------
    case : Case
    folder : str
        Folder of the survey.

    Returns
    -------
    list of dict
        One row per seed. A row contains the settings of the case (`Case.labels`), and the keys "seed", "steps",
        "guidance_scale" and "success". "success" is True if the guided image is right, False if it is wrong, and None
        if it was not judged.
    """
    found = diagnose(
        _pipeline(case.model, **case.loading()),
        case.prompt,
        seeds=list(case.seeds),
        method=case.guidance() or case.method,
        remedies=case.remedies,
        **case.generation(),
        predictor=None if case.predictor is None else load_predictor(case.predictor),
    )
    place = Path(folder)
    report.write(found, place / "pages" / case.page, commands.command(found))
    write_json(
        case_file(place, case.key),
        {**found.to_dict(), "given": case.prompt, "page": f"pages/{case.page}", "images": _images(found)},
    )
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


def case_file(folder: Path, key: str) -> Path:
    """Path of the JSON file with the results of a case, given the folder of the survey and the key of the case."""
    return folder / "cases" / f"{key}.json"


def read_case(path: Path) -> dict[str, Any]:
    """Read the results of a case from a JSON file. A case is the diagnosis of one prompt of a survey.

    Raises
    ------
    OutputError
        The file cannot be read, or does not contain the results of a case.
    """
    found = read_json(path)
    needed = ("given", "plain", "findings", "remedies", "best", "images", "page", "seconds")
    if not isinstance(found, dict) or (missing := [name for name in needed if name not in found]):
        lacking = f" It lacks {', '.join(missing)}." if isinstance(found, dict) else ""
        raise OutputError(f"{path} does not contain the results of a diagnosis.{lacking} Run the survey again.")
    return found


def _images(found: Diagnosis) -> dict[str, str]:
    """Images that represent a diagnosis on the summary page, as data URIs with the keys "plain" and "best".

    "plain" is the first plain image that the best remedy fixed. If no image was fixed, "plain" is the first plain image
    that was not judged right. If all plain images are right, "plain" is the first plain image. "best" is the image of
    the best remedy that is compared with this plain image. Without a best remedy, the key "best" is absent.
    """
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
def _pipeline(model: str, **settings: str | None) -> Any:
    hide_loading_bars()  # those of several workers would interleave with each other and with the survey's own bar
    return load(model, **settings)
