"""Generation of the images of a diagnosis in batches, with progress; runs that a folder contains are reused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median_low
from time import perf_counter, process_time

from elakit import checks
from elakit.attention import RecordSpec
from elakit.diagnosis.run_store import RunStore, run_key
from elakit.generation import generate
from elakit.guidance import Method
from elakit.guidance.metadata import options_of
from elakit.models import EMBEDDED, adapter_for, default_settings, loaded_with, name_of
from elakit.pipeline import Pipeline
from elakit.pipeline_call import Progress
from elakit.prompt import Prompt
from elakit.run import Run

OnProgress = Callable[[int, int, str], object]


def typical_seconds(seconds: Collection[float]) -> float:
    """Lower median of generation times; 0 if there are none.

    The first image of a process takes several times as long as the others. A mean would include this image and
    overestimate the time of plain images. The costs of the remedies, which are relative to the time of plain images,
    would then be underestimated. With a single image, the lower median has the same error.

    Parameters
    ----------
    seconds : collection of float
        Generation time of each image in seconds.

    Examples
    --------
    The result is one of the times; of two times, it is the shorter one:

    >>> typical_seconds([18.0, 4.9, 4.7]), typical_seconds([18.0, 4.7]), typical_seconds([])
    (4.9, 4.7, 0.0)
    """
    return float(median_low(seconds)) if seconds else 0.0


@dataclass(frozen=True)
class Batch:
    """Runs of one prompt with the same guidance.

    Attributes
    ----------
    runs : tuple of Run
        One run per seed.
    seconds : float
        Generation time per image in seconds: the lower median over the images. On a CPU, processor time is measured,
        because processor time does not depend on other processes. On other devices, wall-clock time is measured.
    """

    runs: tuple[Run, ...]
    seconds: float


class ImageGenerator:
    """Image generator with one pipeline and fixed settings; it also counts the images and reports the progress.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    steps, guidance_scale, negative_prompt, height, width : optional
        As in `elakit.generate`. Default: the settings of the model, and no negative prompt.
    batch : int, optional
        Largest number of seeds per batch. By default, a built-in model generates all seeds in one batch. Other models
        generate one image at a time, because their memory use is unknown.
    folder : str or Path, optional
        Folder in which runs are stored, and from which existing runs are read.
    on_progress : callable, optional
        Called with (images done, images in total, current activity) before each batch and after each step.

    Attributes
    ----------
    done : int
        Number of images that were generated or read from the folder so far.
    total : int
        Number of images that were announced with `expect`.

    Raises
    ------
    ModelError
        The pipeline's family is not supported.
    SettingError
        `batch` is less than 1.
    OutputError
        The folder cannot be written to, or contains files that do not belong to a diagnosis.

    Examples
    --------
    >>> import elakit
    >>> pipe = elakit.load("picture-world")
    >>> generator = ImageGenerator(pipe, steps=2)
    >>> batch = generator.generate(elakit.parse("a [cat] and a [lion]", pipe), [3, 5], what="plain")
    >>> [run.seed for run in batch.runs], generator.done
    ([3, 5], 2)
    """

    def __init__(
        self,
        pipe: Pipeline,
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        batch: int | None = None,
        folder: str | Path | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        defaults = default_settings(pipe)
        self.pipe = pipe
        self.batch = None if batch is None else checks.whole_number(batch, "batch", 1)
        self.steps = defaults.steps if steps is None else steps
        self.guidance_scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
        self.negative_prompt = negative_prompt
        sides = adapter_for(pipe).default_size()
        self.height, self.width = sides[0] if height is None else height, sides[1] if width is None else width
        self.store = None if folder is None else RunStore(folder)
        self.done, self.total = 0, 0
        self._on_progress = on_progress or (lambda done, total, what: None)

    def expect(self, images: int) -> None:
        """Add `images` to `total`, the number of images to generate; a negative number reduces `total`."""
        self.total += images

    def generate(
        self,
        prompt: Prompt,
        seeds: Sequence[int],
        guidance: Method | None = None,
        *,
        what: str,
        record: RecordSpec | None = None,
        stop_after: int | None = None,
    ) -> Batch:
        """Generate one image per seed; runs that the folder contains are read instead.

        Parameters
        ----------
        prompt : Prompt
        seeds : sequence of int
        guidance : Method, optional
            Guidance method; None for plain runs.
        what : str
            Name of the current activity, which `on_progress` receives.
        record : RecordSpec, optional
            Attention to record; by default the attention to the prompt's words, at every step and layer.
        stop_after : int, optional
            Number of steps after which each run ends early; by default all steps are run.

        Returns
        -------
        Batch

        Raises
        ------
        ElakitError
            For the reasons listed in `elakit.generate` and `Run.save`.
        """
        settings = {
            "model": name_of(self.pipe), "steps": self.steps, "guidance_scale": self.guidance_scale,
            "scheduler": type(adapter_for(self.pipe).pipe.scheduler).__name__,
            "method": getattr(guidance, "name", None), "negative_prompt": self.negative_prompt,
            "height": self.height, "width": self.width,
            **loaded_with(self.pipe),
        }  # fmt: skip
        if stop_after is not None and stop_after < self.steps:
            settings["stopped"] = stop_after
        keys = {seed: run_key(prompt, seed, settings, options_of(guidance)) for seed in seeds}
        stored = {} if self.store is None else self.store.read(keys)
        # images of a remedy are stored with fewer tokens; as images of the method, they are generated again
        wanted = set((record or RecordSpec()).channels(prompt).labels)
        stored = {seed: one for seed, one in stored.items() if wanted <= _recorded(one[0])}
        runs = {seed: replace(run, prompt=prompt) for seed, (run, _) in stored.items()}
        seconds = {seed: taken for seed, (_, taken) in stored.items()}
        self.done += len(stored)
        clock = process_time if self.pipe.device.type == "cpu" else perf_counter
        for batch in self._batches([seed for seed in seeds if seed not in runs]):
            began = clock()
            generated = self._generate(prompt, batch, guidance, record, what, stop_after)
            taken = (clock() - began) / len(batch)
            for run in generated:
                runs[run.seed], seconds[run.seed] = run, taken
                if self.store is not None:
                    self.store.write(keys[run.seed], run, taken)
            self.done += len(batch)
        self._report(0, what)
        return Batch(tuple(runs[seed] for seed in seeds), typical_seconds(seconds.values()))

    def _batches(self, seeds: list[int]) -> Iterator[list[int]]:
        size = self.batch or (max(len(seeds), 1) if name_of(self.pipe) in EMBEDDED else 1)
        return (seeds[i : i + size] for i in range(0, len(seeds), size))

    def _generate(
        self,
        prompt: Prompt,
        seeds: Sequence[int],
        guidance: Method | None,
        record: RecordSpec | None,
        what: str,
        stop_after: int | None,
    ) -> list[Run]:
        def after_step(so_far: Progress) -> bool:
            made, last = so_far.step + 1, min(stop_after or so_far.steps, so_far.steps)
            self._report(min(len(seeds) * made // last, len(seeds)), what)
            return made == stop_after and made < so_far.steps

        self._report(0, what)
        return generate(
            self.pipe,
            prompt,
            seed=list(seeds),
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            negative_prompt=self.negative_prompt,
            height=self.height,
            width=self.width,
            guidance=guidance,
            record=record or RecordSpec(),
            stop_if=after_step,
            progress=False,
        )

    def _report(self, more: int, what: str) -> None:
        done = self.done + more
        self._on_progress(done, max(self.total, done), what)


def _recorded(run: Run) -> set[str]:
    """Labels of the tokens whose attention a run recorded."""
    return set() if run.recording is None else set(run.recording.tokens)
