"""Draw a prompt over several seeds, batch by batch, with progress; and keep each run as it is drawn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from elakit.attention import RecordSpec
from elakit.errors import ElakitError, OutputError, SettingError
from elakit.files import write_file
from elakit.generation import Progress, Run, generate, open_run
from elakit.guidance import Method
from elakit.guidance.metadata import options_of
from elakit.models import EMBEDDED, default_settings, name_of
from elakit.prompt import Prompt

OnProgress = Callable[[int, int, str], object]


@dataclass(frozen=True)
class Drawn:
    """Runs of one prompt, drawn one way.

    Attributes
    ----------
    runs : tuple of Run
        One a seed.
    seconds : float
        Time of an image, as it was when they were drawn: processor time where the model runs on the processor, which
        does not depend on what else runs there, else wall-clock time.
    """

    runs: tuple[Run, ...]
    seconds: float


class Drawer:
    """Draws prompts with the same pipeline and settings, and counts the images.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    steps, guidance_scale : optional
        As `elakit.generate` takes them.
    batch : int, optional
        Most seeds drawn at a time; by default all for an embedded model, 1 for others, whose memory is not known.
    folder : str or Path, optional
        Where runs are kept as they are drawn, and taken from where they are there already.
    on_progress : callable, optional
        Called with (images done, images in all, what is drawn now), after each step too.

    Raises
    ------
    SettingError
        A batch of less than 1.
    OutputError
        The folder cannot be written to, or is of something else.

    Examples
    --------
    >>> import elakit
    >>> pipe = elakit.load("picture-world")
    >>> drawer = Drawer(pipe, steps=2)
    >>> drawn = drawer.draw(elakit.parse("a [cat] and a [lion]", pipe), [3, 5], what="plain")
    >>> [run.seed for run in drawn.runs], drawer.done
    ([3, 5], 2)
    """

    def __init__(
        self,
        pipe: Any,
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        batch: int | None = None,
        folder: str | Path | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
            raise SettingError(f"batch={batch!r}: must be a whole number of 1 or more.")
        defaults = default_settings(pipe)
        self.pipe, self.batch = pipe, batch
        self.steps = defaults.steps if steps is None else steps
        self.guidance_scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
        self.shelf = None if folder is None else Shelf(folder)
        self.done, self.total = 0, 0
        self._on_progress = on_progress or (lambda done, total, what: None)

    def expect(self, images: int) -> None:
        """So many images more will be drawn."""
        self.total += images

    def skip(self, images: int) -> None:
        """So many of those expected will not be drawn after all."""
        self.total -= images

    def draw(
        self,
        prompt: Prompt,
        seeds: Sequence[int],
        guidance: Method | None = None,
        *,
        what: str,
        record: RecordSpec | None = None,
        stop_after: int | None = None,
    ) -> Drawn:
        """Draw a prompt from some seeds.

        Parameters
        ----------
        prompt : Prompt
        seeds : sequence of int
        guidance : Method, optional
        what : str
            What is drawn, for the progress.
        record : RecordSpec, optional
            By default the prompt's words at every step and layer.
        stop_after : int, optional
            Leave off after so many steps.

        Returns
        -------
        Drawn
        """
        about = {
            "model": name_of(self.pipe), "steps": self.steps, "guidance_scale": self.guidance_scale,
            "scheduler": type(self.pipe.scheduler).__name__, "method": getattr(guidance, "name", None),
        }  # fmt: skip
        if stop_after is not None and stop_after < self.steps:
            about["stopped"] = stop_after
        options = options_of(guidance)
        keys = {seed: key_of(prompt, seed, about, options) for seed in seeds}
        kept = {} if self.shelf is None else self.shelf.take(keys)
        runs = {seed: replace(run, prompt=prompt) for seed, (run, _) in kept.items()}
        seconds = {seed: took for seed, (_, took) in kept.items()}
        self.done += len(kept)
        missing = [seed for seed in seeds if seed not in runs]
        clock = process_time if self.pipe.device.type == "cpu" else perf_counter
        size = self.batch or (len(missing) if name_of(self.pipe) in EMBEDDED else 1)
        for batch in (missing[i : i + size] for i in range(0, len(missing), max(size, 1))):
            began = clock()
            drawn = self._batch(prompt, batch, guidance, record, what, stop_after)
            took = (clock() - began) / len(batch)
            for run in drawn:
                runs[run.seed], seconds[run.seed] = run, took
                if self.shelf is not None:
                    self.shelf.put(keys[run.seed], run, took)
            self.done += len(batch)
        self._tell(0, what)
        return Drawn(tuple(runs[seed] for seed in seeds), sum(seconds.values()) / max(len(seconds), 1))

    def _batch(
        self,
        prompt: Prompt,
        seeds: Sequence[int],
        guidance: Method | None,
        record: RecordSpec | None,
        what: str,
        stop_after: int | None,
    ) -> list[Run]:
        def after(so_far: Progress) -> bool:
            made, last = so_far.step + 1, min(stop_after or so_far.steps, so_far.steps)
            self._tell(min(len(seeds) * made // last, len(seeds)), what)
            return made == stop_after and made < so_far.steps

        self._tell(0, what)
        return generate(
            self.pipe,
            prompt,
            seed=list(seeds),
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            guidance=guidance,
            record=record or RecordSpec(),
            stop_if=after,
            progress=False,
        )

    def _tell(self, more: int, what: str) -> None:
        done = self.done + more
        self._on_progress(done, max(self.total, done), what)


class Shelf:
    """Runs in a folder, each written whole, with the time it took.

    Parameters
    ----------
    folder : str or Path
        Made where it is not there.

    Raises
    ------
    OutputError
        It cannot be written to, or is a folder of something else.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / "runs").is_dir():
            raise OutputError(
                f"{folder} holds something else than a diagnosis. Give a new folder, or one that a diagnosis is in."
            )
        try:
            (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"The runs cannot be kept in {folder}: {error.strerror or error}. Give a folder you may write to."
            ) from error

    def take(self, keys: Mapping[int, str]) -> dict[int, tuple[Run, float]]:
        """Those of the runs asked for that are there and whole, by seed, with the seconds each took."""
        found = {}
        for seed, key in keys.items():
            with suppress(ElakitError, OSError, ValueError, KeyError):
                times = json.loads((self.folder / "runs" / f"{key}.json").read_text(encoding="utf-8"))
                found[seed] = (open_run(self.folder / "runs" / key), float(times["seconds"]))
        return found

    def put(self, key: str, run: Run, seconds: float) -> None:
        """Keep a run."""
        run.save(self.folder / "runs" / key, overwrite=True)
        write_file(self.folder / "runs" / f"{key}.json", json.dumps({"seconds": seconds}).encode())

    def has(self, key: str) -> bool:
        """Whether a run is there."""
        return (self.folder / "runs" / f"{key}.json").exists()


def key_of(prompt: Prompt, seed: int, settings: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Name of a run in its folder: equal for runs that come out equal.

    Parameters
    ----------
    prompt : Prompt
    seed : int
    settings : mapping
        As in `Run.settings`; of it count model, scheduler, steps, guidance_scale, method and stopped.
    options : mapping
        Of the method.
    """
    names = ("model", "scheduler", "steps", "guidance_scale", "method", "stopped")
    counted = {name: settings.get(name) for name in names} | {"guidance_scale": float(settings["guidance_scale"])}
    about = [prompt.to_dict(), seed, counted, options]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=repr).encode()).hexdigest()[:16]


def key_of_run(run: Run) -> str:
    """Name of a finished run in its folder, the one it would have been drawn under."""
    return key_of(run.prompt, run.seed, run.settings, run.guidance.options if run.guidance else {})
