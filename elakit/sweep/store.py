"""Files of a sweep: its settings, one Parquet file per finished unit, one JSON note per failed unit, and images.

Every file is written under a temporary name and renamed, so that an interrupted sweep leaves complete files only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet

from elakit.errors import OutputError, SettingError, clause
from elakit.files import read_json, write_file, write_json
from elakit.numbering import number_of, plural
from elakit.prompt import Prompt
from elakit.sweep.units import OPTIONAL, Unit

_TEXT, _INTEGER, _NUMBER, _BOOLEAN = pa.string(), pa.int64(), pa.float64(), pa.bool_()
SCHEMA = pa.schema(
    {
        "prompt": _TEXT, "suite": _TEXT, "seed": _INTEGER, "method": _TEXT, "options": _TEXT,
        "success": _BOOLEAN, "neglect": _BOOLEAN, "mixture": _BOOLEAN, "wrong_color": _BOOLEAN, "blocked": _BOOLEAN,
        "extra": _INTEGER, "present": _NUMBER, "score": _NUMBER,
        "bleed": _NUMBER, "intrusion": _NUMBER, "spill": _NUMBER, "ruzicka": _NUMBER, "attribute_bleed": _NUMBER,
        "loss_first": _NUMBER, "loss_last": _NUMBER, "skipped": _INTEGER, "refinements": _INTEGER, "seconds": _NUMBER,
        "model": _TEXT, "steps": _INTEGER, "guidance_scale": _NUMBER, "device": _TEXT, "dtype": _TEXT,
        "detector": _TEXT, "negative_prompt": _TEXT, "height": _INTEGER, "width": _INTEGER, "scheduler": _TEXT,
        "lora": _TEXT, "variant": _TEXT, "key": _TEXT, "parsed": _TEXT, "features": pa.list_(pa.float32()),
    }
)  # fmt: skip
# Settings within which images are compared, and the columns that identify an image. The device is not among them: the
# noise is the same on every device.
SETTINGS = ("model", "detector", "dtype", "steps", "guidance_scale", *OPTIONAL)
IMAGE = ("suite", "prompt", "seed", *SETTINGS)
IDENTITY = (*IMAGE, "method", "options")


@dataclass(frozen=True)
class Result:
    """Rows of a finished unit and, if images are kept, the PNG bytes of each image by its seed."""

    rows: pa.Table
    images: dict[int, bytes] = field(default_factory=dict)


def table(folder: str | Path, scores: bool = True) -> pd.DataFrame:
    """Read the table of a sweep: one row per image, sorted by suite, prompt, seed, settings, method and options.

    Parameters
    ----------
    folder : str or Path
        Folder of the sweep.
    scores : bool
        Whether the columns that `elakit.sweep.score` computed are added.

    Returns
    -------
    pandas.DataFrame
        An image that two units have in common appears once. Unknown values are missing. Columns:

        - prompt, suite, seed, method, options (of the method, as JSON).
        - The verdict of the judge: success, neglect, mixture, wrong_color, extra (number of things that the prompt does
          not ask for), present (share of the entities that are in the image), score (mean confidence of the judge in
          the things that it finds in the image, 0 to 1).
        - blocked: True if the safety checker replaced the image, which is therefore not judged.
        - bleed, intrusion, spill, ruzicka, attribute_bleed: means over steps and entities.
        - loss_first, loss_last: losses in the first and the last row of the trace of the guidance; skipped: number of
          steps whose gradient was not finite; refinements: number of refinements at all steps.
        - seconds: generation time per image.
        - model, steps, guidance_scale, device, dtype, detector; negative_prompt, height, width, scheduler, lora and
          variant are missing if the default of the model was used.
        - key (of the unit), parsed (the parsed prompt as JSON, which `parsed_prompt` reads), features (the table of
          `elakit.prediction.features` as one list, row by row).

    Raises
    ------
    OutputError
        The folder contains no finished unit, or a file cannot be read; the message names the files.
    """
    folder = Path(folder)
    paths = sorted((folder / "units").glob("*.parquet"))
    if not paths:
        raise OutputError(
            f"{folder} contains no finished unit of a sweep. Generate some with  elakit sweep run --out {folder}"
        )
    tables, broken = [], {}
    for path in paths:
        try:
            tables.append(_read(path))
        except (pa.ArrowException, OSError, ValueError) as error:
            broken[path.name] = (str(error).splitlines() or [""])[0]
    if broken:
        named = ", ".join(f"{name} ({reason})" for name, reason in broken.items())
        raise OutputError(
            f"{len(broken)} of {number_of(len(paths), 'unit')} in {folder / 'units'} cannot be read: {named}. Delete "
            f"{'this file' if len(broken) == 1 else 'these files'} and run the sweep again to generate the "
            f"{plural('unit', len(broken))} again."
        )
    kinds = {_INTEGER: pd.Int64Dtype(), _BOOLEAN: pd.BooleanDtype()}
    frame: pd.DataFrame = pa.concat_tables(tables).to_pandas(types_mapper=kinds.get)
    frame = frame.sort_values([*IDENTITY, "key"], kind="stable").drop_duplicates(list(IDENTITY))
    return _with_scores(folder, frame.reset_index(drop=True)) if scores else frame.reset_index(drop=True)


def score_file(folder: Path, scorer: str) -> Path:
    """Path of the file with the scores that a scorer computed, whether or not it exists."""
    return folder / "scores" / f"{scorer}.parquet"


def parsed_prompt(text: str) -> Prompt:
    """Prompt of a row of the table, from the text in its column "parsed".

    Raises
    ------
    OutputError
        The text is missing, as in sweeps of older releases, or is not a prompt in JSON.
    """
    try:
        return Prompt.from_dict(json.loads(text))
    except (TypeError, ValueError, KeyError) as error:
        raise OutputError(
            "The sweep does not contain the parsed prompts, because it was run with an older release. Run it again in "
            "a new folder with this release."
        ) from error


def _with_scores(folder: Path, frame: pd.DataFrame) -> pd.DataFrame:
    for path in sorted((folder / "scores").glob("*.parquet")):
        try:
            scores = pyarrow.parquet.read_table(path, partitioning=None).to_pandas().drop(columns="model")
        except (pa.ArrowException, OSError, KeyError) as error:
            raise OutputError(
                f"The scores in {path} cannot be read: {clause(error)}. Delete the file and score again."
            ) from error
        frame = frame.merge(scores, on=["key", "seed"], how="left")
    return frame


def _read(path: Path) -> pa.Table:
    """Read the file of a unit; columns that are missing because an older release wrote the file are empty."""
    rows = pa.parquet.read_table(path, partitioning=None)
    columns = [
        rows.column(name).cast(kind) if name in rows.column_names else pa.nulls(len(rows), kind)
        for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True)
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def check_folder(folder: str | Path) -> Path:
    """Check, before any work is done, that a path can become a folder of results.

    Parameters
    ----------
    folder : str or Path

    Returns
    -------
    Path
        Absolute path of the folder, which need not exist.

    Raises
    ------
    OutputError
        The path is a file, is not valid text, is too long, or cannot be accessed.

    Examples
    --------
    >>> check_folder("x" * 300)
    Traceback (most recent call last):
    ...
    elakit.errors.OutputError: The folder ... cannot be used: File name too long. ...
    """
    shown = ascii(str(folder))
    try:
        str(folder).encode()
        path = Path(folder).expanduser().absolute()
        with suppress(FileNotFoundError):
            path.lstat()
            if not path.is_dir():
                raise OutputError(f"The folder {shown} cannot be used: a file has this name. Choose another.")
    except UnicodeEncodeError:
        raise OutputError(f"The folder {shown} cannot be used: its name is not valid UTF-8. Choose another.") from None
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OutputError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"The folder {shown} cannot be used: {clause(reason)}. Choose another one.") from error
    return path


def prepare(folder: str | Path, units: Sequence[Unit]) -> Path:
    """Create the folder of a sweep, and return its path; ``sweep.json`` in it describes the first sweep written there.

    Raises
    ------
    OutputError
        The folder cannot be written to.
    """
    folder = Path(folder)
    try:
        for name in ("units", "failed"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        described = (folder / "sweep.json").exists()
    except (OSError, ValueError) as error:
        raise OutputError(
            f"The sweep cannot be written to {str(folder)!a}: {getattr(error, 'strerror', None) or error}. Choose a "
            "folder that you may write to."
        ) from error
    if not described:
        write_json(folder / "sweep.json", _describe(units))
    return folder


def finished(folder: str | Path, unit: Unit, keep_images: bool = False) -> bool:
    """Return True if a folder contains the results of a unit and, with `keep_images`, all its images."""
    done = (Path(folder) / "units" / f"{unit.key}.parquet").exists()
    return done and (not keep_images or all(image_path(folder, unit.key, seed).exists() for seed in unit.seeds))


def image_path(folder: str | Path, key: str, seed: int) -> Path:
    """Path of the image that a unit generated from a seed, whether or not it exists; `key` is the unit's key."""
    return Path(folder) / "images" / f"{key}-{seed}.png"


