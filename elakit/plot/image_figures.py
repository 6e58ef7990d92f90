"""Images of runs: as data URIs, side by side, and with the entities' attention as an overlay."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from PIL import Image

from elakit.errors import SettingError
from elakit.numbering import number_of
from elakit.plot import style
from elakit.plot.maps import at_step, labels_of_one_prompt, tint

if TYPE_CHECKING:
    from elakit.run import Run

# Images up to this side are encoded losslessly; larger ones, of which a report may contain many, as JPEG.
LOSSLESS_SIDE = 256
# PNG: the highest level takes 8 times as long for files that are 3% smaller.
# WebP: method 6 with quality 100 takes 50 times as long for files that are 0.1% smaller.
SAVED: dict[str, dict[str, Any]] = {
    "png": {"compress_level": 6},
    "jpeg": {"quality": 90},
    "webp": {"lossless": True, "quality": 75, "method": 2},
}


def data_uri(image: Image.Image, most: int | None = None) -> str:
    """Image as a data URI: PNG if the longer side of the encoded image is at most 256 pixels, else JPEG.

    Parameters
    ----------
    image : PIL.Image.Image
    most : int, optional
        Maximum length of the longer side in pixels. A larger image is reduced to this length before it is encoded.
        Default: the size is kept.

    Returns
    -------
    str

    Examples
    --------
    >>> data_uri(Image.new("RGB", (2, 2)))[:30]
    'data:image/png;base64,iVBORw0K'
    """
    image = image.convert("RGB")
    if most is not None and max(image.size) > most:
        image = image.copy()
        image.thumbnail((most, most), Image.Resampling.LANCZOS)
    return _encoded(image, "png" if max(image.size) <= LOSSLESS_SIDE else "jpeg")


def _encoded(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **SAVED[kind])
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def figure_uri(image: Image.Image) -> str:
    """Image as a data URI for a figure, enlarged if it is small and reduced if it is large.

    Sizes are lengths of the longer side. An image of at most 128 pixels is enlarged by the largest whole factor for
    which the result has at most 256 pixels. An image of more than 512 pixels is reduced to 512 pixels.

    A result of at most 256 pixels is encoded as lossless WebP, which takes a quarter less space than PNG. A larger
    result is encoded as JPEG.
    """
    image = _enlarged(image.convert("RGB")).copy()
    image.thumbnail((512, 512), Image.Resampling.LANCZOS)
    return _encoded(image, "webp" if max(image.size) <= LOSSLESS_SIDE else "jpeg")


def _enlarged(image: Image.Image) -> Image.Image:
    """Enlarge a small image by a whole factor, and return any other image unchanged.

    A small image is at most 128 pixels long on its longer side. The factor is the largest for which this side becomes
    at most 256 pixels long. Without the enlargement, browsers would blur small images in plotly figures.
    """
    factor = LOSSLESS_SIDE // max(image.size)
    if factor < 2:
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def light_gray(image: Image.Image) -> Image.Image:
    """Image in light gray (mode "L"), as a background for colors."""
    return image.convert("L").point(lambda value: round(255 - 0.55 * (255 - value)))


def images(
    *runs: Run,
    columns: int = 4,
    panel: int = 180,
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> go.Figure:
    """Images of runs side by side.

    Parameters
    ----------
    *runs : Run
        Runs whose images are shown.
    columns : int
        Maximum number of images per row.
    panel : int
        Width of an image in pixels.
    names : sequence of str, optional
        Heading of each image. Default: "plain" for a plain run, otherwise the name of the method, such as "ELA". If
        several runs have the same name, their headings also state the seed.
    title : str, optional
        Title of the figure, or "" for no title. Default: the prompt of the first run.

    Returns
    -------
    plotly.graph_objects.Figure

    Raises
    ------
    SettingError
        No run is given, or the number of names differs from the number of runs.

    Examples
    --------
    >>> import elakit
    >>> run = elakit.generate(elakit.load("picture-world"), "a [cat] and a [lion]", steps=1, progress=False)
    >>> len(images(run).layout.images)
    1
    """
    if not runs:
        raise SettingError(
            "images: there is no run to show. Pass at least one run, such as the result of elakit.generate."
        )
    if names is not None and len(names) != len(runs):
        raise SettingError(
            f"names has {number_of(len(names), 'entry')} for {number_of(len(runs), 'run')}; give one name per run."
        )
    across = min(max(1, columns), len(runs))
    down = -(-len(runs) // across)
    ratio = max(run.image.height / run.image.width for run in runs)
    headings = [style.wrap(style.escape(name), panel / 6.8) for name in names or style.run_names(runs)]
    more = 16 * (max(lines for _, lines in headings) - 1)
    made = style.Panels(
        down, across, width=panel, height=panel * ratio, gap=(14, 34 + more), margin=(16, 16, 22 + more, 16),
        title=style.escape(style.shorten(runs[0].prompt.text, 90) if title is None else title),
    )  # fmt: skip
    for i, (run, (heading, _)) in enumerate(zip(runs, headings, strict=True)):
        row, column = (part + 1 for part in divmod(i, across))
        height, width = run.image.height, run.image.width
        made.map_axes(row, column, height, width)
        made.add_nothing(row, column)
        made.image(row, column, figure_uri(run.image), height, width)
        made.over(row, column, heading)
    return made.figure()


def entity_maps(
    run: Run,
    *others: Run,
    step: int | None = None,
    panel: int | None = None,
    title: str | None = None,
) -> go.Figure:
    """Attention map of each entity as an overlay on the finished image.

    Each row shows one run. The first panel of a row is the image. Every further panel shows the map of one entity, over
    the image in gray. All maps of one entity share a color scale, so a paler map has weaker attention.

    Parameters
    ----------
    run, *others : Run
        Recorded runs of one prompt.
    step : int, optional
        Step to show, counted from 0. Negative numbers count back from the last step. Default: the mean over all steps.
    panel : int, optional
        Width of a panel in pixels; by default a row is at most 860 pixels wide.
    title : str, optional
        Title of the figure, or "" for no title. Default: "Attention of each entity".

    Returns
    -------
    plotly.graph_objects.Figure

    Raises
    ------
    RecordingError
        A run was not recorded.
    SettingError
        The step was not recorded, or the runs have different entities.

    Examples
    --------
    >>> import elakit
    >>> run = elakit.generate(elakit.load("picture-world"), "a [cat] and a [lion]", steps=1, progress=False)
    >>> [trace.name for trace in entity_maps(run).data if trace.type == "heatmap"]
    ['cat', 'lion']
    """
    runs = (run, *others)
    found = [at_step(each.entity_maps(), step) for each in runs]
    maps, when = [values for values, _ in found], found[0][1]
    entities = labels_of_one_prompt((values.token.values for values in maps), "entity_maps")
    across = 1 + len(entities)
    panel = panel or int(min(190, (style.WIDTH - 80) / across - 10))
    ratio = run.image.height / run.image.width
    made = style.Panels(
        len(runs), across, width=panel, height=panel * ratio, gap=(10, 10), margin=(64, 16, 24, 14),
        title=style.escape("Attention of each entity" if title is None else title),
        caption=f"{when} Full color: the largest value of the entity in this figure.",
    )  # fmt: skip
    colors = style.entity_colors(entities)
    largest = {label: max(float(each.sel(token=label).max()) for each in maps) for label in entities}
    for i, (each, values, name) in enumerate(zip(runs, maps, style.run_names(runs), strict=True), start=1):
        rows, columns = values.sizes["y"], values.sizes["x"]
        made.beside(i, 1, style.escape(name).replace(", ", "<br>"))
        made.map_axes(i, 1, rows, columns)
        made.add_nothing(i, 1)
        made.image(i, 1, figure_uri(each.image), rows, columns)
        pale = figure_uri(light_gray(each.image))
        for j, label in enumerate(entities, start=2):
            made.map_axes(i, j, rows, columns)
            made.image(i, j, pale, rows, columns)
            shown = values.sel(token=label).values
            made.add(i, j, tint(shown, largest[label], colors[label], label, f"{name}, {label}"))
    made.over(1, 1, "image")
    for j, label in enumerate(entities, start=2):
        made.over(1, j, style.escape(style.shorten(label, panel // 7)))
    return made.figure()
