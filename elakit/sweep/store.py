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
from elakit.numbering import number_of
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
    """Result of a finished unit.

    Attributes
    ----------
    rows : pyarrow.Table
        Rows of the sweep's table, one per image of the unit.
    images : dict of int to bytes
        PNG bytes of each image, by the image's seed; empty if images are not stored.
    """

    rows: pa.Table
    images: dict[int, bytes] = field(default_factory=dict)


def table(folder: str | Path, scores: bool = True) -> pd.DataFrame:
    """Read the table of a sweep: one row per image, sorted by suite, prompt, seed, settings, method and options.

    Parameters
    ----------
    folder : str or Path
        Folder of the sweep.
    scores : bool
        True to add the columns that `elakit.sweep.score` has computed.

    Returns
    -------
    pandas.DataFrame
        One row per image. An image that belongs to two units has only one row. Unknown values are missing. The columns:

        - prompt, suite, seed: the prompt, the name of its suite, and the seed of the image's initial noise.
        - method, options: name of the guidance method or "plain", and the method's options as JSON.
        - success: True if the image is right according to the judge.
        - neglect, mixture, wrong_color: True if the image has the failure of this name.
        - extra: number of things in the image that the prompt does not ask for.
        - present: share of the entities that are in the image.
        - score: mean confidence of the judge in the things that it finds in the image, 0 to 1.
        - blocked: True if the safety checker replaced the image. Such an image is not judged.
        - bleed, intrusion, spill, ruzicka, attribute_bleed: measures of bleeding, averaged over steps and entities.
        - loss_first, loss_last: loss of the guidance method in the first and in the last row of its trace.
        - skipped: number of steps whose latent step was left out, because the gradient was not finite.
        - refinements: number of refinements (repeated latent steps), summed over all steps.
        - seconds: generation time per image in seconds.
        - model, steps, guidance_scale, device: settings with which the image was generated.
        - dtype, negative_prompt, height, width, scheduler, lora, variant: more settings; missing if not set.
        - detector: name of the detector that judged the image; missing if the built-in judge was used.
        - key: key of the unit.
        - parsed: the parsed prompt as JSON, which `parsed_prompt` reads.
        - features: the values of the table `elakit.prediction.features`, row by row in one list.

    Raises
    ------
    OutputError
        The folder contains no finished unit, or a file cannot be read; the message names the files.
    """
    folder = Path(folder)
    paths = sorted((folder / "units").glob("*.parquet"))
    if not paths:
        raise OutputError(
            f"{folder} contains no finished unit of a sweep. Generate units with  elakit sweep run --out {folder}"
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
            f"{len(broken)} of {number_of(len(paths), 'file')} in {folder / 'units'} cannot be read: {named}. Delete "
            f"{'this file' if len(broken) == 1 else 'these files'} and run the sweep again."
        )
    kinds = {_INTEGER: pd.Int64Dtype(), _BOOLEAN: pd.BooleanDtype()}
    frame: pd.DataFrame = pa.concat_tables(tables).to_pandas(types_mapper=kinds.get)
    frame = frame.sort_values([*IDENTITY, "key"], kind="stable").drop_duplicates(list(IDENTITY))
    return _with_scores(folder, frame.reset_index(drop=True)) if scores else frame.reset_index(drop=True)


def score_file(folder: Path, scorer: str) -> Path:
    """Path of the file with the scores that a scorer computes for the images of a sweep.

    `folder` is the folder of the sweep, and `scorer` is the name of the scorer. The file need not exist.
    """
    return folder / "scores" / f"{scorer}.parquet"


