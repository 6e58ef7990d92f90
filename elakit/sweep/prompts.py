"""Prompts from files: text, JSON, JSON Lines, CSV and Parquet, as benchmarks publish them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from elakit import checks
from elakit.errors import ElakitError, OutputError, SettingError, clause
from elakit.files import read_text

COLUMNS = ("prompt", "text", "caption")  # names of the column or key that holds the prompt, by preference


@dataclass(frozen=True)
class Benchmark:
    """A public benchmark. elakit does not contain its prompts; the user downloads a file of prompts.

    Attributes
    ----------
    name : str
        Name of the benchmark. ``elakit sweep run --suite NAME`` prints the commands that download the prompts.
    summary : str
        Description of the prompts, in one line.
    source : str
        Address of the repository or data set that contains the prompts.
    file : str
        Path of the file of prompts in this repository or data set.
    license : str
        License of the prompts, as stated by the source.
    """

    name: str
    summary: str
    source: str
    file: str
    license: str

    @property
    def command(self) -> str:
        """Shell commands, one per line, that download the file of prompts and run a sweep with these prompts."""
        file = self.file.rsplit("/", 1)[-1]
        if "huggingface.co/datasets/" in self.source:
            name = self.source.partition("huggingface.co/datasets/")[2]
            fetch = f"hf download {name} --repo-type dataset --local-dir {self.name}"
            file = f"{self.name}/{self.file}"
        else:
            base = self.source.replace("github.com", "raw.githubusercontent.com")
            fetch = f"curl -L -O {base}/HEAD/{self.file}"
        return f"{fetch}\nelakit sweep run --prompts {file} --keep-images --out results/{self.name}"


_COMPBENCH = "https://github.com/Karine-Huang/T2I-CompBench"
BENCHMARKS: dict[str, Benchmark] = {
    each.name: each
    for each in (
        *(
            Benchmark(
                name=f"t2i-compbench-{kind}",
                summary=f"T2I-CompBench, validation prompts for {kind}",
                source=_COMPBENCH,
                file=f"examples/dataset/{kind}_val.txt",
                license="MIT",
            )
            for kind in ("color", "shape", "texture", "spatial")
        ),
        Benchmark(
            name="geneval2",
            summary="GenEval 2, 800 prompts of increasing compositionality",
            source="https://github.com/facebookresearch/GenEval2",
            file="geneval2_data.jsonl",
            license="CC BY-NC 4.0",
        ),
        Benchmark(
            name="ssd",
            summary="SSD-2 and SSD-3, two and three similar subjects (Self-Cross guidance)",
            source="https://github.com/mengtang-lab/selfcross-guidance",
            file="prompts.txt",
            license="not stated",
        ),
        Benchmark(
            name="slim",
            summary="SLIM, prompts with semantic leakage (DeLeaker)",
            source="https://huggingface.co/datasets/tokeron/slim-dataset",
            file="data",
            license="that of FLUX.1-dev outputs",
        ),
        Benchmark(
            name="abc-6k",
            summary="ABC-6K, captions with at least two colors and their counterparts with the colors swapped",
            source="https://github.com/weixi-feng/Structured-Diffusion-Guidance",
            file="ABC-6K.txt",
            license="MIT, with use-based restrictions",
        ),
    )
}


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """Read the distinct prompts of a file.

    Parameters
    ----------
    path : str or Path
        File of prompts, or a folder of Parquet files. The suffix of the file determines its format:

        - .json: a list of prompts, or an object whose values are lists of prompts.
        - .jsonl: one prompt per line, as JSON.
        - .csv, .tsv and .parquet: a table with one prompt per row.
        - any other suffix: text with one prompt per line.

        In JSON, a prompt is a string, or an object with the key "prompt", "text" or "caption". In a table, the prompts
        are in the column "prompt", "text" or "caption". If several of these names exist, the first is used.

    Returns
    -------
    tuple of str
        The prompts in the order of the file, without repetitions.

    Raises
    ------
    OutputError
        The file cannot be read, or is not text in UTF-8.
    SettingError
        A table or a JSON object has none of these three names, or the file contains no prompt.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     file = Path(folder, "prompts.txt")
    ...     _ = file.write_text("a cat and a lion\\na red car\\n")
    ...     read_prompts(file)
    ('a cat and a lion', 'a red car')
    """
    path = Path(path)
    try:
        parse = _parquet if path.is_dir() else _PARSERS.get(path.suffix.lower(), _lines)
        found = list(parse(path))
    except ElakitError:
        raise
    except (OSError, ValueError) as error:
        raise OutputError(
            f"The prompts in {path} cannot be read as {path.suffix[1:] or 'text'}: {clause(error)}. Give a text file "
            "with one prompt per line."
        ) from error
    prompts = tuple(dict.fromkeys(text for each in found if (text := " ".join(str(each).split()))))
    if not prompts:
        raise SettingError(f"{path} contains no prompt. Write one prompt per line.")
    return prompts


def spread(prompts: Sequence[str], count: int | None) -> tuple[str, ...]:
    """Select at most `count` prompts, evenly spaced from the first to the last.

    Parameters
    ----------
    prompts : sequence of str
    count : int, optional
        Largest number of prompts; 1 selects the first prompt, None selects all.

    Returns
    -------
    tuple of str

    Raises
    ------
    SettingError
        `count` is less than 1.

    Examples
    --------
    >>> spread(["a", "b", "c", "d", "e"], 3)
    ('a', 'c', 'e')
    """
    if count is None:
        return tuple(prompts)
    count = checks.whole_number(count, "limit", 1)
    selected = np.linspace(0, len(prompts) - 1, min(count, len(prompts))).round().astype(int)
    return tuple(prompts[i] for i in selected)


def _lines(path: Path) -> Iterable[str]:
    return read_text(path).splitlines()


def _json(path: Path) -> Iterable[str]:
    content = json.loads(read_text(path))
    if isinstance(content, dict):  # prompts by category
        content = [each for value in content.values() for each in (value if isinstance(value, list) else [value])]
    return _of_records(content, path)


def _json_lines(path: Path) -> Iterable[str]:
    return _of_records([json.loads(line) for line in read_text(path).splitlines() if line.strip()], path)


def _csv(path: Path) -> Iterable[str]:
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    return _of_frame(pd.read_csv(io.StringIO(read_text(path)), sep=separator, dtype=str), path)


def _parquet(path: Path) -> Iterable[str]:
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise SettingError(f"The folder {path} contains no Parquet file. Give a file of prompts.")
    import pyarrow.parquet

    for file in files:
        names = pyarrow.parquet.read_schema(file).names
        yield from pyarrow.parquet.read_table(file, columns=[_column(names, file)]).column(0).to_pylist()


def _of_frame(frame: pd.DataFrame, path: Path) -> Iterable[str]:
    return [str(value) for value in frame[_column(list(map(str, frame.columns)), path)].dropna()]


def _of_records(records: Any, path: Path) -> Iterator[str]:
    for record in records if isinstance(records, list) else [records]:
        yield record[_column(list(record), path)] if isinstance(record, dict) else str(record)


def _column(names: Sequence[str], path: Path) -> str:
    for name in COLUMNS:
        if name in names:
            return name
    raise SettingError(
        f"{path} has no column {' or '.join(map(repr, COLUMNS))}; columns found: "
        f"{', '.join(names) or 'none'}. Rename the column with the prompts to {COLUMNS[0]!r}."
    )


_PARSERS = {
    ".json": _json, ".jsonl": _json_lines, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet,
}  # fmt: skip
