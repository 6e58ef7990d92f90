"""A folder of runs, each complete and with its generation time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from elakit.errors import ElakitError, OutputError
from elakit.files import read_json, write_json
from elakit.prompt import Prompt
from elakit.run import Run, open_run


class RunStore:
    """Runs in a folder.

    Parameters
    ----------
    folder : str or Path
        Created if it does not exist.

    Raises
    ------
    OutputError
        The folder cannot be written to, or contains other files.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            if self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / "runs").is_dir():
                raise OutputError(
                    f"{folder} contains other files than a diagnosis. Choose a new folder, or that of a diagnosis."
                )
            (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        except ElakitError:
            raise
        except (OSError, ValueError) as error:
            raise OutputError(
                f"The runs cannot be written to {str(folder)!a}: {getattr(error, 'strerror', None) or error}. Choose a "
                "folder that you may write to."
            ) from error

    def read(self, keys: Mapping[int, str]) -> dict[int, tuple[Run, float]]:
        """Read the requested runs that exist and are complete: run and seconds by seed."""
        found = {}
        for seed, key in keys.items():
            with suppress(ElakitError, OSError, ValueError, KeyError, TypeError):
                times = read_json(self.folder / "runs" / f"{key}.json")
                found[seed] = (open_run(self.folder / "runs" / key), float(times["seconds"]))
        return found

    def write(self, key: str, run: Run, seconds: float) -> None:
        """Store a run; it counts as complete once its time is written."""
        run.save(self.folder / "runs" / key, overwrite=True)
        write_json(self.folder / "runs" / f"{key}.json", {"seconds": seconds})

    def contains(self, key: str) -> bool:
        """True if the folder contains a complete run with this key."""
        return (self.folder / "runs" / f"{key}.json").exists()


def run_key(prompt: Prompt, seed: int, settings: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Folder name of a run: equal for runs with equal results.

    Parameters
    ----------
    prompt : Prompt
    seed : int
    settings : mapping
        As in `Run.settings`; all that change the image are used.
    options : mapping
        Options of the method.
    """
    names = (
        "model", "variant", "lora", "scheduler", "steps", "guidance_scale", "negative_prompt", "height", "width",
        "method", "stopped",
    )  # fmt: skip
    used = {name: settings.get(name) for name in names} | {"guidance_scale": float(settings["guidance_scale"])}
    identity = [prompt.to_dict(), seed, used, options]
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=repr).encode()).hexdigest()[:16]


def key_of_run(run: Run) -> str:
    """Folder name of a finished run."""
    return run_key(run.prompt, run.seed, run.settings, run.guidance.options if run.guidance else {})
