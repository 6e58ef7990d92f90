"""Scores of the stored images of a sweep, such as CLIP similarity. The folder of the sweep contains files of scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

from elakit.errors import OutputError, SettingError, clause
from elakit.files import write_file
from elakit.sweep.options import PLAIN
from elakit.sweep.scorers import SCORERS, Sample, Scorer, load_scorer
from elakit.sweep.store import IMAGE, image_path, parsed_prompt, score_file
from elakit.sweep.store import table as read_table

EVERY = 50  # images between two writes of the scores


def score(
    folder: str | Path,
    scorers: str | Sequence[str],
    *,
    device: str | None = None,
    load: Callable[[str, str | None, str | None], Scorer] = load_scorer,
    on_progress: Callable[[int, int], object] | None = None,
) -> pd.DataFrame:
    """Score the stored images of a sweep, for example by CLIP similarity.

    The scores become columns of the sweep's table. Images that a scorer has already scored with the same model are
    skipped. To resume an interrupted call, repeat the call. If a scorer is used with another model, the new scores
    replace all earlier scores of this scorer. Images that the safety checker replaced are not scored.

    Parameters
    ----------
    folder : str or Path
        Folder of a sweep that was run with ``keep_images=True``.
    scorers : str or sequence of str
        Names of scorers, such as "clip" (see `elakit.sweep.SCORERS`). "NAME=MODEL" names the model of a scorer, too.
        Without a model, the default model of the scorer is used.
    device : str, optional
        Device of the scorers' models, such as "cuda:1". Default: CUDA where it is available, otherwise the CPU.
    load : callable
        Function that loads a scorer, such as `load_scorer`. Its arguments are the name of the scorer, the name of the
        model (None for the default) and the device.
    on_progress : callable, optional
        Function that is called after each image with two numbers: images done, and images in total. With several
        scorers, each image counts once per scorer.

    Returns
    -------
    pandas.DataFrame
        The table of the sweep with the scores.

    Raises
    ------
    OutputError
        The folder contains no finished unit or no kept image, or a file cannot be read.
    SettingError
        No scorer is given, a scorer is unknown, or the model of a scorer without a default model is not named.
    ModelError
        The model or the package of a scorer cannot be loaded.
    """
    names = [scorers] if isinstance(scorers, str) else list(scorers)
    if not names:
        raise SettingError(f"No scorer is given. Choose one or more of {', '.join(SCORERS)}.")
    folder = Path(folder)
    table = read_table(folder, scores=False)
    rows = _samples(folder, table)
    done, total = 0, len(rows) * len(names)
    for each in names:
        name, _, model = each.partition("=")
        path = score_file(folder, name)
        stored = _stored(path, model)
        missing = [row for row in rows if (row["key"], row["seed"]) not in stored]
        done += len(rows) - len(missing)
        scorer = load(name, model or None, device) if missing else None
        for number, row in enumerate(missing, start=1):
            assert scorer is not None
            values = scorer(row["sample"]())
            stored[row["key"], row["seed"]] = {"key": row["key"], "seed": row["seed"], "model": model, **values}
            done += 1
            if number % EVERY == 0 or number == len(missing):
                _write(path, list(stored.values()))
            if on_progress is not None:
                on_progress(done, total)
    return read_table(folder)


def _samples(folder: Path, table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return one dict for each kept image that the safety checker did not replace.

    Each dict has three entries. "key" is the key of the image's unit, and "seed" is the seed of the image. "sample" is
    a function without arguments that opens the image. The function returns a `Sample`, which contains the image, its
    prompt and the plain image from the same noise.
    """
    settings = [name for name in IMAGE if name in table]

    def identity(row: Any) -> tuple[Any, ...]:
        return tuple(None if pd.isna(value) else value for value in (row[name] for name in settings))

    records = table.to_dict("records")
    plain = {identity(row): image_path(folder, row["key"], row["seed"]) for row in records if row["method"] == PLAIN}
    rows = []
    for row in records:
        path = image_path(folder, row["key"], row["seed"])
        blocked = not pd.isna(row["blocked"]) and bool(row["blocked"])
        if path.exists() and not blocked:
            beside = plain.get(identity(row))
            rows.append({"key": row["key"], "seed": int(row["seed"]), "sample": _opener(path, beside, row["parsed"])})
    if not rows:
        raise OutputError(
            f"{folder} contains no kept image, or only images that the safety checker replaced. Run the sweep again "
            "with --keep-images."
        )
    return rows


def _opener(path: Path, plain: Path | None, parsed: Any) -> Callable[[], Sample]:
    def open_sample() -> Sample:
        beside = _open(plain) if plain is not None and plain.exists() else None
        return Sample(image=_open(path), prompt=parsed_prompt(parsed), plain=beside, path=str(path))

    return open_sample


@lru_cache(maxsize=64)
def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OutputError(
            f"The image {path} cannot be read: {clause(error)}. Delete this file, and run the sweep again with "
            "--keep-images."
        ) from error


def _stored(path: Path, model: str) -> dict[tuple[str, int], dict[str, Any]]:
    """Read the file with the scores of a scorer, and return the rows that were computed with the model `model`.

    The result is a dict with one row per image. The keys are pairs of the key of the image's unit and the seed. The
    dict is empty if the file does not exist.
    """
    if not path.exists():
        return {}
    try:
        rows = pyarrow.parquet.read_table(path, partitioning=None).to_pylist()
        return {(row["key"], row["seed"]): row for row in rows if row["model"] == model}
    except (pa.ArrowException, OSError, KeyError) as error:
        raise OutputError(
            f"The scores in {path} cannot be read: {clause(error)}. Delete this file and score again."
        ) from error


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.Table.from_pylist(rows), sink)
    write_file(path, sink.getvalue().to_pybytes())
