"""Remedies for a prompt that fails: what can be tried, and what came of it.

Guidance from the same noise, another seed, other words, regions by hand. Each is drawn, judged and timed like the plain
images it stands beside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil, sqrt
from typing import Any, Literal

import numpy as np

from elakit.attention import RecordSpec
from elakit.causes import wilson
from elakit.diagnosis.drawer import Drawer
from elakit.errors import ElakitError, SettingError
from elakit.generation import Run
from elakit.guidance import ELA, METHODS, Method, method_title, without_regions
from elakit.guidance.metadata import options_of
from elakit.prediction import FEATURES, Predictor
from elakit.prompt import Prompt, parse
from elakit.rewording import next_to, swapped

Kind = Literal["guidance", "seed", "wording", "regions"]
Status = Literal["tried", "failed", "not tried"]

# What is tried where nothing else is said, beside the method that is compared anyway.
DEFAULT = ("conform", "ebama", "another-seed", "swapped", "next-to", "regions")
OTHERS = ("another-seed", "swapped", "next-to", "regions")
# Of how many seeds one is chosen, and after which share of their steps.
TRIES, SHARE = 4, 0.3

_TITLES = {
    "another-seed": "Another seed", "swapped": "The other order", "next-to": "“next to”",
    "regions": "Regions by hand, with ELA",
}  # fmt: skip


@dataclass(frozen=True)
class Remedy:
    """Something to try.

    Attributes
    ----------
    name : str
        Of a method in `elakit.guidance.METHODS`, or one of `OTHERS`.
    kind : {"guidance", "seed", "wording", "regions"}
    what : str
        One sentence: what is done.
    prompt : Prompt
        That is drawn.
    method : str or None
        The guidance; None draws plainly.
    options : dict
        Its options, as plain values.
    guidance : Method or None
        It; None for a remedy that was opened from a folder.
    """

    name: str
    kind: Kind
    what: str
    prompt: Prompt
    method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    guidance: Method | None = field(default=None, repr=False, compare=False)

    @property
    def title(self) -> str:
        """What it is called in sentences and headings."""
        return _TITLES.get(self.name, method_title(self.name))


@dataclass(frozen=True)
class Tried:
    """What came of a remedy.

    Attributes
    ----------
    remedy : Remedy
    plain : tuple of Run
        The plain runs that its own stand beside.
    runs : tuple of Run
        In the same order; empty where it was not tried or failed.
    seconds : float
        Time of an image, with all that was drawn for it; see `Drawn`.
    cost : float
        The same, relative to a plain image; NaN where nothing was drawn.
    status : {"tried", "failed", "not tried"}
    why : str
        The error of a failed one; why it was not tried.
    candidates : tuple of dict
        Of another seed: what each seed was chosen from, as {"seed", "score", "chosen"}; the lowest score is chosen.
    chosen_by : str
        "probability of failure" or "bleeding" where seeds were chosen, else "".
    """

    remedy: Remedy
    plain: tuple[Run, ...]
    runs: tuple[Run, ...] = ()
    seconds: float = math.nan
    cost: float = math.nan
    status: Status = "tried"
    why: str = ""
    candidates: tuple[dict[str, Any], ...] = ()
    chosen_by: str = ""

    @property
    def judged(self) -> bool:
        """Whether a judge saw its images and the plain ones."""
        return bool(self.runs) and all(run.verdict is not None for run in (*self.runs, *self.plain))

    @property
    def right(self) -> int:
        """How many of its images are right."""
        return sum(_right(run) for run in self.runs)

    @property
    def rate(self) -> float:
        """Share of its images that are right; NaN where they were not judged."""
        return self.right / len(self.runs) if self.judged else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of `rate`; all that is possible where nothing was judged."""
        return wilson(self.right, len(self.runs)) if self.judged else (0.0, 1.0)

    @property
    def fixed(self) -> tuple[int, ...]:
        """Seeds of the plain images that are wrong and beside which its own is right."""
        return self._changed(False)

    @property
    def broken(self) -> tuple[int, ...]:
        """Seeds of the plain images that are right and beside which its own is wrong."""
        return self._changed(True)

    @property
    def harm(self) -> float:
        """Share of the plain images that are right of which it made wrong ones; NaN where none is right."""
        were = sum(_right(run) for run in self.plain) if self.judged else 0
        return len(self.broken) / were if were else math.nan

    @property
    def bleed(self) -> float:
        """Mean share of an entity's attention outside its own region, over steps, entities and runs."""
        return bleed(self.runs)

    @property
    def helps(self) -> bool:
        """Whether it did better than plain drawing: more images right; where not judged, less bleeding."""
        if self.status != "tried":
            return False
        if self.judged:
            return len(self.fixed) > len(self.broken)
        return self.bleed < bleed(self.plain)

    def to_dict(self) -> dict[str, Any]:
        """As plain values; NaN becomes None."""
        remedy, tried, judged = self.remedy, self.status == "tried", self.judged
        return {
            "name": remedy.name,
            "title": remedy.title,
            "kind": remedy.kind,
            "what": remedy.what,
            "prompt": remedy.prompt.text,
            "method": remedy.method,
            "options": remedy.options,
            "status": self.status,
            "why": self.why,
            "helps": self.helps,
            "images": len(self.runs),
            "right": self.right if judged else None,
            "rate": _or_none(self.rate),
            "interval": list(self.interval) if judged else None,
            "fixed": list(self.fixed) if judged else None,
            "broken": list(self.broken) if judged else None,
            "harm": _or_none(self.harm),
            "bleed": _or_none(self.bleed) if tried else None,
            "seconds": _or_none(self.seconds),
            "cost": _or_none(self.cost),
            "seeds": [run.seed for run in self.runs],
            "says": [None if run.verdict is None else str(run.verdict) for run in self.runs],
            "chosen_by": self.chosen_by,
            "candidates": list(self.candidates),
        }

    def _changed(self, was: bool) -> tuple[int, ...]:
        if not self.judged:
            return ()
        pairs = zip(self.plain, self.runs, strict=True)
        return tuple(before.seed for before, after in pairs if _right(before) is was and _right(after) is not was)


