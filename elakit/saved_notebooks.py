"""Pre-save hook of Jupyter Server: saved notebooks show elakit's widgets as images, which need no kernel."""

from __future__ import annotations

from typing import Any

WIDGET, IMAGE = "application/vnd.jupyter.widget-view+json", "image/png"


def keep_images(model: dict[str, Any], **_: Any) -> None:
    """Replace widgets by their static images in a notebook that is about to be saved.

    A widget in a notebook is a reference to a running kernel. JupyterLab prefers it to the image that `elakit.explore`
    and `elakit.live` store beside it, and shows "Error displaying widget" after the kernel has ended. Only the file
    changes: the page that is open in the browser keeps its widgets. ``elakit lab`` uses this function as the pre-save
    hook of Jupyter Server. In another JupyterLab, add this line to ``jupyter_server_config.py``::

        c.ContentsManager.pre_save_hook = "elakit.saved_notebooks.keep_images"

    Parameters
    ----------
    model : dict
        Contents model of Jupyter Server. If it contains a notebook, the notebook is changed in place. A widget without
        an image is not replaced.

    Examples
    --------
    `WIDGET` and `IMAGE` are the MIME types of a widget and of its image:

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
