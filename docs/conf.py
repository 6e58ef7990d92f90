"""Sphinx settings: Markdown pages, numpydoc docstrings, and the saved notebooks, which are not executed.

``python -m sphinx -W --keep-going -b html docs docs/_build`` builds the site. The pages load nothing from other hosts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plotly
import plotly.io
from docutils import nodes
from latex2mathml.converter import convert

import elakit

DOCS = Path(__file__).parent
FIGURE, WIDGET = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json"
PLOTLY = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"


def figure_html(figure: dict[str, Any], number: int) -> str:
    """Return a saved plotly figure as HTML; the first one of a page (0) loads the site's copy of plotly."""
    shown = {"data": figure["data"], "layout": figure.get("layout", {}), "frames": figure.get("frames", [])}
    return plotly.io.to_html(
        shown,
        config={"displaylogo": False},
        include_plotlyjs=False if number else f"../_static/{PLOTLY.name}",
        auto_play=False,
        full_html=False,
        validate=False,
        div_id=f"figure-{number}",
    )


def copy_notebooks(source: Path, target: Path) -> None:
    """Copy notebooks into the sources, with figures as HTML and widgets as the image that is saved with them."""
    target.mkdir(exist_ok=True)
    for old in target.glob("*.ipynb"):
        if not (source / old.name).exists():
            old.unlink()
    for path in sorted(source.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        notebook["metadata"].pop("widgets", None)
        figures = 0
        for cell in notebook["cells"]:
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                data.pop(WIDGET, None)
                if FIGURE in data:
                    output["data"] = {"text/html": figure_html(data[FIGURE], figures)}
                    figures += 1
        text = json.dumps(notebook)
        copy = target / path.name
        # an unchanged copy keeps its time stamp, so that Sphinx does not read it again
        if not copy.exists() or copy.read_text(encoding="utf-8") != text:
            copy.write_text(text, encoding="utf-8")


def visit_math(writer: Any, node: nodes.Element) -> None:
    """Write a formula as MathML, which browsers render natively."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    writer.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Copy the notebooks before the sources are read."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    copy_notebooks(DOCS.parent / "notebooks", DOCS / "_notebooks")
    return {"parallel_read_safe": True, "parallel_write_safe": True}


project = "elakit"
author = "the authors of elakit"
copyright = author
release = version = elakit.__version__
html_title = f"elakit {release}"

extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc", "myst_nb"]
exclude_patterns = ["_build", "_templates", "jupyter_execute"]
templates_path = ["_templates"]
# autosummary writes its pages with the first suffix
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}

html_math_renderer = "mathml"
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # would be loaded from another host
myst_heading_anchors = 3

default_role = "py:obj"
autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_typehints = "none"  # docstrings state types with shapes
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_attributes_as_param_list = True

html_theme = "furo"
html_static_path = [str(PLOTLY), "style"]
html_css_files = ["elakit.css"]
html_copy_source = False