def parsed_prompt(text: str) -> Prompt:
    """Read a prompt from JSON text: a value of the column "parsed" in the table of a sweep.

    Raises
    ------
    OutputError
        `text` is a missing value, as in sweeps of older releases, or is not a prompt in JSON.
    """
    try:
        return Prompt.from_dict(json.loads(text))
    except (ValueError, KeyError) as error:
        raise OutputError(
            f"A parsed prompt of the sweep is damaged: {clause(error)}. Run the sweep again in a new folder."
        ) from error
    except TypeError as error:
        raise OutputError(
            "The sweep does not contain the parsed prompts, because an older version of elakit generated it. Run the "
            "sweep again in a new folder."
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
    """Read the rows of a unit from its Parquet file.

    A file of an older release may lack some columns. These columns are added without values.
    """
    rows = pa.parquet.read_table(path, partitioning=None)
    columns = [
        rows.column(name).cast(kind) if name in rows.column_names else pa.nulls(len(rows), kind)
        for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True)
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def check_folder(folder: str | Path) -> Path:
    """Check that a folder can be used for results, before any work is done.

    Parameters
    ----------
    folder : str or Path
        Path of the folder. The folder need not exist.

    Returns
    -------
    Path
        Absolute path of the folder.

    Raises
    ------
    OutputError
        The path belongs to a file, cannot be encoded as UTF-8, is too long, or cannot be accessed.

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
                raise OutputError(f"The folder {shown} cannot be used: it is a file. Choose another folder.")
    except UnicodeEncodeError:
        raise OutputError(
            f"The folder {shown} cannot be used: its name is not valid UTF-8. Choose another folder."
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OutputError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"The folder {shown} cannot be used: {clause(reason)}. Choose another folder.") from error
    return path


def prepare(folder: str | Path, units: Sequence[Unit]) -> Path:
    """Create the folder of a sweep, describe the sweep in the file ``sweep.json``, and return the path of the folder.

    `units` are the units of the sweep, whose settings are described. If the folder already contains ``sweep.json``, the
    file is not changed.

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
    """Return True if a folder contains the results of a unit.

    If `keep_images` is True, the folder must also contain all images of the unit.
    """
    done = (Path(folder) / "units" / f"{unit.key}.parquet").exists()
    return done and (not keep_images or all(image_path(folder, unit.key, seed).exists() for seed in unit.seeds))


def image_path(folder: str | Path, key: str, seed: int) -> Path:
    """Path of the PNG file with the image of a unit and a seed. The file need not exist. `key` is the unit's key."""
    return Path(folder) / "images" / f"{key}-{seed}.png"


def as_result(unit: Unit, rows: Sequence[dict[str, Any]]) -> Result:
    """Convert the rows of a unit, one dict per image, into a `Result`.

    The result contains a table with all columns of the sweep's table. Values that a row lacks are missing in the table.
    If a row has the entry "png", the PNG bytes in this entry become an image of the result.

    Raises
    ------
    SettingError
        The seeds of the rows differ from the seeds of the unit, or have another order.
    """
    if [row["seed"] for row in rows] != list(unit.seeds):
        raise SettingError(
            f"generate() returned rows with the seeds {[row['seed'] for row in rows]} for a unit with the seeds "
            f"{list(unit.seeds)}. Return one row per seed, in the order of the unit's seeds."
        )
    images = {row["seed"]: row["png"] for row in rows if "png" in row}
    plain = [{name: value for name, value in row.items() if name != "png"} for row in rows]
    return Result(pa.Table.from_pylist(plain, schema=SCHEMA), images)


def save(folder: Path, unit: Unit, result: Result) -> None:
    """Write the images and then the rows of a finished unit to the folder of a sweep.

    If the unit failed earlier, the JSON file with the error is deleted.
    """
    if result.images:
        (folder / "images").mkdir(exist_ok=True)
    for seed, content in result.images.items():
        write_file(image_path(folder, unit.key, seed), content)
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(result.rows, sink)
    write_file(folder / "units" / f"{unit.key}.parquet", sink.getvalue().to_pybytes())
    (folder / "failed" / f"{unit.key}.json").unlink(missing_ok=True)


def note_failure(folder: Path, unit: Unit, error: str, details: str = "") -> None:
    """Write the error of a failed unit to a JSON file in the folder of a sweep.

    `error` is the message of the error. `details` is the traceback.
    """
    note = {**unit.labels(), "seeds": unit.seeds, "error": error, "details": details}
    write_json(folder / "failed" / f"{unit.key}.json", note)


def failures(folder: str | Path) -> dict[str, str]:
    """Error message of each failed unit, by the unit's key."""
    return {path.stem: _error(path) for path in sorted((Path(folder) / "failed").glob("*.json"))}


def _error(path: Path) -> str:
    try:
        return str(read_json(path)["error"])
    except (OutputError, KeyError, TypeError) as error:
        return f"The unit failed, and its error in {path} cannot be read: {clause(error)}."


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
