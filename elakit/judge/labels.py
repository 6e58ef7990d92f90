"""Label files: one row of statements about each generated image, filled in by a person or by the judge.

**Label file** (CSV)::

    image,first_nameable,first_color,second_nameable,second_color,hybrid,extra
    17,1,1,1,0,0,0

``image`` is the number of the image. The values of all other columns are 1 (true) or 0 (false). Columns that begin with
``first`` describe the first entity of the prompt, and columns that begin with ``second`` describe the second entity.

- ``first_nameable``, ``second_nameable``: a person who has not read the prompt would name the entity as the prompt
  does.
- ``first_color``, ``second_color``: the entity has the color that the prompt asks for. If the prompt asks for no color,
  the value is 0 only if the entity clearly took the color of the other entity.
- ``hybrid``: two things in the image are fused.
- ``extra``: the image has a nameable thing that the prompt does not ask for, or more things of one noun than the prompt
  asks for.

If the prompt has only one entity, ``second_nameable`` and ``second_color`` are empty. If all columns except ``image``
are empty, the image is not labeled yet, and the readers skip the row. An image is right if every entity is nameable and
has its color, and nothing is fused.

**Folder of labeled images**: ``labels.csv`` is the label file. ``images/`` contains the images; image 17 is
``0017.png``, or has the ending of another format. ``key.json`` is an object with one entry per image, which states the
prompt and, for example, the seed: ``{"17": {"prompt": "a cat and a dog", "seed": 100}}``.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from elakit import checks
from elakit.errors import OutputError, SettingError, clause
from elakit.files import read_json, read_text
from elakit.numbering import number_of
from elakit.world.vocabulary import NOUNS

if TYPE_CHECKING:
    from elakit.judge.verdict import Verdict
    from elakit.prompt import Prompt

COLUMNS = ("image", "first_nameable", "first_color", "second_nameable", "second_color", "hybrid", "extra")
FAULTS = ("not nameable", "wrong color", "hybrid")
_WRITE = "Write the file with `python -m benchmarks.audit` first, or give another folder."


@dataclass(frozen=True)
class Label:
    """Label of one image, given by a person or by the judge.

    Attributes
    ----------
    nameable : tuple of bool
        One value for each of the prompt's one or two entities. True if a person who has not read the prompt would name
        the thing in the image as the prompt does.
    color : tuple of bool
        One value for each entity. True if the entity has the color that the prompt asks for. If the prompt asks for no
        color, False only if the entity clearly took the color of the other entity.
    hybrid : bool
        True if two things in the image are fused.
    extra : bool
        True if the image has a nameable thing that the prompt does not ask for, or more things of one noun than the
        prompt asks for.

    Examples
    --------
    Both entities are nameable, the second entity has a wrong color, and the image has an extra thing. `values` lists
    `nameable` and `color` of the first entity, then of the second entity, then `hybrid` and `extra`:

    >>> label = Label((True, True), (True, False), hybrid=False, extra=True)
    >>> label.right, label.faults, label.values()
    (False, ('wrong color',), ['1', '1', '1', '0', '0', '1'])
    """

    nameable: tuple[bool, ...]
    color: tuple[bool, ...]
    hybrid: bool
    extra: bool

    @property
    def right(self) -> bool:
        """True if every entity can be recognized and has its color, and the image has no hybrid."""
        return all(self.nameable) and all(self.color) and not self.hybrid

    @property
    def faults(self) -> tuple[str, ...]:
        """Faults of the image, out of "not nameable", "wrong color" and "hybrid".

        "not nameable": a person who has not read the prompt would not recognize an entity. "wrong color": a nameable
        entity has a wrong color. "hybrid": two things in the image are fused.
        """
        miscolored = any(seen and not color for seen, color in zip(self.nameable, self.color, strict=True))
        found = (not all(self.nameable), miscolored, self.hybrid)
        return tuple(name for name, wrong in zip(FAULTS, found, strict=True) if wrong)

    @classmethod
    def of(cls, verdict: Verdict, prompt: Prompt) -> Label:
        """Convert the judge's verdict to a label; an entity counts as nameable if the judge finds it."""
        names = [entity.label for entity in prompt.entities]
        return cls(
            tuple(verdict.present[name] for name in names),
            tuple(verdict.right_color[name] for name in names),
            verdict.mixture,
            bool(verdict.extra),
        )

    def values(self) -> list[str]:
        """Values of the label as a label file contains them: "1" for True, "0" for False.

        The six values are the first entity's `nameable` and `color`, the second entity's `nameable` and `color`,
        `hybrid` and `extra`. If the prompt has only one entity, the third and the fourth value are empty strings.
        """
        entities = [value for pair in zip(self.nameable, self.color, strict=True) for value in pair]
        return ["" if value is None else str(int(value)) for value in (*entities, None, None)[:4]] + [
            str(int(self.hybrid)),
            str(int(self.extra)),
        ]