def as_result(unit: Unit, rows: Sequence[dict[str, Any]]) -> Result:
    """Rows of a unit as a table with all columns, and its images; columns that a row lacks are empty.

    Raises
    ------
    SettingError
        The rows do not have the seeds of the unit, in this order.
    """
    if [row["seed"] for row in rows] != list(unit.seeds):
        raise SettingError(
            f"The unit has the seeds {list(unit.seeds)}, but its rows have {[row['seed'] for row in rows]}. Return one "
            "row per seed, in the order of the unit's seeds."
        )
    images = {row["seed"]: row["png"] for row in rows if "png" in row}
    plain = [{name: value for name, value in row.items() if name != "png"} for row in rows]
    return Result(pa.Table.from_pylist(plain, schema=SCHEMA), images)


def save(folder: Path, unit: Unit, result: Result) -> None:
    """Write the images and then the rows of a finished unit, and remove the note of an earlier failure."""
    if result.images:
        (folder / "images").mkdir(exist_ok=True)
    for seed, content in result.images.items():
        write_file(image_path(folder, unit.key, seed), content)
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(result.rows, sink)
    write_file(folder / "units" / f"{unit.key}.parquet", sink.getvalue().to_pybytes())
    (folder / "failed" / f"{unit.key}.json").unlink(missing_ok=True)


