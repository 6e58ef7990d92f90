"""Export of the images of a sweep in the layouts that T2I-CompBench, GenEval 2 and t2v_metrics read."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from elakit.errors import OutputError
from elakit.files import replace_folder, write_file, write_json, write_text
from elakit.sweep.comparison import variants
from elakit.sweep.report import csv_bytes
from elakit.sweep.store import image_path, parsed_prompt
from elakit.sweep.store import table as read_table

MAX_NAME = 200  # bytes of the prompt in a file name; file systems allow 255 in total


def export_images(folder: str | Path, out: str | Path | None = None) -> Path:
    """Export the stored images of a sweep in the layouts that T2I-CompBench, GenEval 2 and t2v_metrics read.

    There is one folder for each method. A method that was run with several options or settings has one folder for each
    combination. Each folder contains

    - ``samples/PROMPT_NNNNNN.png``: the images, named as the evaluation scripts of T2I-CompBench expect. PROMPT is the
      prompt, cut to 200 bytes, with spaces instead of characters that are unsuitable for file names. NNNNNN is the
      number of the image in the folder, from 000000, in the order of prompts and seeds.
    - ``geneval2.json``: the path of each prompt's image with the lowest seed, for the option ``--image_filepath_data``
      of GenEval 2. Each further seed has its own file, such as ``geneval2-seed3.json``.
    - ``t2v_metrics.json``: a list of {"images": [path], "texts": [prompt]}, the argument of ``batch_forward`` of
      t2v_metrics.
    - ``images.csv``: one row per image with file_name, prompt, seed, method, options and settings.
    - ``metadata.jsonl``: the same rows, in the format of image folders in Hugging Face data sets.

    Images are hard links where the file system allows it, and copies elsewhere.

    Parameters
    ----------
    folder : str or Path
        Folder of a sweep that was run with ``keep_images=True``.
    out : str or Path, optional
        Folder to write, by default the subfolder ``export`` of `folder`. An earlier export there is replaced.

    Returns
    -------
    Path
        Absolute path of the folder that was written.

    Raises
    ------
    OutputError
        The sweep stored no images, `out` cannot be written to, or `out` exists and is not an export.
    """
    folder = Path(folder)
    table = read_table(folder, scores=False)
    table["label"] = variants(table)
    table["prompt"] = [_text(row.parsed, row.prompt) for row in table.itertuples()]
    paths = [image_path(folder, row.key, row.seed) for row in table.itertuples()]
    table["source"] = [str(path) if path.exists() else None for path in paths]
    table = table[table["source"].notna()]
    if table.empty:
        raise OutputError(f"{folder} contains no kept image. Run the sweep again with --keep-images.")
    target = (Path(out) if out is not None else folder / "export").absolute()
    if target.exists() and not (target / "export.json").exists():
        raise OutputError(f"{target} exists and is not an export of a sweep. Choose another folder.")
    names = _folder_names(list(table["label"].unique()))
    with replace_folder(target) as place:
        for variant, part in table.groupby("label", sort=True):
            _export_variant(part, place / names[str(variant)], target / names[str(variant)])
        write_json(place / "export.json", {"sweep": str(folder.absolute()), "folders": names})
    return target


def _export_variant(part: pd.DataFrame, place: Path, final: Path) -> None:
    """Write the folder of one method, with one combination of options and settings, to `place`.

    When the export is complete, the folder is moved from `place` to `final`. The paths in its JSON files therefore
    begin with `final`.
    """
    (place / "samples").mkdir(parents=True)
    rows, by_seed = [], dict[int, dict[str, str]]()
    ordered = part.sort_values(["prompt", "seed"], kind="stable").to_dict("records")
    for number, row in enumerate(ordered):
        name = f"samples/{file_prompt(row['prompt'])}_{number:06d}.png"
        _link(Path(row["source"]), place / name)
        by_seed.setdefault(int(row["seed"]), {})[row["prompt"]] = str(final / name)
        rows.append({"file_name": name, **{column: _plain(row[column]) for column in _METADATA}})
    lowest = min(by_seed)
    for seed, paths in sorted(by_seed.items()):
        write_json(place / ("geneval2.json" if seed == lowest else f"geneval2-seed{seed}.json"), paths)
    pairs = [{"images": [str(final / row["file_name"])], "texts": [row["prompt"]]} for row in rows]
    write_json(place / "t2v_metrics.json", pairs)
    frame = pd.DataFrame(rows)
    # Hugging Face's image folder refuses a second file named "metadata"
    write_file(place / "images.csv", csv_bytes(frame))
    write_text(place / "metadata.jsonl", frame.to_json(orient="records", lines=True, force_ascii=False))


_METADATA = (
    "prompt", "suite", "seed", "method", "options", "success", "blocked", "model", "steps", "guidance_scale", "dtype",
    "negative_prompt", "height", "width", "scheduler", "lora", "variant", "key",
)  # fmt: skip


def file_prompt(prompt: str) -> str:
    """Convert a prompt to a part of a file name, of at most 200 bytes.

    Slashes, underscores and other unsuitable characters become spaces. Underscores are unsuitable because T2I-CompBench
    reads the prompt up to the first underscore of a file name.

    Examples
    --------
    >>> file_prompt("a half_timbered house and/or a barn")
    'a half timbered house and or a barn'
    """
    text = " ".join(re.sub(r'[_/\\:*?"<>|\x00-\x1f]', " ", prompt).split())
    return text.encode()[:MAX_NAME].decode(errors="ignore").strip() or "prompt"


def _folder_names(variants: Sequence[str]) -> dict[str, str]:
    """Return a distinct folder name for each label in `variants`; the labels are the keys.

    A label is the name of a method, with the options and settings that differ.
    """
    names: dict[str, str] = {}
    for variant in variants:
        base = re.sub(r"[^A-Za-z0-9.=-]+", "-", variant).strip("-.")[:80] or "images"
        number = 1
        while (name := base if number == 1 else f"{base}-{number}") in names.values():
            number += 1
        names[variant] = name
    return names


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _text(parsed: Any, prompt: str) -> str:
    """Text that the model read: the prompt without the brackets that mark entities.

    `parsed` is the parsed prompt as JSON, from the column "parsed" of the sweep's table. `prompt` is returned unchanged
    if `parsed` is a missing value.
    """
    return prompt if pd.isna(parsed) else parsed_prompt(parsed).text


def _plain(value: Any) -> Any:
    return None if pd.isna(value) else value