class Row(NamedTuple):
    """Labeled row of a label file.

    `line` is the number of the line in the file, counted from 1. `cells` is the text of each column, by the name of the
    column. `label` is the label that the row states.
    """

    line: int
    cells: dict[str, str]
    label: Label


class LabeledImage(NamedTuple):
    """The path of an image, with its prompt and its label."""

    path: Path
    prompt: str
    label: Label


def read_labels(path: Path) -> dict[int, Label]:
    """Read the labels of images from a label file.

    A label file is a CSV file with one row per image.

    Parameters
    ----------
    path : Path

    Returns
    -------
    dict of int to Label
        Label of each image, by the number of the image. Images whose row contains only the number are left out.

    Raises
    ------
    SettingError
        The file cannot be read or is not a label file; see `read_rows`.

    Examples
    --------
    The columns are image, first_nameable, first_color, second_nameable, second_color, hybrid and extra. Image 17 has
    one entity, which is nameable and has a wrong color. Image 18 is not labeled:

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "labels.csv")
    ...     _ = path.write_text(",".join(COLUMNS) + "\\n17,1,0,,,0,0\\n18,,,,,,\\n")
    ...     read_labels(path)
    {17: Label(nameable=(True,), color=(False,), hybrid=False, extra=False)}
    """
    return {number: row.label for number, row in read_rows(path).items()}


def read_rows(path: Path, columns: tuple[str, ...] = COLUMNS, hint: str = _WRITE) -> dict[int, Row]:
    """Read the rows of a label file.

    Parameters
    ----------
    path : Path
    columns : tuple of str
        Names of all columns of the file, in their order. The default is the columns of a label file: ``image``,
        ``first_nameable``, ``first_color``, ``second_nameable``, ``second_color``, ``hybrid`` and ``extra``. A file may
        have further columns, but must have all of these.
    hint : str
        Last sentence of the error message if the file cannot be read. It states what the user can do.

    Returns
    -------
    dict of int to Row
        Row of each labeled image, by the number of the image. Rows without any value of a label are left out.

    Raises
    ------
    SettingError
        The file cannot be read, or its columns are not exactly `columns`. The number of an image is not a whole number
        of at least 1, or two labeled rows have the same number. A value of a label is not 0 or 1. The two columns of
        the second entity may be empty, but only both together.
    """
    try:
        reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
        table = [(reader.line_num, cells) for cells in reader if cells]
    except OutputError as error:
        raise SettingError(f"{error} {hint}") from error
    except csv.Error as error:
        raise SettingError(
            f"{path}, line {reader.line_num}: {error}; the file must be CSV with commas. Correct the line."
        ) from error
    line, header = table[0] if table else (1, [])
    if tuple(header) != columns:
        raise SettingError(
            f"{path}, line {line}: the columns are {', '.join(header) or 'missing'}; they must be "
            f"{', '.join(columns)}. Correct the first line."
        )
    rows: dict[int, Row] = {}
    for line, values in table[1:]:
        if len(values) != len(columns):
            raise SettingError(
                f"{path}, line {line} has {number_of(len(values), 'value')} ({', '.join(map(repr, values[:20]))}); it "
                f"must have {len(columns)}, one for each of {', '.join(columns)}. Correct the line."
            )
        cells = {name: value.strip() for name, value in zip(columns, values, strict=True)}
        number = _number(cells["image"], f"{path}, line {line}: image")
        if not any(cells[name] for name in COLUMNS[1:]):
            continue
        if number in rows:
            raise SettingError(
                f"{path}, line {line}: image {number} is labeled twice, here and in line {rows[number].line}; one row "
                "per image is allowed. Keep one of the rows."
            )
        rows[number] = Row(line, cells, _label(cells, f"{path}, line {line}"))
    return rows


def _number(text: str, name: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) == 0:
        checks.refuse(text, name, "a whole number from 1 to 999999999", hint="Correct the number.")
    return int(text)


def _label(cells: dict[str, str], where: str) -> Label:
    second = COLUMNS[3:5]
    single = not any(cells[name] for name in second)
    filled = [name for name in COLUMNS[1:] if not (single and name in second)]
    for name in filled:
        if cells[name] not in ("0", "1"):
            rule = (
                "0 or 1, or empty together with the other column of the second entity" if name in second else "0 or 1"
            )
            hint = "Correct the value, or clear all values of the row except the number to leave the image out."
            checks.refuse(cells[name], f"{where}: {name}", rule, hint=hint)
    seen = [cells[name] == "1" for name in filled]
    return Label(nameable=tuple(seen[:-2:2]), color=tuple(seen[1:-2:2]), hybrid=seen[-2], extra=seen[-1])


