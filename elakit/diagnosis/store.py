"""A diagnosis in a folder: its runs as `Run.save` writes them, and ``diagnosis.json``, which ties them together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elakit.causes import Cause, Failure, Findings
from elakit.diagnosis.drawer import Shelf, key_of_run
from elakit.diagnosis.remedies import Remedy, Tried
from elakit.errors import OutputError
from elakit.files import write_file
from elakit.generation import Run, open_run
from elakit.prompt import Prompt

if TYPE_CHECKING:
    from elakit.diagnosis.result import Diagnosis


def save(diagnosis: Diagnosis, folder: str | Path) -> Path:
    """As `Diagnosis.save`."""
    shelf = Shelf(folder)

    def keep(run: Run, seconds: float) -> str:
        key = key_of_run(run)
        if not shelf.has(key):
            shelf.put(key, run, seconds)
        return key

    images = 2 * len(diagnosis.pairs)
    tried = [
        {
            "remedy": {
                "name": one.remedy.name, "kind": one.remedy.kind, "what": one.remedy.what,
                "prompt": one.remedy.prompt.to_dict(), "method": one.remedy.method, "options": one.remedy.options,
            },
            "runs": [keep(run, one.seconds) for run in one.runs],
            "seconds": _number(one.seconds), "cost": _number(one.cost), "status": one.status, "why": one.why,
            "candidates": one.candidates, "chosen_by": one.chosen_by,
        }
        for one in diagnosis.remedies
    ]  # fmt: skip
    kept = {
        "prompt": diagnosis.prompt.to_dict(),
        "method": diagnosis.method,
        "options": diagnosis.options,
        "plain": [keep(pair.plain, diagnosis.seconds / images) for pair in diagnosis.pairs],
        "guided": [keep(pair.guided, diagnosis.seconds / images) for pair in diagnosis.pairs],
        "seconds": diagnosis.seconds,
        "findings": None if diagnosis.findings is None else diagnosis.findings.to_dict(),
        "remedies": tried,
        "predicted": {str(seed): value for seed, value in diagnosis.predicted.items()},
        "problems": diagnosis.problems,
    }
    write_file(shelf.folder / "diagnosis.json", json.dumps({**diagnosis.to_dict(), "kept": kept}, indent=1).encode())
    return shelf.folder


def open_diagnosis(folder: str | Path) -> Diagnosis:
    """Open a diagnosis that `Diagnosis.save` wrote.

    Parameters
    ----------
    folder : str or Path

    Returns
    -------
    Diagnosis

    Raises
    ------
    OutputError
        The folder holds no finished diagnosis, or a run of it is missing.

    Examples
    --------
    >>> import elakit
    >>> from tempfile import TemporaryDirectory
    >>> found = elakit.diagnose(elakit.load("picture-world"), "a [cat] and a [lion]", seeds=1, steps=2)
    >>> with TemporaryDirectory() as folder:
    ...     again = elakit.open_diagnosis(found.save(folder))
    ...     again.to_dict() == found.to_dict()
    True
    """
    from elakit.diagnosis.result import Diagnosis, Pair

    folder = Path(folder)
    try:
        kept = json.loads((folder / "diagnosis.json").read_text(encoding="utf-8"))["kept"]
        opened: dict[str, Run] = {}

        def run(key: str) -> Run:
            if key not in opened:
                opened[key] = open_run(folder / "runs" / key)
            return opened[key]

        plain, guided = ([run(key) for key in kept[name]] for name in ("plain", "guided"))
        return Diagnosis(
            Prompt.from_dict(kept["prompt"]),
            kept["method"],
            _options(kept["options"]),
            tuple(Pair(a, b, a.verdict, b.verdict) for a, b in zip(plain, guided, strict=True)),
            kept["seconds"],
            _findings(kept["findings"], Prompt.from_dict(kept["prompt"])),
            tuple(
                Tried(
                    _remedy(one["remedy"]),
                    tuple(plain),
                    tuple(run(key) for key in one["runs"]),
                    _or_nan(one["seconds"]),
                    _or_nan(one["cost"]),
                    one["status"],
                    one["why"],
                    tuple(one["candidates"]),
                    one["chosen_by"],
                )
                for one in kept["remedies"]
            ),
            {int(seed): value for seed, value in kept["predicted"].items()},
            tuple(kept["problems"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{folder} holds no finished diagnosis ({error}). Give a folder that `found.save(...)` or "
            "`elakit diagnose --keep` wrote; one that was ended goes on when it is diagnosed again."
        ) from error


def _remedy(plain: Mapping[str, Any]) -> Remedy:
    kept = {**plain, "prompt": Prompt.from_dict(plain["prompt"]), "options": _options(plain["options"])}
    return Remedy(**kept)


def _options(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _tuples(value) for name, value in plain.items()}


def _findings(plain: Mapping[str, Any] | None, prompt: Prompt) -> Findings | None:
    if plain is None:
        return None
    return Findings(
        prompt,
        tuple(plain["seeds"]),
        plain["judged"],
        tuple(_built(Failure, one) for one in plain["failures"]),
        tuple(_built(Cause, one) for one in plain["causes"]),
    )


def _built(kind: type[Any], plain: Mapping[str, Any]) -> Any:
    """A dataclass of what its to_dict gave, JSON's lists as tuples."""
    names = {field.name for field in fields(kind)}
    return kind(**{name: _tuples(value) for name, value in plain.items() if name in names})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _number(value: float) -> float | None:
    return None if value != value else value


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