def ranked(tried: Iterable[Tried]) -> tuple[Tried, ...]:
    """Best first: most images right, then least harm, then least time; without a judge least bleeding, then time.

    What failed or was not tried comes last.

    Parameters
    ----------
    tried : iterable of Tried
    """

    def place(one: Tried) -> tuple[float, ...]:
        if one.status != "tried":
            return 2, one.status == "not tried"
        if one.judged:
            return 0, -one.rate, len(one.broken), one.cost
        return 1, one.bleed, one.cost

    return tuple(sorted(tried, key=place))


def bleed(runs: Sequence[Run]) -> float:
    """Mean bleed of runs over their steps and entities; NaN of none.

    Parameters
    ----------
    runs : sequence of Run
        Recorded.
    """
    frames = [run.bleeding.to_frame() for run in runs]
    values = [frame.loc[frame["measure"] == "bleed", "value"].mean() for frame in frames]
    return float(np.mean(values)) if values else math.nan


def side_by_side(entities: int) -> tuple[tuple[float, float, float, float], ...]:
    """A box for each entity: beside each other up to three, else in rows.

    Parameters
    ----------
    entities : int

    Returns
    -------
    tuple of (left, top, right, bottom)
        In shares of the image, row by row.

    Examples
    --------
    >>> side_by_side(2)
    ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
    >>> side_by_side(4)[3]
    (0.5, 0.5, 1.0, 1.0)
    """
    across = entities if entities <= 3 else ceil(sqrt(entities))
    down = ceil(entities / across)
    places = [divmod(i, across) for i in range(entities)]
    return tuple(
        (round(x / across, 4), round(y / down, 4), round((x + 1) / across, 4), round((y + 1) / down, 4))
        for y, x in places
    )


def check(remedies: bool | Sequence[str | Method]) -> tuple[str | Method, ...]:
    """The remedies asked for: True stands for `DEFAULT`, False for none.

    Raises
    ------
    SettingError
        One that is none, or a method that cannot do without regions.

    Examples
    --------
    >>> check(["swapped", "magic"])
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: There is no remedy 'magic'. Choose from ela, ...
    """
    if isinstance(remedies, str):
        remedies = [remedies]
    chosen: Sequence[str | Method] = (DEFAULT if remedies else ()) if isinstance(remedies, bool) else remedies
    for one in chosen:
        if isinstance(one, str) and one in METHODS:
            without_regions(one)
        elif isinstance(one, str) and one not in OTHERS:
            raise SettingError(f"There is no remedy {one!r}. Choose from {', '.join((*METHODS, *OTHERS))}.")
    return tuple(dict.fromkeys(chosen))


def remedy(which: str | Method, prompt: Prompt, pipe: Any) -> Remedy:
    """A remedy for a prompt.

    Parameters
    ----------
    which : str or Method
        As `check` gives them.
    prompt : Prompt
    pipe : diffusers.DiffusionPipeline
        Reads other words.

    Raises
    ------
    NotApplicable
        It would change nothing.
    """
    if not isinstance(which, str) or which in METHODS:
        guidance = without_regions(which) if isinstance(which, str) else which
        return guided(guidance, prompt)
    if which == "another-seed":
        what = (
            f"For each seed {TRIES} others are begun, and after {SHARE:.0%} of the steps the most promising of them is "
            "drawn to its end."
        )
        return Remedy(which, "seed", what, prompt)
    if which == "regions":
        boxes = side_by_side(_several(prompt))
        guidance = ELA(regions=boxes)
        what = "Each entity is held in a box of its own, side by side in the order of the prompt."
        return Remedy(which, "regions", what, prompt, guidance.name, options_of(guidance), guidance)
    _several(prompt)
    text = {"swapped": swapped, "next-to": next_to}[which](prompt)
    if text is None:
        same = "its entities are alike" if which == "swapped" else "it does not list its entities with “and” or a comma"
        raise NotApplicable(f"there is nothing to reword: {same}")
    other = parse(text, pipe)
    return Remedy(which, "wording", f"Worded “{other.text}”.", other)


