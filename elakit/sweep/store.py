"""The folder of a sweep: settings, one Parquet file a finished unit, one note a failed one.

Every file is written to a temporary name and renamed, so that whatever is killed leaves whole files only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet

from elakit.errors import OutputError, SettingError
from elakit.files import write_file
from elakit.sweep.units import Unit

_TEXT, _WHOLE, _NUMBER, _YES = pa.string(), pa.int64(), pa.float64(), pa.bool_()
SCHEMA = pa.schema(
    {
        "prompt": _TEXT, "suite": _TEXT, "seed": _WHOLE, "method": _TEXT, "options": _TEXT,
        "success": _YES, "neglect": _YES, "mixture": _YES, "wrong_color": _YES, "extra": _WHOLE,
        "present": _NUMBER, "score": _NUMBER,
        "bleed": _NUMBER, "intrusion": _NUMBER, "spill": _NUMBER, "ruzicka": _NUMBER, "attribute_bleed": _NUMBER,
        "loss_first": _NUMBER, "loss_last": _NUMBER, "skipped": _WHOLE, "refinements": _WHOLE, "seconds": _NUMBER,
        "model": _TEXT, "steps": _WHOLE, "guidance_scale": _NUMBER, "device": _TEXT, "dtype": _TEXT,
        "detector": _TEXT, "key": _TEXT, "features": pa.list_(pa.float32()),
    }
)  # fmt: skip
# Settings that images are compared within, and what tells an image from every other.
SETTINGS = ("model", "detector", "device", "dtype", "steps", "guidance_scale")
IMAGE = ("suite", "prompt", "seed", *SETTINGS)
IDENTITY = (*IMAGE, "method", "options")


def table(folder: str | Path) -> pd.DataFrame:
    """All images of a sweep, one a row, in an order that does not depend on when each was drawn.

    Parameters
    ----------
    folder : str or Path

    Returns
    -------
    DataFrame
        Columns prompt, suite, seed, method, options (JSON); what the judge says: success, neglect, mixture,
        wrong_color, extra (things too many), present (share of the entities), score (mean of the things', how clean
        the drawing is); bleed, intrusion, spill, ruzicka, attribute_bleed (means over steps and entities); loss_first,
        loss_last, skipped, refinements (of the guidance); seconds (of drawing an image); model, steps,
        guidance_scale, device, dtype, detector; key (of the unit); features (`elakit.prediction.features`, share by
        share). Empty where there is nothing to say. An image that two units have in common is there once.

    Raises
    ------
    OutputError
        The folder holds no finished unit, or a file that cannot be read.
    """
    folder = Path(folder)
    paths = sorted((folder / "units").glob("*.parquet"))
    if not paths:
        raise OutputError(f"{folder} holds no finished unit of a sweep; draw one with elakit sweep run --out {folder}.")
    try:
        rows = pa.dataset.dataset([str(path) for path in paths], schema=SCHEMA, format="parquet").to_table()
    except (pa.ArrowException, OSError) as error:
        raise OutputError(
            f"A unit in {folder} cannot be read ({str(error).splitlines()[0]}). Delete that file and run the sweep "
            "again: it is drawn anew."
        ) from error
    frame: pd.DataFrame = rows.to_pandas(types_mapper={_WHOLE: pd.Int64Dtype(), _YES: pd.BooleanDtype()}.get)
    frame = frame.sort_values([*IDENTITY, "key"], kind="stable").drop_duplicates(list(IDENTITY))
    return frame.reset_index(drop=True)


def prepare(folder: str | Path, units: Sequence[Unit]) -> Path:
    """Make the folder; note in ``sweep.json``, once, what the first sweep into it was of.

    Raises
    ------
    OutputError
        The folder cannot be written to.
    """
    folder = Path(folder)
    try:
        for name in ("units", "failed"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"The sweep cannot be kept in {folder}: {error.strerror or error}. Give a folder you may write to."
        ) from error
    if not (folder / "sweep.json").exists():
        write_file(folder / "sweep.json", json.dumps(_describe(units), indent=1).encode())
    return folder


def there(folder: str | Path, unit: Unit) -> bool:
    """Whether a unit is finished."""
    return (Path(folder) / "units" / f"{unit.key}.parquet").exists()


def as_table(unit: Unit, rows: Sequence[dict[str, Any]]) -> pa.Table:
    """A unit's rows in the table's columns; those that a row lacks are empty.

    Raises
    ------
    SettingError
        The rows are not one a seed.
    """
    if [row["seed"] for row in rows] != list(unit.seeds):
        raise SettingError(f"Seeds {list(unit.seeds)} were drawn as {[row['seed'] for row in rows]}; one row a seed.")
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


def keep(folder: Path, unit: Unit, rows: pa.Table) -> None:
    """Write a finished unit, and forget that it failed before."""
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(rows, sink)
    write_file(folder / "units" / f"{unit.key}.parquet", sink.getvalue().to_pybytes())
    (folder / "failed" / f"{unit.key}.json").unlink(missing_ok=True)


def note(folder: Path, unit: Unit, error: str, details: str = "") -> None:
    """Write down why a unit failed."""
    said = {**unit.labels(), "seeds": unit.seeds, "error": error, "details": details}
    write_file(folder / "failed" / f"{unit.key}.json", json.dumps(said, indent=1).encode())


def failures(folder: str | Path) -> dict[str, str]:
    """Key and error of each unit that failed."""
    paths = sorted((Path(folder) / "failed").glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8"))["error"] for path in paths}


def _describe(units: Iterable[Unit]) -> dict[str, Any]:
    from elakit import __version__

    units = list(units)
    suites: dict[str, set[str]] = {}
    for unit in units:
        suites.setdefault(unit.suite, set()).add(unit.prompt)
    methods = dict.fromkeys((unit.method, unit.options) for unit in units)
    single = ("model", "steps", "guidance_scale", "device", "dtype", "detector")
    return {
        "elakit": __version__,
        "suites": {name: len(prompts) for name, prompts in suites.items()},
        "seeds": sorted({seed for unit in units for seed in unit.seeds}),
        "methods": [{"method": name, "options": json.loads(options)} for name, options in methods],
        **{name: list(dict.fromkeys(getattr(unit, name) for unit in units)) for name in single},
    }
