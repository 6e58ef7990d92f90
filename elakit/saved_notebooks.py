"""Saved notebooks show elakit's widgets as images once the kernel that made them is gone."""

from __future__ import annotations

from typing import Any

WIDGET, IMAGE = "application/vnd.jupyter.widget-view+json", "image/png"


def keep_images(model: dict[str, Any], **_: Any) -> None:
    """Remove widget views that have an image from a notebook that is about to be saved.

    A widget view is a reference into a running kernel. JupyterLab prefers it to the image that `elakit.explore` and
    `elakit.live` store beside it, and shows "Error displaying widget" once the kernel has ended. The page that is open
    in the browser keeps its widgets; only the file changes. ``elakit lab`` uses this function as the pre-save hook of
    Jupyter Server. In another JupyterLab, add this line to ``jupyter_server_config.py``::

        c.ContentsManager.pre_save_hook = "elakit.saved_notebooks.keep_images"

    Parameters
    ----------
    model : dict
        Contents model of Jupyter Server; its notebook is changed in place. Files of another type stay as they are, and
        so do widgets without an image.

    Examples
    --------
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
