"""Storage of runs in a folder, each with its generation time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from elakit.errors import ElakitError, OutputError, clause
from elakit.files import read_json, write_json
from elakit.prompt import Prompt
from elakit.run import Run, open_run


class RunStore:
    """Runs that are stored in the folder of a diagnosis, each with its generation time.

    Each run is stored under its key, which `run_key` computes from the prompt, the seed and the settings.

    Parameters
    ----------
    folder : str or Path
        Folder of a diagnosis; created if it does not exist.

    Raises
    ------
    OutputError
        The folder cannot be written to, or contains files that do not belong to a diagnosis.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            if self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / "runs").is_dir():
                raise OutputError(
                    f"{folder} contains files that do not belong to a diagnosis. Choose a new folder, or the folder of "
                    "an earlier diagnosis."
                )
            (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        except ElakitError:
            raise
        except (OSError, ValueError) as error:
            raise OutputError(
                f"The runs cannot be written to {str(folder)!a}: {clause(getattr(error, 'strerror', None) or error)}. "
                "Choose a folder that you may write to."
            ) from error

    def read(self, keys: Mapping[int, str]) -> dict[int, tuple[Run, float]]:
        """Read runs by their keys.

        Parameters
        ----------
        keys : mapping of int to str
            Key of each requested run, by seed.

        Returns
        -------
        dict of int to (Run, float)
            Each run with its generation time in seconds, by seed. Runs that are missing, incomplete or damaged are left
            out.
        """
        found = {}
        for seed, key in keys.items():
            with suppress(ElakitError, OSError, ValueError, KeyError, TypeError):
                times = read_json(self.folder / "runs" / f"{key}.json")
                found[seed] = (open_run(self.folder / "runs" / key), float(times["seconds"]))
        return found

    def write(self, key: str, run: Run, seconds: float) -> None:
        """Store a run, and then its generation time in seconds, which marks the run as complete."""
        run.save(self.folder / "runs" / key, overwrite=True)
        write_json(self.folder / "runs" / f"{key}.json", {"seconds": seconds})

    def contains(self, key: str) -> bool:
        """True if the folder contains a complete run with this key."""
        return (self.folder / "runs" / f"{key}.json").exists()


def run_key(prompt: Prompt, seed: int, settings: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Key of a run: a hash of everything that determines its image and attention.

    Parameters
    ----------
    prompt : Prompt
    seed : int
    settings : mapping
        Settings as in `Run.settings`. Settings that do not change the image are ignored.
    options : mapping
        Options of the guidance method; empty for a plain run.

    Returns
    -------
    str
        16 hexadecimal digits, the name of the run's folder.
    """
    names = (
        "model", "variant", "lora", "scheduler", "steps", "guidance_scale", "negative_prompt", "height", "width",
        "method", "stopped",
    )  # fmt: skip
    used = {name: settings.get(name) for name in names} | {"guidance_scale": float(settings["guidance_scale"])}
    identity = [prompt.to_dict(), seed, used, options]
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=repr).encode()).hexdigest()[:16]


def key_of_run(run: Run) -> str:
    """Key under which a finished run is stored: a hash of its prompt, seed and settings, from `run_key`."""
    return run_key(run.prompt, run.seed, run.settings, run.guidance.options if run.guidance else {})
