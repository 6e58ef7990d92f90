"""Plotly figures in notebooks are stored as PNG too."""

from __future__ import annotations

import base64
import io

import lab
import nbformat
import numpy as np
import plotly.graph_objects as go
from PIL import Image

from notebooks import static_figures

pytestmark = lab.MARKS


def test_a_png_of_the_size_of_the_figure_is_stored_beside_it() -> None:
    figure = go.Figure(go.Heatmap(z=[[1]], colorscale=[[0, "#ff0000"], [1, "#ff0000"]], showscale=False))
    figure.update_layout(width=300, height=200, margin=dict.fromkeys("lrtb", 0))
    bundle = {static_figures.PLOTLY_MIME: figure.to_plotly_json()}
    output = nbformat.v4.new_output("display_data", nbformat.from_dict(bundle))
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("figure", outputs=[output], execution_count=3)]
    )
    assert static_figures.without_images(notebook) == [3]

    assert static_figures.add_images(notebook) == 1
    assert static_figures.without_images(notebook) == []
    data = notebook.cells[0].outputs[0].data
    image = Image.open(io.BytesIO(base64.b64decode(data[static_figures.PNG_MIME])))
    assert image.size == (300, 200)
    pixels = np.asarray(image.convert("RGB"))[67:133, 100:200].reshape(-1, 3)
    assert (pixels == (255, 0, 0)).mean() > 0.95
    assert static_figures.PLOTLY_MIME in data
    nbformat.validate(notebook)
