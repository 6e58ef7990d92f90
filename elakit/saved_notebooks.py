"""Pre-save hook of Jupyter Server: saved notebooks show elakit's widgets as images, which need no kernel."""

from __future__ import annotations

from typing import Any

WIDGET, IMAGE = "application/vnd.jupyter.widget-view+json", "image/png"


def keep_images(model: dict[str, Any], **_: Any) -> None:
    """Replace widgets by their static images in a notebook that is about to be saved.

    A widget in a notebook works only as long as its kernel runs. `elakit.explore` and `elakit.live` therefore store a
    static image beside each widget. JupyterLab does not show the image as long as the notebook contains the widget:
    after the kernel has ended, it shows "Error displaying widget". This function removes each widget that has an image.
    Only the file changes; the page that is open in the browser keeps its widgets.

    ``elakit lab`` uses this function as the pre-save hook of Jupyter Server. In another JupyterLab, add this line to
    ``jupyter_server_config.py``::

        c.ContentsManager.pre_save_hook = "elakit.saved_notebooks.keep_images"

    Parameters
    ----------
    model : dict
        Contents model of Jupyter Server. If it contains a notebook, the notebook is changed in place. A widget without
        an image is not replaced.

    Examples
    --------
    `WIDGET` is the MIME type of a widget, and `IMAGE` is that of a PNG image. Only the image is kept:

    >>> output = {"output_type": "display_data", "data": {WIDGET: {"model_id": "1"}, IMAGE: "iVBORw0KGgo="}}
    >>> keep_images({"type": "notebook", "content": {"cells": [{"cell_type": "code", "outputs": [output]}]}})
    >>> list(output["data"])
    ['image/png']
    """
    if model.get("type") != "notebook":
        return
    for cell in (model.get("content") or {}).get("cells", []):
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if IMAGE in data:
                data.pop(WIDGET, None)