def note_failure(folder: Path, unit: Unit, error: str, details: str = "") -> None:
    """Write a note with the error of a unit that failed."""
    note = {**unit.labels(), "seeds": unit.seeds, "error": error, "details": details}
    write_json(folder / "failed" / f"{unit.key}.json", note)


def failures(folder: str | Path) -> dict[str, str]:
    """Error message of each failed unit, by the unit's key."""
    return {path.stem: _error(path) for path in sorted((Path(folder) / "failed").glob("*.json"))}


def _error(path: Path) -> str:
    try:
        return str(read_json(path)["error"])
    except (OutputError, KeyError, TypeError) as error:
        return f"The unit failed, and its note {path} cannot be read: {error}"


def _describe(units: Iterable[Unit]) -> dict[str, Any]:
    from elakit import __version__

    units = list(units)
    suites: dict[str, set[str]] = {}
    for unit in units:
        suites.setdefault(unit.suite, set()).add(unit.prompt)
    methods = dict.fromkeys((unit.method, unit.options) for unit in units)
    single = ("model", "steps", "guidance_scale", "dtype", "detector", *OPTIONAL)
    return {
        "elakit": __version__,
        "suites": {name: len(prompts) for name, prompts in suites.items()},
        "seeds": sorted({seed for unit in units for seed in unit.seeds}),
        "methods": [{"method": name, "options": json.loads(options)} for name, options in methods],
        **{name: list(dict.fromkeys(getattr(unit, name) for unit in units)) for name in single},
    }
