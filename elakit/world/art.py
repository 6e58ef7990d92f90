"""Drawings from which scenes are composed: which drawings show a noun, and the pixels of a drawing.

Drawings are in ``data/art/<artist>/``; ``data/art/index.json`` lists the drawings of each noun. Vector files are
rasterized with resvg (the package ``resvg-py``, part of the extra ``elakit[train]``).
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from elakit.errors import SettingError
from elakit.numbering import plural
from elakit.resources import data_path

ARTISTS = ("fluent-3d", "fluent-flat", "noto", "noto-v1", "own")
VIEWS = ("body", "face")
MARGIN = 2  # transparent pixels kept around a drawing, so that rotating it cuts nothing off


@dataclass(frozen=True)
class Drawing:
    """One artist's drawing of one noun.

    Attributes
    ----------
    noun : str
        Noun of the thing that the drawing shows.
    artist : str
        One of ``ARTISTS``; "own" drawings were made for this project.
    file : str
        Path below ``data/art``.
    view : {"body", "face"}
        "face" if the drawing shows only the face of an animal, else "body".
    head : tuple of float or None
        (x, y, width): the top of the head, where a crown or a bow is placed, and the width of the head at this point.
        The numbers are fractions of the side of the square that `rasterize` returns. None for things without a head and
        for heads that are hard to crown.
    eyes : tuple of float or None
        (x, y, width): the point between the eyes, where glasses are placed, and the width of the glasses. The numbers
        are fractions as in `head`. None for things without eyes and for heads drawn from the side.
    """

    noun: str
    artist: str
    file: str
    view: str
    head: tuple[float, float, float] | None = None
    eyes: tuple[float, float, float] | None = None

    @property
    def icon(self) -> str:
        """Name of the drawing in its artist's set: the file's name without folder and extension."""
        return self.file.split("/")[-1].rsplit(".", 1)[0]


@lru_cache(maxsize=1)
def _index() -> dict[str, list[dict[str, Any]]]:
    return json.loads(data_path("art", "index.json").read_text(encoding="utf-8"))


def drawings(noun: str, artists: tuple[str, ...] = ARTISTS) -> tuple[Drawing, ...]:
    """Drawings of a noun, in the order of ``data/art/index.json``.

    Parameters
    ----------
    noun : str
    artists : tuple of str
        Artists whose drawings are returned. If none of them drew the noun, all its drawings are returned.

    Returns
    -------
    tuple of Drawing

    Raises
    ------
    SettingError
        The noun or an artist is unknown.

    Examples
    --------
    >>> [d.artist for d in drawings("lion", ("noto", "fluent-3d"))]
    ['noto', 'fluent-3d']
    """
    index = _index()
    if noun not in index:
        raise SettingError(f"picture-world has no drawing of {noun!r}. Choose from {', '.join(index)}.")
    if unknown := set(artists) - set(ARTISTS):
        named = ", ".join(map(repr, sorted(unknown)))
        raise SettingError(f"Unknown {plural('artist', len(unknown))} {named}. Choose from {', '.join(ARTISTS)}.")
    every = tuple(_drawing(noun, row) for row in index[noun])
    return tuple(d for d in every if d.artist in artists) or every


def _drawing(noun: str, row: dict[str, Any]) -> Drawing:
    anchors = {name: tuple(row[name]) for name in ("head", "eyes") if name in row}
    return Drawing(noun=noun, artist=row["file"].split("/")[0], file=row["file"], view=row["view"], **anchors)


def rasterize(drawing: Drawing, size: int) -> np.ndarray:
    """Pixels of a drawing, cropped to its opaque part and centered in a square.

    Parameters
    ----------
    drawing : Drawing
    size : int
        Side of the square in pixels.

    Returns
    -------
    ndarray, float32, (size, size, 4)
        Straight (not premultiplied) RGBA in [0, 1].

    Raises
    ------
    SettingError
        The drawing is a vector file, and resvg-py is not installed or produces a blank image.
    """
    path = data_path("art", *drawing.file.split("/"))
    if path.suffix == ".svg":
        try:
            import resvg_py
        except ImportError as error:
            raise SettingError(
                f"Drawing {drawing.file} is a vector file and needs resvg-py: pip install 'elakit[train]'."
            ) from error
        png = resvg_py.svg_to_bytes(
            svg_string=path.read_text(encoding="utf-8"), width=2 * size, height=2 * size, skip_system_fonts=True
        )
        image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    else:
        image = Image.open(path).convert("RGBA")
    ink = image.getchannel("A").point(lambda alpha: 255 if alpha > 24 else 0).getbbox()
    if ink is None:
        raise SettingError(
            f"Drawing {drawing.file} comes out blank. Releases of resvg-py before 0.2.2 cannot draw it: "
            "pip install -U 'resvg-py>=0.2.2'."
        )
    image = image.crop(ink)
    scale = (size - 2 * MARGIN) / max(image.size)
    # "RGBa" is premultiplied: resizing straight alpha would bleed the color of transparent pixels into the edges
    small = image.convert("RGBa").resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )
    canvas = Image.new("RGBa", (size, size))
    canvas.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    return np.asarray(canvas.convert("RGBA"), np.float32) / 255