def guided(guidance: Method, prompt: Prompt) -> Remedy:
    """Guidance of the same prompt from the same noise, as a remedy."""
    what = "From the same noise, guided."
    return Remedy(guidance.name, "guidance", what, prompt, guidance.name, options_of(guidance), guidance)


class NotApplicable(ElakitError):
    """A remedy that would change nothing for this prompt."""


def attempt(
    which: str | Method,
    prompt: Prompt,
    drawer: Drawer,
    plain: Sequence[Run],
    plain_seconds: float,
    predictor: Predictor | None = None,
) -> Tried:
    """Try a remedy; one that fails is reported as failed, and nothing is raised.

    Parameters
    ----------
    which : str or Method
    prompt : Prompt
    drawer : Drawer
    plain : sequence of Run
        The plain runs that it is to stand beside.
    plain_seconds : float
        Time of a plain image.
    predictor : Predictor, optional
        Chooses seeds; without one the seed that bleeds least is taken.
    """
    beside = tuple(plain)
    name = which if isinstance(which, str) else which.name
    try:
        chosen = remedy(which, prompt, drawer.pipe)
    except NotApplicable as error:
        return Tried(Remedy(name, _kind(name), "", prompt), beside, status="not tried", why=str(error))
    except Exception as error:
        return _failed(Remedy(name, _kind(name), "", prompt), beside, error)
    try:
        if chosen.kind == "seed":
            return _other_seeds(chosen, drawer, beside, plain_seconds, predictor)
        drawn = drawer.draw(
            chosen.prompt, [run.seed for run in beside], chosen.guidance, what=chosen.title, record=_ENTITIES
        )
        tried = Tried(chosen, beside, drawn.runs, drawn.seconds, drawn.seconds / plain_seconds)
        tried.to_dict()  # judged and measured here, so that what fails in that is reported too
        return tried
    except Exception as error:
        return _failed(chosen, beside, error)


def usable(predictor: Predictor | None, model: str) -> bool:
    """Whether a predictor was fitted on a model's images.

    Parameters
    ----------
    predictor : Predictor or None
    model : str
        As `elakit.models.name_of` gives it.
    """
    if predictor is None or SHARE not in predictor.shares or "failure" not in predictor.outcomes:
        return False
    return predictor.features == FEATURES and model in predictor.about.get("model", ())


_ENTITIES = RecordSpec(tokens="entities")


def _other_seeds(
    chosen: Remedy, drawer: Drawer, plain: tuple[Run, ...], plain_seconds: float, predictor: Predictor | None
) -> Tried:
    """For each plain run the most promising of a few fresh seeds, drawn to its end."""
    count = len(plain)
    first = max(run.seed for run in plain) + 1
    seeds = list(range(first, first + TRIES * count))
    begun = ceil(SHARE * drawer.steps - 1e-9)
    trials = drawer.draw(chosen.prompt, seeds, what="choosing seeds", record=_ENTITIES, stop_after=begun)
    score: Callable[[Run], float] = _bleed_so_far
    by = "bleeding"
    if predictor is not None and usable(predictor, plain[0].settings["model"]):
        predict = predictor.predict

        def score(run: Run) -> float:
            return float(predict(run)["failure"].iloc[-1])

        by = "probability of failure"
    scores = {run.seed: score(run) for run in trials.runs}
    groups = [seeds[i * TRIES : (i + 1) * TRIES] for i in range(count)]
    best = [min(group, key=scores.__getitem__) for group in groups]
    finished = drawer.draw(chosen.prompt, best, what=chosen.title, record=_ENTITIES)
    seconds = finished.seconds + TRIES * trials.seconds
    candidates = tuple({"seed": seed, "score": scores[seed], "chosen": seed in best} for seed in seeds)
    return Tried(
        chosen, plain, finished.runs, seconds, seconds / plain_seconds, candidates=candidates, chosen_by=by
    )  # fmt: skip


def _bleed_so_far(run: Run) -> float:
    return float(run.measure().to_frame().query("measure == 'bleed'")["value"].mean())


def _failed(chosen: Remedy, plain: tuple[Run, ...], error: Exception) -> Tried:
    why = str(error) if isinstance(error, ElakitError) else f"{type(error).__name__}: {error}"
    return Tried(chosen, plain, status="failed", why=why)


def _kind(name: str) -> Kind:
    kinds: dict[str, Kind] = {"another-seed": "seed", "regions": "regions", "swapped": "wording", "next-to": "wording"}
    return kinds.get(name, "guidance")


def _several(prompt: Prompt) -> int:
    if len(prompt.entities) < 2:
        raise NotApplicable("the prompt names one thing only")
    return len(prompt.entities)


def _right(run: Run) -> bool:
    return run.verdict is not None and bool(run.verdict.success)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
