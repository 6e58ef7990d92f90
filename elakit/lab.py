"""The command ``elakit lab``, which opens the notebooks in JupyterLab."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from elakit.errors import OutputError, SettingError, clause
from elakit.resources import notebooks_path

# widgets of a saved notebook are images, which need no kernel
HOOK = "--ContentsManager.pre_save_hook=elakit.saved_notebooks.keep_images"


def lab(
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="Folder to which the notebooks are copied. Default: ./elakit-notebooks; in a checkout, no copy."
        ),
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open a browser.")] = True,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the server. Default: chosen by JupyterLab.")
    ] = None,
    allow_root: Annotated[
        bool, typer.Option("--allow-root", help="Allow JupyterLab to run as root, as in a container.")
    ] = False,
) -> None:
    """Open the notebooks in JupyterLab.

    The notebooks are first copied to FOLDER, where existing files are not overwritten. In a checkout of the repository,
    they are opened in place if no FOLDER is given.

    Example: elakit lab ~/elakit-notebooks --no-browser --port 8890
    """
    if importlib.util.find_spec("jupyterlab") is None:
        raise SettingError("JupyterLab is not installed. Install it with  pip install 'elakit[lab]'")
    shipped = notebooks_path()
    if not shipped.is_dir():
        raise OutputError(
            "This installation of elakit has no notebooks. Install elakit again, from a wheel or from a complete "
            "checkout of the repository."
        )
    installed = shipped.parent == Path(__file__).parent
    if folder is None:
        folder = Path("elakit-notebooks") if installed else shipped
    if folder.resolve() != shipped.resolve():
        copy_notebooks(shipped, folder)
    words = [sys.executable, "-m", "jupyterlab", str(folder), HOOK]
    words += [] if browser else ["--no-browser"]
    words += [] if port is None else [f"--port={port}"]
    words += ["--allow-root"] if allow_root else []
    raise typer.Exit(subprocess.call(words))


def copy_notebooks(source: Path, target: Path) -> None:
    """Copy the notebooks in `source` to the folder `target`; notebooks that already exist in `target` are skipped.

    Raises
    ------
    OutputError
        The target folder cannot be written to.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        for notebook in sorted(source.glob("*.ipynb")):
            if not os.path.lexists(target / notebook.name):
                shutil.copyfile(notebook, target / notebook.name)
    except (OSError, ValueError) as error:
        raise OutputError(
            f"The notebooks cannot be copied to {target}: {clause(error)}. Choose another folder."
        ) from error
