"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from elakit.errors import OutputError


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; one that is there is replaced.

    Raises
    ------
    OutputError
        It cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut may leave the name without the content
        os.replace(part, path)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}. Make room, or choose a folder you may write to."
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def check_path(path: str | Path) -> Path:
    """Refuse, before any work is done, a path that a report cannot be written to.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    Path
        Absolute.

    Raises
    ------
    OutputError
        The path is a folder, or its folder does not exist or cannot be written to.

    Examples
    --------
    >>> check_path("no-such-folder/report.html")
    Traceback (most recent call last):
    ...
    elakit.errors.OutputError: The report cannot be written to no-such-folder/report.html: there is no folder ...
    """
    target = Path(path).expanduser().absolute()
    wrong = f"The report cannot be written to {path}:"
    if not str(path) or target.is_dir():
        raise OutputError(f"{wrong} it is a folder. Give the name of a file, such as {Path(path, 'report.html')}.")
    if not target.parent.is_dir():
        raise OutputError(
            f"{wrong} there is no folder {target.parent}. Create it (mkdir -p) or choose one that exists."
        )
    if not os.access(target.parent, os.W_OK):
        raise OutputError(f"{wrong} the folder {target.parent} may not be written to. Choose another one.")
    return target
