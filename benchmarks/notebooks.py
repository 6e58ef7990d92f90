"""Runs of all notebooks in JupyterLab: ``python -m benchmarks.notebooks``, or with parts of names to select some.

Opens each notebook in headless Chromium, runs it there, and prints the duration, exceptions, console errors and
requests to other hosts than localhost. The exit status is 1 if there is an exception, an error or such a request.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from tests import lab

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help="Run only notebooks whose names contain one of these texts.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Time limit per notebook, in seconds.")] = 600,
    images: Annotated[Path | None, typer.Option(help="Folder for a screenshot of each notebook.")] = None,
) -> None:
    """Run notebooks in JupyterLab, and print one row for each."""
    chosen = [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if not names or any(n in path.name for n in names)]
    wrong = False
    print(
        "| notebook | seconds | errors | console errors | requests to other hosts |\n|---|---|---|---|---|", flush=True
    )
    with tempfile.TemporaryDirectory() as folder:
        for path in chosen:  # copies, so that autosave does not change the notebooks
            shutil.copy(path, folder)
        with lab.open_lab(Path(folder)) as running:
            for path in chosen:
                console, foreign = len(running.console), len(running.foreign)
                notebook = running.open(path.name)
                seconds = notebook.run(timeout)
                errors = notebook.errors()
                said = running.console[console:], running.foreign[foreign:]
                if images is not None:
                    images.mkdir(parents=True, exist_ok=True)
                    notebook.page.screenshot(path=images / f"{path.stem}.png")
                notebook.close()
                print(f"| {path.stem} | {seconds:.0f} | {len(errors)} | {len(said[0])} | {len(said[1])} |", flush=True)
                for line in (*errors, *said[0], *said[1]):
                    wrong = True
                    print(f"  {line}", flush=True)
    raise typer.Exit(int(wrong))


if __name__ == "__main__":
    typer.run(main)
