"""Storage of a diagnosis in a folder: its runs, and ``diagnosis.json``, which refers to the runs by their keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from elakit.causes import Cause, Failure, Findings
from elakit.causes.findings import with_current_kinds
from elakit.diagnosis.data import DiagnosisData, Pair
from elakit.diagnosis.remedies import Remedy, RemedyResult
from elakit.diagnosis.run_store import RunStore, key_of_run
from elakit.errors import OutputError, clause
from elakit.files import read_json, write_json
from elakit.prompt import Prompt
from elakit.run import Run, open_run


def write_diagnosis(data: DiagnosisData, document: Mapping[str, Any], folder: str | Path) -> Path:
    """Store a diagnosis in a folder: first the runs, then ``diagnosis.json``.

    Parameters
    ----------
    data : DiagnosisData
    document : mapping
        Content of ``diagnosis.json``, from `Diagnosis.to_dict`. The key "stored" is added, from which `read_fields`
        restores the diagnosis.
    folder : str or Path
        A new folder, or a folder that already contains a diagnosis.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    OutputError
        The folder contains files that do not belong to a diagnosis, or cannot be written to.
    """
    store = RunStore(folder)

    def save(run: Run, seconds: float) -> str:
        key = key_of_run(run)
        if not store.contains(key):
            store.write(key, run, seconds)
        return key

    per_image = data.seconds / (2 * len(data.pairs))
    stored = {
        "prompt": data.prompt.to_dict(),
        "method": data.method,
        "options": data.options,
        "plain": [save(pair.plain, per_image) for pair in data.pairs],
        "guided": [save(pair.guided, per_image) for pair in data.pairs],
        "seconds": data.seconds,
        "findings": None if data.findings is None else data.findings.to_dict(),
        "remedies": [_plain_result(one, [save(run, one.seconds) for run in one.runs]) for one in data.remedies],
        "predicted": {str(seed): value for seed, value in data.predicted.items()},
        "problems": data.problems,
    }
    write_json(store.folder / "diagnosis.json", {**document, "stored": stored})
    return store.folder


def read_fields(folder: str | Path) -> dict[str, Any]:
    """Read the fields of a `DiagnosisData`, by name, from a folder that `write_diagnosis` wrote.

    Raises
    ------
    OutputError
        The folder contains no finished diagnosis, or a run is missing.
    """
    folder = Path(folder)
    try:
        stored = read_json(folder / "diagnosis.json")["stored"]
        opened: dict[str, Run] = {}

        def run(key: str) -> Run:
            if key not in opened:
                opened[key] = open_run(folder / "runs" / key)
            return opened[key]

        plain, guided = ([run(key) for key in stored[name]] for name in ("plain", "guided"))
        prompt = Prompt.from_dict(stored["prompt"])
        return {
            "prompt": prompt,
            "method": stored["method"],
            "options": _options(stored["options"]),
            "pairs": tuple(Pair(a, b, a.verdict, b.verdict) for a, b in zip(plain, guided, strict=True)),
            "seconds": stored["seconds"],
            "findings": _findings(stored["findings"], prompt),
            "remedies": tuple(
                _result(one, tuple(plain), tuple(run(key) for key in one["runs"])) for one in stored["remedies"]
            ),
            "predicted": {int(seed): value for seed, value in stored["predicted"].items()},
            "problems": tuple(stored["problems"]),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(
            f"{folder} contains no finished diagnosis ({clause(error)}). Give a folder written by `Diagnosis.save` or "
            "`elakit diagnose --keep`. To resume an interrupted diagnosis, run it again with the same folder."
        ) from error


def _plain_result(result: RemedyResult, runs: list[str]) -> dict[str, Any]:
    remedy = result.remedy
    return {
        "remedy": {
            "name": remedy.name, "kind": remedy.kind, "what": remedy.what, "prompt": remedy.prompt.to_dict(),
            "method": remedy.method, "options": remedy.options,
        },
        "runs": runs,
        "seconds": _number(result.seconds), "cost": _number(result.cost), "status": result.status, "why": result.why,
        "candidates": result.candidates, "chosen_by": result.chosen_by,
    }  # fmt: skip


def _result(stored: Mapping[str, Any], plain: tuple[Run, ...], runs: tuple[Run, ...]) -> RemedyResult:
    remedy = stored["remedy"]
    return RemedyResult(
        remedy=Remedy(
            **{**remedy, "prompt": Prompt.from_dict(remedy["prompt"]), "options": _options(remedy["options"])}
        ),
        plain=plain,
        runs=runs,
        seconds=_or_nan(stored["seconds"]),
        cost=_or_nan(stored["cost"]),
        status=stored["status"],
        why=stored["why"],
        candidates=tuple(stored["candidates"]),
        chosen_by=stored["chosen_by"],
    )


def _options(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _tuples(value) for name, value in plain.items()}


def _findings(plain: Mapping[str, Any] | None, prompt: Prompt) -> Findings | None:
    if plain is None:
        return None
    plain = with_current_kinds(plain)
    return Findings(
        prompt=prompt,
        seeds=tuple(plain["seeds"]),
        judged=plain["judged"],
        failures=tuple(_built(Failure, one) for one in plain["failures"]),
        causes=tuple(_built(Cause, one) for one in plain["causes"]),
    )


def _built(kind: type[Any], plain: Mapping[str, Any]) -> Any:
    """Build an instance of the dataclass `kind` from a dictionary that was read from JSON. Lists become tuples."""
    names = {field.name for field in fields(kind)}
    return kind(**{name: _tuples(value) for name, value in plain.items() if name in names})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _number(value: float) -> float | None:
    return None if value != value else value


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
