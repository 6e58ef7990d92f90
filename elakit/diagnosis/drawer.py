"""Draw a prompt over several seeds, batch by batch, with progress; and keep each run as it is drawn."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elakit.attention import RecordSpec
from elakit.errors import OutputError, SettingError
from elakit.files import write_file
from elakit.generate import Progress, Run, generate, open_run
from elakit.guidance import Method
from elakit.guidance.engine import options_of
from elakit.models import EMBEDDED, name_of
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
        Wall-clock time of a picture, as it was when they were drawn.
    """

    runs: tuple[Run, ...]
    seconds: float


class Drawer:
    """Draws prompts with the same pipeline and settings, and counts the pictures.

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
        Called with (pictures done, pictures in all, what is drawn now), after each step too.

    Raises
    ------
    SettingError
        A batch of less than 1.
    OutputError
        The folder cannot be written to, or is something else.

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
        self.pipe, self.steps, self.guidance_scale, self.batch = pipe, steps, guidance_scale, batch
        self.shelf = None if folder is None else Shelf(folder)
        self.done, self.total = 0, 0
        self._on_progress = on_progress or (lambda done, total, what: None)

    def expect(self, pictures: int) -> None:
        """So many pictures more will be drawn."""
        self.total += pictures

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
        spec = record or RecordSpec()
        keys = {seed: self._key(prompt, seed, guidance, spec, stop_after) for seed in seeds}
        kept = {} if self.shelf is None else self.shelf.take(keys)
        runs = {seed: replace(run, prompt=prompt) for seed, (run, _) in kept.items()}
        seconds = {seed: took for seed, (_, took) in kept.items()}
        self._tell(len(kept), what)
        self.done += len(kept)
        missing = [seed for seed in seeds if seed not in runs]
        size = self.batch or (len(missing) if name_of(self.pipe) in EMBEDDED else 1)
        for batch in (missing[i : i + size] for i in range(0, len(missing), max(size, 1))):
            began = time.perf_counter()
            for run in self._batch(prompt, batch, guidance, spec, what, stop_after):
                runs[run.seed] = run
            took = (time.perf_counter() - began) / len(batch)
            for seed in batch:
                seconds[seed] = took
                if self.shelf is not None:
                    self.shelf.put(keys[seed], runs[seed], took)
            self.done += len(batch)
        self._tell(0, what)
        return Drawn(tuple(runs[seed] for seed in seeds), sum(seconds.values()) / max(len(seconds), 1))

    def _batch(
        self,
        prompt: Prompt,
        seeds: Sequence[int],
        guidance: Method | None,
        spec: RecordSpec,
        what: str,
        stop_after: int | None,
    ) -> list[Run]:
        def after(so_far: Progress) -> bool:
            made, last = so_far.step + 1, stop_after or so_far.steps
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
            record=spec,
            stop_if=after,
            progress=False,
        )

    def _tell(self, more: int, what: str) -> None:
        done = self.done + more
        self._on_progress(done, max(self.total, done), what)

    def _key(self, prompt: Prompt, seed: int, guidance: Method | None, spec: RecordSpec, stop_after: int | None) -> str:
        """Name of a run: equal for runs that would come out equal."""
        about = {
            "prompt": prompt.to_dict(), "seed": seed, "model": name_of(self.pipe), "dtype": str(self.pipe.dtype),
            "scheduler": type(self.pipe.scheduler).__name__, "steps": self.steps,
            "guidance_scale": self.guidance_scale, "method": getattr(guidance, "name", None),
            "options": options_of(guidance), "record": repr(spec), "stop_after": stop_after,
        }  # fmt: skip
        text = json.dumps(about, sort_keys=True, default=repr)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Shelf:
    """Runs in a folder, each written whole with the time it took.

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

    def take(self, keys: dict[int, str]) -> dict[int, tuple[Run, float]]:
        """Those of the runs asked for that are there, by seed, with their seconds."""
        found = {}
        for seed, key in keys.items():
            with suppress(OutputError, OSError, ValueError, KeyError):
                times = json.loads((self.folder / "runs" / f"{key}.json").read_text(encoding="utf-8"))
                found[seed] = (open_run(self.folder / "runs" / key), float(times["seconds"]))
        return found

    def put(self, key: str, run: Run, seconds: float) -> None:
        """Keep a run."""
        run.save(self.folder / "runs" / key, overwrite=True)
        write_file(self.folder / "runs" / f"{key}.json", json.dumps({"seconds": seconds}).encode())
