"""Static image of the explorer, for places that cannot show widgets: GitHub, nbviewer, mail and print."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import xarray as xr
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from elakit.errors import ElakitError
from elakit.numbering import step_name
from elakit.plot import style
from elakit.plot.image_figures import light_gray
from elakit.run import Run
from elakit.widgets.shared.colors import lookup

# Pixels; the image has twice its display size, for sharp text.
_SCALE = 2
_PANEL, _GAP, _HEAD, _MARGIN = 168, 10, 24, 14
_MOST_ENTITIES = 5
_OPACITY = 0.72


def png(
    runs: Sequence[Run], note: str = "The explorer needs a running notebook; this is its middle step."
) -> tuple[bytes, int]:
    """Static image of the explorer as PNG, with one row per run.

    A row begins with the finished image. It continues with one panel for each of the first five entities. A panel shows
    the attention of its entity and the outlines of all regions, at the middle step of the run.

    Parameters
    ----------
    runs : sequence of Run
        Recorded runs.
    note : str
        Text at the bottom of the image.

    Returns
    -------
    bytes
        Content of the PNG file.
    int
        Display width in pixels.
    """
    maps = [_middle(run) for run in runs]
    across = 1 + max(0 if each is None else each.sizes["token"] for each in maps)
    heights = [_PANEL * run.image.height // run.image.width for run in runs]
    width = 2 * _MARGIN + across * _PANEL + (across - 1) * _GAP
    foot = 44
    height = 2 * _MARGIN + sum(heights) + len(runs) * (_HEAD + _GAP) + foot
    canvas = Image.new("RGB", (width * _SCALE, height * _SCALE), "#ffffff")
    draw = ImageDraw.Draw(canvas)
    tops = [0.0 if each is None else float(each.max()) for each in maps]
    top = max(tops) or 1.0
    y = _MARGIN
    for run, name, values, high in zip(runs, style.run_names(runs), maps, heights, strict=True):
        _write(draw, _MARGIN, y, name)
        _paste(canvas, run.image.convert("RGB"), 0, y + _HEAD, high)
        labels = [] if values is None else [str(label) for label in values.token.values]
        colors = style.entity_colors([entity.label for entity in run.prompt.entities])
        for i, label in enumerate(labels, start=1):
            assert values is not None
            x = _MARGIN + i * (_PANEL + _GAP)
            _square(draw, x, y, colors.get(label, style.FAINT))
            _write(draw, x + 16, y, f"{style.shorten(label, 16)}, {step_name(int(values.step))}")
            _paste(canvas, _overlay(run.image, values.sel(token=label).values, top), i, y + _HEAD, high)
            _outline(canvas, run, int(values.step), i, y + _HEAD, high, colors)
        y += _HEAD + high + _GAP
    _color_bar(canvas, draw, y + 4, top)
    _write(draw, width - _MARGIN, y + 2, note, style.FAINT, right=True)
    out = io.BytesIO()
    canvas.save(out, "PNG", optimize=True)
    return out.getvalue(), width


def _middle(run: Run) -> xr.DataArray | None:
    """Maps of the first five entities (token, y, x) at the middle step; None if no entity was recorded."""
    try:
        maps = run.entity_maps()
    except ElakitError:
        return None
    return maps.isel(step=maps.sizes["step"] // 2, token=slice(_MOST_ENTITIES))


def _overlay(image: Image.Image, values: np.ndarray, top: float) -> Image.Image:
    """An attention map in colors, laid over the image in light gray.

    `values` is the map (y, x). `top` is the map value that has the last color of the color map.
    """
    levels = (values / top * 255).clip(0, 255).astype(np.uint8)
    colored = Image.fromarray(lookup("viridis")[levels])
    size = _PANEL * _SCALE, _PANEL * _SCALE * image.height // image.width
    base = light_gray(image).convert("RGB").resize(size)
    return Image.blend(base, colored.resize(size, Image.Resampling.NEAREST), _OPACITY)


def _paste(canvas: Image.Image, image: Image.Image, column: int, y: int, height: int) -> None:
    size = _PANEL * _SCALE, height * _SCALE
    enlarged = Image.Resampling.NEAREST if image.width < _PANEL else Image.Resampling.LANCZOS
    left = _MARGIN + column * (_PANEL + _GAP)
    canvas.paste(image.resize(size, enlarged), (left * _SCALE, y * _SCALE))


def _outline(
    canvas: Image.Image, run: Run, step: int, column: int, y: int, height: int, colors: dict[str, str]
) -> None:
    """Outline the regions of a step on one of the images in `canvas`.

    Each outline lies inside its region, so that the outlines of adjacent regions are both visible. `column` is the
    index of the image in its row, counted from 0. `y` is the position of the image's upper edge, and `height` is the
    image's height, both in display pixels. `canvas` has two pixels per display pixel. `colors` has the color of each
    outline, by label of the entity.
    """
    regions = run.regions.sel(step=step)
    corner = (_MARGIN + column * (_PANEL + _GAP)) * _SCALE, y * _SCALE
    size = _PANEL * _SCALE, height * _SCALE
    for label in map(str, regions.entity.values):
        region = Image.fromarray(regions.sel(entity=label).values).resize(size, Image.Resampling.NEAREST)
        inside = np.asarray(region, bool)
        for depth, ink in ((5, "#ffffff"), (3, colors.get(label, style.INK))):
            edge = inside & ~binary_erosion(inside, np.ones((3, 3)), iterations=depth)
            canvas.paste(ink, corner, Image.fromarray(edge))


def _color_bar(canvas: Image.Image, draw: ImageDraw.ImageDraw, y: int, top: float) -> None:
    bar = Image.fromarray(lookup("viridis")[None])
    canvas.paste(bar.resize((120 * _SCALE, 10 * _SCALE)), (_MARGIN * _SCALE, y * _SCALE))
    _write(draw, _MARGIN, y + 12, "0", style.FAINT)
    _write(draw, _MARGIN + 120, y + 12, f"{top:.2g} probability", style.FAINT)


def _square(draw: ImageDraw.ImageDraw, x: int, y: int, color: str) -> None:
    corners = [x * _SCALE, (y + 4) * _SCALE, (x + 10) * _SCALE, (y + 14) * _SCALE]
    draw.rectangle(corners, fill=color)


def _write(
    draw: ImageDraw.ImageDraw, x: int, y: int, text: str, color: str = style.INK, *, right: bool = False
) -> None:
    font = ImageFont.load_default(13 * _SCALE)
    draw.text((x * _SCALE, y * _SCALE), text, fill=color, font=font, anchor="ra" if right else "la")
