"""Screenshots of the live panel: ``python -m benchmarks.live docs`` writes live-light.png and live-dark.png.

The panel runs in JupyterLab in headless Chromium (``tests/lab.py``). It shows a paused run of picture-world with boxes
placed by hand.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import nbformat
import typer
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import lab

CELLS = (
    'import elakit\n\npipe = elakit.load("picture-world")',
    'panel = elakit.live(pipe, "a green apple and a red car", seed=0)\npanel',
)
# A few guided steps with both boxes.
STEPS = """panel.options = {"anchor.guided": 0.6}
panel.draw("apple", (0.05, 0.15, 0.48, 0.75))
panel.draw("car", (0.5, 0.35, 0.97, 0.9))
panel.step(11)
panel.wait()"""
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}


def main(folder: Annotated[Path, typer.Argument(help="Folder for the images.")] = Path("docs")) -> None:
    """Write screenshots of the live panel in light and dark mode."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    with tempfile.TemporaryDirectory() as temporary:
        nbformat.write(notebook, Path(temporary) / "live.ipynb")
        with lab.open_lab(Path(temporary)) as running:
            shown = running.open("live.ipynb", timeout=180, height=1500)
            shown.run(timeout=300)
            shown.run_cell(STEPS, timeout=180)
            for name, theme in THEMES.items():
                path = folder / f"live-{name}.png"
                shown.page.evaluate(
                    "(theme) => window.jupyterapp.commands.execute('apputils:change-theme', { theme })", theme
                )
                shown.page.wait_for_function(
                    "(light) => document.body.dataset.jpThemeLight === light", arg=str(name == "light").lower()
                )
                shown.page.evaluate("document.querySelector('.ell-panel').scrollIntoView()")
                shown.page.wait_for_timeout(1000)  # wait for the transition of colors
                shown.page.locator(".ell-panel").screenshot(path=path)
                # a palette halves the file without a visible difference
                Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
                print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    typer.run(main)