def read_key(path: Path, needed: Collection[str] = (), hint: str = _WRITE) -> dict[int, dict[str, Any]]:
    """Read a ``key.json``, which states the prompt of each image in a folder and further facts, such as the seed.

    Parameters
    ----------
    path : Path
        Path of the ``key.json``.
    needed : collection of str
        Keys that the entry of each image must have besides "prompt".
    hint : str
        Last sentence of the error message if the file cannot be read. It states what the user can do.

    Returns
    -------
    dict of int to dict
        Entry of each image, by the number of the image. An entry is a dict with the prompt and the further facts.

    Raises
    ------
    SettingError
        The file cannot be read or is not a JSON object. The number of an image is not a whole number of at least 1. An
        entry lacks the prompt or one of the keys in `needed`.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "key.json")
    ...     _ = path.write_text('{"17": {"prompt": "a cat", "seed": 100}}')
    ...     read_key(path)
    {17: {'prompt': 'a cat', 'seed': 100}}
    """
    try:
        found = read_json(path)
    except OutputError as error:
        raise SettingError(f"{error} {hint}") from error
    restore = "Restore the file, or write it again."
    if not isinstance(found, dict):
        checks.refuse(found, f"{path}: content", "an object with an entry per image", hint=restore)
    key = {}
    for text, made in found.items():
        number = _number(text, f"{path}: number of an image")
        prompt = made.get("prompt") if isinstance(made, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            checks.refuse(prompt, f"{path}, image {number}: prompt", "a text such as 'a cat and a dog'", hint=restore)
        if missing := [name for name in needed if name not in made]:
            raise SettingError(
                f"{path}, image {number}: the entry has only {', '.join(made)}; it must also have "
                f"{', '.join(missing)}. {restore}"
            )
        key[number] = made
    return key


def named_nouns(prompt: str) -> tuple[str, ...]:
    """Nouns of the things that a prompt names.

    The words "and" and "with" divide the prompt into parts; the noun of a part is its last word.

    Parameters
    ----------
    prompt : str
        Prompt whose parts each name one thing, such as "a cat and a red bow".

    Returns
    -------
    tuple of str
        One noun per part, in the order of the prompt.

    Examples
    --------
    >>> named_nouns("a monkey with a red bow")
    ('monkey', 'bow')
    """
    return tuple(part.split()[-1] for part in re.split(" and | with ", prompt) if part.split())


def find_image(folder: Path, number: int) -> Path | None:
    """Path of the image with a given number in a folder of labeled images; None if the folder has no such image.

    For example, image 17 is the file ``images/0017.png`` or ``images/0017.jpg`` in the folder.
    """
    return next(iter(sorted((folder / "images").glob(f"{number:04d}.*"))), None)


def open_image(path: Path) -> Image.Image:
    """Read an image file into memory, converted to RGB.

    Parameters
    ----------
    path : Path

    Raises
    ------
    SettingError
        The file is missing or not an image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SettingError(f"{path} cannot be read as an image: {clause(error)}. Restore the file.") from error


def read_images(folder: Path) -> list[LabeledImage]:
    """List the labeled images of a folder, with their prompts and labels; images without a label are left out.

    Parameters
    ----------
    folder : Path
        Folder with ``labels.csv`` (the label file), ``key.json`` (the prompt of each image) and ``images/``.

    Returns
    -------
    list of LabeledImage
        In the order of the label file.

    Raises
    ------
    SettingError
        ``labels.csv`` or ``key.json`` is missing or malformed. A labeled image is missing in ``key.json`` or in
        ``images/``. The label and the prompt of an image have different numbers of entities. A prompt has a noun that
        picture-world does not know.
    """
    path = folder / "labels.csv"
    rows, key = read_rows(path), read_key(folder / "key.json")
    found = []
    for number, row in rows.items():
        where = f"{path}, line {row.line}"
        if number not in key:
            known = f"the number of an image in {folder / 'key.json'}"
            checks.refuse(number, f"{where}: image", known, hint="Correct the number, or delete the row.")
        prompt = key[number]["prompt"]
        nouns = named_nouns(prompt)
        for noun in nouns:
            checks.choice(
                noun,
                f"{folder / 'key.json'}, image {number}, prompt {prompt!r}: noun",
                NOUNS,
                hint=f"Delete the image's row in {path}.",
            )
        if len(nouns) != len(row.label.nameable):
            labeled = number_of(len(row.label.nameable), "entity")
            raise SettingError(
                f"{where} has labels of {labeled}, but the prompt {prompt!r} has {len(nouns)}. Correct the row: leave "
                f"{COLUMNS[3]} and {COLUMNS[4]} empty if the prompt has one entity, and fill them in if it has two."
            )
        image = find_image(folder, number)
        if image is None:
            raise SettingError(
                f"{where}: {folder / 'images'} has no image {number}, such as {number:04d}.png or {number:04d}.jpg. "
                "Restore the image, or delete the row."
            )
        found.append(LabeledImage(image, prompt, row.label))
    return found
