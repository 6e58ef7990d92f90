"""Import of diffusers; if the import fails, the error names the cause."""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any

from elakit.errors import ModelError

# Packages that diffusers imports if they are installed, and the lowest releases that work (pyproject.toml). With an
# older release, installed for another package, the import of diffusers fails.
_BESIDE = {"peft": (0, 17)}


def import_diffusers() -> Any:
    """Import diffusers, including the modules that are otherwise imported at the first use of a pipeline.

    Returns
    -------
    module
        The package ``diffusers``.

    Raises
    ------
    ModelError
        Raised when diffusers cannot be imported. The message names the cause and, if known, the package to upgrade.

    Examples
    --------
    >>> import_diffusers().DiffusionPipeline.__name__
    'DiffusionPipeline'
    """
    try:
        import diffusers

        diffusers.DiffusionPipeline  # noqa: B018  it is imported at first access, with all that it needs
    except (ImportError, RuntimeError, AttributeError) as error:
        # the first lines of diffusers' error name its own modules, the last one the cause
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"diffusers cannot be imported ({lines[-1].rstrip('.')}). {_remedy()}") from error
    return diffusers


def hide_loading_bars() -> None:
    """Switch off the progress bars that diffusers and transformers show while they load a pipeline.

    Raises
    ------
    ModelError
        Raised when diffusers cannot be imported.
    """
    library = import_diffusers()
    import transformers

    library.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _remedy() -> str:
    for package, lowest in _BESIDE.items():
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if tuple(int(part) for part in re.findall(r"\d+", installed)[: len(lowest)]) < lowest:
            bound = ".".join(map(str, lowest))
            return (
                f"{package} {installed} is installed, but diffusers needs {package} {bound} or later. Run "
                f"`pip install -U '{package}>={bound}'`, or uninstall {package}, which is used for LoRA weights only."
            )
    return (
        "Upgrade the package that this error names, or install elakit in a new environment; `elakit doctor` lists the "
        "installed versions."
    )
