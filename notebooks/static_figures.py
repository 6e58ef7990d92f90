"""Static images of the plotly figures in notebooks, for viewers that do not run JavaScript.

GitHub, nbviewer and ``nbconvert --to html`` do not show the plotly mimetype. `add_images` renders each figure in
headless Chromium and stores the PNG beside the plotly JSON; JupyterLab still shows the interactive figure.
"""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import plotly
from PIL import Image

PLOTLY_MIME, PNG_MIME = "application/vnd.plotly.v1+json", "image/png"
PLOTLY = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
LARGE = 60_000  # bytes above which a PNG is stored with a palette
COLORS = 256  # size of the palette
SCALE = 1.0  # pixels of the PNG per pixel of the figure
DEFAULT_SIZE = 700, 450  # of figures that state none, as in plotly


@contextmanager
def open_page() -> Iterator[Any]:
    """Open a page with plotly.js in headless Chromium.

    Yields
    ------
    playwright.sync_api.Page

    Raises
    ------
    RuntimeError
        Chromium or playwright is not installed.
    """
    path = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        path = None
    if path is None:
        raise RuntimeError(
            "Images of figures need Chromium and playwright: apt-get install chromium, pip install playwright."
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        try:
            page = browser.new_page(device_scale_factor=SCALE)
            page.set_content("<style>body { margin: 0 }</style><div id=figure></div>")
            page.add_script_tag(path=str(PLOTLY))
            yield page
        finally:
            browser.close()


def image(page: Any, figure: dict[str, Any]) -> bytes:
    """PNG of a plotly figure, with a palette.

    Parameters
    ----------
    page : playwright.sync_api.Page
        A page with plotly.js.
    figure : dict
        Plotly JSON with data and layout. The first frame of an animation is shown.
    """
    layout = figure.get("layout", {})
    sides = zip(("width", "height"), DEFAULT_SIZE, strict=True)
    width, height = (int(layout.get(side) or size) for side, size in sides)
    page.set_viewport_size({"width": width, "height": height})
    page.evaluate(
        """async ([data, layout, width, height]) => {
            await Plotly.newPlot("figure", data, { ...layout, width, height }, { staticPlot: true });
            const sources = [...document.querySelectorAll("#figure image")].map((node) => node.href.baseVal);
            await Promise.all(sources.map((source) => Object.assign(new Image(), { src: source }).decode()));
        }""",
        [figure.get("data", []), layout, width, height],
    )
    png = page.screenshot()
    colors = Image.open(io.BytesIO(png)).convert("RGB")
    stored = _png(colors)
    if len(stored) > LARGE:
        # a palette chosen by median cut: that of maximum coverage breaks the smooth backgrounds of images into bands
        stored = _png(colors.quantize(COLORS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE))
    return stored


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def add_images(notebook: nbformat.NotebookNode) -> int:
    """Store a PNG beside each plotly figure in the outputs of a notebook.

    Returns
    -------
    int
        Number of figures.

    Raises
    ------
    RuntimeError
        There are figures, but Chromium or playwright is not installed.
    """
    bundles = [
        output.data
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if PLOTLY_MIME in output.get("data", {})
    ]
    if bundles:
        with open_page() as page:
            for bundle in bundles:
                bundle[PNG_MIME] = base64.b64encode(image(page, bundle[PLOTLY_MIME])).decode()
    return len(bundles)


def without_images(notebook: nbformat.NotebookNode) -> list[int]:
    """Numbers of the code cells with a plotly figure that has no PNG."""
    return [
        cell.execution_count
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if PLOTLY_MIME in output.get("data", {}) and PNG_MIME not in output.data
    ]
